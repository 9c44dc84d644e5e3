"""Tables of bad input: each row is what is done and the words that its error must have.

A row passes where the exception is of a documented type, its one line names what is wrong, what arrived and what is
allowed or what to do, and nothing was written or trained. What is accepted is the affair of the other test files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ddpm_hf import DDPMPaperMLP, DDPMPaperUNet

NAN, INF = float("nan"), float("inf")
SCHEDULES = "choose one of linear, scaled_linear, squaredcos_cap_v2, quad, const, jsd, warmup10, warmup50"
VARIANCES = "choose one of fixed_small, fixed_large, learned, fitted"
PREDICTIONS = "choose one of epsilon, sample, previous_sample, v_prediction"
HALVED = "divisible by 2, since block_out_channels=(8, 16) halves it 1 times"


class Case(NamedTuple):
    name: str
    action: Callable[..., Any]
    words: tuple[str, ...]
    error: type[BaseException] = ValueError


def cases(rows: list[Case], faults: dict[str, str] | None = None) -> list[Any]:
    """The rows for parametrize; those that `faults` names are known to fall short, and why."""
    marks = {name: [pytest.mark.xfail(strict=True, reason=reason)] for name, reason in (faults or {}).items()}
    assert marks.keys() <= {row.name for row in rows}, marks.keys() - {row.name for row in rows}
    assert len({row.name for row in rows}) == len(rows), sorted(row.name for row in rows)
    return [pytest.param(row, id=row.name, marks=marks.get(row.name, [])) for row in rows]


def shown(keywords: dict[str, Any]) -> str:
    """Keyword arguments as the name of a case, the same in every process: no addresses."""

    def word(value: Any) -> str:
        if isinstance(value, DDPMPaperUNet):
            return f"{value.config['in_channels']}to{value.config['out_channels']}"
        if isinstance(value, torch.Tensor | np.ndarray):
            return f"{type(value).__name__}{tuple(value.shape)}"
        text = repr(value)
        return type(value).__name__ if " object at " in text or isinstance(value, torch.nn.Module) else text[:40]

    return ",".join(f"{key}={word(value)}" for key, value in keywords.items()).replace(" ", "")


def with_keywords(function: Callable[..., Any], table: list[tuple[Any, ...]]) -> list[Case]:
    """A case `function(**keywords)` of each row: keywords, words …"""
    return [Case(shown(keywords), lambda k=keywords: function(**k), words) for keywords, *words in table]


def refused(case: Case, *arguments: Any) -> str:
    """The message of the error, after its type and words were looked at."""
    with pytest.raises(case.error) as info:
        case.action(*arguments)
    message = str(info.value)
    for word in case.words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


def files_in(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


TINY = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def tiny(**config: Any) -> DDPMPaperUNet:
    return DDPMPaperUNet(**{**TINY, "attention_resolutions": (4,), **config})  # type: ignore[arg-type]


POINTS = DDPMPaperMLP(hidden_size=16, num_layers=1)
