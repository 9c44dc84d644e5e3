"""Kernels for a CPU: convolutions, linear layers and normalizations, with weights laid out once for oneDNN.

Each kernel copies its weights when it is made, and computes when it is called. Where PyTorch has no oneDNN, its plain
kernels compute the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..machine import native

# Winograd's minimal filtering F(4, 3): 4 outputs of a 3-tap filter from 6 products (Lavin & Gray 2016, Section 4).
INPUT_TRANSFORM = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
FILTER_TRANSFORM = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
OUTPUT_TRANSFORM = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
WEIGHTS_PER_TILE = 2**14  # inputs by outputs of a 3×3 convolution: as filters of F(4×4, 3×3) they take 2 MB


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether PyTorch has the oneDNN kernels used here, for this dtype: bfloat16 needs a CPU with AVX-512 or AMX."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Convolution:
    """x [B, C, H, W] → [B, O, H, W], both channels last, with the weights laid out for oneDNN if it is available."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        input_shape: Sequence[int],
        *,
        stride: int = 1,
        padding: int | Sequence[int] = 0,
        groups: int = 1,
    ):
        self.bias = bias
        self.geometry = ([padding] * 2 if isinstance(padding, int) else list(padding), [stride] * 2, [1, 1], groups)
        self.packed = has_onednn(weight.dtype)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight.contiguous(), *self.geometry, list(input_shape)
            )
        else:
            self.weight = weight.contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        if not self.packed:
            padding, stride, dilation, groups = self.geometry
            y = F.conv2d(x, self.weight, bias, stride, padding, dilation, groups)
            return y if residual is None else y.add_(residual)
        convolve = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return convolve(x, self.weight, bias, *self.geometry, "none", [], "")
        return convolve.binary(x, residual, self.weight, bias, *self.geometry, "add", 1.0, None, [], None)


class NativeConvolution:
    """A 3×3 convolution with padding 1, as `Convolution`, by our own kernel, of x enlarged by `scale`."""

    def __init__(self, weight: Tensor, bias: Tensor, *, scale: int = 1):
        self.filters, self.bias, self.scale = native.winograd_filters(weight), bias, scale

    def __call__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        bias = self.bias if bias is None else bias
        return native.convolve(x, self.filters, len(self.bias), bias, residual, scale=self.scale)


