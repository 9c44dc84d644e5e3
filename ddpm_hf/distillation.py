"""Progressive distillation: a student that takes in one step what its teacher takes in several.

Salimans & Ho 2022 (arXiv 2202.00512). A DDIM step (Song et al. 2021, η = 0) from t to t' with x̂_0 is

    x_{t'} / σ_{t'} = x_t / σ_t + (λ_{t'} − λ_t) x̂_0,   with α = √ᾱ, σ = √(1 − ᾱ) and λ = α/σ = √SNR.

So the teacher's steps from t to the student's next timestep land where one step from t with

    x̃ = Σ_j w_j x̂_0(x_{t_j}, t_j),   w_j = (λ_{t_{j+1}} − λ_{t_j}) / (λ_end − λ_t),

lands: the target of the paper's Algorithm 2, written as a weighted mean, with w_j > 0 and Σ w_j = 1. It loses no
digits where the paper's quotient does, and x̃ lies in [−1, 1] where the teacher clips its x̂_0 to it. The last step ends
at x_0, where λ is infinite: x̃ is then the teacher's last x̂_0.

The student predicts v = α ε − σ x_0. Its loss max(SNR, 1) ‖x̃ − x̂_0‖² ("truncated SNR") is max(ᾱ, 1 − ᾱ) ‖ṽ − v‖²
with ṽ = (α x_t − x̃) / σ. Time is 0-based, and −1 is the data.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .data import Samples
from .pipeline_ddpm_paper import ClassLabels
from .pipeline_loading import DDPMPaperPipeline
from .scheduler import GaussianDiffusion, clipped, paper_scheduler
from .unet import DDPMPaperMLP, DDPMPaperUNet

XStart = Callable[[Tensor, Tensor], Tensor]  # x̂_0(x_t, t), [B, ...], of x_t [B, ...] and t [B]


def student_timesteps(num_timesteps: int, num_steps: int) -> np.ndarray:
    """The timesteps of a chain of `num_steps`, ascending, T/n − 1, 2T/n − 1, …, T − 1: int64 [n].

    They are those of diffusers' `timestep_spacing="trailing"`, and those of a chain of m steps hold those of n where n
    divides m. Raises ValueError unless num_steps divides T.
    """
    if not 1 <= num_steps <= num_timesteps or num_timesteps % num_steps:
        raise ValueError(f"num_steps={num_steps} does not divide the {num_timesteps} timesteps of the process")
    return np.arange(1, num_steps + 1) * (num_timesteps // num_steps) - 1


class DistillationStage:
    """One stage: `ratio` DDIM steps of a teacher become one of the student's `num_steps`.

    Args:
        diffusion: the process, over all its T timesteps.
        num_steps: of the student; it divides T.
        ratio: of the teacher's steps to the student's. With 1 the student learns the teacher's own x̂_0, which makes a
            network that predicts v of one that predicts something else.

    `index`, int64 [B] in [0, num_steps), counts the student's `timesteps` from the data. Tables are float64, by the
    teacher's step and the student's timestep, [ratio, num_steps]; they are rounded to the tensors' dtype when they are
    gathered. Raises ValueError where `num_steps` times `ratio` does not divide T.
    """

    def __init__(self, diffusion: GaussianDiffusion, num_steps: int, ratio: int):
        if ratio < 1:
            raise ValueError(f"ratio={ratio} must be at least 1")
        total = diffusion.num_timesteps
        self.diffusion, self.num_steps, self.ratio = diffusion, num_steps, ratio
        self.timesteps = student_timesteps(total, num_steps)
        stride = total // len(student_timesteps(total, num_steps * ratio))  # of the teacher

        # where the teacher is asked, and last where it ends, by student's timestep: [ratio + 1, num_steps], −1 at x_0
        self.times = self.timesteps - stride * np.arange(ratio + 1)[:, None]
        alpha = np.append(diffusion.sqrt_alphas_cumprod, 1.0)[self.times]  # at −1 the last
        sigma = np.append(diffusion.sqrt_one_minus_alphas_cumprod, 0.0)[self.times]
        # a teacher's step is x_{t'} = kept x_t + added x̂_0
        self.kept = sigma[1:] / sigma[:-1]
        self.added = alpha[1:] - self.kept * alpha[:-1]
        with np.errstate(divide="ignore", invalid="ignore"):  # at x_0, where λ is infinite
            root_snr = alpha / sigma
            self.weights = np.diff(root_snr, axis=0) / (root_snr[-1] - root_snr[0])
        self.weights[:, 0] = np.arange(ratio) == ratio - 1
        self.alpha, self.sigma = alpha[0], sigma[0]
        self._gathered: dict[tuple, Tensor] = {}  # tables as tensors

    def target(self, x_start: XStart, x_t: Tensor, index: Tensor) -> Tensor:
        """x̃ [B, ...], the x̂_0 with which one step from x_t lands where the teacher's steps do.

        `x_start(x_t, t)` is the teacher's x̂_0, clipped where it clips.
        """
        times = torch.from_numpy(self.times).to(x_t.device)[:, index]
        x, x_tilde = x_t, torch.zeros_like(x_t)
        for j in range(self.ratio):
            x_hat = x_start(x, times[j])
            x_tilde = x_tilde + self._at("weights", index, x_t, j) * x_hat
            x = self._at("kept", index, x_t, j) * x + self._at("added", index, x_t, j) * x_hat
        return x_tilde

    def losses(self, v: Tensor, x_tilde: Tensor, x_t: Tensor, index: Tensor) -> Tensor:
        """max(SNR, 1) ‖x̃ − x̂_0‖² of the student's output v, the mean over dimensions, per sample: [B]."""
        alpha, sigma = self._at("alpha", index, x_t), self._at("sigma", index, x_t)
        error = v - (alpha * x_t - x_tilde) / sigma
        return torch.maximum(alpha, sigma).flatten().square() * error.square().flatten(1).mean(dim=1)

    def _at(self, name: str, index: Tensor, x: Tensor, row: int | None = None) -> Tensor:
        """Table `name`, or its `row`, at `index`: x.dtype [B, 1, …] on x's device."""
        key = name, x.device, x.dtype
        if key not in self._gathered:  # cast before moving: MPS has no float64
            self._gathered[key] = torch.from_numpy(getattr(self, name)).to(x.dtype).to(x.device)
        table = self._gathered[key] if row is None else self._gathered[key][row]
        return table[index].view(-1, *(1,) * (x.ndim - 1))


