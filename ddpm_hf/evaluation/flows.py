"""bits/dim by the probability flow, as one of the metrics that `Evaluator` measures of real images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..flow import Flow, flow_bits_per_dim, require_solver

if TYPE_CHECKING:
    from .evaluator import Evaluator

PARTS = ("prior", "contraction")


def require_flow(pipe: Any) -> None:
    """Raises ValueError where the pipeline's process has no flow, or SciPy is missing."""
    try:
        require_solver()
    except ImportError as error:
        raise ValueError(str(error)) from None
    Flow(pipe.unet, pipe.scheduler)


def flow_settings(evaluator: Evaluator) -> dict[str, Any]:
    """The arguments of `flow_bits_per_dim`; a piece of images is one batch, on which the solver's steps depend."""
    protocol = evaluator.protocol
    names = ("seed", "tolerance", "num_probes", "num_dequantizations")
    return {"num_levels": evaluator.data("flow").num_levels, **{name: getattr(protocol, name) for name in names}}


def flow_result(evaluator: Evaluator) -> dict[str, Any]:
    """Mean bits/dim of the data's first `num_images` images with its standard error; called by all processes."""
    evaluator.warn_of_training_data()
    settings, classes = flow_settings(evaluator), evaluator.classes("flow")
    model = evaluator.pipe.unet, evaluator.pipe.scheduler

    def measure(x_start: Tensor, first: int) -> dict[str, Tensor]:
        labels = None if classes is None else classes[first : first + len(x_start)]
        quiet = not evaluator.accelerator.is_main_process
        with tqdm(desc="flow", unit=" images asked for", leave=False, disable=quiet) as bar:
            bits = flow_bits_per_dim(
                *model, x_start, class_labels=labels, first_index=first, on_progress=bar.update, **settings
            )
        return bits._asdict()

    pieces = evaluator.of_images("flow", measure, settings, **evaluator.conditions("flow"))
    found = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    total = found["total_b"]
    parts = {f"{name}_bpd": found[f"{name}_b"].mean().item() for name in PARTS}
    given = evaluator.protocol.label_column
    return {
        "name": "bits/dim of the flow" + (" given the class" if given else ""),
        "value": total.mean().item(),
        "spread": (total.std() / math.sqrt(len(total))).item() if len(total) > 1 else None,
        "parts": {**parts, "bins_bpd": total.mean().item() - sum(parts.values())},
        "protocol": {"num_images": len(total), **settings, **({"label_column": given} if given else {})},
    }
