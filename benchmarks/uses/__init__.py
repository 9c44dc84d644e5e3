"""What users do with checkpoints, pipelines, training and commands that once went wrong: each with what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .running import Runner

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Seen:
    """What came of a use: its last line or its number, and whether that is right."""

    text: str
    right: bool


@dataclass(frozen=True)
class Use:
    """One thing that a user does.

    Attributes:
        about: the heading in the table.
        does: what the user has and does, in a line.
        expected: what is right, in a line.
        seen_in: does it in a tree and judges what came of it.
    """

    about: str
    does: str
    expected: str
    seen_in: Callable[[Runner], Seen]


USES: dict[str, Use] = {}


def use(name: str, about: str, does: str, expected: str) -> Callable[[Callable[[Runner], Seen]], None]:
    """Registers a function under a name of its own."""

    def register(seen_in: Callable[[Runner], Seen]) -> None:
        assert name not in USES, name
        USES[name] = Use(about, does, expected, seen_in)

    return register
