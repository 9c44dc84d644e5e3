"""Kinds of tables and of objects in memory."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import product

import numpy as np
import pyarrow as pa
from format_files import noise
from PIL import Image
from pyarrow import parquet

from . import Answer, Folders, Member, kind
from .pictures import as_batch, image, picture, write_pictures

FILES = 'sorted(map(str, Path.cwd().glob("*.png")))'
TABLE = (
    f'datasets.Dataset.from_dict({{"image": {FILES}, "label": list(range(6))}}).cast_column("image", datasets.Image())'
)


def encoded(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image(pixels).save(file, file_format)
    return file.getvalue()


@kind("parquet-of-bytes-structs", "a parquet file of encoded images without the metadata of `datasets`")
def _(new: Folders) -> Iterator[Member]:
    right = as_batch(*map(picture, range(6)))
    content = [encoded(picture(seed)) for seed in range(6)]
    structs = [{"bytes": each, "path": None} for each in content]
    named = [{"bytes": each, "path": f"{seed}.png"} for seed, each in enumerate(content)]
    pair = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "structs": pa.array(structs, pair),
        "structs with names": pa.array(named, pair),
        "large structs": pa.array(named, pa.struct({"bytes": pa.large_binary(), "path": pa.large_string()})),
        "path before bytes": pa.array(named, pa.struct({"path": pa.string(), "bytes": pa.binary()})),
        "binary": pa.array(content, pa.binary()),
        "large binary": pa.array(content, pa.large_binary()),
    }

    def member(form, column, chosen, file="photos.parquet", name="image", listed=False, **options) -> Member:
        """Without `image_column` plain bytes may be anything, and the way to take them is named."""
        folder = new()
        parquet.write_table(pa.table({name: columns[column], "label": list(range(6))}), folder / file, **options)
        remedy = rf"no column of images.*; image_column='{name}' takes it for|cast_column"
        answers = (Answer(right),) if chosen else (Answer(right), Answer(refused=remedy))
        call = {"dataset_name": file, **({"image_column": name} if chosen else {})}
        return Member(f"{column}{', chosen' * chosen}{form}", folder, answers, call, listed=listed)

    yield member("", "structs", True, listed=True)
    yield member("", "binary", True, listed=True)
    for column, chosen in product(columns, (True, False)):
        if (column, chosen) not in (("structs", True), ("binary", True)):
            yield member("", column, chosen)
    for compression in ("gzip", "zstd", "none"):
        yield member(f", {compression}", "structs", True, compression=compression)
    yield member(", six row groups", "binary", True, row_group_size=1)
    yield member(", .PARQUET", "structs", True, file="photos.PARQUET")
    yield member(", a column 'my picture'", "binary", True, name="my picture")
    yield member(", in a folder", "structs", True, file="train-00000-of-00001.parquet")
    folder = new()
    write_pictures(folder, range(6))
    paths = [str(folder / f"{seed:03}.png") for seed in range(6)]
    parquet.write_table(pa.table({"image": paths}), folder / "photos.parquet")
    call = {"dataset_name": "photos.parquet", "image_column": "image"}
    yield Member("paths, chosen", folder, (Answer(right),), call)
    folder = new()
    parquet.write_table(pa.table({"text": [b"no picture"] * 2}), folder / "photos.parquet")
    refused = Answer(refused="row 0: no readable image header; .* are understood")
    yield Member(
        "bytes that are no images", folder, (refused,), {"dataset_name": "photos.parquet", "image_column": "text"}
    )


@kind("table-with-transform", "a Dataset with a transform or a format")
def _(new: Folders) -> Iterator[Member]:
    def member(form: str, seeds=range(6), table=TABLE, is_said=True, listed=False) -> Member:
        folder = new()
        write_pictures(folder, range(6))
        said = (
            {"said": r"the (transform|format \(.*\)) of the Dataset is not applied"} if is_said else {"silent": True}
        )
        answer = Answer(as_batch(*map(picture, seeds)), **said)
        plain = Answer(as_batch(*map(picture, seeds))) if listed else answer
        return Member(form or "none", folder, (answer, plain), dataset=table + form, listed=listed)

    for form in (
        '.with_transform(lambda b: {"input": [0] * len(b["image"])})',
        '.with_format("arrow")',
        '.with_format("pandas")',
        '.with_format("torch", columns=["label"])',
    ):
        yield member(form, listed=True)
    for form in ("numpy", "torch", "arrow", "pandas"):
        yield member(f'.with_format("{form}", columns=["image"])')
    for form in ("numpy", "torch"):
        yield member(f'.with_format("{form}")')
    yield member('.with_format("pandas", columns=["label"])')
    yield member('.with_format("numpy", columns=["label"])')
    yield member('.with_format("arrow", columns=["label"], output_all_columns=True)')
    yield member('.with_transform(lambda b: b, columns=["label"])')
    yield member('.with_transform(lambda b: {"image": [Image.new("L", (3, 3))] * len(b["image"])})')
    yield member(".with_transform(lambda b: 1 / 0)")
    yield member('.with_format("arrow").select([4, 2])', [4, 2])
    yield member('.select([5, 0, 0]).with_format("pandas")', [5, 0, 0])
    yield member('.with_format("numpy").with_format(None)', is_said=False)
    yield member(".select([1, 3])", [1, 3], is_said=False)
    yield member(".filter(lambda row: row['label'] % 2 == 1).with_format('arrow')", [1, 3, 5])
    yield member(".sort('label', reverse=True).with_format('torch')", range(5, -1, -1))
    yield member("", is_said=False)
    joined = f"datasets.concatenate_datasets([{TABLE}, {TABLE}])"
    yield member(".with_format('pandas')", [*range(6), *range(6)], joined)


@kind("column-with-a-mode", "an image column of a mode")
def _(new: Folders) -> Iterator[Member]:
    def member(mode, pillow: Image.Image, name, listed=False) -> Member:
        """L and RGB are obeyed, by Pillow's own conversion; other modes are refused by name."""
        folder = new()
        pillow.save(folder / "a.png")
        answers = [Answer(refused=rf"mode '{mode}'; only 'L' and 'RGB' are read: table.cast_column\(")]
        if mode in ("L", "RGB"):
            expected = np.asarray(pillow.convert("RGB").convert(mode))
            answers = [Answer(as_batch(expected if mode == "RGB" else expected[..., None]))]
        table = f'datasets.Dataset.from_dict({{"image": {FILES}}}).cast_column("image", datasets.Image(mode="{mode}"))'
        return Member(f"{name} as {mode}", folder, tuple(answers), dataset=table, listed=listed)

    yield member("RGB", Image.new("L", (8, 8), 9), "grey", listed=True)
    yield member("L", Image.new("RGB", (8, 8), "red"), "red", listed=True)
    grey, colour = image(picture(0, 1)), image(picture(1))
    palette = colour.quantize(16)
    black_and_white = Image.fromarray(noise(8, 8, bits=1).astype(bool))
    sources = {"grey": grey, "colour": colour, "palette": palette, "1 bit": black_and_white}
    for (name, pillow), mode in product(sources.items(), ("L", "RGB")):
        yield member(mode, pillow, name)
    for mode in ("1", "P", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"):
        yield member(mode, colour, "colour")
    yield member("RGBA", image(np.concatenate([picture(2), picture(3, 1)], axis=-1)), "colour with alpha")


@kind("picture-edited-after-opening", "a picture that was opened from a file and edited (a few ways to edit it)")
def _(new: Folders) -> Iterator[Member]:
    def member(edit: str, right: np.ndarray | None, listed=False) -> Member:
        """Without a copy `datasets` keeps the name of the file, and so the unedited picture; the page says so."""
        folder = new()
        image(picture(0, side=64)).save(folder / "big.png")
        expression = f'(lambda im: ({edit}))(Image.open("big.png"))'
        table = f'datasets.Dataset.from_dict({{"image": [{expression}]}})'
        shown = as_batch(picture(0, side=64) if right is None else right)
        answer = Answer(shown, documented=r"picture that was opened and edited: pass `.copy\(\)` of it")
        return Member(edit, folder, (answer,), dataset=table, listed=listed)

    small = image(picture(0, side=64))
    small.thumbnail((8, 8))
    yield member("[im.thumbnail((8, 8)), im][1]", None, listed=True)
    yield member("[im.thumbnail((8, 8)), im.copy()][1]", np.asarray(small))
    yield member("im.copy()", None)
    yield member("im.crop((0, 0, 9, 7))", picture(0, side=64)[:7, :9])
    yield member("im.transpose(Image.Transpose.FLIP_LEFT_RIGHT)", picture(0, side=64)[:, ::-1])
    marked = picture(0, side=64)
    marked[5, 4] = (1, 2, 3)
    yield member("[im.putpixel((4, 5), (1, 2, 3)), im][1]", None)
    yield member("[im.putpixel((4, 5), (1, 2, 3)), im.copy()][1]", marked)


@kind("arrays-and-splits", "arrays, DatasetDicts and streams in memory, and .PARQUET")
def _(new: Folders) -> Iterator[Member]:
    def member(name, expression, answer: Answer, listed=False, **call) -> Member:
        folder = new()
        write_pictures(folder, range(6))
        return Member(name, folder, (answer,), call, expression, listed=listed)

    def array(name, pixels: np.ndarray, right=None, refused="", listed=False) -> Member:
        folder = new()
        np.save(folder / "a.npy", pixels, allow_pickle=False)
        answer = Answer(refused=refused) if refused else Answer(right)
        return Member(name, folder, (answer,), {}, 'np.load("a.npy")', listed=listed)

    colour, grey = noise(5, 3, 6, 7), noise(5, 6, 7, seed=1)
    yield array("uint8 [N, C, H, W]", colour, colour, listed=True)
    splits = f"datasets.DatasetDict(train={TABLE}, test={TABLE})"
    pattern = r"a DatasetDict of splits \(train, test\); pass one of them"
    yield member("a DatasetDict", splits, Answer(refused=pattern), listed=True)
    stream = Answer(refused="streams have no index: pass ")
    yield member("an IterableDataset", TABLE + ".to_iterable_dataset()", stream, listed=True)
    folder = new()
    structs = [{"bytes": encoded(picture(seed)), "path": None} for seed in range(6)]
    parquet.write_table(pa.table({"image": structs}), folder / "a.PARQUET")
    right = as_batch(*map(picture, range(6)))
    yield Member(
        ".PARQUET", folder, (Answer(right),), {"dataset_name": "a.PARQUET", "image_column": "image"}, listed=True
    )
    yield array("uint8 [N, H, W, C]", colour.transpose(0, 2, 3, 1), colour)
    yield array("uint8 [N, H, W]", grey, grey[:, None])
    yield array("uint8 [N, 1, H, W]", grey[:, None], grey[:, None])
    yield array("uint8 [N, H, W, 1]", grey[..., None], grey[:, None])
    yield array("one image", colour[:1], colour[:1])
    yield array("bool", grey > 99, (grey > 99)[:, None] * 255)
    yield array("in Fortran's order", np.asfortranarray(colour), colour)
    words = noise(5, 6, 7, bits=16)
    yield array("uint16", words, words[:, None] / 257)
    yield array("uint16, big-endian", words.astype(">u2"), words[:, None] / 257)
    deep = noise(5, 3, 6, 7, bits=16)
    yield array("uint16 in colour", deep, deep / 257)
    for dtype in ("int8", "int32", "int64", "float16", "float32", "float64", "complex64"):
        advice = r"their range is not stated: scale them" if "float" in dtype else r"pass \.astype\('uint8'\) if they"
        yield array(dtype, colour.astype(dtype), refused=advice)
    for name, shape in (("two channels", (5, 2, 6, 7)), ("five dimensions", (1, 5, 3, 6, 7)), ("none", (0, 3, 6, 7))):
        yield array(name, np.zeros(shape, np.uint8), refused=r"array of shape \(.*\); images are \[N, H, W\]")
    streams = f"datasets.IterableDatasetDict(train={TABLE}.to_iterable_dataset())"
    yield member(
        "an IterableDatasetDict", streams, Answer(refused=r"IterableDatasetDict of splits \(train\); pass one")
    )
    generator = 'datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}]))'
    yield member("a stream of a generator", generator, stream)
    named = f"datasets.DatasetDict({{'a': {TABLE}, 'b': {TABLE}, 'c': {TABLE}}})"
    yield member("three splits", named, Answer(refused=r"splits \(a, b, c\); pass one of them"))
    yield member("a split of a DatasetDict", f"{splits}['test']", Answer(right))
