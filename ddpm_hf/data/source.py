"""What every place that data comes from is brought to: encoded images in a fixed order, with names and labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cache import ImageFiles


@dataclass(frozen=True)
class Labels:
    """The class of each file, int64 [N], as an index of `names`."""

    indices: np.ndarray
    names: tuple[str, ...]

    @staticmethod
    def of(values: Sequence[Any], files: Sequence[str], place: str) -> Labels:
        """Classes by sorted value, numbers by size. Raises ValueError where one is missing, or all are the same."""
        missing = [file for file, value in zip(files, values, strict=True) if value is None or value == ""]
        if missing:
            raise ValueError(
                f"labels by {place}: {len(missing)} of {len(values)} images have none, the first is "
                f"{printable(missing[0])}; label or remove them"
            )
        if not all(isinstance(value, str | int | np.integer) for value in values):
            odd = next(value for value in values if not isinstance(value, str | int | np.integer))
            raise ValueError(f"labels by {place}: found {odd!r}; labels must be text or whole numbers")
        numbers = all(not isinstance(value, str) for value in values)
        classes = sorted(set(values) if numbers else set(map(str, values)))
        if len(classes) < 2:
            raise ValueError(f"labels by {place}: all {len(values)} images are {classes[0]!r}; two classes are needed")
        index = {value: i for i, value in enumerate(classes)}
        indices = np.asarray([index[value if numbers else str(value)] for value in values], np.int64)
        return Labels(indices, tuple(map(str, classes)))


@dataclass(frozen=True)
class Source:
    """Encoded images in a fixed order.

    Attributes:
        name: for messages and reports, without the folders it lies in.
        files: the images.
        identity: changes whenever the files do.
        names: of each image its file within the source, or "row 12".
        labels: of each image, where they were asked for.
        notes: lines to log: what was found and is not used.
        channels: 1 or 3 where the source itself says what its images are to become.
    """

    name: str
    files: ImageFiles
    identity: str
    names: Sequence[str] = ()
    labels: Labels | None = None
    notes: tuple[str, ...] = ()
    channels: int | None = None


def printable(path: object) -> str:
    """A path for messages: on one line, with an escape in place of every character that cannot be printed."""
    text = str(path)
    if text.isprintable():  # nearly always, and a folder may have a million
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def row_names(count: int) -> list[str]:
    """What samples without files are called: "row 0", "row 1", …"""
    return [f"row {index}" for index in range(count)]


def sha256_of(value: object) -> str:
    """sha256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
