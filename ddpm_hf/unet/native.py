"""A `DDPMPaperUNet` that trains with our own kernels on a CPU: the same weights and sums, in another order."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..machine.native import Convolve, Normalize, takes_channels
from .unet_ddpm_paper import DDPMPaperUNet, ResnetBlock, Upsample


def use_native_kernels(unet: Any) -> bool:
    """Let the network's layers compute with our kernels, in float32 on a CPU; weights and their names stay.

    Returns whether it does: the kernels need a compiler, and numbers of channels that they take.
    """
    if not isinstance(unet, DDPMPaperUNet) or not takes_channels(*unet.config["block_out_channels"]):
        return False
    for module in unet.modules():
        module.__class__ = NATIVE.get(type(module), type(module))
        if isinstance(module, NativeResnetBlock) and module.conv_shortcut is not None:
            module.conv_shortcut.__class__ = PointwiseConvolution
    unet.conv_in.__class__ = ChannelsLastConvolution
    return True


def _fits(layer: nn.Module, x: Tensor) -> bool:
    """Whether the kernels take it; a network that was moved or cast since computes as before."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, next(layer.parameters())))


class NativeResnetBlock(ResnetBlock):
    """`ResnetBlock`, whose time embedding is part of the first convolution's bias, and the shortcut of the second."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if not _fits(self, x):
            return super().forward(x, temb)
        bias = self.conv1.bias + self.time_emb_proj(F.silu(temb))
        h = _convolve(self.conv1, _norm(self.norm1, x, silu=True), bias)
        h = _dropped(_norm(self.norm2, h, silu=True), self.dropout)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return _convolve(self.conv2, h, self.conv2.bias, shortcut)


class NativeGroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return _norm(self, input, silu=False) if _fits(self, input) else super().forward(input)


class NativeUpsample(Upsample):
    def forward(self, x: Tensor) -> Tensor:
        if not _fits(self, x):
            return super().forward(x)
        return _convolve(self.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"), self.conv.bias)


class PointwiseConvolution(nn.Conv2d):
    """1×1, as a product of matrices."""

    def forward(self, input: Tensor) -> Tensor:
        if not _fits(self, input):
            return super().forward(input)
        rows = input.permute(0, 2, 3, 1)
        return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ChannelsLastConvolution(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.contiguous(memory_format=torch.channels_last) if _fits(self, input) else input)


NATIVE: dict[type, type] = {
    ResnetBlock: NativeResnetBlock,
    Upsample: NativeUpsample,
    nn.GroupNorm: NativeGroupNorm,
}


def _convolve(layer: nn.Conv2d, x: Tensor, bias: Any, residual: Tensor | None = None) -> Tensor:
    """`layer` with another bias, [O] or [B, O], and a sum. Of images below 3×3 a tile would be mostly padding."""
    if min(x.shape[2:]) > 2:
        return Convolve.apply(x, layer.weight, bias, residual)
    y = F.conv2d(x, layer.weight, padding=1) + bias.reshape(-1, len(layer.weight), 1, 1)
    return y if residual is None else y + residual


def _norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool) -> Tensor:
    return Normalize.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def _dropped(h: Tensor, dropout: nn.Dropout) -> Tensor:
    """As `dropout`, with the same draws at the same places: PyTorch would draw in the order of memory."""
    if not dropout.training or dropout.p == 0:
        return h
    kept = torch.empty(h.shape, dtype=h.dtype).bernoulli_(1 - dropout.p).div_(1 - dropout.p)
    return h * kept.contiguous(memory_format=torch.channels_last)
