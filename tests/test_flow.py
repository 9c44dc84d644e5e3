"""The flow against what is known of it: Gaussians in closed form, mixtures by the marginals that it must carry over.

The flow of ε* carries p(x_0) at the first timestep to p(x_T), so that log p_0(x) − log p_T(x_T) is its logarithm of
volumes for every x. p(x_T) is N(0, I) only to about √ᾱ_T: where the prior enters, it is that of the flow, N(0, I).
"""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddpm_hf import DDPMPaperScheduler
from ddpm_hf.flow import Flow, decode, encode, flow_bits_per_dim
from ddpm_hf.oracle import GaussianMixture, OracleNetwork
from ddpm_hf.scheduler import alphas_cumprod_at, timestep_at

TIGHT = 1e-9


def mixture(weights: list, means: list, covariances: list, labels: Any = None) -> GaussianMixture:
    return GaussianMixture(
        *(torch.tensor(part, dtype=torch.float64) for part in (weights, means, covariances)), labels
    )


PLANE = mixture(  # three tilted ellipses
    [0.5, 0.3, 0.2],
    [[-0.6, -0.3], [0.5, 0.6], [0.6, -0.5]],
    [[[0.04, 0.02], [0.02, 0.03]], [[0.02, 0.0], [0.0, 0.06]], [[0.03, -0.02], [-0.02, 0.03]]],
    torch.tensor([0, 1, 1]),
)
DEVIATIONS = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
CENTRED = mixture([1.0], [[0.0] * 3], [DEVIATIONS.square().diag().tolist()])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def oracle(truth: GaussianMixture, **config: Any) -> tuple[OracleNetwork, DDPMPaperScheduler]:
    scheduler = DDPMPaperScheduler(clip_sample=False, **config)
    return OracleNetwork(truth, scheduler.diffusion), scheduler


def density_nats(model: tuple[Any, Any], x: Tensor, **options: Any) -> Tensor:
    """log p_φ(x), [B]."""
    bits = flow_bits_per_dim(*model, x, seed=0, num_levels=None, **options)
    return -bits.total_b * x[0].numel() * math.log(2)


def standard_nats(x: Tensor) -> Tensor:
    return -0.5 * (x.square() + math.log(2 * math.pi)).sum(dim=1)


# ---- densities -----------------------------------------------------------------------------------------------------


def scales(diffusion: Any) -> Tensor:
    """By how much the flow of CENTRED multiplies each coordinate: its deviations at the ends are those of x_t."""
    signal, noise = diffusion.alphas_cumprod[[0, -1], None], 1 - diffusion.alphas_cumprod[[0, -1], None]
    variances = torch.from_numpy(signal) * DEVIATIONS.square() + torch.from_numpy(noise)
    return (variances[1] / variances[0]).sqrt()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "jsd"])
def test_gaussian_data_have_their_density(schedule):
    """Each coordinate is multiplied by a known number; the density is that of the data at the first timestep."""
    config = {"num_train_timesteps": 50, "trained_betas": None} if schedule == "jsd" else {}
    model: Any = oracle(CENTRED, beta_schedule=schedule, **config)
    if schedule == "jsd":  # ᾱ_T = 0: no flow of ε, and one of v
        with pytest.raises(ValueError, match="ᾱ is 0 at the last timestep"):
            density_nats(model, CENTRED.sample(2, seeded(0)))
        model = velocity_of(model[0]), DDPMPaperScheduler(50, beta_schedule="jsd", prediction_type="v_prediction")
    diffusion = model[1].diffusion
    x = CENTRED.sample(10, seeded(0))
    factors = scales(diffusion)
    expected = standard_nats(x * factors) + factors.log().sum()
    torch.testing.assert_close(density_nats(model, x, tolerance=TIGHT), expected, rtol=0, atol=2e-7)
    torch.testing.assert_close(density_nats(model, x), expected, rtol=0, atol=5e-3)
    if schedule == "linear":  # where x_T is standard Gaussian enough, that of the data themselves
        torch.testing.assert_close(expected, CENTRED.marginal(diffusion, 0).log_prob(x), rtol=0, atol=1e-3)


