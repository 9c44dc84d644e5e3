"""The probability flow: an ODE with the marginals of the process, its density, and latents (Song et al. 2021).

Score-Based Generative Modeling through SDEs, arXiv 2011.13456, Section 4.3 and Appendix D. Write √ᾱ = cos φ and
√(1−ᾱ) = sin φ. Then x_φ = cos φ x_0 + sin φ ε (Eq. 4), and the ODE dx/dt = −½ β(t) (x + ∇ log p(x_t)) becomes

    dx/dφ = v(x, φ) = cos φ ε̂ − sin φ x̂_0,

Salimans & Ho's velocity, for every parameterization and schedule, up to ᾱ = 0. It runs from the process's first
timestep, ᾱ_0 (for the paper's schedule σ_0 = √(1−ᾱ_0) = 0.01), to its last, where x is taken as N(0, I). Each density
here is of x at the first timestep: of data with Gaussian noise of σ_0, times √ᾱ_0, and not of the data themselves,
which may have none. Between timesteps log ᾱ is linear (`alphas_cumprod_at`), and networks are asked at fractional t.
x̂_0 is not clipped, as the flow of a clipped one has a kink at every clip. x is carried in float64, the network
computes in its own precision. Time is 0-based.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .asking import checked_labels, place_of, require_integer, require_samples
from .randomness import keyed_generator
from .scheduler import GaussianDiffusion, alphas_cumprod_at, paper_scheduler, timestep_at
from .unet import evaluation_mode

EXACT_DIMENSIONS = 16  # up to here the divergence is exact by default: one backward pass per dimension
DEFAULT_PROBES = 2  # above; the fewest that have a standard error
MOST_STEPS = 100_000
TINY_ALPHA_CUMPROD = 1e-14  # below, ε says nothing about x_0 in float64
Labels = Tensor | Sequence[int] | int | None


class FlowBits(NamedTuple):
    """−log₂ of the flow's density, or with levels a bound on −log₂ of probabilities, of B samples; float64, CPU.

    total_b: in bits/dim: prior_b + contraction_b, and for data with levels −log₂ of a bin's width.
    error_b: the standard error of total_b: over dequantizations where there are several, else over probes; 0 where
        nothing is drawn, NaN where one number is.
    prior_b: −log₂ N(x_T; 0, I) / dim, of the latent x_T.
    contraction_b: −log₂ |det ∂x_T/∂x| / dim; negative where the flow expands volumes on the way to x_T.
    num_evaluations_b: how often the network was asked for each sample, in all its dequantizations.
    """

    total_b: Tensor
    error_b: Tensor
    prior_b: Tensor
    contraction_b: Tensor
    num_evaluations_b: Tensor


# ---- the vector field ----------------------------------------------------------------------------------------------


class Flow:
    """v(x, φ) of a network, given the samples' labels; `angles` are the φ of the process's timesteps, ascending.

    Raises ValueError for μ̃ (`previous_sample`), which belongs to single steps, for ε where ᾱ_T is 0, and for a process
    of one timestep.
    """

    def __init__(self, unet: Any, scheduler: Any, labels: Tensor | None = None, on_progress: Any = None):
        self.diffusion: GaussianDiffusion = paper_scheduler(scheduler).diffusion
        self.prediction_type = self.diffusion.prediction_type
        if self.prediction_type == "previous_sample":
            raise ValueError("previous_sample is the mean of single steps, and has no flow; use epsilon, sample or v")
        if self.prediction_type == "epsilon" and self.diffusion.alphas_cumprod[-1] < TINY_ALPHA_CUMPROD:
            raise ValueError("ᾱ is 0 at the last timestep, where ε gives no x_0: the flow of ε begins at infinity")
        if self.diffusion.num_timesteps < 2:
            raise ValueError("a process of one timestep has no flow: it starts where it ends")
        self.unet, self.labels, self.on_progress = unet, labels, on_progress
        self.device, self.dtype = place_of(unet)
        self.exact = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS has no float64
        tables = self.diffusion.sqrt_one_minus_alphas_cumprod, self.diffusion.sqrt_alphas_cumprod
        self.angles: np.ndarray = np.arctan2(*tables)
        self.num_evaluations = 0

    def velocity(self, x: Tensor, angle: float) -> Tensor:
        """v(x, φ), float64 as x [B, ...] is. Raises ValueError where the network's output is not finite."""
        x_start = self._x_start(x, angle)
        if not bool(x_start.isfinite().all()):
            raise ValueError(f"the network's output is not finite at t = {self.timestep(angle):.6g}")
        return (math.cos(angle) * x - x_start) / math.sin(angle)

    def timestep(self, angle: float) -> float:
        ends = self.diffusion.alphas_cumprod[[-1, 0]].tolist()  # the cosine rounds
        return timestep_at(self.diffusion, min(max(math.cos(angle) ** 2, ends[0]), ends[1]))

    def _x_start(self, x: Tensor, angle: float) -> Tensor:
        """x̂_0(x, φ) by the columns of a process whose one timestep has this ᾱ: the tables have none between theirs."""
        variance_type = "learned" if self.diffusion.variance_type == "learned" else "fixed_small"
        at_angle = GaussianDiffusion([math.sin(angle) ** 2], self.prediction_type, variance_type)
        times = torch.full((len(x),), self.timestep(angle), dtype=torch.promote_types(self.dtype, torch.float32))
        conditions = {} if self.labels is None else {"class_labels": self.labels}
        output = self.unet(x.to(self.device, self.dtype), times.to(self.device), **conditions)
        output = output if isinstance(output, Tensor) else output.sample
        if x.requires_grad and not output.requires_grad:
            raise ValueError("the network's output carries no gradient to x_t, and the divergence needs one")
        self.num_evaluations += 1
        if self.on_progress is not None:
            self.on_progress(len(x))
        return at_angle.predict_x_start(output.to(self.exact, torch.float64), x, 0)

    def velocity_and_divergence(self, x: Tensor, angle: float, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """v, and ∇·v [B, K] by K probes e [K, B, ...], each as eᵀ (∂v/∂x) e; without probes exactly, [B, 1].

        Raises ValueError where the network's output carries no gradient.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            velocity = self.velocity(x, angle)

            def product(weights: Tensor) -> Tensor:
                return torch.autograd.grad(velocity, x, weights, retain_graph=True)[0].flatten(1)

            if probes is not None:
                sums = [(product(probe) * probe.flatten(1)).sum(dim=1) for probe in probes]
            else:
                units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, 1, *x.shape[1:])
                diagonal = [product(unit.expand_as(x))[:, i] for i, unit in enumerate(units)]
                sums = [torch.stack(diagonal).sum(dim=0)]
        return velocity.detach(), torch.stack(sums, dim=1)

    def network_state(self) -> contextlib.AbstractContextManager[None]:
        """In which the network is asked: in eval mode, where it has one."""
        return evaluation_mode(self.unet) if isinstance(self.unet, nn.Module) else contextlib.nullcontext()


def _solved(
    flow: Flow, x: Tensor, start: float, end: float, tolerance: float, probes: Tensor | None, with_volume: bool
) -> tuple[Tensor, Tensor]:
    """x at the angle `end`, and ∫ ∇·v dφ / dim on the way [B, K] (zeros without `with_volume`), from x at `start`.

    By SciPy's Runge-Kutta pair of orders 5 and 4 (`RK45`), whose steps hold the root mean square of the errors of all
    samples of the batch, and of their logarithms of volumes per dimension, to `tolerance`, absolute and relative.
    """
    solve_ivp = require_solver()
    shape, size, dim = x.shape, x.numel(), x[0].numel()
    width = (1 if probes is None else len(probes)) if with_volume else 0

    def derivative(angle: float, state: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(state[:size].copy()).view(shape).to(flow.exact)
        if not with_volume:
            return flow.velocity(at, angle).flatten().cpu().numpy()
        velocity, divergence = flow.velocity_and_divergence(at, angle, probes)
        return torch.cat([velocity.flatten(), divergence.flatten() / dim]).cpu().numpy()

    state = np.concatenate([x.cpu().numpy().ravel(), np.zeros(len(x) * width)])
    solution = solve_ivp(derivative, (start, end), state, method="RK45", t_eval=[end], rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise ValueError(f"the flow could not be solved to tolerance={tolerance}: {solution.message}")
    final = torch.from_numpy(solution.y[:, -1].copy())
    return final[:size].view(shape), final[size:].view(len(x), width)


def require_solver() -> Callable[..., Any]:
    """SciPy's solve_ivp, imported here, as nothing else needs SciPy. Raises ImportError, with the extra."""
    try:
        from scipy.integrate import solve_ivp
    except ModuleNotFoundError as error:
        raise ImportError("the flow's solver is SciPy's: pip install 'ddpm_hf[flow]'", name=error.name) from error
    return solve_ivp


# ---- the density ---------------------------------------------------------------------------------------------------


def flow_bits_per_dim(
    unet: Any,
    scheduler: Any,
    x_start: Tensor,
    *,
    seed: int,
    num_levels: int | None = 256,
    tolerance: float = 1e-4,
    num_probes: int | None = None,
    num_dequantizations: int = 1,
    class_labels: Labels = None,
    batch_size: int = 64,
    first_index: int = 0,
    on_progress: Callable[[int], Any] | None = None,
) -> FlowBits:
    """−log₂ p_φ(x) / dim of `x_start` under the probability flow of a model (Song et al. 2021, Eq. 39).

    log p_φ(x) = log N(x_T; 0, I) + ∫ ∇·v dφ along the flow from x at the first timestep to x_T. In nats it is
    −`total_b` · dim · ln 2. It is the density of the flow's own model, to the tolerance, and no bound; it is neither
    that of Algorithm 2 nor its bound.

    Points (`num_levels` None) have that density, of x as it is on its own scale. Images have levels 2/(L−1) apart on
    [−1, 1], and no density: to each pixel uniform noise within its level's bin is added ("uniform dequantization"),
    and −log p_φ(x + u) − dim · log(2/(L−1)), in the mean over u, is at least −log P(x), of the probability P that
    the flow gives to the bins, by Jensen's inequality (Theis et al. 2016, arXiv 1511.01844). With 256 levels a bin is
    1/127.5 wide, the change from [−1, 1] to [0, 255]. Bins at the ends reach beyond [−1, 1] by half.

    Noise and probes are keyed (seed, number, index of the sample). Samples are solved for in batches, whose steps
    depend on all their members: another batch differs within the tolerance.

    Args:
        unet: the network, ours or stock's, on any device; or any differentiable function of (x_t, t), t a real number
            for each sample, that returns a tensor, or an object that has it as `.sample`.
        scheduler: a `DDPMPaperScheduler`, or any whose configuration describes a DDPM; its training process counts.
        x_start: samples [B, ...] in [−1, 1]; points [B, d] as they are.
        seed: of dequantization and probes.
        num_levels: the data's: 256, 17 for the digits, None for points.
        tolerance: of the solver, absolute and relative, for each step (docs/flow.md has a study).
        num_probes: 0 for the exact divergence, one backward pass per dimension; K for Hutchinson's estimate from K
            Rademacher probes, one backward pass each; None: exact in up to 16 dimensions, and 2 probes above.
        num_dequantizations: over how many u the mean is taken; each is a solve.
        class_labels: integers, one or [B], for the density given the class.
        batch_size: how many samples are solved for at once.
        first_index: the index of x_start[0] in its data set, where x_start is a part of one.
        on_progress: called after each evaluation of the network with the number of samples it saw.

    Raises ValueError for samples outside [−1, 1], numbers outside their range, a process or network without a flow
    (see `Flow`); ImportError where SciPy is missing.
    """
    size = len(x_start)
    _check_solver_options(tolerance, batch_size)
    require_integer("first_index", first_index, 0)
    require_integer("num_levels", 2 if num_levels is None else num_levels, 2)
    require_integer("num_probes", 0 if num_probes is None else num_probes, 0)
    require_integer("num_dequantizations", num_dequantizations, 1)
    if num_levels is None and num_dequantizations != 1:
        raise ValueError(f"num_dequantizations={num_dequantizations}: points are not dequantized")
    require_samples(x_start, num_levels)
    require_integer("seed", seed, 0)
    if num_probes is None:
        num_probes = 0 if x_start[0].numel() <= EXACT_DIMENSIONS else DEFAULT_PROBES
    labels = None if class_labels is None else checked_labels(class_labels, size)
    parts = []
    for first in range(0, size, batch_size):
        rows = slice(first, min(first + batch_size, size))
        flow = Flow(unet, scheduler, None if labels is None else labels[rows], on_progress)
        x = x_start[rows].detach().to(flow.exact, torch.float64)
        indices, draws = range(first_index + rows.start, first_index + rows.stop), []
        for number in range(num_dequantizations):
            start = x if num_levels is None else x + _dequantization(x, num_levels, seed, number, indices)
            draws.append(_density(flow, start, _probes(x, num_probes, seed, number, indices), tolerance))
        parts.append(_combined(draws, num_levels, flow.num_evaluations))
        if num_levels is None and not num_probes:
            parts[-1].error_b.zero_()  # nothing is drawn
    return FlowBits(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _check_solver_options(tolerance: float, batch_size: int) -> None:
    require_integer("batch_size", batch_size, 1)
    if not isinstance(tolerance, int | float) or not 1e-12 <= tolerance <= 1:
        raise ValueError(f"tolerance={tolerance!r} must lie in [1e-12, 1]")


def _dequantization(x: Tensor, num_levels: int, seed: int, number: int, indices: range) -> Tensor:
    """Uniform noise within a bin, as wide as levels are apart, one keyed draw per sample: float64 of x's shape."""
    generators = [keyed_generator(seed, "flow: dequantization", number, index) for index in indices]
    uniform = np.stack([generator.random(tuple(x.shape[1:])) for generator in generators])
    return (torch.from_numpy(uniform).to(x.device) - 0.5) * (2 / (num_levels - 1))


def _probes(x: Tensor, num_probes: int, seed: int, number: int, indices: range) -> Tensor | None:
    """Rademacher signs, keyed per sample: float64 [K, B, ...]; None where the divergence is to be exact."""
    if not num_probes:
        return None
    shape = num_probes, *x.shape[1:]
    generators = [keyed_generator(seed, "flow: probes", number, index) for index in indices]
    bits = np.stack([generator.integers(2, size=shape) for generator in generators], axis=1)
    return torch.from_numpy(2.0 * bits - 1).to(x.device)


def _density(flow: Flow, x: Tensor, probes: Tensor | None, tolerance: float) -> tuple[Tensor, Tensor]:
    """−log₂ N(x_T; 0, I) / dim, [B], and −log₂ |det ∂x_T/∂x| / dim, [B, K]."""
    with flow.network_state():
        x_T, log_volume = _solved(flow, x, flow.angles[0], flow.angles[-1], tolerance, probes, with_volume=True)
    prior = 0.5 * (x_T.flatten(1).square().mean(dim=1) + math.log(2 * math.pi))
    return prior / math.log(2), -log_volume / math.log(2)


def _combined(draws: list[tuple[Tensor, Tensor]], num_levels: int | None, num_evaluations: int) -> FlowBits:
    """Means over R dequantizations and K probes, and the standard error of the mean."""
    prior_br = torch.stack([prior for prior, _ in draws], dim=1)
    contraction_brk = torch.stack([contraction for _, contraction in draws], dim=1)
    prior, contraction = prior_br.mean(dim=1), contraction_brk.mean(dim=(1, 2))
    by_draw = prior_br[:, :, None] + contraction_brk
    drawn = by_draw.mean(dim=2) if len(draws) > 1 else by_draw[:, 0]
    count = drawn.shape[1]
    error = drawn.std(dim=1) / math.sqrt(count) if count > 1 else torch.full_like(prior, math.nan)
    bin_width = 2 / (num_levels - 1) if num_levels else 1.0
    total = prior + contraction - math.log2(bin_width)
    return FlowBits(total, error, prior, contraction, torch.full_like(prior, num_evaluations))


# ---- latents -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(
    unet: Any,
    scheduler: Any,
    x_start: Tensor,
    *,
    num_steps: int | None = None,
    order: int = 2,
    tolerance: float = 1e-4,
    class_labels: Labels = None,
    batch_size: int = 256,
) -> Tensor:
    """The latent x_T that the flow carries `x_start` to, [B, ...] in float64 on the CPU; `decode` is the way back.

    Args:
        unet: as in `flow_bits_per_dim`, but it needs no gradients.
        scheduler: as there.
        x_start: samples [B, ...], taken as they are for x at the first timestep.
        num_steps: steps of equal length in t; None: as many as SciPy's solver needs for `tolerance`.
        order: of the fixed steps: 1 for DDIM's (Song et al. 2020, arXiv 2010.02502), one evaluation of the network
            each; 2 for Heun's, two each.
        tolerance: of the solver where `num_steps` is None.
        class_labels: integers, one or [B]; encode and decode with different ones to change the class.
        batch_size: how many samples are solved for at once.

    Raises ValueError for numbers outside their range and for a process or network without a flow; without `num_steps`
    ImportError where SciPy is missing.
    """
    return _carried(unet, scheduler, x_start, True, num_steps, order, tolerance, class_labels, batch_size)


@torch.no_grad()
def decode(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    *,
    num_steps: int | None = None,
    order: int = 2,
    tolerance: float = 1e-4,
    class_labels: Labels = None,
    batch_size: int = 256,
) -> Tensor:
    """x at the first timestep of the flow through x_T = `latents`, [B, ...] in float64 on the CPU; not clipped.

    Of standard Gaussian noise these are samples of the flow's model. Arguments and errors as of `encode`.
    """
    return _carried(unet, scheduler, latents, False, num_steps, order, tolerance, class_labels, batch_size)


def _carried(
    unet: Any,
    scheduler: Any,
    x: Tensor,
    upwards: bool,
    num_steps: int | None,
    order: int,
    tolerance: float,
    class_labels: Labels,
    batch_size: int,
) -> Tensor:
    _check_solver_options(tolerance, batch_size)
    require_samples(x, None)
    require_integer("num_steps", 1 if num_steps is None else num_steps, 1, MOST_STEPS)
    require_integer("order", order, 1, 2)
    labels = None if class_labels is None else checked_labels(class_labels, len(x))
    parts = []
    for first in range(0, len(x), batch_size):
        rows = slice(first, first + batch_size)
        flow = Flow(unet, scheduler, None if labels is None else labels[rows])
        part = x[rows].to(flow.exact, torch.float64)
        ends = flow.angles[[0, -1]] if upwards else flow.angles[[-1, 0]]
        with flow.network_state():
            if num_steps is None:
                part = _solved(flow, part, *ends.tolist(), tolerance, None, with_volume=False)[0]
            else:
                part = _in_steps(flow, part, _angles(flow, num_steps, upwards), order)
        parts.append(part.cpu())
    return torch.cat(parts)


def _angles(flow: Flow, num_steps: int, upwards: bool) -> list[float]:
    """φ at num_steps + 1 equally distant t from the first timestep to the last, or backwards."""
    times = torch.linspace(0, flow.diffusion.num_timesteps - 1, num_steps + 1, dtype=torch.float64)
    signal = alphas_cumprod_at(flow.diffusion, times).sqrt()
    angles = torch.acos(signal).tolist()
    angles[0], angles[-1] = flow.angles[[0, -1]].tolist()
    return angles if upwards else angles[::-1]


def _in_steps(flow: Flow, x: Tensor, angles: list[float], order: int) -> Tensor:
    """DDIM's steps, which turn x and v by φ' − φ as if x̂_0 and ε̂ stayed; for order 2 each corrected as Heun does."""
    for angle, following in zip(angles, angles[1:], strict=False):
        turn = following - angle
        velocity = flow.velocity(x, angle)
        predicted = math.cos(turn) * x + math.sin(turn) * velocity
        if order == 2:
            predicted = x + 0.5 * turn * (velocity + flow.velocity(predicted, following))
        x = predicted
    return x
