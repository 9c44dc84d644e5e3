"""Sampling, step by step or divided among all processes of a run.

Time is 0-based: t = 0 is the paper's t = 1, the last step of sampling.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .pipeline_ddpm_paper import ClassLabels, ReverseStep as ReverseStep
from .pipeline_loading import DDPMPaperPipeline
from .scheduler import whole_process


def reverse_process(
    pipe: DDPMPaperPipeline,
    x_t: Tensor,
    *,
    generators: Sequence[torch.Generator],
    from_timestep: int | None = None,
    num_inference_steps: int | None = None,
    class_labels: ClassLabels = None,
    guidance_scale: float = 1.0,
) -> Iterator[ReverseStep]:
    """Algorithm 2 from x_t down to x_0: x_{t−1} = μ_θ(x_t, t) + σ_t z, one `ReverseStep` after the other.

    From x_T it gives the pipeline's result, bit for bit. Neither the pipeline's scheduler nor the network's mode is
    changed between steps, so several chains can be advanced in turn; a step is computed when it is asked for. The
    chain goes on from what is assigned to `x` of a step, at the timestep that is assigned to `next_t`.

    Args:
        pipe: a pipeline for images or points; a scheduler of stock's is converted to ours.
        x_t: where to start, [B, ...], approximately standard Gaussian at T.
        generators: one per sample, from which z is drawn; see `seeded_generators`.
        from_timestep: t of `x_t`, 0-based, one of the chain's; by default its first.
        num_inference_steps: which chain, by the number of all its steps; by default the scheduler's own.
        class_labels, guidance_scale: as of the pipeline's call.

    Raises ValueError for a timestep that is not in the chain and, at once, for another number of generators than
    samples.
    """
    if len(generators) != len(x_t):
        raise ValueError(f"generators: got {len(generators)} for {len(x_t)} samples; pass one per sample")
    scheduler = copy.copy(whole_process(pipe))
    scheduler.set_timesteps(num_inference_steps)
    if from_timestep is not None and from_timestep not in (timesteps := scheduler.timesteps.tolist()):
        nearest = min(timesteps, key=lambda t: abs(t - from_timestep))
        raise ValueError(
            f"from_timestep={from_timestep} is not one of this chain's {len(timesteps)} timesteps; "
            f"the nearest of them is {nearest}"
        )
    return pipe.reverse_process(
        x_t,
        generator=list(generators),
        scheduler=scheduler,
        from_timestep=from_timestep,
        class_labels=class_labels,
        guidance_scale=guidance_scale,
    )


def sample_together(
    accelerator: Accelerator,
    pipe: DDPMPaperPipeline,
    num_samples: int,
    *,
    num_inference_steps: int | None = None,
    class_labels: Sequence[str | int | None] | Tensor | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Samples of the seeds 0 … num_samples − 1: images [N, C, H, W] in [0, 1], or points [N, d], on every process.

    `class_labels` are given for each seed. Raises ValueError for another number of them.
    Called by all processes at once. A seed's noise does not depend on who draws it, so neither does the result, up to
    the rounding of the kernels that `batch_size`, at most, selects. Where the number of processes does not divide N, a
    few further seeds are drawn and dropped, so that all work equally long.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    class_labels = class_labels.tolist() if isinstance(class_labels, Tensor) else class_labels
    if class_labels is not None and (isinstance(class_labels, str) or len(class_labels) != num_samples):
        raise ValueError(
            f"class_labels must be a list with one for each of {num_samples} samples, got {class_labels!r}"
        )
    num_each = math.ceil(num_samples / world_size)
    seeds = [rank + i * world_size for i in range(num_each)]
    parts = []
    for i in range(0, num_each, batch_size):
        chunk = seeds[i : i + batch_size]
        labels = None if class_labels is None else [class_labels[seed % num_samples] for seed in chunk]
        steps = num_inference_steps
        parts += pipe(seeds=chunk, class_labels=labels, num_inference_steps=steps, output_type="pt", return_dict=False)
    gathered: Any = accelerator.gather(torch.cat(parts))  # by process, then by seed
    by_seed = gathered.view(world_size, num_each, *gathered.shape[1:]).transpose(0, 1).flatten(0, 1)
    return by_seed[:num_samples]
