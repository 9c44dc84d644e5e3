"""Algorithm 1's losses: the paper's recorded values, their laws, importance sampling of t, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_hf import GaussianDiffusion
from ddpm_hf.likelihood import vb_terms_bpd
from ddpm_hf.objectives import LossHistory, simple_loss, vlb_loss
from ddpm_hf.scheduler.scheduling_ddpm_paper import PREDICTION_TYPES, VARIANCE_TYPES

PAPER = GaussianDiffusion(np.linspace(1e-4, 0.02, 1000))


def process(prediction_type: str = "epsilon", variance_type: str = "fixed_small") -> GaussianDiffusion:
    """The paper's process of a network with this output."""
    mse = np.linspace(1e-4, 0.5, 1000) if variance_type == "fitted" else None
    return GaussianDiffusion(PAPER.betas, prediction_type, variance_type, x_start_mse=mse)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_start, noise, x_t, t): four images, t from the first to the last."""
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(4, 3, 4, 4, generator=generator, dtype=dtype) for _ in range(2))
    t = torch.tensor([0, 10, 500, 999])
    return x_start, noise, PAPER.q_sample(x_start, t, noise), t


@pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge"])
@pytest.mark.parametrize(
    ("parameterization", "prediction_type"), [("eps", "epsilon"), ("xstart", "sample"), ("xprev", "previous_sample")]
)
def test_losses_equal_the_papers(golden, parameterization, prediction_type, variance):
    """To 1e-5: means of 48 squared float32 differences, some of numbers nearly equal."""
    variance_type = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large"}[variance]
    losses = simple_loss(
        process(prediction_type, variance_type),
        golden.nchw(f"model_output/{parameterization}"),
        golden.nchw("in/x0"),
        golden.nchw("in/x_t"),
        torch.from_numpy(golden["in/t"]),
        golden.nchw("in/eps"),
    )
    recorded = torch.from_numpy(golden[f"loss/{parameterization}/{variance}/mse"])
    torch.testing.assert_close(losses, recorded, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_network_has_no_loss_and_an_error_of_one_a_loss_of_one(prediction_type):
    x_start, noise, x_t, t = batch()
    diffusion = process(prediction_type, "fixed_large")
    target = diffusion.target(x_start, x_t, t, noise)
    assert torch.equal(simple_loss(diffusion, target, x_start, x_t, t, noise), torch.zeros(4))
    offsets = torch.tensor([0.0, 1, 2, 3]).view(-1, 1, 1, 1)
    off_by_one = simple_loss(diffusion, target + offsets, x_start, x_t, t, noise)
    torch.testing.assert_close(off_by_one, torch.tensor([0.0, 1, 4, 9]), rtol=1e-5, atol=0)


def test_a_half_precision_output_is_compared_in_float32():
    x_start, noise, x_t, t = batch()
    output = noise.bfloat16().requires_grad_()
    losses = simple_loss(PAPER, output, x_start, x_t, t, noise)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, (output.float() - noise).square().mean(dim=(1, 2, 3)))
    losses.mean().backward()
    assert output.grad is not None and output.grad.abs().max() > 0


def test_double_precision_stays_double():
    x_start, noise, x_t, t = batch(torch.float64)
    losses = simple_loss(PAPER, noise, x_start, x_t, t, noise)
    assert losses.dtype == torch.float64
    assert torch.equal(losses, torch.zeros_like(losses))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"diffusion": process(variance_type="learned")},
            "L_simple does not train a learned variance; use fixed_small",
        ),
        ({"noise": torch.zeros(4, 3, 4, 1)}, r"\(4, 3, 4, 1\)"),
    ],
)
def test_impossible_losses_are_refused(change, message):
    x_start, noise, x_t, t = batch()
    arguments: Any = {
        "diffusion": PAPER,
        "model_output": noise,
        "x_start": x_start,
        "x_t": x_t,
        "t": t,
        "noise": noise,
    }
    with pytest.raises(ValueError, match=message):
        simple_loss(**{**arguments, **change})


def test_shapes_that_would_broadcast_are_refused():
    x_start, noise, x_t, t = batch()
    with pytest.raises(ValueError, match=r"model_output has shape \(4, 1, 4, 4\), its target \(4, 3, 4, 4\)"):
        simple_loss(PAPER, noise[:, :1], x_start, x_t, t, noise)


# ---- the variational bound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge", "learned"])
@pytest.mark.parametrize("parameterization", ["eps", "xstart", "xprev"])
def test_bounds_equal_the_papers(golden, parameterization, variance, dtype):
    """KL to 1e-6 + 1e-5 of the value, the rounding of the recording; its decoder has a tanh in place of the erf."""
    model_output = golden.nchw(f"model_output/{parameterization}")
    if variance == "learned":
        model_output = torch.cat([model_output, golden.nchw("model_log_variance_learned")], dim=1)
    prediction_type = {"eps": "epsilon", "xstart": "sample", "xprev": "previous_sample"}[parameterization]
    variance_type = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}[variance]
    losses = vlb_loss(
        process(prediction_type, variance_type),
        model_output.to(dtype),
        golden.nchw("in/x0").to(dtype),
        golden.nchw("in/x_t").to(dtype),
        torch.from_numpy(golden["in/t"]),
    )
    assert losses.dtype == dtype
    recorded = torch.from_numpy(golden[f"loss/{parameterization}/{variance}/kl"]).double()
    torch.testing.assert_close(losses[1:].double(), recorded[1:], rtol=1e-5, atol=1e-6)
    if parameterization == "xstart" and variance != "learned":
        assert losses[0] > recorded[0]  # which stands on its floor of 1e-12 in every bin
    else:
        assert abs(losses[0].item() - recorded[0].item()) < 1e-2


def bound_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(x_start, x_t, t): five images of 256 levels, both ends included; t = 0 twice."""
    generator = torch.Generator().manual_seed(1)
    x_start = torch.randint(256, (5, 2, 4, 4), generator=generator)
    x_start[:, 0, 0, :2] = torch.tensor([0, 255])
    x_start = (x_start / 127.5 - 1).to(dtype)
    t = torch.tensor([0, 1, 500, 999, 0])
    return x_start, PAPER.q_sample(x_start, t, torch.randn(5, 2, 4, 4, generator=generator, dtype=dtype)), t


