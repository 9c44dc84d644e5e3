"""`speed_up`: a pipeline with a faster network, made from another pipeline."""

from typing import Any

import torch

from ..pipeline_ddpm_paper import DDPMPaperPipeline
from .cpu import FastUNet
from .gpu import GraphedUNet


def speed_up(
    pipe: DDPMPaperPipeline, dtype: torch.dtype = torch.float32, *, compile: bool = False
) -> DDPMPaperPipeline:
    """A pipeline with the same scheduler and the weights that `pipe` has now, for faster sampling.

    The network computes in `dtype`, float32 or bfloat16; x_t stays float32. Not every CPU is faster in bfloat16: try
    it. On a CPU the network becomes a `FastUNet`, on a GPU a `GraphedUNet`. `compile` makes the latter faster still,
    but takes half a minute for every batch size: use it for many samples in batches of one size. The new network takes
    memory in addition (on a CPU up to 2.5 times the weights); delete `pipe` if you do not need it.

    Raises ValueError for other networks than a DDPMPaperUNet, for other precisions and devices, and for `compile` on a
    CPU, where it brings nothing.
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
    sped_up = DDPMPaperPipeline(fast, pipe.scheduler, pipe.config.get("id2label"))
    sped_up.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return sped_up
