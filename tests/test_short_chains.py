"""Chosen timesteps and fitted variances: definitions, brute force, data with a closed form, and checkpoints."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, GaussianDiffusion
from ddpm_hf.likelihood import bits_per_dim, vb_terms_bpd
from ddpm_hf.scheduler.scheduling_ddpm_paper import make_betas
from ddpm_hf.short_chains import choose_timesteps, decoder_costs_bpd, shortened, step_costs_bpd

PAPER = GaussianDiffusion(np.linspace(1e-4, 0.02, 1000))
NINE = GaussianDiffusion(np.linspace(0.02, 0.6, 9))


def errors(seed: int, num_timesteps: int = 9) -> np.ndarray:
    """A table of x̂_0's mean squared error at random, not even monotone: float64 [T]."""
    return 10 ** np.random.default_rng(seed).uniform(-4, 0, num_timesteps)


def chain_terms_bpd(diffusion: GaussianDiffusion, timesteps, mse: np.ndarray, num_levels: int | None = 256) -> Tensor:
    """The bound's terms of the respaced process, for a network that is wrong by ± √mse_t at every t: [K]."""
    full = GaussianDiffusion(diffusion.betas, "sample", "fitted", x_start_mse=mse)
    chain = full.respaced(timesteps)
    t = torch.arange(len(timesteps))
    x_start = torch.zeros(len(timesteps), 2, dtype=torch.float64)
    off_by = torch.from_numpy(np.sqrt(mse[timesteps]))[:, None] * torch.tensor([1.0, -1.0])
    x_t = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0)).double()
    return vb_terms_bpd(chain, x_start + off_by, x_start, x_t, t, clip_denoised=False, num_levels=num_levels)


# ---- costs ---------------------------------------------------------------------------------------------------------


def test_a_steps_cost_is_its_term_of_the_bound():
    """Of every pair of nine timesteps; as the KL depends on the error's square alone, ± √mse gives its mean."""
    mse = errors(0)
    costs = step_costs_bpd(NINE, mse)
    for end, begin in itertools.product(range(9), repeat=2):
        if end < begin:
            term = chain_terms_bpd(NINE, [end, begin], mse)[1]
            assert costs[end, begin] == pytest.approx(term.item(), rel=1e-9, abs=1e-14)
        else:
            assert costs[end, begin] == math.inf


def test_a_steps_cost_is_the_information_it_brings():
    """½ log₂(1 + (SNR_end − SNR_begin) mse_begin) with SNR = ᾱ / (1 − ᾱ), at every pair of the paper's process."""
    mse = errors(0, 1000)
    snr = PAPER.alphas_cumprod / (1 - PAPER.alphas_cumprod)
    end, begin = np.triu_indices(1000, 1)
    expected = 0.5 * np.log1p((snr[end] - snr[begin]) * mse[begin]) / math.log(2)
    np.testing.assert_allclose(step_costs_bpd(PAPER, mse)[end, begin], expected, rtol=1e-9, atol=1e-15)


def test_a_perfect_network_steps_for_nothing():
    costs = step_costs_bpd(PAPER, np.full(1000, 1e-300))
    assert costs[np.triu_indices(1000, 1)].max() < 1e-290


@pytest.mark.slow
@pytest.mark.parametrize("num_levels", [2, 17, 256])
@pytest.mark.parametrize("mse", [1e-7, 1e-4, 0.003, 0.2, 1.0])
def test_the_decoders_cost_is_its_mean_over_a_gaussian_error(num_levels, mse):
    """E[−log₂ P(bin)] for an error N(0, mse) and that variance, by an integral to 30 digits."""
    with mpmath.workdps(30):
        half_width = 1 / (mpmath.mpf(num_levels - 1) * mpmath.sqrt(mse))

        def tail(z: Any) -> Any:  # P[Z > z], without cancellation
            return mpmath.erfc(z / mpmath.sqrt(2)) / 2

        def integrand(z: Any) -> Any:
            return -mpmath.npdf(z) * mpmath.log(tail(z - half_width) - tail(z + half_width))

        expected = float(2 * mpmath.quad(integrand, [0, 1, 2, 4, 6, 8, 10]) / mpmath.log(2))
    cost = decoder_costs_bpd(np.array([0.1, mse]), num_levels)
    assert cost.shape == (2,)
    assert cost[1] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_decoders_cost_for_points_is_an_entropy():
    mse = np.array([1e-4, 0.3, 2.0])
    entropy = torch.distributions.Normal(0, torch.from_numpy(np.sqrt(mse))).entropy().numpy() / math.log(2)
    np.testing.assert_allclose(decoder_costs_bpd(mse, None), entropy, rtol=1e-12)


