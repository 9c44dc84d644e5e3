"""The networks of the benchmark, ours and stock's with the same weights."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import DDPMPaperUNet

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "model_cards" / "ddpm-digits"

CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "attention_resolutions": (16,),
}
SIDE_28: dict[str, Any] = {  # of one channel, as MNIST and Fashion-MNIST have
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 128),
    "attention_resolutions": (7,),
}
SMALL: dict[str, Any] = {"sample_size": 16, "block_out_channels": (32, 64, 64), "attention_resolutions": (8,)}


def with_working_branches(module: nn.Module) -> nn.Module:
    """The module with random weights that keep the size of what they are applied to; the same every time.

    The paper's initialisation leaves most branches almost 0, so that a fault in them would not show.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise.to(parameter.device))
    return module


def build_unet(**config: Any) -> DDPMPaperUNet:
    return with_working_branches(DDPMPaperUNet(**config)).eval()  # type: ignore[return-value]


@cache
def _counted(config: tuple[tuple[str, Any], ...]) -> tuple[int, float]:
    with torch.device("meta"):
        unet = DDPMPaperUNet(**dict(config))
        side: Any = unet.config["sample_size"]
        x_t, t = torch.zeros(1, unet.config["in_channels"], side, side), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x_t, t)
    return sum(parameter.numel() for parameter in unet.parameters()), float(counter.get_total_flops())


def counted(config: Mapping[str, Any]) -> tuple[int, float]:
    """Parameters, and operations of one image's forward pass (a product and its sum are two), without computing."""
    return _counted(tuple(config.items()))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """√(mean (actual − expected)² / mean expected²)."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def largest(actual: Any, expected: Any) -> float:
    """max |actual − expected|."""
    actual, expected = (torch.as_tensor(x).detach().double().cpu() for x in (actual, expected))
    if actual.shape != expected.shape:
        raise ValueError(f"results have shapes {tuple(actual.shape)} and {tuple(expected.shape)}")
    return float((actual - expected).abs().max())
