"""A network for sampling on a CPU."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..unet.unet_ddpm_paper import (
    DDPMPaperUNet,
    Downsample,
    ResnetBlock,
    SelfAttention,
    Upsample,
    sinusoidal_embedding,
)
from .network import _sample_shape, _SamplingNetwork

BYTES_PER_PART = 2**21  # of the widest activation: what a core's cache holds, with the layer's other tensors

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


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


class Convolution:
    """x [B, C, H, W] → [B, O, H, W], both channels last, with the weights laid out for oneDNN where it is there."""

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
        self.packed = has_onednn()
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


class RowWinograd:
    """A 3×3 convolution with padding 1 as `Convolution`, by F(4, 3) along each row; the width divides by 4.

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
        """The bias as one of the six products: of the second, which each of the four outputs contains once."""
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


class UpsampleConvolution:
    """Nearest neighbour ×2 and a 3×3 convolution, as one 2×2 convolution to four images, one for each parity."""

    def __init__(self, layer: Upsample, size: tuple[int, int, int], dtype: torch.dtype):
        weight, bias = _cast(layer.conv, dtype)
        rows, height, width = size
        # an output row of parity a sees the rows i − 1 + a and i + a of the small image, through sums of three taps
        taps = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float64)
        exact = torch.einsum("aik,bjl,ockl->abocij", taps, taps, layer.conv.weight.detach().double())
        self.out_channels = len(weight)
        self.convolution = Convolution(
            exact.flatten(0, 2).to(dtype), bias.repeat(4), (rows, weight.shape[1], height, width), padding=1
        )

    def __call__(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        four = self.convolution(x).permute(0, 2, 3, 1).unflatten(3, (2, 2, self.out_channels))
        y = x.new_empty(batch, height, 2, width, 2, self.out_channels)
        for a in range(2):
            for b in range(2):
                y[:, :, a, :, b] = four[:, a : a + height, b : b + width, a, b]
        return y.view(batch, 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)


class Product:
    """x [..., I] → [..., O], a linear layer with the weights laid out for oneDNN where it is there."""

    def __init__(self, weight: Tensor, bias: Tensor, num_rows: int):
        self.bias, self.packed = bias, has_onednn()
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
    """GroupNorm, with SiLU where asked for.

    PyTorch's kernel for channels last takes E[x²] − E[x]² for the variance: with a mean of 300 standard deviations
    0.7 per cent is lost. Networks stay far from that.
    """

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype, *, silu: bool = True):
        weight, bias = _cast(norm, dtype)
        self.arguments = norm.num_groups, weight, bias, norm.eps
        # with one channel in a group PyTorch's kernel for channels last does not vectorize
        self.single = norm.num_groups == norm.num_channels and dtype == torch.float32
        self.silu = silu

    def __call__(self, x: Tensor) -> Tensor:
        y = self._single(x) if self.single else F.group_norm(x, *self.arguments)
        return F.silu(y, inplace=True) if self.silu else y

    def _single(self, x: Tensor) -> Tensor:
        _, weight, bias, eps = self.arguments
        rows = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        centred = rows - rows.mean((1, 2), keepdim=True)
        scale = (centred * centred).mean((1, 2), keepdim=True).add_(eps).rsqrt_().mul_(weight)
        return torch.addcmul(bias, centred, scale, out=centred).permute(0, 3, 1, 2)