# ---- teachers and students -----------------------------------------------------------------------------------------


def teacher_x_start(
    pipe: DDPMPaperPipeline,
    class_labels: ClassLabels = None,
    guidance_scale: float = 1.0,
    *,
    clip: bool = True,
    within: tuple[Tensor, Tensor] | None = None,
) -> XStart:
    """x̂_0(x_t, t) of a pipeline, as `DistillationStage.target` asks for it, guided, and clipped as its scheduler does.

    Without `clip` it is left as the network has it, as a distilled student's is. `within` are bounds from below and
    above, [d] each, as of `data_range`.
    """
    scheduler = paper_scheduler(pipe.scheduler)
    clipping = scheduler.clip_denoised() if clip else False

    def x_start(x_t: Tensor, t: Tensor) -> Tensor:
        output = pipe.model_output(x_t, t, class_labels, guidance_scale)
        x_hat = clipped(scheduler.diffusion.predict_x_start(output, x_t, t), clipping)
        return x_hat if within is None else x_hat.clamp(*(bound.to(x_hat) for bound in within))

    return x_start


def data_range(samples: Samples) -> tuple[Tensor, Tensor] | None:
    """The least and the largest value of points in each dimension, [d]; None for images, which are clipped to theirs.

    E[x_0 | x_t] is a mean of points and lies between them. At T an ε network's error counts 157 times in its x̂_0, and
    that of a network for points, which are not clipped, would be far outside.
    """
    if not samples.is_points:
        return None
    return torch.from_numpy(samples.array.min(axis=0)), torch.from_numpy(samples.array.max(axis=0))


def student_network(teacher: Any, weights: Mapping[str, Tensor] | None = None) -> Any:
    """A network with the teacher's weights, to become its student: without dropout, and without a learned variance.

    `weights` are those of another student, in their place. Raises ValueError for other networks than this package's.
    """
    if not isinstance(teacher, DDPMPaperUNet | DDPMPaperMLP):
        raise ValueError(f"a {type(teacher).__name__} cannot be distilled; a DDPMPaperUNet or DDPMPaperMLP can")
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    if "dropout" in config:
        config["dropout"] = 0.0
    student: Any = type(teacher)(**{**config, "out_channels": config["in_channels"]})
    own = student.state_dict()  # a learned variance is the second half of the channels
    begun = teacher.state_dict() if weights is None else weights
    student.load_state_dict({name: tensor[: len(own[name])] for name, tensor in begun.items()})
    return student.to(teacher.device)


def student_scheduler(scheduler: Any) -> DDIMScheduler:
    """diffusers' DDIMScheduler of the same process for a student, which predicts v and has x̂_0 unclipped.

    It walks `student_timesteps` and ends at x_0.
    """
    config = paper_scheduler(scheduler).config
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    process = {name: config[name] for name in (*names, "rescale_betas_zero_snr")}
    return DDIMScheduler(
        **process,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
