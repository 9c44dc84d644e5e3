"""GaussianDiffusion against the paper's own code (tests/golden), and against the laws of Sections 2 and 3.

The laws are checked in float64 at every t: what they allow is the rounding of float64, times the largest coefficient.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_hf import GaussianDiffusion
from ddpm_hf.scheduler.scheduling_ddpm_paper import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    VARIANCE_TYPES,
    make_betas,
    rescale_zero_terminal_snr,
)

PAPER_SCHEDULES = ("linear", "quad", "const", "jsd", "warmup10", "warmup50")
GOLDEN_PREDICTION_TYPES = {"eps": "epsilon", "xstart": "sample", "xprev": "previous_sample"}
GOLDEN_VARIANCE_TYPES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}


def process(beta_schedule: str = "linear", num_timesteps: int = 1000) -> GaussianDiffusion:
    return GaussianDiffusion(make_betas(beta_schedule, num_timesteps, 1e-4, 0.02))


PAPER = process()


def paper(prediction_type: str, variance_type: str = "fixed_small", **tables: Any) -> GaussianDiffusion:
    """The paper's process of a network that predicts something else, or of another variance."""
    if variance_type == "fitted":
        tables = {"x_start_mse": np.linspace(1e-4, 0.5, 1000), **tables}
    return GaussianDiffusion(PAPER.betas, prediction_type, variance_type, **tables)


def every_t(diffusion: GaussianDiffusion = PAPER) -> Tensor:
    return torch.arange(diffusion.num_timesteps)