def velocity_of(network: OracleNetwork) -> Any:
    """ε* as v, for real t; at ᾱ = 0, v = −x̂_0 is minus the mean of the data."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        alpha = alphas_cumprod_at(network.diffusion, t.double()).view(-1, 1)
        variances = alpha * DEVIATIONS.square() + 1 - alpha
        return x.double() * (alpha * (1 - alpha)).sqrt() * (1 - DEVIATIONS.square()) / variances

    return velocity


@pytest.mark.slow
@pytest.mark.parametrize("label", [None, 1])
def test_mixtures_have_their_density(label):
    """The logarithm of volumes is log p_0(x) − log p_T(x_T) for every sample; given a label that of the label."""
    network, scheduler = oracle(PLANE)
    truth = PLANE if label is None else PLANE.given(label)
    x = truth.sample(40, seeded(1))
    x_T = encode(network, scheduler, x, tolerance=TIGHT, class_labels=label)
    ends = [truth.marginal(scheduler.diffusion, t).log_prob(at) for t, at in ((0, x), (999, x_T))]
    expected = ends[0] - ends[1] + standard_nats(x_T)
    found = density_nats((network, scheduler), x, tolerance=TIGHT, class_labels=label)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_density_is_exact_to_a_thousandth():
    """In bits/dim, of the data at the first timestep: in the mean at the default tolerance, and each at a tighter one.

    log N(x_T) − log p_T(x_T), which is of the order of √ᾱ_T, does not count in the mean.
    """
    network, scheduler = oracle(PLANE)
    x = PLANE.sample(400, seeded(2))
    bits = flow_bits_per_dim(network, scheduler, x, seed=0, num_levels=None, batch_size=400)
    exact = PLANE.marginal(scheduler.diffusion, 0).nll_bpd(x)
    assert abs((bits.total_b - exact).mean()) < 1e-3
    tight = flow_bits_per_dim(network, scheduler, x, seed=0, num_levels=None, batch_size=400, tolerance=1e-6)
    assert abs((tight.total_b - exact).mean()) < 1e-4 and (tight.total_b - exact).abs().max() < 5e-3
    assert (bits.error_b == 0).all() and (bits.num_evaluations_b > 10).all()
    torch.testing.assert_close(bits.prior_b + bits.contraction_b, bits.total_b)


def smooth(x: Tensor, t: Tensor) -> Tensor:
    """Some network of v."""
    return torch.tanh(2 * x) * (0.5 + t.view(-1, *(1,) * (x.ndim - 1)) / 2000) - 0.2


VELOCITY = DDPMPaperScheduler(prediction_type="v_prediction")


def test_the_density_integrates_to_one():
    """On a grid, in 1-D: whatever the network is."""
    x = torch.linspace(-8, 8, 801, dtype=torch.float64)[:, None]
    p = density_nats((smooth, VELOCITY), x, tolerance=1e-6, batch_size=801).exp()
    assert float(p.sum() * (x[1] - x[0])) == pytest.approx(1, abs=1e-5)


# ---- the divergence ------------------------------------------------------------------------------------------------


def test_probes_estimate_the_exact_divergence(tiny_mlp):
    """Their mean over many is the divergence within 5 standard errors, and their errors are of the right size."""
    unet = tiny_mlp().double()
    x = normal(3, 1, 2).expand(20_000, 2)
    flow, angle = Flow(unet, DDPMPaperScheduler()), 0.7
    _, exact = flow.velocity_and_divergence(x[:1], angle, None)
    signs = torch.randint(2, (1, *x.shape), generator=seeded(4)).double() * 2 - 1
    velocity, estimates = flow.velocity_and_divergence(x, angle, signs)
    assert torch.equal(velocity[0], flow.velocity(x, angle)[0].detach())
    error = estimates.std() / math.sqrt(len(estimates))
    assert 0 < error and abs(estimates.mean() - exact.item()) < 5 * error
    jacobian = torch.func.jacrev(lambda y: flow.velocity(y[None], angle)[0])(x[0])
    assert exact.item() == pytest.approx(jacobian.trace().item(), rel=1e-12)


def test_hutchinsons_estimate_is_the_density_within_its_error():
    """Over 30 probes; the error is that of the mean, and one number has none."""
    model = oracle(PLANE)
    x = PLANE.sample(20, seeded(5))
    exact = flow_bits_per_dim(*model, x, seed=0, num_levels=None)
    estimate = flow_bits_per_dim(*model, x, seed=0, num_levels=None, num_probes=30)
    scores = (estimate.total_b - exact.total_b) / estimate.error_b
    assert scores.abs().max() < 5 and 0.5 < scores.square().mean().sqrt() < 1.8
    one = flow_bits_per_dim(*model, x, seed=0, num_levels=None, num_probes=1)
    assert one.error_b.isnan().all() and one.total_b.isfinite().all()


def test_many_dimensions_get_probes():
    """Of 20, with a Jacobian that is not diagonal: two by default, whose error is shown; 0 asks for the exact one."""
    weights = 0.2 * normal(6, 20, 20).float()

    def mixing(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ weights).view_as(x)

    x, calls = normal(7, 3, 1, 4, 5).clamp(-1, 1), []
    options: Any = {"seed": 1, "tolerance": 1e-3}
    bits = flow_bits_per_dim(mixing, VELOCITY, x, on_progress=calls.append, **options)
    assert (bits.error_b > 0).all() and sum(calls) == 3 * bits.num_evaluations_b[0]
    exact = flow_bits_per_dim(mixing, VELOCITY, x, num_probes=0, **options)
    assert exact.error_b.isnan().all()  # one dequantization
    many = flow_bits_per_dim(mixing, VELOCITY, x, num_probes=30, **options)
    assert torch.equal(bits.num_evaluations_b, flow_bits_per_dim(mixing, VELOCITY, x, num_probes=2, **options)[-1])
    assert ((many.total_b - exact.total_b).abs() < 5 * many.error_b + 1e-3).all()
    assert (many.error_b < bits.error_b.max()).all() and (many.error_b > 0).all()


# ---- dequantization ------------------------------------------------------------------------------------------------


def test_dequantization_bounds_the_probability_of_bins():
    """In 1-D, with levels at −1, 0 and 1: the mean over u is above −log₂ of the integral over the bin, by Jensen."""
    truth = mixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.02]], [[0.04]]])
    model = oracle(truth)
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat_interleave(300, dim=0)
    bits = flow_bits_per_dim(*model, x, seed=0, num_levels=3, num_dequantizations=2, batch_size=600)
    assert (bits.error_b > 0).all()
    grid = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)[:, None]
    for level, found in zip((-1.0, 1.0), bits.total_b.split(300), strict=True):
        log_p = truth.marginal(model[1].diffusion, 0).log_prob(level + grid)
        middle = (log_p[1:] + log_p[:-1]) / 2
        probability, mean = middle.exp().mean(), middle.mean()  # bins are 1 wide
        error = float(found.std() / math.sqrt(300))
        assert -math.log2(probability) < found.mean() - 5 * error
        assert abs(found.mean() + mean / math.log(2)) < 5 * error + 1e-2  # log N(x_T) − log p_T(x_T)


def test_a_bin_of_256_levels_is_1_of_127_5_wide():
    """On [0, 255] bins are 1 wide, so that the change of scale of x = y/127.5 − 1 is all that is added."""
    model = oracle(PLANE)
    x = torch.zeros(3, 2, dtype=torch.float64)
    bits = flow_bits_per_dim(*model, x, seed=0, num_levels=256)
    torch.testing.assert_close(
        bits.total_b - bits.prior_b - bits.contraction_b, torch.full((3,), math.log2(127.5)).double()
    )
    points = density_nats(model, x)
    assert (bits.total_b - math.log2(127.5) + points / (2 * math.log(2))).abs().max() < 0.05  # bins are narrow


# ---- latents -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"tolerance": 1e-8}, {"num_steps": 200}, {"num_steps": 800, "order": 1}], ids=str)
def test_gaussian_data_are_multiplied_by_known_numbers(options):
    network, scheduler = oracle(CENTRED)
    x = CENTRED.sample(50, seeded(7))
    latents = encode(network, scheduler, x, **options)
    exact = 2e-2 if "num_steps" in options else 1e-6
    torch.testing.assert_close(latents, x * scales(scheduler.diffusion), rtol=exact, atol=exact)
    torch.testing.assert_close(decode(network, scheduler, latents, **options), x, rtol=exact, atol=exact)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "least"), [(1, 0.8), (2, 1.7)])
def test_steps_converge_with_their_order(order, least):
    """Where the number of steps is doubled, the error is divided by 2^order, nearly."""
    network, scheduler = oracle(PLANE)
    x = PLANE.sample(10, seeded(8))
    truth = encode(network, scheduler, x, tolerance=TIGHT)
    coarse, fine = (
        (encode(network, scheduler, x, num_steps=n, order=order) - truth).square().mean().sqrt() for n in (200, 400)
    )
    assert least < math.log2(coarse / fine) < order + 0.5


def test_what_is_encoded_is_decoded(tiny_unet):
    """By a network of images in float32."""
    unet, scheduler = tame(tiny_unet()), DDPMPaperScheduler(prediction_type="v_prediction")
    x, errors = normal(9, 2, 3, 8, 8), []
    for tolerance in (1e-1, 1e-4):
        latents = encode(unet, scheduler, x, tolerance=tolerance)
        assert latents.dtype == torch.float64 and not latents.requires_grad
        errors.append((decode(unet, scheduler, latents, tolerance=tolerance) - x).abs().max())
    assert errors[1] < 2e-3 and errors[1] < errors[0]


def tame(unet: Any) -> Any:
    """With outputs so small that the flow of a random network is not wild."""
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.01)
    return unet


def test_latents_of_a_mixture_follow_its_last_marginal():
    """p(x_T), of which the flow's prior N(0, I) is the limit: moments within 5 standard errors."""
    network, scheduler = oracle(PLANE)
    latents = encode(network, scheduler, PLANE.sample(4000, seeded(10)), batch_size=4000, tolerance=1e-3)
    truth = PLANE.marginal(scheduler.diffusion, 999)
    assert ((latents.mean(dim=0) - truth.mean).abs() < 5 * latents.std(dim=0) / math.sqrt(4000)).all()
    torch.testing.assert_close(latents.T.cov(), truth.covariance, rtol=0, atol=5 * math.sqrt(2 / 4000))


