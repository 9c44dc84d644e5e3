"""What Pillow alone reads wrongly or refuses: values worked out by hand from each format's description.

format_matrix.py has the ordinary combinations of depth, channels and layout; here is what they do not vary.
"""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from format_files import HEIGHT, WIDTH, noise, png_chunk, saved, smooth
from PIL import Image, PngImagePlugin
from test_odd_images import tiff as by_hand

from ddpm_hf.data import BadImage, decode_image, headers

BLACK, RED = (0, 0, 0), (255, 0, 0)


def decoded(data: bytes, **options) -> list:
    """Of a single row: the channels' levels from left to right."""
    return decode_image(io.BytesIO(data), **options)[:, 0].tolist()


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(BadImage) as info:
        decode_image(io.BytesIO(data), **options)
    return str(info.value)


def png(width: int, bits: int, colour_type: int, row: bytes, *before: bytes, after: bytes = b"") -> bytes:
    """One row, unfiltered; `before` and `after` are chunks around the pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + after + png_chunk(b"IEND", b"")


# ---- PNG ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", range(16))
def test_every_transparent_level_of_4_bits(level):
    row = bytes(16 * high + high + 1 for high in range(0, 16, 2))  # 0, 1, 2, ... 15
    shown = decoded(png(16, 4, 0, row, png_chunk(b"tRNS", struct.pack(">H", level))), background=(99,) * 3)
    assert shown == [[99 if each == level else 17 * each for each in range(16)]]


@pytest.mark.parametrize(
    ("bits", "row", "level", "expected"),
    [
        (1, b"\x40", 1, [0, 99]),
        (1, b"\x40", 0, [99, 255]),
        (2, b"\x10", 1, [0, 99]),
        (2, b"\x10", 0x8001, [0, 99]),  # only the two lowest bits count
        (8, b"\x05\x06", 5, [99, 6]),
        (8, b"\x05\x06", 0xFF05, [99, 6]),
    ],
)
def test_transparent_levels_of_other_depths(bits, row, level, expected):
    data = png(2, bits, 0, row, png_chunk(b"tRNS", struct.pack(">H", level)))
    assert decoded(data, background=(99,) * 3) == [expected]


def test_grey_of_16_bits_with_alpha_is_grey():
    data = png(2, 16, 4, struct.pack(">4H", 0x12FF, 0xFFFF, 0x80FF, 0x8000))
    assert decoded(data) == [[18, 191]]
    assert len(decoded(data, background=RED)) == 3


TEXT = b"x" * 5_000_000
ITXT = b"k\0\1\0\0\0" + zlib.compress(TEXT)
METADATA = {
    "tEXt": png_chunk(b"tEXt", b"k\0" + TEXT),
    "zTXt": png_chunk(b"zTXt", b"k\0\0" + zlib.compress(TEXT)),
    "iTXt": png_chunk(b"iTXt", ITXT),
    "iTXt-many": png_chunk(b"iTXt", ITXT) * 20,
    "iCCP": png_chunk(b"iCCP", b"k\0\0" + zlib.compress(TEXT)),
    "damaged": png_chunk(b"zTXt", b"k\0\0" + b"no zlib")[:-4]
    + b"\0\0\0\0",  # its checksum too: no pixel depends on it
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("after", [False, True])
def test_metadata_of_a_png_does_not_matter(name, after):
    chunk = METADATA[name]
    data = png(2, 8, 0, b"\x05\x06", after=chunk) if after else png(2, 8, 0, b"\x05\x06", chunk)
    assert decoded(data) == [[5, 6]]


def test_a_limit_on_all_text_together(monkeypatch):
    monkeypatch.setattr(headers, "MAX_METADATA_BYTES", 1000)
    assert decoded(png(1, 8, 0, b"\5", png_chunk(b"tEXt", b"k\0" + bytes(400)) * 2)) == [[5]]
    data = png(1, 8, 0, b"\5", png_chunk(b"tEXt", b"k\0" + bytes(400)) * 3)
    assert "its text and colour profile take 1,206 bytes, more than 1,000; save it without" in reason_of(data)


def test_exif_that_is_stored_as_text_still_turns():
    exif = Image.Exif()
    exif[0x0112] = 2
    body = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(body):8}\n{body.hex()}\n", zip=True)
    assert decoded(saved(Image.fromarray(np.array([[1, 2]], np.uint8)), "PNG", pnginfo=info)) == [[2, 1]]


def test_an_apng_gives_its_default_image():
    red, green = (Image.new("RGB", (2, 2), colour) for colour in ("red", "lime"))
    data = saved(red, "PNG", save_all=True, append_images=[green, green], default_image=True)
    assert decoded(data) == [[255, 255], [0, 0], [0, 0]]


# ---- GIF, and formats without grey ----------------------------------------------------------------------------------


def gif(screen: tuple[int, int], frame: tuple[int, int, int, int], palette: list, clear: int | None = None) -> bytes:
    """One frame (left, top, width, height) in palette entry 2."""
    control = b"" if clear is None else b"\x21\xf9\x04\x01\0\0" + bytes([clear, 0])
    out = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80 | 1, 0, 0) + bytes(sum(palette, []))
    codes = [4] + [code for _ in range(frame[2] * frame[3]) for code in (2, 4)] + [5]  # 4 clears the table, 5 ends
    data = sum(code << (3 * i) for i, code in enumerate(codes)).to_bytes((3 * len(codes) + 7) // 8, "little")
    return out + control + b"," + struct.pack("<HHHHB", *frame, 0) + bytes([2, len(data)]) + data + b"\0;"


COLOURS = [[0, 0, 255], [0, 255, 0], [255, 255, 0], [9, 9, 9]]
GREYS = [[0] * 3, [77] * 3, [200] * 3, [9] * 3]


@pytest.mark.parametrize("frame", [(1, 1, 2, 2), (0, 0, 3, 4), (3, 3, 1, 1), (0, 2, 4, 2), (0, 0, 4, 4)])
@pytest.mark.parametrize("clear", [None, 0])
def test_what_no_frame_of_a_gif_covers_is_background(frame, clear):
    left, top, width, height = frame
    expected = np.zeros((4, 4, 3), int) + RED
    expected[top : top + height, left : left + width] = COLOURS[2]
    pixels = decode_image(io.BytesIO(gif((4, 4), frame, COLOURS, clear)), background=RED)
    np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))


def test_a_grey_gif_with_a_small_frame_is_grey_on_grey():
    data = gif((2, 1), (1, 0, 1, 1), GREYS)
    assert decoded(data, background=(40,) * 3) == [[40, 200]]
    assert decoded(data, background=RED) == [[255, 200], [0, 200], [0, 200]]


@pytest.mark.parametrize("file_format", ["WEBP", "GIF", "BMP", "AVIF"])
def test_one_pixel_of_colour_makes_an_image_colour(file_format):
    grey = np.repeat(noise(HEIGHT, WIDTH, 1), 3, axis=2)
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(file_format, {})
    assert len(decode_image(io.BytesIO(saved(Image.fromarray(grey), file_format, **options)))) == 1
    grey[3, 5] = (255, 0, 0)
    assert len(decode_image(io.BytesIO(saved(Image.fromarray(grey), file_format, **options)))) == 3


def test_equal_channels_stay_three_where_the_format_has_grey():
    grey = np.repeat(noise(HEIGHT, WIDTH, 1), 3, axis=2)
    assert len(decode_image(io.BytesIO(saved(Image.fromarray(grey), "PNG")))) == 3


# ---- orientation ----------------------------------------------------------------------------------------------------

XMP = {
    "double quotes": b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>',
    "single quotes": b"<x:xmpmeta xmlns:x='adobe:ns:meta/' tiff:Orientation='6'/>",
    "element": b"<x:xmpmeta><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>",
}


@pytest.mark.parametrize("kind", XMP)
@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "TIFF", "AVIF", "PNG"])
def test_an_orientation_in_xmp_alone_is_ignored(file_format, kind):
    options: dict = {"xmp": XMP[kind]}
    if file_format == "PNG":
        options = {"pnginfo": PngImagePlugin.PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP[kind].decode())
    elif file_format == "TIFF":
        options = {"tiffinfo": {700: XMP[kind]}}
    data = saved(Image.fromarray(noise(16, 32)), file_format, **options)
    assert b"Orientation" in data
    assert decode_image(io.BytesIO(data)).shape[1:] == (16, 32)


def test_exif_counts_beside_xmp():
    data = saved(Image.fromarray(noise(16, 32)), "JPEG", 3, xmp=XMP["double quotes"], quality=100, subsampling=0)
    expected = np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(noise(16, 32)), "JPEG", quality=100))))[
        ::-1, ::-1
    ]
    np.testing.assert_array_equal(decode_image(io.BytesIO(data))[0], expected)


# ---- TIFF and JPEG 2000 ---------------------------------------------------------------------------------------------


def tiff(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, metadata=None, software=False, **options)
    return buffer.getvalue()


def with_short(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF of which the first value of one tag is changed."""
    place = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return data[:place] + struct.pack("<H", value) + data[place + 2 :]


