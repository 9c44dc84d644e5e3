"""Tables of `datasets`: every form is read, or refused with the call that helps; what is not used is said."""

import http.server
import io
import os
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.data import load_samples

datasets = pytest.importorskip("datasets")


def pictures(count: int = 6) -> list[Image.Image]:
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(count)]


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(pictures()):
        image.save(tmp_path / "photos" / f"{i:03}.png")
    return tmp_path / "photos"


@pytest.fixture
def table(folder):
    rows = {"image": sorted(map(str, folder.glob("*.png"))), "label": [0, 1] * 3}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


# ---- formats, transforms, modes ------------------------------------------------------------------------------------


FORMS = {
    "transform": lambda table: table.with_transform(lambda batch: {"input": batch["image"]}),
    "arrow": lambda table: table.with_format("arrow"),
    "numpy": lambda table: table.with_format("numpy"),
    "pandas": lambda table: table.with_format("pandas"),
    "torch": lambda table: table.with_format("torch", columns=["label"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_format_changes_nothing_and_is_named(table, caplog, form):
    samples = load_samples(FORMS[form](table), label_column="label")
    assert samples.fingerprint == load_samples(table).fingerprint
    assert samples.class_counts() == {"0": 3, "1": 3}
    assert f"{'transform' if form == 'transform' else form}" in caplog.text and "is not applied" in caplog.text


@pytest.mark.parametrize(("mode", "colour", "expected"), [("RGB", 9, (3, 9)), ("L", "red", (1, 76))])
def test_a_columns_mode_is_obeyed(mode, colour, expected):
    image = Image.new("L" if mode == "RGB" else "RGB", (8, 8), colour)
    table = datasets.Dataset.from_dict({"image": [image]}).cast_column("image", datasets.Image(mode=mode))
    samples = load_samples(table)
    assert samples.sample_shape == (expected[0], 8, 8) and (samples.array == expected[1]).all()


@pytest.mark.parametrize("mode", ["CMYK", "1", "RGBA", "I;16", "F"])
def test_other_modes_are_refused(table, mode):
    with pytest.raises(ValueError, match=f"has the mode '{mode}'; only 'L' and 'RGB' are read"):
        load_samples(table.cast_column("image", datasets.Image(mode=mode)))


# ---- columns -------------------------------------------------------------------------------------------------------


def test_bytes_structs_and_paths_are_images_where_asked(folder, table, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [encoded(image) for image in pictures()]
    structs = [{"bytes": each, "path": None} for each in content]
    columns = {
        "binary": pa.array(content, pa.binary()),
        "large": pa.array(content, pa.large_binary()),
        "structs": pa.array(structs, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "paths": pa.array(sorted(map(str, folder.glob("*.png")))),
    }
    expected = load_samples(table).fingerprint
    for name, column in columns.items():
        path = tmp_path / f"{name}.PARQUET"
        pq.write_table(pa.table({"image": column, "label": [1] * 6}), path)
        assert load_samples(path, image_column="image").fingerprint == expected
        if name == "structs":
            assert load_samples(path).fingerprint == expected
        else:
            with pytest.raises(ValueError, match="image_column='image' takes it for encoded images or their paths"):
                load_samples(path)


@pytest.mark.parametrize("feature", ["Array3D", "list"])
def test_arrays_in_a_column_are_images(feature):
    array = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    features = datasets.Features(x=datasets.Array3D((3, 5, 6), "uint8")) if feature == "Array3D" else None
    assert np.array_equal(load_samples(datasets.Dataset.from_dict({"x": array}, features)).array, array)
    with pytest.raises(ValueError, match="float32 .*range is not stated"):
        load_samples(datasets.Dataset.from_dict({"x": array.astype(np.float32)}))
    with pytest.raises(ValueError, match=r"int64 .*\.astype\('uint8'\)"):
        load_samples(datasets.Dataset.from_dict({"x": array.astype(np.int64)}))


def test_several_columns_of_images_are_named(caplog):
    table = datasets.Dataset.from_dict({"a": pictures(3), "b": pictures(3)})
    assert load_samples(table).fingerprint == load_samples(table, image_column="a").fingerprint
    assert caplog.text.count("'a' is used and 'b' not, which hold images too: name one by image_column") == 1


@pytest.mark.parametrize("kind", ["names", "text", "numbers"])
def test_labels_of_every_kind_of_column(table, kind):
    values = ["cat", "dog", "cat"] * 2 if kind == "text" else [0, 1, 0] * 2
    column = table.remove_columns("label").add_column("kind", values)
    if kind == "names":
        column = column.cast_column("kind", datasets.ClassLabel(names=["cat", "dog", "emu"]))
    counts = {"names": {"cat": 4, "dog": 2, "emu": 0}, "text": {"cat": 4, "dog": 2}, "numbers": {"0": 4, "1": 2}}
    assert load_samples(column, label_column="kind").class_counts() == counts[kind]


def test_labels_that_are_missing_or_no_labels_are_refused(table):
    for values, message in (
        (["a", None, "b"] * 2, "2 of 6 images have none, the first is row 1"),
        ([0.5, 1.5] * 3, "labels must be text or whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            load_samples(table.add_column("kind", values), label_column="kind")
    with pytest.raises(ValueError, match="label_column='kind': the columns are 'image'"):
        load_samples(table, label_column="kind")


# ---- what is no table ----------------------------------------------------------------------------------------------


def test_splits_and_streams_are_refused_in_one_line(table):
    for value, message in (
        (datasets.DatasetDict(train=table, test=table), "a DatasetDict of splits .train, test.; pass one of them"),
        (table.to_iterable_dataset(), "streams have no index"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_samples(value)
        assert len(str(error.value)) < 150


def test_saved_datasets_load(table, tmp_path):
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "two")
    for folder, split, count in (("one", "train", 6), ("two", "train", 6), ("two", "test", 1)):
        assert len(load_samples(tmp_path / folder, split=split)) == count
    with pytest.raises(ValueError, match="unknown split 'validation'; it has train, test"):
        load_samples(tmp_path / "two", split="validation")


# ---- images that lie elsewhere -------------------------------------------------------------------------------------


def test_a_zip_in_a_folder_is_read_through_datasets(folder, tmp_path):
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "train.zip", "w") as archive:
        for path in folder.glob("*.png"):
            archive.write(path, path.name)
    samples = load_samples(tmp_path / "zipped")
    assert samples.fingerprint == load_samples(train_data_dir=folder).fingerprint


@pytest.mark.parametrize("names", [["a/0.png", "b/1.png"], ["a.b/0.c.png", "a.b/1.c.png"]])
def test_an_archive_that_datasets_cannot_take_is_refused_with_the_way_that_can(folder, tmp_path, names):
    """It takes folders in an archive for labels, and dots in their names for no images."""
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "train.zip", "w") as archive:
        for name, path in zip(names, sorted(folder.glob("*.png")), strict=False):
            archive.write(path, name)
    way = tmp_path / "zipped" / "train.zip"
    with pytest.raises(ValueError, match=f"pass the archive itself: train_data_dir='{way}'") as error:
        load_samples(tmp_path / "zipped")
    assert "\n" not in str(error.value) and "neither a folder" not in str(error.value)
    assert len(load_samples(train_data_dir=way)) == 2


def test_a_folder_without_data_is_called_a_folder(tmp_path):
    (tmp_path / "notes.xyz").touch()
    with pytest.raises(ValueError, match="finds no data in this folder.*; train_data_dir takes all images"):
        load_samples(tmp_path)


def test_images_at_addresses_are_read(folder):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *arguments: None  # pyright: ignore[reportAttributeAccessIssue]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_address[1]}"
        names = [path.name for path in sorted(folder.glob("*.png"))]
        for extra, skipped in (([], 0), (["none.png"], 1)):
            rows = {"image": [f"{place}/{name}" for name in [*names, *extra]]}
            table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
            samples = load_samples(table, skip_bad_images=skipped)
            assert samples.fingerprint == load_samples(train_data_dir=folder).fingerprint
            assert len(samples.skipped) == skipped
        server.shutdown()
    assert "none.png): cannot be opened (" in samples.skipped[0]


# ---- what `datasets` leaves out of a folder ------------------------------------------------------------------------


WORDS = ["my_train_2", "cat", "contest", "test-1", "evaluation", "val 3", "dev_x"]


def test_names_that_make_splits_are_counted(tmp_path, caplog):
    for name, image in zip(WORDS, pictures(len(WORDS)), strict=True):
        image.save(tmp_path / f"{name}.png")
    assert len(load_samples(tmp_path)) == 1 and len(load_samples(train_data_dir=tmp_path)) == len(WORDS)
    assert "1 of its 7 images are in split 'train', and 6 not, the first is cat.png" in caplog.text
    assert "With train_data_dir all are used" in caplog.text
    os.remove(tmp_path / "my_train_2.png")
    with pytest.raises(ValueError, match="in names make splits; train_data_dir takes all images of a folder"):
        load_samples(tmp_path)


def test_images_without_a_row_and_with_two_are_counted(folder, caplog):
    (folder / "metadata.csv").write_text("file_name\n000.png\n000.png\n003.png\n")
    assert len(load_samples(folder)) == 3
    assert "2 of its 6 images are in split 'train', and 4 not, the first is 001.png" in caplog.text
    assert "metadata.csv does not name" in caplog.text and "1 of its images are in more than one row" in caplog.text


def test_formats_that_datasets_does_not_know_are_counted(folder, caplog):
    pictures(1)[0].save(folder / "a.avif")
    assert len(load_samples(folder)) == 6 and len(load_samples(train_data_dir=folder)) == 7
    assert "the first is a.avif: 1 are of formats that datasets does not know" in caplog.text


def test_nothing_is_said_of_a_folder_that_is_whole(folder, caplog):
    samples = load_samples(folder)
    assert len(samples) == 6 and not caplog.text and samples.notes == ()


@pytest.mark.parametrize(("place", "given"), [("", "."), ("deep", ".."), ("", "deep/..")])
def test_the_working_folder_has_its_own_name(folder, monkeypatch, place, given):
    (folder / "deep").mkdir()
    expected = load_samples(folder)
    monkeypatch.chdir(folder / place)
    samples = load_samples(given)
    assert samples.fingerprint == expected.fingerprint and samples.name == expected.name == folder.name


@pytest.mark.parametrize("place", ["/proc/none", "file/below"])
def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / place)
    with pytest.raises(ValueError, match="the cache of datasets, .*, cannot be written .*; set HF_HOME or"):
        load_samples(folder)
