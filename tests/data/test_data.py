"""The data sets: what is in them, that it is always the same, and an error of its own for everything that is wrong."""

import hashlib
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.data import BUILT_IN, digits_labels, load_samples, to_model_range

datasets = pytest.importorskip("datasets")


def pictures(count: int = 5, size: tuple[int, int] = (8, 6), channels: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    shape = (size[1], size[0], 3) if channels == 3 else (size[1], size[0])
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]


def as_array(images: list[Image.Image]) -> np.ndarray:
    arrays = [np.asarray(image) for image in images]
    return np.stack([array[None] if array.ndim == 2 else array.transpose(2, 0, 1) for array in arrays])


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i, image in enumerate(pictures()):
        image.save(root / f"{i}.png")
    return root


# ---- built-in sets


def test_digits_are_the_real_ones_split_in_two_without_overlap():
    from sklearn.datasets import load_digits

    real = load_digits()
    test = np.arange(1797) % 5 == 0
    for split, rows, count in (("train", ~test, 1437), ("test", test, 360)):
        samples = load_samples("digits", split=split)
        assert (len(samples), samples.sample_shape, samples.num_levels) == (count, (1, 8, 8), 17)
        assert samples.array.dtype == np.uint8 and samples.array.max() == 16 and not samples.is_points
        assert not samples.array.flags.writeable
        np.testing.assert_array_equal(samples.array[:, 0], real.images[rows])
        np.testing.assert_array_equal(digits_labels(split), real.target[rows])


def test_the_shipped_checkpoint_depends_on_exactly_these_digits():
    fingerprints = [load_samples("digits", split=split).fingerprint for split in ("train", "test")]
    assert fingerprints == [
        "92add8e6c808735a03fa2be35d56631e0cdde5713b5de5bbf84cf447b63a79eb",
        "6bc792b68c0b825a5fc2accfc6524456a6358743c1a24464cb199aa370d8a98f",
    ]


@pytest.mark.parametrize("name", ["swiss_roll", "moons"])
def test_points_fill_the_square_and_splits_share_their_scale(name):
    train, test = load_samples(name), load_samples(name, split="test")
    for samples in (train, test):
        assert samples.is_points and samples.array.shape == (10_000, 2) and samples.array.dtype == np.float32
        assert 0.9 < np.abs(samples.array).max() < 1.15
    assert train.fingerprint != test.fingerprint
    assert train.fingerprint == load_samples(name).fingerprint
    # The same distribution: means and spreads agree within their standard error, 1% of the spread.
    np.testing.assert_allclose(train.array.mean(0), test.array.mean(0), atol=0.03)
    np.testing.assert_allclose(train.array.std(0), test.array.std(0), atol=0.02)


def test_swiss_roll_is_the_spiral_and_not_the_sheet():
    radius = np.linalg.norm(load_samples("swiss_roll").array * 15, axis=1)
    assert 1.5 * np.pi - 2.5 < radius.min() and radius.max() < 4.5 * np.pi + 2.5


def test_built_in_sets_refuse_what_means_nothing_for_them():
    for name in BUILT_IN:
        with pytest.raises(ValueError, match="'train' and 'test'"):
            load_samples(name, split="validation")
        with pytest.raises(ValueError, match="resolution=32"):
            load_samples(name, resolution=32)
    with pytest.raises(ValueError, match="'train' and 'test'"):
        digits_labels("all")


# ---- batches


def test_a_batch_holds_the_rows_asked_for_and_is_a_copy():
    samples = load_samples("digits")
    rows = [5, 0, 1436, 5]
    batch = samples.batch(rows)
    assert batch.dtype == torch.uint8 and batch.shape == (4, 1, 8, 8)
    np.testing.assert_array_equal(batch.numpy(), samples.array[rows])
    batch.zero_()
    assert samples.array[rows].any()
    assert torch.equal(samples.batch(torch.tensor(rows)), samples.batch(np.array(rows)))
    assert load_samples("moons").batch([1, 2]).dtype == torch.float32


def test_flips_mirror_the_chosen_images_left_to_right():
    samples = load_samples("digits")
    plain, mixed = samples.batch([0, 1, 2]), samples.batch([0, 1, 2], flip=[False, True, False])
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]])
    assert torch.equal(mixed[1, 0], torch.from_numpy(samples.array[1, 0, :, ::-1].copy()))
    assert not torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize("rows", [[-1], [1437], [0, 5000]])
def test_rows_outside_are_refused(rows):
    with pytest.raises(IndexError, match="digits has 0..1436"):
        load_samples("digits").batch(rows)


@pytest.mark.parametrize("rows", [[], np.array([], int), [0.0], [[0, 1]], [True]])
def test_rows_of_another_kind_are_refused(rows):
    with pytest.raises(ValueError, match="indices: got"):
        load_samples("digits").batch(rows)


@pytest.mark.parametrize("flip", [[True], [1, 0], True, [[True, False]]])
def test_flips_of_another_kind_are_refused(flip):
    with pytest.raises(ValueError, match="pass bool of shape"):
        load_samples("digits").batch([0, 1], flip=flip)


