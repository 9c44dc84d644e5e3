"""What the header of an image file says and Pillow does not tell: depth, samples, and why its pixels would be wrong.

Pillow reads many files of uncertain or unusual meaning without a word: it drops the samples beyond three, takes signed
pixels for unsigned ones, low bytes for pixels. `read_header` knows these kinds from the file itself and refuses them
before anything is decoded.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from PIL import TiffImagePlugin

MAX_METADATA_BYTES = 64 * 2**20  # stored text and profiles of one PNG; they are skipped and never inflated

_PNG = b"\x89PNG\r\n\x1a\n"
_JP2, _J2K = b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"
_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_EXIF_AS_TEXT = b"Raw profile type exif\0"  # as ImageMagick stored it before PNG had a chunk for it


class BadImage(ValueError):
    """An image that is damaged, too large or of uncertain meaning; the message is the reason, without a file name."""


@dataclass(frozen=True)
class Header:
    """What is known of a file before Pillow opens it.

    Attributes:
        stream: what Pillow shall open: the file, or a copy without the chunks that it would inflate.
        bits: of each sample in the file, as stored.
        full: the value that the file itself calls white: 2^bits - 1, or a PPM's largest value.
        is_grey: whether the file says that it is grey, where Pillow reads it as colour.
        transparent: the one transparent level or colour of a PNG, in the levels of 8 bits that Pillow gives; None
            where there is none, or Pillow gets it right by itself.
    """

    stream: BinaryIO
    bits: int = 8
    full: int = 255
    is_grey: bool = False
    transparent: int | tuple[int, ...] | None = None


def read_header(stream: BinaryIO) -> Header:
    """What the file says of its samples, from its first bytes; `stream` is a seekable file.

    Raises BadImage, with the property found and what to do, where Pillow would refuse the file as unknown or would
    read it wrongly. Files of other formats, and damaged headers, are left to Pillow.
    """
    stream.seek(0)
    start = stream.read(16)
    try:
        if start.startswith(_PNG):
            return _png(stream)
        if start[:4] in TiffImagePlugin.PREFIXES:
            return _tiff(stream)
        if start.startswith((_JP2, _J2K)):
            return _jpeg2000(stream, start.startswith(_JP2))
        if start.startswith(b"BM"):
            return _bmp(stream)
        if start[:1] == b"P" and start[1:2] in b"123456":
            return _ppm(stream)
    except BadImage:
        raise
    except (struct.error, IndexError, KeyError, TypeError, ValueError, SyntaxError, OSError, EOFError):
        pass  # a damaged header, of which Pillow says what is wrong
    return Header(stream)


# ---- PNG ------------------------------------------------------------------------------------------------------------


def _png(stream: BinaryIO) -> Header:
    """Walks the chunks; text and profiles are left out, but for EXIF that is stored as text."""
    stream.seek(len(_PNG))
    kept, metadata_bytes, bits, colour_type, key = [(0, len(_PNG))], 0, 8, 2, None
    while len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        begin = stream.tell() - 8
        body = stream.read(min(length, 26)) if name in (b"IHDR", b"tRNS", *_METADATA) else b""
        if name == b"IHDR":
            bits, colour_type = body[8], body[9]
        elif name == b"tRNS":
            key = body
        if name in _METADATA and not body.startswith(_EXIF_AS_TEXT):
            metadata_bytes += length
        elif kept[-1][1] == begin:
            kept[-1] = (kept[-1][0], begin + 12 + length)
        else:
            kept.append((begin, begin + 12 + length))
        if name == b"IEND":
            break
        stream.seek(begin + 12 + length)
    if metadata_bytes > MAX_METADATA_BYTES:
        raise BadImage(
            f"its text and colour profile take {metadata_bytes:,} bytes, more than {MAX_METADATA_BYTES:,}; "
            "save it without metadata"
        )
    rest = _only(stream, kept) if metadata_bytes else stream
    return Header(rest, bits, 2**bits - 1, colour_type == 4, _transparent(key, bits, colour_type))


def _only(stream: BinaryIO, parts: list[tuple[int, int]]) -> io.BytesIO:
    copy = io.BytesIO()
    for begin, end in parts:
        stream.seek(begin)
        copy.write(stream.read(end - begin))
    return copy


def _transparent(key: bytes | None, bits: int, colour_type: int) -> int | tuple[int, ...] | None:
    """The level of tRNS as Pillow's pixels have it: it scales those of less than 8 bits, but not the level itself.

    Only the lowest `bits` of a level count (PNG specification, tRNS).
    """
    if key is None or bits == 16 or colour_type not in (0, 2):
        return None
    levels = [level & (2**bits - 1) for level in struct.unpack(f">{3 if colour_type == 2 else 1}H", key)]
    return tuple(levels) if colour_type == 2 else levels[0] * (255 // (2**bits - 1))


# ---- JPEG, BMP and PPM ----------------------------------------------------------------------------------------------


def unknown_reason(stream: BinaryIO) -> str:
    """Why Pillow does not open a JPEG, from its frame header (ITU-T T.81, B.2.2); "" where that is not the cause."""
    stream.seek(0)
    if stream.read(2) != b"\xff\xd8":
        return ""
    while len(head := stream.read(4)) == 4 and head[0] == 0xFF:
        marker, length = head[1], int.from_bytes(head[2:])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, _, _, components = struct.unpack(">BHHB", stream.read(6).ljust(6, b"\0"))
            kind = f"JPEG of {bits} bits in {components} component{'s' if components > 1 else ''}"
            return "" if bits == 8 and components in (1, 3, 4) else f"{kind}; save it with 8 bits, grey or RGB"
        stream.seek(length - 2, io.SEEK_CUR)
    return ""


def _bmp(stream: BinaryIO) -> Header:
    """Refuses 4 bits with the palette 0, 1, ... 15, which Pillow takes for 8 bits of grey, and alpha in 16 bits."""
    stream.seek(0)
    start = stream.read(26)
    header_bytes, width_bytes = int.from_bytes(start[14:18], "little"), 2 if start[14] == 12 else 4
    stream.seek(18 + 2 * width_bytes + 2)
    bits = int.from_bytes(stream.read(2), "little")
    stream.seek(14 + header_bytes)
    size = 3 if header_bytes == 12 else 4  # of an entry: blue, green, red, and in later versions an unused byte
    palette = stream.read(16 * size)
    stream.seek(30)
    compression = int.from_bytes(stream.read(4), "little") if header_bytes >= 40 else 0
    if bits == 16 and (header_bytes >= 56 or compression == 6):  # a fourth mask
        stream.seek(66)
        if compression and any(stream.read(4)):
            raise BadImage("BMP of 16 bits with alpha; save it with 32 bits, or as PNG")
    if bits == 4 and all(palette[size * level :][:3] == bytes([level] * 3) for level in range(16)):
        raise BadImage("BMP of 4 bits with a palette of the greys 0 to 15; save it as PNG, or with 8 bits")
    return Header(stream, bits if bits in (1, 4) else 8)


def _ppm(stream: BinaryIO) -> Header:
    """The largest value of PGM and PPM, the third number after the magic one; Pillow scales it to 255 or 65535."""
    stream.seek(0)
    lines = stream.read(4096).split(b"\n")
    words = b" ".join(line.split(b"#")[0] for line in lines).split()
    if words[0] in (b"P1", b"P4"):
        return Header(stream, 1, 1)
    full = int(words[3])
    return Header(stream, full.bit_length(), full)


# ---- TIFF -----------------------------------------------------------------------------------------------------------

_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # samples of each photometric interpretation
_DEPTHS = {0: (1, 2, 4, 8), 1: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 5: (8, 16), 6: (8,)}
_SAMPLE_FORMATS = {
    2: "signed pixels",
    3: "pixels of Pillow mode 'F'",
    4: "pixels of an undefined sample format",
    5: "complex pixels",
    6: "complex pixels",
}
_NO_COMPRESSION, _JPEG = 1, 7
_SEPARATE_PLANES = 2
_UNSIGNED = 1
_PREMULTIPLIED, _STRAIGHT = 1, 2  # alpha


def _tiff(stream: BinaryIO) -> Header:
    """Refuses what is signed, has samples that Pillow drops, or is stored in a way that it misreads (TIFF 6.0)."""
    tags = _tiff_tags(stream)
    photometric, num_samples = tags.get(262, 0), tags.get(277, 1)
    bits, extra, formats = (_as_tuple(tags.get(tag, default)) for tag, default in ((258, 1), (338, ()), (339, 1)))
    compression, planes = tags.get(259, _NO_COMPRESSION), tags.get(284, 1) if num_samples > 1 else 1
    if unusual := [each for each in formats if each != _UNSIGNED]:
        kind = _SAMPLE_FORMATS.get(unusual[0], f"pixels of sample format {unusual[0]}")
        raise BadImage(f"{kind} have no certain range; save it with 8 or 16 bits, unsigned")
    if bits[0] > 16:
        raise BadImage(f"pixels of {bits[0]} bits have no certain range; save it with 8 or 16 bits")
    alpha = [each for each in extra if each in (_PREMULTIPLIED, _STRAIGHT)]  # others mean nothing certain
    colours = _COLOURS.get(photometric, num_samples)
    if num_samples - len(alpha) != colours or len(alpha) > 1:
        raise BadImage(f"TIFF of {num_samples} bands; save three of them as RGB, or one as grey")
    _check_tiff_depth(photometric, bits, alpha)
    if planes == _SEPARATE_PLANES and compression == _NO_COMPRESSION and (bits[0] > 8 or _PREMULTIPLIED in alpha):
        kind = "premultiplied alpha" if _PREMULTIPLIED in alpha else f"{bits[0]} bits"
        raise BadImage(f"separate planes of {kind} without compression; save it interleaved, or as PNG")
    if tags.get(266, 1) == 2 and compression == _NO_COMPRESSION and (bits[0] > 1 or photometric == 3):
        raise BadImage("FillOrder 2, bits from the right, without compression; save it with FillOrder 1, or as PNG")
    if compression not in TiffImagePlugin.COMPRESSION_INFO:
        raise BadImage(f"TIFF of compression {compression}; save it with LZW or deflate, or as PNG")
    if photometric == 6 and compression != _JPEG:
        raise BadImage("YCbCr without JPEG compression; save it as RGB")
    return Header(stream, bits[0], 2 ** bits[0] - 1)


def _check_tiff_depth(photometric: int, bits: tuple[int, ...], alpha: list[int]) -> None:
    if photometric in (0, 1) and not alpha and bits[0] not in _DEPTHS[photometric]:
        # also 16 bits with white as 0, which Pillow does not invert
        raise BadImage(f"grey TIFF of {bits} bits, photometric {photometric}; save it as black-is-zero, 8 or 16 bits")
    if len(set(bits)) > 1 or bits[0] not in _DEPTHS.get(photometric, bits):
        raise BadImage(f"TIFF of {bits} bits, photometric {photometric}; save it with 8 bits per channel")
    if alpha and photometric != 2 and (photometric, bits[0], alpha) != (1, 8, [_STRAIGHT]):
        kind = "premultiplied alpha" if _PREMULTIPLIED in alpha else "alpha"
        raise BadImage(f"TIFF of {bits[0]} bits, photometric {photometric}, with {kind}; save it as RGB with alpha")


def _tiff_tags(stream: BinaryIO) -> Any:
    stream.seek(0)
    start = stream.read(8)
    if 43 in start[2:4]:  # BigTIFF
        start += stream.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(start)
    stream.seek(tags.next)
    tags.load(stream)
    return tags


def _as_tuple(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


# ---- JPEG 2000 ------------------------------------------------------------------------------------------------------

_CMYK = 12
_COLOUR_SPACES = (_CMYK, 16, 17, 18)  # and sRGB, grey, sYCC: the enumerated ones that Pillow knows
_STRAIGHT_ALPHA = 1


def _jpeg2000(stream: BinaryIO, in_boxes: bool) -> Header:
    """Refuses depths that Pillow scales wrongly, by the codestream's SIZ segment (ISO 15444-1, A.5.1 and I.5.3)."""
    boxes = dict(_boxes(stream, 0, None)) if in_boxes else {b"jp2c": (0, 0)}
    inner = dict(_boxes(stream, *boxes[b"jp2h"])) if in_boxes else {}
    stream.seek(boxes[b"jp2c"][0] + 6)  # past SOC, the marker of SIZ and the length
    (num_components,) = struct.unpack_from(">H", stream.read(36), 34)
    depths, *steps = zip(*struct.iter_unpack("BBB", stream.read(3 * num_components)), strict=True)
    bits, kind = (depths[0] & 127) + 1, f"JPEG 2000 of {num_components} component{'s' if num_components > 1 else ''}"
    if any(depth > 127 for depth in depths):
        raise BadImage(f"{kind}, signed, which have no certain range; save it unsigned, with 8 bits")
    # Pillow shifts where it should scale: below 8 bits white becomes grey, and above, in colour, black.
    allowed = (8, *range(9 if not in_boxes else 10, 17)) if num_components == 1 else (8,)
    if len(set(depths)) > 1 or bits not in allowed:
        found = " and ".join(str((depth & 127) + 1) for depth in sorted(set(depths)))
        raise BadImage(f"{kind} of {found} bits; save it with 8 bits, or grey of 16 bits as PNG")
    if any(step != 1 for axis in steps for step in axis):
        raise BadImage(f"{kind}, some of them subsampled; save it without subsampling, or as PNG")
    if in_boxes:
        _check_channels(stream, inner, kind, num_components)
    return Header(stream, bits, 2**bits - 1)


