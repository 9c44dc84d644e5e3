"""One image file → uint8 pixels: what the file means, or a refusal that says why.

Pillow opens almost anything, but a plain `convert("RGB")` saturates 16-bit grey, turns float pixels black and makes
transparent pixels solid, all without a warning. Here every kind of pixel has one stated meaning:

=============================  =====================================================================================
in the file                    comes out as
=============================  =====================================================================================
grey, 1-bit                    grey; 1-bit becomes 0 and 255
16-bit grey                    grey, v / 257 rounded
16-bit colour                  the high byte of each channel (as Pillow reads it; within 1 of v / 257)
palette, YCbCr, CMYK           RGB by Pillow's formulas; embedded colour profiles are not applied
three equal channels           grey, in the formats that have no grey of their own: WebP, GIF, BMP, AVIF
alpha or a transparent colour  composited on the background; grey stays grey on a grey background
EXIF orientation               upright; orientation in XMP alone is ignored
animation                      the first frame; of an APNG its default image, which every PNG reader shows
float, 32-bit integer, others  refused: their range is not stated in the file
samples that Pillow drops      refused, see `headers`
more than 50 megapixels        refused from the header, before anything is decoded
=============================  =====================================================================================
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from .headers import BadImage, Header, read_header, unknown_reason
from .resizing import WORTH_IT, lanczos

# The Pillow formats that are read, and their file extensions. No others are: some of Pillow's readers start external
# programs (EPS) or read documents (PDF), and a file's content need not match its name.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
EXTENSIONS = frozenset(extension for extensions in FORMATS.values() for extension in extensions)
MAX_PIXELS = 50_000_000
WHITE = (255, 255, 255)

_GREY_MODES = ("1", "L", "LA")
_EIGHT_BIT_MODES = (*_GREY_MODES, "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_WITHOUT_GREY = ("WEBP", "GIF", "BMP", "AVIF")  # as Pillow reads them: a palette or three channels
_IN_MEMORY_BYTES = 2**26  # files up to this size are read by one call


@dataclass(frozen=True)
class DecodeOptions:
    """What besides the files decides the pixels: the arguments of `decode_image`, which says what they mean.

    Raises ValueError for a `max_value` that is no integer of 1 to 65535, and for other `channels` than 1 and 3.
    """

    background: tuple[int, int, int] = WHITE
    resolution: int | None = None
    max_value: int | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        value = self.max_value
        if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**16):
            raise ValueError(f"max_value={value!r}: must be an integer, 1 to 65535, or None for what the files say")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"channels={self.channels!r}: must be 1 for grey, 3 for RGB, or None as the files are")


class Largest(NamedTuple):
    """The largest value in a file before it is scaled; `bits` is 8 or 16, or 0 where the file states its own range.

    Of 16-bit colour the low bytes are not known (`exact` is False): then `value` is the largest that it can be.
    """

    bits: int = 0
    value: int = 0
    exact: bool = True


class Decoded(NamedTuple):
    """`pixels` is uint8 [C, H, W]."""

    pixels: np.ndarray
    largest: Largest


def decode_image(
    file: str | Path | BinaryIO,
    *,
    background: tuple[int, int, int] = WHITE,
    resolution: int | None = None,
    max_value: int | None = None,
    channels: int | None = None,
) -> np.ndarray:
    """uint8 pixels [C, H, W] of one image file, 0..255; C is 1 for grey and 3 for colour.

    With `resolution`, the largest centred square is cut out and resized to [C, resolution, resolution]; smaller images
    are enlarged. The filter is Lanczos, which averages over all source pixels when it shrinks. Crop and filter are
    those of StyleGAN's dataset tool: the paper's code makes its training sets from that tool's LSUN records.

    `max_value` is the value that becomes 255, for files whose range is smaller than their depth: 4095 for 12 bits in
    16, 1 for masks of 0 and 1. It applies to grey of more than 8 bits, and up to 255 also to files of 8 bits; alpha,
    palettes and files of less than 8 bits keep their own range. `channels` 1 makes colour grey, 0.299 R + 0.587 G +
    0.114 B rounded (Pillow's "L"), and 3 repeats grey; None leaves each file as it is.

    Raises:
        BadImage: the file cannot be decoded, or its pixels have no certain meaning (see the table above).
        ValueError: `max_value` or `channels` is out of range.
    """
    return decode(file, DecodeOptions(background, resolution, max_value, channels)).pixels


def decode(file: str | Path | BinaryIO, options: DecodeOptions, *, measure_8_bits: bool = True) -> Decoded:
    """The pixels of one image file, and the largest value in it.

    That of files of 8 bits is left at 255 without `measure_8_bits`, which saves a pass over the pixels.
    Raises BadImage as `decode_image` does.
    """
    try:
        with _opened(file) as stream:
            header = read_header(stream)
            with _image(header.stream) as image:
                _refuse_what_pillow_misreads(image, options.max_value)
                upright, box = _upright(image, header)
                levels, largest = _eight_bits(upright, header, options.max_value, measure_8_bits)
                shown = _grey_or_rgb(levels, box, options, header.is_grey, image.format in _WITHOUT_GREY)
                pixels = _crop_and_resize(shown, options.resolution)
    except (BadImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own, higher limit, checked while it opens a file; as a warning only where warnings are errors.
        raise BadImage(f"more than {MAX_PIXELS:,} pixels; shrink it") from error
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise BadImage(f"cannot be decoded ({type(error).__name__}: {error})") from error
    return Decoded(np.repeat(pixels, 3, axis=0) if options.channels == 3 and len(pixels) == 1 else pixels, largest)


@contextmanager
def _opened(file: str | Path | BinaryIO) -> Iterator[BinaryIO]:
    """A seekable file, in memory if it is of usual size: Pillow reads a file in many small pieces."""
    if isinstance(file, str | Path):
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("is a folder, a pipe or a device, no file")  # opening a pipe would never return
        with open(file, "rb", buffering=0 if status.st_size <= _IN_MEMORY_BYTES else -1) as opened:
            yield io.BytesIO(opened.read()) if status.st_size <= _IN_MEMORY_BYTES else opened
    else:
        yield file if file.seekable() else io.BytesIO(file.read())


def _image(stream: BinaryIO) -> ImageFile.ImageFile:
    try:
        return Image.open(stream, formats=tuple(FORMATS))
    except UnidentifiedImageError as error:
        reason = unknown_reason(stream) or f"no readable image header; {', '.join(FORMATS)} are understood"
        raise BadImage(reason) from error


def _refuse_what_pillow_misreads(image: ImageFile.ImageFile, max_value: int | None) -> None:
    """Raises BadImage, from the header alone, where the pixels would be too many or silently wrong."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is more than {MAX_PIXELS:,} pixels; shrink it")
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if not sixteen_bit and image.mode not in _EIGHT_BIT_MODES:
        raise BadImage(f"pixels of Pillow mode {image.mode!r} have no certain range; save it with 8 or 16 bits")
    if "transparency" in image.info and ";16" in str(image.tile):
        # Pillow compares the 16-bit transparent colour with pixels it has already cut to 8 bits.
        raise BadImage("16-bit pixels with a transparent colour; save it with 8 bits or an alpha channel")


