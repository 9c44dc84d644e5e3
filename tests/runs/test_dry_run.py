"""What a dry run says of the data, and draws of them."""

import numpy as np
import pytest

from ddpm_hf.data import Samples, load_samples
from ddpm_hf.runs.dry_run import contact_sheet, statistics


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
