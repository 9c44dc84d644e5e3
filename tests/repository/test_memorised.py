"""The measures of benchmarks/memorised.py on sets whose answer is known, and its table from given results."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import memorised  # type: ignore  # noqa: E402
from speed import memorised_tables  # type: ignore  # noqa: E402

from ddpm_hf.data import load_samples  # noqa: E402


@pytest.fixture(scope="module")
def samples() -> Any:
    """400 pictures of noise in colour: each as far from all others as from the next."""
    return load_samples(np.random.default_rng(0).integers(0, 256, (400, 3, 8, 8)).astype(np.uint8))


@pytest.fixture(scope="module")
def parts(samples: Any) -> Any:
    return memorised.parts_of(samples, 5)


def test_the_parts_are_those_of_a_training(samples, parts):
    """`held_out_every` of a run chooses the same ones: 80 of 400, ± 8, as every fifth key by chance."""
    trained_on, held_out = parts
    assert len(trained_on) + len(held_out) == 400 and 50 < len(held_out) < 110
    whole = {row.tobytes() for row in samples.array}
    assert {row.tobytes() for row in (*trained_on.array, *held_out.array)} == whole


def test_one_side_without_pictures_is_refused(samples):
    with pytest.raises(ValueError, match="--held_out_every 1 leaves one side"):
        memorised.parts_of(samples, 1)


@pytest.mark.parametrize("mirrored", [False, True])
def test_copies_are_copies_also_mirrored(parts, mirrored):
    trained_on, held_out = parts
    pictures = memorised.pictures_of(trained_on)[:40]
    pictures = pictures.flip(-1) if mirrored else pictures
    distances = memorised.two_nearest(pictures + 0.001, trained_on)
    near = float(memorised.two_nearest(memorised.pictures_of(held_out), trained_on)[:, 0].min())
    assert memorised.shares(distances, near) == {"near": 1.0, "copies": 1.0}


def test_the_second_nearest_is_another_picture(parts):
    """A picture that is its own mirror image is found twice, and is one."""
    trained_on, _ = parts
    even = trained_on.array.copy()
    even[0] = even[0][..., ::-1] // 2 + even[0] // 2
    even[0] = np.maximum(even[0], even[0][..., ::-1])
    changed = memorised.replace(trained_on, array=even)
    distances = memorised.two_nearest(memorised.pictures_of(changed)[:1], changed)
    assert distances[0, 0] == 0 and distances[0, 1] > 1


def test_new_pictures_are_no_copies(parts):
    trained_on, held_out = parts
    distances = memorised.two_nearest(memorised.pictures_of(held_out), trained_on)
    found = memorised.shares(distances, float(distances[:, 0].quantile(0.05)))
    assert found["copies"] == 0 and found["near"] == pytest.approx(0.05, abs=0.015)  # one of 80 is 0.0125


@pytest.mark.integration  # git says which commit it is
def test_a_run_draws_and_measures_a_checkpoint_with_classes(tmp_path, capsys):
    output = tmp_path / "found.json"
    words = ["--dataset_name", "digits", "--held_out_every", "10", "--steps", "2", "--guidance", "1", "2"]
    words += ["--ranges", "2", "--num_samples", "20", "--output", str(output)]
    assert memorised.main([str(ROOT / "model_cards" / "ddpm-digits-labels"), *words]) == 0
    found = memorised.report.read_json(output)
    assert [(row["steps"], row["guidance"]) for row in found["rows"]] == [(2, 1), (2, 2)]
    assert found["num_trained_on"] + found["num_held_out"] == len(load_samples("digits")) and found["held_out"][
        "near"
    ] == pytest.approx(0.05, abs=0.01)
    assert memorised_tables.table(found) in capsys.readouterr().out


@pytest.mark.integration
def test_the_table_has_a_row_for_each_scale_and_the_held_out():
    measures = {"near": [0.125, 0.01], "copies": [0.02, 0.004]}
    row = {"steps": 100, "guidance": 2.0, "ranges": 4, "num_samples": 240, "measures": measures}
    results = {"rows": [row], "held_out": {"near": 0.05, "copies": 0.0}, "num_trained_on": 1445, "num_held_out": 191}
    results |= memorised.report.surroundings()
    table = memorised_tables.table(results)
    assert "| drawn in 100 steps, guidance 2 | 4 × 240 | 12.5 ± 1.0 % | 2.0 ± 0.4 % |" in table
    assert "| held out of the training | 191 | 5.0 % | 0.0 % |" in table and "(1,445 were trained on" in table
