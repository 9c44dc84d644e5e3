"""Algorithm 1's losses, per sample and for every parameterization: L_simple and the variational bound."""

import numpy as np
import torch
from torch import Tensor

from .likelihood import vb_terms_bpd
from .scheduler import GaussianDiffusion


def simple_loss(
    diffusion: GaussianDiffusion, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """L_simple (Eq. 14): the mean squared error of what the network predicts, `diffusion.target`, per sample: [B].

    All tensors are [B, ...] float32, `t` [B] 0-based; `noise` is the ε that made x_t from x_start. Raises ValueError
    for a learned variance, which L_simple does not train (the paper's code refuses it too).
    """
    if diffusion.variance_type == "learned":
        raise ValueError("L_simple does not train a learned variance; use fixed_small or fixed_large")
    target = diffusion.target(x_start, x_t, t, noise)
    if model_output.shape != target.shape:
        raise ValueError(f"model_output has shape {tuple(model_output.shape)}, its target {tuple(target.shape)}")
    return (model_output - target).square().flatten(1).mean(dim=1)


def vlb_loss(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    num_levels: int | None = 256,
) -> Tensor:
    """L, the true variational bound (Eq. 5): each sample's term at its t, in bits/dim: [B].

    x̂_0 is not clipped, as in the paper's code. T times the mean over uniform t is the bound less L_T, which has no
    parameters. Tensors as in `simple_loss`; for a learned variance `model_output` has twice the channels. `num_levels`
    is that of the data: 256 for images, 17 for the digits, None for points.
    """
    return vb_terms_bpd(diffusion, model_output, x_start, x_t, t, clip_denoised=False, num_levels=num_levels)


class LossHistory:
    """Importance sampling of t by the losses observed there (Nichol & Dhariwal 2021, Eq. 18), for the bound.

    p_t ∝ √E[L_t²] over the last ten losses at t, mixed with 0.1% of the uniform distribution; uniform until every t
    has been drawn ten times. Weighted by 1 / (T p_t), a loss keeps its expectation and loses most of its variance.
    """

    def __init__(self, num_timesteps: int, *, length: int = 10, uniform_share: float = 0.001):
        self.losses = np.zeros((num_timesteps, length))
        self.counts = np.zeros(num_timesteps, dtype=np.int64)
        self.uniform_share = uniform_share

    def probabilities(self) -> np.ndarray:
        """p_t, float64 [T]."""
        total, length = self.losses.shape
        size = np.sqrt(np.square(self.losses).mean(axis=1))
        if (self.counts < length).any() or size.sum() == 0:
            return np.full(total, 1 / total)
        return (1 - self.uniform_share) * size / size.sum() + self.uniform_share / total

    def draw(self, quantiles: np.ndarray) -> tuple[Tensor, Tensor]:
        """t, int64 [B], and the weight of its loss, float32 [B], at quantiles [B] that are uniform in [0, 1)."""
        probabilities = self.probabilities()
        t = np.searchsorted(np.cumsum(probabilities)[:-1], quantiles, side="right")
        weights = 1 / (len(probabilities) * probabilities[t])
        return torch.from_numpy(t), torch.from_numpy(weights.astype(np.float32))

    def update(self, t: np.ndarray, losses: np.ndarray) -> None:
        """Record unweighted losses [B] at t [B], in this order; those that are not finite are left out."""
        for place, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if np.isfinite(loss):
                self.losses[place, self.counts[place] % self.losses.shape[1]] = loss
                self.counts[place] += 1

    def state(self) -> dict[str, Tensor]:
        """The history as tensors, for a checkpoint; `restore` takes it back."""
        return {"losses": torch.from_numpy(self.losses.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`. Raises ValueError for a history of another size."""
        losses, counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()
        if losses.shape != self.losses.shape or counts.shape != self.counts.shape:
            raise ValueError(f"a history of losses {losses.shape} cannot go on as one of {self.losses.shape}")
        self.losses, self.counts = losses, counts