def _cast(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of a layer's weight and bias."""
    weight, bias = (getattr(layer, name).detach().to(dtype, copy=True) for name in ("weight", "bias"))
    return weight, bias


# ---- the network ---------------------------------------------------------------------------------------------------


def convolution_3x3(weight: Tensor, bias: Tensor, input_shape: Sequence[int]) -> Convolution | RowWinograd:
    """With padding 1, by the faster kernel for this shape. In bfloat16 Winograd's sums would lose too many digits."""
    _, channels, _, width = input_shape
    wide = min(channels, len(weight)) >= 128 and width >= 16 and width % 4 == 0
    if wide and weight.dtype == torch.float32 and has_onednn():
        return RowWinograd(weight, bias, input_shape)
    return Convolution(weight, bias, input_shape, padding=1)


class Residual:
    """`ResnetBlock`; its time embedding is a bias of the first convolution."""

    def __init__(self, block: ResnetBlock, size: tuple[int, int, int], dtype: torch.dtype):
        rows, height, width = size
        weight_1, own_bias = _cast(block.conv1, dtype)  # this bias is a part of `time_bias`
        weight_2, bias_2 = _cast(block.conv2, dtype)
        outputs, inputs = weight_1.shape[:2]
        self.norm1, self.norm2 = Normalization(block.norm1, dtype), Normalization(block.norm2, dtype)
        self.conv1 = convolution_3x3(weight_1, torch.zeros_like(own_bias), (rows, inputs, height, width))
        self.conv2 = convolution_3x3(weight_2, bias_2, (rows, outputs, height, width))
        self.shortcut = None
        if block.conv_shortcut is not None:
            self.shortcut = Convolution(*_cast(block.conv_shortcut, dtype), (rows, inputs, height, width))

    def __call__(self, x: Tensor, time_bias: Tensor) -> Tensor:
        """`time_bias`: [O] where all samples have the same t, else [B, O]."""
        h = self.norm1(x)
        h = self.conv1(h, time_bias) if time_bias.ndim == 1 else self.conv1(h).add_(time_bias[:, :, None, None])
        return self.conv2(self.norm2(h), residual=x if self.shortcut is None else self.shortcut(x))


class Attention:
    """`SelfAttention`."""

    def __init__(self, attention: SelfAttention, size: tuple[int, int, int], dtype: torch.dtype):
        self.norm = Normalization(attention.group_norm, dtype, silu=False)
        projections = [_cast(layer, dtype) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        weight, bias = (torch.cat(tensors) for tensors in zip(*projections, strict=True))
        self.to_qkv = Product(weight, bias, math.prod(size))
        self.to_out = Product(*_cast(attention.to_out[0], dtype), math.prod(size))

    def __call__(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = batch, height * width, channels
        qkv = self.to_qkv(self.norm(x).permute(0, 2, 3, 1).reshape(rows))
        q, k, v = qkv.view(batch, 1, height * width, 3, channels).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v).reshape(rows)
        y = self.to_out(h, x.permute(0, 2, 3, 1).reshape(rows))
        return y.view(batch, height, width, channels).permute(0, 3, 1, 2)


class DownsampleConvolution:
    """`Downsample`."""

    def __init__(self, layer: Downsample, size: tuple[int, int, int], dtype: torch.dtype):
        rows, height, width = size
        weight, bias = _cast(layer.conv, dtype)
        self.convolution = Convolution(weight, bias, (rows, weight.shape[1], height + 1, width + 1), stride=2)

    def __call__(self, x: Tensor) -> Tensor:
        rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1))
        return self.convolution(rows.permute(0, 3, 1, 2))


class TimeBias:
    """What t adds in every residual block to the first convolution, whose own bias is included.

    For t = 0 … T−1 from a table [T, ΣO].
    """

    def __init__(self, unet: DDPMPaperUNet, blocks: Sequence[ResnetBlock], num_timesteps: int, dtype: torch.dtype):
        embedding = unet.time_embedding
        self.layers = _cast(embedding.linear_1, torch.float32), _cast(embedding.linear_2, torch.float32)
        weights, biases = zip(*(_cast(block.time_emb_proj, torch.float32) for block in blocks), strict=True)
        own = [_cast(block.conv1, torch.float32)[1] for block in blocks]
        self.projection = torch.cat(weights), torch.cat(biases) + torch.cat(own)
        self.widths = [len(bias) for bias in biases]
        self.dtype = dtype
        self.table = self._computed(torch.arange(num_timesteps))
        self.rows: dict[int, tuple[Tensor, ...]] = {}

    def _computed(self, timestep: Tensor) -> Tensor:
        (weight_1, bias_1), (weight_2, bias_2) = self.layers
        h = sinusoidal_embedding(timestep, weight_1.shape[1])
        h = F.linear(F.silu(F.linear(h, weight_1, bias_1)), weight_2, bias_2)
        return F.linear(F.silu(h), *self.projection).to(self.dtype)

    def __call__(self, timestep: Tensor) -> tuple[Tensor, ...]:
        """One bias for each block: [O] for a t that all samples share, else [B, O]. `timestep` is [B]."""
        times = timestep.tolist()
        same = len(set(times)) == 1
        whole = not timestep.is_floating_point() and 0 <= min(times) and max(times) < len(self.table)
        if not same:
            biases = self.table[timestep] if whole else self._computed(timestep)
            return biases.split(self.widths, dim=1)
        if not whole:
            return self._computed(timestep[:1])[0].split(self.widths)
        if times[0] not in self.rows:
            self.rows[times[0]] = self.table[times[0]].split(self.widths)  # views
        return self.rows[times[0]]


