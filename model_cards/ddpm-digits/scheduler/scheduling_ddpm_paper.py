"""The diffusion process of Ho et al. 2020 (arXiv 2006.11239) and the scheduler that gives it to diffusers.

First the mathematics in the paper's symbols, `GaussianDiffusion`; then its adapter, `DDPMPaperScheduler`.
This file is copied into checkpoints, so it depends on torch, numpy and diffusers alone.

Time is 0-based everywhere: t = 0 is the paper's t = 1, the last step of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "previous_sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "fitted")
# The tables of σ_t² and its logarithm; a learned one has none.
VARIANCE_TABLES = {
    "fixed_small": ("posterior_variance", "posterior_log_variance_clipped"),
    "fixed_large": ("betas", "fixed_large_log_variance"),
    "fitted": ("fitted_variance", "fitted_log_variance"),
}
STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
BETA_SCHEDULES = (*STOCK_BETA_SCHEDULES, "quad", "const", "jsd", "warmup10", "warmup50")
ENDS_BLIND = "ᾱ is 0 at timestep {}: ε gives no x_0 there; use v_prediction or sample"
MIN_ALPHA_CUMPROD = 1e-300  # below, 1/ᾱ overflows
MAX_TIMESTEPS = 1_000_000  # a slip of the finger must not take all memory
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


def _require(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not supported; choose one of {', '.join(allowed)}")


def _in_float(sample: Any, model_output: Any) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 where `sample` is. Raises ValueError for what is no floating-point tensor."""
    for x in (model_output, sample):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"model_output and sample must be floating-point tensors, got {kind}")
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    return sample.to(dtype), model_output.to(dtype)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _numbers(name: str, values: Any) -> np.ndarray:
    """`values` as float64. Raises ValueError where they are no numbers."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of numbers, got {str(values)[:100]}") from None


def make_betas(beta_schedule: str, num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β_1 … β_T in float64, [T]: the six schedules of the paper's code and stock diffusers' two others.

    `beta_start` and `beta_end` have no effect on `jsd` (1/T, 1/(T−1), …, 1) and `squaredcos_cap_v2`.
    Raises ValueError for an unknown schedule.
    """
    _require("beta_schedule", beta_schedule, BETA_SCHEDULES)
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, num_timesteps)
    if beta_schedule in ("quad", "scaled_linear"):
        return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
    if beta_schedule == "jsd":
        return 1.0 / np.linspace(num_timesteps, 1, num_timesteps)
    if beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, Eq. 17
        f = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - f[1:] / f[:-1], 0.999)
    betas = np.full(num_timesteps, float(beta_end))  # const
    if beta_schedule in ("warmup10", "warmup50"):
        warmup = int(num_timesteps * (0.1 if beta_schedule == "warmup10" else 0.5))
        betas[:warmup] = np.linspace(beta_start, beta_end, warmup)
    return betas


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale √ᾱ so that ᾱ_T = 0 (Lin et al. 2023, Algorithm 1); float64, [T]."""
    sqrt_alphas_cumprod = np.sqrt(np.cumprod(1 - betas))
    first, last = sqrt_alphas_cumprod[0], sqrt_alphas_cumprod[-1]
    alphas_cumprod = ((sqrt_alphas_cumprod - last) * first / (first - last)) ** 2
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def _droppable(config: Mapping[str, Any]) -> list[str]:
    """Of the values a configuration left at its class's defaults, those that another class may replace by its own.

    diffusers replaces all of them, so that Heun built from our configuration would get other betas than the network
    was trained with; only how timesteps are spaced in sampling is a scheduler's own affair.
    """
    return [key for key in ("timestep_spacing", "steps_offset") if key in config.get("_use_default_values", [])]


class MeanVariance(NamedTuple):
    """A diagonal Gaussian. `variance` and `log_variance` are floats for an int t, else they broadcast over `mean`."""

    mean: Tensor
    variance: Tensor | float
    log_variance: Tensor | float


class ReverseMeanVariance(NamedTuple):
    """p_θ(x_{t−1} | x_t) as `MeanVariance`, and the x̂_0 it goes through."""

    mean: Tensor
    variance: Tensor | float
    log_variance: Tensor | float
    x_start: Tensor


@dataclass(frozen=True, eq=False)
class GaussianDiffusion:
    """The forward process q, its posterior, and the reverse process p_θ (Sections 2 and 3 of the paper).

    Tables are float64 and read-only, [T]; they are rounded to the tensors' dtype only when gathered, as in the
    paper's code. Tensors are [B, ...] in float32 or float64; half precision is refused with a TypeError, because in
    bfloat16 the first steps would add no noise at all. `t` is 0-based: an int for the whole batch, whose coefficients
    are then Python floats and cost no device synchronisation, or an integer tensor [B]. A t outside the table is a
    ValueError (on an accelerator, where looking would cost a synchronisation, the device's own index error).

    `timesteps` [T] are the times at which the network is asked; they differ from 0 … T−1 in a respaced process.
    `x_start_mse` [T], where given, is the mean squared error per dimension of a network's x̂_0 at these times; the
    `fitted` variances follow from it: σ_t² = β̃_t + c_t² mse_t, with c_t the weight of x_0 in the posterior mean. They
    are the variances of least bound for that network (Bao et al. 2022, Analytic-DPM, Theorem 1).
    """

    betas: np.ndarray
    timesteps: np.ndarray = field(default=None)  # type: ignore[assignment]
    x_start_mse: np.ndarray | None = None
    alphas_cumprod: np.ndarray = field(init=False)
    alphas_cumprod_prev: np.ndarray = field(init=False)
    sqrt_alphas_cumprod: np.ndarray = field(init=False)
    sqrt_one_minus_alphas_cumprod: np.ndarray = field(init=False)
    log_one_minus_alphas_cumprod: np.ndarray = field(init=False)
    sqrt_recip_alphas_cumprod: np.ndarray = field(init=False)
    sqrt_recipm1_alphas_cumprod: np.ndarray = field(init=False)
    posterior_variance: np.ndarray = field(init=False)
    posterior_log_variance_clipped: np.ndarray = field(init=False)
    posterior_mean_coef1: np.ndarray = field(init=False)
    posterior_mean_coef2: np.ndarray = field(init=False)
    fixed_large_log_variance: np.ndarray = field(init=False)
    fitted_variance: np.ndarray | None = field(init=False, default=None)
    fitted_log_variance: np.ndarray | None = field(init=False, default=None)
    _gathered: dict = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
            raise ValueError(f"betas must be a non-empty vector inside (0, 1); only the last may be 1; got {betas}")
        timesteps = np.arange(len(betas)) if self.timesteps is None else np.array(self.timesteps, dtype=np.int64)
        if timesteps.shape != betas.shape:
            raise ValueError(f"timesteps has shape {timesteps.shape}, betas {betas.shape}; they must be equal")
        alphas_cumprod = np.cumprod(1 - betas)
        if (
            alphas_cumprod[0] == 1
            or not np.all(alphas_cumprod[:-1] > 0)
            or (alphas_cumprod[-1] == 0) != (betas[-1] == 1)
            or np.any((alphas_cumprod > 0) & (alphas_cumprod < MIN_ALPHA_CUMPROD))
        ):
            raise ValueError(
                "betas are too small or too many for float64: ᾱ must stay inside (0, 1), and runs from "
                f"{alphas_cumprod[0]} to {alphas_cumprod[-1]}"
            )
        previous = np.append(1.0, alphas_cumprod[:-1])
        variance = betas * (1 - previous) / (1 - alphas_cumprod)  # β̃_t, Eq. 7
        # β̃ is 0 at t = 0, where only the decoder's likelihood needs a log-variance: the paper's code repeats β̃[1].
        first = variance[1] if len(betas) > 1 else betas[0]
        with np.errstate(divide="ignore"):  # ᾱ_T = 0 (zero terminal SNR): infinite entries that ε may not use
            tables = {
                "betas": betas,
                "timesteps": timesteps,
                "alphas_cumprod": alphas_cumprod,
                "alphas_cumprod_prev": previous,
                "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
                "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
                "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
                "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
                "posterior_variance": variance,
                "posterior_log_variance_clipped": np.log(np.append(first, variance[1:])),
                "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_cumprod),
                "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
                "fixed_large_log_variance": np.log(np.append(first, betas[1:])),
            }
        if self.x_start_mse is not None:
            mse = _numbers("x_start_mse", self.x_start_mse)
            if mse.shape != betas.shape or not (np.all(mse > 0) and np.all(np.isfinite(mse))):
                raise ValueError(f"x_start_mse must hold {len(betas)} positive numbers, one per timestep; got {mse}")
            fitted = variance + tables["posterior_mean_coef1"] ** 2 * mse
            tables |= {"x_start_mse": mse, "fitted_variance": fitted, "fitted_log_variance": np.log(fitted)}
        for name, table in tables.items():
            table.flags.writeable = False
            object.__setattr__(self, name, table)

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def _at(self, name: str, t: Tensor | int, x: Tensor) -> Any:
        """Table `name` at t: a float for an int t, else x.dtype [B, 1, …] on x's device."""
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"GaussianDiffusion computes in float32 or float64, got {x.dtype}; cast to float32 first")
        if isinstance(t, int | np.integer):
            if not 0 <= t < self.num_timesteps:
                raise ValueError(f"t={t} is outside [0, {self.num_timesteps})")
            return float(getattr(self, name)[t])
        if not isinstance(t, Tensor):
            raise ValueError(f"t is {t!r}; expected one integer per sample, ({len(x)},), as a tensor")
        if t.shape != x.shape[:1] or t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(f"t has shape {tuple(t.shape)}, {t.dtype}; expected one integer per sample, ({len(x)},)")
        if t.device.type == "cpu" and len(t) and not (0 <= int(t.min()) and int(t.max()) < self.num_timesteps):
            raise ValueError(f"t={t.tolist()} leaves [0, {self.num_timesteps})")
        key = name, x.device, x.dtype
        if key not in self._gathered:  # cast before moving: MPS has no float64
            self._gathered[key] = torch.tensor(getattr(self, name)).to(x.dtype).to(x.device)
        return self._gathered[key][t.to(x.device)].view(-1, *(1,) * (x.ndim - 1))

    @staticmethod
    def _same_shape(**tensors: Tensor) -> None:
        if len({x.shape for x in tensors.values()}) > 1:
            raise ValueError("shapes differ: " + ", ".join(f"{k} {tuple(x.shape)}" for k, x in tensors.items()))

    # ---- forward process -------------------------------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor | int) -> MeanVariance:
        """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) (Eq. 4); t 0-based."""
        deviation = self._at("sqrt_one_minus_alphas_cumprod", t, x_start)
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        return MeanVariance(self._at("sqrt_alphas_cumprod", t, x_start) * x_start, deviation**2, log_variance)

    def q_sample(self, x_start: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Eq. 4, reparameterized), with ε = `noise` of x_start's shape; t 0-based."""
        self._same_shape(x_start=x_start, noise=noise)
        signal, sigma = (
            self._at("sqrt_alphas_cumprod", t, x_start),
            self._at("sqrt_one_minus_alphas_cumprod", t, x_start),
        )
        return signal * x_start + sigma * noise

    def velocity(self, x_start: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, Section 4); t 0-based."""
        self._same_shape(x_start=x_start, noise=noise)
        signal, sigma = (
            self._at("sqrt_alphas_cumprod", t, x_start),
            self._at("sqrt_one_minus_alphas_cumprod", t, x_start),
        )
        return signal * noise - sigma * x_start

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor | int) -> MeanVariance:
        """q(x_{t−1} | x_t, x_0) = N(μ̃_t, β̃_t I) (Eqs. 6–7); t 0-based; the log-variance at 0 is that of t = 1."""
        self._same_shape(x_start=x_start, x_t=x_t)
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        return MeanVariance(coef1 * x_start + coef2 * x_t, self._at("posterior_variance", t, x_t), log_variance)

    # ---- reverse process -------------------------------------------------------------------------------------------

    def predict_x_start(self, model_output: Tensor, x_t: Tensor, t: Tensor | int, prediction_type: str) -> Tensor:
        """x̂_0 from the network's output, unclipped, by solving Eq. 4 (ε, v) or Eq. 7 (x_{t−1}); t 0-based."""
        self._same_shape(model_output=model_output, x_t=x_t)
        if prediction_type == "epsilon":
            recip, recipm1 = (self._at(f"sqrt_{name}_alphas_cumprod", t, x_t) for name in ("recip", "recipm1"))
            return recip * x_t - recipm1 * model_output
        if prediction_type == "previous_sample":
            coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
            return (1 / coef1) * model_output - (coef2 / coef1) * x_t
        if prediction_type == "v_prediction":
            signal, sigma = self._at("sqrt_alphas_cumprod", t, x_t), self._at("sqrt_one_minus_alphas_cumprod", t, x_t)
            return signal * x_t - sigma * model_output
        _require("prediction_type", prediction_type, PREDICTION_TYPES)
        return model_output

    def predict_eps(self, x_start: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """ε = (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t) (Eq. 4 solved for ε); t 0-based."""
        self._same_shape(x_start=x_start, x_t=x_t)
        signal, sigma = self._at("sqrt_alphas_cumprod", t, x_t), self._at("sqrt_one_minus_alphas_cumprod", t, x_t)
        return (x_t - signal * x_start) / sigma

    def score(self, eps: Tensor, t: Tensor | int) -> Tensor:
        """∇ log q(x_t) ≈ −ε / √(1 − ᾱ_t), the link to denoising score matching (Section 3.2); t 0-based."""
        return eps / -self._at("sqrt_one_minus_alphas_cumprod", t, eps)

    def p_mean_variance(
        self,
        model_output: Tensor,
        x_t: Tensor,
        t: Tensor | int,
        *,
        prediction_type: str,
        variance_type: str,
        clip_denoised: bool | Callable[[Tensor], Tensor] = True,
    ) -> ReverseMeanVariance:
        """p_θ(x_{t−1} | x_t) (Eq. 1), its mean through x̂_0 and the posterior, as in the paper's code; t 0-based.

        `model_output` has x_t's shape; for `learned` twice its channels, the second half being the log-variance.
        `clip_denoised` True clamps x̂_0 to [−1, 1]; a function is applied to x̂_0 in its place. It does not touch the
        mean of `previous_sample`, which is the network's output itself.
        """
        _require("variance_type", variance_type, VARIANCE_TYPES)
        if variance_type == "fitted" and self.x_start_mse is None:
            raise ValueError("variance_type='fitted' needs a process with x_start_mse")
        if variance_type == "learned":
            if model_output.shape[1] != 2 * x_t.shape[1]:
                raise ValueError(f"learned variance needs {2 * x_t.shape[1]} channels, got {model_output.shape[1]}")
            model_output, log_variance = model_output.chunk(2, dim=1)
            variance = log_variance.exp()
        else:
            variance, log_variance = (self._at(name, t, x_t) for name in VARIANCE_TABLES[variance_type])
        x_start = self.predict_x_start(model_output, x_t, t, prediction_type)
        if callable(clip_denoised):
            x_start = clip_denoised(x_start)
        elif clip_denoised:
            x_start = x_start.clamp(-1, 1)
        if prediction_type == "previous_sample":
            mean = model_output
        else:
            mean = self.q_posterior_mean_variance(x_start, x_t, t).mean
        return ReverseMeanVariance(mean, variance, log_variance, x_start)

    def reverse_weights(self, prediction_type: str, variance_type: str) -> list[tuple[float, ...]]:
        """(a, b, c_1, c_2, σ) for each t: x̂_0 = a x_t + b f, and x_{t−1} = c_1 x̂_0 + c_2 x_t + σ z (Algorithm 2).

        f is a network's output of type ε, x_0 or v, and σ from a table; the numbers are `p_mean_variance`'s.
        """
        of_output = {
            "epsilon": (self.sqrt_recip_alphas_cumprod, -self.sqrt_recipm1_alphas_cumprod),
            "sample": (np.zeros(self.num_timesteps), np.ones(self.num_timesteps)),
            "v_prediction": (self.sqrt_alphas_cumprod, -self.sqrt_one_minus_alphas_cumprod),
        }
        deviation = np.exp(0.5 * getattr(self, VARIANCE_TABLES[variance_type][1]))
        columns = *of_output[prediction_type], self.posterior_mean_coef1, self.posterior_mean_coef2, deviation
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def respaced(self, timesteps: Sequence[int] | np.ndarray) -> GaussianDiffusion:
        """The process that visits only these strictly ascending `timesteps`: β'_i = 1 − ᾱ_{t_i} / ᾱ_{t_{i−1}}.

        q(x_t | x_0) is unchanged at the times kept (Nichol & Dhariwal 2021, Eq. 19). Raises ValueError.
        """
        kept = np.asarray(timesteps)
        if kept.ndim != 1 or not len(kept) or not np.issubdtype(kept.dtype, np.integer) or np.any(np.diff(kept) <= 0):
            raise ValueError(f"timesteps must be a non-empty, strictly ascending list of integers, got {timesteps}")
        if kept[0] < 0 or kept[-1] >= self.num_timesteps:
            raise ValueError(f"timesteps must lie in [0, {self.num_timesteps}), got {kept[0]} to {kept[-1]}")
        if len(kept) == self.num_timesteps:
            return self
        alphas_cumprod = self.alphas_cumprod[kept]
        mse = None if self.x_start_mse is None else self.x_start_mse[kept]
        return GaussianDiffusion(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), self.timesteps[kept], mse)


