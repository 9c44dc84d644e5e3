"""Image files of every kind that a format has, written here or by tifffile and imagecodecs, for format_matrix.py.

Each generator yields `Cell`s: a file, and what a second decoder finds in it, as samples without orientation and
background: tifffile, or by imagecodecs libpng, libjpeg-turbo, OpenJPEG, libwebp, giflib and libavif.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

HEIGHT, WIDTH = 6, 9
ORIENTATIONS = range(1, 9)


@dataclass(frozen=True)
class Cell:
    """One file of the matrix; `samples` [H, W, S] are the second decoder's, `full` is its white, alpha comes last.

    `samples` is None where the pixels have no certain meaning (signed, unknown bands): these must be refused.
    """

    format: str
    kind: str
    bits: int
    layout: str
    transparency: str
    orientation: int
    data: bytes
    samples: np.ndarray | None
    full: int = 255
    has_alpha: bool = False
    inverted: bool = False


def noise(*shape: int, bits: int = 8, seed: int = 0) -> np.ndarray:
    """Every level of the depth is as likely as any other; black and white are among them."""
    values = np.random.default_rng(seed).integers(0, 2**bits, shape, dtype=np.uint16)
    values.flat[:2] = 0, 2**bits - 1
    return values.astype(np.uint8) if bits <= 8 else values


def smooth(channels: int, bits: int = 8) -> np.ndarray:
    y, x = np.mgrid[:16, :24]
    waves = [0.5 + 0.5 * np.sin(x / 7 + c) * np.cos(y / 5 - c) for c in range(channels)]
    return (np.stack(waves, -1) * (2**bits - 1)).astype(np.uint8 if bits <= 8 else np.uint16)


def saved(image: Image.Image, file_format: str, orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, file_format, **({"exif": exif} if orientation > 1 else {}), **options)
    return buffer.getvalue()


def as_samples(array: np.ndarray) -> np.ndarray:
    """[H, W, S] of what a decoder gave."""
    return array[..., None] if array.ndim == 2 else array


# ---- PNG ------------------------------------------------------------------------------------------------------------

_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_PNG_KINDS = {0: ("grey", 1), 2: ("RGB", 3), 3: ("palette", 1), 4: ("grey with alpha", 2), 6: ("RGB with alpha", 4)}


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _packed_rows(samples: np.ndarray, bits: int) -> bytes:
    """Unfiltered PNG rows of [H, W, S]."""
    rows = b""
    for row in samples.reshape(len(samples), -1):
        if bits == 16:
            packed = row.astype(">u2").tobytes()
        else:
            packed = np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes()
        rows += b"\0" + packed
    return rows


def png(samples: np.ndarray, bits: int, colour_type: int, interlaced: bool, *chunks: bytes) -> bytes:
    height, width = samples.shape[:2]
    parts = [samples[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [samples]
    rows = b"".join(_packed_rows(part, bits) for part in parts if part.size)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced))
    end = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + end


def png_cells() -> Iterator[Cell]:
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    kinds = [(colour_type, bits) for colour_type, each in depths.items() for bits in each]
    for (colour_type, bits), interlaced, keyed, orientation in product(
        kinds, (False, True), (False, True), ORIENTATIONS
    ):
        if keyed and colour_type in (4, 6):
            continue
        kind, channels = _PNG_KINDS[colour_type]
        samples = noise(HEIGHT, WIDTH, channels, bits=bits)
        chunks = []
        if colour_type == 3:
            chunks.append(png_chunk(b"PLTE", noise(2**bits, 3, seed=1).tobytes()))
        if keyed:
            level = np.full(channels, 2**bits - 1) if bits < 8 else samples[2, 3]  # one that occurs
            body = bytes([0, 77, 255]) if colour_type == 3 else level.astype(">u2").tobytes()
            chunks.append(png_chunk(b"tRNS", body[: 2**bits] if colour_type == 3 else body))
        if orientation > 1:
            entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
            chunks.append(png_chunk(b"eXIf", b"MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)))
        data = png(samples, bits, colour_type, interlaced, *chunks)
        decoded = as_samples(imagecodecs.png_decode(data))
        yield Cell(
            "PNG",
            kind,
            bits,
            "interlaced" if interlaced else "plain",
            "a level or colour (tRNS)" if keyed else "alpha" if colour_type in (4, 6) else "none",
            orientation,
            data,
            decoded,
            65535 if decoded.dtype == np.uint16 else 255,
            keyed or colour_type in (4, 6),
        )


# ---- TIFF -----------------------------------------------------------------------------------------------------------

_TIFF_KINDS = {  # samples, photometric interpretation, depths
    "grey": (1, "minisblack", (1, 2, 4, 8, 12, 16, 32)),
    "grey, white is 0": (1, "miniswhite", (1, 2, 4, 8, 16)),
    "RGB": (3, "rgb", (8, 16)),
    "palette": (1, "palette", (8,)),
    "CMYK": (4, "separated", (8, 16)),
}
_ALPHAS = {"none": None, "alpha": "unassalpha", "premultiplied alpha": "assocalpha", "undeclared band": "unspecified"}


def tiff(samples: np.ndarray, bits: int, **options) -> bytes:
    buffer = io.BytesIO()
    array = samples[..., 0] if samples.shape[-1] == 1 else samples
    if options.get("planarconfig") == "separate":
        array = np.moveaxis(samples, -1, 0)
    if bits == 1:
        array = array.astype(bool)
    elif bits not in (8, 16, 32):
        options["bitspersample"] = bits
    tifffile.imwrite(buffer, array, **options, metadata=None, software=False)
    return buffer.getvalue()


def _tiff_samples(data: bytes, kind: str, bits: int) -> tuple[np.ndarray | None, int]:
    """What tifffile reads, [H, W, S], and its white; None for depths whose range is not certain."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        array = np.asarray(page.asarray())
        if page.planarconfig == 2 and array.ndim == 3:
            array = np.moveaxis(array, 0, -1)
        if kind == "palette":
            return page.colormap.T[array], 65535  # type: ignore[union-attr]
    return (None if bits == 32 else as_samples(array.astype(np.uint16))), 2**bits - 1


