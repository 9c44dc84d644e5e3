"""A network for sampling on a GPU, recorded as a CUDA graph."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import Recorded
from ..unet import DDPMPaperUNet
from .network import SamplingNetwork, sample_shape_of

MAX_RECORDED = 8  # batch sizes; after that, the oldest recording is dropped


class GraphedUNet(SamplingNetwork):
    """ε_θ(x_t, t) by a copy of a network on a GPU, recorded as a CUDA graph for each batch size.

    With `compile`, TorchInductor generates its kernels, which takes half a minute per batch size.
    """

    def __init__(self, unet: DDPMPaperUNet, *, compute_dtype: torch.dtype, compile: bool, release: bool = False):
        super().__init__()
        self.config, self.compute_dtype, self._device = unet.config, compute_dtype, unet.device
        self.sample_shape = sample_shape_of(unet)
        network: Any = unet if release else copy.deepcopy(unet)
        self.class_embedding = network.class_embedding
        nn.Module.to(network, compute_dtype).eval().requires_grad_(False)  # diffusers' own `to` would only warn
        # TorchInductor's kernels are faster channels last, PyTorch's GroupNorm is not
        memory_format = torch.channels_last if compile else torch.contiguous_format
        network.to(memory_format=memory_format)
        if compile:
            network.compile(fullgraph=True, dynamic=False)

        def compute(x_t: Tensor, t: Tensor, *rows: Tensor) -> Tensor:
            x = x_t.to(compute_dtype).contiguous(memory_format=memory_format)
            return network(x, t, *rows).sample.float().contiguous()

        self._compute = compute  # not the network itself, which would register as a submodule with its weights
        self._recorded: dict[tuple[int, torch.dtype], Recorded] = {}  # by batch size and t's dtype

    def _forward(self, sample: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
        key = len(sample), t.dtype
        recorded = self._recorded.get(key)
        if recorded is None:
            if len(self._recorded) >= MAX_RECORDED:  # each keeps the activations of its batch in memory
                self._recorded.pop(next(iter(self._recorded)))
            recorded = self._recorded[key] = Recorded(self._compute, self._device)
        y: Any = recorded(sample, t.expand(len(sample)), *(() if rows is None else (rows,)))
        return y
