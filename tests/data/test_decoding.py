"""One image file → pixels: a golden value for every kind of file, and a reason for every refusal."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageSequence, TiffImagePlugin

from ddpm_hf.data import FORMATS, BadImage, decode_image
from ddpm_hf.data.decoding import EXTENSIONS, MAX_PIXELS

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, file_format: str, **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    buffer.seek(0)
    return buffer


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes, transparent: bytes = b"") -> io.BytesIO:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def palette_image() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L")
    image.putpalette([*RED, *GREEN, *BLUE])
    return image


def colours(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The pixels of one row, left to right, from [C, 1, W]."""
    return [tuple(int(level) for level in pixel) for pixel in pixels[:, 0].T]


GREY16 = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)  # 128 / 257 rounds down, 129 / 257 rounds up
GREY8 = [(0,), (0,), (1,), (1,), (128,), (255,)]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (encoded(Image.fromarray(np.array([[0, 7, 255]], np.uint8)), "PNG"), [(0,), (7,), (255,)]),
        (encoded(Image.fromarray(np.array([[False, True]])), "PNG"), [(0,), (255,)]),
        (encoded(palette_image(), "PNG"), [RED, GREEN, BLUE]),
        (encoded(palette_image(), "PNG", transparency=1), [RED, (255, 255, 255), BLUE]),
        (
            encoded(Image.fromarray(np.array([[[9, 8, 7, 255], [9, 8, 7, 0]]], np.uint8)), "PNG"),
            [(9, 8, 7), (255,) * 3],
        ),
        (encoded(Image.fromarray(np.array([[[0, 0, 0, 51]]], np.uint8)), "PNG"), [(204,) * 3]),  # 20% black on white
        (encoded(Image.fromarray(np.array([[[0, 255], [0, 51]]], np.uint8), "LA"), "PNG"), [(0,), (204,)]),
        (encoded(Image.new("L", (1, 1), 5), "PNG", transparency=5), [(255,)]),
        (encoded(Image.new("RGB", (1, 1), RED), "PNG", transparency=RED), [(255,) * 3]),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
        (encoded(Image.fromarray(GREY16), "PNG"), GREY8),
        (encoded(Image.fromarray(GREY16), "TIFF"), GREY8),
        (encoded(Image.fromarray(GREY16), "PPM"), GREY8),
        (png(1, 1, 16, 2, b"\0\xff\xff\x80\xff\x00\x00"), [(255, 128, 0)]),
        (png(1, 1, 16, 4, b"\0\x00\x00\x00\x00"), [(255,)]),  # Pillow reads 16-bit grey with alpha as RGBA
    ],
    ids=[
        *("grey", "1-bit", "palette", "palette-transparent", "rgba", "rgba-half", "la", "grey-key", "rgb-key", "cmyk"),
        *("png16", "tiff16", "pgm16", "rgb16", "la16"),
    ],
)
def test_golden_pixels(file, expected):
    pixels = decode_image(io.BytesIO(file.getvalue()))
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert colours(pixels) == expected


def test_cmyk_jpeg_is_not_inverted():
    pixels = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    np.testing.assert_allclose(pixels[:, 4, 4].astype(int), RED, atol=2)


def test_alpha_lies_on_the_stated_background():
    half_grey = encoded(Image.new("LA", (1, 1), (0, 0)), "PNG")
    assert colours(decode_image(half_grey, background=(10, 20, 30))) == [(10, 20, 30)]  # so it is no longer grey
    assert colours(decode_image(half_grey, background=(9, 9, 9))) == [(9,)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16] = 255  # a bright top left corner
    # What a camera stores so that undoing `orientation` gives the upright picture, in terms of numpy.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", exif=exif, quality=100))
    np.testing.assert_allclose(pixels[0].astype(int), upright, atol=2)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation(file_format):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    file = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(file.getvalue()))))) == 3
    assert (decode_image(file) == np.array(RED)[:, None, None]).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 4000)])
def test_tiny_and_thin_images_are_scaled_up(size):
    pixels = decode_image(encoded(Image.new("RGB", size, (1, 2, 3)), "PNG"), resolution=16)
    assert pixels.shape == (3, 16, 16)
    assert (pixels == np.array([1, 2, 3])[:, None, None]).all()


