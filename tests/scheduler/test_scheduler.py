"""DDPMPaperScheduler: the paper's recorded steps, Algorithm 2, and what stock DDPMScheduler's configurations mean."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ddpm_hf import DDPMPaperScheduler

PREDICTION_TYPES = {"eps": "epsilon", "xstart": "sample", "xprev": "previous_sample"}
VARIANCE_TYPES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the paper's code: recorded steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("parameterization", PREDICTION_TYPES)
def test_a_step_equals_the_papers(golden, relative_error, parameterization, variance, clip):
    """To 2e-6 at every recorded t: a few units in the last place of float32. Stock DDPMScheduler is at 8e-5."""
    scheduler = DDPMPaperScheduler(
        prediction_type=PREDICTION_TYPES[parameterization], variance_type=VARIANCE_TYPES[variance], clip_sample=clip
    )
    model_output = golden.nchw(f"model_output/{parameterization}")
    if variance == "learned":
        model_output = torch.cat([model_output, golden.nchw("model_log_variance_learned")], dim=1)
    sample, noise = golden.nchw("in/x_t"), golden.nchw("in/noise")
    recorded = golden.nchw(f"p/{parameterization}/{variance}/clip{clip:d}/sample")
    for i, t in enumerate(golden["in/t"].tolist()):
        one = slice(i, i + 1)
        step = scheduler.step(model_output[one], t, sample[one], variance_noise=noise[one])
        assert relative_error(step.prev_sample, recorded[one]) < 2e-6, f"t={t}"


@pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge"])
def test_a_chain_equals_the_papers(golden, relative_error, variance):
    """Twenty steps of the denoiser ε = 0.3 x + 0.01 t; to 1e-5, as float32's rounding adds up over the steps."""
    scheduler = DDPMPaperScheduler(
        num_train_timesteps=20,
        trained_betas=golden[f"chain/{variance}/betas"],
        variance_type=VARIANCE_TYPES[variance],
    )
    x, noise = golden.nchw(f"chain/{variance}/xT"), golden.nchw(f"chain/{variance}/noise")
    trajectory = golden.nchw(f"chain/{variance}/traj")
    for k, t in enumerate(range(19, -1, -1), start=1):
        x = scheduler.step(0.3 * x + 0.01 * t, t, x, variance_noise=noise[t]).prev_sample
        assert relative_error(x, trajectory[k]) < 1e-5, f"after {k} steps"


# ---- Algorithm 2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_an_unclipped_step_is_line_4_of_algorithm_2(variance_type):
    """(x_t − (1−α_t)/√(1−ᾱ_t) ε)/√α_t + σ_t z at every t, z = 0 at the last; to float64's rounding, times 157."""
    scheduler = DDPMPaperScheduler(variance_type=variance_type, clip_sample=False)
    x, eps, z = (normal(seed, 2, 5, dtype=torch.float64) for seed in (0, 1, 2))
    beta = np.linspace(1e-4, 0.02, 1000)
    alphas_cumprod = np.cumprod(1 - beta)
    for t in range(1000):
        previous = alphas_cumprod[t - 1] if t else 1.0
        variance = beta[t] if variance_type == "fixed_large" else beta[t] * (1 - previous) / (1 - alphas_cumprod[t])
        expected = (x - beta[t] / math.sqrt(1 - alphas_cumprod[t]) * eps) / math.sqrt(1 - beta[t])
        if t > 0:
            expected = expected + math.sqrt(variance) * z
        ours = scheduler.step(eps, t, x, variance_noise=z).prev_sample
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mean", "std", "variance_type"), [(0.7, 0.3, "learned"), (-0.4, 2.0, "learned"), (0.0, 1.0, "fixed_large")]
)
def test_a_perfect_network_samples_a_gaussian_exactly(mean, std, variance_type):
    """Data N(m, s²): the optimal ε is closed form, and 1000 steps of it give m and s back.

    The chain is exact with the true variance of q(x_{t−1} | x_t), which is β_t for s = 1 (Section 3.2) and in general
    what `learned` is given here. Tolerances are 5 standard errors of 16,000 samples: √(1/n) s and √(1/2n) s. The chain
    itself starts at N(0, 1) instead of N(√ᾱ_T m, …) and ends in E[x_0 | x_1], which is a hundred times less.
    """
    scheduler = DDPMPaperScheduler(variance_type=variance_type, clip_sample=False)
    q, num_samples = scheduler.diffusion, 16_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 1, generator=generator)
    for t in scheduler.timesteps.tolist():
        signal, noise_variance = q.sqrt_alphas_cumprod[t], 1 - q.alphas_cumprod[t]
        marginal_variance = signal**2 * std**2 + noise_variance
        model_output = math.sqrt(noise_variance) * (x - signal * mean) / marginal_variance
        if variance_type == "learned":
            uncertainty = std**2 * noise_variance / marginal_variance  # of x_0 given x_t
            variance = q.posterior_variance[t] + q.posterior_mean_coef1[t] ** 2 * uncertainty
            model_output = torch.cat([model_output, torch.full_like(x, math.log(variance))], dim=1)
        x = scheduler.step(model_output, t, x, generator=generator).prev_sample
    assert x.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(num_samples))
    assert x.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * num_samples))


