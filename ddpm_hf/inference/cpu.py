"""A network for sampling on a CPU: the layers of `DDPMPaperUNet`, put together from `kernels`."""

import copy
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..machine import return_freed_memory
from ..unet.unet_ddpm_paper import (
    DDPMPaperUNet,
    Downsample,
    ResnetBlock,
    SelfAttention,
    Upsample,
    sinusoidal_embedding,
)
from .kernels import (
    Convolution,
    NativeConvolution,
    Normalization,
    Product,
    RowWinograd,
    convolution_3x3,
    native_convolution,
    weight_and_bias,
)
from .network import SamplingNetwork, sample_shape_of

TABLE_BYTES = 2**28  # of biases by t and class
BYTES_PER_PART = 2**21  # of the widest activation, which then fits in a core's cache with the layer's other tensors

Layer = tuple["Residual", "Attention | None"]  # a residual block, and the attention after it


class FastUNet(SamplingNetwork):
    """ε_θ(x_t, t) on a CPU, with copies of the weights in its kernels' own layouts.

    With `release`, `unet` loses each weight as soon as it is copied, and cannot be used any more.
    """

    def __init__(self, unet: DDPMPaperUNet, *, compute_dtype: torch.dtype, num_timesteps: int, release: bool = False):
        super().__init__()
        self._release = release
        self.config, self.compute_dtype, self._device = unet.config, compute_dtype, torch.device("cpu")
        self.class_embedding = copy.deepcopy(unet.class_embedding)
        self.sample_shape = sample_shape_of(unet)
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
                downsample = self._packed(DownsampleConvolution, module, size)
                size = size[0], size[1] // 2, size[2] // 2
            self._down.append((layers, downsample))
        self._middle = self._layers(unet.mid_block, size)
        self._up: list[tuple[list[Layer], NativeConvolution | UpsampleConvolution | None]] = []
        for up in up_blocks:
            layers, upsample = self._layers(up, size), None
            for module in up.upsamplers:
                upsample = self._packed(upsample_convolution, module, size)
                size = size[0], size[1] * 2, size[2] * 2
            self._up.append((layers, upsample))
        self._norm_out = Normalization(unet.conv_norm_out, compute_dtype)
        self._conv_out = self._convolution(unet.conv_out, size)
        blocks: list[Any] = [block for level in (*down_blocks, unet.mid_block, *up_blocks) for block in level.resnets]
        self._time_bias = TimeBias(unet, blocks, num_timesteps, compute_dtype)

    def _convolution(
        self, layer: nn.Conv2d, size: tuple[int, int, int]
    ) -> Convolution | NativeConvolution | RowWinograd:
        rows, height, width = size
        weight, bias = weight_and_bias(layer, self.compute_dtype)
        shape = rows, weight.shape[1], height, width
        return convolution_3x3(weight, bias, shape)

    def _layers(self, level: Any, size: tuple[int, int, int]) -> "list[Layer]":
        """The level's residual blocks, each with the attention that follows it."""
        residuals = [self._packed(Residual, block, size) for block in level.resnets]
        attentions = [self._packed(Attention, module, size) for module in level.attentions]
        return list(itertools.zip_longest(residuals, attentions))  # the middle has attention after its first only

    def _packed(self, kind: Any, module: nn.Module, size: tuple[int, int, int]) -> Any:
        layer = kind(module, size, self.compute_dtype)
        if self._release:
            for name, weight in module.named_parameters():
                if name.endswith("weight") and "conv" in name or name.startswith("to_"):  # the table needs the others
                    weight.data = weight.data.new_empty(0)
            return_freed_memory()
        return layer

    def _forward(self, sample: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
        biases = self._time_bias(t, rows)
        x = sample.to(self.compute_dtype).contiguous(memory_format=torch.channels_last)
        parts = []
        for i in range(0, len(x), self.rows_per_part):
            part = slice(i, i + self.rows_per_part)
            parts.append(self._part(x[part], iter([b if b.ndim == 1 else b[part] for b in biases])))
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


def _layer(layer: Layer, x: Tensor, biases: Iterator[Tensor]) -> Tensor:
    residual, attention = layer
    x = residual(x, next(biases))
    return x if attention is None else attention(x)


# ---- its parts -----------------------------------------------------------------------------------------------------


class TimeBias:
    """The bias of the first convolution of every residual block: its own, plus what t, and the class, add.

    For t = 0 … T−1 it comes from a table [T, ΣO], of which each class that is asked for gets one.
    """

    def __init__(self, unet: DDPMPaperUNet, blocks: Sequence[ResnetBlock], num_timesteps: int, dtype: torch.dtype):
        embedding, classes = unet.time_embedding, unet.class_embedding
        self.layers = (
            weight_and_bias(embedding.linear_1, torch.float32),
            weight_and_bias(embedding.linear_2, torch.float32),
        )
        self.classes = None if classes is None else classes.weight.detach().float().clone()
        weights, biases = zip(*(weight_and_bias(block.time_emb_proj, torch.float32) for block in blocks), strict=True)
        own = [weight_and_bias(block.conv1, torch.float32)[1] for block in blocks]
        self.projection = torch.cat(weights), torch.cat(biases) + torch.cat(own)
        self.widths = [len(bias) for bias in biases]
        self.dtype, self.num_timesteps = dtype, num_timesteps
        self.tables: dict[int | None, Tensor] = {}  # by class, the one that was asked for last at the end
        self.views: dict[int, tuple[Tensor, ...]] = {}  # of the table without classes, by t
        self.lock = threading.Lock()
        if classes is None:
            self._table(None)

    def _table(self, label: int | None) -> Tensor:
        """[T, ΣO]. Those of classes that were not asked for long are dropped where they come to `TABLE_BYTES`."""
        with self.lock:
            table = self.tables.pop(label, None)
            if table is None:
                times = torch.arange(self.num_timesteps)
                table = self._computed(times, None if label is None else torch.full_like(times, label))
                while self.tables and (len(self.tables) + 1) * table.nbytes > TABLE_BYTES:
                    self.tables.pop(next(iter(self.tables)))
            self.tables[label] = table
            return table

    def _computed(self, timestep: Tensor, classes: Tensor | None) -> Tensor:
        (weight_1, bias_1), (weight_2, bias_2) = self.layers
        h = sinusoidal_embedding(timestep, weight_1.shape[1])
        h = F.linear(F.silu(F.linear(h, weight_1, bias_1)), weight_2, bias_2)
        if classes is not None and self.classes is not None:
            h = h + self.classes[classes]
        return F.linear(F.silu(h), *self.projection).to(self.dtype)

    def __call__(self, timestep: Tensor, classes: Tensor | None = None) -> tuple[Tensor, ...]:
        """One bias for each block: [O] for samples that share t and class, else [B, O]. `timestep` is [1] or [B]."""
        times = timestep.tolist()
        labels: list[int | None] = [None] if classes is None else classes.tolist()
        whole = not timestep.is_floating_point() and 0 <= min(times) and max(times) < self.num_timesteps
        if len(set(times)) == len(set(labels)) == 1:
            if times[0] in self.views:
                return self.views[times[0]]
            if whole:
                biases = self._table(labels[0])[times[0]].split(self.widths)
                if classes is None:
                    self.views[times[0]] = biases
                return biases
            return self._computed(timestep[:1], None if classes is None else classes[:1])[0].split(self.widths)
        if not whole:
            return self._computed(timestep, classes).split(self.widths, dim=1)
        if classes is None:
            return self._table(None)[timestep].split(self.widths, dim=1)
        count = max(len(times), len(labels))
        pairs = zip(times * (count // len(times)), labels * (count // len(labels)), strict=True)
        return torch.stack([self._table(label)[t] for t, label in pairs]).split(self.widths, dim=1)


class Residual:
    """What `ResnetBlock` computes; its time embedding is a bias of the first convolution."""

    def __init__(self, block: ResnetBlock, size: tuple[int, int, int], dtype: torch.dtype):
        rows, height, width = size
        weight_1, own_bias = weight_and_bias(block.conv1, dtype)  # `time_bias` includes this bias
        weight_2, bias_2 = weight_and_bias(block.conv2, dtype)
        outputs, inputs = weight_1.shape[:2]
        self.norm1, self.norm2 = Normalization(block.norm1, dtype), Normalization(block.norm2, dtype)
        self.conv1 = convolution_3x3(weight_1, torch.zeros_like(own_bias), (rows, inputs, height, width))
        self.conv2 = convolution_3x3(weight_2, bias_2, (rows, outputs, height, width))
        self.shortcut = None
        if block.conv_shortcut is not None:
            self.shortcut = Convolution(*weight_and_bias(block.conv_shortcut, dtype), (rows, inputs, height, width))

    def __call__(self, x: Tensor, time_bias: Tensor) -> Tensor:
        """`time_bias`: [O] where all samples have the same t, else [B, O]."""
        h = self.norm1(x)
        if time_bias.ndim == 1 or isinstance(self.conv1, NativeConvolution):
            h = self.conv1(h, time_bias)
        else:
            h = self.conv1(h).add_(time_bias[:, :, None, None])
        return self.conv2(self.norm2(h), residual=x if self.shortcut is None else self.shortcut(x))


class Attention:
    """What `SelfAttention` computes, with queries, keys and values in one product."""

    def __init__(self, attention: SelfAttention, size: tuple[int, int, int], dtype: torch.dtype):
        self.norm = Normalization(attention.group_norm, dtype, silu=False)
        projections = [weight_and_bias(layer, dtype) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        weight, bias = (torch.cat(tensors) for tensors in zip(*projections, strict=True))
        self.to_qkv = Product(weight, bias, math.prod(size))
        self.to_out = Product(*weight_and_bias(attention.to_out[0], dtype), math.prod(size))

    def __call__(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = batch, height * width, channels
        qkv = self.to_qkv(self.norm(x).permute(0, 2, 3, 1).reshape(rows))
        q, k, v = qkv.view(batch, 1, height * width, 3, channels).unbind(3)
        h = F.scaled_dot_product_attention(q, k, v).reshape(rows)
        y = self.to_out(h, x.permute(0, 2, 3, 1).reshape(rows))
        return y.view(batch, height, width, channels).permute(0, 3, 1, 2)


class DownsampleConvolution:
    """What `Downsample` computes."""

    def __init__(self, layer: Downsample, size: tuple[int, int, int], dtype: torch.dtype):
        rows, height, width = size
        weight, bias = weight_and_bias(layer.conv, dtype)
        self.convolution = Convolution(weight, bias, (rows, weight.shape[1], height + 1, width + 1), stride=2)

    def __call__(self, x: Tensor) -> Tensor:
        rows = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1))
        return self.convolution(rows.permute(0, 3, 1, 2))


def upsample_convolution(
    layer: Upsample, size: tuple[int, int, int], dtype: torch.dtype
) -> "NativeConvolution | UpsampleConvolution":
    """What `Upsample` computes, by the faster kernel for this shape."""
    weight, bias = weight_and_bias(layer.conv, dtype)
    rows, height, width = size
    ours = native_convolution(weight, bias, (rows, weight.shape[1], height, width), scale=2)
    return UpsampleConvolution(layer, size, dtype) if ours is None else ours


class UpsampleConvolution:
    """What `Upsample` computes, as one 2×2 convolution of the small image to four images, one for each parity."""

    def __init__(self, layer: Upsample, size: tuple[int, int, int], dtype: torch.dtype):
        weight, bias = weight_and_bias(layer.conv, dtype)
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