# ---- fitted variances ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [range(9), [0, 3, 4, 8], [2, 8]], ids=str)
def test_no_other_variance_has_a_lower_bound(timesteps):
    """At every t of a chain, L_0 of points included: the fitted variance minimises the term for that error."""
    timesteps, mse = list(timesteps), errors(1)
    chain: Any = GaussianDiffusion(NINE.betas, "sample", "fitted", x_start_mse=mse).respaced(timesteps)
    fitted = chain_terms_bpd(NINE, timesteps, mse, num_levels=None)
    x_start = torch.zeros(len(timesteps), 2, dtype=torch.float64)
    off_by = torch.from_numpy(np.sqrt(mse[timesteps]))[:, None] * torch.tensor([1.0, -1.0])
    log_variance = torch.from_numpy(np.log(chain.model_variance))[:, None]
    learned = GaussianDiffusion(chain.betas, "sample", "learned", timesteps=chain.timesteps)

    def terms(shift: float) -> Tensor:
        output = torch.cat([off_by, (log_variance + shift).expand_as(off_by)], dim=1)
        t = torch.arange(len(timesteps))
        x_t = torch.zeros_like(x_start)
        return vb_terms_bpd(learned, output, x_start, x_t, t, clip_denoised=False, num_levels=None)

    torch.testing.assert_close(terms(0.0), fitted, rtol=1e-9, atol=1e-12)
    for shift in (1e-3, 0.3, 3.0):
        assert (terms(shift) > fitted).all() and (terms(-shift) > fitted).all()


class Denoiser(nn.Module):
    """E[x_0 | x_t] as a network, x̂_0 itself, for data N(0, 1) or, `binary`, −1 and 1 with equal chances."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, diffusion: GaussianDiffusion, *, binary: bool = False):
        super().__init__()
        self.alphas_cumprod, self.binary = torch.from_numpy(diffusion.alphas_cumprod.copy()), binary

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        alpha = self.alphas_cumprod[timestep][:, None]
        guess = torch.tanh(sample * alpha.sqrt() / (1 - alpha)) if self.binary else alpha.sqrt() * sample
        return SimpleNamespace(sample=guess)


BINARY = GaussianDiffusion(make_betas("linear", 100, 0.02, 0.25))


def binary_errors() -> np.ndarray:
    """E[1 − E[x_0 | x_t]²] for x_0 = ±1 at every t of BINARY, by the trapezoidal rule: float64 [T]."""
    z, alpha = np.linspace(-12, 12, 4001), BINARY.alphas_cumprod[:, None]
    x_t = np.sqrt(alpha) + np.sqrt(1 - alpha) * z
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return (density / np.cosh(x_t * np.sqrt(alpha) / (1 - alpha)) ** 2).sum(axis=1) * (z[1] - z[0])


@pytest.mark.parametrize("num_steps", [1, 2, 5, 30, None])
def test_every_chain_with_fitted_variances_is_exact_for_gaussian_data(num_steps):
    """Data N(0, 1): E[x_0 | x_t] leaves 1 − ᾱ_t, p_θ is q's own reverse step, and any chain's bound is the entropy.

    As a sum of costs exactly; as measured on 1000 samples within 5 standard errors.
    """
    scheduler = DDPMPaperScheduler(num_train_timesteps=30, beta_start=0.01, beta_end=0.4, prediction_type="sample")
    diffusion = scheduler.diffusion
    mse = 1 - diffusion.alphas_cumprod
    entropy = 0.5 * math.log2(2 * math.pi * math.e)

    short = shortened(scheduler, mse, num_steps=num_steps, num_levels=None)
    timesteps = short.chain().timesteps
    costs = step_costs_bpd(diffusion, mse)
    prior = -0.5 * math.log2(1 - diffusion.alphas_cumprod[-1])  # E[L_T] for E[x²] = 1
    expected = prior + decoder_costs_bpd(mse, None)[timesteps[0]] + costs[timesteps[:-1], timesteps[1:]].sum()
    assert expected == pytest.approx(entropy, rel=1e-12)

    x_start = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    options: Any = {"seed": 0, "clip_denoised": False, "num_levels": None}
    bound = bits_per_dim(Denoiser(diffusion), short, x_start, **options)
    assert bound.terms_bt.shape == (1000, len(timesteps))
    for measured, truth in (
        (bound.total_b[:, None], entropy),
        (bound.x_start_mse_bt, torch.from_numpy(mse[timesteps])),
    ):
        assert ((measured.mean(dim=0) - truth).abs() < 5 * measured.std(dim=0) / math.sqrt(1000)).all()


# ---- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_levels", [2, 256, None])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 9])
def test_no_other_chain_costs_less(num_steps, num_levels):
    """Against all chains of nine timesteps, each one's bound from its respaced process, for three random tables."""
    for seed in range(3):
        mse = errors(seed)
        decoder = decoder_costs_bpd(mse, num_levels)
        costs = {}
        for lower in itertools.combinations(range(8), num_steps - 1):
            chain = [*lower, 8]
            costs[tuple(chain)] = decoder[chain[0]] + chain_terms_bpd(NINE, chain, mse)[1:].sum().item()
        chosen = choose_timesteps(NINE, mse, num_steps, num_levels=num_levels)
        assert chosen.dtype == np.int64
        assert costs[tuple(chosen.tolist())] <= min(costs.values()) + 1e-12