def test_the_last_step_adds_no_noise_and_the_others_do():
    scheduler = DDPMPaperScheduler()
    x, eps = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 4, 4)
    for t, noisy in ((0, False), (1, True), (999, True)):
        first, second = (scheduler.step(eps, t, x, variance_noise=normal(s, 2, 3, 4, 4)).prev_sample for s in (2, 3))
        assert torch.equal(first, second) != noisy


def test_noise_comes_from_the_generator():
    scheduler = DDPMPaperScheduler()
    x, eps = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 4, 4)

    def drawn(*seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return scheduler.step(eps, 500, x, generator=generators if len(seeds) > 1 else generators[0]).prev_sample

    assert torch.equal(drawn(7), drawn(7))
    assert not torch.equal(drawn(7), drawn(8))
    given = scheduler.step(eps, 500, x, variance_noise=normal(7, 2, 3, 4, 4)).prev_sample
    assert torch.equal(drawn(7), given)
    assert torch.equal(drawn(7, 8)[1], drawn(9, 8)[1])  # one generator per sample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_step_is_computed_in_float32(dtype):
    """Also the noise is drawn in float32, so that a seed means the same noise in every precision."""
    scheduler = DDPMPaperScheduler()
    x, eps = normal(0, 2, 3, 4, 4).to(dtype), normal(1, 2, 3, 4, 4).to(dtype)
    for t in (0, 3, 500, 999):
        half = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(5))
        full = scheduler.step(eps.float(), t, x.float(), generator=torch.Generator().manual_seed(5))
        assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
        assert torch.equal(half.prev_sample, full.prev_sample.to(dtype))


def test_a_step_returns_the_same_as_a_tuple_and_takes_tensor_timesteps():
    scheduler = DDPMPaperScheduler()
    x, eps, z = (normal(seed, 2, 3, 4, 4) for seed in (0, 1, 2))
    step = scheduler.step(eps, 500, x, variance_noise=z)
    prev_sample, x_start = scheduler.step(eps, torch.tensor(500), x, variance_noise=z, return_dict=False)
    assert torch.equal(prev_sample, step.prev_sample)
    assert torch.equal(x_start, step.pred_original_sample)
    assert x_start.abs().max() <= 1


