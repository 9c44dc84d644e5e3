"""Inputs that were once handled wrongly: each kind with its members, and for each member what is right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "data"))  # for format_files, which writes files of every format


@dataclass(frozen=True)
class Answer:
    """One right outcome, of which everything that is given must hold.

    Attributes:
        pixels: uint8 or float [N, C, H, W], which the samples must equal within one level.
        in_order: whether the order of the samples counts.
        said: a pattern that one line of the log or a warning has, and no second line of the same load.
        refused: a pattern of the one line by which ValueError refuses the input.
        documented: a pattern of the checkout's docs/data.md.
        silent: nothing at all may be said.
    """

    pixels: np.ndarray | None = None
    in_order: bool = True
    said: str = ""
    refused: str = ""
    documented: str = ""
    silent: bool = False


@dataclass(frozen=True)
class Member:
    """One input: what is done with it in its folder, and the answers of which one must be given.

    Attributes:
        name: what distinguishes it within its kind.
        folder: holds its files; the call runs in it.
        answers: the right ones.
        call: arguments of `load_samples`.
        dataset: a Python expression for its first argument, of `datasets`, `np`, `Image` and `Path`.
        commands: arguments of training/train.py, one list for each start; in place of `load_samples`.
        listed: whether it is a case of the list of known faults, and not one made beside it.
    """

    name: str
    folder: Path
    answers: tuple[Answer, ...]
    call: dict[str, Any] = field(default_factory=dict)
    dataset: str = ""
    commands: tuple[tuple[str, ...], ...] = ()
    listed: bool = False


Folders = Callable[[], Path]
KINDS: dict[str, tuple[str, Callable[[Folders], Iterator[Member]]]] = {}


def kind(name: str, meaning: str) -> Callable[[Callable[[Folders], Iterator[Member]]], None]:
    """Registers a generator of members under the name of the case it grew from."""

    def register(members: Callable[[Folders], Iterator[Member]]) -> None:
        KINDS[name] = meaning, members

    return register


def members_of(name: str, root: Path) -> list[Member]:
    """All members of a kind, their files written below `root`."""
    count = 0

    def new() -> Path:
        nonlocal count
        count += 1
        folder = root / name / f"{count:03}"
        folder.mkdir(parents=True)
        return folder

    return list(KINDS[name][1](new))