@pytest.mark.parametrize("num_levels", [256, 17, None])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_bound_is_its_term_with_finite_gradients_everywhere(prediction_type, variance_type, num_levels):
    """For a network that knows nothing: unit noise as its prediction, and log-variances from −8 to 8."""
    x_start, x_t, t = bound_case()
    output = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
    if variance_type == "learned":
        output = torch.cat([output, 4 * output.clamp(-2, 2)], dim=1)
    output.requires_grad_()
    arguments = process(prediction_type, variance_type), output, x_start, x_t, t
    losses = vlb_loss(*arguments, num_levels=num_levels)
    assert losses.shape == (5,) and losses.isfinite().all()
    assert torch.equal(losses, vb_terms_bpd(*arguments, num_levels=num_levels, clip_denoised=False))
    losses.sum().backward()
    assert output.grad is not None and output.grad.isfinite().all()
    assert ((output.grad != 0).flatten(1).float().mean(dim=1) > 0.9).all()


def test_x_start_is_not_clipped():
    x_start, x_t, t = bound_case()
    arguments = process("sample"), 3 * x_start, x_start, x_t, t
    losses = vlb_loss(*arguments)
    assert torch.equal(losses, vb_terms_bpd(*arguments, clip_denoised=False))
    clipped = vb_terms_bpd(*arguments, clip_denoised=True)
    assert (losses > clipped).all()


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_equivalent_outputs_have_one_bound(variance_type):
    """The same x̂_0 told as ε, x_0, μ̃ or v. In float64; to 1e-8, as ε at T−1 is recovered through a factor of 157."""
    x_start, x_t, t = bound_case(torch.float64)
    guess = x_start + 0.1 * torch.randn(x_t.shape, generator=torch.Generator().manual_seed(3)).double()
    eps = PAPER.predict_eps(guess, x_t, t)
    losses = []
    for prediction_type in PREDICTION_TYPES:
        diffusion = process(prediction_type, variance_type)
        output = diffusion.target(guess, x_t, t, eps)
        if variance_type == "learned":
            output = torch.cat([output, guess - 5], dim=1)
        losses.append(vlb_loss(diffusion, output, x_start, x_t, t))
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("place", range(5))
def test_a_samples_term_is_its_own(place):
    """Alone it has the same loss, and an output that is not finite spoils no other's loss or gradient."""
    x_start, x_t, t = bound_case()
    output = torch.cat([torch.randn(x_t.shape, generator=torch.Generator().manual_seed(4)), x_start], dim=1)
    diffusion = process(variance_type="learned")
    losses = vlb_loss(diffusion, output, x_start, x_t, t)
    one = slice(place, place + 1)
    alone = vlb_loss(diffusion, output[one], x_start[one], x_t[one], t[one])
    torch.testing.assert_close(alone, losses[one], rtol=1e-6, atol=0)

    spoilt = output.clone()
    spoilt[place] = torch.nan
    spoilt.requires_grad_()
    others = [i for i in range(5) if i != place]
    of_spoilt = vlb_loss(diffusion, spoilt, x_start, x_t, t)
    assert of_spoilt[place].isnan() and torch.equal(of_spoilt[others], losses[others])
    of_spoilt[others].sum().backward()
    assert spoilt.grad is not None and spoilt.grad[others].isfinite().all()


