"""The stages of progressive distillation against diffusers' DDIMScheduler, the paper's formulas and exact students.

Tolerances are of float64 unless they say otherwise. diffusers' tables are float32: 4e-4 relative in 1 − ᾱ at worst.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, GaussianDiffusion
from ddpm_hf.data import load_samples
from ddpm_hf.distillation import (
    DistillationStage,
    data_range,
    student_scheduler,
    student_timesteps,
    teacher_x_start,
)
from ddpm_hf.oracle import GaussianMixture, OracleNetwork
from ddpm_hf.scheduler.scheduling_ddpm_paper import make_betas

PAPER = GaussianDiffusion(make_betas("linear", 1000, 1e-4, 0.02))
STAGES = (1000, 200, 40, 8, 4, 2, 1)
LINE = GaussianMixture([0.3, 0.7], [[-0.5], [0.4]], [[[0.01]], [[0.04]]])  # in one dimension, two bumps


def ratios(stages=STAGES) -> list[tuple[int, int]]:
    """(steps of the student, ratio) of each stage, the first against all timesteps."""
    return [(n, before // n) for before, n in itertools.pairwise((1000, *stages))]


def crooked(x: Tensor, t: Tensor) -> Tensor:
    """A teacher's x̂_0 that no distribution has, so that nothing fits by luck."""
    at = (t.double() / 1000).view(-1, *(1,) * (x.ndim - 1))
    return torch.sin(2 * x + 3 * at) * (1 - 0.5 * at)


def drawn(stage: DistillationStage, size: int = 64, dim: int = 3) -> tuple[Tensor, Tensor]:
    """x_t and the student's timesteps, each once at least where there are few."""
    generator = torch.Generator().manual_seed(stage.num_steps)
    index = torch.randint(stage.num_steps, (size,), generator=generator)
    index[: min(size, stage.num_steps)] = torch.arange(min(size, stage.num_steps))
    return torch.randn(size, dim, generator=generator, dtype=torch.float64), index


def levels(t: int) -> tuple[float, float]:
    """α and σ at t, and those of the data at −1."""
    return (1.0, 0.0) if t < 0 else (PAPER.sqrt_alphas_cumprod[t], PAPER.sqrt_one_minus_alphas_cumprod[t])


def walked(x: Tensor, times: list[int]) -> Tensor:
    """Where DDIM steps of `crooked` lead x [1, d] from the first time through the others, step by step."""
    for t, next_t in itertools.pairwise(times):
        (alpha, sigma), (next_alpha, next_sigma) = levels(t), levels(next_t)
        x_hat = crooked(x, torch.tensor([t]))
        x = next_alpha * x_hat + next_sigma * (x - alpha * x_hat) / sigma
    return x


# ---- grids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [n for n in range(1, 1001) if 1000 % n == 0])
def test_a_student_walks_the_timesteps_of_stock(num_steps):
    """Also where stock's steps end: each at the next timestep, and the last at the data."""
    stock = student_scheduler(DDPMPaperScheduler())
    stock.set_timesteps(num_steps)
    own = student_timesteps(1000, num_steps)
    assert stock.timesteps.tolist() == own[::-1].tolist()
    assert (own - 1000 // num_steps).tolist() == [-1, *own[:-1]]


@pytest.mark.parametrize(("num_steps", "ratio"), ratios())
def test_the_grids_nest(num_steps, ratio):
    """A student begins where its teacher has a timestep, and the teacher's steps end where the student's do."""
    stage = DistillationStage(PAPER, num_steps, ratio)
    teacher = student_timesteps(1000, num_steps * ratio)
    assert set(stage.times[:-1].ravel()) == set(teacher)
    assert stage.times[0].tolist() == stage.timesteps.tolist()
    assert stage.times[-1].tolist() == [-1, *stage.timesteps[:-1].tolist()]


@pytest.mark.parametrize(("num_steps", "ratio"), [(3, 1), (0, 1), (1001, 1), (8, 3), (8, 0)])
def test_steps_that_do_not_divide_are_refused(num_steps, ratio):
    with pytest.raises(ValueError, match="divide|at least 1"):
        DistillationStage(PAPER, num_steps, ratio)


# ---- the law of every stage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "ratio"), ratios())
def test_a_student_that_takes_its_teachers_steps_has_no_loss(num_steps, ratio):
    """v from where the teacher's steps, one by one, end: by the paper's quotient, solved for the step's x̂_0.

    The quotient divides by α' − α σ'/σ, 1e-4 at worst, so that it has twelve digits left.
    """
    stage = DistillationStage(PAPER, num_steps, ratio)
    x_t, index = drawn(stage)
    x_tilde = stage.target(crooked, x_t, index)
    v = torch.empty_like(x_t)
    for row, i in enumerate(index.tolist()):
        times = stage.times[:, i].tolist()
        end = walked(x_t[row : row + 1], times)
        (alpha, sigma), (end_alpha, end_sigma) = levels(times[0]), levels(times[-1])
        x_start = (end - end_sigma / sigma * x_t[row]) / (end_alpha - end_sigma / sigma * alpha)
        v[row] = (alpha * x_t[row] - x_start) / sigma
    torch.testing.assert_close(
        stage.losses(v, x_tilde, x_t, index), torch.zeros(len(x_t)).double(), rtol=0, atol=1e-18
    )
    assert (stage.losses(v + 0.1, x_tilde, x_t, index) > 4e-3).all()  # the weight is ½ at least


@pytest.mark.parametrize(("num_steps", "ratio"), ratios())
def test_one_step_of_stock_with_the_target_is_the_teachers_walk(num_steps, ratio):
    """diffusers' DDIMScheduler takes the teacher's steps, and with the student's v its one, to the same place."""
    stage = DistillationStage(PAPER, num_steps, ratio)
    x_t, index = drawn(stage, size=24)
    x_tilde = stage.target(crooked, x_t, index)
    teacher = DDIMScheduler.from_config(student_scheduler(DDPMPaperScheduler()).config, prediction_type="sample")
    student = student_scheduler(DDPMPaperScheduler())
    teacher.set_timesteps(num_steps * ratio)
    student.set_timesteps(num_steps)
    for row, i in enumerate(index.tolist()):
        x, times = x_t[row : row + 1], stage.times[:, i].tolist()
        alpha, sigma = levels(times[0])
        v = (alpha * x - x_tilde[row]) / sigma
        landed = student.step(v, times[0], x).prev_sample
        for t in times[:-1]:
            x = teacher.step(crooked(x, torch.tensor([t])), t, x).prev_sample
        torch.testing.assert_close(landed, x, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("num_steps", "ratio"), ratios())
def test_the_weights_are_a_mean(num_steps, ratio):
    """So that x̃ lies where the teacher's x̂_0 lie."""
    weights = DistillationStage(PAPER, num_steps, ratio).weights
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-12)