# ---- any network ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_other_predictions_have_the_same_flow(prediction_type):
    """The same knowledge as x̂_0 or as v."""
    network, scheduler = oracle(PLANE)

    def other(x: Tensor, t: Tensor) -> Tensor:
        eps = network(x, t).sample
        signal = alphas_cumprod_at(scheduler.diffusion, t).sqrt()[:, None]
        sigma = (1 - signal**2).sqrt()
        x_start = (x - sigma * eps) / signal
        return x_start if prediction_type == "sample" else signal * eps - sigma * x_start

    other.dtype = torch.float64  # type: ignore[attr-defined]
    x = PLANE.sample(20, seeded(11))
    process = DDPMPaperScheduler(prediction_type=prediction_type)
    expected = density_nats((network, scheduler), x, tolerance=1e-7)
    torch.testing.assert_close(density_nats((other, process), x, tolerance=1e-7), expected, rtol=0, atol=1e-5)


def test_learned_variances_do_not_count():
    network, scheduler = oracle(PLANE)

    def doubled(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([network(x, t).sample, 7 * x.double()], dim=1)

    doubled.dtype = torch.float64  # type: ignore[attr-defined]
    x = PLANE.sample(5, seeded(12))
    learned = DDPMPaperScheduler(variance_type="learned")
    assert torch.equal(density_nats((doubled, learned), x), density_nats((network, scheduler), x))


def test_the_chain_that_samples_does_not_count():
    """A shortened checkpoint has the flow of its training process."""
    network, scheduler = oracle(PLANE)
    short = DDPMPaperScheduler(variance_type="fitted", inference_timesteps=[5, 500, 999], x_start_mse=[0.1, 0.2, 0.3])
    x = PLANE.sample(5, seeded(13))
    assert torch.equal(density_nats((network, short), x), density_nats((network, scheduler), x))


def test_it_is_in_eval_mode_and_left_as_it_was(tiny_unet):
    unet, modes = tiny_unet(dropout=0.5).train(), []
    unet.register_forward_hook(lambda module, *_: modes.append(module.training))
    encode(unet, DDPMPaperScheduler(), normal(14, 1, 3, 8, 8), num_steps=2)
    assert modes == [False] * 4 and unet.training
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_samples_that_record_gradients_have_the_same_bits():
    """As a result of one's own loss may: the likelihood itself has no gradient."""
    network, scheduler = oracle(PLANE)
    x = PLANE.sample(5, seeded(16))
    found = density_nats((network, scheduler), x.clone().requires_grad_(True))
    assert torch.equal(found, density_nats((network, scheduler), x)) and not found.requires_grad


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed="):
        flow_bits_per_dim(smooth, VELOCITY, torch.zeros(2, 2), seed=seed, num_levels=None)


def test_the_same_seed_gives_the_same_bits():
    """And parts of a data set those of the whole, where the batches are the same."""
    model, x = (smooth, VELOCITY), normal(15, 4, 20).clamp(-1, 1)
    options: Any = {"tolerance": 1e-2, "batch_size": 2}
    whole = flow_bits_per_dim(*model, x, seed=1, **options)
    again = flow_bits_per_dim(*model, x, seed=1, **options)
    part = flow_bits_per_dim(*model, x[2:], seed=1, first_index=2, **options)
    assert torch.equal(whole.total_b, again.total_b) and torch.equal(whole.total_b[2:], part.total_b)
    other = flow_bits_per_dim(*model, x, seed=2, **options)
    assert not torch.isclose(whole.total_b, other.total_b, rtol=1e-6).any()


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance=0.0 must lie in"),
        ({"tolerance": math.nan}, "tolerance=nan must lie in"),
        ({"num_probes": -1}, "num_probes=-1 must be an integer, 0 or more"),
        ({"num_dequantizations": 0}, "num_dequantizations=0 must be an integer, 1 or more"),
        ({"num_levels": None, "num_dequantizations": 2}, "points are not dequantized"),
        ({"num_levels": 1}, "num_levels=1 must be an integer, 2 or more"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"class_labels": [0, 1, 2]}, "class_labels has shape"),
    ],
)
def test_numbers_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        flow_bits_per_dim(*oracle(PLANE), torch.zeros(2, 2), seed=0, **options)


