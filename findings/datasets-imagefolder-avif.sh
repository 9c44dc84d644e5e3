#!/usr/bin/env bash
# datasets: imagefolder leaves AVIF files out, and WebDataset returns them as bytes, though Pillow opens them.
#
# Expected: imagefolder takes what Pillow, which decodes for it, can open; Pillow has AVIF built in since 11.3.
#   Files that it does not take are named.
# Seen: both go by a fixed list of endings, and .avif is not in it (.jp2 and .webp are). imagefolder skips such
#   files silently: a class whose images are all AVIF is gone from the labels, and when that leaves one class, the
#   label column is gone too. WebDataset makes a column of bytes of them, which has no size and no pixels.
# Matters: photographs from the web come as AVIF more and more. A mixed folder loses those, which are the newest
#   ones.
# Instead: Dataset.from_dict({"image": paths}).cast_column("image", Image()) with your own list of files, which
#   decodes them; for WebDataset cast_column("avif", Image()).
# Versions: datasets 5.2.0, Pillow 12.3.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment datasets==5.2.0 pillow==12.3.0 numpy==2.4.6 pyarrow==26.0.1

observe <<'PYTHON'
import tarfile
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()
for kind in ("webp", "jp2", "avif"):
    for name in ("cat/1.png", f"cat/2.{kind}", f"dog/1.{kind}", f"dog/2.{kind}"):
        path = Path(kind) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    rows = datasets.load_dataset("imagefolder", data_dir=kind, split="train")
    labels = rows.features["label"].names if "label" in rows.features else None
    print(f"imagefolder, 1 png and 3 {kind}: {len(rows)} images, labels {labels}")
    with tarfile.open(f"{kind}.tar", "w") as tar:
        tar.add(f"{kind}/dog/1.{kind}", f"1.{kind}")
    rows = datasets.load_dataset("webdataset", data_files=f"{kind}.tar", split="train")
    print(f"webdataset, 1.{kind}: {type(rows[0][kind]).__name__}")
paths = sorted(map(str, Path("avif").rglob("*.*")))
rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
print("a list of paths:", [row["image"].format for row in rows])
PYTHON

expect <<'SEEN'
imagefolder, 1 png and 3 webp: 4 images, labels ['cat', 'dog']
webdataset, 1.webp: WebPImageFile
imagefolder, 1 png and 3 jp2: 4 images, labels ['cat', 'dog']
webdataset, 1.jp2: Jpeg2KImageFile
imagefolder, 1 png and 3 avif: 1 images, labels None
webdataset, 1.avif: bytes
a list of paths: ['PNG', 'AVIF', 'AVIF', 'AVIF']
SEEN
