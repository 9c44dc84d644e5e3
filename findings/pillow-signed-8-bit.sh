#!/usr/bin/env bash
# Pillow reads signed 8-bit images as unsigned: by adding 128 in JPEG 2000, and by taking -1 for 255 in TIFF.
#
# Expected: TIFF's SampleFormat 2 (6.0, section 19) and the sign bit of JPEG 2000's Ssiz say that the numbers are signed.
#   16-bit signed TIFF keeps them, in mode I. For 8 bits Pillow has no mode, so one expects an error, or one rule.
# Seen: both open as L without a word. In JPEG 2000 -128..127 becomes 0..255, and the order of the levels stays. In TIFF the
#   byte is read as it is: 0..127 stay, and -128..-1 become 128..255, so that the darkest levels are brighter than all others.
# Matters: signed bytes are how remote sensing keeps differences and indices, and how quantized images in [-1, 1) are kept
#   (x * 128). The same array from the two formats trains two different models.
# Instead: tifffile.imread and imagecodecs.jpeg2k_decode return int8. In Pillow look at image.tag_v2.get(339), which is (2,).
# Versions: Pillow 12.3.0; files written by tifffile 2026.3.3 and imagecodecs 2026.3.6.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment pillow==12.3.0 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.4.6

observe <<'PYTHON'
import io

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

levels = np.array([[-128, -100, -1, 0, 1, 100, 127, 0]] * 8, np.int8)
for kind in ("tiff", "jp2"):
    file = io.BytesIO()
    if kind == "tiff":
        tifffile.imwrite(file, levels, photometric="minisblack")
        peer = tifffile.imread(io.BytesIO(file.getvalue()))
    else:
        file.write(imagecodecs.jpeg2k_encode(levels, level=0, reversible=True, codecformat="jp2"))
        peer = imagecodecs.jpeg2k_decode(file.getvalue())
    image = Image.open(file)
    print(f"{kind}: peer {peer.dtype} {peer[0].tolist()}, Pillow {image.mode} {np.asarray(image)[0].tolist()}")
file = io.BytesIO()
tifffile.imwrite(file, levels.astype(np.int16), photometric="minisblack")
image = Image.open(file)
print(f"tiff of 16 bits: Pillow {image.mode} {np.asarray(image)[0].tolist()}")
PYTHON

expect <<'SEEN'
tiff: peer int8 [-128, -100, -1, 0, 1, 100, 127, 0], Pillow L [128, 156, 255, 0, 1, 100, 127, 0]
jp2: peer int8 [-128, -100, -1, 0, 1, 100, 127, 0], Pillow L [0, 28, 127, 128, 129, 228, 255, 128]
tiff of 16 bits: Pillow I [-128, -100, -1, 0, 1, 100, 127, 0]
SEEN
