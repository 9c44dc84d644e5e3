"""Kinds of scans and measurements: TIFF, and pixels of which the range is smaller than their depth."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import tifffile
from format_files import noise

from . import Answer, Folders, Member, kind
from .pictures import as_batch, image, on_background

FOLDER = {"train_data_dir": "."}


def tiff(samples: np.ndarray, **options) -> bytes:
    """A TIFF by tifffile, of [H, W, S] or [H, W]."""
    file = io.BytesIO()
    if options.get("planarconfig") == "separate":
        samples = np.moveaxis(samples, -1, 0)
    tifffile.imwrite(file, samples, metadata=None, software=False, **options)
    return file.getvalue()


@kind("tiff-planar-16bit-rgb", "a 16-bit TIFF in colour, in separate planes or interleaved")
def _(new: Folders) -> Iterator[Member]:
    def member(name, samples, order="<", planes="separate", compression=None, alpha=None, listed=False) -> Member:
        """Right is the high byte of each sample; premultiplied colours are divided by nothing."""
        folder = new()
        extra = {"extrasamples": [alpha]} if alpha else {}
        options = {"byteorder": order, "planarconfig": planes, "compression": compression, **extra}
        (folder / "a.tif").write_bytes(tiff(samples, photometric="rgb", **options))
        levels = (samples >> 8).astype(float)
        right = as_batch(levels)
        if alpha == "unassalpha":
            right = on_background(levels[..., :3], levels[..., 3:] / 255, "white")
        elif alpha:
            right = as_batch(levels[..., :3] + 255 - levels[..., 3:])
        refused = Answer(refused=r"a\.tif: separate planes of .* without compression; save it interleaved, or as PNG")
        answers = (Answer(right), refused) if planes == "separate" and not compression else (Answer(right),)
        return Member(name, folder, answers, FOLDER, listed=listed)

    case = (np.arange(8 * 8 * 3, dtype=np.uint16) * 300).reshape(8, 8, 3)
    yield member("the case", case, listed=True)
    yield member("its interleaved twin", case, planes="contig", listed=True)
    alphas, compressions = (None, "unassalpha", "assocalpha"), (None, "lzw", "adobe_deflate")
    for i, (order, compression, alpha) in enumerate(product("<>", compressions, alphas)):
        samples = noise(7, 10, 4 if alpha else 3, bits=16, seed=i)
        if alpha == "assocalpha":
            samples = np.minimum(samples, samples[..., 3:])
        name = f"{order} {compression or 'uncompressed'}, {alpha or 'no alpha'}"
        yield member(name, samples, order, "separate", compression, alpha)
    for order in "<>":
        yield member(f"{order} interleaved", noise(7, 10, 3, bits=16), order, "contig")


@kind("tiff-signed-8bit", "a TIFF of other samples than unsigned ones of 8 or 16 bits")
def _(new: Folders) -> Iterator[Member]:
    def member(name, data: bytes, words: str, listed=False) -> Member:
        folder = new()
        (folder / "a.tif").write_bytes(data)
        pattern = rf"a\.tif: pixels of {words}.*; save it with 8 or 16 bits|a\.tif: {words} pixels .*; save it with 8"
        return Member(name, folder, (Answer(refused=pattern),), FOLDER, listed=listed)

    yield member("the case", tiff(np.arange(-32, 32, dtype=np.int8).reshape(8, 8)), "signed", listed=True)
    words = {"i": "signed", "f": "Pillow mode 'F'", "c": "complex", "u": "32 bits"}
    for order, dtype in product("<>", ("i1", "i2", "i4", "f2", "f4", "f8", "u4", "c8")):
        values = np.arange(48).reshape(6, 8).astype(dtype)
        yield member(f"{order} {dtype}", tiff(values, byteorder=order), words[dtype[0]])
    for compression in ("lzw", "adobe_deflate"):
        data = tiff(np.zeros((6, 8), np.int8), compression=compression)
        yield member(f"int8, {compression}", data, "signed")
    colours = np.zeros((6, 8, 3), np.int8)
    yield member("int8 in colour", tiff(colours, photometric="rgb"), "signed")
    signed = tiff(np.zeros((6, 8), np.int8))
    place = signed.index(struct.pack("<HHI", 339, 3, 1)) + 8  # the value of SampleFormat
    undefined = signed[:place] + struct.pack("<H", 4) + signed[place + 2 :]
    yield member("undefined, 8 bits", undefined, "an undefined sample format")


@kind("tiff-four-bands", "a TIFF of more bands than grey or RGB, or with declared alpha")
def _(new: Folders) -> Iterator[Member]:
    def member(name, samples, answer: Answer, listed=False, **options) -> Member:
        folder = new()
        (folder / "a.tif").write_bytes(tiff(samples, **options))
        return Member(name, folder, (answer,), FOLDER, listed=listed)

    def bands(count, bits, photometric, planes, compression=None, order="<", listed=False) -> Member:
        colours = 3 if photometric == "rgb" else 1
        extra = {"extrasamples": ["unspecified"] * (count - colours)}
        options = {"photometric": photometric, "planarconfig": planes, "compression": compression, **extra}
        refused = Answer(refused=rf"a\.tif: TIFF of {count} bands; save three of them as RGB, or one as grey")
        name = f"{count} bands of {bits} bits, {photometric}, {planes}, {compression or 'uncompressed'}, {order}"
        samples = noise(6, 9, count, bits=bits, seed=count)
        return member(name, samples, refused, listed, byteorder=order, **options)

    for count, bits in ((2, 8), (4, 8), (5, 8), (8, 8), (4, 16), (5, 16)):
        yield bands(count, bits, "rgb" if count > 2 else "minisblack", "contig", listed=True)
    for count, bits in product((2, 3, 4, 6, 13), (8, 16)):
        yield bands(count, bits, "minisblack", "contig", order=">" if bits == 16 else "<")
    for count, compression in product((4, 5), ("lzw", "adobe_deflate")):
        yield bands(count, 8, "rgb", "contig", compression)
        yield bands(count, 16, "rgb", "separate", compression)
    for bits, alpha in product((8, 16), ("unassalpha", "assocalpha")):
        samples = noise(6, 9, 4, bits=bits)
        levels = (samples >> (bits - 8)).astype(float)
        right = on_background(levels[..., :3], levels[..., 3:] / 255, "white")
        if alpha == "assocalpha":
            samples = np.minimum(samples, samples[..., 3:])
            levels = (samples >> (bits - 8)).astype(float)
            right = as_batch(levels[..., :3] + 255 - levels[..., 3:])
        options = {"photometric": "rgb", "extrasamples": [alpha]}
        yield member(f"RGB and {alpha} of {bits} bits", samples, Answer(right), **options)


# ---- small ranges --------------------------------------------------------------------------------------------------


def shown(name: str, top: int, bits: int = 16) -> str:
    """The pattern of the one line about a range that looks too small."""
    return rf"^{name}: the largest of its {bits}-bit values is ({top:,}|{top}): scale them to 0–{2**bits - 1}"


@kind("ct-12bit-in-16bit-png", "files whose values fill a small part of their depth")
def _(new: Folders) -> Iterator[Member]:
    def waves(count: int, top: int) -> list[np.ndarray]:
        """uint16 [32, 32, 1], of which the largest value is `top`."""
        y, x = np.mgrid[:32, :32]
        slices = [(0.5 + 0.5 * np.sin(x / (3 + i)) * np.cos(y / 7)) * top for i in range(count)]
        slices[0][0, 0] = top
        return [each.astype(np.uint16)[..., None] for each in slices]

    def write(folder: Path, slices: list[np.ndarray], form: str) -> dict:
        if form == "npy":
            np.save(folder / "a.npy", np.stack(slices)[..., 0], allow_pickle=False)
            return {"dataset_name": "a.npy"}
        for i, each in enumerate(slices):
            if form == "tif":
                (folder / f"{i}.tif").write_bytes(tiff(each[..., 0], byteorder="<>"[i % 2]))
            else:
                image(each).save(folder / f"{i}.{form}")
        return FOLDER

    def member(name, slices, form, listed=False, max_value=None) -> Member:
        folder, top = new(), max(int(each.max()) for each in slices)
        call = write(folder, slices, form)
        bits, place = 8 * slices[0].itemsize, r"a\.npy" if form == "npy" else folder.name
        if max_value is not None:
            right = as_batch(*(each * (255 / max_value) for each in slices))
            return Member(name, folder, (Answer(right, silent=True),), {**call, "max_value": max_value})
        right = as_batch(*(each / 257 if bits == 16 else each for each in slices))
        return Member(name, folder, (Answer(right, said=shown(place, top, bits)),), call, listed=listed)

    yield member("the case", waves(8, 4095), "png", listed=True)
    for i, (bits, form) in enumerate(product((8, 10, 11, 13, 14), ("png", "tif", "npy"))):
        yield member(f"{bits} bits, {form}", waves(1 + i % 3, 2**bits - 1), form)
    masks = [noise(6, 6, 1, bits=1, seed=i).astype(np.uint8) for i in range(3)]
    for form in ("png", "tif", "npy", "bmp"):
        yield member(f"a mask of 0 and 1, {form}", masks, form)
    for form, top in product(("png", "tif", "npy"), (1023, 4095)):
        yield member(f"max_value {top}, {form}", waves(2, top), form, max_value=top)
    yield member("a mask of 0 and 1, max_value 1", masks, "png", max_value=1)


@kind("uint16-arrays-in-a-table", "a Dataset of arrays of 16 bits")
def _(new: Folders) -> Iterator[Member]:
    def member(top: int, form: str, listed=False) -> Member:
        folder = new()
        arrays = [np.linspace(0, top, 64).round().astype(np.uint16).reshape(8, 8) for _ in range(2)]
        np.save(folder / "levels.npy", np.stack(arrays), allow_pickle=False)
        images = 'from_dict({"image": list(np.load("levels.npy"))}, datasets.Features(image=datasets.Image()))'
        matrix = (
            'from_dict({"image": np.load("levels.npy")}, datasets.Features(image=datasets.Array2D((8, 8), "uint16")))'
        )
        pillow = 'from_dict({"image": [Image.fromarray(each) for each in np.load("levels.npy")]})'
        right = as_batch(*(each[..., None] / 257 for each in arrays))
        answer = Answer(right, said=shown("in-memory", top)) if top < 2**14 else Answer(right, silent=True)
        expression = f"datasets.Dataset.{ {'Image': images, 'Array2D': matrix, 'Pillow': pillow}[form] }"
        return Member(f"0 to {top}, {form}", folder, (answer,), dataset=expression, listed=listed)

    yield member(189, "Image", listed=True)
    for top, form in product((1, 100, 255, 1000, 4095, 16_383, 16_384, 65_535), ("Image", "Array2D", "Pillow")):
        if (top, form) not in ((1, "Array2D"), (100, "Pillow"), (255, "Array2D"), (1000, "Pillow")):
            yield member(top, form)