def points(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal [1000, 3], one row per t of the paper's process, or of another shape."""
    return torch.randn(shape or (1000, 3), generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the paper's code: recorded numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", PAPER_SCHEDULES)
def test_betas_equal_the_papers(golden, schedule):
    np.testing.assert_allclose(make_betas(schedule, 1000, 1e-4, 0.02), golden[f"betas/{schedule}"], rtol=1e-12)


def test_tables_equal_the_papers(golden):
    names = [key.removeprefix("tables/") for key in golden if key.startswith("tables/")]
    assert len(names) == 11
    for name in names:
        np.testing.assert_allclose(getattr(PAPER, name), golden[f"tables/{name}"], rtol=1e-12, err_msg=name)


def test_forward_process_equals_the_papers(golden, relative_error):
    x_start, x_t, eps, t = golden.nchw("in/x0"), golden.nchw("in/x_t"), golden.nchw("in/eps"), golden["in/t"]
    t = torch.from_numpy(t).long()
    # Both are float32 and the sums have two terms: a few units in the last place.
    assert relative_error(PAPER.q_sample(x_start, t, eps), x_t) < 5e-7
    posterior = PAPER.q_posterior_mean_variance(x_start, x_t, t)
    assert relative_error(posterior.mean, golden.nchw("posterior/mean")) < 5e-7
    for field in ("variance", "log_variance"):
        recorded = golden.nchw("posterior/log_variance_clipped" if field == "log_variance" else "posterior/variance")
        torch.testing.assert_close(getattr(posterior, field), recorded, rtol=5e-7, atol=0)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", GOLDEN_VARIANCE_TYPES)
@pytest.mark.parametrize("parameterization", GOLDEN_PREDICTION_TYPES)
def test_reverse_process_equals_the_papers(golden, parameterization, variance, clip):
    """At every t to 2e-6 of the largest number that enters the sum, all of it being float32."""
    x_t, model_output = golden.nchw("in/x_t"), golden.nchw(f"model_output/{parameterization}")
    if variance == "learned":
        model_output = torch.cat([model_output, golden.nchw("model_log_variance_learned")], dim=1)
    diffusion = paper(GOLDEN_PREDICTION_TYPES[parameterization], GOLDEN_VARIANCE_TYPES[variance])
    p = diffusion.p_mean_variance(model_output, x_t, torch.from_numpy(golden["in/t"]).long(), clip_denoised=clip)
    fields = {"mean": p.mean, "variance": p.variance, "log_variance": p.log_variance, "pred_xstart": p.x_start}
    for name, ours in fields.items():
        recorded = golden.nchw(f"p/{parameterization}/{variance}/clip{clip:d}/{name}")
        for i, t in enumerate(golden["in/t"]):
            largest = recorded[i].abs().max().item()
            if name == "pred_xstart" and parameterization == "xprev":  # a difference of far larger numbers
                weight = PAPER.posterior_mean_coef2[t] / PAPER.posterior_mean_coef1[t]
                largest = max(largest, weight * x_t[i].abs().max().item())
            assert (ours[i] - recorded[i]).abs().max() <= 2e-6 * largest, f"{name} at t={t}"


def test_constants_of_the_papers_process():
    assert PAPER.alphas_cumprod[-1] == pytest.approx(4.035829765e-5, rel=1e-9)
    assert PAPER.posterior_variance[1] == pytest.approx(5.45318766e-5, rel=1e-8)
    log_snr = np.log(PAPER.alphas_cumprod) - PAPER.log_one_minus_alphas_cumprod
    assert log_snr[[0, -1]] == pytest.approx([9.21024, -10.11767], abs=5e-6)
    assert PAPER.posterior_variance[0] == 0
    for diffusion in (PAPER, paper("epsilon", "fixed_large")):
        assert diffusion.model_log_variance[0] == math.log(PAPER.posterior_variance[1])  # type: ignore[index]


# ---- laws of the forward process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_iterating_one_step_reaches_the_closed_form(schedule):
    """q(x_t | x_{t−1}) = N(√(1−β_t) x_{t−1}, β_t) (Eq. 2), iterated from x_0, is Eq. 4."""
    diffusion = process(schedule)
    mean, variance = 1.0, 0.0
    x_start = torch.ones(1, 1, dtype=torch.float64)
    for t, beta in enumerate(diffusion.betas):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        q = diffusion.q_mean_variance(x_start, t)
        assert q.mean.item() == pytest.approx(mean, abs=1e-12)
        assert q.variance == pytest.approx(variance, abs=1e-12)
        assert math.exp(q.log_variance) == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_marginalising_the_posterior_gives_the_marginal_of_the_step_before(schedule):
    """∫ q(x_{t−1} | x_t, x_0) q(x_t | x_0) dx_t = q(x_{t−1} | x_0) at every t, with q(x_{−1} | x_0) = δ(x_0)."""
    diffusion = process(schedule)
    t, x_start = every_t(diffusion), points(0)
    q = diffusion.q_mean_variance(x_start, t)
    posterior = diffusion.q_posterior_mean_variance(x_start, q.mean, t)  # the mean is linear in x_t
    zero, one = torch.zeros_like(x_start), torch.ones_like(x_start)
    slope = diffusion.q_posterior_mean_variance(zero, one, t).mean[:, :1]
    before = diffusion.q_mean_variance(x_start, (t - 1).clamp(min=0))
    expected_mean, expected_variance = before.mean, before.variance.clone()
    expected_mean[0], expected_variance[0] = x_start[0], 0
    torch.testing.assert_close(posterior.mean, expected_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(posterior.variance + slope**2 * q.variance, expected_variance, rtol=0, atol=1e-12)


def test_q_sample_has_the_moments_of_q():
    t, noise = torch.tensor([0, 400, 999]), points(1, 3, 100_000)
    x_start = points(2, 3, 1).expand_as(noise)
    q, x_t = PAPER.q_mean_variance(x_start, t), PAPER.q_sample(x_start, t, noise)
    # 5 standard errors of 100,000 draws: √(1/n) of the deviation for the mean, √(2/n) of the variance.
    torch.testing.assert_close(
        (x_t.mean(dim=1) - q.mean[:, 0]) / q.variance[:, 0].sqrt(), torch.zeros(3).double(), rtol=0, atol=0.016
    )
    torch.testing.assert_close(x_t.var(dim=1) / q.variance[:, 0], torch.ones(3).double(), rtol=0, atol=0.023)


def test_score_is_the_gradient_of_the_log_density():
    """∇ log q(x_t | x_0) = −ε / √(1 − ᾱ_t) at every t, by automatic differentiation."""
    x_start, eps, t = points(3), points(4), every_t()
    x_t = PAPER.q_sample(x_start, t, eps).requires_grad_()
    q = PAPER.q_mean_variance(x_start, t)
    log_density = -0.5 * ((x_t - q.mean) ** 2 / q.variance + q.log_variance)
    (gradient,) = torch.autograd.grad(log_density.sum(), x_t)
    torch.testing.assert_close(PAPER.score(eps, t), gradient, rtol=1e-9, atol=1e-9)


def test_velocity_and_x_t_are_a_rotation_of_x_start_and_noise():
    x_start, eps, t = points(5), points(6), every_t()
    v, x_t = PAPER.velocity(x_start, t, eps), PAPER.q_sample(x_start, t, eps)
    torch.testing.assert_close(v**2 + x_t**2, x_start**2 + eps**2, rtol=1e-12, atol=0)


# ---- laws of the reverse process -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_x_start_back(prediction_type):
    x_start, eps, t = points(7), points(8), every_t()
    x_t = PAPER.q_sample(x_start, t, eps)
    diffusion = paper(prediction_type)
    truth = diffusion.target(x_start, x_t, t, eps)
    # previous_sample divides by the posterior's weight of x_0, which falls to 1e-4: rounding times 1e4.
    torch.testing.assert_close(diffusion.predict_x_start(truth, x_t, t), x_start, rtol=0, atol=1e-10)


def test_targets_are_noise_data_posterior_mean_and_velocity():
    x_start, eps, t = points(7), points(8), every_t()
    x_t = PAPER.q_sample(x_start, t, eps)
    expected = {"epsilon": eps, "sample": x_start, "v_prediction": PAPER.velocity(x_start, t, eps)}
    expected["previous_sample"] = PAPER.q_posterior_mean_variance(x_start, x_t, t).mean
    for prediction_type in PREDICTION_TYPES:
        assert torch.equal(paper(prediction_type).target(x_start, x_t, t, eps), expected[prediction_type])


def test_predict_eps_gives_the_noise_back():
    x_start, eps, t = points(9), points(10), every_t()
    recovered = PAPER.predict_eps(x_start, PAPER.q_sample(x_start, t, eps), t)
    torch.testing.assert_close(recovered, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_prediction_gives_the_posteriors_mean(prediction_type):
    """p_θ(x_{t−1} | x_t) of a perfect network has the mean of q(x_{t−1} | x_t, x_0) (Section 3.2)."""
    x_start, eps, t = points(11), points(12), every_t()
    x_t = PAPER.q_sample(x_start, t, eps)
    posterior = PAPER.q_posterior_mean_variance(x_start, x_t, t)
    diffusion = paper(prediction_type)
    p = diffusion.p_mean_variance(diffusion.target(x_start, x_t, t, eps), x_t, t, clip_denoised=False)
    torch.testing.assert_close(p.mean, posterior.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(p.variance, posterior.variance, rtol=0, atol=0)


def test_clipping_acts_on_x_start_alone():
    model_output, x_t, t = points(13), points(14), every_t()
    free = PAPER.p_mean_variance(model_output, x_t, t, clip_denoised=False)
    clipped = PAPER.p_mean_variance(model_output, x_t, t)
    assert free.x_start.abs().max() > 100  # √(1/ᾱ_T − 1) is 157: there is something to clip
    assert torch.equal(clipped.x_start, free.x_start.clamp(-1, 1))
    assert torch.equal(clipped.mean, PAPER.q_posterior_mean_variance(clipped.x_start, x_t, t).mean)
    halved = PAPER.p_mean_variance(model_output, x_t, t, clip_denoised=lambda x_start: x_start / 2)
    assert torch.equal(halved.x_start, free.x_start / 2)


# ---- respacing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[0], [999], [0, 1, 2], [3, 500, 998], list(range(0, 1000, 20))])
def test_respacing_keeps_the_marginals_and_the_times(kept):
    respaced = PAPER.respaced(kept)
    assert respaced.num_timesteps == len(kept)
    assert respaced.timesteps.tolist() == kept
    # β' = 1 − ᾱ keeps ᾱ to the rounding of 1, so ᾱ_T = 4e-5 to a few 1e-12 of itself.
    np.testing.assert_allclose(respaced.alphas_cumprod, PAPER.alphas_cumprod[kept], rtol=1e-11)


def test_respacing_to_every_time_changes_nothing():
    respaced = PAPER.respaced(range(1000))
    np.testing.assert_array_equal(respaced.betas, PAPER.betas)
    np.testing.assert_array_equal(respaced.timesteps, PAPER.timesteps)


def test_respacings_compose():
    first, second = np.arange(0, 1000, 10), np.array([0, 7, 50, 99])
    twice, once = PAPER.respaced(first).respaced(second), PAPER.respaced(first[second])
    np.testing.assert_allclose(twice.betas, once.betas, rtol=1e-12)
    assert twice.timesteps.tolist() == once.timesteps.tolist() == [0, 70, 500, 990]


# ---- t, dtypes, frozenness -----------------------------------------------------------------------------------------


def all_results(t: Tensor | int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every public function of the paper's process at t, for the same two images."""
    a, b = points(15, 2, 3, 4, 4, dtype=dtype), points(16, 2, 3, 4, 4, dtype=dtype)
    results = {
        "q_sample": PAPER.q_sample(a, t, b),
        "velocity": PAPER.velocity(a, t, b),
        "predict_eps": PAPER.predict_eps(a, b, t),
        "score": PAPER.score(a, t),
    }
    tuples = {
        "q": PAPER.q_mean_variance(a, t),
        "posterior": PAPER.q_posterior_mean_variance(a, b, t),
        **{
            f"{prediction} {variance}": paper(prediction, variance).p_mean_variance(
                torch.cat([a, -b.abs()], dim=1) if variance == "learned" else a, b, t
            )
            for prediction in PREDICTION_TYPES
            for variance in VARIANCE_TYPES
        },
    }
    for name, moments in tuples.items():
        for field, value in moments._asdict().items():
            results[f"{name} {field}"] = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else dtype)
    return results


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_an_int_and_a_tensor_of_times_agree(t, dtype, tolerance):
    """To rounding: with an int, products of coefficients are formed in float64 before they meet the tensor."""
    by_int, by_tensor = all_results(t, dtype), all_results(torch.tensor([t, t]), dtype)
    for name, expected in by_tensor.items():
        assert expected.dtype == dtype, name
        scale = expected.abs().max().item()
        difference = (by_int[name] - expected).abs().max().item()
        assert difference <= tolerance * scale, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", [0, torch.tensor([0, 1])])
def test_half_precision_is_refused(dtype, t):
    x = torch.zeros(2, 3, dtype=dtype)
    with pytest.raises(TypeError, match=f"{dtype}.*cast to float32"):
        PAPER.q_sample(x, t, x)


def test_the_tables_cannot_be_changed():
    betas = make_betas("linear", 10, 1e-4, 0.02)
    diffusion = GaussianDiffusion(betas)
    betas[0] = 0.5  # the caller's own array stays the caller's
    assert diffusion.betas[0] == 1e-4
    tables = [value for value in vars(diffusion).values() if isinstance(value, np.ndarray)]
    assert len(tables) > 14
    for table in tables:
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


# ---- zero terminal SNR ---------------------------------------------------------------------------------------------


def test_zero_terminal_snr_ends_at_zero_and_keeps_the_first_step():
    diffusion = GaussianDiffusion(rescale_zero_terminal_snr(PAPER.betas))
    assert diffusion.alphas_cumprod[-1] == 0
    assert diffusion.alphas_cumprod[0] == pytest.approx(PAPER.alphas_cumprod[0], rel=1e-12)
    # √ᾱ is a linear function of what it was (Lin et al. 2023, Algorithm 1).
    slope = np.diff(diffusion.sqrt_alphas_cumprod) / np.diff(PAPER.sqrt_alphas_cumprod)
    np.testing.assert_allclose(slope, slope[0], rtol=1e-7)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.0, 0.1], [-0.1], [0.5, 1.0, 0.5], [0.1, 1.1], [float("nan"), 0.1]])
def test_betas_outside_their_range_are_refused(betas):
    with pytest.raises(ValueError, match=r"betas (must lie inside \(0, 1\)|has shape)"):
        GaussianDiffusion(np.array(betas))


def test_timesteps_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"timesteps has shape \(3,\), betas \(2,\)"):
        GaussianDiffusion(np.array([0.1, 0.2]), timesteps=np.arange(3))


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="beta_schedule='laplace' is not supported; choose one of linear, "):
        make_betas("laplace", 10, 1e-4, 0.02)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (-1, "t=-1 is outside"),
        (1000, "t=1000 is outside"),
        (torch.tensor([0, -1]), r"t=\[0, -1\] leaves"),
        (torch.tensor([1000, 0]), r"t=\[1000, 0\] leaves"),
        (torch.tensor([0, 0, 0]), r"t has shape \(3,\).*\(2,\)"),
        (torch.tensor([0]), r"t has shape \(1,\).*\(2,\)"),
        (torch.tensor(0), r"t has shape \(\).*\(2,\)"),
        (torch.tensor([0.5, 2.0]), r"\bt\b.*integer"),
    ],
)
def test_times_outside_the_table_are_refused(t, message):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        PAPER.q_sample(x, t, x)