class DDPMPaperScheduler(SchedulerMixin, ConfigMixin):
    """`GaussianDiffusion` as a diffusers scheduler: one reverse step of Algorithm 2, through the clipped x̂_0.

    Configuration names and values are stock DDPMScheduler's, except:

    - `beta_schedule` also takes the paper code's `quad`, `const`, `jsd`, `warmup10`, `warmup50`; for those the
      configuration carries `trained_betas`, so that every other diffusers scheduler can be built from it.
      `sigmoid` and `laplace` are refused.
    - `prediction_type` also takes `previous_sample`, the paper's μ̃ (Table 2).
    - `variance_type` is `fixed_small` (β̃_t), the paper's choice at 256² and stock's default; its CIFAR-10 runs have
      `fixed_large` (β_t). `learned` is a log-variance in the second half of the channels, as in the paper's code;
      stock's takes the square root of a raw network output. `fitted` follows from `x_start_mse`. Stock's `*_log`
      (which samples NaN for `fixed_large_log`) and `learned_range` are refused.
    - `inference_timesteps`, strictly ascending, are the chain to sample with where a caller asks for no number of
      steps; all of 0 … T−1 by default. `x_start_mse` has the network's error at each of them, for `fitted` (see
      `GaussianDiffusion`). The configuration has these two only where they are given.
    - `trained_betas` decides the number of timesteps; `num_train_timesteps` follows it.
    - ε cannot be turned into x̂_0 where ᾱ_t = 0: with `rescale_betas_zero_snr` it is refused.
    - The last step of a chain adds no noise (Algorithm 2, line 3), also where that chain does not end at t = 0
      (`trailing`, `steps_offset`), where stock with `fixed_large` would add some to the finished image.

    `diffusion` is the process over the training timesteps, in float64. Raises ValueError for anything unknown.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        inference_timesteps: Sequence[int] | None = None,
        x_start_mse: Sequence[float] | None = None,
    ):
        # Another scheduler built from this configuration would replace what was left at our defaults by its own.
        self.config.get("_use_default_values", [])[:] = _droppable(self.config)
        self._check_config()
        if trained_betas is not None:
            betas = _numbers("trained_betas", trained_betas)
            if betas.ndim != 1 or not len(betas):
                raise ValueError(f"trained_betas has shape {betas.shape}; it must be a non-empty list of numbers")
            num_train_timesteps = len(betas)
            self.register_to_config(num_train_timesteps=num_train_timesteps)
        else:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        may_end_at_one = beta_schedule == "jsd" or rescale_betas_zero_snr
        if not (
            np.all(betas > 0) and np.all(betas[:-1] < 1) and (betas[-1] < 1 or (betas[-1] == 1 and may_end_at_one))
        ):
            raise ValueError(f"betas must lie inside (0, 1), got {betas.min()} to {betas.max()}")
        if trained_betas is not None or beta_schedule not in STOCK_BETA_SCHEDULES:
            self.register_to_config(trained_betas=betas.tolist())
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)

        # Other schedulers warn of keys they do not know: only configurations that need these two have them.
        given = {"inference_timesteps": inference_timesteps, "x_start_mse": x_start_mse}
        absent = {key for key, value in given.items() if value is None}
        if not self.config.get("_use_default_values"):
            absent.add("_use_default_values")  # as where every value was given
        self._internal_dict = FrozenDict({key: value for key, value in self.config.items() if key not in absent})
        self.diffusion = self._default_chain = GaussianDiffusion(betas)
        if inference_timesteps is not None:
            self._require_whole(len(inference_timesteps))
            self._default_chain = self.diffusion.respaced(inference_timesteps)
            self.register_to_config(inference_timesteps=self._default_chain.timesteps.tolist())
        if x_start_mse is not None:
            self._default_chain = replace(self._default_chain, x_start_mse=x_start_mse)
        # For code that reads stock's attributes; the float64 truth is `diffusion`.
        self.betas = torch.tensor(self.diffusion.betas, dtype=torch.float32)
        self.alphas_cumprod = torch.tensor(self.diffusion.alphas_cumprod, dtype=torch.float32)
        self.set_timesteps()

    def _check_config(self) -> None:
        c = SimpleNamespace(**self.config)
        for name in ("beta_start", "beta_end", "dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value"):
            if not isinstance(self.config[name], int | float) or isinstance(self.config[name], bool):
                raise ValueError(f"{name}={self.config[name]!r} must be a number")
        for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
            if not isinstance(self.config[name], bool):
                raise ValueError(f"{name}={self.config[name]!r} must be true or false")
        _require("beta_schedule", c.beta_schedule, BETA_SCHEDULES)
        _require("variance_type", c.variance_type, VARIANCE_TYPES)
        _require("prediction_type", c.prediction_type, PREDICTION_TYPES)
        _require("timestep_spacing", c.timestep_spacing, TIMESTEP_SPACINGS)
        bounds = {
            "num_train_timesteps": (
                _is_whole(c.num_train_timesteps) and 1 <= c.num_train_timesteps <= MAX_TIMESTEPS,
                f"an int >= 1, and at most {MAX_TIMESTEPS}",
            ),
            "inference_timesteps": (
                c.inference_timesteps is None or (np.ndim(c.inference_timesteps) == 1 and len(c.inference_timesteps)),
                "a list of integers",
            ),
            "steps_offset": (_is_whole(c.steps_offset) and c.steps_offset >= 0, "an int >= 0"),
            "dynamic_thresholding_ratio": (0 < c.dynamic_thresholding_ratio <= 1, "in (0, 1]"),
            "clip_sample_range": (c.clip_sample_range > 0, "> 0"),
            "sample_max_value": (c.sample_max_value > 0, "> 0"),
        }
        for name, (holds, allowed) in bounds.items():
            if not holds:
                raise ValueError(f"{name}={self.config[name]!r} must be {allowed}")
        if (c.x_start_mse is not None) != (c.variance_type == "fitted"):
            raise ValueError("variance_type='fitted' needs x_start_mse, and no other variance has a use for it")
        if c.rescale_betas_zero_snr and c.prediction_type in ("epsilon", "previous_sample"):
            raise ValueError(
                f"rescale_betas_zero_snr cannot be used with prediction_type={c.prediction_type!r}: at zero terminal "
                "SNR x_T says nothing about x_0; use v_prediction or sample"
            )

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """As in diffusers, but what the other scheduler left at its defaults is kept where training depends on it."""
        if isinstance(config, dict):
            config = {**config, "_use_default_values": _droppable(config)}
            if config.get("variance_type") == "learned" and config.get("_class_name", cls.__name__) != cls.__name__:
                raise ValueError("variance_type='learned' of stock is not a log-variance; it has no equivalent here")
            if config.get("variance_type", "") is None:  # of schedulers that have no variance, such as DPM-Solver
                del config["variance_type"]
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """`sample` itself: DDPM's network sees x_t as it is. Present so that schedulers can be swapped."""
        return sample

    # ---- timesteps -------------------------------------------------------------------------------------------------

    def chain(
        self, num_inference_steps: int | None = None, timesteps: Sequence[int] | None = None
    ) -> GaussianDiffusion:
        """The process that samples in `num_inference_steps` in [1, T], or at these strictly descending `timesteps`.

        With neither, the configuration's own chain: `inference_timesteps`, else all T. Raises ValueError; also where
        the network's output would be taken for what it is not: μ̃ or the learned variance of one training step for that
        of a longer one, or a `fitted` variance at a timestep where none was fitted.
        """
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("pass one of num_inference_steps and timesteps")
        own = self.config.get("inference_timesteps")
        if timesteps is None and (num_inference_steps is None or (own and num_inference_steps == len(own))):
            return self._default_chain
        descending = np.asarray(self._spaced_timesteps(num_inference_steps) if timesteps is None else timesteps)
        numeric = np.issubdtype(descending.dtype, np.number) or descending.dtype == object  # object: above 2⁶³
        if descending.ndim != 1 or not len(descending) or not numeric or np.any(np.diff(descending) >= 0):
            raise ValueError(f"`timesteps` must be non-empty and in strictly descending order, got {timesteps}")
        if descending[0] >= len(self) or descending[-1] < 0:
            raise ValueError(f"`timesteps` must lie in [0, {len(self)}), got {descending[0]} to {descending[-1]}")
        ascending = descending[::-1]
        self._require_whole(len(ascending))
        if self.config["variance_type"] != "fitted":
            return self.diffusion.respaced(ascending)
        fitted = self._default_chain.timesteps
        if missing := set(ascending.tolist()) - set(fitted.tolist()):
            raise ValueError(
                f"timesteps {sorted(missing)} have no fitted variance; this scheduler's are {fitted.tolist()}"
            )
        return self._default_chain.respaced(np.searchsorted(fitted, ascending))

    def _require_whole(self, num_steps: int) -> None:
        for key, value in (("prediction_type", "previous_sample"), ("variance_type", "learned")):
            if self.config[key] == value and num_steps != len(self):
                raise ValueError(
                    f"{key}={value!r} belongs to single steps of training, so {num_steps} of {len(self)} cannot be "
                    "taken; sample with all of them"
                )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Sample with `chain(num_inference_steps, timesteps)` from now on."""
        self._chain = self.chain(num_inference_steps, timesteps)
        self._index = {int(t): i for i, t in enumerate(self._chain.timesteps)}
        self._clip = self.clip_denoised()
        self._weights: list[tuple[Any, ...]] | None = None  # made by the first step: many schedulers never take one
        self.timesteps = torch.from_numpy(self._chain.timesteps[::-1].copy()).to(device)
        self.num_inference_steps = num_inference_steps

    def _step_weights(self) -> list[tuple[Any, ...]]:
        """`reverse_weights` of the current chain; [] where the network's output is μ̃ itself, or has a variance too."""
        types = self.config["prediction_type"], self.config["variance_type"]
        if "previous_sample" in types or "learned" in types:
            return []
        # a product with a 0-d tensor takes half as long as one with a float, which becomes such a tensor first
        weights = self._chain.reverse_weights(*types)
        return [(torch.tensor(a, dtype=torch.float32), a, *others) for a, *others in weights]

    def _spaced_timesteps(self, n: int | None) -> np.ndarray:
        """n descending timesteps by `timestep_spacing` (Lin et al. 2023, Table 2), int64 [n]."""
        total = len(self)
        if n is None or not _is_whole(n) or not 1 <= n <= total:
            raise ValueError(f"num_inference_steps={n!r} must be an integer in [1, {total}]")
        if self.config["timestep_spacing"] == "linspace":
            return np.linspace(0, total - 1, n).round().astype(np.int64)[::-1]
        if self.config["timestep_spacing"] == "leading":
            return np.arange(n)[::-1] * (total // n) + self.config["steps_offset"]
        return np.round(total - np.arange(n) * (total / n)).astype(np.int64) - 1  # trailing

    def _chain_index(self, timestep: int | Tensor) -> int:
        """Position of `timestep` in the current chain, 0 being the last step of sampling."""
        try:
            if isinstance(timestep, str):
                raise TypeError
            return self._index[timestep if isinstance(timestep, int) else float(timestep)]  # type: ignore[index]
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"timestep={timestep} is not one of the current {len(self._index)} timesteps in [0, {len(self)})"
            ) from None

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The timestep that follows in sampling, −1 after the last; 0-d, as in stock's DDPMScheduler."""
        index = self._chain_index(timestep)
        return torch.tensor(self._chain.timesteps[index - 1] if index else -1)

    # ---- one reverse step ------------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{t−1} = μ_θ(x_t, t) + σ_t z (Algorithm 2, lines 3–4), with z = 0 at the last step.

        `sample` is x_t [B, ...]; `model_output` has its shape (twice the channels for learned variance); `timestep` is
        one of `timesteps`, 0-based; a Python int costs no device synchronisation. z is `variance_noise` where given,
        else drawn in float32 from `generator`. Computed in float32 (float64 for float64 samples), returned in
        sample's dtype as (prev_sample, pred_original_sample).

        Without clipping this is line 4, (x_t − (1−α_t)/√(1−ᾱ_t) ε)/√α_t + σ_t z, rearranged. The default goes through
        x̂_0 because the paper's code clips it to the data's range [−1, 1]: early in the chain an error in ε is
        multiplied by √(1/ᾱ_t − 1), about 157 at t = T−1, and only the clip keeps the chain near the data.
        """
        x_t, output = sample, model_output
        if not (isinstance(x_t, Tensor) and isinstance(output, Tensor) and x_t.dtype == output.dtype == torch.float32):
            x_t, output = _in_float(sample, model_output)
        index = self._chain_index(timestep)
        if variance_noise is not None and variance_noise.shape != x_t.shape:
            GaussianDiffusion._same_shape(variance_noise=variance_noise, sample=sample)
        if self._weights is None:
            self._weights = self._step_weights()
        if not self._weights:
            x_start, prev_sample, log_variance = self._mean(output, x_t, index)
            if index > 0:
                sigma = torch.exp(0.5 * torch.as_tensor(log_variance))
                prev_sample = prev_sample + sigma * self._noise(x_t, 1.0, generator, variance_noise)
        else:  # in place and with Python floats: for small samples a reverse step is all overhead
            if output.shape != x_t.shape:
                GaussianDiffusion._same_shape(model_output=output, sample=x_t)
            of_sample32, of_sample, of_output, coef1, coef2, sigma = self._weights[index]
            if of_sample == math.inf:
                raise ValueError(ENDS_BLIND.format(timestep))
            weight = of_sample32 if x_t.dtype == torch.float32 else of_sample
            x_start = torch.mul(x_t, weight).add_(output, alpha=of_output)
            if self._clip is True:
                x_start.clamp_(-1, 1)
            elif self._clip:
                x_start = self._clip(x_start)
            if index > 0:
                prev_sample = self._noise(x_t, sigma, generator, variance_noise).add_(x_t, alpha=coef2)
            else:
                prev_sample = torch.mul(x_t, coef2)
            prev_sample.add_(x_start, alpha=coef1)
        if sample.dtype != x_t.dtype:
            prev_sample, x_start = prev_sample.to(sample.dtype), x_start.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_start
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_start)

    @staticmethod
    def _noise(
        x_t: Tensor, sigma: float, generator: torch.Generator | list[torch.Generator] | None, given: Tensor | None
    ) -> Tensor:
        """σ z, a new tensor of x_t's shape: z as given, or drawn."""
        if given is not None:
            return given.to(x_t.dtype) * sigma
        if generator is None or (isinstance(generator, torch.Generator) and generator.device == x_t.device):
            noise = torch.empty_like(x_t, memory_format=torch.contiguous_format)
            return noise.normal_(0, sigma, generator=generator)
        for one in generator if isinstance(generator, list | tuple) else [generator]:
            if not isinstance(one, torch.Generator):
                raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
        return randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype).mul_(sigma)

    def _mean(self, model_output: Tensor, x_t: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """x̂_0, the mean of x_{t−1} and its log-variance, for every kind of network."""
        if self.config["prediction_type"] == "epsilon" and self._chain.alphas_cumprod[index] == 0:
            raise ValueError(ENDS_BLIND.format(self._chain.timesteps[index]))
        p = self._chain.p_mean_variance(
            model_output,
            x_t,
            index,
            prediction_type=self.config["prediction_type"],
            variance_type=self.config["variance_type"],
            clip_denoised=self._clip,
        )
        return p.x_start, p.mean, p.log_variance

    def clip_denoised(self) -> bool | Callable[[Tensor], Tensor]:
        """What this configuration does to x̂_0, as `p_mean_variance` takes it."""
        limit = self.config["clip_sample_range"]
        if self.config["thresholding"]:
            return self._threshold_sample
        if self.config["clip_sample"] and limit != 1.0:
            return lambda x_start: x_start.clamp(-limit, limit)
        return self.config["clip_sample"]

    def _threshold_sample(self, x_start: Tensor) -> Tensor:
        """Dynamic thresholding (Saharia et al. 2022, Section 2.3), per sample, as in stock's DDPMScheduler."""
        s = torch.quantile(x_start.flatten(1).abs(), self.config["dynamic_thresholding_ratio"], dim=1)
        s = s.clamp(1, self.config["sample_max_value"]).view(-1, *(1,) * (x_start.ndim - 1))
        return x_start.clamp(-s, s) / s

    def _get_variance(self, t: int | Tensor) -> Tensor:
        """σ_t² of the fixed variances, 0-d; the name under which diffusers' own tests ask for it."""
        if self.config["variance_type"] == "learned":
            raise ValueError("a learned variance is the network's, and no table's")
        table = getattr(self._chain, VARIANCE_TABLES[self.config["variance_type"]][0])
        return torch.tensor(table[self._chain_index(t)], dtype=torch.float32)

    # ---- forward process, for training scripts written against diffusers -------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`q_sample` (Eq. 4), computed in float32 whatever the dtype and returned in original_samples' dtype.

        `timesteps` are 0-based training timesteps, one per sample or one for all.
        """
        return self._in_float32(self.diffusion.q_sample, original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v, the target of `v_prediction`; arguments as in `add_noise`."""
        return self._in_float32(self.diffusion.velocity, sample, noise, timesteps)

    @staticmethod
    def _in_float32(function: Callable, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        dtype = x_start.dtype if x_start.dtype == torch.float64 else torch.float32
        t = timesteps.expand(len(x_start)) if isinstance(timesteps, Tensor) and timesteps.numel() == 1 else timesteps
        return function(x_start.to(dtype), t, noise.to(dtype)).to(x_start.dtype)