def test_samples_outside_the_range_are_refused():
    model = oracle(PLANE)
    with pytest.raises(ValueError, match="x_start runs from 0.0 to 2.0"):
        flow_bits_per_dim(*model, torch.tensor([[0.0, 2.0]]), seed=0)
    with pytest.raises(ValueError, match="x_start holds no samples"):
        flow_bits_per_dim(*model, torch.zeros(0, 2), seed=0)
    for options, message in (({"num_steps": 0}, "num_steps=0"), ({"order": 3}, "order=3")):
        with pytest.raises(ValueError, match=message):
            encode(*model, torch.zeros(1, 2), **options)


def test_processes_without_a_flow_are_refused():
    network = oracle(PLANE)[0]
    mean = DDPMPaperScheduler(prediction_type="previous_sample")
    with pytest.raises(ValueError, match="previous_sample is the mean of single steps"):
        encode(network, mean, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="a process of one timestep has no flow"):
        encode(network, DDPMPaperScheduler(1), torch.zeros(1, 2))


def test_networks_without_a_flow_are_refused():
    x, scheduler = torch.zeros(1, 2), DDPMPaperScheduler()
    with pytest.raises(ValueError, match="not finite at t = 0"):
        encode(lambda x, t: x * math.nan, scheduler, x)
    with pytest.raises(ValueError, match="carries no gradient"):
        flow_bits_per_dim(lambda x, t: x.detach(), scheduler, x, seed=0)
    encode(lambda x, t: x.detach(), scheduler, x)