def test_shapes_that_would_broadcast_are_refused():
    x, row = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 1)
    for call in (
        lambda: PAPER.q_sample(x, 5, row),
        lambda: PAPER.velocity(x, 5, row),
        lambda: PAPER.q_posterior_mean_variance(row, x, 5),
        lambda: PAPER.predict_x_start(row, x, 5),
        lambda: PAPER.predict_eps(row, x, 5),
        lambda: PAPER.p_mean_variance(row, x, 5),
    ):
        with pytest.raises(ValueError, match=r"shapes differ: .*\(2, 3, 4, 1\)"):
            call()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="prediction_type='eps' is not supported; choose one of epsilon, "):
        paper("eps")
    with pytest.raises(ValueError, match="variance_type='learned_range' is not supported; choose one of fixed_small"):
        paper("epsilon", "learned_range")


@pytest.mark.parametrize("channels", [3, 5, 9])
def test_learned_variance_with_other_channels_is_refused(channels):
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=f"learned variance needs 6 channels, got {channels}"):
        paper("epsilon", "learned").p_mean_variance(torch.zeros(2, channels, 4, 4), x, 5)


@pytest.mark.parametrize("name", ["prediction_type", "variance_type"])
def test_outputs_for_single_steps_are_refused_for_longer_ones(name):
    """μ̃ and a learned variance belong to one training step; all of them may be taken."""
    diffusion = paper("previous_sample") if name == "prediction_type" else paper("epsilon", "learned")
    assert diffusion.respaced(range(1000)) is diffusion
    with pytest.raises(ValueError, match=f"{name}=.* belongs to single steps of training, so 2 of 1000 cannot"):
        diffusion.respaced([0, 999])