@pytest.mark.parametrize(("value", "word"), [(2, "signed"), (3, "'F'"), (4, "undefined"), (5, "complex"), (9, "9")])
def test_other_sample_formats_than_unsigned_are_refused(value, word):
    data = with_short(tiff(np.zeros((4, 4), np.int8)), 339, value)
    assert word in reason_of(data) and "have no certain range; save it" in reason_of(data)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bands", [2, 4, 5, 8])
def test_bands_beyond_rgb_are_refused_with_their_number(order, bands):
    data = tiff(noise(4, 4, bands), photometric="minisblack", planarconfig="contig", byteorder=order)
    assert reason_of(data) == f"TIFF of {bands} bands; save three of them as RGB, or one as grey"


@pytest.mark.parametrize("declared", [1, 2])
def test_alpha_counts_where_it_is_declared(declared):
    kind = {1: "assocalpha", 2: "unassalpha"}[declared]
    data = tiff(np.full((1, 1, 4), 255, np.uint8), photometric="rgb", extrasamples=[kind])
    assert decoded(data) == [[255]] * 3
    assert "TIFF of 4 bands" in reason_of(with_short(data, 338, 0))


@pytest.mark.parametrize(("bits", "photometric"), [(2, 1), (4, 0), (8, 1), (16, 1), (1, 3)])
def test_bits_from_the_right_are_refused_but_for_one(bits, photometric):
    tags = {256: (8,), 258: (bits,), 262: (photometric,), 266: (2,)}
    palette = {320: (0, 65535) * 3} if photometric == 3 else {}
    assert "FillOrder 2, bits from the right" in reason_of(by_hand("<", tags | palette, bytes(bits)))
    one_bit = {256: (8,), 258: (1,), 262: (1,), 266: (2,)}
    assert decoded(by_hand("<", one_bit, b"\x03")) == [[255, 255, 0, 0, 0, 0, 0, 0]]


