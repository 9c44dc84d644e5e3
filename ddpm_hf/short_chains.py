"""Fewer reverse steps at little cost: variances fitted to a network, and timesteps chosen for it.

Both need one table, the mean squared error of x̂_0(x_t, t) per dimension at every t: the mean over training samples of
`likelihood.bits_per_dim(...).x_start_mse_bt`. Among variances that do not depend on x_t, that of least KL divergence
is σ_t² = β̃_t + c_t² mse_t (Bao et al. 2022, Analytic-DPM, Theorem 1), and a step then costs
½ log₂(1 + c_t² mse_t / β̃_t) bits/dim. That cost depends only on where a step begins and ends, so the best chain of
K steps is a shortest path (Watson et al. 2021).
"""

import math
from typing import Any

import numpy as np
import torch

from .likelihood import discretized_log_likelihood_nats
from .scheduler import DDPMPaperScheduler, GaussianDiffusion, paper_scheduler


def step_costs_bpd(diffusion: GaussianDiffusion, x_start_mse: np.ndarray) -> np.ndarray:
    """Expected KL of the step from t = column down to t = row, with its fitted variance: float64 [T, T], in bits/dim.

    ½ log₂(1 + c² mse/β̃), which is ½ log₂(1 + (SNR_row − SNR_column) mse) with SNR = ᾱ/(1 − ᾱ). `x_start_mse` [T].
    Entries on and below the diagonal, which are no steps, are infinite.
    """
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    with np.errstate(invalid="ignore"):  # below the diagonal
        cost = 0.5 * np.log1p((snr[:, None] - snr[None, :]) * x_start_mse[None, :]) / math.log(2)
    return np.where(np.triu(np.ones_like(cost), k=1) > 0, cost, np.inf)


def decoder_costs_bpd(x_start_mse: np.ndarray, num_levels: int | None) -> np.ndarray:
    """Expected L_0 if t were the last step and the error of x̂_0 were N(0, mse_t): float64 [T], in bits/dim."""
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)  # for the trapezoidal rule, which is exact to rounding here
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    mse = torch.tensor(x_start_mse)[:, None]
    middle = torch.zeros(len(mse), len(z), dtype=torch.float64)  # a level whose bin is open at neither end
    nats = -discretized_log_likelihood_nats(middle, mse.sqrt() * z, mse.log(), num_levels=num_levels)
    return torch.trapezoid(density * nats, z, dim=1).numpy() / math.log(2)


def _table(diffusion: GaussianDiffusion, x_start_mse: Any) -> np.ndarray:
    """`x_start_mse`, array or tensor, checked by the process: float64 [T]. Raises ValueError for another table."""
    types = diffusion.prediction_type, "fitted"
    table: Any = GaussianDiffusion(diffusion.betas, *types, x_start_mse=np.asarray(x_start_mse)).x_start_mse
    if np.isnan(table).any():
        raise ValueError(f"x_start_mse must hold a number at every timestep, got {table}")
    return table


def choose_timesteps(
    diffusion: GaussianDiffusion, x_start_mse: Any, num_steps: int, *, num_levels: int | None = 256
) -> np.ndarray:
    """The `num_steps` timesteps, ascending and ending at T − 1, of least expected bound: int64 [K].

    By dynamic programming over all chains. `x_start_mse` [T], positive; `num_levels` as in `likelihood`. Raises
    ValueError for another table, and unless 1 ≤ num_steps ≤ T.
    """
    total = diffusion.num_timesteps
    mse = _table(diffusion, x_start_mse)
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps={num_steps} must lie in [1, {total}]")
    costs = step_costs_bpd(diffusion, mse)
    best = decoder_costs_bpd(mse, num_levels)  # the cost of the best chain so far, by its highest timestep
    came_from = []
    for _ in range(num_steps - 1):
        through = best[:, None] + costs
        came_from.append(through.argmin(axis=0))
        best = through.min(axis=0)
    timesteps = [total - 1]
    for previous in reversed(came_from):
        timesteps.append(int(previous[timesteps[-1]]))
    return np.array(timesteps[::-1], dtype=np.int64)


def shortened(
    scheduler: Any, x_start_mse: Any, *, num_steps: int | None = None, num_levels: int | None = 256
) -> DDPMPaperScheduler:
    """The scheduler with fitted variances, sampling in `num_steps` chosen timesteps, or in all where it is None.

    `x_start_mse` [T], array or tensor, is the network's; `num_levels` is the data's. The result is saved and used like
    any other scheduler. Raises ValueError for networks that predict a variance, or the mean of a single step.
    """
    scheduler = paper_scheduler(scheduler)
    for key, value in (("variance_type", "learned"), ("prediction_type", "previous_sample")):
        if scheduler.config[key] == value:
            raise ValueError(
                f"{key}={value!r}: variances are fitted to networks that predict ε, x_0 or v, and no more"
            )
    mse, timesteps = _table(scheduler.diffusion, x_start_mse), None
    if num_steps is not None:
        timesteps = choose_timesteps(scheduler.diffusion, mse, num_steps, num_levels=num_levels)
    short: Any = DDPMPaperScheduler.from_config(
        scheduler.config,
        variance_type="fitted",
        inference_timesteps=None if timesteps is None else timesteps.tolist(),
        x_start_mse=(mse if timesteps is None else mse[timesteps]).tolist(),
    )
    return short