def test_points_have_no_left_and_right():
    with pytest.raises(ValueError, match="flip: moons holds points"):
        load_samples("moons").batch([0], flip=[False])


def test_model_range_is_the_papers():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_model_range(levels, 256), levels.float() / 127.5 - 1)
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8), 256).tolist() == [-1, 1]
    assert to_model_range(torch.tensor([0, 4, 8, 16]), 17).tolist() == [-1, -0.5, 0, 1]
    points = torch.tensor([[0.25, -3.0]], dtype=torch.float64)
    assert torch.equal(to_model_range(points, None), points.float())


def test_model_range_refuses_scaled_values_and_single_levels():
    with pytest.raises(ValueError, match="not scaled values"):
        to_model_range(torch.zeros(2), 256)
    with pytest.raises(ValueError, match="num_levels=1"):
        to_model_range(torch.zeros(2, dtype=torch.uint8), 1)


# ---- a folder of images


def test_a_folder_in_the_order_of_its_paths(tmp_path, caplog):
    first, second, third, hidden, hidden_too = pictures()
    for name, image in {"b/2.PNG": second, "a.png": first, "c.png": third}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / name)
    (tmp_path / ".thumbs").mkdir()
    hidden.save(tmp_path / ".thumbs" / "x.png")
    hidden_too.save(tmp_path / ".x.png")
    (tmp_path / "notes.txt").write_text("not an image")
    with caplog.at_level(logging.WARNING, "ddpm_hf"):
        samples = load_samples(train_data_dir=tmp_path)
    np.testing.assert_array_equal(samples.array, as_array([first, second, third]))
    assert (samples.name, samples.num_levels, samples.skipped) == (tmp_path.name, 256, ())
    assert "1 x .txt" in caplog.text


def test_a_mixture_of_modes_and_sizes_becomes_one_array(tmp_path):
    Image.new("L", (40, 30), 100).save(tmp_path / "0.png")
    Image.new("RGBA", (7, 90), (255, 0, 0, 0)).save(tmp_path / "1.png")
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "2.tif")
    Image.new("P", (16, 16)).save(tmp_path / "3.gif")
    samples = load_samples(train_data_dir=tmp_path, resolution=16, background="#0000ff")
    assert samples.array.shape == (4, 3, 16, 16)
    expected = [(100, 100, 100), (0, 0, 255), (255, 0, 0), (0, 0, 0)]
    assert [tuple(image[:, 8, 8].tolist()) for image in samples.array] == expected


def test_bad_images_are_named_counted_and_logged(folder, caplog):
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    Image.new("F", (8, 6)).save(folder / "5.tif")
    with pytest.raises(ValueError, match=r"2 bad images: .*/2\.png: cannot be decoded"):
        load_samples(train_data_dir=folder)
    with pytest.raises(ValueError, match=r"2 bad images: .*/2\.png.*/5\.tif: pixels of Pillow mode 'F'"):
        load_samples(train_data_dir=folder, skip_bad_images=1)
    with caplog.at_level(logging.WARNING, "ddpm_hf"):
        samples = load_samples(train_data_dir=folder, skip_bad_images=2)
    assert len(samples) == 4 and len(samples.skipped) == 2 and str(folder / "2.png") in samples.skipped[0]
    assert caplog.text.count("2 bad images left out") == 1
    assert samples.fingerprint == load_samples(train_data_dir=folder, skip_bad_images=9).fingerprint


