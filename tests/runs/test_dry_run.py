"""What a dry run says of the data and of the time, and draws of the data."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ddpm_hf.data import Samples, load_samples
from ddpm_hf.runs import HeldOut, Part, TrainingOptions
from ddpm_hf.runs.dry_run import DryRun, contact_sheet, statistics, times_due


def test_statistics_are_those_of_the_values():
    array = np.random.default_rng(0).integers(3, 250, (40, 3, 5, 4), dtype=np.uint8)
    array[0, 0, 0, :2] = 0, 255
    lines = " ".join(statistics(Samples("few", array, 256, "")))
    assert "4 x 5, colour, levels 0 to 255 of 0 to 255" in lines
    for name, function in (("mean", np.mean), ("standard deviation", np.std)):
        expected = " ".join(f"{function(array[:, c].astype(float)):.1f}" for c in range(3))
        assert f"{name} {expected}" in lines


def test_grey_in_three_channels_is_noticed():
    array = np.random.default_rng(0).integers(0, 256, (9, 1, 4, 4), dtype=np.uint8)
    assert "--in_channels 1 --convert_channels" in " ".join(statistics(Samples("few", array.repeat(3, 1), 256, "")))
    assert "--in_channels" not in " ".join(statistics(Samples("few", array, 256, "")))


def test_points_have_a_range_and_a_picture():
    samples = load_samples("moons")
    assert statistics(samples)[0].startswith("points (2,), -")
    assert contact_sheet(samples).size == (512, 512)


@pytest.mark.parametrize("count", [1, 7, 100])
def test_the_sheet_shows_the_pixels_large_enough(count):
    array = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 8, 8), np.uint8)
    shown = contact_sheet(Samples("few", array, 256, ""))
    columns = int(np.ceil(np.sqrt(min(count, 48))))
    assert shown.width >= 96 * columns
    values = set(np.unique(np.asarray(shown)))
    assert {0, count - 1} <= values  # the first and the last sample are among them


def test_with_labels_each_class_has_a_row():
    samples = load_samples("digits", label_column="label")
    plain = contact_sheet(load_samples("digits"))
    sheet = contact_sheet(samples)
    assert sheet.height > 10 * 96 and sheet.width >= 8 * 96 and sheet.size != plain.size


# ---- time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, 1, 3, 4, 10, 99])
@pytest.mark.parametrize("first_step", [0, 1, 4, 9, 10, 12])
def test_what_is_due_is_counted_as_a_run_does_it(every, first_step):
    due = [step for step in range(first_step + 1, 11) if every and (step == 10 or step % every == 0)]
    assert times_due(every, first_step, 10) == len(due)


def watching(num_processes: int = 1, first_step: int = 0, parts: bool = True, **given: Any) -> list[str]:
    """100 s of training, and a network that takes 0.1 s for a sample."""
    options = TrainingOptions(dataset_name="digits", num_steps=10, num_samples=4, sample_steps=50, **given)
    held_out = {
        name: Part(load_samples("digits"), np.arange(count)) for name, count in (("held_out", 9), ("train", 6))
    }
    rest: Any = SimpleNamespace(num_processes=num_processes, samples=None)
    dry_run = DryRun(options, rest, rest, rest, rest, HeldOut(None, held_out if parts else {}))
    return dry_run.watching(first_step, 100.0, 0.1)


def test_evaluations_count_as_grids_do():
    """15 samples in 4 draws and 12 terms are 240 of the network; a grid is 4 samples in 50 steps by both weights."""
    evaluations = {"held_out_every": 2, "eval_every": 4}
    assert watching(sample_every=0, **evaluations) == [
        "3 evaluations of held-out samples take about 24 s each",
        "all of it takes about 3 min",  # 172 s
    ]
    both = watching(sample_every=5, **evaluations)
    assert both[0] == "2 grids of samples take about 40 s each" and both[-1] == "all of it takes about 4 min"
    assert watching(2, 8, sample_every=0, **evaluations)[0].startswith(
        "1 evaluation of held-out samples takes about 12 s"
    )
    assert watching(sample_every=0) == watching(sample_every=0, parts=False, held_out_every=2) == []