def test_more_steps_never_cost_more_where_the_denoiser_is_the_best():
    """A law for E[x_0 | x_t], here of ±1 as points, though not for any table; and even chains cost more than chosen.

    More of x_0 is known after a further observation: 1/mse_u ≥ 1/mse_t + SNR_u − SNR_t (with equality for Gaussians),
    which is what it takes for t → u → s to cost no more than t → s.
    """
    mse = binary_errors()
    costs, decoder = step_costs_bpd(BINARY, mse), decoder_costs_bpd(mse, None)

    def cost(timesteps: np.ndarray) -> float:
        return decoder[timesteps[0]] + costs[timesteps[:-1], timesteps[1:]].sum()

    nums = [1, 2, 3, 5, 10, 25, 50, 99, 100]
    chosen = [cost(choose_timesteps(BINARY, mse, num, num_levels=None)) for num in nums]
    assert (np.diff(chosen) < 1e-12).all()  # the steps that are almost free cost nothing that float64 could show
    assert chosen[-1] == pytest.approx(cost(np.arange(100)), rel=1e-12)
    for num, best in list(zip(nums, chosen, strict=True))[2:5]:
        assert best < cost(np.linspace(0, 99, num).round().astype(int)) - 0.01


def test_chosen_chains_are_measured_to_be_better():
    """Data ±1 as an image of two levels in 10 of 100 steps, against uniform ones; its entropy is 1 bit."""
    scheduler = DDPMPaperScheduler(trained_betas=BINARY.betas, prediction_type="sample", variance_type="fixed_large")
    unet, x_start = Denoiser(BINARY, binary=True), torch.tensor([[-1.0], [1.0]]).repeat(500, 1)
    options: Any = {"seed": 0, "num_levels": 2}
    short = shortened(scheduler, binary_errors(), num_steps=10, num_levels=2)
    chosen = bits_per_dim(unet, short, x_start, **options).total_b
    uniform = bits_per_dim(unet, scheduler, x_start, num_inference_steps=10, **options).total_b
    assert 1 - 5 * chosen.std() / math.sqrt(1000) < chosen.mean() < uniform.mean() - 0.1


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def short(tiny_scheduler) -> DDPMPaperScheduler:
    return shortened(tiny_scheduler(variance_type="fixed_large"), errors(3, 10), num_steps=4)


def fitted_variance(scheduler: Any) -> np.ndarray:
    return scheduler.chain().model_variance


def quiet(pipe: DDPMPaperPipeline) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_shortened_scheduler_has_the_chosen_chain_and_its_fitted_variances(tiny_scheduler, short):
    scheduler, mse = tiny_scheduler(variance_type="fixed_large"), errors(3, 10)
    chosen = choose_timesteps(scheduler.diffusion, mse, 4)
    assert short.config["inference_timesteps"] == chosen.tolist()
    assert short.config["x_start_mse"] == mse[chosen].tolist()
    assert short.config["variance_type"] == "fitted"
    for key in set(scheduler.config) - {"variance_type", "_use_default_values"}:
        assert short.config[key] == scheduler.config[key], key
    betas = scheduler.diffusion.betas
    expected: Any = GaussianDiffusion(betas, "epsilon", "fitted", x_start_mse=mse).respaced(chosen)
    np.testing.assert_allclose(fitted_variance(short), expected.model_variance, rtol=1e-12)
    again = shortened(short, errors(4, 10))
    assert "inference_timesteps" not in again.config and again.config["x_start_mse"] == errors(4, 10).tolist()
    assert again.chain().num_timesteps == 10


