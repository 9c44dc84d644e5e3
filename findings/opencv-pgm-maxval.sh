#!/usr/bin/env bash
# OpenCV scales an ASCII PGM by its maxval and leaves a binary one as it is; Pillow scales both, and 12 bits to 16.
#
# Expected: Netpbm's P2 and P5 are two spellings of one image, and a level is a fraction of the maxval in the
#   header. A reader scales by maxval, or returns the levels, but does the same for both.
# Seen: with maxval 100 cv2.imread gives 255 for white of the ASCII file and 100 for that of the binary file. Above
#   255 it scales neither (white of maxval 4095 is 4095), where Pillow gives 65535, in mode I. No error, no warning.
# Matters: PGM is what face sets, SAR and medical sets come in (maxval 100, 1023, 4095). cv2 and Pillow differ by a
#   factor of up to 16, and two files of the same picture by 2.55. A network that scales by 255 or 65535 sees dark
#   images.
# Instead: read maxval yourself (the third number of the header) and divide the raw levels by it; or Pillow, with
#   65535 for mode I and 255 for mode L.
# Versions: opencv-python-headless 5.0.0.93, Pillow 12.3.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment opencv-python-headless==5.0.0.93 pillow==12.3.0 numpy==2.4.6

observe <<'PYTHON'
import cv2
import numpy as np
from PIL import Image

for maxval in (15, 100, 255, 4095, 65535):
    levels = np.array([0, maxval // 2, maxval], ">u2" if maxval > 255 else np.uint8)
    header = f"3 1\n{maxval}\n".encode()
    files = {"ASCII": b"P2\n" + header + " ".join(map(str, levels)).encode() + b"\n"}
    files["binary"] = b"P5\n" + header + levels.tobytes()
    for spelling, file in files.items():
        with open("image.pgm", "wb") as out:
            out.write(file)
        by_opencv = cv2.imread("image.pgm", cv2.IMREAD_UNCHANGED)[0].tolist()
        by_pillow = np.asarray(Image.open("image.pgm"))[0].tolist()
        print(f"{spelling}, levels {levels.tolist()}: OpenCV {by_opencv}, Pillow {by_pillow}")
PYTHON

expect <<'SEEN'
ASCII, levels [0, 7, 15]: OpenCV [0, 119, 255], Pillow [0, 119, 255]
binary, levels [0, 7, 15]: OpenCV [0, 7, 15], Pillow [0, 119, 255]
ASCII, levels [0, 50, 100]: OpenCV [0, 127, 255], Pillow [0, 128, 255]
binary, levels [0, 50, 100]: OpenCV [0, 50, 100], Pillow [0, 128, 255]
ASCII, levels [0, 127, 255]: OpenCV [0, 127, 255], Pillow [0, 127, 255]
binary, levels [0, 127, 255]: OpenCV [0, 127, 255], Pillow [0, 127, 255]
ASCII, levels [0, 2047, 4095]: OpenCV [0, 2047, 4095], Pillow [0, 32759, 65535]
binary, levels [0, 2047, 4095]: OpenCV [0, 2047, 4095], Pillow [0, 32759, 65535]
ASCII, levels [0, 32767, 65535]: OpenCV [0, 32767, 65535], Pillow [0, 32767, 65535]
binary, levels [0, 32767, 65535]: OpenCV [0, 32767, 65535], Pillow [0, 32767, 65535]
SEEN
