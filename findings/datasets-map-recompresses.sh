#!/usr/bin/env bash
# datasets: a map that only passes the images on compresses JPEG, WebP and AVIF again, at Pillow's default quality.
#
# Expected: dataset.map(lambda row: row), or one that adds a column and returns **row, leaves the images as they
#   are; they are bytes in the table, and nobody changed them.
# Seen: the row holds a decoded image, which is written again in the format it came in, with that format's default
#   options: JPEG of quality 75 with halved colour, lossy WebP even where the source was lossless, AVIF of quality 75.
#   Every map that returns the image loses again. PNG survives. It happens for images kept as bytes, as in Parquet and
#   WebDataset files; of those kept as a path the path is kept.
# Matters: labels, captions and filters are added by map. The training images get blocks and blurred colours, and
#   the network learns to draw them.
# Instead: return only the new columns from map, or pass remove_columns and input_columns; cast_column("image",
#   Image(decode=False)) before anything that returns whole rows.
# Versions: datasets 5.2.0, Pillow 12.3.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment datasets==5.2.0 pillow==12.3.0 numpy==2.4.6 pyarrow==26.0.1

observe <<'PYTHON'
import io

import datasets
import numpy as np
from PIL import Image

datasets.disable_progress_bars()
rows, columns = np.mgrid[:64, :64]
waves = np.sin(columns / 3), np.sin(rows / 4), np.cos((rows + columns) / 5)
photo = 128 + 90 * np.stack(waves, axis=-1)
OPTIONS = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}, "PNG": {}}


def pixels(dataset):
    return np.asarray(dataset[0]["image"].convert("RGB")).astype(int)


def difference(mean):
    return "none" if mean == 0 else "over 1 level" if mean > 1 else "under 1 level"


for kind, options in OPTIONS.items():
    file = io.BytesIO()
    Image.fromarray(photo.astype(np.uint8)).save(file, kind, **options)
    features = datasets.Features({"image": datasets.Image()})
    source = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}, features=features)
    results = {
        "new column only": source.map(lambda row: {"n": 1}),
        "row and new column": source.map(lambda row: {**row, "n": 1}),
        "undecoded row": source.cast_column("image", datasets.Image(decode=False)).map(lambda row: {**row, "n": 1}),
    }
    results["undecoded row"] = results["undecoded row"].cast_column("image", datasets.Image())
    changes = {name: difference(np.abs(pixels(result) - pixels(source)).mean()) for name, result in results.items()}
    print(f"{kind}: mean difference {changes}")
PYTHON

expect <<'SEEN'
JPEG: mean difference {'new column only': 'none', 'row and new column': 'over 1 level', 'undecoded row': 'none'}
WEBP: mean difference {'new column only': 'none', 'row and new column': 'over 1 level', 'undecoded row': 'none'}
AVIF: mean difference {'new column only': 'none', 'row and new column': 'over 1 level', 'undecoded row': 'none'}
PNG: mean difference {'new column only': 'none', 'row and new column': 'none', 'undecoded row': 'none'}
SEEN