def test_epsilon_is_refused_only_where_nothing_is_left_of_x_start():
    """Where ᾱ is 0, and not at the other times; v and x_0 say what x̂_0 is everywhere."""
    betas = make_betas("jsd", 10, 1e-4, 0.02)
    x, diffusion = torch.zeros(2, 3), GaussianDiffusion(betas)
    for t in (9, torch.tensor([0, 9])):
        with pytest.raises(ValueError, match="ᾱ is 0 at timestep 9: ε gives no x_0 there"):
            diffusion.p_mean_variance(x, x, t)
    for t in (8, torch.tensor([0, 8])):
        assert diffusion.p_mean_variance(x, x, t).mean.isfinite().all()
    for prediction_type in ("sample", "v_prediction"):
        assert GaussianDiffusion(betas, prediction_type).p_mean_variance(x, x, 9).mean.isfinite().all()


@pytest.mark.parametrize(
    "timesteps", [[], [3, 3], [5, 2], [-1, 4], [0, 1000], [0.0, 2.0], [[0, 1]]], ids=lambda timesteps: str(timesteps)
)
def test_respacing_to_impossible_times_is_refused(timesteps):
    with pytest.raises(ValueError, match="timesteps must "):
        PAPER.respaced(timesteps)


# ---- fitted variances ----------------------------------------------------------------------------------------------

