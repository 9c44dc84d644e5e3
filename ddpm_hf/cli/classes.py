"""Classes on the command line."""

from collections.abc import Sequence
from typing import Any

ALL = "all"


def chosen_classes(pipe: Any, words: Sequence[str]) -> list[str | int]:
    """The classes that `--classes` names, by name or number, `all` for every one.

    Raises ValueError where the checkpoint has no classes.
    """
    if not pipe.classes:
        raise ValueError(f"--classes {' '.join(words)}: the checkpoint has no classes; it was trained without labels")
    if list(words) == [ALL]:
        return list(pipe.classes)
    names = pipe.id2label.values()
    return [int(word) if word not in names and word.isdecimal() else word for word in words]


def require_unlabelled(pipe: Any, what: str, remedy: str = "") -> None:
    """Raises ValueError where every sample needs a class, and `what` has none to give."""
    if pipe.needs_labels:
        reason = "every sample of this checkpoint needs a class, since it was trained with --label_dropout 0"
        raise ValueError(f"{what}: {reason}" + (f"; {remedy}" if remedy else ""))


def shown_classes(pipe: Any, classes: Sequence[str | int]) -> list[str]:
    """Their names, or "class 3", in ASCII, of at most 16 letters."""
    names = pipe.classes
    texts = [names.get(each, f"class {each}") if isinstance(each, int) else each for each in classes]
    return [text.encode("ascii", "replace").decode()[:16] for text in texts]
