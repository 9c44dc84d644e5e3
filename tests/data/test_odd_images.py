"""Odd image files: each decodes to pixels that were worked out by hand, or is refused with an error naming the file.

The plain kinds, and why each is refused, are in test_decoding.py. Here a file is written byte by byte where Pillow
does not write such a kind, so that the expected pixels come from the format's description and not from the reader.
"""

import io
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from ddpm_hf.data import BadImage, decode_image, load_samples
from ddpm_hf.data.decoding import MAX_PIXELS

Row = list[tuple[int, ...]]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def row_of(*pixels: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    """An image one pixel high."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels if len(pixels[0]) > 1 else [pixel[0] for pixel in pixels])
    return image


# ---- files written by hand -----------------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, bits: int, colour_type: int, rows: bytes, *extra: bytes, interlaced: int = 0
) -> bytes:
    """A PNG of filtered `rows`; `extra` chunks come before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced))
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + end


def tiff(order: str, tags: dict[int, tuple[int, ...]], data: bytes) -> bytes:
    """A TIFF of one row in one strip; `order` is '<' or '>', `tags` are shorts, besides size and strip."""
    width = tags.pop(256)[0]
    every = {256: (width,), 257: (1,), 259: (1,), 277: (1,), 278: (1,), 279: (len(data),), **tags}
    start = 8 + 2 + 12 * (len(every) + 1) + 4  # of what does not fit into the entries
    entries, beyond = [], b""
    for tag in sorted([*every, 273]):
        values = every.get(tag, (0,))
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            beyond, packed = beyond + packed, struct.pack(f"{order}I", start + len(beyond))
        entries.append((tag, len(values), packed.ljust(4, b"\0")))
    place = struct.pack(f"{order}H", start + len(beyond)).ljust(4, b"\0")
    body = b"".join(
        struct.pack(f"{order}HHI", tag, 3, count) + (place if tag == 273 else packed) for tag, count, packed in entries
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(entries)) + body + bytes(4) + beyond + data


def bmp(width: int, height: int, bits: int, rows: bytes, palette: bytes = b"", compression: int = 0) -> bytes:
    """A BMP; a negative height stores the top row first. `palette` also holds the masks of compression 3."""
    colours = len(palette) // 4 if bits <= 8 else 0
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, colours, 0)
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + palette + rows


GREYS16 = [0, 128, 129, 257, 32896, 65535]  # 128 / 257 rounds down, 129 / 257 rounds up
GREYS8: Row = [(0,), (0,), (1,), (1,), (128,), (255,)]
PLTE = chunk(b"PLTE", bytes([*RED, *GREEN, *BLUE, *WHITE]))
TRANSPARENT_GREEN = chunk(b"tRNS", bytes([255, 0]))
BGR = bytes([*BLUE, 0, *GREEN, 0])  # what BMP calls red (B, G, R order) and green


def packed16(order: str) -> bytes:
    return struct.pack(f"{order}6H", *GREYS16)


def one_bit_tiff(photometric: int) -> bytes:
    return tiff("<", {256: (3,), 258: (1,), 262: (photometric,)}, b"\xa0")  # bits 1, 0, 1


