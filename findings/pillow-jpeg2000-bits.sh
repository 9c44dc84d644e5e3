#!/usr/bin/env bash
# Pillow decodes the white of a JPEG 2000 file in colour of more than 8 bits as 0, and that of less than 8 as grey.
#
# Expected: a JPEG 2000 component of p bits (ISO/IEC 15444-1, Ssiz) reaches from 0 to 2^p - 1, and white stays white
#   when a reader goes to 8 or 16 bits. OpenJPEG, which Pillow uses, gives the levels back as they were written.
# Seen: in colour Pillow adds half a step, shifts to 8 bits and lets the sum wrap: of 12 bits the 8 brightest
#   levels, 4088 to 4095, become 0, of 16 bits the 128 brightest: white is black. Of 1 to 7 bits, and of grey with 9
#   to 15, the levels are shifted and not scaled: white of 4 bits is 240, of 1 bit 128, grey white of 12 bits is 65520
#   of 65535. No error, no warning.
# Matters: satellite, microscope and cinema images come as JPEG 2000 with 10 to 16 bits. Their highlights turn into
#   black dots, which a diffusion model learns like anything else.
# Instead: decode with imagecodecs.jpeg2k_decode, which returns the levels, and scale by 2^p - 1 yourself.
# Versions: Pillow 12.3.0; files written, and read for comparison, by imagecodecs 2026.3.6.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment pillow==12.3.0 imagecodecs==2026.3.6 numpy==2.4.6

observe <<'PYTHON'
import io

import imagecodecs
import numpy as np
from PIL import Image


def decoded(levels, bits):
    """The first pixel's first channel by imagecodecs and by Pillow, and Pillow's mode."""
    levels = levels.astype(np.uint16 if bits > 8 else np.uint8)
    file = imagecodecs.jpeg2k_encode(levels, level=0, reversible=True, bitspersample=bits, codecformat="jp2")
    image = Image.open(io.BytesIO(file))
    return imagecodecs.jpeg2k_decode(file).flat[0], np.asarray(image).flat[0], image.mode


for bits in (1, 4, 8, 10, 12, 16):
    for shape, kind in (((8, 8), "grey"), ((8, 8, 3), "colour")):
        written, read, mode = decoded(np.full(shape, 2**bits - 1), bits)
        print(f"white of {bits} bits, {kind}: written {written}, read by Pillow as {mode} {read}")
print(
    "12 bits, colour:", {level: int(decoded(np.full((8, 8, 3), level), 12)[1]) for level in (4079, 4087, 4088, 4095)}
)
print("16 bits, colour:", {level: int(decoded(np.full((8, 8, 3), level), 16)[1]) for level in (65407, 65408, 65535)})
PYTHON

expect <<'SEEN'
white of 1 bits, grey: written 1, read by Pillow as L 128
white of 1 bits, colour: written 1, read by Pillow as RGB 128
white of 4 bits, grey: written 15, read by Pillow as L 240
white of 4 bits, colour: written 15, read by Pillow as RGB 240
white of 8 bits, grey: written 255, read by Pillow as L 255
white of 8 bits, colour: written 255, read by Pillow as RGB 255
white of 10 bits, grey: written 1023, read by Pillow as I;16 65472
white of 10 bits, colour: written 1023, read by Pillow as RGB 0
white of 12 bits, grey: written 4095, read by Pillow as I;16 65520
white of 12 bits, colour: written 4095, read by Pillow as RGB 0
white of 16 bits, grey: written 65535, read by Pillow as I;16 65535
white of 16 bits, colour: written 65535, read by Pillow as RGB 0
12 bits, colour: {4079: 255, 4087: 255, 4088: 0, 4095: 0}
16 bits, colour: {65407: 255, 65408: 0, 65535: 0}
SEEN
