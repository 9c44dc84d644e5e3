"""The variational bound on −log p(x_0) (Eqs. 3 and 5), term by term, and the rate and distortion of Section 4.3.

Units are bits per dimension: nats, averaged over a sample's dimensions, divided by ln 2. Time is 0-based: term t = 0
is the decoder's L_0, term t ≥ 1 the KL divergence that the paper calls L_t, and L_T is the prior's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .asking import checked_labels, place_of, require_integer, require_samples
from .randomness import keyed_generator, keyed_generators
from .scheduler import GaussianDiffusion, clipped, paper_scheduler
from .unet import evaluation_mode

# Below this width in standard deviations, a bin's probability is its density times its width: the difference of two
# distribution functions would lose more to rounding in float32 (2e-4) than the curvature left out (4e-8 x²).
NARROW_BIN = 1e-3


class BoundTerms(NamedTuple):
    """The bound of B samples, all in bits/dim but the last; float64 on the CPU.

    total_b: prior_b plus the sum of terms_bt over t; at least −log₂ p(x_0) / dim in expectation over the noise.
    prior_b: L_T, the information that x_T still has about x_0.
    terms_bt: by t, ascending: L_0, then the KL terms.
    x_start_mse_bt: mean squared error per dimension of x̂_0(x_t, t), on the scale of [−1, 1].
    """

    total_b: Tensor
    prior_b: Tensor
    terms_bt: Tensor
    x_start_mse_bt: Tensor


class RateDistortion(NamedTuple):
    """Progressive lossy compression (Section 4.3, Table 4), [T] each, after 1, 2, …, T reverse steps."""

    num_reverse_steps: np.ndarray
    rate_bpd: np.ndarray
    rmse: np.ndarray  # on the scale [0, 255]


# ---- the terms -----------------------------------------------------------------------------------------------------


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(dim=1) / math.log(2)


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def gaussian_kl_nats(
    mean1: Tensor, log_variance1: Tensor | float, mean2: Tensor, log_variance2: Tensor | float
) -> Tensor:
    """KL(N(mean1, σ1²) ‖ N(mean2, σ2²)) in nats, per dimension; arguments broadcast."""
    log_ratio = _as_tensor(log_variance2, mean1) - _as_tensor(log_variance1, mean1)
    precision = torch.exp(-_as_tensor(log_variance2, mean1))
    return 0.5 * (log_ratio + torch.expm1(-log_ratio) + (mean1 - mean2).square() * precision)


def _log_normal_cdf(x: Tensor) -> Tensor:
    """log Φ(x). torch.special.log_ndtr has the same values, but its gradient loses all digits far below 0."""
    low = x.clamp(max=-1.0)
    tail = torch.log(0.5 * torch.special.erfcx(low * -math.sqrt(0.5))) - 0.5 * low.square()
    return torch.where(x < -1, tail, torch.special.log_ndtr(x.clamp(min=-1.0)))


def discretized_log_likelihood_nats(
    x_start: Tensor, mean: Tensor, log_variance: Tensor | float, *, num_levels: int | None
) -> Tensor:
    """log p(x_0 | x_1) of the decoder (Eq. 13), in nats, per dimension.

    N(mean, σ²) is integrated over x_0's bin, which is 2/(num_levels − 1) wide, and open to the outside at the lowest
    and the highest level. `x_start` lies in [−1, 1]. With `num_levels` None, for points, it is the density itself,
    N(x_0; mean, σ²). The integral is exact (the paper's code approximates the distribution function by a tanh) and in
    log space: it does not underflow, so it needs no floor (the paper's code has one at 1e-12).
    """
    log_variance = _as_tensor(log_variance, mean)
    inverse_sigma = torch.exp(-0.5 * log_variance)
    x = (x_start - mean) * inverse_sigma
    log_density = -0.5 * (x.square() + log_variance + math.log(2 * math.pi))
    if num_levels is None:
        return log_density
    half_bin = 1 / (num_levels - 1)
    width = 2 * half_bin * inverse_sigma
    # P[a < z < b] = Φ(b) − Φ(a); mirrored into the lower tail, where Φ keeps its relative precision
    lower, upper = x - 0.5 * width, x + 0.5 * width
    lower, upper = torch.where(x > 0, -upper, lower), torch.where(x > 0, -lower, upper)
    log_upper = _log_normal_cdf(upper)
    log_ratio = (_log_normal_cdf(lower) - log_upper).clamp(max=-torch.finfo(x.dtype).tiny)
    inside = log_upper + torch.log(-torch.expm1(log_ratio))
    inside = torch.where(width < NARROW_BIN, log_density + math.log(2 * half_bin), inside)
    lowest, highest = x_start < -1 + half_bin / 4, x_start > 1 - half_bin / 4  # the paper's ±0.999 at 256 levels
    open_end = _log_normal_cdf(torch.where(lowest, x + 0.5 * width, 0.5 * width - x))
    return torch.where(lowest | highest, open_end, inside)


def prior_bpd(diffusion: GaussianDiffusion, x_start: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) (Eq. 5) of x_start [B, ...] in [−1, 1], in bits/dim: [B]."""
    q = diffusion.q_mean_variance(x_start, diffusion.num_timesteps - 1)
    return _bits_per_dim(gaussian_kl_nats(q.mean, q.log_variance, torch.zeros_like(q.mean), 0.0))


def vb_terms_bpd(
    diffusion: GaussianDiffusion,
    model_output: Tensor,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    clip_denoised: bool | Callable[[Tensor], Tensor] = True,
    num_levels: int | None = 256,
) -> Tensor:
    """Each sample's term of the bound (Eq. 5) at its own t, in bits/dim: [B].

    KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)), and at t = 0 the decoder's −log p_θ(x_0 | x_1). `x_start`, in
    [−1, 1], and `x_t` are [B, ...], float32 or float64; `model_output` as in `p_mean_variance`; `t` [B], 0-based.
    `clip_denoised` is on when the bound is evaluated and off in training, as in the paper's code. `num_levels` is that
    of the data: 256 for images, 17 for the digits, None for points, whose decoder is a Gaussian density.
    """
    p = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised=clip_denoised)
    return _term(diffusion, p, x_start, x_t, t, num_levels)


def _term(diffusion: GaussianDiffusion, p: Any, x_start: Tensor, x_t: Tensor, t: Tensor, num_levels: Any) -> Tensor:
    q = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    kl = gaussian_kl_nats(q.mean, q.log_variance, p.mean, p.log_variance)
    is_first = (t.to(x_t.device) == 0).view(-1, *(1,) * (x_t.ndim - 1))
    # elsewhere the decoder gets a perfect mean, so that no overflow there can reach a gradient
    mean = torch.where(is_first, p.mean, x_start)
    decoder = -discretized_log_likelihood_nats(x_start, mean, p.log_variance, num_levels=num_levels)
    return _bits_per_dim(torch.where(is_first, decoder, kl))


@torch.no_grad()
def bits_per_dim(
    unet: Any,
    scheduler: Any,
    x_start: Tensor,
    *,
    seed: int,
    clip_denoised: bool | Callable[[Tensor], Tensor] = True,
    num_levels: int | None = 256,
    round_below: int = 0,
    num_inference_steps: int | None = None,
    num_timesteps_subset: int | None = None,
    class_labels: Tensor | Sequence[int] | int | None = None,
    batch_size: int = 256,
    first_index: int = 0,
    progress: bool = False,
    on_progress: Callable[[int], Any] | None = None,
) -> BoundTerms:
    """The bound of `x_start` under a model, with every term (Eq. 5), one draw of x_t for each sample and t.

    The network runs in its own precision, everything after it in float64. Noise is keyed (seed, t, index of the
    sample): the result depends on neither `batch_size`, but for the rounding of kernels, nor on the other samples.

    Args:
        unet: the network, ours or stock's, on any device; or any function of (x_t, t) that returns a tensor, or an
            object that has it as `.sample`.
        scheduler: a `DDPMPaperScheduler`, or any whose configuration describes a DDPM.
        x_start: samples [B, ...] in [−1, 1]; points [B, d] as they are.
        seed: the noise's.
        clip_denoised: clamp x̂_0 to [−1, 1]; pass False for points, or for a model that samples without clamping; a
            function is applied to x̂_0 instead.
        num_levels: the data's: 256, 17 for the digits, None for points.
        round_below: at t below this, 0-based, round x̂_0 to the nearest level as well. Off by default, as in the paper;
            with few levels it lowers the bound, which stays one (docs/surprises.md). Choose it on training data. The
            mean of `previous_sample` is the network's output, rounded or not.
        num_inference_steps: evaluate the chain that samples in this many steps; by default the scheduler's own.
        num_timesteps_subset: evaluate only this many terms per sample: from 2 on always L_0, which may be as large as
            all others together, and one drawn from each of the other ranges of `subset_edges`, weighted by the range's
            length. Entries that are not drawn are 0, and every mean is an unbiased estimate.
        class_labels: integers, one or [B], for the bound on −log p(x_0 | y) of a conditional network; None for that on
            −log p(x_0), by its evaluations without a label.
        batch_size: how many pairs of sample and t the network sees at once.
        first_index: the index of x_start[0] in its data set, where x_start is a part of one.
        progress: show a progress bar.
        on_progress: called after each evaluation of the network with the number of pairs it saw.

    Raises ValueError for samples outside [−1, 1], for numbers outside their range, and where ε says nothing about x_0
    because ᾱ_T is 0.
    """
    scheduler = paper_scheduler(scheduler)
    chain: GaussianDiffusion = scheduler.chain(num_inference_steps)
    total, size = chain.num_timesteps, len(x_start)
    subset = total if num_timesteps_subset is None else num_timesteps_subset
    require_integer("num_timesteps_subset", subset, 1, total)
    require_integer("batch_size", batch_size, 1)
    require_integer("first_index", first_index, 0)
    require_integer("num_levels", 2 if num_levels is None else num_levels, 2)
    require_integer("round_below", round_below, 0, len(scheduler))
    if num_levels is None and round_below:
        raise ValueError(f"round_below={round_below} rounds x̂_0 to levels, and points have none")
    require_samples(x_start, num_levels)
    labels = None if class_labels is None else checked_labels(class_labels, size)
    if not np.isfinite(chain.c_skip[-1]):
        raise ValueError("ᾱ is 0 at the last timestep: ε gives no x_0 there, and the bound is infinite")
    t_bs, weight_s = _drawn_timesteps(total, subset, seed, range(first_index, first_index + size))
    device, dtype = place_of(unet)
    exact = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    x_start = x_start.to(exact, torch.float64)

    terms_bt, mse_bt = (torch.zeros(size, total, dtype=torch.float64) for _ in range(2))
    with evaluation_mode(unet) if isinstance(unet, nn.Module) else contextlib.nullcontext():
        starts = range(0, size * subset, batch_size)  # t by t, so that a batch has few different ones
        for first in tqdm(starts, desc="bits/dim", disable=not progress):
            s, b = np.divmod(np.arange(first, min(first + batch_size, size * subset)), size)
            t = t_bs[b, s]
            times = chain.timesteps[t]
            noise = _noise(seed, times, first_index + b, tuple(x_start.shape[1:])).to(exact)
            x, index = x_start[torch.from_numpy(b).to(exact)], torch.from_numpy(t).to(exact)
            x_t = chain.q_sample(x, index, noise)
            at = torch.from_numpy(times).to(device)
            conditions = {} if labels is None else {"class_labels": labels[torch.from_numpy(b)]}
            output = unet(x_t.to(device, dtype), at, **conditions)
            output = (output if isinstance(output, Tensor) else output.sample).to(exact, torch.float64)
            clip = clip_denoised
            if num_levels is not None and times.min() < round_below:
                early = torch.from_numpy(times < round_below).to(exact)
                clip = partial(_rounded_where, early, num_levels, clip_denoised)
            p = chain.p_mean_variance(output, x_t, index, clip_denoised=clip)
            weight = torch.from_numpy(weight_s[s])
            terms_bt[b, t] = weight * _term(chain, p, x, x_t, index, num_levels).cpu()
            mse_bt[b, t] = weight * (p.x_start - x).square().flatten(1).mean(dim=1).cpu()
            if on_progress is not None:
                on_progress(len(b))
    prior_b = prior_bpd(chain, x_start).cpu()
    return BoundTerms(prior_b + terms_bt.sum(dim=1), prior_b, terms_bt, mse_bt)


def class_bounds_bpd(unet: Any, scheduler: Any, x_start: Tensor, classes: Sequence[int], **options: Any) -> Tensor:
    """The bound on −log p(x_0 | y) of every sample for each class, in bits/dim: [B, Y] float64.

    Noise and timesteps are the same for all classes, so that what they share drops out of differences. Where all
    classes are equally likely, the lowest is the guess (Li et al. 2023, arXiv 2303.16203), best with variances that
    fit: those of fixed_small make differences too large. `options` as of `bits_per_dim`, and so what is refused.
    """
    if not len(classes):
        raise ValueError("classes names no class")
    bounds = []
    for label in classes:
        bounds.append(bits_per_dim(unet, scheduler, x_start, class_labels=label, **options).total_b)
    return torch.stack(bounds, dim=1)


def _rounded_where(early: Tensor, num_levels: int, clip_denoised: Any, x_start: Tensor) -> Tensor:
    """x̂_0 as `clip_denoised` leaves it, and where `early` [B] at the nearest of the levels in [−1, 1]."""
    x_start = clipped(x_start, clip_denoised)
    half = (num_levels - 1) / 2
    rounded = ((x_start.clamp(-1, 1) + 1) * half).round() / half - 1
    return torch.where(early.view(-1, *(1,) * (x_start.ndim - 1)), rounded, x_start)


def subset_edges(total: int, subset: int) -> np.ndarray:
    """The edges of the ranges of t from each of which `bits_per_dim` draws one term: int64 [S + 1].

    L_0 has a range of its own. The others grow with t, because terms fall about as 1/t: so no term has a large weight.
    """
    if subset == 1:
        return np.array([0, total])
    growing = np.floor(np.geomspace(1, total, subset)).astype(np.int64)
    edges = np.append(0, np.maximum(growing, np.arange(1, subset + 1)))
    edges[-1] = total
    return edges


def _drawn_timesteps(total: int, subset: int, seed: int, indices: range) -> tuple[np.ndarray, np.ndarray]:
    """One t from each of `subset` ranges for each sample, int64 [B, S], and the ranges' lengths, float64 [S]."""
    edges = subset_edges(total, subset)
    lengths = np.diff(edges)
    quantiles = np.stack([keyed_generator(seed, "bound timesteps", 0, i).random(subset) for i in indices])
    return edges[:-1] + (quantiles * lengths).astype(np.int64), lengths.astype(np.float64)


def _noise(seed: int, times: np.ndarray, indices: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Standard Gaussian noise, one keyed draw per pair of time and sample: float64 [len(times), *shape]."""
    noise = np.empty((len(times), *shape))
    for row, generator in zip(noise, keyed_generators(seed, "bound", times.tolist(), indices.tolist()), strict=True):
        generator.standard_normal(out=row)
    return torch.from_numpy(noise)


# ---- rate and distortion -------------------------------------------------------------------------------------------


def rate_distortion(terms: BoundTerms) -> RateDistortion:
    """Rate against distortion of the idealised progressive code (Section 4.3), as means over the samples.

    After n of T reverse steps the receiver knows x_t at t = T − n (0-based): it has paid L_T and the KL terms above t,
    the rate, and shows x̂_0(x_t, t), whose root mean squared error on [0, 255] is the distortion. The rate of all T
    steps leaves out L_0, which would make the code lossless. Idealised: actual codes of single steps cost more.
    """
    mean_t = terms.terms_bt.mean(dim=0).numpy()
    paid = np.append(np.cumsum(mean_t[:0:-1]), 0.0)  # by the number of steps less one; the last entry is a placeholder
    rate = terms.prior_b.mean().item() + np.roll(paid, 1)
    rmse = 127.5 * np.sqrt(terms.x_start_mse_bt.mean(dim=0).numpy()[::-1])
    return RateDistortion(np.arange(1, len(mean_t) + 1), rate, rmse)