# ---- timesteps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("num_inference_steps", [1, 7, 10, 30, 50, 999, 1000])
def test_timesteps_equal_stocks(spacing, num_inference_steps):
    ours, stock = DDPMPaperScheduler(timestep_spacing=spacing), DDPMScheduler(timestep_spacing=spacing)
    assert torch.equal(ours.timesteps, stock.timesteps)
    ours.set_timesteps(num_inference_steps)
    stock.set_timesteps(num_inference_steps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert len(ours.timesteps) == ours.num_inference_steps == num_inference_steps
    for t in ours.timesteps:
        assert ours.previous_timestep(t) == stock.previous_timestep(t)


def test_trained_betas_decide_the_number_of_timesteps():
    scheduler = DDPMPaperScheduler(trained_betas=[0.1, 0.2, 0.3])
    assert len(scheduler) == scheduler.config.num_train_timesteps == 3
    assert scheduler.timesteps.tolist() == [2, 1, 0]
    np.testing.assert_array_equal(scheduler.diffusion.betas, [0.1, 0.2, 0.3])


def test_own_timesteps_are_taken_as_they_are():
    scheduler = DDPMPaperScheduler()
    scheduler.set_timesteps(timesteps=[900, 50, 3])
    assert scheduler.timesteps.tolist() == [900, 50, 3]
    assert [int(scheduler.previous_timestep(t)) for t in (900, 50, 3)] == [50, 3, -1]
    with pytest.raises(ValueError, match="timestep=899 is not one of the current 3 timesteps"):
        scheduler.step(torch.zeros(1, 2), 899, torch.zeros(1, 2))


def test_fewer_steps_do_not_touch_the_training_process():
    scheduler = DDPMPaperScheduler()
    scheduler.set_timesteps(10)
    assert scheduler.diffusion.num_timesteps == len(scheduler) == 1000
    assert torch.equal(scheduler.scale_model_input(torch.ones(2), 5), torch.ones(2))


# ---- stock DDPMScheduler's configurations mean the same ------------------------------------------------------------

STOCK_CONFIGS = {
    "ddpm-cifar10-32": {"variance_type": "fixed_large"},
    "ddpm-celebahq-256": {"variance_type": "fixed_small"},
    "unclipped": {"clip_sample": False},
    "clip_sample_range": {"clip_sample_range": 2.0},
    "sample": {"prediction_type": "sample"},
    "v_prediction": {"prediction_type": "v_prediction", "variance_type": "fixed_large"},
    "thresholding": {"thresholding": True, "sample_max_value": 3.0},
    "dynamic_ratio": {"thresholding": True, "dynamic_thresholding_ratio": 0.6, "sample_max_value": 1.5},
    "linspace": {"timestep_spacing": "linspace", "variance_type": "fixed_large"},
    "trailing": {"timestep_spacing": "trailing"},
    "trailing fixed_large": {"timestep_spacing": "trailing", "variance_type": "fixed_large"},
    "steps_offset": {"steps_offset": 1, "variance_type": "fixed_large"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": np.linspace(2e-4, 0.01, 1000).tolist()},
    "zero snr": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
}


@pytest.mark.parametrize(
    ("name", "num_inference_steps"),
    # The excluded chain starts at t = 1000, which stock looks up outside its table and we refuse: see the refusals.
    [(name, n) for name in STOCK_CONFIGS for n in (10, 50, 1000) if (name, n) != ("steps_offset", 1000)],
)
def test_a_stock_configuration_means_the_same_here(relative_error, name, num_inference_steps):
    """Up to thirty steps of each chain, from the same generator, to 1e-4: the precision of stock's float32 tables."""
    stock = DDPMScheduler(**STOCK_CONFIGS[name])
    ours = DDPMPaperScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(num_inference_steps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    for i, t in enumerate(stock.timesteps.tolist()):
        last = i == num_inference_steps - 1
        if i % max(1, num_inference_steps // 30) and not last:
            continue
        if last and t > 0 and stock.config.variance_type == "fixed_large":
            continue  # the documented deviation: the test after this one
        x, model_output = 1.5 * normal(2 * i, 2, 3, 4, 4), normal(2 * i + 1, 2, 3, 4, 4)
        expected, step = (
            scheduler.step(model_output, t, x, generator=torch.Generator().manual_seed(i))
            for scheduler in (stock, ours)
        )
        assert relative_error(step.prev_sample, expected.prev_sample) < 1e-4, f"t={t}"
        assert relative_error(step.pred_original_sample, expected.pred_original_sample) < 1e-4, f"t={t}"


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_variance_that_diffusers_tests_ask_for_equals_stocks(variance_type):
    ours, stock = (cls(variance_type=variance_type) for cls in (DDPMPaperScheduler, DDPMScheduler))
    for t in (1, 487, 999):
        torch.testing.assert_close(ours._get_variance(t), stock._get_variance(t), rtol=5e-4, atol=0)


@pytest.mark.parametrize("config", [{"timestep_spacing": "trailing"}, {"steps_offset": 1}])
def test_no_noise_on_the_finished_image_where_stock_adds_some(config):
    """The documented deviation: fixed_large, and a chain whose last timestep is not 0."""
    stock = DDPMScheduler(variance_type="fixed_large", **config)
    ours = DDPMPaperScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    t = int(ours.timesteps[-1])
    assert t > 0
    x, eps, z = (normal(seed, 2, 3, 4, 4) for seed in (0, 1, 2))
    step = ours.step(eps, t, x, variance_noise=z)
    # Without noise the last step ends in x̂_0 itself: μ̃ weighs x_0 with 1 when the step before it is x_0.
    torch.testing.assert_close(step.prev_sample, step.pred_original_sample, rtol=0, atol=1e-6)
    stocks = stock.step(eps, t, x, generator=torch.Generator().manual_seed(2)).prev_sample
    sigma = math.sqrt(1 - ours.diffusion.alphas_cumprod[t])
    torch.testing.assert_close(stocks - step.prev_sample, sigma * z, rtol=0, atol=1e-4)


def test_zero_terminal_snr_starts_at_pure_noise():
    scheduler = DDPMPaperScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.diffusion.alphas_cumprod[-1] == 0
    x, v = normal(0, 2, 3, 4, 4), normal(1, 2, 3, 4, 4)
    step = scheduler.step(v, 999, x, variance_noise=torch.zeros_like(x))
    assert torch.equal(step.pred_original_sample, -v.clamp(-1, 1))
    assert step.prev_sample.isfinite().all()


# ---- the forward process, for training scripts written against diffusers -------------------------------------------


def test_add_noise_is_q_sample(golden, relative_error):
    t = torch.from_numpy(golden["in/t"]).long()
    scheduler = DDPMPaperScheduler()
    x_t = scheduler.add_noise(golden.nchw("in/x0"), golden.nchw("in/eps"), t)
    assert relative_error(x_t, golden.nchw("in/x_t")) < 5e-7
    assert scheduler.add_noise(torch.zeros(2, 3).double(), torch.ones(2, 3).double(), t[:2]).dtype == torch.float64


@pytest.mark.parametrize("name", ["add_noise", "get_velocity"])
def test_half_precision_is_noised_in_float32(name):
    scheduler, t = DDPMPaperScheduler(), torch.arange(1000)
    x, noise = normal(0, 1000, 8).bfloat16(), normal(1, 1000, 8).bfloat16()
    result = getattr(scheduler, name)(x, noise, t)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, getattr(scheduler, name)(x.float(), noise.float(), t).bfloat16())


def test_the_first_steps_add_noise_in_bfloat16():
    """In bfloat16 √(1 − ᾱ_t) of t = 0 … 9 is 0, so stock adds no noise there while the target stays unit noise."""
    t, noise = torch.arange(10), normal(0, 10, 8).bfloat16()
    black = torch.zeros_like(noise)
    assert torch.equal(DDPMScheduler().add_noise(black, noise, t)[0], black[0])
    scheduler = DDPMPaperScheduler()
    sigma = torch.tensor(scheduler.diffusion.sqrt_one_minus_alphas_cumprod[:10]).float()[:, None]
    # bfloat16 has 8 bits: half a unit in the last place is 2⁻⁹ of the value, 0.2%.
    torch.testing.assert_close(scheduler.add_noise(black, noise, t).float(), sigma * noise.float(), rtol=2**-8, atol=0)


def test_get_velocity_equals_stocks(relative_error):
    x, noise, t = normal(0, 50, 3, 4, 4), normal(1, 50, 3, 4, 4), torch.arange(0, 1000, 20)
    ours, stocks = (scheduler.get_velocity(x, noise, t) for scheduler in (DDPMPaperScheduler(), DDPMScheduler()))
    assert relative_error(ours, stocks) < 1e-5


def test_one_timestep_serves_the_whole_batch():
    scheduler, x, noise = DDPMPaperScheduler(), normal(0, 3, 2), normal(1, 3, 2)
    expected = scheduler.add_noise(x, noise, torch.tensor([7, 7, 7]))
    for t in (torch.tensor(7), torch.tensor([7])):
        assert torch.equal(scheduler.add_noise(x, noise, t), expected)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES.values())
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES.values())
def test_a_float64_step_adds_noise_of_a_float64_deviation(prediction_type, variance_type):
    """σ_t z to the rounding of float64, of a sum of numbers near 1; in float32 σ would be 6e-8 off."""
    scheduler = DDPMPaperScheduler(prediction_type=prediction_type, variance_type=variance_type)
    x, output, z = (normal(seed, 2, 3, 4, 4, dtype=torch.float64) for seed in range(3))
    log_variance = normal(3, 2, 3, 4, 4, dtype=torch.float64) - 3
    if variance_type == "learned":
        output = torch.cat([output, log_variance], dim=1)
    for t in (1, 500, 999):
        noisy, plain = (scheduler.step(output, t, x, variance_noise=noise).prev_sample for noise in (z, 0 * z))
        if variance_type != "learned":
            table = {"fixed_small": scheduler.diffusion.posterior_variance, "fixed_large": scheduler.diffusion.betas}
            log_variance = torch.full_like(z, float(np.log(table[variance_type][t])))
        torch.testing.assert_close(noisy - plain, torch.exp(0.5 * log_variance) * z, rtol=1e-11, atol=1e-14)
