#!/usr/bin/env bash
# Pillow resizes big-endian 16-bit images with their bytes exchanged halfway, and saves them so as JPEG 2000.
#
# Expected: TIFF (6.0, section 2) allows either byte order, so the same picture saved in both gives the same pixels,
#   and the same small picture after resize. Opening does: np.asarray of both is equal.
# Seen: a big-endian file opens in mode I;16B instead of I;16. resize with BILINEAR, BICUBIC or LANCZOS then mixes
#   up the bytes wherever neighbours differ: a ramp from 0 to 65535 is wrong by more than half of the range. A picture
#   of one colour stays right, so does NEAREST. save(..., "JPEG2000") exchanges the bytes of every pixel: 7700 (30,
#   20) becomes 5150 (20, 30). PNG and TIFF are saved right. There is no error and no warning.
# Matters: ImageJ and many microscopes write big-endian TIFF. Their thumbnails for training are noise, and differ
#   from those of the same images written on another machine.
# Instead: Image.fromarray(np.asarray(image).astype("<u2")), or convert("I"), directly after opening.
# Versions: Pillow 12.3.0; files written by tifffile 2026.3.3.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment pillow==12.3.0 tifffile==2026.3.3 numpy==2.4.6

observe <<'PYTHON'
import numpy as np
import tifffile
from PIL import Image

ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
opened = {}
for name, byteorder in (("little-endian", "<"), ("big-endian", ">")):
    tifffile.imwrite(f"{name}.tif", ramp, byteorder=byteorder, photometric="minisblack")
    opened[name] = Image.open(f"{name}.tif")
    print(f"{name}: opens as {opened[name].mode}, equal to the ramp {bool((np.asarray(opened[name]) == ramp).all())}")
    for how in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS"):
        method = Image.Resampling[how]
        truth = np.asarray(opened[name].convert("I").resize((32, 32), method))
        error = np.abs(np.asarray(opened[name].resize((32, 32), method)).astype(int) - truth.clip(0, 65535)).max()
        print(f"  resize {how}: greatest error {'0 or 1' if error <= 1 else f'{100 * error // 65535} % of the range'}")

tifffile.imwrite("grey.tif", np.full((8, 8), 7700, np.uint16), byteorder=">", photometric="minisblack")
grey = Image.open("grey.tif")
print("one colour of 7700, after resize:", grey.resize((5, 5), Image.Resampling.BICUBIC).getpixel((2, 2)))
for kind in ("png", "tif", "jp2"):
    grey.save(f"saved.{kind}")
    print(f"7700 saved as {kind}: {Image.open(f'saved.{kind}').getpixel((0, 0))}")
PYTHON

expect <<'SEEN'
little-endian: opens as I;16, equal to the ramp True
  resize NEAREST: greatest error 0 or 1
  resize BILINEAR: greatest error 0 or 1
  resize BICUBIC: greatest error 0 or 1
  resize LANCZOS: greatest error 0 or 1
big-endian: opens as I;16B, equal to the ramp True
  resize NEAREST: greatest error 0 or 1
  resize BILINEAR: greatest error 50 % of the range
  resize BICUBIC: greatest error 70 % of the range
  resize LANCZOS: greatest error 84 % of the range
one colour of 7700, after resize: 7700
7700 saved as png: 7700
7700 saved as tif: 7700
7700 saved as jp2: 5150
SEEN