def test_an_unknown_compression_of_tiff_is_refused_with_its_number():
    data = tiff(smooth(3), photometric="rgb", compression="png")
    assert reason_of(data) == "TIFF of compression 34933; save it with LZW or deflate, or as PNG"


@pytest.mark.parametrize("codec", ["jp2", "j2k"])
@pytest.mark.parametrize("bits", range(9, 17))
def test_jpeg2000_in_colour_above_8_bits_is_refused_with_them(bits, codec):
    data = imagecodecs.jpeg2k_encode(noise(8, 8, 3, bits=bits), level=0, bitspersample=bits, codecformat=codec)
    assert f"JPEG 2000 of 3 components of {bits} bits; save it with 8 bits" in reason_of(data)


def test_jpeg2000_in_an_unknown_colour_space_is_refused():
    data = imagecodecs.jpeg2k_encode(noise(8, 8, 3), level=0, codecformat="jp2")
    place = data.index(b"colr") + 4 + 3
    assert data[place : place + 4] == b"\0\0\0\x10"  # sRGB
    lab = data[: place + 3] + b"\x0e" + data[place + 4 :]
    assert reason_of(lab) == "JPEG 2000 of 3 components in colour space 14; save it as RGB"


def in_colour_space(data: bytes, space: int) -> bytes:
    place = data.index(b"colr") + 7
    return data[:place] + struct.pack(">I", space) + data[place + 4 :]


