#!/usr/bin/env bash
# Pillow loses the transparent level of a grey PNG of 2 or 4 bits, and of 16.
#
# Expected: PNG's tRNS chunk names one grey level of the file as transparent, at any bit depth; every pixel of that
#   level is transparent in image.convert("RGBA"), as it is for 8 bits.
# Seen: pixels of 2 and 4 bits are scaled to 8 (1 of 0..3 becomes 85), but image.info["transparency"] keeps the
#   file's number (1). The two are compared as they are, no pixel is equal, and all of the image is opaque. With 16
#   bits the same number is compared with pixels that were clipped at 255 on the way to RGBA, so a level above 255 is
#   never transparent.
# Matters: sprites, glyphs, icons and masks, the usual small training sets, come as grey PNGs of few bits, made so
#   by every optimizer. Pasted on a background by their alpha they keep the background that was to vanish.
# Instead: compare the array of pixels, np.asarray(image), with the level, after level * 255 // (2**depth - 1) for 2
#   and 4 bits, and make the alpha of that; depth is the 25th byte of the file.
# Versions: Pillow 12.3.0, numpy 2.4.6.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment pillow==12.3.0 numpy==2.4.6

observe <<'PYTHON'
import io
import struct
import zlib

import numpy as np
from PIL import Image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_png(levels, depth, transparent):
    """A grey PNG of one row, whose level `transparent` is transparent."""
    bits = "".join(f"{level:0{depth}b}" for level in levels)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", len(levels), 1, depth, 0, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(">H", transparent))
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


for depth in (2, 4, 8, 16):
    image = Image.open(io.BytesIO(grey_png([0, 1, 2, 3], depth, transparent=1)))
    pixels, alpha = np.asarray(image)[0].tolist(), np.asarray(image.convert("RGBA"))[0, :, 3].tolist()
    print(f"{depth} bits, level 1 transparent: {image.mode} {pixels} {image.info}, alpha {alpha}")
image = Image.open(io.BytesIO(grey_png([300, 7700, 20000, 65535], 16, transparent=7700)))
print(f"16 bits, 7700 of 65535 transparent: alpha {np.asarray(image.convert('RGBA'))[0, :, 3].tolist()}")
PYTHON

expect <<'SEEN'
2 bits, level 1 transparent: L [0, 85, 170, 255] {'transparency': 1}, alpha [255, 255, 255, 255]
4 bits, level 1 transparent: L [0, 17, 34, 51] {'transparency': 1}, alpha [255, 255, 255, 255]
8 bits, level 1 transparent: L [0, 1, 2, 3] {'transparency': 1}, alpha [255, 0, 255, 255]
16 bits, level 1 transparent: I;16 [0, 1, 2, 3] {'transparency': 1}, alpha [255, 0, 255, 255]
16 bits, 7700 of 65535 transparent: alpha [255, 255, 255, 255]
SEEN
