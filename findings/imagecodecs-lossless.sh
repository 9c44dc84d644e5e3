#!/usr/bin/env bash
# imagecodecs: level=50 leaves WebP lossless, makes JPEG XL lossy, and JPEG XL of distance 0 is not lossless.
#
# Expected: `level` is imagecodecs' word for the quality, and a smaller level gives a smaller file. libjxl's manual
#   calls distance 0 mathematically lossless, as `cjxl -d 0` is, and 100 is its quality for the same.
# Seen: webp_encode(level=...) has no effect at all until lossless=False is said: the file is lossless and large at
#   any level. jpegxl_encode is lossless too by default, but any level or distance makes it lossy, also distance=0 and
#   level=100; level=101 is lossless again. Only lossless=True decides in both.
# Matters: one keeps training images in such a codec to keep their pixels. With distance=0 they change by a few
#   levels, and the file can be larger than the lossless one; with WebP one pays for lossless files where a quality
#   was asked for.
# Instead: always say lossless=True or lossless=False, and compare one decoded image with its source.
# Versions: imagecodecs 2026.3.6.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment imagecodecs==2026.3.6 numpy==2.4.6

observe <<'PYTHON'
import imagecodecs
import numpy as np

noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
CODECS = {
    "WebP": (imagecodecs.webp_encode, imagecodecs.webp_decode),
    "JPEG XL": (imagecodecs.jpegxl_encode, imagecodecs.jpegxl_decode),
}
OPTIONS = ({}, {"level": 0}, {"level": 50}, {"level": 100}, {"level": 101}, {"distance": 0}, {"lossless": True})
OPTIONS += ({"level": 50, "lossless": False}, {"level": 50, "lossless": True})
for name, (encode, decode) in CODECS.items():
    default = len(encode(noise))
    for options in OPTIONS:
        if name == "WebP" and "distance" in options:
            continue
        file = encode(noise, **options)
        kept = "every pixel kept" if (decode(file) == noise).all() else "pixels changed"
        size = (
            "of the size without options" if len(file) == default else "smaller" if len(file) < default else "larger"
        )
        print(f"{name} {options}: {kept}, file {size}")
PYTHON

expect <<'SEEN'
WebP {}: every pixel kept, file of the size without options
WebP {'level': 0}: every pixel kept, file of the size without options
WebP {'level': 50}: every pixel kept, file of the size without options
WebP {'level': 100}: every pixel kept, file of the size without options
WebP {'level': 101}: every pixel kept, file of the size without options
WebP {'lossless': True}: every pixel kept, file of the size without options
WebP {'level': 50, 'lossless': False}: pixels changed, file smaller
WebP {'level': 50, 'lossless': True}: every pixel kept, file of the size without options
JPEG XL {}: every pixel kept, file of the size without options
JPEG XL {'level': 0}: pixels changed, file smaller
JPEG XL {'level': 50}: pixels changed, file smaller
JPEG XL {'level': 100}: pixels changed, file larger
JPEG XL {'level': 101}: every pixel kept, file of the size without options
JPEG XL {'distance': 0}: pixels changed, file larger
JPEG XL {'lossless': True}: every pixel kept, file of the size without options
JPEG XL {'level': 50, 'lossless': False}: pixels changed, file smaller
JPEG XL {'level': 50, 'lossless': True}: every pixel kept, file of the size without options
SEEN