def test_the_loss_is_weighted_by_the_truncated_snr():
    """max(SNR, 1) ‖x̃ − x̂_0‖² with x̂_0 = α x_t − σ v, at every timestep."""
    stage = DistillationStage(PAPER, 1000, 1)
    index = torch.arange(1000)
    x_t, x_tilde, v = torch.randn(3, 1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = torch.tensor(PAPER.sqrt_alphas_cumprod)[:, None]
    sigma = torch.tensor(PAPER.sqrt_one_minus_alphas_cumprod)[:, None]
    expected = (alpha / sigma).square().clamp(min=1) * (x_tilde - (alpha * x_t - sigma * v)).square()
    torch.testing.assert_close(stage.losses(v, x_tilde, x_t, index), expected.mean(dim=1))


def test_in_float32_the_target_keeps_its_digits():
    """The paper's quotient would lose three to four of seven at large t."""
    for num_steps, ratio in ratios():
        stage = DistillationStage(PAPER, num_steps, ratio)
        x_t, index = drawn(stage)
        rounded = stage.target(lambda x, t: crooked(x, t).float(), x_t.float(), index)
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(
            rounded.double(), stage.target(crooked, x_t.float().double(), index), rtol=0, atol=1e-5
        )


# ---- exact students ------------------------------------------------------------------------------------------------


def exact_students(mixture: GaussianMixture) -> dict[int, Any]:
    """x̂_0(x, t) of the student that has learned each stage exactly, by its steps, from the exact ε*."""
    pipe = DDPMPaperPipeline(OracleNetwork(mixture, PAPER), DDPMPaperScheduler(clip_sample=False))  # type: ignore[arg-type]
    oracle = pipe.unet
    students: dict[int, Any] = {1000: lambda x, t: PAPER.predict_x_start(oracle(x, t).sample, x, t)}
    for before, num_steps in itertools.pairwise(STAGES):
        stage = DistillationStage(PAPER, num_steps, before // num_steps)

        def student(x: Tensor, t: Tensor, stage=stage, teacher=students[before]) -> Tensor:
            return stage.target(teacher, x, (t + 1) // (1000 // stage.num_steps) - 1)

        students[num_steps] = student
    return students


def quantiles_of(mixture: GaussianMixture, probability: np.ndarray) -> np.ndarray:
    """Where the distribution function of a mixture in one dimension has these values, by bisection."""
    weights, means = mixture.weights.numpy(), mixture.means[:, 0].numpy()
    deviations = mixture.covariances[:, 0, 0].sqrt().numpy()
    low, high = np.full_like(probability, -20.0), np.full_like(probability, 20.0)
    for _ in range(100):
        middle = (low + high) / 2
        z = torch.from_numpy((middle[:, None] - means) / deviations)
        below = (torch.special.ndtr(z).numpy() * weights).sum(axis=1) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def test_an_exact_student_of_one_step_maps_quantiles_to_quantiles():
    """In one dimension the flow keeps order, so that x_0 has the quantile of p(x_0) that x_T has of p(x_T).

    What is left is the error of the thousand DDIM steps: 3e-3 here, where one DDIM step of the teacher is off by 0.5.
    """
    x_t = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    last = torch.full((41,), 999)
    noised = LINE.marginal(PAPER, 999)
    z = (x_t - noised.means[:, 0]) / noised.covariances[:, 0, 0].sqrt()
    expected = quantiles_of(LINE, (torch.special.ndtr(z) * noised.weights).sum(dim=1).numpy())
    students = exact_students(LINE)
    error = np.abs(students[1](x_t, last)[:, 0].numpy() - expected)
    assert error.max() < 0.01
    assert np.abs(students[1000](x_t, last)[:, 0].numpy() - expected).max() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [8, 4, 2, 1])
def test_exact_students_end_where_their_teachers_thousand_steps_do(num_steps):
    students, ends = exact_students(LINE), []
    for steps in (1000, num_steps):
        x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        stage = DistillationStage(PAPER, steps, 1)
        for i in reversed(range(steps)):
            index = torch.full((9,), i)
            x_hat = stage.target(students[steps], x, index)
            x = stage._at("kept", index, x, 0) * x + stage._at("added", index, x, 0) * x_hat
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_a_gaussians_exact_student_has_its_deviation():
    """Of N(0.3, 0.2²), of which 20 steps of DDIM have a deviation of 0.146: one step of the exact student, 0.2."""
    students = exact_students(GaussianMixture([1.0], [[0.3]], [[[0.04]]]))
    x_t = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    low, high = students[1](x_t, torch.full((2,), 999))[:, 0].tolist()
    # x_T has the deviation of p(x_T), 1 but for 2e-5, and the map is linear
    assert (high - low) / 2 == pytest.approx(0.2, rel=0.01)
    assert (high + low) / 2 == pytest.approx(0.3, abs=0.01)


# ---- teachers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "previous_sample"])
@pytest.mark.parametrize("clip_sample", [True, False])
def test_a_teachers_x_start_is_that_of_its_sampling(tiny_mlp, tiny_scheduler, prediction_type, clip_sample):
    scheduler = tiny_scheduler(prediction_type=prediction_type, clip_sample=clip_sample)
    pipe = DDPMPaperPipeline(tiny_mlp(), scheduler)
    x_start, x = teacher_x_start(pipe), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for t in range(10):
        expected = pipe.reverse_step(x, t, generator=torch.Generator().manual_seed(0)).x_start
        with torch.no_grad():
            torch.testing.assert_close(x_start(x, torch.full((5,), t)), expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_points_stays_within_the_data(tiny_mlp, tiny_scheduler):
    """Where E[x_0 | x_t] lies; what is within is left as it is."""
    pipe = DDPMPaperPipeline(tiny_mlp(), tiny_scheduler(clip_sample=False))
    low, high = data_range(load_samples("moons"))  # type: ignore[misc]
    x, t = 3 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), torch.full((200,), 9)
    with torch.no_grad():
        free, kept = teacher_x_start(pipe)(x, t), teacher_x_start(pipe, within=(low, high))(x, t)
    inside = (free >= low) & (free <= high)
    assert 0 < inside.sum() < inside.numel() and (kept[inside] == free[inside]).all()
    assert (kept >= low).all() and (kept <= high).all()
    assert data_range(load_samples("digits")) is None


def test_guidance_is_distilled_in(tiny_mlp, tiny_scheduler):
    """Each sample with its own label, of which the last stands for none."""
    pipe = DDPMPaperPipeline(tiny_mlp(num_class_embeds=4, null_class=3), tiny_scheduler(clip_sample=False))
    x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5, 8, 9])
    labels = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        guided = teacher_x_start(pipe, labels, 3.0)(x, t)
        one, none = (teacher_x_start(pipe, each)(x, t) for each in (labels, torch.full_like(labels, 3)))
    torch.testing.assert_close(guided, none + 3 * (one - none), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided[3], none[3])


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "quad", "sigmoid", "warmup10"])
def test_a_students_scheduler_has_the_teachers_process(schedule):
    scheduler = DDPMPaperScheduler(beta_schedule=schedule, num_train_timesteps=40)
    student = student_scheduler(scheduler)
    expected = torch.tensor(scheduler.diffusion.alphas_cumprod)
    torch.testing.assert_close(student.alphas_cumprod.double(), expected, rtol=1e-3, atol=1e-7)
    config = student.config
    assert config["prediction_type"] == "v_prediction" and config["timestep_spacing"] == "trailing"
    assert config["clip_sample"] is False and config["set_alpha_to_one"] is True
    assert math.isclose(float(student.final_alpha_cumprod), 1.0)
