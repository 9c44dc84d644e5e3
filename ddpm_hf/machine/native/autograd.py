"""The kernels with their gradients, for training."""

from typing import Any

import torch
from torch import Tensor

from .ops import convolve, normalize, normalize_gradient, weight_gradient, winograd_filters


class Convolve(torch.autograd.Function):
    """`apply(x, weight, bias, residual)`: a 3×3 convolution with padding 1, and a sum. float32, channels last.

    `bias` is [O], or [B, O]; `residual` has the shape of the result, or is None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.summed = (0, 2, 3) if bias.ndim == 1 else (2, 3)
        return convolve(x, winograd_filters(weight), len(weight), bias, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_residual = (*ctx.needs_input_grad, False)[:4]
        return (
            convolve(dy, winograd_filters(weight, turned=True), weight.shape[1]) if wants_x else None,
            weight_gradient(x, dy) if wants_weight else None,
            dy.sum(ctx.summed) if wants_bias else None,
            dy if wants_residual else None,
        )


class Normalize(torch.autograd.Function):
    """`apply(x, weight, bias, groups, eps, silu)`: GroupNorm, and SiLU if `silu`. float32, channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        moments = x.new_empty(len(x), groups, 2)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.silu = silu
        return normalize(x, weight, bias, groups, eps, silu=silu, moments=moments)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        return *normalize_gradient(x, dy, weight, bias, moments, silu=ctx.silu), None, None, None
