#!/usr/bin/env bash
# Pillow's exif_transpose turns an image by its XMP orientation, unless the XMP was written with single quotes.
#
# Expected: XMP is RDF in XML, and XML (section 2.3, AttValue) allows tiff:Orientation="6" and tiff:Orientation='6'
#   alike. Pillow reads the XMP orientation where a file has no Exif one: Image.getexif() takes it over, and
#   ImageOps.exif_transpose turns the picture by it.
# Seen: the orientation is looked for with a pattern that knows double quotes, or an element of its own. With single
#   quotes it is not found, and the picture stays on its side; so it is in JPEG, PNG, WebP and AVIF. image.getxmp(),
#   which parses the XML, does know it.
# Matters: "exif_transpose and be done" is how training data is set upright. Which of two photographs with the same
#   orientation is turned depends on the quotes of the program that wrote it.
# Instead: where getexif() has no orientation (274), search image.getxmp() for the key Orientation, and turn by
#   that.
# Versions: Pillow 12.3.0, with defusedxml 0.7.1 for getxmp.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment pillow==12.3.0 defusedxml==0.7.1

observe <<'PYTHON'
import io
import re

from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

XMP = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF>
</x:xmpmeta>"""


def saved(kind, xmp):
    """An image of 40 by 30 pixels with this XMP and no Exif, saved and opened again."""
    options = {"xmp": xmp.encode()}
    if kind == "PNG":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp)
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, kind, **options)
    return Image.open(file)


for kind in ("JPEG", "PNG", "WEBP", "AVIF"):
    for quotes, xmp in (("double", XMP), ("single", XMP.replace('"', "'"))):
        image = saved(kind, xmp)
        parsed = re.search(r"'Orientation': '(\d)'", str(image.getxmp())).group(1)
        upright = ImageOps.exif_transpose(image).size
        print(f"{kind}, {quotes} quotes: getxmp has {parsed}, getexif {image.getexif().get(274)}, turned to {upright}")
PYTHON

expect <<'SEEN'
JPEG, double quotes: getxmp has 6, getexif 6, turned to (30, 40)
JPEG, single quotes: getxmp has 6, getexif None, turned to (40, 30)
PNG, double quotes: getxmp has 6, getexif 6, turned to (30, 40)
PNG, single quotes: getxmp has 6, getexif None, turned to (40, 30)
WEBP, double quotes: getxmp has 6, getexif 6, turned to (30, 40)
WEBP, single quotes: getxmp has 6, getexif None, turned to (40, 30)
AVIF, double quotes: getxmp has 6, getexif 6, turned to (30, 40)
AVIF, single quotes: getxmp has 6, getexif None, turned to (40, 30)
SEEN