def test_jpeg2000_in_cmyk_and_sycc():
    ink = noise(8, 8, 4)
    data = imagecodecs.jpeg2k_encode(ink, level=0, codecformat="jp2", mct=False)
    expected = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    pixels = decode_image(io.BytesIO(in_colour_space(data, 12)))
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=0.51)
    ycc = np.asarray(Image.fromarray(smooth(3)).convert("YCbCr"))
    data = imagecodecs.jpeg2k_encode(ycc, level=0, codecformat="jp2", mct=False)
    expected = np.asarray(Image.fromarray(ycc, "YCbCr").convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_image(io.BytesIO(in_colour_space(data, 18))), expected)


def test_jpeg2000_with_a_palette():
    def box(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(body), name) + body

    indices, palette = noise(8, 8, bits=2), noise(4, 3, seed=1)
    data = in_colour_space(imagecodecs.jpeg2k_encode(indices, level=0, codecformat="jp2"), 16)
    begin = data.index(b"jp2h") - 4
    end = begin + int.from_bytes(data[begin : begin + 4])
    columns = b"".join(struct.pack(">HBB", 0, 1, column) for column in range(3))
    entries = struct.pack(">HB3B", 4, 3, 7, 7, 7) + palette.tobytes()
    inner = data[begin + 8 : end] + box(b"pclr", entries) + box(b"cmap", columns)
    with_palette = data[:begin] + box(b"jp2h", inner) + data[end:]
    np.testing.assert_array_equal(imagecodecs.jpeg2k_decode(with_palette), palette[indices])
    np.testing.assert_array_equal(decode_image(io.BytesIO(with_palette)), palette[indices].transpose(2, 0, 1))


@pytest.mark.parametrize("bits", [16, 32])
def test_alpha_of_a_bmp_counts_or_is_refused(bits):
    masks = {16: (0x7C00, 0x3E0, 0x1F, 0x8000), 32: (0xFF0000, 0xFF00, 0xFF, 0xFF000000)}[bits]
    row = {16: struct.pack("<HH", 0x7C00, 0), 32: bytes([100, 0, 255, 51])}[bits]
    info = struct.pack("<IiiHHIIiiII", 124, 1, 1, 1, bits, 3, 4, 0, 0, 0, 0) + struct.pack("<4I", *masks) + bytes(68)
    data = b"BM" + struct.pack("<IHHI", 142, 0, 0, 138) + info + row
    if bits == 16:
        assert reason_of(data) == "BMP of 16 bits with alpha; save it with 32 bits, or as PNG"
    else:
        assert decoded(data) == [[255], [204], [224]]


def test_jpeg2000_with_subsampled_components_is_refused():
    data = bytearray(imagecodecs.jpeg2k_encode(noise(8, 8, 3), level=0, codecformat="j2k"))
    assert data[42:51] == b"\7\1\1\7\1\1\7\1\1"  # depth - 1 and steps of each component in SIZ
    data[46] = 2
    assert "some of them subsampled" in reason_of(bytes(data))


