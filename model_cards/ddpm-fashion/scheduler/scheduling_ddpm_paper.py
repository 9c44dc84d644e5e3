"""The diffusion process of Ho et al. 2020 (arXiv 2006.11239) and the scheduler that gives it to diffusers.

First the mathematics in the paper's symbols, `GaussianDiffusion`; then its adapter, `DDPMPaperScheduler`; last what is
refused. The losses (Eqs. 5, 8, 10, 12 and 14) compare the network's output with `target`, outside this file, which is
copied into checkpoints and so depends on torch, numpy and diffusers alone.

Time is 0-based everywhere: t = 0 is the paper's t = 1, the last step of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
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
STOCK_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # of all schedulers of diffusers
BETA_SCHEDULES = (*STOCK_BETA_SCHEDULES, "quad", "const", "jsd", "warmup10", "warmup50", "sigmoid")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
MIN_ALPHA_CUMPROD = 1e-300  # below, 1/ᾱ overflows
MAX_TIMESTEPS = 1_000_000  # a mistyped number must not allocate all memory

Generators = torch.Generator | list[torch.Generator] | None
Times = Sequence[int] | None
Clip = bool | Callable[[Tensor], Tensor]


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


class GaussianDiffusion:
    """The forward process q, its posterior, and the reverse process p_θ of a network (Sections 2 and 3 of the paper).

    Args:
        betas: β_1 … β_T inside (0, 1), [T]; only the last may be 1.
        prediction_type: what the network's output f is: ε (`epsilon`), x_0 (`sample`), μ̃ (`previous_sample`) or v.
        variance_type: σ_t² of p_θ: β̃_t (`fixed_small`), β_t (`fixed_large`), `learned`, whose logarithm is the second
            half of the network's channels, or `fitted` to a network by `x_start_mse`.
        timesteps: the times at which the network is asked, [T]; they differ from 0 … T−1 in a respaced process.
        x_start_mse: the mean squared error per dimension of the network's x̂_0 at these times, [T], for `fitted`:
            σ_t² = β̃_t + c_t² mse_t, with c_t the weight of x_0 in the posterior mean. These are the variances of
            least bound for that network (Bao et al. 2022, Analytic-DPM, Theorem 1). NaN where it is not known: then
            only processes `respaced` to the other times have variances.

    Tables are float64 and read-only, [T]; they are rounded to the tensors' dtype only when gathered, as in the
    paper's code. Tensors are [B, ...] in float32 or float64; half precision is refused with a TypeError, because in
    bfloat16 the first steps would add no noise at all. `t` is 0-based: an int for the whole batch, whose coefficients
    are then Python floats and cost no device synchronisation, or an integer tensor [B]. A t outside the table is a
    ValueError (on an accelerator, where looking would cost a synchronisation, the device's own index error).
    """

    def __init__(
        self,
        betas: np.ndarray | Sequence[float],
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        *,
        timesteps: np.ndarray | Sequence[int] | None = None,
        x_start_mse: np.ndarray | Sequence[float] | None = None,
    ):
        _require("prediction_type", prediction_type, PREDICTION_TYPES)
        _require("variance_type", variance_type, VARIANCE_TYPES)
        self.prediction_type, self.variance_type = prediction_type, variance_type

        # q(x_t | x_{t−1}) = N(√(1 − β_t) x_{t−1}, β_t I), Eq. 2
        self.betas = betas = _checked_betas(betas)
        self.timesteps = np.arange(len(betas)) if timesteps is None else np.array(timesteps, dtype=np.int64)
        _check_same_length("timesteps", self.timesteps, betas)
        self.x_start_mse = mse = _checked_mse(x_start_mse, betas, variance_type)

        # q(x_t | x_0), Eq. 4
        self.alphas_cumprod = alphas_cumprod = np.cumprod(1 - betas)
        self.alphas_cumprod_prev = previous = np.append(1.0, alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1 - alphas_cumprod)

        # q(x_{t−1} | x_t, x_0), Eqs. 6 and 7: the mean is c_1 x_0 + c_2 x_t
        self.posterior_mean_coef1 = betas * np.sqrt(previous) / (1 - alphas_cumprod)
        self.posterior_mean_coef2 = (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod)
        self.posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # β̃ is 0 at t = 0, where only the decoder's likelihood needs a log-variance: the paper's code repeats β̃[1].
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))

        # p_θ(x_{t−1} | x_t), Eq. 1: its variance σ_t² (Section 3.2)
        self.model_variance = self.model_log_variance = None  # learned
        if variance_type == "fixed_small":
            self.model_variance, self.model_log_variance = self.posterior_variance, self.posterior_log_variance_clipped
        elif variance_type == "fixed_large":
            self.model_variance, self.model_log_variance = betas, np.log(np.append(first, betas[1:]))
        elif mse is not None:
            self.model_variance = self.posterior_variance + self.posterior_mean_coef1**2 * mse
            self.model_log_variance = np.log(self.model_variance)

        # Its mean (Eq. 11) goes through x̂_0 = c_skip x_t + c_out f: Eq. 4 solved for x_0, or for μ̃ Eq. 7
        with np.errstate(divide="ignore"):  # where ᾱ_T = 0, ε says nothing about x_0 (see `predict_x_start`)
            self.sqrt_recip_alphas_cumprod = np.sqrt(1 / alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / alphas_cumprod - 1)
        coefficients = {
            "epsilon": (self.sqrt_recip_alphas_cumprod, -self.sqrt_recipm1_alphas_cumprod),
            "sample": (np.zeros_like(betas), np.ones_like(betas)),
            "previous_sample": (-self.posterior_mean_coef2 / self.posterior_mean_coef1, 1 / self.posterior_mean_coef1),
            "v_prediction": (self.sqrt_alphas_cumprod, -self.sqrt_one_minus_alphas_cumprod),
        }
        self.c_skip, self.c_out = coefficients[prediction_type]

        self._gathered: dict[tuple, Tensor] = {}  # tables as tensors
        for table in vars(self).values():
            if isinstance(table, np.ndarray):
                table.flags.writeable = False

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def _at(self, name: str, t: Tensor | int, x: Tensor) -> Any:
        """Table `name` at t: a float for an int t, else x.dtype [B, 1, …] on x's device."""
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"GaussianDiffusion computes in float32 or float64, got {x.dtype}; cast to float32 first")
        _check_times(t, x, self.num_timesteps)
        if not isinstance(t, Tensor):
            return float(getattr(self, name)[t])
        key = name, x.device, x.dtype
        if key not in self._gathered:  # cast before moving: MPS has no float64
            self._gathered[key] = torch.tensor(getattr(self, name)).to(x.dtype).to(x.device)
        return self._gathered[key][t.to(x.device)].view(-1, *(1,) * (x.ndim - 1))

    def _signal_and_sigma(self, t: Tensor | int, x: Tensor) -> tuple[Any, Any]:
        """√ᾱ_t and √(1 − ᾱ_t)."""
        return self._at("sqrt_alphas_cumprod", t, x), self._at("sqrt_one_minus_alphas_cumprod", t, x)

    # ---- forward process -------------------------------------------------------------------------------------------
    def q_mean_variance(self, x_start: Tensor, t: Tensor | int) -> MeanVariance:
        """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) (Eq. 4); t 0-based."""
        signal, sigma = self._signal_and_sigma(t, x_start)
        return MeanVariance(signal * x_start, sigma**2, self._at("log_one_minus_alphas_cumprod", t, x_start))

    def q_sample(self, x_start: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Eq. 4, reparameterized), with ε = `noise` of x_start's shape; t 0-based."""
        _check_shapes(x_start=x_start, noise=noise)
        signal, sigma = self._signal_and_sigma(t, x_start)
        return signal * x_start + sigma * noise

    def velocity(self, x_start: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans & Ho 2022, Section 4); t 0-based."""
        _check_shapes(x_start=x_start, noise=noise)
        signal, sigma = self._signal_and_sigma(t, x_start)
        return signal * noise - sigma * x_start

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor | int) -> MeanVariance:
        """q(x_{t−1} | x_t, x_0) = N(μ̃_t, β̃_t I) (Eqs. 6–7); t 0-based; the log-variance at 0 is that of t = 1."""
        _check_shapes(x_start=x_start, x_t=x_t)
        coef1, coef2 = self._at("posterior_mean_coef1", t, x_t), self._at("posterior_mean_coef2", t, x_t)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        return MeanVariance(coef1 * x_start + coef2 * x_t, self._at("posterior_variance", t, x_t), log_variance)

    def target(self, x_start: Tensor, x_t: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """What f is trained to equal: ε (Eqs. 12 and 14), x_0, μ̃_t(x_t, x_0) (Eq. 8) or v; `noise` is the ε of x_t.

        Eq. 10 is Eq. 8 with μ̃ written through ε, (x_t − β_t/√(1−ᾱ_t) ε)/√α_t, α_t = 1 − β_t; it turns into Eq. 12.
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_start
        if self.prediction_type == "v_prediction":
            return self.velocity(x_start, t, noise)
        return self.q_posterior_mean_variance(x_start, x_t, t).mean

    # ---- reverse process -------------------------------------------------------------------------------------------
    def predict_x_start(self, model_output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """x̂_0 = c_skip x_t + c_out f from the network's output, unclipped (for ε Eq. 15); t 0-based."""
        f, _ = self._split(model_output, x_t)
        if self.c_skip[-1] == math.inf and bool((torch.as_tensor(t) == self.num_timesteps - 1).any()):
            raise ValueError(ENDS_BLIND.format(self.timesteps[-1]))
        return self._at("c_skip", t, x_t) * x_t + self._at("c_out", t, x_t) * f

    def _split(self, model_output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """f, and the log-variance where the network has one, each of x_t's shape."""
        f, log_variance = model_output, None
        if self.variance_type == "learned":
            if f.shape[1] != 2 * x_t.shape[1]:
                raise ValueError(f"learned variance needs {2 * x_t.shape[1]} channels, got {f.shape[1]}")
            f, log_variance = model_output.chunk(2, dim=1)
        if f.shape != x_t.shape:
            _check_shapes(model_output=f, sample=x_t)
        return f, log_variance

    def predict_eps(self, x_start: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """ε = (x_t − √ᾱ_t x_0) / √(1 − ᾱ_t) (Eq. 4 solved for ε); t 0-based."""
        _check_shapes(x_start=x_start, x_t=x_t)
        signal, sigma = self._signal_and_sigma(t, x_t)
        return (x_t - signal * x_start) / sigma

    def score(self, eps: Tensor, t: Tensor | int) -> Tensor:
        """∇ log q(x_t) ≈ −ε / √(1 − ᾱ_t), the link to denoising score matching (Section 3.2); t 0-based."""
        return eps / -self._at("sqrt_one_minus_alphas_cumprod", t, eps)

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor | int, *, clip_denoised: Clip = True
    ) -> ReverseMeanVariance:
        """p_θ(x_{t−1} | x_t) (Eq. 1): its mean is μ̃_t(x_t, x̂_0), which for ε is the middle of Eq. 11.

        The paper's code computes it so too, to clip x̂_0; unclipped, it equals the right of Eq. 11 (see `target`).
        `model_output` has x_t's shape; for `learned` twice its channels, the second half being the log-variance.
        `clip_denoised` True clamps x̂_0 to [−1, 1]; a function is applied to x̂_0 in its place. It does not touch the
        mean of `previous_sample`, which is the network's output itself. t is 0-based.
        """
        f, log_variance = self._split(model_output, x_t)
        if log_variance is not None:
            variance = log_variance.exp()
        else:
            _check_variances(self)
            variance, log_variance = self._at("model_variance", t, x_t), self._at("model_log_variance", t, x_t)
        x_start = clipped(self.predict_x_start(model_output, x_t, t), clip_denoised)
        mean = f if self.prediction_type == "previous_sample" else self.q_posterior_mean_variance(x_start, x_t, t).mean
        return ReverseMeanVariance(mean, variance, log_variance, x_start)

    @cached_property
    def step_coefficients(self) -> list[tuple[Any, ...]]:
        """For each t (c_skip, as tensor and float; c_out; c_1, c_2; σ_t), the numbers of one step of Algorithm 2.

        σ is 1 where the network gives it. A product with a 0-d tensor takes half as long as one with a float, which
        becomes such a tensor first.
        """
        _check_variances(self)
        sigma = np.ones_like(self.betas) if self.model_log_variance is None else np.exp(0.5 * self.model_log_variance)
        columns = self.c_skip, self.c_out, self.posterior_mean_coef1, self.posterior_mean_coef2, sigma
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [(torch.tensor(c_skip, dtype=torch.float32), c_skip, *others) for c_skip, *others in rows]

    def respaced(self, timesteps: Sequence[int] | np.ndarray) -> GaussianDiffusion:
        """The process that visits only these strictly ascending `timesteps`: β'_i = 1 − ᾱ_{t_i} / ᾱ_{t_{i−1}}.

        q(x_t | x_0) is unchanged at the times kept (Nichol & Dhariwal 2021, Eq. 19). Raises ValueError; also where f
        belongs to single steps of this process and is no longer what it was: μ̃, or the learned variance.
        """
        kept = _checked_subset("timesteps", timesteps, self.num_timesteps)
        _check_respacing(self, kept)
        if len(kept) == self.num_timesteps:
            return self
        alphas_cumprod = self.alphas_cumprod[kept]
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        mse = None if self.x_start_mse is None else self.x_start_mse[kept]
        types = self.prediction_type, self.variance_type
        return GaussianDiffusion(betas, *types, timesteps=self.timesteps[kept], x_start_mse=mse)


def clipped(x_start: Tensor, clip_denoised: Clip) -> Tensor:
    """x̂_0 as `p_mean_variance` clips it."""
    if clip_denoised is True:
        return x_start.clamp(-1, 1)
    return clip_denoised(x_start) if clip_denoised else x_start


def make_betas(beta_schedule: str, num_timesteps: int, beta_start: float, beta_end: float) -> np.ndarray:
    """β_1 … β_T in float64, [T]: the six schedules of the paper's code and stock diffusers' three others.

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
    if beta_schedule == "sigmoid":
        return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_timesteps)))
    warmup = int(num_timesteps * {"const": 0.0, "warmup10": 0.1, "warmup50": 0.5}[beta_schedule])
    return np.append(np.linspace(beta_start, beta_end, warmup), np.full(num_timesteps - warmup, float(beta_end)))


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale √ᾱ so that ᾱ_T = 0 (Lin et al. 2023, Algorithm 1); float64, [T]."""
    sqrt_alphas_cumprod = np.sqrt(np.cumprod(1 - betas))
    first, last = sqrt_alphas_cumprod[0], sqrt_alphas_cumprod[-1]
    alphas_cumprod = ((sqrt_alphas_cumprod - last) * first / (first - last)) ** 2
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


class DDPMPaperScheduler(SchedulerMixin, ConfigMixin):
    """`GaussianDiffusion` as a diffusers scheduler: one reverse step of Algorithm 2, through the clipped x̂_0.

    Configuration names and values are stock DDPMScheduler's, except:

    - `beta_schedule` also takes the paper code's `quad`, `const`, `jsd`, `warmup10`, `warmup50`; for those, and for
      `sigmoid`, which few of them know, the configuration carries `trained_betas`, so that every other diffusers
      scheduler can be built from it. `laplace` is refused.
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
        _check_config(self.config)
        name, betas = "trained_betas", trained_betas
        if betas is None:
            name, betas = "betas", make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        betas = _checked_betas(betas, name, may_end_at_one=beta_schedule == "jsd" or rescale_betas_zero_snr)
        if trained_betas is not None or beta_schedule not in STOCK_BETA_SCHEDULES:
            self.register_to_config(num_train_timesteps=len(betas), trained_betas=betas.tolist())
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        own = np.arange(len(betas))
        if inference_timesteps is not None:
            own = _checked_subset("inference_timesteps", inference_timesteps, len(betas))
            self.register_to_config(inference_timesteps=own.tolist())
        mse = None if x_start_mse is None else _spread(x_start_mse, own, len(betas))
        self.diffusion = GaussianDiffusion(betas, prediction_type, variance_type, x_start_mse=mse)
        self._default_chain = self.diffusion.respaced(own)
        # Other schedulers warn of keys they do not know, and replace by their own what a configuration calls defaults.
        absent = {key for key in ("inference_timesteps", "x_start_mse") if self.config[key] is None}
        absent.add("_use_default_values")
        self._internal_dict = FrozenDict({key: value for key, value in self.config.items() if key not in absent})
        # For code that reads stock's attributes; the float64 truth is `diffusion`.
        self.betas = torch.tensor(self.diffusion.betas, dtype=torch.float32)
        self.alphas_cumprod = torch.tensor(self.diffusion.alphas_cumprod, dtype=torch.float32)
        self.set_timesteps()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any):
        """As in diffusers, but what the other scheduler left at its defaults is kept, as if saved and loaded."""
        if isinstance(config, dict):
            known = known_prediction(config)
            config = {key: value for key, value in known.items() if key != "_use_default_values"}
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
    def chain(self, num_inference_steps: int | None = None, timesteps: Times = None) -> GaussianDiffusion:
        """The process that samples in `num_inference_steps` in [1, T], or at these strictly descending `timesteps`.

        With neither, the configuration's own chain: `inference_timesteps`, else all T. Raises ValueError; also where
        `respaced` does, and for a `fitted` variance at a timestep where none was fitted.
        """
        _check(num_inference_steps is None or timesteps is None, "pass one of num_inference_steps and timesteps")
        own = self.config.get("inference_timesteps")
        if timesteps is None and (num_inference_steps is None or (own and num_inference_steps == len(own))):
            return self._default_chain
        spaced = self._spaced_timesteps(num_inference_steps) if timesteps is None else timesteps
        return self.diffusion.respaced(_checked_subset("timesteps", spaced, len(self), "descending")[::-1])

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Times = None
    ) -> None:
        """Sample with `chain(num_inference_steps, timesteps)` from now on."""
        self._chain = self.chain(num_inference_steps, timesteps)
        self._index = {int(t): i for i, t in enumerate(self._chain.timesteps)}
        self._clip = self.clip_denoised()
        self.timesteps = torch.from_numpy(self._chain.timesteps[::-1].copy()).to(device)
        self.num_inference_steps = num_inference_steps

    def _spaced_timesteps(self, n: Any) -> np.ndarray:
        """n descending timesteps by `timestep_spacing` (Lin et al. 2023, Table 2), int64 [n]."""
        total = len(self)
        _check(_is_whole(n) and 1 <= n <= total, f"num_inference_steps={n!r} must be an integer in [1, {total}]")
        if self.config["timestep_spacing"] == "linspace":
            return np.linspace(0, total - 1, n).round().astype(np.int64)[::-1]
        if self.config["timestep_spacing"] == "leading":
            return np.arange(n)[::-1] * (total // n) + self.config["steps_offset"]
        return np.round(total - np.arange(n) * (total / n)).astype(np.int64) - 1  # trailing

    def _chain_index(self, timestep: int | Tensor) -> int:
        """Position of `timestep` in the current chain, 0 being the last step of sampling."""
        try:
            return self._index[timestep.item() if isinstance(timestep, Tensor) else timestep]  # type: ignore[index]
        except (KeyError, TypeError, ValueError, RuntimeError):
            current = f"the current {len(self._index)} timesteps in [0, {len(self)})"
            raise ValueError(f"timestep={timestep} is not one of {current}") from None

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
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_{t−1} = μ_θ(x_t, t) + σ_t z (Algorithm 2, lines 3–4), with z = 0 at the last step.

        `sample` is x_t [B, ...]; `model_output` has its shape (twice the channels for learned variance); `timestep` is
        one of `timesteps`, 0-based; a Python int costs no device synchronisation. z is `variance_noise` where given,
        else drawn from `generator`. Computed in float32 (float64 for float64 samples), returned in sample's dtype as
        (prev_sample, pred_original_sample).

        Without clipping this is line 4, rearranged (Eq. 11). The default goes through x̂_0 because the paper's code
        clips it to the data's range [−1, 1]: early in the chain an error in ε is multiplied by √(1/ᾱ_t − 1), about 157
        at t = T−1, and only the clip keeps the chain near the data.
        """
        x_t, output = _in_float(sample, model_output)
        index = self._chain_index(timestep)
        f, log_variance = self._chain._split(output, x_t)
        c_skip_32, c_skip, c_out, coef1, coef2, sigma = self._chain.step_coefficients[index]
        if c_skip == math.inf:
            raise ValueError(ENDS_BLIND.format(timestep))
        # in place and with Python floats: for small samples a reverse step is all overhead
        x_start = torch.mul(x_t, c_skip_32 if x_t.dtype == torch.float32 else c_skip).add_(f, alpha=c_out)
        x_start = x_start.clamp_(-1, 1) if self._clip is True else clipped(x_start, self._clip)
        if index == 0:
            prev_sample = torch.zeros_like(x_t)
        else:
            prev_sample = _noise(x_t, sigma, generator, variance_noise)
            if log_variance is not None:
                prev_sample.mul_(torch.exp(0.5 * log_variance))
        if self._chain.prediction_type == "previous_sample":
            prev_sample.add_(f)
        else:
            prev_sample.add_(x_t, alpha=coef2).add_(x_start, alpha=coef1)
        if sample.dtype != x_t.dtype:
            prev_sample, x_start = prev_sample.to(sample.dtype), x_start.to(sample.dtype)
        if not return_dict:
            return prev_sample, x_start
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x_start)

    def clip_denoised(self) -> Clip:
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
        """σ_t² of the variances that no network gives, 0-d; the name under which diffusers' own tests ask for it."""
        _check(self._chain.model_variance is not None, "a learned variance is the network's, and no table's")
        return torch.tensor(self._chain.model_variance[self._chain_index(t)], dtype=torch.float32)  # type: ignore[index]

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
        dtype = torch.float64 if x_start.dtype == torch.float64 else torch.float32
        t = timesteps.expand(len(x_start)) if isinstance(timesteps, Tensor) and timesteps.numel() == 1 else timesteps
        return function(x_start.to(dtype), t, noise.to(dtype)).to(x_start.dtype)


def _noise(x_t: Tensor, sigma: float, generator: Generators, given: Tensor | None) -> Tensor:
    """σ z, a new tensor of x_t's shape: z as given, or drawn by one call."""
    if given is not None:
        _check_shapes(variance_noise=given, sample=x_t)
        return given.to(x_t.dtype) * sigma
    if generator is None or (isinstance(generator, torch.Generator) and generator.device == x_t.device):
        return torch.empty_like(x_t, memory_format=torch.contiguous_format).normal_(0, sigma, generator=generator)
    for one in generator if isinstance(generator, list | tuple) else [generator]:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
    return randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype).mul_(sigma)


