"""A run keeps the list of its files, so that a refusal to go on names those that changed."""

import numpy as np
import pytest

from ddpm_hf.data import Samples, load_samples
from ddpm_hf.runs.data_files import DATA_FILES, changed_files, write_data_files


def samples(**images: int) -> Samples:
    """One image of a single grey for each name."""
    array = np.array(list(images.values()), np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    return Samples("few", array, 256, "", names=tuple(images))


@pytest.mark.parametrize(
    ("now", "phrase"),
    [
        ({"a": 1, "b": 2, "c": 3}, ""),
        ({"c": 3, "b": 2, "a": 1}, ""),
        ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "2 added (the first is d)"),
        ({"b": 2, "c": 3}, "1 removed (a)"),
        ({"a": 1, "b": 9, "x": 3}, "1 added (x), 1 removed (c), 1 changed (b)"),
    ],
)
def test_added_removed_and_changed_files_are_named(tmp_path, now, phrase):
    write_data_files(tmp_path, samples(a=1, b=2, c=3))
    assert changed_files(tmp_path, samples(**now)) == phrase


def test_a_list_that_is_missing_or_damaged_says_nothing(tmp_path):
    assert changed_files(tmp_path, samples(a=1)) == ""
    (tmp_path / DATA_FILES).write_text("no tab")
    assert changed_files(tmp_path, samples(a=1)) == ""


def test_odd_names_stand_on_one_line(tmp_path):
    write_data_files(tmp_path, samples(**{"a\nb\tc": 1, "é": 2}))
    assert len((tmp_path / DATA_FILES).read_text(encoding="utf-8").splitlines()) == 2
    assert changed_files(tmp_path, samples(**{"a\nb\tc": 3, "é": 2})) == r"1 changed (a\nb\tc)"


def test_built_in_data_have_no_list(tmp_path):
    write_data_files(tmp_path, load_samples("digits"))
    assert not list(tmp_path.iterdir())