MSE = np.linspace(1e-4, 0.5, 1000)


def test_the_fitted_variance_adds_the_uncertainty_of_x_start():
    """σ_t² = β̃_t + c_t² mse_t, with c_t what x_0 moves the posterior's mean by; mse_0 itself at t = 0."""
    fitted = paper("sample", "fitted", x_start_mse=MSE)
    zero, one = torch.zeros(1000, 1, dtype=torch.float64), torch.ones(1000, 1, dtype=torch.float64)
    weight = PAPER.q_posterior_mean_variance(one, zero, every_t()).mean[:, 0].numpy()
    expected = PAPER.posterior_variance + weight**2 * MSE
    p = fitted.p_mean_variance(zero, zero, every_t())
    np.testing.assert_allclose(torch.as_tensor(p.variance)[:, 0], expected, rtol=1e-12)
    np.testing.assert_allclose(torch.as_tensor(p.log_variance)[:, 0], np.log(expected), rtol=1e-12)
    assert p.variance[0] == pytest.approx(MSE[0], rel=1e-12)  # type: ignore[index]
    free = paper("sample", "fitted", x_start_mse=np.full(1000, 1e-30))
    np.testing.assert_allclose(free.model_variance[1:], PAPER.posterior_variance[1:], rtol=1e-12)  # type: ignore[index]


