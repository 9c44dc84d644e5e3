"""Networks that a user may have written, for tests of what takes any network."""

from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image
from torch import Tensor, nn

from ddpm_hf import DDPMPaperUNet


class OwnNet(ModelMixin, ConfigMixin):
    """Two convolutions, with dropout and with a buffer that training changes; (x, t) is all that it takes."""

    @register_to_config
    def __init__(
        self, sample_size: Any = 8, in_channels: int = 1, out_channels: int = 1, width: int = 8, dropout: float = 0.0
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        h = self.norm(self.conv_in(sample)) + timestep.view(-1, 1, 1, 1) / 1000
        return UNet2DOutput(sample=self.conv_out(self.drop(F.silu(h))))


class OwnUNet(DDPMPaperUNet):
    """A subclass of ours, whose output is half as large."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return UNet2DOutput(sample=super().forward(*args, **kwargs).sample / 2)


class Plain(nn.Module):
    """No network of diffusers: (x, t) → a tensor."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(sample)


class OwnPoints(ModelMixin, ConfigMixin):
    """Of points in R^d, which have no size."""

    @register_to_config
    def __init__(self, in_channels: int = 2):
        super().__init__()
        self.linear = nn.Linear(in_channels, in_channels)

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=self.linear(sample))


class FixedSize(OwnNet):
    """Of one size, whatever the data have."""

    @register_to_config
    def __init__(self, in_channels: int = 1):
        super().__init__(sample_size=16, in_channels=in_channels)


class WrongShape(OwnNet):
    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        return UNet2DOutput(sample=F.pad(super().forward(sample, timestep).sample, (1, 0, 1, 0)))


class BareTensor(OwnNet):
    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return super().forward(sample, timestep).sample


class Tuples(OwnNet):
    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return (super().forward(sample, timestep).sample,)


class Fails(OwnNet):
    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return {}["width"]


# ---- data, as module:function ---------------------------------------------------------------------------------------


def stripes(split: str) -> np.ndarray:
    """Grey images uint8 [N, 1, 8, 8], 40 of the training split and 6 of the others."""
    rows = np.arange(40 if split == "train" else 6)
    return (rows[:, None, None, None] * 5 + 8 * np.arange(8)[None, None, None, :] + np.zeros((1, 1, 8, 1))).astype(
        np.uint8
    )


def labelled(split: str) -> datasets.Dataset:
    images = [Image.fromarray(image[0]) for image in stripes(split)]
    return datasets.Dataset.from_dict({"image": images, "kind": [n % 2 for n in range(len(images))]}).cast_column(
        "image", datasets.Image()
    )


def spiral(split: str) -> np.ndarray:
    """Points float32 [50, 2]."""
    angle = np.linspace(0, 6, 50)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32) / 2


def by_name(split: str) -> np.ndarray:
    return {"validation": stripes("test")}[split]


def no_split() -> np.ndarray:
    return stripes("train")


def in_colour(split: str) -> np.ndarray:
    return np.repeat(stripes(split), 3, axis=1)


def nothing(split: str) -> list[int]:
    return [1, 2]
