"""Folders and archives: what is found, what is left out and said, and labels by sub-folder or metadata.csv."""

import logging
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.data import image_files, load_samples


def photos(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture
def store(tmp_path) -> Path:
    photos(tmp_path / "store" / "cats", 4)
    photos(tmp_path / "store" / "dogs", 5, first=4)
    return tmp_path / "store"


# ---- links ---------------------------------------------------------------------------------------------------------


def test_linked_folders_are_followed_and_named(tmp_path, store, caplog):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cats", "dogs"):
        (linked / name).symlink_to(store / name)
    samples = load_samples(train_data_dir=linked)
    assert samples.fingerprint == load_samples(train_data_dir=store).fingerprint and len(samples) == 9
    assert "followed 2 linked folders: cats, dogs" in caplog.text
    assert samples.notes == tuple(r.getMessage() for r in caplog.records)


def test_a_folder_reached_twice_counts_once_by_its_own_name(store):
    (store / "a_second_name").symlink_to(store / "cats")
    (store / "zz").symlink_to(store / "a_second_name")
    assert len(image_files(store)) == 9 and image_files(store)[0] == "cats/000.png"


@pytest.mark.parametrize("target", [".", "..", "cats"])
def test_cycles_of_links_end(store, target):
    (store / "cats" / "loop").symlink_to(store / target)
    assert image_files(store / "cats")[:4] == ["000.png", "001.png", "002.png", "003.png"]
    assert len(image_files(store / "cats")) == (9 if target == ".." else 4 if target == "cats" else 9)


def test_broken_links_and_links_to_themselves_are_counted(store, caplog):
    (store / "gone").symlink_to(store / "nowhere")
    (store / "self.png").symlink_to(store / "self.png")
    assert len(load_samples(train_data_dir=store)) == 9
    assert "2 x broken link" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_named(store, caplog):
    (store / "dogs").chmod(0)
    assert len(load_samples(train_data_dir=store)) == 4 and "dogs (it cannot be read)" in caplog.text
    (store / "dogs").chmod(0o755)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["checkpoints", "model_index.json"])
def test_folders_of_runs_are_left_out_and_named(store, caplog, second):
    run = photos(store / "anything" / "one" / "samples", 3, first=20).parent
    (run / "options.yaml").touch()
    (run / second).mkdir() if "." not in second else (run / second).touch()
    assert len(load_samples(train_data_dir=store)) == 9
    assert "left out 1 folder: anything/one (a run)" in caplog.text


def test_options_alone_make_no_run(store):
    (store / "cats" / "options.yaml").touch()
    assert len(load_samples(train_data_dir=store)) == 9


def test_everything_below_output_dir_is_left_out(store, caplog, monkeypatch):
    photos(store / "mine" / "deep", 3, first=30)
    monkeypatch.chdir(store)
    samples = load_samples(train_data_dir=".", output_dir="mine")
    assert len(samples) == 9 and "mine (output_dir)" in caplog.text and samples.name == "store"


def test_an_output_dir_that_is_the_data_is_refused(store):
    with pytest.raises(ValueError, match="is the folder of images itself"):
        load_samples(train_data_dir=store, output_dir=store / "cats" / "..")


def test_data_within_output_dir_are_used(store):
    assert len(load_samples(train_data_dir=store / "cats", output_dir=store)) == 4


# ---- archives ------------------------------------------------------------------------------------------------------


