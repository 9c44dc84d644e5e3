"""Data that a function of the user's returns, named as module:function."""

import custom_nets
import numpy as np
import pytest

from ddpm_hf.data import load_samples, real_samples


@pytest.mark.parametrize(("split", "number"), [("train", 40), ("test", 6)])
def test_images_of_a_function(split, number):
    samples = load_samples("custom_nets:stripes", split=split)
    assert samples.name == "custom_nets:stripes" and samples.num_levels == 256
    assert np.array_equal(samples.array, custom_nets.stripes(split)) and len(samples) == number
    assert samples.fingerprint == load_samples(custom_nets.stripes(split)).fingerprint


def test_points_of_a_function():
    samples = load_samples("custom_nets:spiral")
    assert samples.is_points and samples.sample_shape == (2,)
    assert real_samples("custom_nets:spiral", "test", (2,)).fingerprint == samples.fingerprint


def test_labels_and_options_reach_what_it_returns():
    samples = load_samples("custom_nets:labelled", label_column="kind", resolution=4)
    assert samples.sample_shape == (1, 4, 4) and samples.class_counts() == {"0": 20, "1": 20}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("custom_nets:absent", "dataset_name 'custom_nets:absent': custom_nets has no callable 'absent'"),
        ("no_such_module:f", "No module named 'no_such_module'; its folder must be on PYTHONPATH, or the working one"),
        ("custom_nets:nothing", "returned a list; it must return an array or a datasets.Dataset"),
    ],
)
def test_what_gives_no_data_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_samples(name)


def test_a_file_of_that_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").mkdir()
    with pytest.raises((ValueError, OSError)) as refused:
        load_samples("a:b")
    assert "No module named" not in str(refused.value)


def test_modules_are_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text("from custom_nets import spiral\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "absent")  # takes back what is appended to sys.path
    assert len(load_samples("made_here:spiral")) == 50