def tiff_cells() -> Iterator[Cell]:
    compressions = (None, "lzw", "lzw with a predictor", "adobe_deflate", "packbits")
    layouts = product(("<", ">"), compressions, ("contig", "separate"), (False, True))
    for order, compression, planes, tiled in layouts:
        for kind, (channels, _, depths) in _TIFF_KINDS.items():
            for bits, alpha in product(depths, _ALPHAS):
                if planes == "separate" and channels == 1 or alpha != "none" and channels > 3:
                    continue
                if (tiled or compression) and bits not in (8, 16) or bits == 32 and planes == "separate":
                    continue
                if alpha != "none" and (channels == 1 and (kind != "grey" or bits != 8) or bits < 8):
                    continue
                if compression == "lzw with a predictor" and kind in ("palette", "grey, white is 0"):
                    continue
                yield from _tiff_kind(order, compression, planes, tiled, kind, bits, alpha)


def _tiff_kind(order, compression, planes, tiled, kind, bits, alpha) -> Iterator[Cell]:
    channels, photometric, _ = _TIFF_KINDS[kind]
    shape = (40, 35) if tiled else (HEIGHT, WIDTH)
    samples = noise(*shape, channels + (alpha != "none"), bits=min(bits, 16))
    if alpha == "premultiplied alpha":  # colours are at most alpha
        samples = np.minimum(samples, samples[..., -1:])
    options = {"byteorder": order, "photometric": photometric, "planarconfig": planes}
    options["compression"] = "lzw" if compression == "lzw with a predictor" else compression
    options["predictor"] = compression == "lzw with a predictor"
    if tiled:
        options["tile"] = (16, 16)
    if alpha != "none":
        options["extrasamples"] = [_ALPHAS[alpha]]
    if kind == "palette":
        options["colormap"] = noise(3, 256, seed=1).astype(np.uint16) * 257
    if channels == 1 and alpha == "none":
        options.pop("planarconfig")
    plain = order == "<" and not compression and not tiled
    layout = f"{'big' if order == '>' else 'little'}-endian, {compression or 'uncompressed'}"
    layout += ", separate planes" * (planes == "separate") + ", tiles" * tiled
    for orientation in ORIENTATIONS if plain else (1,):
        data = tiff(
            samples.astype(np.uint32) if bits == 32 else samples,
            bits,
            **options,
            extratags=[(274, 3, 1, orientation, True)] if orientation > 1 else (),
        )
        decoded, full = _tiff_samples(data, kind, bits)
        known = None if alpha == "undeclared band" else decoded
        yield Cell(
            "TIFF",
            kind,
            bits,
            layout,
            alpha,
            orientation,
            data,
            known,
            full,
            alpha in ("alpha", "premultiplied alpha"),
            kind == "grey, white is 0",
        )


