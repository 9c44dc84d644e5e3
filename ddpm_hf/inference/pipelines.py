"""Faster sampling: a pipeline's network, rewritten for inference on a CPU, or recorded for a GPU.

    pipe = speed_up(DDPMPaperPipeline.from_pretrained(...))         # or speed_up(pipe, torch.bfloat16)

On a GPU the network is a CUDA graph, which Python launches by one call. On a CPU the same weights give the same sum in
another order: images agree with the plain pipeline's to rounding. What is done:

- convolutions and linear layers run in oneDNN with weights that are laid out for it once;
- 3×3 convolutions of wide feature maps by Winograd's F(4, 3) along each row: half of the multiplications;
- a nearest-neighbour upsampling and its 3×3 convolution as one 2×2 convolution of the small image: half of them again;
- what depends on t alone, the time embedding and its projections, from a table, as part of a bias;
- queries, keys and values in one product; residuals added by the kernels; SiLU in place; channels last;
- a batch in parts that fit into the cache.

Which kernel computes a layer is decided by the layer's shape, never by a stopwatch, so results repeat. Where PyTorch
has no oneDNN, its plain kernels do the same. `benchmarks/run.py` compares all of this with stock diffusers.
"""

from typing import Any

import torch

from ..pipeline_ddpm_paper import DDPMPaperPipeline
from .cpu import FastUNet
from .gpu import GraphedUNet


def speed_up(
    pipe: DDPMPaperPipeline, dtype: torch.dtype = torch.float32, *, compile: bool = False
) -> DDPMPaperPipeline:
    """A pipeline with the same scheduler and the weights that `pipe` has now, for faster sampling.

    `dtype`, float32 or bfloat16, is what the network computes in; x_t stays float32. Not every CPU is faster in
    bfloat16: try it. On a CPU the network becomes a `FastUNet`, on a GPU a `GraphedUNet`, which `compile` makes faster
    again: it takes half a minute for every batch size, so it is for many samples in batches of one size. Either takes
    memory of its own (on a CPU up to 2.5 times the weights); drop `pipe` where it is not needed.

    Raises ValueError for other networks than a DDPMPaperUNet, other precisions and devices, and `compile` on a CPU,
    where it brings nothing.
    """
    unet: Any = pipe.unet
    if type(unet).__name__ != "DDPMPaperUNet":  # by name: carried code makes it another class
        raise ValueError(f"only a DDPMPaperUNet can be sped up, not {type(unet).__name__}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not supported; choose torch.float32 or torch.bfloat16")
    kind = unet.device.type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"networks on {kind} cannot be sped up; move the pipeline to 'cpu' or 'cuda'")
    if compile and kind == "cpu":
        raise ValueError("compile=True is for GPUs; leave it out on a CPU")
    if kind == "cpu":
        total = pipe.scheduler.config["num_train_timesteps"]
        fast: Any = FastUNet(unet, compute_dtype=dtype, num_timesteps=total)
    else:
        fast = GraphedUNet(unet, compute_dtype=dtype, compile=compile)
    sped_up = DDPMPaperPipeline(fast, pipe.scheduler)
    sped_up.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return sped_up
