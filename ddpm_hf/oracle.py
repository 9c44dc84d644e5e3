"""ε*(x_t, t) in closed form for Gaussian mixtures: the exact answer to test and teach with, without training.

If x_0 is a Gaussian mixture, so is every x_t, and the minimiser of L_simple (Eq. 14), ε* = E[ε | x_t], follows from
its score by Section 3.2's link: ε*(x_t, t) = −√(1−ᾱ_t) ∇ log p(x_t). Where components have labels, the same holds
given a label y, and p(y | x_t) is known too. Everything is computed in float64 on the CPU.
Time is 0-based: t = 0 is the paper's t = 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .scheduler import GaussianDiffusion, alphas_cumprod_at
from .unet.unet_ddpm_paper import class_rows


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """p(x) = Σ_k w_k N(x; m_k, C_k) on R^d, with its density, score and samples; float64.

    `weights` [K] are positive and sum to 1, `means` are [K, d], `covariances` [K, d, d] symmetric and positive
    definite; other dtypes are converted. `labels` [K], integers 0 … Y−1 of which each occurs, say which class each
    component belongs to; None where there are no classes. Raises ValueError for anything else.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    labels: Any = None  # int64 [K] once it is made
    eigenvalues: Tensor = field(init=False, repr=False)  # of the covariances, [K, d]
    eigenvectors: Tensor = field(init=False, repr=False)  # in columns, [K, d, d]

    def __post_init__(self) -> None:
        parts = {}
        for name in ("weights", "means", "covariances"):
            parts[name] = torch.as_tensor(getattr(self, name), dtype=torch.float64, device="cpu").detach().clone()
            if not parts[name].isfinite().all():
                raise ValueError(f"{name} must be finite numbers, got {parts[name].tolist()}")
        weights, means, covariances = parts.values()
        size, dim = means.shape if means.ndim == 2 else (0, 0)
        if not size * dim or weights.shape != (size,) or covariances.shape != (size, dim, dim):
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items())
            raise ValueError(f"shapes must be weights [K], means [K, d] and covariances [K, d, d]; got {shapes}")
        if not (weights > 0).all() or abs(float(weights.sum()) - 1) > 1e-6:  # the rounding of float32 weights
            raise ValueError(f"weights must be positive and sum to 1, got {weights.tolist()}")
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances)
        asymmetry = (covariances - covariances.mT).abs().amax(dim=(1, 2))
        symmetric = asymmetry <= 1e-6 * eigenvalues[:, -1]
        positive = eigenvalues[:, 0] > 1e-14 * eigenvalues[:, -1]  # below, float64 cannot distinguish it from 0
        if not (symmetric & positive).all():
            raise ValueError(f"covariances must be symmetric and positive definite, got {covariances.tolist()}")
        parts |= {"weights": weights / weights.sum(), "eigenvalues": eigenvalues, "eigenvectors": eigenvectors}
        if self.labels is not None:
            parts["labels"] = _checked_labels(self.labels, size)
        for name, part in parts.items():
            object.__setattr__(self, name, part)

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """E[x] = Σ_k w_k m_k: [d]."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Cov[x] = Σ_k w_k (C_k + (m_k − E[x]) (m_k − E[x])ᵀ): [d, d]."""
        offsets = self.means - self.mean
        return torch.einsum("k,kij->ij", self.weights, self.covariances + offsets[:, :, None] * offsets[:, None, :])

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """`num` independent draws of x, from a CPU generator: [num, d]."""
        component = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(num, self.dim, generator=generator, dtype=torch.float64)
        root = torch.linalg.cholesky(self.covariances)  # unlike the eigenvectors, the same with every LAPACK
        return self.means[component] + torch.einsum("bij,bj->bi", root[component], noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, of x [B, d]: [B]. Raises ValueError for another shape."""
        return self._noised(x)[0].logsumexp(dim=1)

    def nll_bpd(self, x: Tensor) -> Tensor:
        """−log p(x) / (d ln 2), in bits/dim, of x [B, d]: [B]; what the bound is a bound on."""
        return -self.log_prob(x) / (self.dim * math.log(2))

    def responsibilities(self, x: Tensor) -> Tensor:
        """p(k | x) = w_k N(x; m_k, C_k) / p(x), of x [B, d]: [B, K]; their mean over draws of x is w."""
        return self._noised(x)[0].softmax(dim=1)

    def score(self, x: Tensor) -> Tensor:
        """∇ log p(x) = −Σ_k p(k | x) C_k⁻¹ (x − m_k), of x [B, d]: [B, d]."""
        return self._score(x)

    @property
    def num_classes(self) -> int:
        """Y, the number of classes; 0 where components have no labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def given(self, label: int) -> "GaussianMixture":
        """p(x | y): the mixture of the components with this label. Raises ValueError for another label."""
        if not isinstance(label, Integral) or isinstance(label, bool) or not 0 <= label < self.num_classes:
            raise ValueError(f"label={label!r} is none of the mixture's {self.num_classes} classes")
        own = self.labels == label
        weights = self.weights[own]
        return GaussianMixture(weights / weights.sum(), self.means[own], self.covariances[own])

    def class_log_probs(self, x: Tensor) -> Tensor:
        """log p(y | x) of x [B, d], by Bayes' rule from p(x | y) and p(y): [B, Y]; gradients flow to x.

        Raises ValueError where components have no labels.
        """
        if self.labels is None:
            raise ValueError("the mixture's components have no labels, so that there are no classes")
        log_joint = self._noised(x)[0]
        by_class = [log_joint[:, self.labels == label].logsumexp(dim=1) for label in range(self.num_classes)]
        return torch.stack(by_class, dim=1) - log_joint.logsumexp(dim=1, keepdim=True)

    def marginal(self, diffusion: GaussianDiffusion, t: int) -> "GaussianMixture":
        """p(x_t) = Σ_k w_k N(x_t; √ᾱ_t m_k, ᾱ_t C_k + (1 − ᾱ_t) I), from Eq. 4; t 0-based."""
        q = diffusion.q_mean_variance(self.means, t)
        alpha_cumprod = float(diffusion.alphas_cumprod[t])
        noise = torch.eye(self.dim, dtype=torch.float64) * q.variance
        return GaussianMixture(self.weights, q.mean, alpha_cumprod * self.covariances + noise, self.labels)

    def _noised(
        self, x: Tensor, signal: Tensor | float = 1.0, noise_variance: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """log w_k p_k(x_t) [B, K] and ∇ log p_k(x_t) [B, K, d] for x_t = `signal` x_0 + noise.

        Noise leaves the eigenvectors of every C_k as they are, so that each sample may have a level of its own:
        `signal` and `noise_variance` are numbers or [B, 1, 1].
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; this mixture expects [B, {self.dim}]")
        variances = signal**2 * self.eigenvalues + noise_variance
        offsets = torch.einsum("kij,bki->bkj", self.eigenvectors, x.double()[:, None] - signal * self.means)
        log_densities = -0.5 * (offsets.square() / variances + torch.log(2 * math.pi * variances)).sum(dim=2)
        scores = -torch.einsum("kij,bkj->bki", self.eigenvectors, offsets / variances)
        return self.weights.log() + log_densities, scores

    def _score(
        self,
        x: Tensor,
        signal: Tensor | float = 1.0,
        noise_variance: Tensor | float = 0.0,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """∇ log p(x_t), for each sample of the components that are `allowed`, bool [B, K], alone."""
        log_joint, scores = self._noised(x, signal, noise_variance)
        if allowed is not None:
            log_joint = log_joint.masked_fill(~allowed, -math.inf)
        return torch.einsum("bk,bki->bi", log_joint.softmax(dim=1), scores)


class OracleNetwork(nn.Module):
    """ε*(x_t, t) = −√(1−ᾱ_t) ∇ log p(x_t) of a mixture, in place of a trained network; it has no parameters.

    It goes wherever a `DDPMPaperMLP` goes: into a `DDPMPaperPipeline` (though not into a file) and into
    `likelihood.bits_per_dim`. `diffusion` is the process of training, `DDPMPaperScheduler.diffusion`; chains of fewer
    steps use some of its timesteps. A mixture with labels makes it conditional, as networks are that were trained with
    labels: ε*(x_t, t, y) for the classes 0 … Y−1, and for `null_class`, Y, ε*(x_t, t). Raises ValueError for a
    respaced process.
    """

    device, dtype = torch.device("cpu"), torch.float64  # `.to` does not change them: half precision would not be exact

    def __init__(self, mixture: GaussianMixture, diffusion: GaussianDiffusion):
        super().__init__()
        if not np.array_equal(diffusion.timesteps, np.arange(diffusion.num_timesteps)):
            raise ValueError(f"diffusion must be the process of training, not respaced to {diffusion.timesteps}")
        self.mixture, self.diffusion = mixture, diffusion
        num_classes = mixture.num_classes
        classes = {"num_class_embeds": num_classes + 1, "null_class": num_classes} if num_classes else {}
        self.config = FrozenDict(in_channels=mixture.dim, out_channels=mixture.dim, **classes)

    def forward(
        self, sample: Tensor, timestep: float | Tensor, class_labels: int | Tensor | None = None
    ) -> UNet2DOutput:
        """ε* as `.sample`, float64 [B, d], of x_t = `sample` [B, d] at 0-based training timesteps, one or [B].

        Between two of them, where some of diffusers' solvers ask, ᾱ is that of `alphas_cumprod_at`.
        `class_labels` are integers, one or [B], by default `null_class`. Raises ValueError for another shape, for
        timesteps outside the process, and for labels that the mixture does not have.
        """
        signal, noise_variance = self._levels(timestep, len(sample))
        score = self.mixture._score(sample, signal, noise_variance, self._allowed(class_labels, len(sample)))
        deviation = torch.as_tensor(noise_variance, dtype=torch.float64).sqrt().view(-1, 1)
        return UNet2DOutput(sample=-deviation * score)

    def _levels(self, timestep: float | Tensor, batch_size: int) -> tuple[Tensor | float, Tensor | float]:
        """√ᾱ_t, [B, 1, 1], and 1 − ᾱ_t, a number or [B, 1, 1]."""
        t = timestep.expand(batch_size) if isinstance(timestep, Tensor) else timestep
        if isinstance(t, float) or (isinstance(t, Tensor) and t.is_floating_point()):
            alphas_cumprod = alphas_cumprod_at(self.diffusion, t).expand(batch_size).view(-1, 1, 1)
            return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt() ** 2  # as the table rounds it
        unit = torch.ones(batch_size, 1, 1, dtype=torch.float64)
        return self.diffusion.q_mean_variance(unit, t)[:2]

    def _allowed(self, class_labels: int | Tensor | None, batch_size: int) -> Tensor | None:
        """Which components count for each sample, bool [B, K]; None for all."""
        if class_labels is None:
            return None
        count = self.mixture.num_classes
        if not count:
            raise ValueError(f"class_labels={class_labels}: the mixture has no classes")
        labels = class_rows(class_labels, count + 1, batch_size, self.device)
        return (self.mixture.labels == labels[:, None]) | (labels[:, None] == count)


def _checked_labels(labels: Any, size: int) -> Tensor:
    """int64 [K]. Raises ValueError unless they are one for each component, from 0 on and without a gap."""
    checked = torch.as_tensor(labels)
    whole = not checked.is_floating_point() and checked.dtype != torch.bool and checked.shape == (size,)
    if not whole or checked.unique().tolist() != list(range(int(checked.max()) + 1)):
        raise ValueError(f"labels must be integers 0, 1, …, one for each of {size} components; got {checked.tolist()}")
    return checked.to("cpu", torch.int64)


def annealed_langevin(
    score: Callable[[Tensor, int], Tensor],
    x: Tensor,
    *,
    diffusion: GaussianDiffusion,
    num_steps: int,
    step_size: float,
    generator: torch.Generator,
) -> Tensor:
    """x_0 by Langevin dynamics in p(x_t) for t = T−1 … 0: x ← x + ½ η_t ∇ log p(x_t) + √η_t z, `num_steps` times each.

    Algorithm 1 of Song & Ermon 2019 (arXiv 1907.05600) in the coordinates of a process that preserves variance. Its
    noise levels are σ_t = √(1/ᾱ_t − 1) on x_t/√ᾱ_t, so x is divided by √(ᾱ_t/ᾱ_{t−1}) between levels, and its step
    sizes ∝ σ_t² become η_t = `step_size` (1 − ᾱ_t). No p(x_t) is sharper than its noise, hence the dynamics are
    stable for step_size < 4; smaller ones are closer to p(x_t).

    `x` [B, d] starts as standard Gaussian noise; its dtype is kept. `score` is called with x and the training timestep
    (0-based). The levels are those of `diffusion`, which may be respaced. Raises ValueError for num_steps < 1 and a
    step_size outside (0, 4).
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    if not 0 < step_size < 4:
        raise ValueError(f"step_size={step_size} must lie in (0, 4)")
    for index in reversed(range(diffusion.num_timesteps)):
        t, eta = int(diffusion.timesteps[index]), step_size * (1 - float(diffusion.alphas_cumprod[index]))
        for _ in range(num_steps):
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + 0.5 * eta * score(x, t) + math.sqrt(eta) * z
        x = x / math.sqrt(1 - float(diffusion.betas[index]))
    return x