def test_without_scipy_the_extra_is_named(monkeypatch):
    """Fixed steps need none."""
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)  # what cannot be imported
    with pytest.raises(ImportError, match=r"pip install 'ddpm_hf\[flow\]'"):
        encode(*oracle(PLANE), torch.zeros(1, 2))
    encode(*oracle(PLANE), torch.zeros(1, 2), num_steps=2)


# ---- the time between timesteps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "jsd"}], ids=str)
def test_timesteps_are_those_of_their_alphas(config):
    diffusion = DDPMPaperScheduler(100, **config).diffusion
    times = torch.cat([torch.arange(100.0), torch.linspace(0, 99, 777)]).double()
    alphas = alphas_cumprod_at(diffusion, times).tolist()
    found = [timestep_at(diffusion, alpha) for alpha in alphas]
    np.testing.assert_allclose(found, times, rtol=0, atol=1e-9)
    for outside in (1.0, -0.1):
        with pytest.raises(ValueError, match="leaves"):
            timestep_at(diffusion, outside)
    assert timestep_at(DDPMPaperScheduler(1).diffusion, 1 - 1e-4) == 0


class Rounding(nn.Module):
    """ε* asked at the nearest timestep."""

    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, network: OracleNetwork):
        super().__init__()
        self.network, self.asked = network, []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append(float(t[0]))
        return self.network(x, t.round().long()).sample


def test_networks_are_asked_between_timesteps():
    """Within the process, at both of its ends; and rounding t costs little where there are a thousand."""
    network, scheduler = oracle(PLANE)
    rounding, x = Rounding(network), PLANE.sample(5, seeded(16))
    found, exact = (encode(net, scheduler, x, num_steps=50) for net in (rounding, network))
    assert (rounding.asked[0], rounding.asked[-1]) == pytest.approx((0, 999), abs=1e-9)
    assert all(0 <= t <= 999 for t in rounding.asked) and any(t % 1 for t in rounding.asked)
    assert 0 < (found - exact).abs().max() < 0.05
