#!/usr/bin/env bash
# Pillow's rotate and transform interpolate the bytes of 16-bit pixels, not the pixels: one grey of 7700 becomes about
# 25.
#
# Expected: interpolation between equal pixels gives that pixel. It does so in the modes L, I and F, and resize does
#   so in I;16, the mode in which 16-bit PNG and TIFF files open.
# Seen: image.rotate and image.transform in I;16 with BILINEAR or BICUBIC take the two bytes of each number for two
#   pixels of 8 bits, and write 8 bits. 7700 is 256 * 30 + 20, and what comes out lies between 20 and 30. NEAREST is
#   right, and so are multiples of 90 degrees, which only move pixels. There is no error and no warning.
# Matters: rotation and shear by small angles is the usual augmentation, and depth maps, X-rays and microscope
#   images have 16 bits. The augmented copies are nearly black noise, while those that happen not to be rotated look
#   right.
# Instead: image.convert("I") (or "F") before, and back to 16 bits by numpy afterwards.
# Versions: Pillow 12.3.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment pillow==12.3.0

observe <<'PYTHON'
from PIL import Image
from PIL.Image import Resampling, Transform

for mode in ("I;16", "I", "F"):
    grey = Image.new(mode, (64, 64), 7700)
    for how in (Resampling.NEAREST, Resampling.BILINEAR, Resampling.BICUBIC):
        results = {
            "resize": grey.resize((48, 48), how).getpixel((24, 24)),
            "rotate 90": grey.rotate(90, how).getpixel((32, 32)),
            "rotate 30": grey.rotate(30, how).getpixel((32, 32)),
            "shear": grey.transform((64, 64), Transform.AFFINE, (1, 0.5, 0, 0, 1, 0), how).getpixel((32, 31)),
        }
        print(f"7700 in {mode}, {how.name}: {results}")
PYTHON

expect <<'SEEN'
7700 in I;16, NEAREST: {'resize': 7700, 'rotate 90': 7700, 'rotate 30': 7700, 'shear': 7700}
7700 in I;16, BILINEAR: {'resize': 7700, 'rotate 90': 7700, 'rotate 30': 23, 'shear': 22}
7700 in I;16, BICUBIC: {'resize': 7700, 'rotate 90': 7700, 'rotate 30': 22, 'shear': 21}
7700 in I, NEAREST: {'resize': 7700, 'rotate 90': 7700, 'rotate 30': 7700, 'shear': 7700}
7700 in I, BILINEAR: {'resize': 7700, 'rotate 90': 7700, 'rotate 30': 7700, 'shear': 7700}
7700 in I, BICUBIC: {'resize': 7700, 'rotate 90': 7700, 'rotate 30': 7700, 'shear': 7700}
7700 in F, NEAREST: {'resize': 7700.0, 'rotate 90': 7700.0, 'rotate 30': 7700.0, 'shear': 7700.0}
7700 in F, BILINEAR: {'resize': 7700.0, 'rotate 90': 7700.0, 'rotate 30': 7700.0, 'shear': 7700.0}
7700 in F, BICUBIC: {'resize': 7700.0, 'rotate 90': 7700.0, 'rotate 30': 7700.0, 'shear': 7700.0}
SEEN