def tiff_odd_cells() -> Iterator[Cell]:
    """Signed, float and undefined samples, more bands than colours, YCbCr: what has no certain meaning, or is rare."""
    for order, dtype in product("<>", ("i1", "i2", "i4", "f2", "f4", "f8", "u4", "c8")):
        data = tiff(np.zeros((HEIGHT, WIDTH, 1), np.dtype(dtype)), 8, byteorder=order, photometric="minisblack")
        layout = f"{'big' if order == '>' else 'little'}-endian, uncompressed"
        kind = {"i": "signed", "f": "float", "u": "grey", "c": "complex"}[dtype[0]]
        yield Cell("TIFF", kind, 8 * int(dtype[1]), layout, "none", 1, data, None)
    for bands, bits, photometric, planes in product(
        range(2, 9), (8, 16), ("minisblack", "rgb"), ("contig", "separate")
    ):
        if photometric == "rgb" and bands < 4:
            continue
        samples = noise(HEIGHT, WIDTH, bands, bits=bits)
        options = {"extrasamples": ["unspecified"] * (bands - (3 if photometric == "rgb" else 1))}
        data = tiff(samples, bits, photometric=photometric, planarconfig=planes, **options)
        layout = "little-endian, uncompressed" + ", separate planes" * (planes == "separate")
        yield Cell("TIFF", "several bands", bits, layout, "none", 1, data, None)
    for kind, (channels, photometric, _) in _TIFF_KINDS.items():
        options = {"colormap": noise(3, 256, seed=1).astype(np.uint16) * 257} if kind == "palette" else {}
        data = tiff(noise(HEIGHT, WIDTH, channels), 8, photometric=photometric, bigtiff=True, **options)
        decoded, full = _tiff_samples(data, kind, 8)
        inverted = kind == "grey, white is 0"
        yield Cell("TIFF", kind, 8, "BigTIFF", "none", 1, data, decoded, full, inverted=inverted)
    for compression in (None, "lzw", "jpeg"):
        samples = smooth(3)
        data = tiff(samples, 8, photometric="ycbcr", compression=compression)
        decoded = tifffile.imread(io.BytesIO(data)) if compression == "jpeg" else None
        layout = f"little-endian, {compression or 'uncompressed'}"
        yield Cell("TIFF", "YCbCr", 8, layout, "none", 1, data, decoded)


# ---- the others -----------------------------------------------------------------------------------------------------


