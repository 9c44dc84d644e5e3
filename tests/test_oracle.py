"""The mixture's closed forms against quadrature, and the process, the bound and Algorithm 2 against the closed forms.

No network is trained here: with ε* every error that is left is a known one. Monte-Carlo tolerances are 5 standard
errors ("SE") of the statistic in question, computed from the same draws.
"""

import contextlib
import io
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, GaussianDiffusion
from ddpm_hf.likelihood import bits_per_dim, prior_bpd, vb_terms_bpd
from ddpm_hf.oracle import GaussianMixture, OracleNetwork, annealed_langevin
from ddpm_hf.scheduler import alphas_cumprod_at
from ddpm_hf.scheduler.scheduling_ddpm_paper import make_betas, rescale_zero_terminal_snr

DOCUMENT = Path(__file__).parents[1] / "docs" / "oracle.md"
PAPER = GaussianDiffusion(make_betas("linear", 1000, 1e-4, 0.02))


def mixture(weights: list, means: list, covariances: list) -> GaussianMixture:
    return GaussianMixture(*(torch.tensor(part, dtype=torch.float64) for part in (weights, means, covariances)))


PLANE = mixture(  # three tilted ellipses, of eigenvalues 0.01 to 0.06
    [0.5, 0.3, 0.2],
    [[-0.6, -0.3], [0.5, 0.6], [0.6, -0.5]],
    [[[0.04, 0.02], [0.02, 0.03]], [[0.02, 0.0], [0.0, 0.06]], [[0.03, -0.02], [-0.02, 0.03]]],
)
SPACE = mixture(  # in the plane eigenvectors may equal their transpose; here they do not
    [0.6, 0.4],
    [[0.3, -0.2, 0.1], [-0.4, 0.5, 0.0]],
    [
        [[0.09, 0.02, 0.01], [0.02, 0.05, -0.02], [0.01, -0.02, 0.04]],
        [[0.03, 0, 0.02], [0, 0.2, 0.05], [0.02, 0.05, 0.1]],
    ],
)
LINE = mixture([0.7, 0.3], [[-0.5], [0.6]], [[[0.04]], [[0.09]]])
STANDARD = mixture([1.0], [[0.0] * 8], [np.eye(8).tolist()])  # N(0, I)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def grid(num_dimensions: int) -> tuple[Tensor, float]:
    """Points [B, d] of [−2.5, 2.5]^d and the volume of a cell: sums over them are integrals to float64's rounding.

    (Smooth functions that vanish at the ends; the narrowest Gaussian here has σ = 0.1, over three cells.)
    """
    axis = torch.linspace(-2.5, 2.5, 161, dtype=torch.float64)
    axes = torch.meshgrid(*[axis] * num_dimensions, indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, -2), float(axis[1] - axis[0]) ** num_dimensions


def assert_mean(values: Tensor, expected: Tensor | float, beyond: Tensor | float = 0.0) -> None:
    """The mean of `values` [B, ...] is `expected` within 5 SE, and `beyond` for errors that are not of chance."""
    error = (values.mean(dim=0) - expected).abs()
    assert (error <= 5 * values.std(dim=0) / math.sqrt(len(values)) + beyond).all(), error


def squared(offsets: Tensor) -> Tensor:
    return offsets[:, :, None] * offsets[:, None, :]


def assert_distributed_as(truth: GaussianMixture, x: Tensor, discretisation: float) -> None:
    """Mean and covariance of x [B, d]; the weights, and every component's mean and covariance.

    The last by E[p(k | x) f(x)] = w_k E[f(x) | k]. Covariances may also be off by a factor of 1 ± `discretisation`.
    """
    assert_mean(x, truth.mean)
    assert_mean(squared(x - truth.mean), truth.covariance, discretisation * truth.covariance.abs().max())
    responsibilities = truth.responsibilities(x)
    assert_mean(responsibilities, truth.weights)
    for weight, mean, covariance, of in zip(
        truth.weights, truth.means, truth.covariances, responsibilities.T, strict=True
    ):
        assert_mean(of[:, None] * (x - mean), 0.0)
        beyond = discretisation * weight * covariance.abs().max()
        assert_mean(of[:, None, None] * squared(x - mean), weight * covariance, beyond)