def adobe_ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker is changed to say YCCK: Y = 255, Cb = Cr = 0, K = 255, all stored inverted."""
    data = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    place = data.index(b"Adobe") + 11
    assert data[place] == 0
    return data[:place] + b"\x02" + data[place + 1 :]


def animated(file_format: str, **options) -> bytes:
    frames = [Image.new("RGB", (3, 1), colour) for colour in (RED, GREEN)]
    return saved(frames[0], file_format, save_all=True, append_images=frames[1:], duration=50, **options)


def oriented(file_format: str, **options) -> bytes:
    """Red, green, blue from left to right, stored from right to left: orientation 2."""
    exif = Image.Exif()
    exif[0x0112] = 2
    return saved(row_of(BLUE, GREEN, RED), file_format, exif=exif, **options)


def profiled(file_format: str, **options) -> bytes:
    """With a colour profile that, if it were applied, would change every colour: here, 200 bytes of no meaning."""
    return saved(row_of(RED, GREEN, BLUE), file_format, icc_profile=bytes(200), **options)


RGB: Row = [RED, GREEN, BLUE]
# name: (file, pixels of its one row), on a white background
GOLDEN: dict[str, tuple[bytes, Row]] = {
    # PNG
    "png-1-bit": (png(3, 1, 1, 0, b"\0\xa0"), [(255,), (0,), (255,)]),
    "png-2-bit": (png(4, 1, 2, 0, b"\0\x1b"), [(0,), (85,), (170,), (255,)]),
    "png-4-bit": (png(3, 1, 4, 0, b"\0\x0f\x70"), [(0,), (255,), (119,)]),
    "png-8-bit": (png(2, 1, 8, 0, b"\0\x07\xfe"), [(7,), (254,)]),
    "png-16-bit": (png(6, 1, 16, 0, b"\0" + packed16(">")), GREYS8),
    "png-filter-sub": (png(3, 1, 8, 0, b"\1\x05\x05\x05"), [(5,), (10,), (15,)]),
    "png-rgb": (png(3, 1, 8, 2, b"\0" + bytes([*RED, *GREEN, *BLUE])), RGB),
    "png-rgb-16": (png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0x00FF)), [(255, 128, 0)]),
    "png-rgba-16": (png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 0xFFFF, 0, 0x6400, 0x3300)), [(255, 204, 224)]),
    "png-la": (png(2, 1, 8, 4, b"\0\x00\x33\x00\xff"), [(204,), (0,)]),
    "png-palette-1": (png(2, 1, 1, 3, b"\0\x40", PLTE), [RED, GREEN]),
    "png-palette-2": (png(4, 1, 2, 3, b"\0\x1b", PLTE), [RED, GREEN, BLUE, WHITE]),
    "png-palette-4": (png(2, 1, 4, 3, b"\0\x20", PLTE), [BLUE, RED]),
    "png-palette-8": (png(3, 1, 8, 3, b"\0\0\1\2", PLTE), RGB),
    "png-palette-clear": (png(3, 1, 8, 3, b"\0\0\1\2", PLTE, TRANSPARENT_GREEN), [RED, WHITE, BLUE]),
    "png-palette-half": (png(1, 1, 8, 3, b"\0\0", PLTE, chunk(b"tRNS", b"\x33")), [(255, 204, 204)]),
    "png-grey-key": (png(2, 1, 8, 0, b"\0\x05\x06", chunk(b"tRNS", b"\0\x05")), [(255,), (6,)]),
    "png-1-bit-key": (png(2, 1, 1, 0, b"\0\x40", chunk(b"tRNS", b"\0\0")), [(255,), (255,)]),
    "png-rgb-key": (
        png(2, 1, 8, 2, b"\0" + bytes([*RED, *GREEN]), chunk(b"tRNS", struct.pack(">3H", *RED))),
        [WHITE, GREEN],
    ),
    "png-gamma": (png(1, 1, 8, 0, b"\0\x64", chunk(b"gAMA", struct.pack(">I", 100_000))), [(100,)]),
    "png-text-bomb": (  # text is never inflated
        png(1, 1, 8, 0, b"\0\1", chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(5_000_000)))),
        [(1,)],
    ),
    "png-orientation": (oriented("PNG"), RGB),
    "png-profile": (profiled("PNG"), RGB),
    "png-two-idats": (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0))
        + b"".join(
            chunk(b"IDAT", part) for part in (zlib.compress(b"\0\x01\x02")[:5], zlib.compress(b"\0\x01\x02")[5:])
        )
        + chunk(b"IEND", b""),
        [(1,), (2,)],
    ),
    "apng": (animated("PNG"), [RED] * 3),
    # TIFF
    "tiff-16-little": (tiff("<", {256: (6,), 258: (16,), 262: (1,)}, packed16("<")), GREYS8),
    "tiff-16-big": (tiff(">", {256: (6,), 258: (16,), 262: (1,)}, packed16(">")), GREYS8),
    "tiff-8-inverted": (tiff("<", {256: (2,), 258: (8,), 262: (0,)}, b"\x00\x0a"), [(255,), (245,)]),
    "tiff-1-bit": (one_bit_tiff(1), [(255,), (0,), (255,)]),
    "tiff-1-bit-inverted": (one_bit_tiff(0), [(0,), (255,), (0,)]),
    "tiff-rgb": (
        tiff("<", {256: (3,), 258: (8, 8, 8), 262: (2,), 277: (3,)}, bytes([*RED, *GREEN, *BLUE])),
        RGB,
    ),
    "tiff-rgb-16": (
        tiff(">", {256: (1,), 258: (16, 16, 16), 262: (2,), 277: (3,)}, struct.pack(">3H", 0xFFFF, 0x8000, 0x00FF)),
        [(255, 128, 0)],
    ),
    "tiff-alpha": (
        tiff("<", {256: (1,), 258: (8,) * 4, 262: (2,), 277: (4,), 338: (2,)}, bytes([255, 0, 100, 51])),
        [(255, 204, 224)],
    ),
    "tiff-premultiplied": (  # the same pixel, its colours times its alpha
        tiff("<", {256: (1,), 258: (8,) * 4, 262: (2,), 277: (4,), 338: (1,)}, bytes([51, 0, 20, 51])),
        [(255, 204, 224)],
    ),
    "tiff-cmyk": (
        tiff("<", {256: (1,), 258: (8,) * 4, 262: (5,), 277: (4,)}, bytes([0, 255, 255, 0])),
        [RED],
    ),
    "tiff-palette": (
        tiff(
            "<", {256: (2,), 258: (8,), 262: (3,), 320: (65535, *[0] * 255, 0, 65535, *[0] * 254, *[0] * 256)}, b"\0\1"
        ),
        [RED, GREEN],
    ),
    "tiff-orientation": (tiff("<", {256: (2,), 258: (8,), 262: (1,), 274: (2,)}, b"\x01\x02"), [(2,), (1,)]),
    **{
        f"tiff-{name}": (saved(row_of(*RGB), "TIFF", compression=name), RGB)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
    },
    "tiff-group4": (saved(Image.new("1", (2, 1), 1), "TIFF", compression="group4"), [(255,), (255,)]),
    "tiff-pages": (
        saved(row_of(*RGB), "TIFF", save_all=True, append_images=[row_of(BLACK, BLACK, BLACK)]),
        RGB,
    ),
    # BMP: rows are padded to four bytes, colours are stored blue first
    "bmp-24": (bmp(1, 1, 24, bytes([10, 20, 30, 0])), [(30, 20, 10)]),
    "bmp-32": (bmp(1, 1, 32, bytes([10, 20, 30, 0])), [(30, 20, 10)]),
    "bmp-16": (bmp(1, 1, 16, struct.pack("<HH", 0b11111 << 10, 0)), [RED]),
    "bmp-565": (
        bmp(1, 1, 16, struct.pack("<HH", 0b111111 << 5, 0), struct.pack("<3I", 0xF800, 0x7E0, 0x1F), 3),
        [GREEN],
    ),
    "bmp-8": (bmp(2, 1, 8, b"\0\1\0\0", BGR), [RED, GREEN]),
    "bmp-4": (bmp(2, 1, 4, b"\x10\0\0\0", BGR), [GREEN, RED]),
    "bmp-1": (bmp(2, 1, 1, b"\x40\0\0\0", BGR), [RED, GREEN]),
    "bmp-rle8": (bmp(3, 1, 8, b"\x02\x00\x01\x01\x00\x01", BGR, 1), [RED, RED, GREEN]),
    # PPM and relatives
    "pbm-ascii": (b"P1\n3 1\n1 0 1\n", [(0,), (255,), (0,)]),  # 1 is black
    "pbm": (b"P4\n3 1\n\xa0", [(0,), (255,), (0,)]),
    "pgm-ascii": (b"P2\n# a comment\n3 1\n15\n0 15 7\n", [(0,), (255,), (119,)]),
    "pgm": (b"P5 2 1 255\n\x07\xfe", [(7,), (254,)]),
    "pgm-16": (b"P5 6 1 65535\n" + packed16(">"), GREYS8),
    "ppm-ascii": (b"P3 1 1 255 255 128 0\n", [(255, 128, 0)]),
    "ppm": (b"P6 3 1 255\n" + bytes([*RED, *GREEN, *BLUE]), RGB),
    "ppm-16": (b"P6 1 1 65535\n" + struct.pack(">3H", 65535, 32896, 0), [(255, 128, 0)]),
    # GIF
    "gif": (saved(row_of(*RGB).quantize(4), "GIF"), RGB),
    "gif-interlaced": (saved(row_of(*RGB).quantize(4), "GIF", interlace=1), RGB),
    "gif-animated": (animated("GIF"), [RED] * 3),
    # WebP, lossless
    "webp": (saved(row_of(*RGB), "WEBP", lossless=True), RGB),
    "webp-alpha": (saved(row_of((255, 0, 100, 51), mode="RGBA"), "WEBP", lossless=True), [(255, 204, 224)]),
    "webp-animated": (animated("WEBP", lossless=True), [RED] * 3),
    "webp-orientation": (oriented("WEBP", lossless=True), RGB),
}
if features.check("jpg_2000"):
    GOLDEN["jpeg2000"] = saved(row_of(*RGB).resize((24, 8), 0), "JPEG2000"), [RED] * 8 + [GREEN] * 8 + [BLUE] * 8


def pixels_of(pixels: np.ndarray) -> Row:
    """Those of the first row, left to right, from [C, H, W]."""
    return [tuple(int(level) for level in pixel) for pixel in pixels[:, 0].T]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_pixels(name):
    file, expected = GOLDEN[name]
    assert pixels_of(decode_image(io.BytesIO(file))) == expected


BROWN = (200, 100, 50)


def plain(colour: tuple[int, ...], file_format: str, **options) -> bytes:
    return saved(Image.new("RGB", (16, 16), colour), file_format, **options)


# Lossy: whole images of one colour, and how near it they must come.
PLAIN: dict[str, tuple[Callable[[], bytes], tuple[int, ...], int]] = {
    "jpeg-progressive": (lambda: plain(BROWN, "JPEG", progressive=True), BROWN, 3),
    "jpeg-grey": (lambda: saved(Image.new("L", (16, 16), 77), "JPEG"), (77,), 1),
    "jpeg-444": (lambda: plain(RED, "JPEG", subsampling=0, quality=100), RED, 2),
    "jpeg-rgb": (lambda: plain(RED, "JPEG", keep_rgb=True, quality=100), RED, 2),
    "jpeg-profile": (lambda: plain(RED, "JPEG", icc_profile=bytes(200), quality=100), RED, 2),
    "jpeg-ycck": (adobe_ycck, (179, 0, 227), 3),  # 1.402 · 128 = 179, 1.772 · 128 = 227, and green is cut at 0
    "webp-lossy": (lambda: plain(BROWN, "WEBP", quality=90), BROWN, 6),
}
if features.check("avif"):
    PLAIN["avif"] = lambda: plain(BROWN, "AVIF", quality=90), BROWN, 6


@pytest.mark.parametrize("name", PLAIN)
def test_plain_colours_of_lossy_files(name):
    make, expected, tolerance = PLAIN[name]
    pixels = decode_image(io.BytesIO(make())).astype(int)
    assert pixels.shape[0] == len(expected)
    assert np.abs(pixels - np.array(expected)[:, None, None]).max() <= tolerance


def test_an_interlaced_png():
    """Adam7 of 2 × 2: the first pass has the top left pixel, the sixth the top right, the seventh the row below."""
    data = png(2, 2, 8, 0, b"\0\x0a" + b"\0\x14" + b"\0\x1e\x28", interlaced=1)
    assert decode_image(io.BytesIO(data)).tolist() == [[[10, 20], [30, 40]]]


@pytest.mark.parametrize(("height", "first_row"), [(2, 200), (-2, 100)])
def test_a_bmp_from_the_bottom_and_from_the_top(height, first_row):
    data = bmp(1, height, 24, bytes([100] * 3 + [0] + [200] * 3 + [0]))
    assert decode_image(io.BytesIO(data))[0, :, 0].tolist() == [first_row, 300 - first_row]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_sizes_are_kept(size):
    assert decode_image(io.BytesIO(saved(Image.new("RGB", size), "PNG"))).shape == (3, *size[::-1])


@pytest.mark.parametrize(
    ("background", "expected"),
    [((0, 100, 200), (51, 80, 180)), ((255, 255, 255), (255, 204, 224)), ((0, 0, 0), (51, 0, 20))],
)
def test_a_fifth_of_a_colour_on_other_backgrounds(background, expected):
    """0.2 (255, 0, 100) + 0.8 background, in whole numbers."""
    data = saved(row_of((255, 0, 100, 51), mode="RGBA"), "PNG")
    assert pixels_of(decode_image(io.BytesIO(data), background=background)) == [expected]


# ---- refused -------------------------------------------------------------------------------------------------------


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", saved(row_of(*RGB), "PNG"))
    return buffer.getvalue()


def large_jpeg() -> bytes:
    data = saved(Image.new("L", (8, 8)), "JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 60_000, 60_000) + data[place + 4 :]


WHOLE_PNG, WHOLE_JPEG = (
    saved(Image.effect_noise((64, 64), 100), "PNG"),
    saved(Image.effect_noise((64, 64), 100), "JPEG"),
)
NO_HEADER, TOO_MANY, UNDECODABLE = "no readable image header", f"more than {MAX_PIXELS:,} pixels", "cannot be decoded"
DAMAGED = f"{NO_HEADER}|{UNDECODABLE}"
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", NO_HEADER),
    "one-byte.png": (b"\x89", NO_HEADER),
    "text.png": (b"this is text\n", NO_HEADER),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", NO_HEADER),
    "archive.png": (zipped(), NO_HEADER),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_HEADER),
    "document.jpg": (b"%PDF-1.7\n", NO_HEADER),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_HEADER),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", NO_HEADER),
    "icon.png": (saved(Image.new("RGB", (16, 16)), "ICO"), NO_HEADER),
    "psd.tif": (b"8BPS\0\1" + bytes(40), NO_HEADER),
    "signature-only.png": (b"\x89PNG\r\n\x1a\n", DAMAGED),
    "cut-in-the-header.png": (WHOLE_PNG[:20], DAMAGED),
    "cut.png": (WHOLE_PNG[:-500], DAMAGED),
    "cut.jpg": (WHOLE_JPEG[: len(WHOLE_JPEG) // 2], DAMAGED),
    "header-checksum.png": (
        WHOLE_PNG[:29] + bytes(4) + WHOLE_PNG[33:],
        DAMAGED,
    ),
    "changed-data.png": (WHOLE_PNG[:300] + bytes(64) + WHOLE_PNG[364:], DAMAGED),
    "no-size.png": (png(0, 0, 8, 0, b""), DAMAGED),
    "no-palette.png": (png(1, 1, 8, 7, b"\0\0"), DAMAGED),
    "float.tif": (tiff("<", {256: (1,), 258: (32,), 262: (1,), 339: (3,)}, struct.pack("<f", 0.5)), "mode 'F'"),
    "signed.tif": (tiff("<", {256: (1,), 258: (16,), 262: (1,), 339: (2,)}, b"\0\1"), "no certain range|grey TIFF"),
    "inverted-16.tif": (tiff("<", {256: (1,), 258: (16,), 262: (0,)}, b"\0\1"), "photometric 0"),
    "12-bit.tif": (tiff("<", {256: (2,), 258: (12,), 262: (1,)}, b"\1\2\3"), "12"),
    "32-bit.tif": (tiff("<", {256: (1,), 258: (32,), 262: (1,)}, b"\1\2\3\4"), "no certain range|cannot be"),
    "float.ppm": (b"Pf\n1 1\n-1.0\n\0\0\0\x3f", "mode 'F'"),
    "key-16.png": (png(1, 1, 16, 0, b"\0\1\1", chunk(b"tRNS", b"\1\1")), "16-bit pixels with a transparent colour"),
    "large.png": (png(8000, 8000, 8, 0, b""), TOO_MANY),
    "larger.png": (png(2**31 - 1, 2**31 - 1, 8, 0, b""), TOO_MANY),
    "large.gif": (b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"\x2c" + bytes(4), DAMAGED),
    "large.bmp": (bmp(100_000, 100_000, 24, b""), TOO_MANY),
    "large.ppm": (b"P6 100000 100000 255\n", TOO_MANY),
    "large.jpg": (large_jpeg(), TOO_MANY),
    "large.tif": (tiff("<", {256: (65_535,), 257: (65_535,), 258: (8,), 262: (1,)}, b"\0"), TOO_MANY),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files_are_named_with_the_reason(tmp_path, name):
    data, reason = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    Image.new("L", (4, 4)).save(tmp_path / "good.png")
    with pytest.raises(ValueError, match=rf"1 bad image: {tmp_path}/{name}: .*({reason})") as info:
        load_samples(train_data_dir=tmp_path)
    assert "\n" not in str(info.value)
    samples = load_samples(train_data_dir=tmp_path, skip_bad_images=1)
    assert len(samples) == 1 and samples.skipped[0].startswith(f"{tmp_path}/{name}: ")


# ---- things that are no files, and names ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    Image.new("L", (4, 4), 7).save(root / "good.png")
    return root


def test_what_is_no_file_is_no_image_and_nothing_waits_for_it(folder):
    """A folder, a pipe that nobody writes to, a link in a circle, one to nowhere and one to a device."""
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "nowhere.png").symlink_to("not/there.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "around").symlink_to(folder, target_is_directory=True)
    assert load_samples(train_data_dir=folder).array.tolist() == [[[[7] * 4] * 4]]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_opening_what_is_no_file_is_refused(tmp_path, kind):
    """Rows of a data set may name such a path; opening a pipe to which nobody writes would never return."""
    path = tmp_path / "x.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    raised: list[BaseException] = []

    def decode() -> None:
        try:
            decode_image(path)
        except BadImage as error:
            raised.append(error)

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    thread.join(10)
    assert [str(error) for error in raised] == ["is a folder, a pipe or a device, no file"]


@pytest.mark.parametrize("name", ["ünï 日本.png", "a b.png", "-x.png", "a'b\".png", "%s{}.png", "A.PNG", "x.y.z.png"])
def test_names_do_not_matter(folder, name):
    Image.new("L", (4, 4), 9).save(folder / name, "PNG")
    assert sorted(load_samples(train_data_dir=folder).array[:, 0, 0, 0].tolist()) == [7, 9]


def test_what_is_inside_counts_and_not_the_suffix(folder):
    (folder / "other.jpg").write_bytes(saved(Image.new("L", (4, 4), 9), "PNG"))
    assert load_samples(train_data_dir=folder).array[:, 0, 0, 0].tolist() == [7, 9]


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"two\nlines.png", r"two\nlines.png"), (b"\xff.png", r"\udcff.png"), (b"\x1b[31m.png", r"\x1b[31m")],
)
def test_odd_names_are_shown_on_one_line(folder, name, shown):
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"no image")
    with pytest.raises(ValueError) as info:
        load_samples(train_data_dir=folder)
    message = str(info.value)
    assert shown in message and message.isprintable()
    message.encode()


# ---- how many are bad ----------------------------------------------------------------------------------------------


@pytest.fixture
def half_bad(folder) -> Path:
    """25 bad images among 26, which come first, in between and last."""
    for i in range(25):
        (folder / f"{'a' if i < 12 else 'z'}-{i:02}.png").write_bytes(b"bad")
    return folder


@pytest.mark.parametrize(
    ("skip", "num_workers"), [(0, 0), (1, 0), (24, 0), pytest.param(0, 2, marks=pytest.mark.integration)]
)
def test_all_bad_images_are_counted_and_the_first_ten_named(half_bad, skip, num_workers):
    with pytest.raises(ValueError) as info:
        load_samples(train_data_dir=half_bad, skip_bad_images=skip, num_workers=num_workers)
    message = str(info.value)
    assert message.startswith(f"25 bad images: {half_bad}/a-00.png: {NO_HEADER}")
    assert [f"a-{i:02}.png" in message for i in range(12)] == [True] * 10 + [False] * 2
    assert "; and 15 more (skip_bad_images=" in message and f"skip_bad_images={skip} allows no more" in message


@pytest.mark.parametrize("max_memory_bytes", [2**30, 0])
def test_as_many_as_are_allowed_are_left_out_and_reported(half_bad, tmp_path, caplog, max_memory_bytes):
    samples = load_samples(
        train_data_dir=half_bad,
        skip_bad_images=25,
        max_memory_bytes=max_memory_bytes,
        cache_dir=tmp_path / "cache",
    )
    assert samples.array.tolist() == [[[[7] * 4] * 4]] and len(samples.skipped) == 25
    assert caplog.text.count("photos: 25 bad images left out: ") == 1 and "; and 15 more" in caplog.text


def test_nothing_is_left_of_a_refused_set(half_bad, tmp_path):
    with pytest.raises(ValueError, match="25 bad images"):
        load_samples(train_data_dir=half_bad, max_memory_bytes=0, cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_none_left_is_an_error_of_its_own(half_bad):
    (half_bad / "good.png").unlink()
    with pytest.raises(ValueError, match="none of the 25 images can be used: .*; and 15 more"):
        load_samples(train_data_dir=half_bad, skip_bad_images=25)
