#!/usr/bin/env bash
# Pillow takes the bytes of an uncompressed 16-bit TIFF whose colours lie in separate planes for pixels of 8 bits.
#
# Expected: a 16-bit RGB TIFF is reduced to its high bytes, since Pillow has no 16-bit colour, and
#   PlanarConfiguration (TIFF 6.0, tag 284) says only how the same numbers are laid out: 1 pixel by pixel, 2 one plane
#   per colour.
# Seen: with planes and without compression each number becomes two pixels, its two bytes. The picture is the upper
#   half of the right one, each row of it cut into two that lie below each other, and every second column is noise.
#   The same array pixel by pixel, or with planes and deflate, is read right. There is no error and no warning.
# Matters: microscopes, scanners and tifffile (for arrays of shape 3, H, W) write planes. A folder with such files
#   gives a training set of striped pictures, or one in which only some are.
# Instead: read TIFF with tifffile, and keep the 16 bits; or look at image.tag_v2[284] before you trust Pillow.
# Versions: Pillow 12.3.0; files written by tifffile 2026.3.3, with imagecodecs 2026.3.6 for deflate.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment pillow==12.3.0 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.4.6

observe <<'PYTHON'
import numpy as np
import tifffile
from PIL import Image

pixels = np.random.default_rng(0).integers(0, 65536, (16, 16, 3)).astype(np.uint16)
for layout in ("contig", "separate"):
    for byteorder in "<>":
        for compression in (None, "deflate"):
            array = np.moveaxis(pixels, -1, 0) if layout == "separate" else pixels
            how = {"planarconfig": layout, "compression": compression, "byteorder": byteorder}
            tifffile.imwrite("a.tif", array, photometric="rgb", **how)
            image = Image.open("a.tif")
            upper_half = pixels[:8].astype(byteorder + "u2")
            planes = [upper_half[..., colour].copy().view(np.uint8).reshape(16, 16) for colour in range(3)]
            answers = {"the high bytes": pixels // 256, "BYTES IN TURN of the upper half": np.stack(planes, axis=-1)}
            found = [name for name, answer in answers.items() if (np.asarray(image) == answer).all()]
            print(f"{layout}, byte order {byteorder}, compression {compression}: {image.mode}, {found}")
PYTHON

expect <<'SEEN'
contig, byte order <, compression None: RGB, ['the high bytes']
contig, byte order <, compression deflate: RGB, ['the high bytes']
contig, byte order >, compression None: RGB, ['the high bytes']
contig, byte order >, compression deflate: RGB, ['the high bytes']
separate, byte order <, compression None: RGB, ['BYTES IN TURN of the upper half']
separate, byte order <, compression deflate: RGB, ['the high bytes']
separate, byte order >, compression None: RGB, ['BYTES IN TURN of the upper half']
separate, byte order >, compression deflate: RGB, ['the high bytes']
SEEN
