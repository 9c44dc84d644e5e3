#!/usr/bin/env bash
# datasets: thumbnail, paste and other edits in place of an opened image file do not reach the dataset.
#
# Expected: Dataset.from_dict({"image": [image]}) and map keep the image that they are given: its size and its
#   pixels.
# Seen: an image that came from Image.open(path) still has a filename, and then the path is kept in place of the
#   pixels, and read again later. What was done in place (thumbnail, paste, putalpha, drawing on it) is gone; resize,
#   crop and convert return a new image without a filename, and are kept. In map the same edit is kept for images
#   stored as bytes and lost for those stored as a path, as imagefolder stores them. Nothing is said.
# Matters: thumbnail is Pillow's own way to make things small. The dataset that was "reduced to 64 pixels", or had
#   its date stamps painted over, has the originals in it, and looks right until someone measures.
# Instead: image.copy() (it has no filename) after the edit, or resize and the like.
# Versions: datasets 5.2.0, Pillow 12.3.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment datasets==5.2.0 pillow==12.3.0 numpy==2.4.6 pyarrow==26.0.1

observe <<'PYTHON'
import datasets
from PIL import Image, ImageDraw

datasets.disable_progress_bars()
FEATURES = datasets.Features({"image": datasets.Image()})
Image.new("RGB", (64, 48), "red").save("photo.png")


def thumbnail(image):
    image.thumbnail((16, 16))
    return image


def painted(image):
    ImageDraw.Draw(image).rectangle((0, 0, 64, 48), fill="blue")
    return image


EDITS = {
    "thumbnail": thumbnail,
    "thumbnail, copy": lambda image: thumbnail(image).copy(),
    "resize": lambda image: image.resize((16, 12)),
    "rectangle": painted,
    "rectangle, copy": lambda image: painted(image).copy(),
}


def look(image):
    return image.size, {(255, 0, 0): "red", (0, 0, 255): "blue"}[image.getpixel((1, 1))]


for name, edit in EDITS.items():
    given = edit(Image.open("photo.png"))
    kept = datasets.Dataset.from_dict({"image": [given]}, features=FEATURES)[0]["image"]
    print(f"from_dict, {name}: given {look(given)}, in the dataset {look(kept)}")
sources = {"a path": {"path": "photo.png", "bytes": None}}
with open("photo.png", "rb") as file:
    sources["bytes"] = {"path": None, "bytes": file.read()}
for name, source in sources.items():
    dataset = datasets.Dataset.from_dict({"image": [source]}, features=FEATURES)
    result = dataset.map(lambda row: {"image": thumbnail(row["image"])})
    print(f"map with thumbnail, images as {name}: in the dataset {look(result[0]['image'])}")
PYTHON

expect <<'SEEN'
from_dict, thumbnail: given ((16, 12), 'red'), in the dataset ((64, 48), 'red')
from_dict, thumbnail, copy: given ((16, 12), 'red'), in the dataset ((16, 12), 'red')
from_dict, resize: given ((16, 12), 'red'), in the dataset ((16, 12), 'red')
from_dict, rectangle: given ((64, 48), 'blue'), in the dataset ((64, 48), 'red')
from_dict, rectangle, copy: given ((64, 48), 'blue'), in the dataset ((64, 48), 'blue')
map with thumbnail, images as a path: in the dataset ((64, 48), 'red')
map with thumbnail, images as bytes: in the dataset ((16, 12), 'red')
SEEN
