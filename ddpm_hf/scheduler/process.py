"""Any scheduler of a DDPM → a scheduler of ours; the process between its timesteps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .scheduling_ddpm_paper import DDPMPaperScheduler, GaussianDiffusion


def paper_scheduler(scheduler: Any) -> Any:
    """The scheduler itself where it has the paper's process; else (stock's) ours, built from its configuration.

    Raises ValueError for one that is not a DDPM's, and for stock's `learned` variance, which has another meaning here.
    """
    if hasattr(scheduler, "diffusion"):
        return scheduler
    name = type(scheduler).__name__
    if name not in DDPMPaperScheduler._compatibles:
        raise ValueError(f"{name} is not a scheduler of a DDPM: it must be one of {DDPMPaperScheduler._compatibles}")
    if scheduler.config.get("variance_type") == "learned":
        raise ValueError(f"variance_type='learned' of {name} is not a log-variance; it has no equivalent here")
    return DDPMPaperScheduler.from_config(scheduler.config)


def distilled_steps(pipe: Any) -> int | None:
    """For how many steps the pipeline's network was distilled, so that it knows their timesteps alone; None if not."""
    return None if hasattr(pipe.scheduler, "diffusion") else pipe.config.get("num_inference_steps")


def whole_process(pipe: Any) -> Any:
    """The pipeline's scheduler as one of ours, for what asks its network at timesteps of our choice.

    Raises ValueError for a distilled network, which knows only those of its own few steps.
    """
    if (steps := distilled_steps(pipe)) is not None:
        raise ValueError(
            f"this model was distilled for the timesteps of {steps} steps, and knows no others; take the one that it "
            "was distilled from"
        )
    return paper_scheduler(pipe.scheduler)


def alphas_cumprod_at(diffusion: GaussianDiffusion, t: Tensor | float) -> Tensor:
    """ᾱ(t) for real t in [0, T − 1], 0-based: float64 of t's shape, on the CPU; at integers the table's bits.

    In between log ᾱ is linear, so that ᾱ falls at the constant rate β; where ᾱ_T = 0, ᾱ itself is linear on the way
    there. Raises ValueError for t outside.
    """
    t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    if not bool(((t >= 0) & (t <= diffusion.num_timesteps - 1)).all()):
        raise ValueError(f"t={t.tolist()} leaves [0, {diffusion.num_timesteps - 1}]")
    table, fraction = torch.tensor(diffusion.alphas_cumprod), t - t.floor()
    before, after = table[t.floor().long()], table[t.ceil().long()]
    return torch.where(after > 0, before * (after / before) ** fraction, before * (1 - fraction) + after * fraction)


def timestep_at(diffusion: GaussianDiffusion, alpha_cumprod: float) -> float:
    """The real t in [0, T − 1], 0-based, at which `alphas_cumprod_at` is `alpha_cumprod`: its inverse.

    Raises ValueError for values outside the table by more than rounding.
    """
    table = diffusion.alphas_cumprod
    if not table[-1] * (1 - 1e-9) <= alpha_cumprod <= table[0] * (1 + 1e-9):
        raise ValueError(f"alpha_cumprod={alpha_cumprod} leaves [{table[-1]}, {table[0]}]")
    before = int(np.clip(np.searchsorted(-table, -alpha_cumprod) - 1, 0, max(len(table) - 2, 0)))
    high, low = float(table[before]), float(table[min(before + 1, len(table) - 1)])
    if high == low:
        return float(before)
    if low > 0:
        fraction = math.log(high / alpha_cumprod) / math.log(high / low)
    else:
        fraction = (high - alpha_cumprod) / high
    return before + min(max(fraction, 0.0), 1.0)
