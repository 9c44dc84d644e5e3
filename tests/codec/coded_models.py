"""Tiny networks, and images of noise for them to code."""

import numpy as np
import torch

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet


def tiny_pipe(channels: int = 1, side: int = 8, seed: int = 0, **scheduler) -> DDPMPaperPipeline:
    """Random weights, four steps."""
    torch.manual_seed(seed)
    unet = DDPMPaperUNet(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        attention_resolutions=(side // 2,),
        norm_num_groups=2,
    )
    with torch.no_grad():  # the paper's initialisation leaves its output almost 0
        for parameter in unet.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    config = {"num_train_timesteps": 4, "beta_start": 0.02, "beta_end": 0.9, **scheduler}
    return DDPMPaperPipeline(unet, DDPMPaperScheduler(**config))


def noise_levels(num: int, pipe: DDPMPaperPipeline, num_levels: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_levels, (num, *pipe.sample_shape))
