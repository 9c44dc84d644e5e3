"""Classifier guidance: towards a label by a classifier's gradient (Dhariwal & Nichol 2021, arXiv 2105.05233).

Classifier-free guidance needs nothing from here: `pipe(class_labels=..., guidance_scale=...)`. Time is 0-based.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .pipeline_ddpm_paper import is_finite_number
from .pipeline_loading import DDPMPaperPipeline
from .scheduler import paper_scheduler
from .unet.unet_ddpm_paper import class_rows


class ClassifierGuidedNetwork(nn.Module):
    """ε_θ(x_t, t) − γ √(1−ᾱ_t) ∇ log p(y | x_t), in place of a network (Dhariwal & Nichol 2021, Algorithm 2).

    It goes wherever the network goes, with any scheduler. For a network that predicts something else than ε, the same
    shift of x̂_0 by γ (1−ᾱ_t)/√ᾱ_t ∇ log p(y | x_t) is written in what it predicts; learned variances stay as they are.
    At ᾱ_t = 0, where x_t says nothing of y, nothing is shifted.

    Args:
        network: conditional or not.
        scheduler: of the checkpoint, for ᾱ_t and for what the network predicts.
        log_prob: (x_t float32 [B, ...], t int64 [B], y int64 [B]) → log p(y | x_t) in nats, [B], differentiable in
            x_t; what does not depend on x_t may be left out.
        guidance_scale: s of p(x_t) p(y | x_t)^s. γ is s for a network without classes, and s − 1 for a conditional
            one, which has p(x_t | y) ∝ p(x_t) p(y | x_t) already.
        num_classes: of a network without classes, how many `log_prob` knows.

    Samples without a label are drawn as without guidance. Raises ValueError where `num_classes` is missing, or given
    for a network that has classes.
    """

    def __init__(
        self,
        network: Any,
        scheduler: Any,
        log_prob: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        guidance_scale: float = 1.0,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.conditional = bool(network.config.get("num_class_embeds"))
        if self.conditional == (num_classes is not None):
            raise ValueError(
                f"num_classes={num_classes}: " + ("the network has its own classes" if self.conditional else "missing")
            )
        if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
            raise ValueError(f"num_classes={num_classes!r} must be an integer and at least 1")
        if not is_finite_number(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number")
        self.network, self.log_prob = network, log_prob
        self.gamma = guidance_scale - 1 if self.conditional else guidance_scale
        self.shift_t = _shift_per_gradient(paper_scheduler(scheduler).diffusion)
        classes = {} if num_classes is None else {"num_class_embeds": num_classes + 1, "null_class": num_classes}
        self.config = FrozenDict({**network.config, **classes})

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: int | Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """The network's output with its shift, as `.sample`; without `class_labels` the network's own.

        `sample` [B, ...], `timestep` one or [B] (between two timesteps, the nearer counts), `class_labels` one or [B].
        """
        asked = {"class_labels": class_labels} if self.conditional else {}
        output = self.network(sample, timestep, **asked).sample
        if class_labels is not None and self.gamma != 0:
            shift = self._shift(sample.float(), timestep, class_labels).to(output.dtype)
            channels = sample.shape[1]  # the second half of learned variances stays
            output = torch.cat([output[:, :channels] + shift, output[:, channels:]], dim=1)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _shift(self, x_t: Tensor, timestep: Any, class_labels: int | Tensor) -> Tensor:
        """γ times what a unit of ∇ log p(y | x_t) moves the output by; 0 for samples without a label."""
        t = torch.as_tensor(timestep, device=x_t.device).round().long().reshape(-1).expand(len(x_t))
        labels = class_rows(class_labels, self.config["num_class_embeds"], len(x_t), x_t.device)
        null_class = self.config.get("null_class")
        labelled = torch.ones_like(labels, dtype=torch.bool) if null_class is None else labels != null_class
        known = torch.where(labelled, labels, 0)
        records = torch.is_grad_enabled() and x_t.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            # tensors of inference mode, which a caller may be in, take part in no gradient; their copies do
            x, t, known = (each.clone() if each.is_inference() else each for each in (x_t, t, known))
            x = x if records else x.detach().requires_grad_()
            log_prob = self.log_prob(x, t, known)
            _check_log_prob(log_prob, len(x))
            gradient = torch.autograd.grad(log_prob.sum(), x, create_graph=records)[0]
        scale = self.gamma * self.shift_t.to(x_t.device)[t] * labelled
        return scale.view(-1, *(1,) * (x_t.ndim - 1)) * gradient

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("a guided network is not saved; save the pipeline it was made from")


def _check_log_prob(log_prob: Any, batch_size: int) -> None:
    """Raises ValueError unless it is one number a sample that depends on x_t."""
    if not isinstance(log_prob, Tensor):
        raise ValueError(f"log_prob returned {type(log_prob).__name__}; it must be a tensor, ({batch_size},)")
    if log_prob.shape != (batch_size,):
        raise ValueError(f"log_prob returned {tuple(log_prob.shape)}; it must be one number a sample, ({batch_size},)")
    if not log_prob.requires_grad:
        raise ValueError("log_prob returned what does not depend on x_t, or without its gradient (no_grad, detach)")


def _shift_per_gradient(diffusion: Any) -> Tensor:
    """What the output f changes by where x̂_0 = c_skip x_t + c_out f moves by (1−ᾱ_t)/√ᾱ_t: [T]; for ε −√(1−ᾱ_t)."""
    alphas_cumprod = np.asarray(diffusion.alphas_cumprod)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = (1 - alphas_cumprod) / np.sqrt(alphas_cumprod) / np.asarray(diffusion.c_out)
    return torch.from_numpy(np.where(alphas_cumprod > 0, shift, 0)).float()


def classifier_guided(
    pipe: DDPMPaperPipeline,
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    guidance_scale: float = 1.0,
    id2label: Mapping[int, str] | None = None,
) -> DDPMPaperPipeline:
    """A pipeline like `pipe` that is guided by a classifier: `ClassifierGuidedNetwork` in place of its network.

    Classes are chosen when it is called, `guided(class_labels=[...])`. For a network without classes `id2label` names
    those of the classifier, 0 … K−1. Raises ValueError as `ClassifierGuidedNetwork` does.
    """
    if id2label is not None and not isinstance(id2label, Mapping):
        raise ValueError(f"id2label={id2label!r} must map numbers of classes to names")
    network = ClassifierGuidedNetwork(
        pipe.unet,
        pipe.scheduler,
        log_prob,
        guidance_scale=guidance_scale,
        num_classes=None if id2label is None else len(id2label),
    )
    names = dict(id2label) if id2label is not None else pipe.id2label or None
    guided = DDPMPaperPipeline(network, pipe.scheduler, names)  # type: ignore[arg-type]
    guided.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return guided
