"""The kernels as functions of tensors; shapes [B, C, H, W], channels last."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .build import library

BLOCK = 48  # tiles at a time: their products fit in the cache of one core

# the arguments of each: p a tensor's memory, n an integer, i a C int, d a double
SIGNATURES = {
    "winograd_filters": "ppnni",
    "winograd": "pppnppnnnnnin",
    "winograd_weight_gradient": "pppnnnnnn",
    "norm_silu": "pppppnnnndi",
    "norm_silu_bfloat16": "pppppnnnndi",
    "norm_silu_gradient": "ppppppppnnnni",
}
TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "d": ctypes.c_double}


@functools.cache
def _kernels() -> dict[str, Any]:
    compiled = library()
    if compiled is None:
        return {}
    for name, letters in SIGNATURES.items():
        function = getattr(compiled, name)
        function.argtypes, function.restype = [TYPES[letter] for letter in letters], None
    return {name: getattr(compiled, name) for name in SIGNATURES} | {"panel": compiled.panel()}


def has_kernels() -> bool:
    return bool(_kernels())


def takes_channels(*channels: int) -> bool:
    """Whether there are kernels, and they take so many channels: multiples of 32 with AVX-512, else of 16."""
    return bool(_kernels()) and all(number % _kernels()["panel"] == 0 for number in channels)


def winograd_filters(weight: Tensor, *, turned: bool = False) -> Tensor:
    """float32 [O, I, 3, 3] → what `convolve` takes, four times as large; `turned` for the gradient of the input."""
    weight = weight.contiguous()
    outputs, inputs = weight.shape[:2]
    filters = weight.new_empty(36 * outputs * inputs)
    _kernels()["winograd_filters"](_pointer(weight), _pointer(filters), outputs, inputs, turned)
    return filters


def convolve(
    x: Tensor,
    filters: Tensor,
    out_channels: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scale: int = 1,
) -> Tensor:
    """A 3×3 convolution with padding 1, of x [B, I, H, W] → [B, O, scale H, scale W]: float32, channels last.

    `bias` is [O], or [B, O]; `residual` has the result's shape. x is enlarged by its nearest neighbours first.
    """
    x = _channels_last(x)
    batch, inputs, height, width = x.shape
    height, width = height * scale, width * scale
    y = _empty(batch, out_channels, height, width)
    if residual is not None:
        residual = _channels_last(residual)
    if bias is not None:
        bias = bias.contiguous()
    tiles = batch * -(-height // 4) * -(-width // 4)
    _kernels()["winograd"](
        _pointer(x), _pointer(filters), _pointer(bias), out_channels if bias is not None and bias.ndim == 2 else 0,
        _pointer(residual), _pointer(y), batch, height, width, inputs, out_channels, scale, min(BLOCK, tiles),
    )  # fmt: skip
    return y


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """Of `convolve`: x [B, I, H, W] and dy [B, O, H, W] → [O, I, 3, 3]."""
    x, dy = _channels_last(x), _channels_last(dy)
    batch, inputs, height, width = x.shape
    outputs = dy.shape[1]
    dw = x.new_empty(outputs, inputs, 3, 3)
    _kernels()["winograd_weight_gradient"](
        _pointer(x), _pointer(dy), _pointer(dw), batch, height, width, inputs, outputs, BLOCK
    )
    return dw


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool, moments: Tensor | None = None
) -> Tensor:
    """GroupNorm, then SiLU if `silu`, of float32 or bfloat16 x; weight and bias are float32.

    `moments` [B, groups, 2] gets mean and 1 / √(variance + eps).
    """
    x = _channels_last(x)
    batch, channels, height, width = x.shape
    y = torch.empty_like(x)
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    _kernels()["norm_silu" if dtype == torch.float32 else "norm_silu_bfloat16"](
        _pointer(x, dtype), _pointer(y, dtype), _pointer(weight), _pointer(bias), _pointer(moments), batch,
        height * width, channels, groups, eps, silu,
    )  # fmt: skip
    return y


def normalize_gradient(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `normalize`, with respect to x, weight and bias."""
    dy = _channels_last(dy)
    batch, channels, height, width = x.shape
    dx = torch.empty_like(x)
    parts = x.new_empty(2, batch, channels)
    _kernels()["norm_silu_gradient"](
        _pointer(x), _pointer(dy), _pointer(weight), _pointer(bias), _pointer(moments), _pointer(dx),
        _pointer(parts[0]), _pointer(parts[1]), batch, height * width, channels, moments.shape[1], silu,
    )  # fmt: skip
    dweight, dbias = parts.sum(1)
    return dx, dweight, dbias


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _pointer(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    """Where its memory is. Raises TypeError for other numbers, of which a kernel would read beyond the end."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.device.type != "cpu":
        raise TypeError(f"the kernels compute in {dtype} on the CPU, not in {tensor.dtype} on {tensor.device}")
    return tensor.data_ptr()