def test_a_jpeg_of_12_bits_is_refused_with_them():
    data = bytearray(saved(Image.new("L", (8, 8)), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    assert reason_of(bytes(data)) == "JPEG of 12 bits in 1 component; save it with 8 bits, grey or RGB"


# ---- range and channels ---------------------------------------------------------------------------------------------

CT = np.array([[0, 1, 8, 9, 2047, 2048, 4094, 4095]], np.uint16)
SCALED = [np.rint(CT[0] / 4095 * 255).astype(int).tolist()]


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(CT), "PNG"),
        saved(Image.fromarray(CT), "TIFF"),
        tiff(CT, byteorder=">"),
        saved(Image.fromarray(CT), "PPM"),
        b"P5 8 1 4095\n" + CT.astype(">u2").tobytes(),  # states its range, which is undone first
        imagecodecs.jpeg2k_encode(np.repeat(CT, 8, 0), level=0, bitspersample=12, codecformat="j2k"),
    ],
    ids=["png", "tiff", "tiff-big", "pgm", "pgm-4095", "j2k-12"],
)
def test_max_value_scales_grey_of_more_than_8_bits(data):
    assert decoded(data, max_value=4095) == SCALED
    assert reason_of(data, max_value=4094) == (
        "its largest value is 4,095, above max_value=4094; raise that, or leave the file out"
    )


def test_max_value_scales_8_bits_up_to_255_and_not_above():
    mask = saved(Image.fromarray(np.array([[0, 1, 1]], np.uint8)), "PNG")
    assert decoded(mask, max_value=1) == [[0, 255, 255]]
    assert decoded(mask, max_value=2) == [[0, 128, 128]]
    assert decoded(mask, max_value=4095) == decoded(mask) == [[0, 1, 1]]
    assert "its largest value is 3, above" in reason_of(saved(Image.new("RGB", (1, 1), (0, 3, 1)), "PNG"), max_value=2)


def test_max_value_leaves_alpha_palettes_and_fewer_bits_alone():
    with_alpha = saved(Image.fromarray(np.array([[[1, 255], [1, 0], [0, 255]]], np.uint8), "LA"), "PNG")
    assert decoded(with_alpha, max_value=1, background=(99,) * 3) == [[255, 99, 0]]
    keyed = png(2, 8, 0, b"\0\1", png_chunk(b"tRNS", b"\0\1"))
    assert decoded(keyed, max_value=1, background=(99,) * 3) == [[0, 99]]
    assert decoded(png(2, 1, 0, b"\x40"), max_value=1) == [[0, 255]]
    palette = png(2, 8, 3, b"\0\1", png_chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60])))
    assert decoded(palette, max_value=1) == [[10, 40], [20, 50], [30, 60]]


def test_max_value_refuses_colour_of_16_bits():
    """Pillow gives its high bytes alone: 4095 would have 16 levels."""
    data = tiff(noise(4, 4, 3, bits=12), photometric="rgb")
    assert "colour of 16 bits" in reason_of(data, max_value=4095)


@pytest.mark.parametrize("value", [0, -1, 65536, 1.0, True, "4095"])
def test_max_value_is_a_whole_number_of_16_bits(value):
    with pytest.raises(ValueError, match=f"max_value={value!r}: must be an integer, 1 to 65535"):
        decode_image(io.BytesIO(b""), max_value=value)


def test_channels_converts_on_purpose():
    red, grey = (saved(Image.new(mode, (1, 1), value), "PNG") for mode, value in (("RGB", RED), ("L", 7)))
    assert decoded(red, channels=1) == [[76]]  # 0.299 · 255
    assert decoded(red, channels=3) == decoded(red)
    assert decoded(grey, channels=3) == [[7]] * 3
    assert decoded(grey, channels=1) == [[7]]
    clear = saved(Image.new("LA", (1, 1), (0, 0)), "PNG")
    assert decoded(clear, channels=1, background=RED) == [[76]]
    with pytest.raises(ValueError, match="channels=2: must be 1"):
        decode_image(io.BytesIO(red), channels=2)
