#!/usr/bin/env bash
# datasets: a class called "test_tube", or one file "dog_test_1.png", makes imagefolder drop all other images, and the
# labels.
#
# Expected: load_dataset("imagefolder", data_dir=folder) reads all images below the folder into the split "train",
#   with the names of the class folders as labels. Split folders (train, test) are meant where the top of the tree has
#   them.
# Seen: the words train, test, validation, valid, val, dev, eval (and training, testing, evaluation) make a split
#   wherever they stand between separators in any folder's or file's name. As soon as one path matches, paths that
#   match no word belong to no split and are left out. If one class is left there is no label column either. No error,
#   no warning.
# Matters: ImageNet has a class "bullet train", laboratories have test tubes, and photographs are called test_1.png.
#   The training set is then one class, or a single picture.
# Instead: load_dataset("imagefolder", data_files={"train": f"{folder}/**"}), and compare the number of rows with
#   the files.
# Versions: datasets 5.2.0, Pillow 12.3.0.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

environment datasets==5.2.0 pillow==12.3.0 numpy==2.4.6 pyarrow==26.0.1

observe <<'PYTHON'
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()
FOLDERS = (
    ["beaker/1.png", "beaker/2.png", "flask/1.png"],
    ["beaker/1.png", "beaker/2.png", "test_tube/1.png"],
    ["beaker/1.png", "beaker/2.png", "contest/1.png"],
    ["bullet train/1.png", "car/1.png", "car/2.png"],
    ["invalid/1.png", "invalid/2.png", "valid/1.png"],
    ["cat/1.png", "cat/2.png", "dog/dog_test_1.png"],
)


def loaded(**where):
    splits = datasets.load_dataset("imagefolder", **where)
    return {
        name: (len(rows), rows.features["label"].names if "label" in rows.features else None)
        for name, rows in splits.items()
    }


for number, files in enumerate(FOLDERS):
    folder = Path(f"set{number}")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    print(files)
    print(f"  data_dir: {loaded(data_dir=str(folder))}")
    print(f"  data_files: {loaded(data_files={'train': f'{folder}/**'})}")
PYTHON

expect <<'SEEN'
['beaker/1.png', 'beaker/2.png', 'flask/1.png']
  data_dir: {'train': (3, ['beaker', 'flask'])}
  data_files: {'train': (3, ['beaker', 'flask'])}
['beaker/1.png', 'beaker/2.png', 'test_tube/1.png']
  data_dir: {'test': (1, None)}
  data_files: {'train': (3, ['beaker', 'test_tube'])}
['beaker/1.png', 'beaker/2.png', 'contest/1.png']
  data_dir: {'train': (3, ['beaker', 'contest'])}
  data_files: {'train': (3, ['beaker', 'contest'])}
['bullet train/1.png', 'car/1.png', 'car/2.png']
  data_dir: {'train': (1, None)}
  data_files: {'train': (3, ['bullet train', 'car'])}
['invalid/1.png', 'invalid/2.png', 'valid/1.png']
  data_dir: {'validation': (1, None)}
  data_files: {'train': (3, ['invalid', 'valid'])}
['cat/1.png', 'cat/2.png', 'dog/dog_test_1.png']
  data_dir: {'test': (1, None)}
  data_files: {'train': (3, ['cat', 'dog'])}
SEEN