def _check_channels(stream: BinaryIO, inner: dict[bytes, tuple[int, int]], kind: str, num_components: int) -> None:
    """Refuses other colour spaces than Pillow's, and a last component not declared as straight alpha (cdef)."""
    stream.seek(inner[b"colr"][0])
    method, _, _, space = struct.unpack(">BBBI", stream.read(7))
    if method == 1 and space not in _COLOUR_SPACES:
        raise BadImage(f"{kind} in colour space {space}; save it as RGB")
    if num_components in (1, 3) or method == 1 and space == _CMYK:
        return
    types = {}
    if b"cdef" in inner:
        begin, end = inner[b"cdef"]
        stream.seek(begin + 2)
        types = {channel: kind for channel, kind, _ in struct.iter_unpack(">HHH", stream.read(end - begin - 2))}
    if types.get(num_components - 1) != _STRAIGHT_ALPHA:
        raise BadImage(f"{kind}, the last of which is not declared as alpha; save it as RGB, or as PNG with alpha")


def _boxes(stream: BinaryIO, begin: int, end: int | None) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(type, (begin, end)) of each box's content; a box of length 0 reaches to the end."""
    end = stream.seek(0, io.SEEK_END) if end is None else end
    while begin + 8 <= end:
        stream.seek(begin)
        length, name, long = struct.unpack(">I4sQ", stream.read(16).ljust(16, b"\0"))
        header = 16 if length == 1 else 8
        length = {0: end - begin, 1: long}.get(length, length)
        yield name, (begin + header, begin + length)
        if length < header:
            return
        begin += length