def test_the_crop_is_centred_and_exact_where_nothing_is_scaled():
    picture = np.random.default_rng(0).integers(0, 256, (4, 9), dtype=np.uint8)
    np.testing.assert_array_equal(
        decode_image(encoded(Image.fromarray(picture), "PNG"), resolution=4)[0], picture[:, 2:6]
    )
    np.testing.assert_array_equal(
        decode_image(encoded(Image.fromarray(picture.T.copy()), "PNG"), resolution=4)[0], picture.T[2:6]
    )


def test_shrinking_averages_instead_of_picking_pixels():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    pixels = decode_image(encoded(Image.fromarray(stripes), "PNG"), resolution=8)
    np.testing.assert_allclose(pixels[0, :, 1:-1].astype(int), 128, atol=3)  # picking would give 0 or 255


TIFF_INVERTED = TiffImagePlugin.ImageFileDirectory_v2()
TIFF_INVERTED[262] = 0


def twelve_bit_tiff() -> io.BytesIO:
    """A 16-bit TIFF whose header is changed to say 12 bits."""
    data = encoded(Image.fromarray(GREY16), "TIFF").getvalue()
    entry = struct.pack("<HHIH", 258, 3, 1, 16)
    assert data.count(entry) == 1
    return io.BytesIO(data.replace(entry, struct.pack("<HHIH", 258, 3, 1, 12)))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (encoded(Image.new("F", (1, 1), 0.5), "TIFF"), "mode 'F'"),
        (encoded(Image.new("I", (1, 1), 70_000), "TIFF"), "signed pixels"),
        (encoded(Image.new("LAB", (1, 1)), "TIFF"), "mode 'LAB'"),
        (encoded(Image.fromarray(GREY16), "TIFF", tiffinfo=TIFF_INVERTED), "photometric 0"),
        (twelve_bit_tiff(), "12"),
        (png(1, 1, 16, 0, b"\0\x01\x01", transparent=b"\x01\x01"), "16-bit pixels with a transparent colour"),
        (png(1, 1, 16, 2, b"\0" + b"\x80\x00" * 3, transparent=b"\x00\x80" * 3), "16-bit pixels with a transparent"),
        (png(8000, 8000, 8, 2, b"\0"), "8000 x 8000 is more than 50,000,000 pixels"),
        (png(30_000, 30_000, 8, 2, b"\0"), "more than 50,000,000 pixels"),  # above Pillow's own limit, too
        (io.BytesIO(b""), "no readable image header"),
        (io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no readable image header"),
        (png(64, 64, 8, 2, b"\0" * 100), "cannot be decoded"),
    ],
    ids=[
        *("float", "int32", "lab", "tiff-inverted", "tiff12", "grey16-key", "rgb16-key", "64-megapixels", "bomb"),
        *("empty", "eps", "too-few-rows"),
    ],
)
def test_refusals_give_their_reason(file, reason):
    with pytest.raises(BadImage, match=reason):
        decode_image(io.BytesIO(file.getvalue()))


def test_the_pixel_limit_is_inclusive():
    width = 10_000
    row = b"\0" + bytes(width // 8)
    assert decode_image(png(width, MAX_PIXELS // width, 1, 0, row * (MAX_PIXELS // width)), resolution=1).shape == (
        1,
        1,
        1,
    )


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_a_file_cut_in_half_is_refused(file_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), file_format).getvalue()
    assert decode_image(io.BytesIO(whole)).shape == (3, 64, 64)
    with pytest.raises(BadImage):
        decode_image(io.BytesIO(whole[: len(whole) // 2]))


def test_a_missing_file_is_refused_with_its_cause(tmp_path):
    with pytest.raises(BadImage, match="FileNotFoundError"):
        decode_image(tmp_path / "gone.png")


def test_every_format_has_extensions_that_pillow_maps_to_it():
    Image.init()
    for file_format, extensions in FORMATS.items():
        for extension in extensions:
            assert Image.registered_extensions()[extension] == file_format
    assert ".eps" not in EXTENSIONS and ".pdf" not in EXTENSIONS