class RowWinograd:
    """A 3×3 convolution with padding 1, as `Convolution`, by F(4, 3) along each row; 4 must divide the width.

    The six products of a row's four pixels are six groups of one 3×1 convolution.
    """

    def __init__(self, weight: Tensor, bias: Tensor, input_shape: Sequence[int]):
        parts, channels, height, width = input_shape
        exact = torch.einsum("pk,ochk->poch", torch.tensor(FILTER_TRANSFORM, dtype=torch.float64), weight.double())
        filters = exact.flatten(0, 1).unsqueeze(-1).to(weight.dtype)
        self.out_channels = len(weight)
        self.columns = Convolution(
            filters, self._spread(bias), (parts, 6 * channels, height, width // 4), padding=(1, 0), groups=6
        )
        self.to_products = torch.tensor(INPUT_TRANSFORM, dtype=weight.dtype)
        self.from_products = torch.tensor(OUTPUT_TRANSFORM, dtype=weight.dtype)

    @staticmethod
    def _spread(bias: Tensor) -> Tensor:
        """The bias as a part of the second product, which each of the four outputs contains once."""
        spread = bias.new_zeros(6, len(bias))
        spread[1] = bias
        return spread.flatten()

    def __call__(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1))  # [B, H, W + 2, C]
        windows = rows.as_strided(
            (batch, height, width // 4, 6, channels),
            (rows.stride(0), rows.stride(1), 4 * channels, channels, 1),
        )
        products = torch.matmul(self.to_products, windows.reshape(-1, 6, channels))
        products = products.view(batch, height, width // 4, 6 * channels).permute(0, 3, 1, 2)
        products = self.columns(products, None if bias is None else self._spread(bias))
        products = products.permute(0, 2, 3, 1).reshape(-1, 6, self.out_channels)
        y = torch.matmul(self.from_products, products).view(batch, height, width, self.out_channels)
        y = y.permute(0, 3, 1, 2)
        return y if residual is None else y.add_(residual)


def native_convolution(
    weight: Tensor, bias: Tensor, input_shape: Sequence[int], *, scale: int = 1
) -> NativeConvolution | None:
    """Our kernel for a 3×3 convolution with padding 1 of x enlarged by `scale`, where it is the faster one.

    In bfloat16 Winograd's sums would lose digits.
    """
    outputs, inputs = weight.shape[:2]
    height, width = (side * scale for side in input_shape[2:])
    # few tiles are too little work for so many weights, to be read and kept; of two rows a tile is mostly padding
    tiles = -(-height // 4) * -(-width // 4)
    worth = min(height, width) > 2 and outputs * inputs <= WEIGHTS_PER_TILE * tiles
    if worth and weight.dtype == torch.float32 and native.takes_channels(outputs, inputs):
        return NativeConvolution(weight, bias, scale=scale)
    return None


def convolution_3x3(
    weight: Tensor, bias: Tensor, input_shape: Sequence[int]
) -> Convolution | NativeConvolution | RowWinograd:
    """A 3×3 convolution with padding 1, by the faster kernel for this shape."""
    _, channels, _, width = input_shape
    ours = native_convolution(weight, bias, input_shape)
    if ours is not None:
        return ours
    wide = min(channels, len(weight)) >= 128 and width >= 16 and width % 4 == 0
    if wide and weight.dtype == torch.float32 and has_onednn(weight.dtype):
        return RowWinograd(weight, bias, input_shape)
    return Convolution(weight, bias, input_shape, padding=1)


class Product:
    """x [..., I] → [..., O], a linear layer with the weights laid out for oneDNN if it is available."""

    def __init__(self, weight: Tensor, bias: Tensor, num_rows: int):
        self.bias, self.packed = bias, has_onednn(weight.dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), num_rows) if self.packed else weight

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.packed:
            y = F.linear(x, self.weight, self.bias)
            return y if residual is None else y.add_(residual)
        multiply = torch.ops.mkldnn._linear_pointwise
        if residual is None:
            return multiply(x, self.weight, self.bias, "none", [], "")
        return multiply.binary(x, residual, self.weight, self.bias, "add")


class Normalization:
    """GroupNorm, and SiLU after it if `silu` is true.

    PyTorch's kernel for channels last computes the variance as E[x²] − E[x]², which is off by 0.7 % where the mean is
    300 standard deviations. Networks stay far from that.
    """

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype, *, silu: bool = True):
        self.native = native.takes_channels(norm.num_channels)
        weight, bias = weight_and_bias(norm, torch.float32 if self.native else dtype)
        self.arguments = norm.num_groups, weight, bias, norm.eps
        # with one channel in a group PyTorch's kernel for channels last does not vectorize
        self.single = norm.num_groups == norm.num_channels and dtype == torch.float32
        self.silu = silu

    def __call__(self, x: Tensor) -> Tensor:
        if self.native:
            groups, weight, bias, eps = self.arguments
            return native.normalize(x, weight, bias, groups, eps, silu=self.silu)
        y = self._single(x) if self.single else F.group_norm(x, *self.arguments)
        return F.silu(y, inplace=True) if self.silu else y

    def _single(self, x: Tensor) -> Tensor:
        _, weight, bias, eps = self.arguments
        rows = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        centred = rows - rows.mean((1, 2), keepdim=True)
        scale = (centred * centred).mean((1, 2), keepdim=True).add_(eps).rsqrt_().mul_(weight)
        return torch.addcmul(bias, centred, scale, out=centred).permute(0, 3, 1, 2)


def weight_and_bias(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of a layer's weight and bias."""
    weight, bias = (getattr(layer, name).detach().to(dtype, copy=True) for name in ("weight", "bias"))
    return weight, bias
