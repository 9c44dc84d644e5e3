"""Any network, asked from outside the pipeline: where it computes, and what is checked of what it is given."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn


def place_of(network: Any) -> tuple[torch.device, torch.dtype]:
    """Where a network computes and in which precision; functions do on the CPU in float32."""
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    device, dtype = (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)
    return getattr(network, "device", device), getattr(network, "dtype", dtype)


def checked_labels(class_labels: Any, size: int) -> Tensor:
    """int64 [size]. Raises ValueError for what are no integers, or another number of them."""
    listed = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
    several = [listed] * size if isinstance(listed, str) or not isinstance(listed, Sequence) else list(listed)
    if not all(isinstance(label, Integral) and not isinstance(label, bool) for label in several):
        raise ValueError(f"class_labels must be integers, one or one per sample, got {class_labels!r}")
    if len(several) != size:
        raise ValueError(f"class_labels has shape ({len(several)},); expected one, or one per sample, ({size},)")
    return torch.tensor(several, device=class_labels.device if isinstance(class_labels, Tensor) else None)


def require_samples(x_start: Tensor, num_levels: int | None) -> None:
    """Raises ValueError for no samples, and for images, which have levels, outside [−1, 1]."""
    if not len(x_start):
        raise ValueError("x_start holds no samples")
    if num_levels is not None and not bool((x_start.abs() <= 1 + 1e-6).all()):
        raise ValueError(f"x_start runs from {float(x_start.min())} to {float(x_start.max())}; it must be in [−1, 1]")


def require_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ValueError, with the name, for what is no integer or outside its range."""
    in_range = isinstance(value, int) and least <= value and (most is None or value <= most)
    if not in_range or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an integer, {least} or more{f', {most} at most' if most else ''}")
