"""Weights under the names of the paper's PyTorch ports, and what their network computes with them."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def port_shapes(
    base: int, multipliers: Sequence[int], num_blocks: int, attended: Sequence[int], channels: int = 3
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a port's tensors; `attended` are the levels with attention, 0 the finest."""
    layers = [("temb.dense.0", (4 * base, base)), ("temb.dense.1", (4 * base, 4 * base))]
    layers.append(("conv_in", (base, channels, 3, 3)))
    levels, last = [base * m for m in multipliers], len(multipliers) - 1
    skips, width = [base], base
    for level, out in enumerate(levels):
        for j in range(num_blocks):
            layers += [*block(f"down.{level}.block.{j}", width, out, base)]
            layers += attention(f"down.{level}.attn.{j}", out) if level in attended else []
            width = out
            skips.append(width)
        if level < last:
            layers.append((f"down.{level}.downsample.conv", (width, width, 3, 3)))
            skips.append(width)
    layers += [*block("mid.block_1", width, width, base), *attention("mid.attn_1", width)]
    layers += block("mid.block_2", width, width, base)
    for level in range(last, -1, -1):
        out = levels[level]
        for j in range(num_blocks + 1):
            layers += [*block(f"up.{level}.block.{j}", width + skips.pop(), out, base)]
            layers += attention(f"up.{level}.attn.{j}", out) if level in attended else []
            width = out
        if level:
            layers.append((f"up.{level}.upsample.conv", (width, width, 3, 3)))
    layers += [("norm_out", (width,)), ("conv_out", (channels, width, 3, 3))]
    weights = {f"{name}.weight": shape for name, shape in layers}
    return weights | {f"{name}.bias": shape[:1] for name, shape in layers}


def block(name: str, width: int, out: int, base: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.norm1", (width,)), (f"{name}.conv1", (out, width, 3, 3)))
    yield from ((f"{name}.temb_proj", (out, 4 * base)), (f"{name}.norm2", (out,)), (f"{name}.conv2", (out, out, 3, 3)))
    if width != out:
        yield f"{name}.nin_shortcut", (out, width, 1, 1)


def attention(name: str, width: int) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (f"{name}.norm", (width,)),
        *((f"{name}.{part}", (width, width, 1, 1)) for part in ("q", "k", "v", "proj_out")),
    ]


def port_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Random weights of these shapes, far from their initialisation."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        scale = 0.1 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = centre + scale * torch.randn(shape, generator=generator)
    return weights


class Port:
    """A port's forward pass with given weights, in their dtype: the reference that conversion is compared with."""

    def __init__(self, weights: Weights):
        self.weights = weights

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.weights

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def conv(self, name: str, h: Tensor, **options: int) -> Tensor:
        weight, bias = self.layer(name)
        return F.conv2d(h, weight, bias, padding=options.pop("padding", weight.shape[-1] // 2), **options)

    def norm(self, name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, 32, *self.layer(name), eps=1e-6)

    def residual(self, name: str, h: Tensor, temb: Tensor) -> Tensor:
        x = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", h)))
        x = x + F.linear(F.silu(temb), *self.layer(f"{name}.temb_proj"))[..., None, None]
        x = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", x)))
        return x + (self.conv(f"{name}.nin_shortcut", h) if self.has(f"{name}.nin_shortcut") else h)

    def attend(self, name: str, h: Tensor) -> Tensor:
        normed = self.norm(f"{name}.norm", h)
        q, k, v = (self.conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")
        weights = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(dim=2)
        return h + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).reshape(h.shape))

    def layers(self, level: str, j: int, h: Tensor, temb: Tensor) -> Tensor:
        h = self.residual(f"{level}.block.{j}", h, temb)
        return self.attend(f"{level}.attn.{j}", h) if self.has(f"{level}.attn.{j}.q") else h

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.weights["temb.dense.0.weight"].shape[1] // 2
        angles = t.to(x.dtype)[:, None] * 10_000 ** (-torch.arange(half, dtype=x.dtype) / (half - 1))
        temb = F.linear(torch.cat([angles.sin(), angles.cos()], dim=1), *self.layer("temb.dense.0"))
        temb = F.linear(F.silu(temb), *self.layer("temb.dense.1"))
        skips, level = [self.conv("conv_in", x)], 0
        while self.has(f"down.{level}.block.0.conv1"):
            j = 0
            while self.has(f"down.{level}.block.{j}.conv1"):
                skips.append(self.layers(f"down.{level}", j, skips[-1], temb))
                j += 1
            if self.has(f"down.{level}.downsample.conv"):
                padded = F.pad(skips[-1], (0, 1, 0, 1))
                skips.append(self.conv(f"down.{level}.downsample.conv", padded, stride=2, padding=0))
            level += 1
        h = self.residual("mid.block_1", skips[-1], temb)
        h = self.residual("mid.block_2", self.attend("mid.attn_1", h), temb)
        for depth in range(level - 1, -1, -1):
            j = 0
            while self.has(f"up.{depth}.block.{j}.conv1"):
                h = self.layers(f"up.{depth}", j, torch.cat([h, skips.pop()], dim=1), temb)
                j += 1
            if depth:
                h = self.conv(f"up.{depth}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv("conv_out", F.silu(self.norm("norm_out", h)))
