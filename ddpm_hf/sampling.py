"""Sampling shared by all processes of a run: each draws a part of the seeds, and everyone gets the whole."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .pipeline_ddpm_paper import DDPMPaperPipeline


def sample_together(
    accelerator: Accelerator,
    pipe: DDPMPaperPipeline,
    num_samples: int,
    *,
    num_inference_steps: int | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Samples of the seeds 0 … num_samples − 1: images [N, C, H, W] in [0, 1], or points [N, d], on every process.

    Called by all processes at once. A seed's noise does not depend on who draws it, so neither does the result, up to
    the rounding of the kernels that `batch_size`, at most, selects. Where the number of processes does not divide N, a
    few further seeds are drawn and dropped, so that all work equally long.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    num_each = math.ceil(num_samples / world_size)
    seeds = [rank + i * world_size for i in range(num_each)]
    parts = []
    for i in range(0, num_each, batch_size):
        chunk = seeds[i : i + batch_size]
        parts += pipe(seeds=chunk, num_inference_steps=num_inference_steps, output_type="pt", return_dict=False)
    gathered: Any = accelerator.gather(torch.cat(parts))  # by process, then by seed
    by_seed = gathered.view(world_size, num_each, *gathered.shape[1:]).transpose(0, 1).flatten(0, 1)
    return by_seed[:num_samples]
