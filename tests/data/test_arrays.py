"""Arrays in memory and in files, and IDX files: Fashion-MNIST is the same from wherever it comes."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.data import load_samples, sources as sources_module
from ddpm_hf.data.arrays import FASHION_FOLDERS

DEBIAN = Path(FASHION_FOLDERS[1])


def pixels(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((5, 4, 6), None),
        ((5, 1, 4, 6), None),
        ((5, 3, 4, 6), None),
        ((5, 4, 6, 3), (0, 3, 1, 2)),
        ((5, 3, 3, 3), None),
    ],
)
def test_arrays_of_8_bits_are_the_samples(shape, order):
    array = pixels(*shape)
    samples = load_samples(array)
    expected = array[:, None] if array.ndim == 3 else array if order is None else array.transpose(order)
    assert np.array_equal(samples.array, expected) and samples.num_levels == 256
    array[:] = 0  # the samples are a copy
    assert samples.array.any() and not samples.array.flags.writeable


@pytest.mark.parametrize("channels", [1, 3])
def test_an_array_is_resized_as_files_are(tmp_path, channels):
    array = pixels(3, channels, 9, 12)
    for i, image in enumerate(array):
        Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    one, other = (
        load_samples(**source, resolution=5) for source in ({"dataset_name": array}, {"train_data_dir": tmp_path})
    )
    assert one.fingerprint == other.fingerprint


def test_bool_is_black_and_white():
    array = pixels(4, 5, 5) > 127
    assert np.array_equal(load_samples(array).array[:, 0], array * 255)


def test_16_bits_of_few_values_are_named_and_scaled(caplog):
    array = np.arange(190, dtype=np.uint16).reshape(1, 10, 19)
    assert load_samples(array).array.max() == 1 and "189" in caplog.text and "max_value" in caplog.text
    assert load_samples(array, max_value=189).array.max() == 255


def test_full_16_bits_are_their_high_byte():
    array = pixels(2, 7, 7, dtype=np.uint16)
    assert np.array_equal(load_samples(array).array[:, 0], (array.astype(np.int64) + 128) // 257)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 3, 8, 8), np.float32), r"float32 .*their range is not stated: .*astype\('uint8'\)"),
        (np.zeros((5, 8, 8), np.int64), r"pass .astype\('uint8'\)"),
        (np.zeros((5, 2, 8, 8), np.uint8), r"shape \(5, 2, 8, 8\); images are \[N, H, W\]"),
        (np.zeros((0, 8, 8), np.uint8), "not empty"),
        (np.zeros((5, 0)), "points are"),
        (np.full((5, 2), np.nan), "5 of 5 points are not finite"),
        ([[1, 2]], "dataset_name="),
    ],
)
def test_other_arrays_are_refused_with_what_helps(array, message):
    with pytest.raises(ValueError, match=message) as error:
        load_samples(array)
    assert len(str(error.value)) < 300


def test_float_vectors_are_points(caplog):
    samples = load_samples(np.random.default_rng(0).normal(size=(50, 2)))
    assert samples.is_points and samples.sample_shape == (2,) and not caplog.text
    assert load_samples(np.full((5, 2), 300.0)).notes[0].startswith("in-memory: the largest coordinate is 300")


def test_npy_and_npz_files(tmp_path):
    array, labels = pixels(4, 6, 6), np.array([2, 0, 2, 10])
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "one.npz", array)
    np.savez(tmp_path / "two.npz", x_train=array, y_train=labels)
    expected = load_samples(array).fingerprint
    assert load_samples(tmp_path / "a.npy").fingerprint == load_samples(tmp_path / "one.npz").fingerprint == expected
    samples = load_samples(tmp_path / "two.npz", image_column="x_train", label_column="y_train")
    assert samples.fingerprint == expected and samples.class_counts() == {"0": 1, "2": 2, "10": 1}
    with pytest.raises(ValueError, match="has the arrays 'x_train', 'y_train'; name one of them"):
        load_samples(tmp_path / "two.npz")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="bad.npy cannot be read as an array without pickle"):
        load_samples(tmp_path / "bad.npy")


# ---- IDX files -----------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_folder(tmp_path) -> Path:
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_idx(folder / "train-images-idx3-ubyte.gz", pixels(12, 7, 5))
    write_idx(folder / "train-labels-idx1-ubyte", np.arange(12, dtype=np.uint8) % 3)
    write_idx(folder / "t10k-images.idx3-ubyte", pixels(4, 7, 5))
    return folder


def test_idx_files_by_either_option_and_spelling(idx_folder):
    samples = load_samples(train_data_dir=idx_folder, label_column="label")
    assert np.array_equal(samples.array[:, 0], pixels(12, 7, 5)) and samples.class_counts() == dict.fromkeys("012", 4)
    assert load_samples(str(idx_folder)).fingerprint == samples.fingerprint
    assert len(load_samples(train_data_dir=idx_folder, split="test")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "has 'train' and 'test'"),
        ({"split": "test", "label_column": "label"}, "has no t10k-labels-idx1-ubyte"),
        ({"label_column": "digit"}, "IDX files have 'label'"),
    ],
)
def test_what_idx_folders_do_not_have_is_refused(idx_folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_samples(train_data_dir=idx_folder, **options)


def test_cut_and_other_idx_files_are_refused(idx_folder):
    path = idx_folder / "t10k-images.idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"137 values, its header says \(4, 7, 5\)"):
        load_samples(train_data_dir=idx_folder, split="test")
    path.write_bytes(b"no IDX file, but a text")
    with pytest.raises(ValueError, match="t10k-images.idx3-ubyte"):
        load_samples(train_data_dir=idx_folder, split="test")


def test_a_table_of_the_same_images_is_the_same_data(idx_folder, tmp_path, monkeypatch):
    """The door of the Hub, by a folder in its layout: one fingerprint, and Fashion-MNIST's own class names."""
    import datasets

    array, labels = pixels(12, 7, 5), list(range(10)) + [0, 1]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[f"class {i}" for i in range(10)])
    )
    rows = {"image": [Image.fromarray(image) for image in array], "label": labels}
    hub = tmp_path / "hub"
    hub.mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(hub / "train-00000-of-00001.parquet")
    monkeypatch.setattr(sources_module, "FASHION_FOLDERS", ())
    monkeypatch.setattr(sources_module, "FASHION_ON_THE_HUB", str(hub))
    samples = load_samples("fashion_mnist", label_column="label")
    assert samples.fingerprint == load_samples(train_data_dir=idx_folder).fingerprint
    assert (
        samples.name == "fashion_mnist"
        and samples.label_names[9] == "Ankle boot"
        and samples.labels.tolist() == labels
    )


def test_other_images_do_not_pass_for_fashion_mnist(idx_folder, monkeypatch):
    monkeypatch.setattr(sources_module, "FASHION_FOLDERS", (str(idx_folder),))
    with pytest.raises(ValueError, match="not the published images of Fashion-MNIST"):
        load_samples("fashion_mnist")


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_published_fashion_mnist_by_name_and_by_folder():
    named, folder = load_samples("fashion_mnist", label_column="label"), load_samples(train_data_dir=DEBIAN)
    assert named.fingerprint == folder.fingerprint and len(named) == 60_000 and named.sample_shape == (1, 28, 28)
    assert set(named.class_counts().values()) == {6000} and named.label_names[0] == "T-shirt/top"
    test = load_samples(train_data_dir=DEBIAN, split="test", label_column="label")
    assert set(test.class_counts().values()) == {1000} and test.label_names == named.label_names