class FastUNet(_SamplingNetwork):
    """A network for a CPU, with copies of the weights in its kernels' own layouts."""

    def __init__(self, unet: DDPMPaperUNet, *, compute_dtype: torch.dtype, num_timesteps: int):
        super().__init__()
        self.config, self.compute_dtype, self._device = unet.config, compute_dtype, torch.device("cpu")
        self.sample_shape = _sample_shape(unet)
        _, height, width = self.sample_shape
        first = unet.conv_in.out_channels
        self.rows_per_part = max(1, BYTES_PER_PART // (first * height * width * compute_dtype.itemsize))
        size = self.rows_per_part, height, width

        self._conv_in = self._convolution(unet.conv_in, size)
        self._down: list[tuple[list[Layer], DownsampleConvolution | None]] = []
        down_blocks: Any = unet.down_blocks
        up_blocks: Any = unet.up_blocks
        for down in down_blocks:
            layers, downsample = self._layers(down, size), None
            for module in down.downsamplers:
                downsample = DownsampleConvolution(module, size, compute_dtype)
                size = size[0], size[1] // 2, size[2] // 2
            self._down.append((layers, downsample))
        self._middle = self._layers(unet.mid_block, size)
        self._up: list[tuple[list[Layer], UpsampleConvolution | None]] = []
        for up in up_blocks:
            layers, upsample = self._layers(up, size), None
            for module in up.upsamplers:
                upsample = UpsampleConvolution(module, size, compute_dtype)
                size = size[0], size[1] * 2, size[2] * 2
            self._up.append((layers, upsample))
        self._norm_out = Normalization(unet.conv_norm_out, compute_dtype)
        self._conv_out = self._convolution(unet.conv_out, size)
        blocks: list[Any] = [block for level in (*down_blocks, unet.mid_block, *up_blocks) for block in level.resnets]
        self._time_bias = TimeBias(unet, blocks, num_timesteps, compute_dtype)

    def _convolution(self, layer: nn.Conv2d, size: tuple[int, int, int]) -> Convolution | RowWinograd:
        rows, height, width = size
        weight, bias = _cast(layer, self.compute_dtype)
        shape = rows, weight.shape[1], height, width
        return convolution_3x3(weight, bias, shape)

    def _layers(self, level: Any, size: tuple[int, int, int]) -> "list[Layer]":
        """The level's residual blocks, each with the attention that follows it."""
        residuals = [Residual(block, size, self.compute_dtype) for block in level.resnets]
        attentions = [Attention(module, size, self.compute_dtype) for module in level.attentions]
        return list(itertools.zip_longest(residuals, attentions))  # the middle has attention after its first alone

    def _forward(self, sample: Tensor, t: Tensor) -> Tensor:
        biases = self._time_bias(t)
        x = sample.to(self.compute_dtype).contiguous(memory_format=torch.channels_last)
        parts = []
        for i in range(0, len(x), self.rows_per_part):
            rows = slice(i, i + self.rows_per_part)
            parts.append(self._part(x[rows], iter([b if b.ndim == 1 else b[rows] for b in biases])))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).float().contiguous()

    def _part(self, x: Tensor, biases: Iterator[Tensor]) -> Tensor:
        x = self._conv_in(x)
        skips = [x]
        for layers, downsample in self._down:
            for layer in layers:
                x = _layer(layer, x, biases)
                skips.append(x)
            if downsample is not None:
                x = downsample(x)
                skips.append(x)
        for layer in self._middle:
            x = _layer(layer, x, biases)
        for layers, upsample in self._up:
            for layer in layers:
                x = _layer(layer, torch.cat([x, skips.pop()], dim=1), biases)
            if upsample is not None:
                x = upsample(x)
        return self._conv_out(self._norm_out(x))


Layer = tuple[Residual, Attention | None]


def _layer(layer: Layer, x: Tensor, biases: Iterator[Tensor]) -> Tensor:
    residual, attention = layer
    x = residual(x, next(biases))
    return x if attention is None else attention(x)
