"""simple_loss: the paper's recorded losses, zero for a perfect network, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_hf import GaussianDiffusion
from ddpm_hf.objectives import simple_loss

PAPER = GaussianDiffusion(np.linspace(1e-4, 0.02, 1000))
OPTIONS = {"prediction_type": "epsilon", "variance_type": "fixed_small"}


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_start, noise, x_t, t): four images, t from the first to the last."""
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(4, 3, 4, 4, generator=generator, dtype=dtype) for _ in range(2))
    t = torch.tensor([0, 10, 500, 999])
    return x_start, noise, PAPER.q_sample(x_start, t, noise), t


def targets() -> dict[str, Tensor]:
    """What a perfect network puts out for `batch()`, by its parameterization."""
    x_start, noise, x_t, t = batch()
    return {
        "epsilon": noise,
        "sample": x_start,
        "previous_sample": PAPER.q_posterior_mean_variance(x_start, x_t, t).mean,
        "v_prediction": PAPER.velocity(x_start, t, noise),
    }


@pytest.mark.parametrize("variance", ["fixedsmall", "fixedlarge"])
@pytest.mark.parametrize(
    ("parameterization", "prediction_type"), [("eps", "epsilon"), ("xstart", "sample"), ("xprev", "previous_sample")]
)
def test_losses_equal_the_papers(golden, parameterization, prediction_type, variance):
    """To 1e-5: means of 48 squared float32 differences, some of numbers nearly equal."""
    losses = simple_loss(
        PAPER,
        golden.nchw(f"model_output/{parameterization}"),
        golden.nchw("in/x0"),
        golden.nchw("in/x_t"),
        torch.from_numpy(golden["in/t"]),
        prediction_type=prediction_type,
        variance_type={"fixedsmall": "fixed_small", "fixedlarge": "fixed_large"}[variance],
        noise=golden.nchw("in/eps"),
    )
    recorded = torch.from_numpy(golden[f"loss/{parameterization}/{variance}/mse"])
    torch.testing.assert_close(losses, recorded, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", targets())
def test_a_perfect_network_has_no_loss_and_an_error_of_one_a_loss_of_one(prediction_type):
    x_start, noise, x_t, t = batch()
    target = targets()[prediction_type]
    options = {"prediction_type": prediction_type, "variance_type": "fixed_large", "noise": noise}
    assert torch.equal(simple_loss(PAPER, target, x_start, x_t, t, **options), torch.zeros(4))
    off_by_one = simple_loss(
        PAPER, target + torch.tensor([0.0, 1, 2, 3]).view(-1, 1, 1, 1), x_start, x_t, t, **options
    )
    torch.testing.assert_close(off_by_one, torch.tensor([0.0, 1, 4, 9]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_left_out_is_recovered_from_x_t(prediction_type):
    """To 1e-4 of a loss near 1: at t = 0, ε is recovered from x_t by dividing float32's rounding by 0.01."""
    x_start, noise, x_t, t = batch()
    options = {"prediction_type": prediction_type, "variance_type": "fixed_small"}
    output = torch.zeros_like(x_t)
    given = simple_loss(PAPER, output, x_start, x_t, t, **options, noise=noise)
    recovered = simple_loss(PAPER, output, x_start, x_t, t, **options)
    torch.testing.assert_close(recovered, given, rtol=1e-4, atol=0)


def test_a_half_precision_output_is_compared_in_float32():
    x_start, noise, x_t, t = batch()
    output = noise.bfloat16().requires_grad_()
    losses = simple_loss(PAPER, output, x_start, x_t, t, **OPTIONS, noise=noise)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, (output.float() - noise).square().mean(dim=(1, 2, 3)))
    losses.mean().backward()
    assert output.grad is not None and output.grad.abs().max() > 0


def test_double_precision_stays_double():
    x_start, noise, x_t, t = batch(torch.float64)
    losses = simple_loss(PAPER, noise, x_start, x_t, t, **OPTIONS, noise=noise)
    assert losses.dtype == torch.float64
    assert torch.equal(losses, torch.zeros_like(losses))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance_type": "learned"}, "L_simple does not train a learned variance; use fixed_small or fixed_large"),
        ({"prediction_type": "eps"}, "prediction_type='eps' is unknown"),
        ({"noise": torch.zeros(4, 3, 4, 1)}, r"\(4, 3, 4, 1\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    x_start, noise, x_t, t = batch()
    with pytest.raises(ValueError, match=message):
        simple_loss(PAPER, noise, x_start, x_t, t, **{**OPTIONS, "noise": noise, **options})


def test_shapes_that_would_broadcast_are_refused():
    x_start, noise, x_t, t = batch()
    with pytest.raises(ValueError, match=r"model_output has shape \(4, 1, 4, 4\), its target \(4, 3, 4, 4\)"):
        simple_loss(PAPER, noise[:, :1], x_start, x_t, t, **OPTIONS, noise=noise)