def jpeg_cells() -> Iterator[Cell]:
    for mode, progressive, subsampling, orientation in product(("L", "RGB", "CMYK"), (0, 1), (0, 1, 2), ORIENTATIONS):
        if mode != "RGB" and subsampling:
            continue
        array = smooth(len(mode))
        image = Image.fromarray(array[..., 0] if mode == "L" else array, mode)
        data = saved(image, "JPEG", orientation, progressive=bool(progressive), subsampling=subsampling)
        decoded = as_samples(imagecodecs.jpeg8_decode(data))
        kind = {"L": "grey", "RGB": "YCbCr", "CMYK": "CMYK"}[mode]
        layout = ("progressive" if progressive else "baseline") + ("", ", 4:2:2", ", 4:2:0")[subsampling]
        inverted = mode == "CMYK"  # Adobe stores ink inverted
        yield Cell("JPEG", kind, 8, layout, "none", orientation, data, decoded, inverted=inverted)


def jpeg2000_cells() -> Iterator[Cell]:
    kinds = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGB with alpha"}
    for bits, channels, codec in product(range(1, 17), kinds, ("jp2", "j2k")):
        samples = noise(HEIGHT, WIDTH, channels, bits=bits)
        data = imagecodecs.jpeg2k_encode(
            samples[..., 0] if channels == 1 else samples, level=0, bitspersample=bits, codecformat=codec, mct=False
        )
        decoded = as_samples(imagecodecs.jpeg2k_decode(data))
        alpha = "none" if channels % 2 else "not declared"  # imagecodecs writes no channel definition
        yield Cell("JPEG 2000", kinds[channels], bits, codec, alpha, 1, data, decoded, 2**bits - 1, channels % 2 == 0)
    for mode in ("L", "LA", "RGB", "RGBA"):
        samples = noise(HEIGHT, WIDTH, len(mode))
        data = saved(Image.fromarray(samples[..., 0] if mode == "L" else samples, mode), "JPEG2000", mct=0)
        alpha = "alpha" if mode[-1] == "A" else "none"
        decoded = as_samples(imagecodecs.jpeg2k_decode(data))
        yield Cell("JPEG 2000", kinds[len(mode)], 8, "jp2", alpha, 1, data, decoded, has_alpha=alpha == "alpha")
    for signed_bits in (8, 16):
        array = np.zeros((HEIGHT, WIDTH), f"i{signed_bits // 8}")
        data = imagecodecs.jpeg2k_encode(array, level=0, codecformat="jp2")
        yield Cell("JPEG 2000", "signed", signed_bits, "jp2", "none", 1, data, None)


def webp_cells() -> Iterator[Cell]:
    for grey, alpha, lossless, orientation in product((False, True), (False, True), (True, False), ORIENTATIONS):
        array = np.concatenate([smooth(1)] * 3 if grey else [smooth(3)], axis=-1)
        array = np.concatenate([array, smooth(2)[..., 1:]], axis=-1) if alpha else array
        data = saved(Image.fromarray(array), "WEBP", orientation, lossless=lossless)
        decoded = imagecodecs.webp_decode(data)
        kind, layout = "equal channels" if grey else "RGB", "lossless" if lossless else "lossy"
        yield Cell("WebP", kind, 8, layout, "alpha" if alpha else "none", orientation, data, decoded, has_alpha=alpha)


def gif_cells() -> Iterator[Cell]:
    for grey, interlaced, transparent in product((False, True), (0, 1), (False, True)):
        image = Image.fromarray(noise(HEIGHT, WIDTH, bits=4), "L")
        palette = np.repeat(noise(16, 1, seed=1), 3, axis=1) if grey else noise(16, 3, seed=1)
        image.putpalette(palette.tobytes())
        options = {"transparency": int(np.asarray(image)[2, 3])} if transparent else {}
        data = saved(image, "GIF", interlace=interlaced, optimize=False, **options)
        decoded = imagecodecs.gif_decode(data)
        if transparent:
            clear = np.asarray(image) == options["transparency"]
            decoded = np.concatenate([decoded[..., :3], np.where(clear, 0, 255)[..., None].astype(np.uint8)], axis=-1)
        kind = "equal channels" if grey else "palette"
        layout, alpha = "interlaced" if interlaced else "plain", "a palette entry" if transparent else "none"
        yield Cell("GIF", kind, 8, layout, alpha, 1, data, decoded, has_alpha=transparent)