def test_the_decoder_reaches_no_gradient_where_it_does_not_count():
    """Of means up to 1e16 the squared error is in float32's range; log Φ need not have a gradient there."""
    x_start, x_t, t = bound_case()
    output = torch.logspace(2, 16, x_t[0].numel()).view_as(x_t[:1]).repeat(5, 1, 1, 1).requires_grad_()
    losses = vlb_loss(process("previous_sample", "fixed_large"), output, x_start, x_t, t)
    losses[t > 0].sum().backward()
    assert losses[t > 0].isfinite().all()
    assert output.grad is not None and output.grad[t > 0].isfinite().all()


def test_a_half_precision_output_has_a_float32_bound():
    x_start, x_t, t = bound_case()
    output = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(5)).bfloat16()
    for prediction_type in PREDICTION_TYPES:
        diffusion = process(prediction_type, "learned")
        losses = vlb_loss(diffusion, output, x_start, x_t, t)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, vlb_loss(diffusion, output.float(), x_start, x_t, t))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion": process(variance_type="learned")}, "learned variance needs 4 channels, got 2"),
        ({"model_output": torch.zeros(5, 4, 4, 4)}, r"shapes differ: model_output \(5, 4, 4, 4\)"),
        ({"x_start": torch.zeros(5, 2, 4, 1)}, r"shapes differ: x_start \(5, 2, 4, 1\)"),
        ({"t": torch.tensor([0, 1, 2, 3, 1000])}, r"leaves \[0, 1000\)"),
    ],
    ids=["channels", "output", "x_start", "t"],
)
def test_impossible_bounds_are_refused(change, message):
    x_start, x_t, t = bound_case()
    arguments: Any = {"diffusion": PAPER, "model_output": x_t, "x_start": x_start, "x_t": x_t, "t": t}
    with pytest.raises(ValueError, match=message):
        vlb_loss(**{**arguments, **change})


# ---- importance sampling of t --------------------------------------------------------------------------------------


def warmed_up(losses_t: np.ndarray, *, repeats: int = 10) -> LossHistory:
    """A history in which every t has had the same loss so often."""
    history = LossHistory(len(losses_t))
    for _ in range(repeats):
        history.update(np.arange(len(losses_t)), losses_t)
    return history


LOSSES = np.array([3.0, 0.5, 0.1, 0.02, 0.0])


def test_timesteps_are_uniform_until_each_has_ten_losses():
    history = warmed_up(LOSSES, repeats=9)
    history.update(np.array([0, 0, 1, 2, 3]), LOSSES)
    assert history.probabilities().tolist() == [0.2] * 5
    assert history.draw(np.array([0.5]))[1].tolist() == [1.0]
    history.update(np.array([4]), np.array([0.0]))
    assert history.probabilities()[0] > 0.5
    nothing = warmed_up(np.zeros(4))
    assert nothing.probabilities().tolist() == [0.25] * 4


