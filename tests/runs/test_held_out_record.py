"""What is kept and shown of held-out samples: lines of metrics.jsonl, the curves, the report, a tracker."""

import math
from typing import Any

import numpy as np
import pytest

from ddpm_hf.pictures import training_curves
from ddpm_hf.runs import evaluations, lowest_bound, read_metrics, write_report
from ddpm_hf.runs.report import memorising

NUMBERS: dict[str, Any] = {
    "held_out_l_simple": 0.2,
    "train_l_simple": 0.1,
    "held_out_bpd": 3.0,
    "train_bpd": 2.5,
    "held_out_bpd_groups": [3.0] * 8,
    "evaluated_on": "abcd",
}


def evaluation(
    step: int, bpd: float, train_bpd: float = 2.5, *, spread: float = 0.0, **changed: Any
) -> dict[str, Any]:
    """A line whose eight groups differ from their mean by ±spread in turn."""
    groups = [bpd + spread * (-1) ** i for i in range(8)]
    measured = {"held_out_bpd": bpd, "train_bpd": train_bpd, "held_out_bpd_groups": groups}
    return {"step": step, **NUMBERS, **measured, **changed}


def training(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "images_per_s": 10.0}


def test_a_line_is_written_and_found_again(log, tmp_path):
    assert not log.has_evaluation(3, "abcd")
    log.write_evaluation(3, NUMBERS)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.pop("time_utc") and line == {"step": 3, **NUMBERS}
    assert log.has_evaluation(3, "abcd") and not log.has_evaluation(3, "efgh") and not log.has_evaluation(4, "abcd")


def test_a_tracker_gets_the_numbers_and_no_lists(log, monkeypatch):
    received = {}
    monkeypatch.setattr(log.accelerator, "log", lambda numbers, step: received.update({step: numbers}))
    log.write_evaluation(3, NUMBERS)
    assert received == {3: {name: NUMBERS[name] for name in list(NUMBERS)[:4]}}


def test_lines_about_other_samples_than_the_last_are_left_out():
    lines = [evaluation(1, 2.0, evaluated_on="other"), training(2), evaluation(2, 3.0), evaluation(3, 3.5)]
    assert evaluations(lines) == lines[2:]
    assert lowest_bound(evaluations(lines)) == lines[2]


@pytest.mark.parametrize("value", [None, "3", [3], True])
def test_lines_changed_by_hand_end_nothing(value, tmp_path):
    lines = [evaluation(1, 3.0), evaluation(2, 3.5, held_out_bpd=value), evaluation(3, 4.0, held_out_bpd_groups=value)]
    assert memorising(lines) == ""
    write_report(tmp_path, metrics=lines, step=3, num_steps=3)
    assert lowest_bound(evaluations(lines)) is not None


def test_the_lowest_bound_is_the_first_of_equals_and_finite():
    lines = [evaluation(1, math.nan), evaluation(2, 3.0), evaluation(3, 3.0), evaluation(4, -math.inf)]
    assert lowest_bound(lines) == lines[1]
    assert lowest_bound(lines[:1]) is None and lowest_bound([]) is None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ""),
        ([evaluation(100, 3.0)], ""),
        ([evaluation(100, 3.2), evaluation(200, 3.0)], ""),
        (
            [evaluation(100, 3.0, 2.5), evaluation(1200, 3.4, 2.0, spread=0.1)],
            # ± 0.1 of eight: 0.1 √(8/7) / √8
            "Since step 100 the bound of held-out samples has risen by 0.4 ± 0.038 bits/dim, while that of training "
            "samples has fallen by 0.5: the network memorises what it is trained on.",
        ),
        (
            [evaluation(100, 3.0, 2.5), evaluation(200, 3.4, 2.75, spread=0.1)],
            "Since step 100 the bound of held-out samples has risen by 0.4 ± 0.038 bits/dim, and that of training "
            "samples by 0.25: the network gets worse at both.",
        ),
        ([evaluation(100, 3.0), evaluation(200, 3.11, spread=0.1)], ""),  # 2.9 standard errors
        ([evaluation(100, 3.0, spread=2.0), evaluation(200, 3.01, spread=2.0)], "Since step 100"),  # in every group
    ],
)
def test_a_clear_rise_is_said_in_one_sentence(lines, words, tmp_path):
    assert memorising(lines).startswith(words) and bool(memorising(lines)) == bool(words)
    write_report(tmp_path, metrics=[training(1), *lines], step=1, num_steps=2)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("has risen by" in page) == bool(words) and ("lowest held-out bound" in page) == bool(lines)


def test_the_report_has_the_best_step_beside_the_last(tmp_path):
    lines = [evaluation(100, 2.96543, 2.9), training(150), evaluation(1200, 3.4, 1.25)]
    write_report(tmp_path, metrics=lines, step=1200, num_steps=2000)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>2.965 bits/dim at step 100; training samples 2.9</td>" in page
    assert "<td>3.4 bits/dim at step 1,200; training samples 1.25</td>" in page
    assert "<td>0.00667</td>" in page  # the loss of step 150


@pytest.mark.slow
def test_curves_show_both_kinds_and_mark_the_lowest_bound():
    bounds = [(10, 5.0, 5.0), (20, 3.0, 2.5), (30, 4.0, 1.5)]
    lines = [evaluation(*bound) for bound in bounds]
    steps = [training(step) for step in range(1, 31)]
    plain = training_curves([*steps, *lines])
    drawn, marked = (training_curves([*steps, *lines], lines, lowest=lowest) for lowest in (None, 20))
    assert plain.size == (800, 600) and drawn.size == marked.size == (800, 1200)
    lower = np.asarray(drawn.convert("RGB")).astype(int)[600:]
    red = (lower[..., 0] > 150) & (lower[..., 1:] < 80).all(axis=-1)
    blue = (lower[..., 2] > 150) & (lower[..., 0] < 80)
    assert red.sum() > 300 and blue.sum() > 300
    dark = [(np.asarray(picture.convert("L"))[600:] < 60).sum(axis=0) for picture in (drawn, marked)]
    assert (dark[1] - dark[0]).max() > 200  # one column, over more than half of two panels


@pytest.mark.parametrize("lines", [[evaluation(5, 3.0)], [evaluation(5, -1.0), evaluation(6, 2.0)]])
def test_curves_begin_with_whatever_comes_first(lines):
    """Before the first line of training there are no panels for it; a density's bound may be below 0."""
    assert training_curves(lines, lines, lowest=5).size == (800, 600)