# ---- the mixture ---------------------------------------------------------------------------------------------------


def test_density_integrates_to_one_and_to_the_moments():
    x, cell = grid(2)
    p = PLANE.log_prob(x).exp() * cell
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(p @ x, PLANE.mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(p @ PLANE.responsibilities(x), PLANE.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close((x * p[:, None]).T @ x - PLANE.mean.outer(PLANE.mean), PLANE.covariance)


def test_density_is_that_of_torchs_distributions():
    components = torch.distributions.MultivariateNormal(SPACE.means, SPACE.covariances)
    reference = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(SPACE.weights), components)
    x = normal(1, 50, 3)
    torch.testing.assert_close(SPACE.log_prob(x), reference.log_prob(x), rtol=1e-12, atol=1e-12)


def test_samples_have_the_density():
    """Moments and weights; and the entropy, which is E[−log p] only where samples and density agree."""
    x = PLANE.sample(50_000, seeded(0))
    assert_distributed_as(PLANE, x, discretisation=0.0)
    points, cell = grid(2)
    log_prob = PLANE.log_prob(points)
    assert_mean(PLANE.nll_bpd(x), -float((log_prob.exp() * log_prob).sum() * cell) / (2 * math.log(2)))
    assert torch.equal(PLANE.sample(10, seeded(1)), PLANE.sample(10, seeded(1)))


@pytest.mark.parametrize("t", [0, 50, 500, 999])
def test_the_marginal_is_the_mixture_of_the_noised_samples(t):
    """p(x_t) = ∫ p(x_0) q(x_t | x_0) dx_0: its density by quadrature, where the noise is wide enough, and draws."""
    marginal = PLANE.marginal(PAPER, t)
    x_t = PAPER.q_sample(PLANE.sample(20_000, seeded(2)), t, normal(3, 20_000, 2))
    assert_distributed_as(marginal, x_t, discretisation=0.0)
    if t > 0:
        x_start, cell = grid(2)
        q = PAPER.q_mean_variance(x_start, t)
        for point in x_t[:5]:
            noise = torch.exp(-0.5 * (point - q.mean).square().sum(dim=1) / q.variance) / (2 * math.pi * q.variance)
            p = float((noise * PLANE.log_prob(x_start).exp()).sum() * cell)
            assert math.exp(marginal.log_prob(point[None]).item()) == pytest.approx(p, rel=1e-10)


# ---- ε* ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [LINE, PLANE, SPACE], ids=["line", "plane", "space"])
def test_the_score_is_the_gradient_of_the_marginals_log_density(truth):
    """Through ε* and `GaussianDiffusion.score`, each sample at its own t; to rounding, times the score's size."""
    t = torch.tensor([0, 1, 7, 60, 250, 500, 800, 999]).repeat(4)
    x = PAPER.q_sample(truth.sample(len(t), seeded(4)), t, normal(5, len(t), truth.dim))
    x[:8] *= 3  # and where hardly any sample falls
    score = PAPER.score(OracleNetwork(truth, PAPER)(x, t).sample, t)
    for i in range(len(t)):
        x_t = x[i : i + 1].clone().requires_grad_()
        marginal = truth.marginal(PAPER, int(t[i]))
        (expected,) = torch.autograd.grad(marginal.log_prob(x_t).sum(), x_t)
        torch.testing.assert_close(score[i : i + 1], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(marginal.score(x_t.detach()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [50, 300, 999])
def test_x_start_through_eps_is_the_posterior_mean(t):
    """x̂_0 = E[x_0 | x_t] = ∫ x_0 p(x_0) q(x_t | x_0) dx_0 / p(x_t): what a perfectly trained network would give."""
    x_start, _ = grid(2)
    x_t = PAPER.q_sample(PLANE.sample(5, seeded(6)), t, normal(7, 5, 2))
    eps = OracleNetwork(PLANE, PAPER)(x_t, t).sample
    q = PAPER.q_mean_variance(x_start, t)
    distance = (x_t[:, None] - q.mean).square().sum(dim=2)
    posterior = (PLANE.log_prob(x_start) - 0.5 * distance / q.variance).softmax(dim=1)
    expected = posterior @ x_start
    # ε is multiplied by √(1/ᾱ_t − 1), up to 157, on the way to x̂_0
    torch.testing.assert_close(PAPER.predict_x_start(eps, x_t, t), expected, rtol=0, atol=1e-10)


def test_a_timestep_may_be_an_int_or_a_tensor():
    network, x = OracleNetwork(PLANE, PAPER), normal(8, 3, 2)
    expected = network(x, 30).sample
    assert expected.dtype == torch.float64
    for t in (torch.tensor(30), torch.tensor([30, 30, 30])):
        torch.testing.assert_close(network(x, t).sample, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rescale", [False, True], ids=["paper", "zero snr"])
def test_between_timesteps_alpha_falls_at_a_constant_rate(rescale):
    betas = rescale_zero_terminal_snr(PAPER.betas) if rescale else PAPER.betas
    process = GaussianDiffusion(betas, "v_prediction")
    whole = torch.arange(1000)
    assert torch.equal(alphas_cumprod_at(process, whole), torch.tensor(process.alphas_cumprod))  # the table's bits
    fine = alphas_cumprod_at(process, torch.linspace(0, 999, 3 * 999 + 1, dtype=torch.float64))
    assert (fine.diff() < 0).all()
    halves = alphas_cumprod_at(process, whole[:-2] + 0.5)
    expected = np.sqrt(process.alphas_cumprod[:-2] * process.alphas_cumprod[1:-1])
    np.testing.assert_allclose(halves, expected, rtol=1e-12)
    for t in (-0.1, 999.1, math.nan, torch.tensor([0.0, 1000.0])):
        with pytest.raises(ValueError, match=r"leaves \[0, 999\]"):
            alphas_cumprod_at(process, t)


def test_eps_between_timesteps_is_that_of_the_level_between():
    """At whole times the same bits, whichever type they have; in between it is continuous."""
    network, x = OracleNetwork(PLANE, PAPER), normal(8, 4, 2)
    t = torch.tensor([0, 30, 500, 999])
    expected = network(x, t).sample
    for times in (t.float(), t.double()):
        assert torch.equal(network(x, times).sample, expected)
        near = times + torch.tensor([1.0, 1.0, 1.0, -1.0]) * 1e-4
        torch.testing.assert_close(network(x, near).sample, expected, rtol=0, atol=1e-3)
    assert torch.equal(network(x, 30.0).sample, network(x, 30).sample)
    level = float(alphas_cumprod_at(PAPER, 0.5))
    one = GaussianDiffusion(np.array([1 - level]))  # whose only level is the one in between
    torch.testing.assert_close(network(x, 0.5).sample, OracleNetwork(PLANE, one)(x, 0).sample, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"leaves \[0, 999\]"):
        network(x, 999.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete"),
        *("KDPM2AncestralDiscrete", "DPMSolverSDE"),
    ],
)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_solvers_that_ask_in_between_reach_the_data(name, spacing):
    """Their mean is the data's to chance and a little more, their spread what 20 steps make of it."""
    truth = mixture([1.0], [[0.3]], [[[0.04]]])
    scheduler: Any = DDPMPaperScheduler(clip_sample=False, timestep_spacing=spacing)
    network: Any = OracleNetwork(truth, scheduler.diffusion)
    other = getattr(diffusers, name + "Scheduler").from_config(scheduler.config)
    pipe: Any = DDPMPaperPipeline(network, other)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # DPMSolverSDE draws noise of its own
    x = pipe(2000, generator=seeded(9), num_inference_steps=20, output_type="latent").images.double()
    assert float(x.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(x.std()) == pytest.approx(0.2, abs=0.1)


# ---- Algorithm 2 ---------------------------------------------------------------------------------------------------


def sampled(truth: GaussianMixture, num: int, **config) -> Tensor:
    """x_0 of `num` chains of the paper's process with the truth's ε*, without clipping, as the pipeline draws them."""
    scheduler = DDPMPaperScheduler(clip_sample=False, **config)
    network: Any = OracleNetwork(truth, scheduler.diffusion)
    pipe: Any = DDPMPaperPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(num, generator=seeded(9), output_type="latent").images.double()


@pytest.mark.parametrize(
    "variance_type",
    [pytest.param("fixed_small", marks=pytest.mark.integration), pytest.param("fixed_large", marks=pytest.mark.slow)],
)
def test_algorithm_2_samples_the_mixture(variance_type):
    """Beyond chance: a step's variance is off by O(β_t), and the last step adds none.

    By a recursion as in the test below, that changes variances of 0.02 to 0.06, as most components have, by −5% to −3%
    with fixed_small and by about +1% with fixed_large.
    """
    assert_distributed_as(PLANE, sampled(PLANE, 5000, variance_type=variance_type), discretisation=0.05)


@pytest.mark.slow
def test_noise_while_denoising_keeps_the_spread_of_the_data():
    """Data N(0, I), where ε* and so each step is linear: x ← a_t x + σ_t z, and the variance obeys v ← a_t² v + σ_t².

    fixed_large keeps v = 1 exactly up to the last step, which adds no noise: σ = √(1 − β_1) = 0.99995. fixed_small
    falls a little short, σ = 0.9955. Without z nothing but the factors a_t = √α_t is left: √ᾱ_T = 0.00635.
    """
    deviation = {}
    for variance_type in ("fixed_small", "fixed_large"):
        scheduler: Any = DDPMPaperScheduler(variance_type=variance_type, clip_sample=False)
        network = OracleNetwork(STANDARD, scheduler.diffusion)
        zero, one = torch.zeros(1, 8, dtype=torch.float64), torch.ones(1, 8, dtype=torch.float64)
        x_T = x = normal(10, 100, 8)
        variance, factor = 1.0, 1.0
        for t in scheduler.timesteps.tolist():
            eps = network(torch.cat([one, zero, x]), t).sample
            a = scheduler.step(eps[:1], t, one, variance_noise=zero).prev_sample[0, 0].item()
            sigma = scheduler.step(eps[1:2], t, zero, variance_noise=one).prev_sample[0, 0].item()
            x = scheduler.step(eps[2:], t, x, variance_noise=torch.zeros_like(x)).prev_sample
            variance, factor = a**2 * variance + sigma**2, factor * a
        deviation[variance_type] = math.sqrt(variance)
        assert factor == pytest.approx(scheduler.diffusion.sqrt_alphas_cumprod[-1], rel=1e-9)
        assert factor == pytest.approx(0.00635, abs=5e-6)
        torch.testing.assert_close(x, factor * x_T)  # sampling without z, to rounding: a collapse
    assert deviation["fixed_large"] == pytest.approx(math.sqrt(1 - 1e-4), rel=1e-9)
    assert deviation["fixed_small"] == pytest.approx(0.9955, abs=5e-5)

    # Drawn with the same noise, the two differ as the recursion says: SE of their ratio is below 1e-4.
    drawn = {name: sampled(STANDARD, 2000, variance_type=name) for name in deviation}
    for name, x in drawn.items():
        assert x.std().item() == pytest.approx(deviation[name], abs=5 / math.sqrt(2 * x.numel()))
    ratio = (drawn["fixed_small"].std() / drawn["fixed_large"].std()).item()
    assert ratio == pytest.approx(deviation["fixed_small"] / deviation["fixed_large"], abs=5e-4)


# ---- Langevin dynamics ---------------------------------------------------------------------------------------------


def langevin_levels(num: int) -> GaussianDiffusion:
    """At most `num` levels, dense where the noise is small and the dynamics are slow."""
    return PAPER.respaced(np.unique(np.round(999 * np.linspace(0, 1, num) ** 3).astype(np.int64)))


LEVELS = langevin_levels(50)


def langevin(
    truth: GaussianMixture, num: int, seed: int = 12, levels: GaussianDiffusion = LEVELS, num_steps: int = 20
) -> Tensor:
    network, generator = OracleNetwork(truth, PAPER), seeded(seed)
    return annealed_langevin(
        lambda x, t: PAPER.score(network(x, t).sample, t),
        torch.randn(num, truth.dim, generator=generator, dtype=torch.float64),
        diffusion=levels,
        num_steps=num_steps,
        step_size=1.0,
        generator=generator,
    )


@pytest.mark.parametrize(("num_levels", "num_steps"), [(50, 20), (20, 1)])  # the second is far from its limit
def test_annealed_langevin_of_a_gaussian_is_its_exact_recursion(num_levels, num_steps):
    """Data N(m, s²): x ← (1 − η/2V) x + (η/2V) √ᾱ m + √η z with V = ᾱ s² + 1 − ᾱ, then x/√(ᾱ_t/ᾱ_{t−1})."""
    mean, variance, levels = 0.5, 0.04, langevin_levels(num_levels)
    mean_x, variance_x = 0.0, 1.0
    for i in reversed(range(levels.num_timesteps)):
        alpha_cumprod = float(PAPER.alphas_cumprod[levels.timesteps[i]])
        before = float(PAPER.alphas_cumprod[levels.timesteps[i - 1]]) if i else 1.0
        eta, marginal_variance = 1 - alpha_cumprod, alpha_cumprod * variance + 1 - alpha_cumprod
        for _ in range(num_steps):
            mean_x += 0.5 * eta / marginal_variance * (math.sqrt(alpha_cumprod) * mean - mean_x)
            variance_x = (1 - 0.5 * eta / marginal_variance) ** 2 * variance_x + eta
        mean_x, variance_x = mean_x * math.sqrt(before / alpha_cumprod), variance_x * before / alpha_cumprod
    x = langevin(mixture([1.0], [[mean]], [[[variance]]]), 10_000, levels=levels, num_steps=num_steps)
    assert_mean(x, mean_x)
    assert_mean((x - mean_x).square(), variance_x)
    if num_levels == 50:  # what is left of the way to p(x_0), no matter how many chains are drawn
        assert mean_x == pytest.approx(mean, rel=1e-6) and variance_x == pytest.approx(variance, rel=0.04)


def test_annealed_langevin_by_its_recursion_leaves_variances_3_to_4_percent_too_large():
    """Of the components of PLANE, in 920 steps; docs/oracle.md says so."""
    num_steps, too_large = 20, []
    for variance in torch.linalg.eigvalsh(PLANE.covariances).flatten().tolist():
        variance_x = 1.0
        for i in reversed(range(LEVELS.num_timesteps)):
            alpha_cumprod = float(PAPER.alphas_cumprod[LEVELS.timesteps[i]])
            before = float(PAPER.alphas_cumprod[LEVELS.timesteps[i - 1]]) if i else 1.0
            eta, marginal_variance = 1 - alpha_cumprod, alpha_cumprod * variance + 1 - alpha_cumprod
            for _ in range(num_steps):
                variance_x = (1 - 0.5 * eta / marginal_variance) ** 2 * variance_x + eta
            variance_x *= before / alpha_cumprod
        too_large.append(round(100 * (variance_x / variance - 1)))
    assert LEVELS.num_timesteps * num_steps == 920 and set(too_large) == {3, 4}


@pytest.mark.slow
def test_annealed_langevin_samples_the_mixture():
    """Beyond chance: the variance of each component comes out 3% to 4% too large, by the recursion above."""
    assert_distributed_as(PLANE, langevin(PLANE, 5000), discretisation=0.05)
    assert torch.equal(langevin(LINE, 2), langevin(LINE, 2)) and not torch.equal(
        langevin(LINE, 2), langevin(LINE, 2, 13)
    )


# ---- the bound -----------------------------------------------------------------------------------------------------


def continuous(num_timesteps: int, **config) -> DDPMPaperScheduler:
    """The paper's process in other numbers of steps: a discretisation of one β(u), u = t/T, with the same ᾱ_T."""
    betas = {"beta_start": 0.1 / num_timesteps, "beta_end": 20 / num_timesteps}
    return DDPMPaperScheduler(num_timesteps, **betas, clip_sample=False, **config)


def x_start_mse(truth: GaussianMixture, diffusion: GaussianDiffusion) -> np.ndarray:
    """E (x_0 − E[x_0 | x_t])² = E x_0² − E x̂_0² at every t, for a mixture on the line, by quadrature: [T]."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]  # fifty cells to a σ of 0.2
    network, cell = OracleNetwork(truth, diffusion), float(x[1] - x[0])
    explained = []
    for t in range(diffusion.num_timesteps):
        x_start = diffusion.predict_x_start(network(x, t).sample, x, t)[:, 0]
        explained.append(float((truth.marginal(diffusion, t).log_prob(x).exp() * x_start.square()).sum() * cell))
    return float(truth.covariance + truth.mean**2) - np.array(explained)


def entropy_bits(truth: GaussianMixture) -> float:
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    log_prob = truth.log_prob(x)
    return -float((log_prob.exp() * log_prob).sum() * (x[1] - x[0])) / math.log(2)


def expected_terms_bits(
    diffusion: GaussianDiffusion, mse: np.ndarray, second_moment: float, variance_type: str
) -> np.ndarray:
    """E of L_0, …, L_{T−1}, L_T with ε*, in bits: [T + 1]. All are linear in the squares that `mse` [T] averages."""
    beta_tilde = diffusion.posterior_variance
    true_variance = beta_tilde + diffusion.posterior_mean_coef1**2 * mse  # of x_{t−1} given x_t, on average
    log_variance = {
        "fitted": np.log(true_variance),
        "fixed_small": diffusion.posterior_log_variance_clipped,
        "fixed_large": np.log(np.append(beta_tilde[1], diffusion.betas[1:])),
    }[variance_type]
    nats = np.empty(diffusion.num_timesteps + 1)
    nats[0] = 0.5 * (math.log(2 * math.pi) + log_variance[0] + mse[0] / math.exp(log_variance[0]))
    ratio = true_variance[1:] / np.exp(log_variance[1:])
    nats[1:-1] = 0.5 * (log_variance[1:] - np.log(beta_tilde[1:]) + ratio - 1)
    alpha_cumprod = diffusion.alphas_cumprod[-1]
    nats[-1] = 0.5 * (alpha_cumprod * second_moment - alpha_cumprod - math.log(1 - alpha_cumprod))
    return nats / math.log(2)


def expected_terms_of_a_line(truth: GaussianMixture, num_timesteps: int, variance_type: str) -> np.ndarray:
    diffusion = continuous(num_timesteps).diffusion
    second_moment = float(truth.covariance + truth.mean**2)
    return expected_terms_bits(diffusion, x_start_mse(truth, diffusion), second_moment, variance_type)


@pytest.mark.slow
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "fitted"])
def test_the_bound_is_its_expectation_and_above_the_nll(variance_type):
    config = {}
    if variance_type == "fitted":
        config["x_start_mse"] = x_start_mse(LINE, continuous(25).diffusion).tolist()
    scheduler = continuous(25, variance_type=variance_type, **config)
    x = LINE.sample(2000, seeded(14))
    network = OracleNetwork(LINE, scheduler.diffusion)
    bound = bits_per_dim(network, scheduler, x, seed=0, clip_denoised=False, num_levels=None)
    expected = expected_terms_of_a_line(LINE, 25, variance_type)
    assert_mean(bound.terms_bt, torch.from_numpy(expected[:-1]))
    assert_mean(bound.prior_b, expected[-1])
    torch.testing.assert_close(bound.total_b, bound.prior_b + bound.terms_bt.sum(dim=1))
    gap_b = bound.total_b - LINE.nll_bpd(x)  # on the same samples
    assert_mean(gap_b, expected.sum() - entropy_bits(LINE))
    assert gap_b.mean() > 0 and expected.sum() > entropy_bits(LINE)


def test_the_bound_approaches_the_nll_as_one_over_T():
    """With the variances that fit ε*, the gap halves as T doubles: a step's is O(T⁻²), for its shape alone is off.

    For one Gaussian the shape is right too, and all that is left, at any T, is KL(p(x_T) ‖ N(0, 1)).
    """
    entropy = entropy_bits(LINE)
    gaps = [expected_terms_of_a_line(LINE, num, "fitted").sum() - entropy for num in (50, 100, 200, 400)]
    assert all(gap > 0 for gap in gaps) and gaps[-1] < 0.009
    assert [a / b for a, b in zip(gaps, gaps[1:], strict=False)] == pytest.approx([2, 2, 2], rel=0.01)

    mean, variance = 0.7, 0.25
    gaussian = mixture([1.0], [[mean]], [[[variance]]])
    for num in (25, 50):
        alpha_cumprod = continuous(num).diffusion.alphas_cumprod[-1]
        v = alpha_cumprod * variance + 1 - alpha_cumprod
        kl_bits = 0.5 * (v + alpha_cumprod * mean**2 - 1 - math.log(v)) / math.log(2)
        bound = expected_terms_of_a_line(gaussian, num, "fitted").sum()
        assert bound - entropy_bits(gaussian) == pytest.approx(kl_bits, abs=1e-9)


def test_what_the_papers_variances_cost_against_the_nll():
    """Of data with a density, here N(0, ½²): what stays however large T is. (mse_t is that of a Gaussian.)

    Both have σ² = β̃[1], half of the true variance β_1, at t = 0: ½ (1 − ln 2) nats, 0.221 bits/dim. Elsewhere
    fixed_large is right up to O(β_t), which sums to O(1/T). fixed_small is, at the t-th step, t/(t+1) of the truth
    whatever T: Σ ½ (1/t − ln(1 + 1/t)) = ½ γ nats with Euler's γ, 0.416 bits/dim, stays as well.
    """
    at_zero, rest = {}, {}
    for num in (10_000, 100_000):
        diffusion = continuous(num).diffusion
        a = diffusion.alphas_cumprod
        terms = {
            name: expected_terms_bits(diffusion, 0.25 * (1 - a) / (1 - 0.75 * a), 0.25, name)
            for name in ("fitted", "fixed_large", "fixed_small")
        }
        for name in ("fixed_large", "fixed_small"):
            excess = terms[name] - terms["fitted"]
            at_zero[name, num], rest[name, num] = excess[0], excess[1:].sum()
    assert at_zero["fixed_large", 100_000] == at_zero["fixed_small", 100_000]
    assert at_zero["fixed_large", 100_000] == pytest.approx(0.5 * (1 - math.log(2)) / math.log(2), abs=1e-3)
    assert rest["fixed_large", 10_000] / rest["fixed_large", 100_000] == pytest.approx(10, rel=0.01)
    assert rest["fixed_large", 10_000] < 2e-4
    assert rest["fixed_small", 100_000] == pytest.approx(0.5 * np.euler_gamma / math.log(2), abs=6e-3)


# ---- the three terms are one bound ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_the_three_terms_are_the_ratio_over_the_whole_chain(tiny_scheduler, tiny_mlp, variance_type):
    """E −log p_θ(x_{0:T}) / q(x_{1:T} | x_0) (Eq. 3) is E [L_T + Σ L_{t−1} + L_0] (Eq. 5), on the same chains.

    Holds for any network, so for one that knows nothing as for ε*.
    """
    diffusion, num = tiny_scheduler(variance_type=variance_type).diffusion, 20_000
    total = diffusion.num_timesteps
    chain = [PLANE.sample(num, seeded(15))]
    for t, beta in enumerate(diffusion.betas):  # q(x_t | x_{t−1}), Eq. 2
        chain.append(math.sqrt(1 - beta) * chain[-1] + math.sqrt(beta) * normal(16 + t, num, 2))

    def log_normal(x: Tensor, mean: Tensor, variance: float) -> Tensor:
        return -0.5 * ((x - mean).square() / variance + math.log(2 * math.pi * variance)).sum(dim=1)

    for network in (OracleNetwork(PLANE, diffusion), tiny_mlp().double()):
        ratio = -log_normal(chain[-1], torch.zeros(()), 1.0)
        terms = 2 * math.log(2) * prior_bpd(diffusion, chain[0])
        for t in range(total):
            x_previous, x_t, beta = chain[t], chain[t + 1], diffusion.betas[t]
            with torch.no_grad():
                eps = network(x_t, torch.full((num,), t)).sample.double()
            mean = (x_t - beta / math.sqrt(1 - diffusion.alphas_cumprod[t]) * eps) / math.sqrt(1 - beta)
            variance = beta if variance_type == "fixed_large" else diffusion.posterior_variance[t]
            variance = variance if t else diffusion.posterior_variance[1]  # the decoder's, as in the paper's code
            ratio -= log_normal(x_previous, mean, variance)
            ratio += log_normal(x_t, math.sqrt(1 - beta) * x_previous, beta)
            at = torch.full((num,), t)
            term = vb_terms_bpd(diffusion, eps, chain[0], x_t, at, clip_denoised=False, num_levels=None)
            terms += 2 * math.log(2) * term
        assert_mean(ratio - terms, 0.0)
        assert 5 * (ratio - terms).std() / math.sqrt(num) < 0.3  # nats, of 3 to 30: the comparison can tell something


# ---- what is refused, and the document -----------------------------------------------------------------------------

GOOD = {"weights": [0.5, 0.5], "means": [[0.0, 0.0], [1.0, 1.0]], "covariances": [np.eye(2).tolist()] * 2}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": [0.5, 0.6]}, "weights must be positive and sum to 1"),
        ({"weights": [1.5, -0.5]}, "weights must be positive and sum to 1"),
        ({"weights": [1.0]}, r"got weights \(1,\)"),
        ({"means": [0.0, 1.0]}, r"got weights \(2,\), means \(2,\)"),
        ({"means": [[0.0], [1.0]]}, "shapes must be"),
        ({"means": [[0.0, math.nan], [1.0, 1.0]]}, "means must be finite"),
        ({"covariances": [[[1.0, 0.5], [0.0, 1.0]]] * 2}, "symmetric and positive definite"),
        ({"covariances": [[[1.0, 1.0], [1.0, 1.0]]] * 2}, "symmetric and positive definite"),
        ({"covariances": [[[-1.0, 0.0], [0.0, 1.0]]] * 2}, "symmetric and positive definite"),
    ],
)
def test_what_is_no_mixture_is_refused(changed, message):
    mixture(**GOOD)
    with pytest.raises(ValueError, match=message):
        mixture(**{**GOOD, **changed})


def test_impossible_arguments_are_refused():
    for x in (torch.zeros(3, 1), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"this mixture expects \[B, 2\]"):
            PLANE.log_prob(x)
    network = OracleNetwork(PLANE, PAPER)
    for t in (-1, 1000, torch.tensor([5, 1000])):
        with pytest.raises(ValueError, match="t="):
            network(torch.zeros(2, 2), t)
    with pytest.raises(ValueError, match="not respaced"):
        OracleNetwork(PLANE, LEVELS)
    for changed in ({"num_steps": 0}, {"step_size": 0.0}, {"step_size": 4.0}):
        arguments: dict = {"num_steps": 1, "step_size": 1.0, **changed}
        with pytest.raises(ValueError, match=next(iter(changed))):
            annealed_langevin(lambda x, t: x, torch.zeros(1, 2), diffusion=LEVELS, generator=seeded(0), **arguments)


@pytest.mark.docs
def test_the_document_prints_what_it_says():
    """Word for word, its numbers within one unit in their last place: kernels may round otherwise elsewhere."""
    found = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    code, printed = found.groups()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, str(DOCUMENT), "exec"), {})
    number = r"-?\d+(?:\.\d+)?"
    actual = output.getvalue()
    assert re.sub(number, "#", actual) == re.sub(number, "#", printed)
    for ours, theirs in zip(re.findall(number, actual), re.findall(number, printed), strict=True):
        unit = 10.0 ** -len(theirs.partition(".")[2])
        assert float(ours) == pytest.approx(float(theirs), abs=1.01 * unit)
