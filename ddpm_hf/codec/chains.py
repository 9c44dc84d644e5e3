"""The chain of steps that codes images: its scheduler, a short chain fitted to images, and the bound to expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import to_model_range
from ..likelihood import BoundTerms, bits_per_dim
from ..pipeline_loading import DDPMPaperPipeline
from ..scheduler import DDPMPaperScheduler, whole_process
from ..short_chains import shortened


def fit_chain(
    pipe: DDPMPaperPipeline,
    levels: Tensor | np.ndarray,
    num_steps: int,
    *,
    num_levels: int = 256,
    progress: bool = False,
) -> dict[str, list]:
    """`num_steps` timesteps for images like `levels` [N, C, H, W], and the errors of x̂_0 there, rounded to 3 digits.

    `compress` takes them as its `chain` and stores them in the file; `ddpm-hf shorten` computes the same from training
    data. Every image goes through the whole chain once, so pass some dozens. Raises ValueError as `shortened`.
    """
    terms = bound(pipe, levels, num_levels=num_levels, progress=progress)
    short = shortened(pipe.scheduler, terms.x_start_mse_bt.mean(dim=0), num_steps=num_steps, num_levels=num_levels)
    mse = [float(f"{value:.3g}") for value in short.config["x_start_mse"]]
    return {"inference_timesteps": list(short.config["inference_timesteps"]), "x_start_mse": mse}


def bound(
    pipe: DDPMPaperPipeline,
    levels: Tensor | np.ndarray,
    *,
    num_levels: int = 256,
    chain: Mapping[str, list] | None = None,
    progress: bool = False,
) -> BoundTerms:
    """The bound (Eq. 5) of images under the chain that codes them: about what `compress` will need, much sooner."""
    scheduler = coding_scheduler(pipe, chain)
    x_start, clip = to_model_range(torch.tensor(np.asarray(levels)), num_levels), scheduler.clip_denoised()
    return bits_per_dim(
        pipe.unet, scheduler, x_start, seed=0, num_levels=num_levels, clip_denoised=clip, progress=progress
    )


def coding_scheduler(pipe: DDPMPaperPipeline, chain: Mapping[str, Any] | None) -> DDPMPaperScheduler:
    """The pipeline's scheduler, with the timesteps and variances of `chain` where there is one."""
    scheduler = whole_process(pipe)
    if chain is None:
        return scheduler
    short: Any = DDPMPaperScheduler.from_config(scheduler.config, variance_type="fitted", **chain)
    return short