def test_a_shortened_scheduler_is_saved_loaded_and_sampled_from(short, tiny_unet, tmp_path):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(), short))
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DDPMPaperPipeline.from_pretrained(tmp_path))
    public = {key: value for key, value in short.config.items() if not key.startswith("_")}
    assert {key: loaded.scheduler.config[key] for key in public} == public
    np.testing.assert_array_equal(fitted_variance(loaded.scheduler), fitted_variance(short))
    expected = pipe(seeds=range(2), output_type="latent").images
    assert pipe.num_timesteps == 4 and expected.isfinite().all()
    assert torch.equal(loaded(seeds=range(2), output_type="latent").images, expected)


def test_a_fitted_chain_samples_gaussian_data_exactly():
    """Data N(0, 1) in five steps: the variance within 5 standard errors of 20,000; with fixed_small it is too small.

    The last step of a chain adds no noise, so it ends in E[x_0 | x_t], which lacks the variance 1 − ᾱ of that t.
    """
    scheduler = DDPMPaperScheduler(
        num_train_timesteps=30, beta_start=0.01, beta_end=0.4, prediction_type="sample", clip_sample=False
    )
    mse = 1 - scheduler.diffusion.alphas_cumprod
    timesteps = [0, 6, 12, 20, 29]
    unet = Denoiser(scheduler.diffusion)

    def sampled(scheduler: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
        for t in scheduler.timesteps.tolist():
            output = unet(x, torch.full((len(x),), t)).sample
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        return x.var().item() + mse[timesteps[0]]

    fitted: Any = DDPMPaperScheduler.from_config(
        scheduler.config, variance_type="fitted", inference_timesteps=timesteps, x_start_mse=mse[timesteps].tolist()
    )
    assert sampled(fitted) == pytest.approx(1, abs=5 * math.sqrt(2 / 20_000))
    scheduler.set_timesteps(timesteps=timesteps[::-1])
    assert sampled(scheduler) < 0.9


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("other", [DDIMScheduler, DDPMScheduler])
def test_other_schedulers_still_take_over_the_process(short, tiny_unet, other):
    scheduler = other.from_config(short.config)
    torch.testing.assert_close(scheduler.betas, short.betas, rtol=1e-5, atol=0)
    pipe = quiet(DDPMPaperPipeline(tiny_unet(), scheduler))
    assert pipe(seeds=[0], num_inference_steps=5, output_type="latent").images.isfinite().all()
    assert pipe.num_timesteps == 5
    back: Any = DDPMPaperScheduler.from_config(scheduler.config)
    np.testing.assert_array_equal(fitted_variance(back), fitted_variance(short))


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, -1, 10])
def test_an_impossible_number_of_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps={num_steps} must lie in \[1, 9\]"):
        choose_timesteps(NINE, errors(0), num_steps)


@pytest.mark.parametrize(
    "mse",
    [
        pytest.param(errors(0)[:8], id="too short"),
        pytest.param(errors(0, 10), id="too long"),
        pytest.param(errors(0)[:1], id="one for all"),
        pytest.param(np.append(errors(0)[:8], np.nan), id="nan"),
        pytest.param(np.append(errors(0)[:8], 0.0), id="zero"),
        pytest.param(-errors(0), id="negative"),
    ],
)
def test_an_impossible_table_of_errors_is_refused(mse):
    with pytest.raises(ValueError, match="x_start_mse"):
        choose_timesteps(NINE, mse, 3)


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(DDPMPaperScheduler(10, variance_type="learned"), id="learned"),
        pytest.param(DDPMPaperScheduler(10, prediction_type="previous_sample"), id="mu"),
    ],
)
def test_networks_that_no_shorter_chain_can_use_are_refused(scheduler):
    """A learned variance is in the way of a fitted one; μ̃ of one step is not the mean of a longer one."""
    with pytest.raises(ValueError, match="learned|previous_sample"):
        shortened(scheduler, errors(0, 10), num_steps=3)


def test_the_error_of_x_start_is_taken_as_bits_per_dim_gives_it(tiny_scheduler):
    """As a mean over its first dimension; a torch tensor."""
    mse = errors(5, 10)
    by_tensor = shortened(tiny_scheduler(), torch.from_numpy(mse), num_steps=3)  # type: ignore[arg-type]
    assert by_tensor.config["x_start_mse"] == shortened(tiny_scheduler(), mse, num_steps=3).config["x_start_mse"]