def _upright(image: ImageFile.ImageFile, header: Header) -> tuple[Image.Image, tuple[int, int, int, int] | None]:
    """The first frame, read whole and turned as EXIF says; and the part of it that the frame covers, if not all."""
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(
            key, None
        )  # else Pillow looks for an orientation there, and finds it in one kind of quotes only
    extents = image.tile[0].extents if image.format == "GIF" and image.tile else None
    image.load()
    if "exif" in image.info or "Raw profile type exif" in image.info:  # Pillow turns a TIFF by its tag as it loads
        ImageOps.exif_transpose(image, in_place=True)
    if header.transparent is not None:
        image.info["transparency"] = header.transparent
    return image, None if extents == (0, 0, *image.size) else extents


# ---- the range ------------------------------------------------------------------------------------------------------


def _eight_bits(
    image: Image.Image, header: Header, max_value: int | None, measure_8_bits: bool
) -> tuple[Image.Image, Largest]:
    """The image with 8 bits per channel, `max_value` scaled to 255; and the largest value that was in it."""
    if image.mode.startswith("I"):
        return _grey_of_16_bits(image, header, max_value)
    if image.mode not in ("L", "LA", "RGB", "RGBA") or header.bits < 8:
        return image, Largest()
    if header.bits > 8:
        if max_value is not None:
            raise BadImage(
                f"colour of {header.bits} bits, of which max_value={max_value} cannot be scaled; save it with 8"
            )
        high = _largest_of(image)
        return image, Largest(16, high << 8 | 255, exact=False) if header.full == 65535 else Largest()
    if header.full != 255 or (max_value is None or max_value > 255) and not measure_8_bits:
        return image, Largest()
    largest = _largest_of(image)
    if max_value is not None and max_value <= 255:
        _require_below(largest, max_value)
        if "transparency" in image.info:
            image = image.convert("LA" if image.mode == "L" else "RGBA")
        scaled, kept = [(v * 255 + max_value // 2) // max_value & 255 for v in range(256)], list(range(256))
        image = image.point([level for band in image.getbands() for level in (kept if band == "A" else scaled)])
    return image, Largest(8, largest)


def _grey_of_16_bits(image: Image.Image, header: Header, max_value: int | None) -> tuple[Image.Image, Largest]:
    levels = np.asarray(image).astype(np.uint32)  # 0..65535, to which Pillow scales a PGM, and shifts a JPEG 2000
    largest = int(levels.max())
    if max_value is None:
        scaled = (levels + 128) // 257  # v / 257 rounded: 65535 = 255 * 257
    else:
        if image.format == "JPEG2000":
            levels >>= 16 - header.bits
        elif header.full != 65535:
            levels = (levels * header.full + 32767) // 65535
        _require_below(int(levels.max()), max_value)
        scaled = (levels * 255 + max_value // 2) // max_value
    return Image.fromarray(scaled.astype(np.uint8)), Largest(16, largest) if header.full == 65535 else Largest()


def _largest_of(image: Image.Image) -> int:
    """The largest level of the channels but alpha."""
    extrema: Any = image.getextrema()
    bands = [extrema] if image.mode == "L" else extrema[: 1 if image.mode == "LA" else 3]
    return max(high for _, high in bands)


def _require_below(largest: int, max_value: int) -> None:
    if largest > max_value:
        raise BadImage(
            f"its largest value is {largest:,}, above max_value={max_value}; raise that, or leave the file out"
        )


# ---- the channels ---------------------------------------------------------------------------------------------------


def _grey_or_rgb(
    image: Image.Image,
    box: tuple[int, int, int, int] | None,
    options: DecodeOptions,
    is_grey: bool,
    without_grey: bool,
) -> Image.Image:
    """The image in mode L or RGB, on the background where it is transparent or outside `box`."""
    grey = is_grey or image.mode in _GREY_MODES
    if image.has_transparency_data or box is not None:
        grey = grey and len(set(options.background)) == 1
        canvas = Image.new("RGBA", image.size, (*options.background, 255))
        whole = (0, 0, *image.size)
        canvas.alpha_composite(image.convert("RGBA"), (box or whole)[:2], box or whole)
        image = canvas
    mode = "L" if grey or options.channels == 1 and image.mode == "RGB" else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    if options.channels == 1:
        return image.convert("L")
    if mode == "RGB" and options.channels is None and without_grey and _has_equal_channels(image):
        return image.getchannel(0)
    return image


def _has_equal_channels(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


# ---- the size -------------------------------------------------------------------------------------------------------


def _crop_and_resize(image: Image.Image, resolution: int | None) -> np.ndarray:
    """uint8 [C, H, W] of an image of mode L or RGB."""
    if resolution is None:
        return _as_array(image)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if side >= WORTH_IT * resolution:
        return lanczos(image, left, top, side, resolution)
    # Crop first: scaling a 10 x 100,000 strip as a whole would make a huge image only to throw it away.
    square = (left, top, left + side, top + side)
    return _as_array(image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=square))


def _as_array(image: Image.Image) -> np.ndarray:
    """uint8 [C, H, W]; a copy of the bytes, which costs less than what `np.asarray` asks of an image."""
    width, height = image.size
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