def packed(folder: Path, path: Path, top: str = "") -> Path:
    """A zip or tar file of a folder's files, in no good order."""
    files = sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, top + file.relative_to(folder).as_posix())
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for file in files:
                archive.add(file, "./" + top + file.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar"])
@pytest.mark.parametrize("top", ["", "photos/"])
def test_an_archive_is_its_folder(tmp_path, store, caplog, name, top):
    (store / "cats" / "frame.000.txt").write_text("no image")
    (store / "cats" / ".hidden.png").write_bytes(b"")
    path = packed(store, tmp_path / name, top)
    samples = load_samples(train_data_dir=path, label_column="label")
    folder = load_samples(train_data_dir=store, label_column="label")
    assert samples.fingerprint == folder.fingerprint and samples.class_counts() == {"cats": 4, "dogs": 5}
    assert (samples.labels == folder.labels).all() and "1 x .txt" in caplog.text
    assert load_samples(str(path)).fingerprint == folder.fingerprint


@pytest.mark.integration  # workers are processes
@pytest.mark.parametrize("name", ["photos.zip", "photos.tar"])
def test_workers_read_an_archive_as_one_process_does(tmp_path, store, name):
    path = packed(store, tmp_path / name)
    alone, shared = (load_samples(train_data_dir=path, num_workers=n) for n in (0, 2))
    assert alone.fingerprint == shared.fingerprint


def test_archives_that_cannot_be_read_are_refused(tmp_path, store):
    with pytest.raises(ValueError, match="no uncompressed tar file"):
        packed(store, tmp_path / "photos.tar.gz").rename(tmp_path / "photos.tar")
        load_samples(train_data_dir=tmp_path / "photos.tar")
    (tmp_path / "text.zip").write_text("no zip file")
    with pytest.raises(ValueError, match="text.zip' cannot be read: File is not a zip file"):
        load_samples(train_data_dir=tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the file is empty"):
        load_samples(train_data_dir=packed(tmp_path / "empty", tmp_path / "empty.zip"))


def test_a_damaged_member_is_a_bad_image(tmp_path, store):
    path = packed(store, tmp_path / "photos.zip")
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # in the pixels of the first member: its checksum says so
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 bad image: .*dogs/008.png: cannot be taken out of the zip file"):
        load_samples(train_data_dir=path)
    samples = load_samples(train_data_dir=path, skip_bad_images=1, label_column="label")
    assert samples.class_counts() == {"cats": 4, "dogs": 4} and "dogs/008.png" not in samples.names


# ---- labels --------------------------------------------------------------------------------------------------------


def test_sub_folders_are_classes_however_deep(store):
    photos(store / "cats" / "indoors", 2, first=40)
    samples = load_samples(train_data_dir=store, label_column="label")
    assert samples.class_counts() == {"cats": 6, "dogs": 5} and samples.labels.dtype == np.int64
    assert [samples.label_names[i] for i in samples.labels] == [name.split("/")[0] for name in samples.names]


def test_labels_are_off_by_default(store):
    samples = load_samples(train_data_dir=store)
    assert samples.labels is None and samples.class_counts() == {} and samples.names[0] == "cats/000.png"


def test_an_image_outside_of_the_classes_is_refused(store):
    photos(store, 1, first=50)
    with pytest.raises(ValueError, match="1 of 10 images lie in no sub-folder, the first is 050.png"):
        load_samples(train_data_dir=store, label_column="label")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_labels_by_a_column_of_metadata(tmp_path, name):
    folder = photos(tmp_path / "pets", 3)
    rows = [("002.png", "dog", 7), ("000.png", "cat", 9), ("001.png", "dog", 10)]
    if name.endswith("csv"):
        lines = ["file_name,species,age", *(f"{file},{kind},{age}" for file, kind, age in rows)]
    else:
        lines = [f'{{"file_name": "{file}", "species": "{kind}", "age": {age}}}' for file, kind, age in rows]
    (folder / name).write_text("\n".join(lines))
    samples = load_samples(train_data_dir=folder, label_column="species")
    assert samples.label_names == ("cat", "dog") and samples.labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="has no such column of labels .its columns: 'file_name', 'species', 'age'."):
        load_samples(train_data_dir=folder, label_column="colour")
    photos(folder, 1, first=9)
    with pytest.raises(ValueError, match="1 of 4 images have none, the first is 009.png"):
        load_samples(train_data_dir=folder, label_column="species")


def test_labels_follow_the_images_that_are_left(store, caplog):
    (store / "cats" / "001.png").write_bytes(b"damaged")
    caplog.set_level(logging.WARNING)
    samples = load_samples(train_data_dir=store, label_column="label", skip_bad_images=1)
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1] and "cats/001.png" not in samples.names


def test_one_class_is_no_label(tmp_path):
    photos(tmp_path / "pets" / "cats", 2)
    with pytest.raises(ValueError, match="all 2 images are 'cats'; two classes are needed"):
        load_samples(train_data_dir=tmp_path / "pets", label_column="label")


# ---- channels ------------------------------------------------------------------------------------------------------


def test_one_colour_file_among_grey_ones_is_named(tmp_path, caplog):
    folder = tmp_path / "scans"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB" if i == 17 else "L", (4, 4), "red" if i == 17 else i).save(folder / f"scan_x{i:02}.png")
    samples = load_samples(train_data_dir=folder)
    assert samples.sample_shape == (3, 4, 4)
    assert "scan_x17.png" in samples.first_in_colour and "1 of 20" in samples.first_in_colour
    assert f"scans: grey images get three channels; {samples.first_in_colour}" in caplog.text
    grey = load_samples(train_data_dir=folder, channels=1)
    assert grey.sample_shape == (1, 4, 4) and (grey.array[17] == 76).all() and not grey.first_in_colour
    assert load_samples(train_data_dir=folder, channels=3).sample_shape == (3, 4, 4)
