"""What the networks for sampling on a CPU and on a GPU share: `SamplingNetwork`."""

from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from ..unet.unet_ddpm_paper import ClassEmbedding, DDPMPaperUNet


class SamplingNetwork(ModelMixin):
    """ε_θ(x_t, t) with the weights that a `DDPMPaperUNet` had when this was made, for sampling alone.

    It computes in `compute_dtype`, takes and returns float32, and can be neither trained nor saved.
    """

    config: Any
    class_embedding: ClassEmbedding | None
    compute_dtype: torch.dtype
    sample_shape: tuple[int, ...]
    _device: torch.device

    @torch.no_grad()
    def forward(
        self,
        sample: Tensor,
        timestep: int | float | Tensor,
        class_labels: int | Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x_t [B, C, H, W] and t, one or [B] → float32 [B, C_out, H, W], as `DDPMPaperUNet.forward`.

        Raises ValueError for other shapes, for labels that the network does not have, and for another device than the
        one it was made for.
        """
        if sample.device != self._device:
            raise ValueError(f"this network was sped up for {self._device}, and sample is on {sample.device}")
        if tuple(sample.shape[1:]) != self.sample_shape:
            raise ValueError(f"sample has shape {tuple(sample.shape)}; expected [B, {self.sample_shape}]")
        t = torch.as_tensor(timestep).reshape(-1)
        if len(t) not in (1, len(sample)):
            raise ValueError(f"timestep has shape {tuple(t.shape)}; expected one, or one per sample, ({len(sample)},)")
        if self.class_embedding is None and class_labels is not None:
            raise ValueError("class_labels: this network is unconditional (num_class_embeds is None)")
        rows = self.class_embedding and self.class_embedding.rows(class_labels, len(sample), self._device)
        y = self._forward(sample, t, rows)
        return UNet2DOutput(sample=y) if return_dict else (y,)

    def _forward(self, sample: Tensor, t: Tensor, rows: Tensor | None) -> Tensor:
        """ε_θ(sample, t) in float32; `t` is [1] or [B], `rows` of the class embedding [B] where there is one."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self._device

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a network that was sped up holds no weights to save; save the pipeline it was made from")


def sample_shape_of(unet: DDPMPaperUNet) -> tuple[int, int, int]:
    """(C, H, W) of what the network takes."""
    side: Any = unet.config["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    return unet.config["in_channels"], height, width