def known_prediction(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with a prediction_type for predict_epsilon, of diffusers before 0.9. ValueError where both disagree."""
    config, old, left = dict(config), config.get("predict_epsilon"), config.get("_use_default_values", [])
    if "predict_epsilon" in config:
        meant = {"True": "epsilon", "False": "sample"}.get(repr(config.pop("predict_epsilon")))
        stated = None if "prediction_type" in left else config.get("prediction_type")
        pair = f"predict_epsilon={old!r} (true is 'epsilon', false 'sample') and prediction_type={stated!r}"
        _check(meant and stated in (None, meant), f"{pair} contradict each other: remove the wrong one")
        config |= {"prediction_type": meant, "_use_default_values": [k for k in left if k != "prediction_type"]}
    return config


# ---- what is refused -----------------------------------------------------------------------------------------------

ENDS_BLIND = "ᾱ is 0 at timestep {}: ε gives no x_0 there; use v_prediction or sample"
NOT_POSITIVE = "x_start_mse must hold {} positive numbers, one per timestep; got {}"


def _check(holds: Any, message: str) -> None:
    """For messages that cost nothing to make: where one shows an array, or a step makes it, `if` comes first."""
    if not holds:
        raise ValueError(message)


def _require(name: str, value: Any, allowed: Sequence[str]) -> None:
    _check(value in allowed, f"{name}={value!r} is not supported; choose one of {', '.join(allowed)}")


def _check_variances(diffusion: GaussianDiffusion) -> None:
    unknown = diffusion.x_start_mse is not None and np.isnan(diffusion.x_start_mse).any()
    _check(not unknown, "variance_type='fitted' needs x_start_mse at every timestep of this process; respace it")


def _check_respacing(diffusion: GaussianDiffusion, kept: np.ndarray) -> None:
    fewer = len(kept) < diffusion.num_timesteps
    taken = f"so {len(kept)} of {diffusion.num_timesteps} cannot be taken; sample with all of them"
    for name, value in (("prediction_type", "previous_sample"), ("variance_type", "learned")):
        single = fewer and getattr(diffusion, name) == value
        _check(not single, f"{name}={value!r} belongs to single steps of training, {taken}")
    if diffusion.x_start_mse is not None:
        unknown = np.isnan(diffusion.x_start_mse)
        if unknown[kept].any():
            missing, known = kept[unknown[kept]].tolist(), np.flatnonzero(~unknown).tolist()
            raise ValueError(f"timesteps {missing} have no fitted variance; those that have one are {known}")


def _numbers(name: str, values: Any) -> np.ndarray:
    """`values` as a float64 vector of at least one number, copied."""
    try:
        numbers = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of numbers, got {str(values)[:100]}") from None
    listed = numbers.ndim == 1 and len(numbers)
    _check(listed, f"{name} has shape {numbers.shape}; it must be a non-empty list of numbers")
    return numbers


def _checked_betas(betas: Any, name: str = "betas", may_end_at_one: bool = True) -> np.ndarray:
    betas = _numbers(name, betas)
    inside = np.all(betas > 0) and np.all(betas[:-1] < 1) and (betas[-1] < 1 or (betas[-1] == 1 and may_end_at_one))
    end = "; only the last may be 1" if may_end_at_one else ""
    _check(inside, f"betas must lie inside (0, 1){end}, got {betas.min()} to {betas.max()}")
    alphas_cumprod = np.cumprod(1 - betas)
    representable = alphas_cumprod[0] < 1 and alphas_cumprod[betas < 1].min(initial=1.0) >= MIN_ALPHA_CUMPROD
    span = f"ᾱ must stay inside (0, 1), and runs from {alphas_cumprod[0]} to {alphas_cumprod[-1]}"
    _check(representable, f"betas are too small or too many for float64: {span}")
    return betas


def _check_same_length(name: str, table: np.ndarray, betas: np.ndarray) -> None:
    _check(table.shape == betas.shape, f"{name} has shape {table.shape}, betas {betas.shape}; they must be equal")


def _checked_mse(x_start_mse: Any, betas: np.ndarray, variance_type: str) -> np.ndarray | None:
    mse = None if x_start_mse is None else _numbers("x_start_mse", x_start_mse)
    needs = "variance_type='fitted' needs x_start_mse, and no other variance has a use for it"
    _check((mse is not None) == (variance_type == "fitted"), needs)
    if mse is not None:
        _check_same_length("x_start_mse", mse, betas)
        if np.any((mse <= 0) | np.isinf(mse)) or np.all(np.isnan(mse)):
            raise ValueError(NOT_POSITIVE.format(len(mse), mse))
    return mse


def _spread(x_start_mse: Any, timesteps: np.ndarray, total: int) -> np.ndarray:
    """The errors at `timesteps`, and NaN at the others of `total`."""
    mse, spread = _numbers("x_start_mse", x_start_mse), np.full(total, np.nan)
    if mse.shape != timesteps.shape or not np.all(np.isfinite(mse) & (mse > 0)):
        raise ValueError(NOT_POSITIVE.format(len(timesteps), mse))
    spread[timesteps] = mse
    return spread


def _checked_subset(name: str, timesteps: Any, total: int, order: str = "ascending") -> np.ndarray:
    kept = np.asarray(timesteps)
    whole = kept.ndim == 1 and len(kept) and np.issubdtype(kept.dtype, np.integer)
    if not whole or np.any(np.diff(kept.astype(np.int64)) * (1 if order == "ascending" else -1) <= 0):
        raise ValueError(f"{name} must be a non-empty, strictly {order} list of integers, got {timesteps}")
    _check(kept.min() >= 0 and kept.max() < total, f"{name} must lie in [0, {total}), got {kept[0]} to {kept[-1]}")
    return kept


def _check_times(t: Any, x: Tensor, total: int) -> None:
    if isinstance(t, int | np.integer):
        if not 0 <= t < total:
            raise ValueError(f"t={t} is outside [0, {total})")
        return
    if not isinstance(t, Tensor) or t.shape != x.shape[:1] or t.is_floating_point() or t.dtype == torch.bool:
        kind = f"has shape {tuple(t.shape)}, {t.dtype}" if isinstance(t, Tensor) else f"is {t!r}"
        raise ValueError(f"t {kind}; expected one integer per sample, ({len(x)},), as a tensor")
    if t.device.type == "cpu" and len(t) and not (0 <= int(t.min()) and int(t.max()) < total):
        raise ValueError(f"t={t.tolist()} leaves [0, {total})")


def _check_shapes(**tensors: Tensor) -> None:
    if len({x.shape for x in tensors.values()}) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{k} {tuple(x.shape)}" for k, x in tensors.items()))


def _in_float(sample: Any, model_output: Any) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 where `sample` is."""
    both = isinstance(sample, Tensor) and isinstance(model_output, Tensor)
    if both and sample.dtype == model_output.dtype == torch.float32:
        return sample, model_output
    for x in (model_output, sample):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"model_output and sample must be floating-point tensors, got {kind}")
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    return sample.to(dtype), model_output.to(dtype)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_config(config: Mapping[str, Any]) -> None:
    choices = {"beta_schedule": BETA_SCHEDULES, "timestep_spacing": TIMESTEP_SPACINGS}
    choices |= {"variance_type": VARIANCE_TYPES, "prediction_type": PREDICTION_TYPES}
    for name, allowed in choices.items():
        _require(name, config[name], allowed)
    most = MAX_TIMESTEPS
    flag, number = (lambda v: isinstance(v, bool), "true or false"), (_is_number, "a number")
    positive = (lambda v: _is_number(v) and v > 0, "a number > 0")
    rules = {
        "num_train_timesteps": (lambda v: _is_whole(v) and 1 <= v <= most, f"an int >= 1, and at most {most}"),
        "steps_offset": (lambda v: _is_whole(v) and v >= 0, "an int >= 0"),
        "dynamic_thresholding_ratio": (lambda v: _is_number(v) and 0 < v <= 1, "a number in (0, 1]"),
        **dict.fromkeys(("beta_start", "beta_end"), number),
        **dict.fromkeys(("clip_sample_range", "sample_max_value"), positive),
        **dict.fromkeys(("clip_sample", "thresholding", "rescale_betas_zero_snr"), flag),
    }
    for name, (holds, allowed) in rules.items():
        _check(holds(config[name]), f"{name}={config[name]!r} must be {allowed}")
    blind = config["rescale_betas_zero_snr"] and config["prediction_type"] in ("epsilon", "previous_sample")
    pair = f"rescale_betas_zero_snr cannot be used with prediction_type={config['prediction_type']!r}"
    _check(not blind, f"{pair}: at zero terminal SNR x_T says nothing about x_0; use v_prediction or sample")
