"""How measurements become sentences: numbers with errors, tables, and what a sentence requires of its numbers."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

WIDTH = 120


class Contradiction(Exception):
    """A number contradicts a sentence of the page."""


def require(true: bool, sentence: str) -> None:
    if not true:
        raise Contradiction(sentence)


def clear(estimate: Mapping[str, float], sign: int, sentence: str, errors: float = 2.0) -> None:
    """Require an estimate to lie on one side of 0 by some standard errors."""
    require(sign * estimate["value"] > errors * estimate["error"], sentence)


def pm(estimate: Mapping[str, float], digits: int = 2, scale: float = 1.0) -> str:
    """“1.88 ± 0.01”, of `scale` times the estimate; with more digits where the error would be 0."""
    while estimate["error"] and float(f"{scale * estimate['error']:.{digits}f}") == 0:
        digits += 1
    return f"{_number(scale * estimate['value'], digits)} ± {scale * estimate['error']:.{digits}f}"


def signed(estimate: Mapping[str, float], digits: int = 2) -> str:
    sign = "+" if estimate["value"] >= 0 else ""
    return sign + pm(estimate, digits)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def percent(share: float, digits: int = 0) -> str:
    return f"{_number(100 * share, digits)} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first, *others = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([first, "|---" * len(head) + "|", *others])


class Surprise(NamedTuple):
    """title, guess and short stand in the page's table too; measured is a paragraph, a table or several of both."""

    title: str
    guess: str
    short: str
    measured: Sequence[str]
    why: str
    scope: str
    advice: str
    names: Sequence[str]

    def section(self, number: int) -> str:
        paragraphs = [
            f"## {number}. {self.title}",
            f"**The guess.** {self.guess}.",
            f"**Measured.** {self.measured[0]}",
            *self.measured[1:],
            f"**Why.** {self.why}",
            f"**General, or of this model?** {self.scope}",
            f"**What to do.** {self.advice}",
            f"`python benchmarks/surprises.py --only {' '.join(self.names)}`",
        ]
        return "\n\n".join(map(filled, paragraphs)) + "\n"


def filled(paragraph: str) -> str:
    """A paragraph in lines of at most 120 characters; tables as they are."""
    if paragraph.startswith(("|", "#", "```", "!")):
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def of(found: Mapping[str, Any], *path: Any) -> Any:
    """What lies at a path of keys."""
    for key in path:
        found = found[str(key)]
    return found