def test_each_wrong_folder_has_its_own_error(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_samples(train_data_dir=tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_samples(train_data_dir=folder / "0.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="the folder is empty"):
        load_samples(train_data_dir=empty)
    (empty / "a.heic").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"no image among its files \(1 x \.heic\); allowed are .*\.jpeg"):
        load_samples(train_data_dir=empty)
    with pytest.raises(ValueError, match="split='test': the folder"):
        load_samples(train_data_dir=folder, split="test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of the two"),
        ({"dataset_name": "digits", "train_data_dir": "."}, "exactly one of the two"),
        ({"train_data_dir": ".", "resolution": 0}, "resolution=0"),
        ({"train_data_dir": ".", "num_workers": -1}, "num_workers=-1"),
        ({"train_data_dir": ".", "skip_bad_images": -1}, "skip_bad_images=-1"),
        ({"train_data_dir": ".", "max_memory_bytes": -1}, "max_memory_bytes=-1"),
        ({"train_data_dir": ".", "background": "whitish"}, "background='whitish'"),
        ({"train_data_dir": ".", "background": "#ffffff80"}, "background='#ffffff80'"),
        ({"train_data_dir": ".", "image_column": "image"}, "image_column='image'"),
        ({"train_data_dir": ".", "dataset_config": "small"}, "dataset_config='small'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_samples(**arguments)


def test_large_sets_are_mapped_and_found_again_until_the_source_changes(folder, caches):
    in_memory = load_samples(train_data_dir=folder)
    assert not (caches / "ours").exists()
    mapped = load_samples(train_data_dir=folder, max_memory_bytes=100)
    assert isinstance(mapped.array, np.memmap) and mapped.fingerprint == in_memory.fingerprint
    assert torch.equal(mapped.batch([3, 1]), in_memory.batch([3, 1]))
    (array,) = (caches / "ours").glob("photos-*.npy")
    written = array.stat().st_mtime_ns
    assert load_samples(train_data_dir=folder, max_memory_bytes=100).fingerprint == mapped.fingerprint
    assert array.stat().st_mtime_ns == written  # used, not made again
    pictures(9)[0].save(folder / "1.png")
    changed = load_samples(train_data_dir=folder, max_memory_bytes=100)
    assert changed.fingerprint != mapped.fingerprint
    assert len(list((caches / "ours").glob("*.npy"))) == 2


def test_cache_dir_comes_before_the_environment(folder, tmp_path, caches):
    load_samples(train_data_dir=folder, max_memory_bytes=0, cache_dir=tmp_path / "chosen")
    assert len(list((tmp_path / "chosen").glob("*.npy"))) == 1 and not (caches / "ours").exists()


@pytest.mark.slow
def test_a_fresh_process_sees_the_same_data(folder):
    code = (
        "import sys; from ddpm_hf.data import load_samples; s = load_samples(train_data_dir=sys.argv[1], resolution=5)"
    )
    command = [sys.executable, "-c", f"{code}; print(s.fingerprint)", str(folder)]
    fresh = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    samples = load_samples(train_data_dir=folder, resolution=5)
    assert fresh == samples.fingerprint
    content = np.ascontiguousarray(samples.array).tobytes() + b"|u1 (5, 3, 5, 5) 256"
    assert fresh == hashlib.sha256(content).hexdigest()


# ---- `datasets`


def table(images, **columns):
    features = {name: datasets.Value("int64") for name in columns} | {"picture": datasets.Image()}
    return datasets.Dataset.from_dict({**columns, "picture": images}, features=datasets.Features(features))


@pytest.mark.integration  # two of the doors decode in other processes
def test_every_door_leads_to_the_same_samples(folder, tmp_path):
    images = pictures()
    in_memory = table(images, label=list(range(5)))
    (tmp_path / "parquet").mkdir()
    parquet = tmp_path / "parquet" / "train.parquet"
    in_memory.to_parquet(parquet)
    doors = [
        load_samples(train_data_dir=folder),
        load_samples(in_memory),
        load_samples(table([np.asarray(image) for image in images])),
        load_samples(str(folder)),
        load_samples(parquet.parent),
        load_samples(str(parquet), num_workers=2, image_column="picture"),
        load_samples(str(parquet), max_memory_bytes=0),
        load_samples(str(parquet), split="train[:5]"),
    ]
    np.testing.assert_array_equal(doors[0].array, as_array(images))
    assert {samples.fingerprint for samples in doors} == {doors[0].fingerprint}
    assert [samples.name for samples in doors[:4]] == ["photos", "in-memory", "in-memory", "photos"]


def test_our_rules_hold_for_datasets_too(tmp_path):
    """16-bit grey, which `datasets` itself would hand over undecided, a damaged image and an empty row."""
    image = Image.fromarray(np.full((4, 4), 32896, np.uint16))
    image.save(tmp_path / "good.png")
    good = {"bytes": (tmp_path / "good.png").read_bytes(), "path": None}
    rows = [good, {"bytes": b"damaged", "path": "bad.jpg"}, None]
    with pytest.raises(ValueError, match=r"2 bad images: row 1 \(bad\.jpg\): no readable"):
        load_samples(table(rows))
    samples = load_samples(table(rows), skip_bad_images=2)
    assert samples.array.tolist() == [[[[128] * 4] * 4]]
    assert samples.skipped[1] == "row 2: the row holds no image"


def test_the_cache_follows_the_rows_of_a_dataset(caches):
    first, again, other = (load_samples(table(pictures(n)), max_memory_bytes=0) for n in (3, 3, 4))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(list((caches / "ours").glob("*.npy"))) == 2


def test_each_wrong_dataset_has_its_own_error(tmp_path):
    numbers = datasets.Dataset.from_dict({"x": [1], "y": ["a"]})
    with pytest.raises(ValueError, match=r"no column of images; its columns are 'x' \(Value\), 'y' \(Value\)"):
        load_samples(numbers)
    with pytest.raises(ValueError, match=r"image_column='image': not a column of images.*'picture' \(Image\)"):
        load_samples(table(pictures(1)), image_column="image")
    with pytest.raises(ValueError, match="image_column='x'"):
        load_samples(numbers, image_column="x")
    with pytest.raises(ValueError, match="has no rows"):
        load_samples(table(pictures(1)).select([]))
    with pytest.raises(ValueError, match="Dataset in memory"):
        load_samples(table(pictures(1)), split="test")
    with pytest.raises(FileNotFoundError, match="no folder or .parquet file here"):
        load_samples(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nobody/nothing.*; from the Hub: "):
        load_samples("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds no data files"):
        load_samples(tmp_path / "empty")
