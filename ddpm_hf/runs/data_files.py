"""Which files a run is trained on, so that a refusal to go on with other data can name them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data import Samples, printable
from ..machine import replaced

DATA_FILES = "data_files.tsv"  # a line for each sample: the first half of its pixels' sha256, a tab, its name


def write_data_files(run: Path, samples: Samples) -> None:
    """Write `run/data_files.tsv`; nothing for data without names, which are built in. Raises OSError."""
    if samples.names:
        with replaced(run / DATA_FILES) as temporary, temporary.open("w", encoding="utf-8") as file:
            for name, digest in _digests(samples).items():
                file.write(f"{digest}\t{name}\n")


def changed_files(run: Path, samples: Samples) -> str:
    """How the data of a run differ from `samples`, as a phrase; "" where the run has no list that can be read."""
    try:
        lines = (run / DATA_FILES).read_text(encoding="utf-8").splitlines()
        before = {name: digest for digest, name in (line.split("\t", 1) for line in lines)}
    except (OSError, ValueError):
        return ""
    now = _digests(samples)
    groups = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "changed": [name for name in now if before.get(name, now[name]) != now[name]],
    }
    return ", ".join(f"{len(names)} {what} ({_first(names)})" for what, names in groups.items() if names)


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"the first is {names[0]}"


def _digests(samples: Samples) -> dict[str, str]:
    """By name, printable; hashing reads all pixels once."""
    return {
        printable(name): hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()[:32]
        for name, image in zip(samples.names, samples.array, strict=True)
    }