def test_probabilities_follow_the_root_mean_square_of_the_last_ten():
    """√E[L²], mixed with 0.1% of the uniform distribution; an eleventh loss replaces the first."""
    generator = np.random.default_rng(0)
    history, seen = LossHistory(3), generator.random((27, 3)) * [1, 5, 0.1]
    for losses in seen:
        history.update(np.arange(3), losses)
    size = np.sqrt((seen[-10:] ** 2).mean(axis=0))
    expected = 0.999 * size / size.sum() + 0.001 / 3
    np.testing.assert_allclose(history.probabilities(), expected, rtol=1e-13)
    assert history.probabilities().sum() == pytest.approx(1, abs=1e-14)


def test_one_batch_may_hold_a_timestep_many_times():
    """Twelve losses of one t in one call: the last ten count."""
    history = warmed_up(np.ones(2))
    history.update(np.zeros(12, dtype=np.int64), np.arange(100.0, 112.0))
    size = np.array([np.sqrt((np.arange(102.0, 112.0) ** 2).mean()), 1.0])
    np.testing.assert_allclose(history.probabilities(), 0.999 * size / size.sum() + 0.0005, rtol=1e-13)


def test_draws_have_their_probabilities_and_weights_their_inverse():
    """Over an even grid of quantiles each t comes up p_t of the time, to one grid point; weights are 1 / (T p_t)."""
    history = warmed_up(LOSSES)
    probabilities = history.probabilities()
    t, weights = history.draw((np.arange(100_000) + 0.5) / 100_000)
    assert (t.dtype, weights.dtype) == (torch.int64, torch.float32)
    np.testing.assert_allclose(np.bincount(t, minlength=5) / 100_000, probabilities, atol=1e-5)
    np.testing.assert_allclose(weights.numpy(), 1 / (5 * probabilities[t]), rtol=1e-6)
    extremes, _ = history.draw(np.array([0.0, np.nextafter(1.0, 0.0)]))
    assert extremes.tolist() == [0, 4]


def test_weighted_losses_keep_their_mean_and_lose_their_variance():
    """Σ p_t w_t L_t is the mean of L exactly, and with losses as they were foreseen the product hardly varies."""
    history = warmed_up(LOSSES[:4])
    probabilities = history.probabilities()
    middles = np.cumsum(probabilities) - probabilities / 2
    t, weights = history.draw(middles)
    assert t.tolist() == [0, 1, 2, 3]
    products = weights.double().numpy() * LOSSES[:4]
    assert (probabilities * products).sum() == pytest.approx(LOSSES[:4].mean(), rel=1e-6)  # weights are float32
    assert products.std() < 0.05 * LOSSES[:4].std()


def test_losses_that_are_not_finite_are_left_out():
    history, expected = warmed_up(LOSSES), warmed_up(LOSSES).probabilities()
    history.update(np.array([0, 1, 2]), np.array([np.nan, np.inf, -np.inf]))
    np.testing.assert_array_equal(history.probabilities(), expected)
    cold = warmed_up(LOSSES, repeats=9)
    cold.update(np.arange(5), np.full(5, np.nan))
    assert cold.probabilities().tolist() == [0.2] * 5  # and are not counted


def test_a_history_goes_on_from_its_state():
    """Also in the middle of its ring, and what is taken out or put in is a copy."""
    history = warmed_up(LOSSES, repeats=13)
    state = history.state()
    restored = LossHistory(5)
    restored.restore(state)
    for each in (history, restored):
        each.update(np.array([0, 3, 3]), np.array([9.0, 8.0, 7.0]))
    np.testing.assert_array_equal(restored.probabilities(), history.probabilities())
    np.testing.assert_array_equal(restored.losses, history.losses)
    again = LossHistory(5)
    again.restore(state)
    np.testing.assert_array_equal(again.probabilities(), warmed_up(LOSSES).probabilities())


def test_the_state_of_another_number_of_timesteps_is_refused():
    with pytest.raises(ValueError, match="7"):
        LossHistory(5).restore(LossHistory(7).state())
