"""`speed_up`: a pipeline with a faster network, made from another pipeline."""

from typing import Any, Literal

import torch

from ..pipeline_loading import DDPMPaperPipeline
from ..unet import DDPMPaperUNet
from .cpu import FastUNet
from .gpu import GraphedUNet
from .kernels import has_onednn

DTYPES, DEVICES = (torch.float32, torch.bfloat16), ("cpu", "cuda")


def speed_up(
    pipe: DDPMPaperPipeline,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    *,
    compile: bool = False,
    release: bool = False,
) -> DDPMPaperPipeline:
    """A pipeline with the same scheduler and the weights that `pipe` has now, for faster sampling.

    On a CPU the network becomes a `FastUNet`, on a GPU a `GraphedUNet`.

    Args:
        pipe: with a `DDPMPaperUNet`.
        dtype: what the network computes in, float32 or bfloat16, or "auto", which takes bfloat16 where that is faster
            (`fastest_dtype`). x_t stays float32.
        compile: on a GPU faster still, after half a minute for every batch size: for many samples in batches of one
            size.
        release: take the weights out of `pipe` while they are laid out anew, so that no two copies lie in memory; it
            then draws with the new network too. Else `pipe` stays as it is, and its weights are in memory twice or
            more (Winograd's filters are four times as large as the weights).

    Raises ValueError for other networks than a DDPMPaperUNet, for other precisions and devices, and for `compile` on a
    CPU, where it brings nothing.
    """
    unet: Any = pipe.unet
    kind = unet.device.type
    if type(unet).__name__ != "DDPMPaperUNet":  # by name: carried code makes it another class
        raise ValueError(f"only a DDPMPaperUNet can be sped up, not {type(unet).__name__}")
    if dtype == "auto":
        dtype = fastest_dtype(unet)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported; choose torch.float32, torch.bfloat16 or 'auto'")
    if kind not in DEVICES:
        raise ValueError(f"networks on {kind} cannot be sped up; move the pipeline to 'cpu' or 'cuda'")
    if compile and kind == "cpu":
        raise ValueError("compile=True is for GPUs; leave it out on a CPU")
    if kind == "cpu":
        total = pipe.scheduler.config["num_train_timesteps"]
        fast: Any = FastUNet(unet, compute_dtype=dtype, num_timesteps=total, release=release)
    else:
        fast = GraphedUNet(unet, compute_dtype=dtype, compile=compile, release=release)
    if release:
        pipe.register_modules(unet=fast)
    sped_up = DDPMPaperPipeline(
        fast, pipe.scheduler, *(pipe.config.get(name) for name in ("id2label", "num_inference_steps"))
    )
    sped_up.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return sped_up


def can_speed_up(pipe: DDPMPaperPipeline, dtype: torch.dtype | Literal["auto"] = torch.float32) -> bool:
    """Whether `speed_up` takes it."""
    known = type(pipe.unet).__name__ == "DDPMPaperUNet" and dtype in (*DTYPES, "auto")
    return known and pipe.unet.device.type in DEVICES


def fastest_dtype(unet: DDPMPaperUNet) -> torch.dtype:
    """bfloat16 where the device multiplies it faster, else float32; by its instructions, so that results repeat.

    Of CPUs those with AMX do, for networks of 128 channels and more. Those with AVX-512's bfloat16 alone hardly do:
    Winograd's algorithm, which only float32 has the digits for, is about as fast.
    """
    if unet.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    wide = min(unet.config["block_out_channels"]) >= 128
    return torch.bfloat16 if has_amx and wide and has_onednn(torch.bfloat16) else torch.float32
