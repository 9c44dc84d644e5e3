"""The decoder's discretized log-likelihood (Eq. 13), against exact arithmetic and laws."""

import math
from collections.abc import Sequence
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ddpm_hf.likelihood import (
    NARROW_BIN,
    discretized_log_likelihood_nats,
)

DTYPES = [torch.float32, torch.float64]


def levels(num_levels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 1, num_levels, dtype=torch.float64).to(dtype)


MEANS = (-0.3, 0.0, 0.999, 1.0, 3.0, -50.0, 1000.0)
LOG_VARIANCES = (-24.0, -16.0, -12.0, -9.0, -5.0, -1.0, 2.0, 10.0, 40.0)


def exact_log_likelihood(case: Sequence[Any], num_levels: int) -> Any:
    """log of the decoder's bin at (x_start, mean, log_variance), to 60 digits and from the definition."""
    x_start, mean, log_variance = case
    with mpmath.workdps(60):
        sigma, half_bin = mpmath.exp(mpmath.mpf(log_variance) / 2), mpmath.mpf(1) / (num_levels - 1)
        below, above = ((mpmath.mpf(x_start) + side * half_bin - mean) / sigma for side in (-1, 1))

        def tail(z: Any) -> Any:  # P[Z > z], without cancellation
            return mpmath.erfc(z / mpmath.sqrt(2)) / 2

        if x_start == -1:
            probability = tail(-above)
        elif x_start == 1:
            probability = tail(below)
        else:
            probability = tail(below) - tail(above) if below + above > 0 else tail(-above) - tail(-below)
        return mpmath.log(probability)


def decoder_cases(num_levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(x_start, mean, log_variance), [N] each: both ends and inner levels, and bins on both sides of NARROW_BIN."""
    at_the_switch = [-2 * math.log(NARROW_BIN * (num_levels - 1) / 2 * factor) for factor in (0.999, 1.001)]
    inner = {0, 1, num_levels // 3, num_levels - 2, num_levels - 1}
    cases = torch.cartesian_prod(
        levels(num_levels)[sorted(inner)],
        torch.tensor(MEANS, dtype=torch.float64),
        torch.tensor([*LOG_VARIANCES, *at_the_switch], dtype=torch.float64),
    ).to(dtype)
    return cases[:, 0], cases[:, 1], cases[:, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_the_decoder_is_exact(num_levels, dtype):
    """Against 60 digits: wide and narrow bins, at the mean and 10¹¹ standard deviations away.

    What is allowed, of 1 + |log p|: in float64 the curvature that NARROW_BIN leaves out, (10⁻³)²/12; in float32 the
    rounding of the difference of two distribution functions there, 6e-8 / 10⁻³ times a few.
    """
    x_start, mean, log_variance = decoder_cases(num_levels, dtype)
    ours = discretized_log_likelihood_nats(x_start, mean, log_variance, num_levels=num_levels)
    assert ours.dtype == dtype
    assert (ours <= 0).all()
    narrow = 2 / (num_levels - 1) * torch.exp(-0.5 * log_variance) < NARROW_BIN
    assert 0 < narrow.sum() < len(narrow)
    for got, is_narrow, *case in zip(ours.tolist(), narrow.tolist(), x_start, mean, log_variance, strict=True):
        exact = float(exact_log_likelihood([value.item() for value in case], num_levels))
        tolerance = 3e-4 if dtype == torch.float32 else 1e-7 if is_narrow else 1e-12
        assert got == pytest.approx(exact, abs=tolerance * (1 + abs(exact))), case


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_the_probabilities_of_all_levels_sum_to_one(num_levels, dtype):
    """Also where the mean is far outside. Tolerances as above; in float32 the bins' errors are independent."""
    x_start = levels(num_levels, dtype)[:, None, None]
    mean, log_variance = torch.tensor(MEANS, dtype=dtype)[:, None], torch.tensor(LOG_VARIANCES, dtype=dtype)
    log_likelihood = discretized_log_likelihood_nats(
        x_start, mean.expand(num_levels, -1, 1), log_variance, num_levels=num_levels
    )
    total = log_likelihood.double().exp().sum(dim=0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize(
    "log_variances",
    [
        (80.0, 40.0, 10.0, -1.0),
        (-5.0, -9.0, -16.0, -40.0, -70.0),
    ],
    ids=["wide", "narrow"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_the_decoders_gradients_are_exact(num_levels, dtype, tolerance, log_variances):
    """Of mean and log-variance, by differences of 60-digit values; what is allowed is of 1 + |gradient|.

    Below about e⁻⁸⁶ the likelihood itself leaves float32.
    """
    x_start = levels(num_levels, dtype)[[0, num_levels // 3, num_levels - 1]]
    cases = torch.cartesian_prod(
        x_start, torch.tensor([-0.3, 0.98, 3.0], dtype=dtype), torch.tensor(log_variances, dtype=dtype)
    )
    x_start, mean, log_variance = cases.unbind(dim=1)
    mean, log_variance = mean.clone().requires_grad_(), log_variance.clone().requires_grad_()
    ours = discretized_log_likelihood_nats(x_start, mean, log_variance, num_levels=num_levels)
    gradients = torch.stack(torch.autograd.grad(ours.sum(), [mean, log_variance]), dim=1)
    for gradient, case in zip(gradients.tolist(), cases.tolist(), strict=True):
        for place, got in enumerate(gradient, start=1):
            with mpmath.workdps(60):
                step = mpmath.mpf(10) ** -25 * mpmath.exp(mpmath.mpf(case[2]) / 2 if place == 1 else 0)
                shifted = [[*case[:place], case[place] + side * step, *case[place + 1 :]] for side in (-1, 1)]
                below, above = (exact_log_likelihood(at, num_levels) for at in shifted)
                exact = float((above - below) / (2 * step))
            assert got == pytest.approx(exact, abs=tolerance * (1 + abs(exact))), (case, place)


def test_points_have_a_gaussian_density():
    generator = torch.Generator().manual_seed(0)
    x, mean, log_variance = (4 * torch.randn(100, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    ours = discretized_log_likelihood_nats(x, mean, log_variance, num_levels=None)
    torch.testing.assert_close(ours, Normal(mean, (0.5 * log_variance).exp()).log_prob(x), rtol=1e-12, atol=1e-12)
    assert ours.max() > 0  # a density, where a probability could not be