def _bmp(width: int, height: int, bits: int, rows: bytes, extra: bytes = b"", compression: int = 0) -> bytes:
    colours = len(extra) // 4 if bits <= 8 else 0
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, colours, 0)
    start = 14 + len(info) + len(extra)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + extra + rows


def bmp_cells() -> Iterator[Cell]:
    for bits, top_down, ramp in product((1, 4, 8, 16, 24, 32), (False, True), (False, True)):
        extra = b""
        if bits <= 8:
            palette = np.arange(2**bits)[:, None] if ramp else noise(2**bits, 3, seed=1)
            extra = np.pad(np.broadcast_to(palette, (2**bits, 3)), ((0, 0), (0, 1))).astype(np.uint8).tobytes()
            rows = _packed_rows(noise(HEIGHT, WIDTH, 1, bits=bits), bits)
            length = len(rows) // HEIGHT
            parts = [rows[i * length + 1 : (i + 1) * length] for i in range(HEIGHT)]  # without PNG's filter byte
        elif ramp:
            continue
        else:
            parts = [row.tobytes() for row in noise(HEIGHT, WIDTH * bits // 8)]
        body = b"".join(part + bytes(-len(part) % 4) for part in parts)
        data = _bmp(WIDTH, -HEIGHT if top_down else HEIGHT, bits, body, extra)
        decoded = as_samples(imagecodecs.bmp_decode(data))
        kind = ("palette 0, 1, 2, …" if ramp else "palette") if bits <= 8 else "RGB"
        yield Cell("BMP", kind, bits, "top first" if top_down else "bottom first", "none", 1, data, decoded)


def ppm_cells() -> Iterator[Cell]:
    """No second decoder: the values are written as text or bytes, and the largest stands in the header."""
    for channels, full, as_text in product((1, 3), (1, 15, 100, 255, 256, 1000, 4095, 65535), (False, True)):
        values = np.random.default_rng(0).integers(0, full + 1, (HEIGHT, WIDTH, channels))
        magic = {(1, True): 2, (3, True): 3, (1, False): 5, (3, False): 6}[channels, as_text]
        head = f"P{magic}\n# a comment\n{WIDTH} {HEIGHT}\n{full}\n".encode()
        body = (
            " ".join(map(str, values.ravel())).encode()
            if as_text
            else values.astype("u1" if full < 256 else ">u2").tobytes()
        )
        kind, layout = "grey" if channels == 1 else "RGB", "text" if as_text else "bytes"
        yield Cell("PPM", kind, full.bit_length(), layout, "none", 1, head + body, values, full)


def avif_cells() -> Iterator[Cell]:
    for bits, channels in product((8, 10, 12), (1, 3, 4)):
        samples = smooth(channels, bits)
        data = imagecodecs.avif_encode(samples[..., 0] if channels == 1 else samples, level=100, bitspersample=bits)
        decoded = as_samples(imagecodecs.avif_decode(data))
        kind = "grey" if channels == 1 else "RGB"
        alpha = "alpha" if channels == 4 else "none"
        yield Cell("AVIF", kind, bits, "lossless", alpha, 1, data, decoded, 2**bits - 1, channels == 4)
    for orientation in ORIENTATIONS:
        data = saved(Image.fromarray(smooth(3)), "AVIF", orientation, quality=100)
        yield Cell("AVIF", "RGB", 8, "4:2:0", "none", orientation, data, imagecodecs.avif_decode(data))


def cells() -> Iterator[Cell]:
    for generator in (png_cells, jpeg_cells, webp_cells, gif_cells, bmp_cells, tiff_cells, tiff_odd_cells):
        yield from generator()
    for generator in (ppm_cells, jpeg2000_cells, avif_cells):
        yield from generator()
