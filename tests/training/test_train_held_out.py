"""training/train.py with held-out samples: the weights are those without, and the lines those of any run."""

import html
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_runs import IMPORTANCE, final_hashes, finish, finish_pair, pixels, refusal, start, start_pair, train

from ddpm_hf.hub import model_card
from ddpm_hf.runs import RunLog, checkpoints, read_metrics, watching

pytestmark = pytest.mark.integration

SPLIT: dict[str, Any] = {"eval_every": 2, "eval_split": "test", "eval_samples": 12}
KEPT: dict[str, Any] = {"eval_every": 2, "held_out_every": 4, "eval_samples": 12}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Every line, in order, without what depends on the clock."""
    timed = ("time_utc", "images_per_s")
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder) if "held_out_bpd" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.3, "random_flip": True, "gradient_accumulation_steps": 2},
        {**IMPORTANCE, "variance_type": "learned", "prediction_type": "v_prediction", "dropout": 0.3},
        {"mixed_precision": "bf16"},
    ],
    ids=["dropout", "importance", "bf16"],
)
def test_weights_are_those_of_a_run_without_evaluations(tmp_path, options):
    plain, evaluated = train(tmp_path / "plain", **options), train(tmp_path / "evaluated", **SPLIT, **options)
    assert final_hashes(plain, 6) == final_hashes(evaluated, 6)
    assert [line for line in lines_of(evaluated) if "loss" in line] == lines_of(plain)
    assert [line["step"] for line in evaluations_of(evaluated)] == [2, 4, 6]
    for line in evaluations_of(evaluated):
        measured = [line[f"{part}_{name}"] for part in ("held_out", "train") for name in ("l_simple", "bpd")]
        assert np.isfinite(measured).all() and min(measured) > 0


def test_the_end_is_evaluated_whatever_the_interval(tmp_path):
    folder = train(tmp_path, **{**KEPT, "eval_every": 4})
    assert [line["step"] for line in evaluations_of(folder)] == [4, 6]


def test_points_are_evaluated(tmp_path):
    folder = train(tmp_path, dataset_name="moons", hidden_size=16, num_layers=1, **KEPT)
    assert [line["step"] for line in evaluations_of(folder)] == [2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [SPLIT, KEPT], ids=["split", "kept"])
def test_an_interrupted_run_has_the_lines_of_a_whole_one(tmp_path, interrupted, held_out):
    options = {**held_out, "num_steps": 8, "dropout": 0.3}
    whole, parted = train(tmp_path / "whole", **options), tmp_path / "parted"
    for after in (4, 7):  # after the checkpoints at 3 and 6
        interrupted(parted, after=after, **options)
    train(parted, **options)
    assert final_hashes(parted, 8) == final_hashes(whole, 8)
    assert lines_of(parted) == lines_of(whole) and len(evaluations_of(whole)) == 4


@pytest.mark.slow
def test_seeds_differ_and_hold_out_the_same(tmp_path):
    """Of two runs the held-out curves can be compared: the same samples, t and noise."""
    one, other = (evaluations_of(train(tmp_path / str(seed), seed=seed, **KEPT)) for seed in (0, 1))
    assert one[0]["evaluated_on"] == other[0]["evaluated_on"] and one[0]["held_out_bpd"] != other[0]["held_out_bpd"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    alone = evaluations_of(train(tmp_path / "alone", **KEPT))
    finish_pair(start_pair(tmp_path / "pair", **KEPT))
    pair = evaluations_of(tmp_path / "pair")
    for one, other in zip(alone, pair, strict=True):
        for name, value in one.items():  # six updates, whose gradients are summed in another order
            assert other[name] == (value if name == "evaluated_on" else pytest.approx(value, rel=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cuts_an_evaluation_off_until_the_next_start(tmp_path, monkeypatch, number):
    whole, folder = train(tmp_path / "whole", **KEPT), tmp_path / "run"
    original, received = watching.evaluate, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        values = original(*args, **kwargs)
        if not received:
            received.append(number)
            os.kill(os.getpid(), number)
            pytest.fail("the evaluation went on")
        return values

    with monkeypatch.context() as patched:
        patched.setattr(watching, "evaluate", interrupted)
        with pytest.raises(SystemExit) as exit_info:
            train(folder, **KEPT)
    assert exit_info.value.code == 128 + number
    assert [step for step, _ in checkpoints.found_in(folder / "checkpoints")] == [2] and not evaluations_of(folder)
    train(folder, **KEPT)
    assert final_hashes(folder, 6) == final_hashes(whole, 6) and lines_of(folder) == lines_of(whole)


def test_a_stop_before_an_evaluation_leaves_it_to_the_next_start(tmp_path, monkeypatch):
    whole, folder = train(tmp_path / "whole", **KEPT), tmp_path / "run"
    original = RunLog.update

    def interrupted(self: RunLog, loss: Any) -> None:
        original(self, loss)
        if self.progress.n == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "update", interrupted)
        with pytest.raises(SystemExit):
            train(folder, **KEPT)
    assert [line["step"] for line in evaluations_of(folder)] == [2]
    train(folder, **KEPT)
    assert lines_of(folder) == lines_of(whole)


# ---- what may change -----------------------------------------------------------------------------------------------


def test_what_is_only_evaluated_may_change(finished):
    train(finished, num_steps=8, **SPLIT)
    train(finished, num_steps=10, **{**SPLIT, "eval_every": 5, "eval_samples": 3})
    train(finished, num_steps=12)
    # step 6 is when its run goes on, since it is due and was not; step 8 is not due in the next run
    assert [line["step"] for line in evaluations_of(finished)] == [6, 8, 10]


@pytest.mark.parametrize(("options", "change"), [(KEPT, "held_out_every was None, is 4")])
def test_another_held_out_part_changes_what_is_trained_on(finished_run, options, change):
    message = refusal(finished_run, num_steps=8, **options)
    assert change in message and "--allow_changes" in message and "eval_every" not in message


def test_a_checkpoint_from_before_these_options_goes_on(finished):
    """As those have no such options that were written before there were any."""
    for _, checkpoint in checkpoints.found_in(finished / "checkpoints"):
        path = checkpoint / checkpoints.MANIFEST
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for name in ("held_out_every", "eval_every", "eval_data_dir", "eval_split", "eval_samples"):
            del manifest["options"][name]
        del manifest["files"][checkpoints.MANIFEST]
        path.write_text(json.dumps(manifest), encoding="utf-8")
    train(finished, num_steps=8)
    assert [line["step"] for line in lines_of(finished)] == list(range(1, 9))


def test_too_few_samples_to_train_on_are_refused(tmp_path):
    message = refusal(tmp_path, held_out_every=2, global_batch_size=1000)
    assert re.search(r"digits has \d{3} \(\d{3} are held out\) samples, fewer than global_batch_size=1000", message)


# ---- a whole run ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_evaluates_a_folder_of_held_out_pictures(tmp_path):
    """From the command to what it leaves: lines, curves of twice the height, a report; and the overlap is named."""
    array = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for name, chosen in (("train", range(20)), ("test", range(18, 30))):
        (tmp_path / name).mkdir()
        for i in chosen:
            Image.fromarray(array[i]).save(tmp_path / name / f"{i}.png")
    folders = {"train_data_dir": tmp_path / "train", "eval_data_dir": tmp_path / "test"}
    cache = {"DDPM_HF_CACHE": str(tmp_path / "cache")}
    output = finish(start(tmp_path / "run", variables=cache, dataset_name="none", eval_every=3, **folders))
    assert "2 of the 12 held-out samples are also trained on, with equal values" in output
    assert [line["step"] for line in evaluations_of(tmp_path / "run")] == [3, 6]
    assert len(evaluations_of(tmp_path / "run")[0]["held_out_bpd_groups"]) == 8
    assert pixels(tmp_path / "run" / "curves.png").shape == (1200, 800, 3)
    assert "lowest held-out bound" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    loss = [line["loss"] for line in lines_of(tmp_path / "run") if "loss" in line][-1]
    card = model_card(tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-6", "user/name")
    assert f"| last loss | {loss:g} |" in html.unescape(card)  # though the last line is an evaluation's


def test_held_out_pictures_of_another_size_are_refused(tmp_path):
    for name, side in (("train", 8), ("test", 9)):
        (tmp_path / name).mkdir()
        for i in range(16):
            Image.new("L", (side, side), i).save(tmp_path / name / f"{i}.png")
    folders = {"train_data_dir": tmp_path / "train", "eval_data_dir": tmp_path / "test"}
    message = refusal(tmp_path / "run", dataset_name="none", eval_every=3, **folders)
    assert "the held-out samples of test are (1, 9, 9) with 256 levels" in message and "--resolution" in message
