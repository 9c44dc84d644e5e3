"""Kinds of image files: PNG, GIF, JPEG, WebP and JPEG 2000."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import product

import imagecodecs
import numpy as np
from format_files import noise, png, png_chunk, saved
from PIL import Image, ImageColor, PngImagePlugin

from . import Answer, Folders, Member, kind
from .pictures import as_batch, image, on_background, picture, write_pictures

FOLDER = {"train_data_dir": "."}
GREY, RED = "#282828", "red"


@kind("png-grey-4bit-trns", "a grey PNG of 1 to 8 bits with a transparent level")
def _(new: Folders) -> Iterator[Member]:
    def member(bits, key, levels, background, interlaced=False, stored=None, listed=False) -> Member:
        folder = new()
        samples = np.array(levels, np.uint8)[..., None]
        chunk = png_chunk(b"tRNS", struct.pack(">H", key if stored is None else stored))
        (folder / "a.png").write_bytes(png(samples, bits, 0, interlaced, chunk))
        right = on_background(samples * (255 / (2**bits - 1)), (samples != key).astype(float), background)
        name = f"{bits} bits, level {key}, on {background}{', interlaced' * interlaced}"
        return Member(name, folder, (Answer(right),), {**FOLDER, "background": background}, listed=listed)

    yield member(4, 15, [[15, 0, 1, 14]], "black", listed=True)
    keys = [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3), (4, 0), (4, 1), (4, 7), (4, 14), (8, 0), (8, 17), (8, 255)]
    for i, (bits, key) in enumerate(keys):
        yield member(bits, key, noise(6, 9, bits=bits), (GREY, RED, "black")[i % 3], interlaced=bool(i % 2))
    for bits in (1, 2, 4, 8):  # of the stored level only the lowest bits count
        yield member(bits, 1, noise(5, 5, bits=bits), RED, stored=(0xFF00 >> bits << bits | 1) & 0xFFFF)
        yield member(bits, 2**bits - 1, noise(1, 1, bits=bits), "white")


@kind("png-16bit-grey-alpha", "a grey PNG of 16 bits with alpha among grey files")
def _(new: Folders) -> Iterator[Member]:
    def member(name, samples, others, background="white", interlaced=False, listed=False) -> Member:
        """`samples` [H, W, 2] are uint16, of which 8 bits are kept, as docs/data.md has it for colour."""
        folder = new()
        (folder / "a.png").write_bytes(png(samples, 16, 4, interlaced))
        for i, other in enumerate(others):
            image(other).save(folder / f"b{i}.png")
        levels = samples >> 8
        first = on_background(levels[..., :1].astype(float), levels[..., 1:] / 255, background)[0].transpose(1, 2, 0)
        answer = Answer(as_batch(first, *others))
        return Member(name, folder, (answer,), {**FOLDER, "background": background}, listed=listed)

    pixels = np.array([[[0x12FF, 0xFFFF], [0x80FF, 0x8000]]], np.uint16)
    yield member("the case", pixels, [np.array([[[18], [200]]], np.uint8)], listed=True)
    for i, (background, interlaced, side) in enumerate(product(("white", "black", GREY, RED), (False, True), (1, 6))):
        name = f"{side} x {side} on {background}{', interlaced' * interlaced}"
        grey = [picture(i, 1, side)] if side > 1 else []
        yield member(name, noise(side, side, 2, bits=16, seed=i), grey, background, interlaced)
    for i, alpha in enumerate((0, 1, 255, 65535)):
        samples = noise(6, 6, 2, bits=16, seed=i)
        samples[..., 1] = alpha
        yield member(f"alpha {alpha} everywhere", samples, [picture(i, 1, 6)], GREY)


@kind("png-with-long-text", "a PNG with long text or a large colour profile")
def _(new: Folders) -> Iterator[Member]:
    def member(name, pixels, chunks, answers=(), listed=False) -> Member:
        folder = new()
        colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[-1]]
        data = png(pixels, 8, colour_type, False, *chunks)
        (folder / "a.png").write_bytes(data)
        right = as_batch(pixels) if pixels.shape[-1] in (1, 3) else None
        if right is None:
            right = on_background(pixels[..., :-1].astype(float), pixels[..., -1:] / 255, "white")
        answers = answers or (Answer(right), Answer(refused=r"a\.png: .*(text|profile).*; save it without"))
        return Member(name, folder, answers, FOLDER, listed=listed)

    def chunk(name: str, size: int) -> bytes:
        text = b"x" * size
        bodies = {
            "tEXt": b"workflow\0" + text,
            "zTXt": b"workflow\0\0" + zlib.compress(text),
            "iTXt": b"workflow\0\0\0\0\0" + text,
            "iTXt, compressed": b"workflow\0\1\0\0\0" + zlib.compress(text),
            "iCCP": b"profile\0\0" + zlib.compress(text),
        }
        return png_chunk(name[:4].encode(), bodies[name])

    yield member("the case, text", picture(0), [chunk("zTXt", 1_200_000)], listed=True)
    yield member("the case, profile", picture(0), [chunk("iCCP", 3_000_000)], listed=True)
    names = ("tEXt", "zTXt", "iTXt", "iTXt, compressed", "iCCP")
    for i, (name, size) in enumerate(product(names, (1000, 2_000_000, 9_000_000))):
        yield member(f"{name} of {size:,} bytes", picture(i, 1 + i % 4), [chunk(name, size)])
    for i, name in enumerate(names[:4]):
        yield member(f"{name}, 40 times", picture(i, 1 + i % 4), [chunk(name, 1_000_000)] * 40)
    too_long = Answer(refused=r"a\.png: its text and colour profile take [\d,]+ bytes, .*; save it without metadata")
    yield member("tEXt of 70 MB", picture(0), [chunk("tEXt", 70_000_000)], (too_long,))


@kind("apng-with-default-image", "an animated PNG, with a default image of its own or without")
def _(new: Folders) -> Iterator[Member]:
    def member(name, frames, default_image, listed=False) -> Member:
        folder = new()
        first, *others = map(image, frames)
        first.save(folder / "a.png", save_all=True, append_images=others, default_image=default_image)
        documented = "default image" if default_image else "its first frame"
        return Member(name, folder, (Answer(as_batch(frames[0]), documented=documented),), FOLDER, listed=listed)

    colours = [np.full((2, 2, 3), ImageColor.getrgb(name), np.uint8) for name in ("red", "green", "blue")]
    yield member("the case", colours, True, listed=True)
    for default_image, channels, count, side in product((True, False), (1, 3), (2, 3, 6), (1, 9)):
        if default_image and count == 6 and side == 1 or not default_image and count == 6:
            continue
        frames = [
            picture(seed, channels, side) if side > 1 else picture(seed, channels)[2:3, 2:3] for seed in range(count)
        ]
        name = f"{'default image and ' * default_image}{count - default_image} frames of {side} x {side}"
        yield member(f"{name}, {channels} channels", frames, default_image)


@kind("gif-frame-smaller-than-screen", "a GIF whose first frame is smaller than its screen")
def _(new: Folders) -> Iterator[Member]:
    def member(name, screen, frame, palette, background, shown_behind, clear=None, listed=False) -> Member:
        folder = new()
        (folder / "a.gif").write_bytes(gif(screen, frame, palette, background, clear))
        left, top, width, height = frame
        right = np.zeros((screen[1], screen[0], 3), np.uint8) + np.array(ImageColor.getrgb(shown_behind), np.uint8)
        right[top : top + height, left : left + width] = palette[2]
        if (right == right[..., :1]).all():
            right = right[..., :1]
        call = {**FOLDER, "background": shown_behind}
        answer = Answer(as_batch(right), documented="frame of a GIF leaves free")
        return Member(name, folder, (answer,), call, listed=listed)

    colours = [[0, 0, 255], [0, 255, 0], [255, 255, 0], [9, 9, 9]]
    greys = [[0] * 3, [77] * 3, [200] * 3, [9] * 3]
    yield member("the case", (4, 4), (1, 1, 2, 2), colours, 1, RED, listed=True)
    frames = [(0, 0, 1, 1), (3, 3, 1, 1), (0, 2, 4, 2), (2, 0, 2, 4), (1, 0, 3, 4)]
    for i, (frame, (palette, behind), clear) in enumerate(product(frames, ((colours, RED), (greys, GREY)), (None, 0))):
        name = f"frame {frame}, {'grey' if palette is greys else 'colour'}, entry {clear} is clear"
        yield member(name, (4, 4), frame, palette, i % 4, behind, clear)


def gif(screen: tuple[int, int], frame: tuple[int, ...], palette: list, background: int, clear: int | None) -> bytes:
    """One frame (left, top, width, height) of palette entry 2."""
    control = b"" if clear is None else b"\x21\xf9\x04\x01\0\0" + bytes([clear, 0])
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x81, background, 0) + bytes(sum(palette, []))
    codes = [4, *(code for _ in range(frame[2] * frame[3]) for code in (2, 4)), 5]  # 4 clears the table, 5 ends
    data = sum(code << (3 * i) for i, code in enumerate(codes)).to_bytes((3 * len(codes) + 7) // 8, "little")
    return head + control + b"," + struct.pack("<HHHHB", *frame, 0) + bytes([2, len(data)]) + data + b"\0;"


XMP = {
    "double quotes": '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/>',
    "single quotes": "<rdf:Description xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation='{}'/>",
    "an element": "<rdf:Description><tiff:Orientation>{}</tiff:Orientation></rdf:Description>",
}


@kind("jpeg-orientation-in-xmp", "an orientation that XMP alone states, and one of EXIF beside it")
def _(new: Folders) -> Iterator[Member]:
    def member(form, orientation, file_format, exif=1, listed=False) -> Member:
        """Right is the same file without XMP, turned as EXIF says."""
        folder = new()
        pixels = np.repeat(np.array([[0] * 16 + [255] * 16], np.uint8), 16, 0)[..., None]
        text = f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{XMP[form].format(orientation)}</x:xmpmeta>'.encode()
        options: dict = {"xmp": text}
        if file_format == "PNG":
            options = {"pnginfo": PngImagePlugin.PngInfo()}
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", text.decode())
        elif file_format == "TIFF":
            options = {"tiffinfo": {700: text}}
        elif file_format == "WEBP":
            options["lossless"] = True
        (folder / f"a.{file_format.lower()}").write_bytes(saved(image(pixels), file_format, exif, **options))
        turned = {1: pixels, 3: pixels[::-1, ::-1], 8: np.rot90(pixels)}[exif]
        name = f"{file_format}, {orientation} in {form}{f', EXIF says {exif}' if exif > 1 else ''}"
        return Member(name, folder, (Answer(as_batch(turned)),), FOLDER, listed=listed)

    for form in ("double quotes", "single quotes"):
        yield member(form, 6, "JPEG", listed=True)
    for orientation, form in product((2, 3, 4, 5, 7, 8), ("double quotes", "single quotes")):
        yield member(form, orientation, "JPEG")
    for file_format, form in product(("PNG", "WEBP", "TIFF"), XMP):
        yield member(form, 6, file_format)
    for exif in (3, 8):
        yield member("double quotes", 6, "JPEG", exif)


@kind("jp2-rgb-12bit", "JPEG 2000 of other depths than 8 bits")
def _(new: Folders) -> Iterator[Member]:
    def member(samples, bits, codec, listed=False) -> Member:
        folder, channels = new(), samples.shape[-1]
        data = imagecodecs.jpeg2k_encode(
            samples[..., 0] if channels == 1 else samples, level=0, bitspersample=bits, codecformat=codec, mct=False
        )
        (folder / f"a.{codec}").write_bytes(data)
        shown = as_batch(imagecodecs.jpeg2k_decode(data).reshape(samples.shape) * (255 / (2**bits - 1)))
        refused = Answer(refused=rf"a\.{codec}: JPEG 2000 of {channels} components? of {bits} bits; save it with 8")
        name = f"{channels} components of {bits} bits, .{codec}"
        return Member(name, folder, (Answer(shown), refused), FOLDER, listed=listed)

    row = np.zeros((8, 8, 3), np.uint16)
    row[0, :, 0] = [0, 1, 16, 2047, 2048, 4032, 4090, 4095]
    yield member(row, 12, "jp2", listed=True)
    for bits, codec in product(range(9, 17), ("jp2", "j2k")):
        yield member(noise(8, 8, 3, bits=bits), bits, codec)
    for bits, codec in product((4, 9, 10, 12, 16), ("jp2", "j2k")):
        yield member(noise(8, 8, 1, bits=bits), bits, codec)


@kind("grey-webp-folder", "grey pictures in formats that have no grey of their own")
def _(new: Folders) -> Iterator[Member]:
    options = {"webp": {"lossless": True}, "gif": {}, "bmp": {}, "avif": {"quality": 100, "subsampling": "4:4:4"}}

    def member(name, pictures, suffix, listed=False) -> Member:
        folder, shown = new(), []
        for i, pixels in enumerate(pictures):
            image(pixels).save(folder / f"{i}.{suffix}", **options[suffix])
            exact = pixels if suffix != "avif" else np.asarray(Image.open(folder / f"{i}.avif"))
            shown.append(exact[..., :1] if pixels.shape[-1] == 1 or (pixels == pixels[..., :1]).all() else exact)
        return Member(name, folder, (Answer(as_batch(*shown)),), FOLDER, listed=listed)

    yield member("the case", [picture(i, 1) for i in range(4)], "webp", listed=True)
    for suffix in options:
        greys = [picture(i, 1) for i in range(3)]
        few = [np.repeat(each // 64 * 64, 3, axis=-1) for each in greys]  # few levels, for a GIF keeps them all
        spot = few[0].copy()
        spot[3, 5] = RED_PIXEL
        yield member(f"{suffix}, mode L", greys, suffix)
        yield member(f"{suffix}, three equal channels", few, suffix)
        yield member(f"{suffix}, black alone", [np.zeros((4, 6, 3), np.uint8)], suffix)
        yield member(f"{suffix}, one pixel in colour", [spot], suffix)
        yield member(f"{suffix}, one of three with one pixel in colour", [*few[1:], spot], suffix)


RED_PIXEL = (255, 0, 0)


@kind("one-colour-among-grey", "one file in colour among grey ones")
def _(new: Folders) -> Iterator[Member]:
    def member(count, place, suffix, name, listed=False) -> Member:
        """`count` files in all, of which the one at `place` is in colour."""
        folder = new()
        options = {"lossless": True} if suffix == ".webp" else {}  # else some grey pixels become coloured
        for i in range(count):
            colour = i == place
            file = folder / f"{i:03}{name if colour else ''}{suffix}"
            image(picture(i, 3 if colour else 1)).save(file, **options)
        said = rf"the first in colour is \S*{place:03}{name}{suffix} \(1 of {count}\)"
        right = as_batch(*(picture(i, 3 if i == place else 1) for i in range(count)))
        answer = Answer(None if suffix == ".jpg" else right, said=said)
        return Member(f"{count} {suffix} files, number {place} in colour", folder, (answer,), FOLDER, listed=listed)

    yield member(20, 19, ".png", "_scan", listed=True)
    for suffix in (".png", ".jpg", ".webp", ".tif", ".bmp"):
        for count, place in ((2, 0), (2, 1), (30, 17)):
            yield member(count, place, suffix, "_x")
    folder = new()
    for i, sub in enumerate(("a", "b/c", "d")):
        write_pictures(folder / sub, range(i, i + 1), 3 if i == 1 else 1)
    right = as_batch(picture(0, 1), picture(1), picture(2, 1))
    yield Member(
        "in a sub-folder", folder, (Answer(right, said=r"first in colour is \S*b/c/001.png \(1 of 3\)"),), FOLDER
    )
    folder = new()
    for i in range(4):
        image(picture(i, 1 if i else 3)).save(folder / f"{i}.png")
    rows = '{"image": sorted(map(str, Path.cwd().glob("*.png")))}'
    table = f'datasets.Dataset.from_dict({rows}).cast_column("image", datasets.Image())'
    right = as_batch(*(picture(i, 1 if i else 3) for i in range(4)))
    answer = Answer(right, said=r"first in colour is row 0 \(\S*0.png\) \(1 of 4\)")
    yield Member("in a Dataset", folder, (answer,), dataset=table)
    folder = new()
    write_pictures(folder / "photos", range(8), 1)
    image(picture(99)).save(folder / "photos" / "scan_x17.png")
    refused = Answer(refused=r"the first in colour is \S*scan_x17\.png \(1 of 9\)")
    command = ("--train_data_dir", "photos", "--in_channels", "1", "--output_dir", "run")
    yield Member("train.py --in_channels 1", folder, (refused,), commands=(command,), listed=True)