@pytest.mark.parametrize("kept", [[999], [3, 500, 998], list(range(0, 1000, 20)), list(range(1000))], ids=len)
def test_respacing_keeps_the_errors_and_fits_the_variances_anew(kept):
    respaced = paper("epsilon", "fitted", x_start_mse=MSE).respaced(kept)
    betas = PAPER.respaced(kept).betas
    afresh = GaussianDiffusion(betas, variance_type="fitted", timesteps=np.array(kept), x_start_mse=MSE[kept])
    np.testing.assert_array_equal(respaced.x_start_mse, MSE[kept])  # type: ignore[arg-type]
    np.testing.assert_allclose(respaced.model_variance, afresh.model_variance, rtol=1e-12)  # type: ignore[arg-type]
    assert PAPER.respaced(kept).x_start_mse is None


def test_the_fitted_tables_cannot_be_changed():
    mse = MSE.copy()
    fitted = paper("epsilon", "fitted", x_start_mse=mse)
    mse[0] = 7.0
    assert fitted.x_start_mse is not None and fitted.x_start_mse[0] == MSE[0]
    for name in ("x_start_mse", "model_variance", "model_log_variance"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(fitted, name)[0] = 0


@pytest.mark.parametrize(
    "mse",
    [MSE[:999], MSE[None], [0.1], np.where(MSE > 0.4, 0, MSE), -MSE, np.full(1000, np.nan), np.full(1000, np.inf)],
)
def test_errors_that_are_not_one_positive_number_per_timestep_are_refused(mse):
    with pytest.raises(ValueError, match="x_start_mse (must hold 1000 positive numbers, one per timestep|has shape)"):
        paper("epsilon", "fitted", x_start_mse=mse)


def test_fitted_variances_and_errors_go_together():
    for variance_type, mse in (("fitted", None), ("fixed_small", MSE)):
        with pytest.raises(ValueError, match="variance_type='fitted' needs x_start_mse, and no other variance"):
            GaussianDiffusion(PAPER.betas, "epsilon", variance_type, x_start_mse=mse)


def test_variances_known_at_some_times_serve_the_processes_of_these():
    x, known = torch.zeros(2, 3), [3, 500, 998]
    some = np.full(1000, np.nan)
    some[known] = MSE[known]
    diffusion = paper("epsilon", "fitted", x_start_mse=some)
    assert diffusion.predict_x_start(x, x, 5).isfinite().all()
    with pytest.raises(ValueError, match="'fitted' needs x_start_mse at every timestep"):
        diffusion.p_mean_variance(x, x, 500)
    with pytest.raises(ValueError, match=r"timesteps \[5\] have no fitted variance; those that have one are \[3, 500"):
        diffusion.respaced([3, 5])
    short, whole = diffusion.respaced(known), paper("epsilon", "fitted", x_start_mse=MSE).respaced(known)
    np.testing.assert_array_equal(short.model_variance, whole.model_variance)
