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
alpha or a transparent colour  composited on the background; grey stays grey on a grey background
EXIF orientation               upright
animation                      the first frame
float, 32-bit integer, others  refused: their range is not stated in the file
more than 50 megapixels        refused from the header, before anything is decoded
=============================  =====================================================================================
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

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

_GREY_MODES = ("1", "L", "LA")
_EIGHT_BIT_MODES = (*_GREY_MODES, "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class BadImage(ValueError):
    """An image that is damaged, too large or of uncertain meaning; the message is the reason, without a file name."""


def decode_image(
    file: str | Path | BinaryIO,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    resolution: int | None = None,
) -> np.ndarray:
    """uint8 pixels [C, H, W] of one image file, 0..255; C is 1 for grey and 3 for colour.

    With `resolution`, the largest centred square is cut out and resized to [C, resolution, resolution]; smaller images
    are enlarged. The filter is Lanczos, which averages over all source pixels when it shrinks. Crop and filter are
    those of StyleGAN's dataset tool: the paper's code makes its training sets from that tool's LSUN records.

    Raises:
        BadImage: the file cannot be decoded, or its pixels have no certain meaning (see the table above).
    """
    if isinstance(file, str | Path) and Path(file).exists() and not Path(file).is_file():
        raise BadImage("is a folder, a pipe or a device, no file")  # opening a pipe would never return
    try:
        with Image.open(file, formats=tuple(FORMATS)) as image:
            _refuse_what_pillow_misreads(image)
            pixels = np.asarray(_crop_and_resize(_grey_or_rgb(image, background), resolution))
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"no readable image header; {', '.join(FORMATS)} are understood") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own, higher limit, checked while it opens a file; as a warning only where warnings are errors.
        raise BadImage(f"more than {MAX_PIXELS:,} pixels; shrink it") from error
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise BadImage(f"cannot be decoded ({type(error).__name__}: {error})") from error
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _refuse_what_pillow_misreads(image: ImageFile.ImageFile) -> None:
    """Raises BadImage, from the header alone, where the pixels would be too many or silently wrong."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is more than {MAX_PIXELS:,} pixels; shrink it")
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    if not sixteen_bit and image.mode not in _EIGHT_BIT_MODES:
        raise BadImage(f"pixels of Pillow mode {image.mode!r} have no certain range; save it with 8 or 16 bits")
    if sixteen_bit and image.format == "TIFF":
        bits, photometric = image.tag_v2.get(258), image.tag_v2.get(262)  # pyright: ignore[reportAttributeAccessIssue]
        if bits != (16,) or photometric == 0:  # 0: white is zero, which Pillow does not invert for 16 bits
            raise BadImage(f"grey TIFF of {bits} bits, photometric {photometric}; save it as black-is-zero, 16 bits")
    if "transparency" in image.info and ";16" in str(image.tile):
        # Pillow compares the 16-bit transparent colour with pixels it has already cut to 8 bits.
        raise BadImage("16-bit pixels with a transparent colour; save it with 8 bits or an alpha channel")


def _grey_or_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The upright first frame in mode L or RGB; reads the whole file."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # v / 257 rounded: 65535 = 255 * 257
    grey = image.mode in _GREY_MODES
    if image.has_transparency_data:
        grey = grey and len(set(background)) == 1
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("L" if grey else "RGB")


def _crop_and_resize(image: Image.Image, resolution: int | None) -> Image.Image:
    if resolution is None:
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # Crop first: scaling a 10 x 100,000 strip as a whole would make a huge image only to throw it away.
    square = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=square)
