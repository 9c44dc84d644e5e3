"""Kinds of folders and archives: links, runs, zip and tar files, names that make splits, metadata.csv, AVIF."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np

from . import Answer, Folders, Member, kind
from .pictures import as_batch, image, picture, write_pictures

FOLDER = {"train_data_dir": "."}


def pictures(*seeds: int) -> np.ndarray:
    return as_batch(*map(picture, seeds))


# ---- links and runs ------------------------------------------------------------------------------------------------


@kind("folder-with-linked-folder", "a folder of which parts are links")
def _(new: Folders) -> Iterator[Member]:
    def member(
        name: str, links: dict[str, str], count: int, at: str = "data", others: str = "", listed=False
    ) -> Member:
        """Beside `data` lies `store` with 4 cats and 5 dogs; `count` of these are found at `at`."""
        folder = new()
        write_pictures(folder / "store" / "cats", range(4))
        write_pictures(folder / "store" / "dogs", range(4, 9))
        (folder / "data").mkdir()
        if others:
            shutil.copytree(folder / "store" / "dogs", folder / others)
        for link, target in links.items():
            (folder / link).parent.mkdir(parents=True, exist_ok=True)
            (folder / link).symlink_to(folder / target[1:] if target.startswith("=") else target)
        seeds = {3: range(3), 4: range(4), 5: range(4, 9), 9: range(9)}[count]
        answer = Answer(pictures(*seeds), in_order=False)
        return Member(name, folder, (answer,), {"train_data_dir": at}, listed=listed)

    cats, dogs = "../store/cats", "../store/dogs"
    yield member("mixed", {"data/cats": cats}, 9, others="data/dogs", listed=True)
    yield member("linked", {"data/cats": cats, "data/dogs": dogs}, 9, listed=True)
    yield member("the folder itself is a link", {"other": "store"}, 9, "other")
    yield member("an absolute link", {"data/cats": "=store/cats"}, 4)
    yield member("a link to the parent of both", {"data/all": "../store"}, 9)
    yield member("two links to one folder", {"data/a": cats, "data/b": cats}, 4)
    yield member("a link and the folder it leads to", {"store/again": "cats"}, 9, "store")
    yield member("a link to the folder itself", {"store/cats/loop": "."}, 4, "store/cats")
    yield member("a link to the folder above", {"store/cats/up": ".."}, 9, "store/cats")
    yield member("a link to its brother, and back", {"store/cats/a": "../dogs", "store/dogs/b": "../cats"}, 9, "store")
    yield member("a link to a link", {"first": "store/dogs", "data/second": "../first"}, 5)
    yield member("a chain of three links", {"a": "store/cats", "b": "a", "data/c": "../b"}, 4)
    yield member("a link within a linked folder", {"store/cats/more": "../dogs", "data/cats": cats}, 9)
    yield member("links two folders down", {"data/x/y/cats": "../../" + cats, "data/x/dogs": "../" + dogs}, 9)
    yield member("a link that leads nowhere", {"data/cats": cats, "data/gone": "../nowhere"}, 4)
    yield member("a link to itself", {"data/cats": cats, "data/self": "self"}, 4)
    yield member("a hidden link", {"data/cats": cats, "data/.dogs": dogs}, 4)
    yield member("a link with a suffix of images", {"data/cats.png": cats}, 4)
    yield member("linked files", {f"data/{i}.png": f"../store/cats/{i:03}.png" for i in range(3)}, 3)
    yield member("a name that is not of ASCII", {"data/K\u00e4tzchen": cats}, 4)
    yield member("a link to one folder and to the parent of it", {"data/a": cats, "data/b": "../store"}, 9)
    yield member("a name with a space", {"data/my cats": cats, "data/my dogs": dogs}, 9)


def write_run(run: Path, second: str) -> None:
    """What training leaves in its folder, with pictures and without weights; `second` marks it beside options.yaml."""
    write_pictures(run / "samples", range(50, 53))
    image(picture(60)).save(run / "curves.png")
    (run / "options.yaml").write_text("resolution: 16\n")
    if second.endswith(".json"):
        (run / second).write_text("{}\n")
    elif second:
        write_pictures(run / second / "step-3", range(61, 62))


@kind("run-inside-photo-folder", "photos among which the folder of a training run lies")
def _(new: Folders) -> Iterator[Member]:
    def member(name, runs: dict[str, str], left_out: str, photos="", listed=False) -> Member:
        folder = new()
        write_pictures(folder / photos, range(8))
        for run, second in runs.items():
            write_run(folder / run, second)
        answer = Answer(pictures(*range(8)), in_order=False, said=f"left out {left_out}")
        return Member(name, folder, (answer,), FOLDER, listed=listed)

    yield member("the case", {"runs/one": "checkpoints"}, r"1 folder: runs/one \(a run\)", listed=True)
    for second, place in product(("checkpoints", "model_index.json"), ("run", "a/b/c", "zz top", "2026-01-01")):
        yield member(f"{place} with {second}", {place: second}, rf"1 folder: {place} \(a run\)")
    two = {"runs/one": "checkpoints", "runs/two": "model_index.json"}
    yield member("two runs", two, r"2 folders: runs/one \(a run\), runs/two \(a run\)")
    yield member("a run in a run", {"one": "checkpoints", "one/two": "checkpoints"}, r"1 folder: one \(a run\)")
    yield member("photos in sub-folders", {"one": "checkpoints"}, r"1 folder: one \(a run\)", photos="my/photos")
    many = {f"runs/{i}": "checkpoints" for i in range(7)}
    yield member("seven runs", many, r"7 folders: runs/0 \(a run\), .* and 2 more")
    for output_dir, real in (("mine", "mine"), ("deep/mine", "deep/mine"), ("./mine/", "mine"), ("a/../mine", "mine")):
        folder = new()
        right = write_pictures(folder / "a", range(8))
        write_pictures(folder / real, range(20, 23))
        answer = Answer(right, said=rf"left out 1 folder: {real} \(output_dir\)")
        call = {**FOLDER, "output_dir": output_dir}
        yield Member(f"output_dir {output_dir}, which holds pictures alone", folder, (answer,), call)
    folder = new()
    write_pictures(folder, range(8))
    (folder / "cats").mkdir()
    (folder / "cats" / "options.yaml").touch()
    right = write_pictures(folder / "cats", range(8, 10))
    answer = Answer(np.concatenate([pictures(*range(8)), right]), in_order=False)
    yield Member("options.yaml alone makes no run", folder, (answer,), FOLDER)
    folder = new()
    write_pictures(folder, range(8))
    command = ("--train_data_dir", ".", "--output_dir", "runs/one", "--sample_every", "3", "--sample_steps", "2")
    said = Answer(said=r"left out 1 folder: runs/one")
    yield Member("train.py twice", folder, (said,), commands=(command, command), listed=True)


# ---- archives ------------------------------------------------------------------------------------------------------


def encoded(seed: int, suffix: str = ".png") -> bytes:
    file = io.BytesIO()
    image(picture(seed)).save(file, {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF"}[suffix])
    return file.getvalue()


def write_zip(path: Path, names: list[str], compression: int = zipfile.ZIP_DEFLATED, first: int = 0) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for seed, name in enumerate(names, first):
            archive.writestr(name, encoded(seed, Path(name).suffix.lower()))


@kind("zip-of-images", "pictures in a zip or tar file, in a folder or by itself")
def _(new: Folders) -> Iterator[Member]:
    names = [f"photos/{i:03}.png" for i in range(8)]

    def member(name, write: Callable[[Path], object], count=8, call=None, dataset="", listed=False) -> Member:
        folder = new()
        (folder / "zipped").mkdir()
        write(folder / "zipped")
        answers = [Answer(pictures(*range(count)), in_order=call is not None and "train_data_dir" in call)]
        if call is None and not dataset:  # by `datasets`, which takes folders in an archive for labels
            call = {"dataset_name": "zipped"}
            answers.append(Answer(refused=r"zipped.*; pass the archive itself: train_data_dir='zipped/train.zip'"))
        return Member(name, folder, tuple(answers), call or {}, dataset, listed=listed)

    yield member("the case", lambda folder: write_zip(folder / "train.zip", names), listed=True)
    spellings = {
        "without folders": [f"{i}.png" for i in range(8)],
        "three folders deep": [f"a/b/c/{i}.png" for i in range(8)],
        "in two folders": [f"{'ab'[i > 3]}/{i}.png" for i in range(8)],
        "names with spaces": [f"my photos/no {i}.png" for i in range(8)],
        "names not of ASCII": [f"Bäume/ä{i}.png" for i in range(8)],
        "names with dots": [f"a.b/{i}.c.png" for i in range(8)],
        "BMP": [f"{i}.bmp" for i in range(8)],
        "TIFF": [f"{i}.tif" for i in range(8)],
        "suffixes in capitals": [f"{i}.PNG" for i in range(8)],
    }
    for name, each in spellings.items():
        yield member(f"folder of a zip, {name}", lambda folder, each=each: write_zip(folder / "train.zip", each))
    for name, compression in (
        ("stored", zipfile.ZIP_STORED),
        ("bzip2", zipfile.ZIP_BZIP2),
        ("lzma", zipfile.ZIP_LZMA),
    ):
        write = lambda folder, how=compression: write_zip(folder / "a.zip", names, how)  # noqa: E731
        yield member(f"the zip itself, {name}", write, call={"train_data_dir": "zipped/a.zip"})

    def two(folder: Path) -> None:
        write_zip(folder / "a.zip", names[:4])
        write_zip(folder / "b.zip", names[4:], first=4)

    yield member("two zip files in a folder", two)
    yield member(
        "a zip with other files", lambda f: with_readme(f / "a.zip", names), call={"train_data_dir": "zipped/a.zip"}
    )
    yield member("a tar file", lambda f: write_tar(f / "a.tar", names), call={"train_data_dir": "zipped/a.tar"})
    yield member(
        "a tar file by its name", lambda f: write_tar(f / "a.tar", names), call={"dataset_name": "zipped/a.tar"}
    )
    yield member("a zip by its name", lambda f: write_zip(f / "a.zip", names), call={"dataset_name": "zipped/a.zip"})
    paths = '[f"zip://photos/{i:03}.png::" + str(Path("zipped/a.zip").resolve()) for i in range(8)]'
    table = f'datasets.Dataset.from_dict({{"image": {paths}}}).cast_column("image", datasets.Image())'
    yield member("paths into a zip in a Dataset", lambda f: write_zip(f / "a.zip", names), dataset=table)
    paths = paths.replace("zip://", "tar://").replace("a.zip", "a.tar")
    table = f'datasets.Dataset.from_dict({{"image": {paths}}}).cast_column("image", datasets.Image())'
    yield member("paths into a tar file in a Dataset", lambda f: write_tar(f / "a.tar", names), dataset=table)


def with_readme(path: Path, names: list[str]) -> None:
    write_zip(path, names)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("photos/README.txt", "no picture")


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as archive:
        for seed, name in enumerate(names):
            content = encoded(seed)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@kind("tar-of-frames", "a table of several columns of images, of which one is taken")
def _(new: Folders) -> Iterator[Member]:
    def tar(names: list[str], used: list[int], column: str, others: str, listed=False) -> Member:
        """Columns come from the endings after the first dot; `used` are the pictures of `column`."""
        folder = new()
        write_tar(folder / "0.tar", names)
        said = Answer(pictures(*used), said=rf"'{column}' is used and {others}.*not.*image_column")
        answers = (said, Answer(pictures(*range(len(names)))))
        return Member(", ".join(names[:3]), folder, answers, {"dataset_name": "."}, listed=listed)

    yield tar([f"frame.{i:03}.png" for i in range(4)], [0], "000.png", "'001.png', '002.png', '003.png'", listed=True)
    for count in (2, 3, 6):
        others = ", ".join(f"'{i}.png'" for i in range(1, count))
        yield tar([f"video.{i}.png" for i in range(count)], [0], "0.png", others)
    for one, other in (("left", "right"), ("a", "b"), ("image", "mask")):
        names = [f"{i}.{side}.png" for i in range(3) for side in (one, other)]
        yield tar(names, [0, 2, 4], f"{one}.png", f"'{other}.png'")
    for columns, count in product((2, 3, 5), (1, 4)):
        yield columns_of(new(), columns, count, "")
        yield columns_of(new(), columns, count, f"c{columns - 1}")
    folder = new()
    write_tar(folder / "0.tar", [f"{i}.png" for i in range(4)])
    answer = Answer(pictures(*range(4)), silent=True)
    yield Member("one column", folder, (answer,), {"dataset_name": "."})
    folder = new()
    write_tar(folder / "0.tar", [f"frame.{i:03}.png" for i in range(4)])
    yield Member("the tar file itself", folder, (Answer(pictures(*range(4))),), {"train_data_dir": "0.tar"})


def columns_of(folder: Path, columns: int, count: int, chosen: str) -> Member:
    """A Dataset in memory with c0, c1, … of images."""
    write_pictures(folder, range(columns * count))
    files = f'[f"{{i:03}}.png" for i in range(c * {count}, (c + 1) * {count})]'
    table = f'datasets.Dataset.from_dict({{f"c{{c}}": {files} for c in range({columns})}})'
    table += f".cast(datasets.Features({{f'c{{c}}': datasets.Image() for c in range({columns})}}))"
    first = int(chosen[1:] or 0) * count if chosen else 0
    others = ", ".join(f"'c{c}'" for c in range(1, columns))
    said = {"silent": True} if chosen else {"said": rf"'c0' is used and {others} not.*image_column"}
    answer = Answer(pictures(*range(first, first + count)), **said)
    call = {"image_column": chosen} if chosen else {}
    name = f"Dataset of {columns} columns, {count} rows, {chosen or 'none'} chosen"
    return Member(name, folder, (answer,), call, table)


# ---- what `datasets` leaves out ------------------------------------------------------------------------------------


@kind("names-that-look-like-splits", "names that hold one of the words by which `datasets` makes splits")
def _(new: Folders) -> Iterator[Member]:
    words = ("train", "training", "dev", "val", "valid", "validation", "test", "testing", "eval", "evaluation")

    def member(files: list[str], listed=False) -> Member:
        folder = new()
        for seed, name in enumerate(files):
            (folder / name).parent.mkdir(exist_ok=True)
            image(picture(seed)).save(folder / f"{name}.png")
        said = Answer(said=rf"\d of its {len(files)} images are in split 'train', and \d not.*With train_data_dir all")
        refused = Answer(refused=r"split.*make splits; train_data_dir takes all images of a folder")
        whole = Answer(pictures(*range(len(files))), in_order=False, silent=True)
        return Member(", ".join(files), folder, (said, refused, whole), {"dataset_name": "."}, listed=listed)

    yield member(["cat", "dog", "contest", "my_train_2", "test-1", "evaluation", "val 3"], listed=True)
    yield member(["cat", "dog", "test-1"], listed=True)
    for word in words:
        yield member(["cat", "dog", f"my_{word}_2"])
        yield member(["cat", f"{word}/dog"])
    yield member(["train_cat", "train_dog", "test_cat"])
    folder = new()
    write_pictures(folder, range(3))
    (folder / "test-1.png").write_bytes(encoded(3))
    yield Member("train_data_dir takes all", folder, (Answer(pictures(0, 1, 2, 3)),), FOLDER)


@kind("folder-with-metadata-csv", "a metadata.csv or .jsonl that does not name each picture once")
def _(new: Folders) -> Iterator[Member]:
    def member(name, rows: list[int], count=4, suffix="csv", quiet=False, listed=False) -> Member:
        folder = new()
        write_pictures(folder, range(count))
        if suffix == "csv":
            lines = "".join(f"{seed:03}.png,a caption\n" for seed in rows)
            (folder / "metadata.csv").write_text(f"file_name,caption\n{lines}")
        else:
            lines = [json.dumps({"file_name": f"{seed:03}.png", "caption": "a"}) for seed in rows]
            (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        documented = "metadata.csv` names the images that count"
        missing, twice = count - len(set(rows)), any(rows.count(seed) > 1 for seed in rows)
        said = rf"{count - missing} of its {count} images are in split 'train', and {missing} not.*metadata.csv"
        if not missing:
            said = "of its images are in more than one row" if twice else ""
        answer = Answer(pictures(*rows), said=said, documented=documented, silent=not said)
        return Member(f"{name}, {suffix}", folder, (answer,), {"dataset_name": "."}, listed=listed)

    yield member("half of them", [1, 3], listed=True)
    yield member("one twice", [0, 0, 1], listed=True)
    shapes = {
        "each once": [0, 1, 2, 3],
        "in another order": [3, 1, 0, 2],
        "the first alone": [0],
        "the last alone": [3],
        "all but one": [0, 1, 3],
        "each twice": [0, 0, 1, 1, 2, 2, 3, 3],
        "one three times, none missing": [0, 1, 2, 3, 3, 3],
        "one twice, one missing": [0, 1, 1, 2],
        "one twice, at the ends": [2, 0, 1, 2],
    }
    for (name, rows), suffix in product(shapes.items(), ("csv", "jsonl")):
        yield member(name, rows, suffix=suffix)
    folder = new()
    write_pictures(folder, range(4))
    (folder / "metadata.csv").write_text("file_name,caption\n001.png,a\n")
    yield Member("train_data_dir takes all", folder, (Answer(pictures(0, 1, 2, 3)),), FOLDER)


@kind("folder-with-avif", "a local folder with AVIF, which `datasets` does not know")
def _(new: Folders) -> Iterator[Member]:
    def member(files: dict[str, int], name: str, sub="", listed=False) -> Member:
        folder, seed = new(), 0
        (folder / sub).mkdir(exist_ok=True)
        for suffix, count in files.items():
            for _ in range(count):
                image(picture(seed)).save(folder / sub / f"{seed}{suffix}")
                seed += 1
        avif = sum(count for suffix, count in files.items() if suffix.lower() == ".avif")
        pattern = (
            rf"{seed - avif} of its {seed} images are in split 'train', and {avif} not.*: {avif} are of formats.*"
        )
        said = Answer(said=pattern + "With train_data_dir all are used")
        answers = (said,) if avif else (Answer(silent=True),)
        return Member(name, folder, answers, {"dataset_name": "."}, listed=listed)

    yield member({".avif": 1, ".png": 1, ".webp": 1}, "the case", listed=True)
    for suffix, count in product((".png", ".jpg", ".webp", ".gif", ".bmp", ".tif", ".ppm"), (1, 3)):
        yield member({".avif": count, suffix: 2}, f"{count} AVIF and 2 {suffix}")
    for suffix in (".jp2", ".jpe", ".jfif"):
        yield member({".png": 1, suffix: 1}, f"{suffix}, which it knows")
    yield member({".AVIF": 1, ".png": 1}, ".AVIF in capitals")
    yield member({".avif": 2, ".png": 2}, "in a sub-folder", sub="cats")
    folder = new()
    write_pictures(folder, range(2))
    image(picture(2)).save(folder / "a.avif")
    answer = Answer(as_batch(picture(0), picture(1), *[np.asarray(open_avif(folder / "a.avif"))]), in_order=False)
    yield Member("train_data_dir takes all", folder, (answer,), FOLDER)


def open_avif(path: Path) -> np.ndarray:
    import imagecodecs

    return imagecodecs.avif_decode(path.read_bytes())
