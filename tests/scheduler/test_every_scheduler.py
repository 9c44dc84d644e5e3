"""Every scheduler of the installed diffusers, found by looking: it draws the oracle's data, or it is refused by name.

benchmarks/schedulers.py has the cases; here most of them are drawn again, with fewer samples.
"""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import schedulers  # type: ignore  # noqa: E402
from speed import scheduler_tables  # type: ignore  # noqa: E402

NUM_SAMPLES = 500
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "schedulers.json").read_text(encoding="utf-8"))
CASE = ("scheduler", "T", "predicts", "spacing", "steps")
# What draws other data though its ᾱ is the process's, as docs/schedulers.md says.
KNOWN = {("LCMScheduler", 100), ("LCMScheduler", 1000), ("PNDMScheduler", 4)}


def place(row: dict[str, Any]) -> tuple:
    return tuple(row[key] for key in CASE)


def test_the_results_are_kept_as_the_program_rounds_and_writes_them(tmp_path):
    kept = ROOT / "benchmarks" / "results" / "schedulers.json"
    assert [schedulers.rounded(row) for row in RESULTS["rows"]] == RESULTS["rows"]
    schedulers.write(tmp_path / "again.json", RESULTS)
    assert (tmp_path / "again.json").read_bytes() == kept.read_bytes()
    assert schedulers.rounded({"mean": 0.123456, "of": {"std": 2.00004}}) == {"mean": 0.1235, "of": {"std": 2.0}}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The cases of all classes that draw at all, but those of 600 and more steps, and of v one spacing alone."""
    before = logging.getLogger("ddpm_hf").level
    logging.getLogger("ddpm_hf").setLevel(logging.ERROR)
    diffusers.logging.set_verbosity_error()
    short = [case for case in schedulers.cases() if case["steps"] < 600]
    short = [case for case in short if case["predicts"] == "epsilon" or case["spacing"] == "leading"]
    found = []
    for name, scheduler_class in schedulers.scheduler_classes().items():
        first = [schedulers.row_of(name, scheduler_class, case, NUM_SAMPLES) for case in short[-6:]]
        found += first if all("refused" in row for row in first) else []
        if not found or found[-1]["scheduler"] != name:
            found += [schedulers.row_of(name, scheduler_class, case, NUM_SAMPLES) for case in short[:-6]] + first
    logging.getLogger("ddpm_hf").setLevel(before)
    diffusers.logging.set_verbosity_warning()
    return found


def same(name: str, value: float, recorded: float, std: float) -> bool:
    """Within four standard errors, and what the quantiles of 500 and 4000 samples differ by."""
    error = (0.5 if name == "left" else std) * math.sqrt(1 / NUM_SAMPLES + 1 / RESULTS["num_samples"])
    return abs(value - recorded) <= 4 * error + 0.02 * abs(recorded)


@pytest.mark.slow
def test_every_scheduler_draws_the_data_or_is_refused_by_name(rows):
    """Another process, as that of EDM, IPNDM or CogVideoX, would miss by ten times the tolerance."""
    drew = [row for row in rows if "refused" not in row]
    wrong = {
        place(row): moments
        for row in drew
        if scheduler_tables.many_steps(row) and (row["scheduler"], row["T"]) not in KNOWN
        if (moments := scheduler_tables.off(row, RESULTS["truth"], NUM_SAMPLES))
    }
    assert not wrong
    assert len(drew) > 900
    named = ("__init__()", "step()", "only supports")  # the other words are Python's and diffusers' own
    never = {row["scheduler"] for row in rows} - {row["scheduler"] for row in drew}
    for row in rows:
        if row["scheduler"] in never:
            assert any(word in row["refused"] for word in (row["scheduler"], *named)), row


@pytest.mark.slow
def test_they_draw_what_the_results_say(rows):
    recorded = {place(row): row for row in RESULTS["rows"]}
    compared, differing = 0, {}
    for row in rows:
        theirs = recorded.get(place(row))
        if theirs is None:  # of a newer diffusers, or refused in every case
            continue
        compared += 1
        if ("refused" in row) != ("refused" in theirs):
            differing[place(row)] = row.get("refused", theirs.get("refused"))
            continue
        for data in () if "refused" in row else ("gaussian", "mixture"):
            for name, value in row[data].items():
                if not same(name, value, theirs[data][name], theirs[data]["std"]):
                    differing[*place(row), data, name] = (value, theirs[data][name])
    assert not differing
    assert compared > 900


def test_in_all_steps_the_recorded_moments_are_the_datas():
    """1000 steps, or 999: four standard errors, and the 0.01 that the length of a step leaves."""
    truth, num = RESULTS["truth"], RESULTS["num_samples"]
    rows = [row for row in RESULTS["rows"] if row["steps"] >= 999 and "refused" not in row]
    assert len(rows) >= 18
    for row in rows:
        for data in ("gaussian", "mixture"):
            for name, value in row[data].items():
                error = (0.5 if name == "left" else truth[data]["std"]) / math.sqrt(num)
                assert abs(value - truth[data][name]) <= 4 * error + 0.01, (row["scheduler"], data, name)


def test_what_is_known_to_be_off_is_off():
    """So that the list is no longer than it must be: LCM's is for distilled networks, PNDM's for long tables."""
    for name, total in KNOWN:
        rows = [row for row in RESULTS["rows"] if (row["scheduler"], row["T"]) == (name, total)]
        many = [row for row in rows if "refused" not in row and scheduler_tables.many_steps(row)]
        assert many and all(scheduler_tables.off(row, RESULTS["truth"], RESULTS["num_samples"]) for row in many)


def test_the_tables_name_what_is_off_and_what_is_refused():
    truth = RESULTS["truth"]
    case = {"T": 1000, "predicts": "epsilon", "spacing": "leading", "steps": 50}
    rows = [
        {"scheduler": "Good", **case, **truth},
        {"scheduler": "Bad", **case, **truth, "gaussian": {**truth["gaussian"], "std": math.nan}},
        {"scheduler": "None", **case, "refused": "None has no alphas_cumprod"},
    ]
    results = {**RESULTS, "rows": rows}
    drawn, wrong, refused = (scheduler_tables.table(results, only) for only in ("drawn", "off", "refused"))
    assert "| `Good` | – | – | 0.200 |" in drawn and "None" not in drawn.split("(Standard")[0]
    assert "`Bad` | 1 of 1 | T = 1000, 50 steps, leading, ε |" in wrong and "Good" not in wrong
    assert "| `None` | has no alphas_cumprod |" in refused and "Bad" not in refused


def test_the_truth_is_that_of_many_draws():
    for label, (data, moments) in enumerate(schedulers.truth().items()):
        x = schedulers.TRUTH.given(label).sample(200_000, torch.Generator().manual_seed(label)).flatten()
        found = {**schedulers.moments(x), "left": float((x < schedulers.SPLIT).double().mean())}
        for name, value in moments.items():
            assert found[name] == pytest.approx(value, abs=0.006), (data, name)
