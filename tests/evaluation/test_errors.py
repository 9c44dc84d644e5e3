"""Standard errors of the distances: against the spread over independent samples, and what they promise."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_hf.evaluation import (
    errors,
    frechet_distance,
    frechet_distance_error,
    kernel_distance,
    kernel_distance_error,
    metrics,
)

pytest.importorskip("torchmetrics")


def normal(num_samples: int, width: int, seed: int) -> Tensor:
    return torch.randn(num_samples, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE = normal(2000, 20, seed=999)


def kernel_error(samples: Tensor, reference: Tensor, seed: int = 0) -> float:
    _, deviation = kernel_distance([samples], [reference], seed=seed, subset_size=100)
    error = kernel_distance_error([samples], [reference], seed=seed, deviation=deviation)
    assert error is not None
    return error


def spread_and_errors(
    distance: Callable[[Tensor], float], error: Callable[[Tensor], float | None], draw: Callable[[int], Tensor]
) -> tuple[float, float]:
    """Deviation of the distance over 60 independent sets, and the mean error that six of them give."""
    sets = [draw(seed) for seed in range(60)]
    return float(np.std([distance(x) for x in sets], ddof=1)), float(np.mean([error(x) for x in sets[:6]]))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_samples", "width", "scale", "shift", "most"),
    [(512, 20, 1.2, 0.3, 1.5), (512, 20, 1.0, 0.0, 1.5), (100, 20, 1.0, 0.1, 1.5), (300, 5, 1.0, 0.0, 1.5)]
    + [(15, 20, 1.0, 0.0, 2.0)],
    ids=["far", "no distance", "few", "no distance, few features", "fewer than features"],
)
def test_the_frechet_error_is_the_spread_over_samples(num_samples, width, scale, shift, most, caplog):
    """Within a half: the deviation of 60 is known to 9 %, the mean of six errors to about as much.

    With fewer samples than features orders above the second count, and it is 1.4 to 1.7 times the spread. The plain
    bootstrap gives 1.8 times the spread at no distance, and 4 times with fewer samples than features.
    """
    caplog.set_level(logging.ERROR)
    reference = REFERENCE[:, :width]
    spread, error = spread_and_errors(
        lambda x: frechet_distance([x], [reference]),
        lambda x: frechet_distance_error([x], [reference], seed=0),
        lambda seed: scale * normal(num_samples, width, seed) + shift,
    )
    assert 0.67 * spread < error < most * spread


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "shift"), [(1.2, 0.3), (1.0, 0.0)], ids=["far", "no distance"])
def test_the_kernel_error_is_the_spread_over_samples(scale, shift, monkeypatch):
    for module in (errors, metrics):
        monkeypatch.setattr(module, "KERNEL_SUBSETS", 10)  # 100 say no more, later
    spread, error = spread_and_errors(
        lambda x: kernel_distance([x], [REFERENCE], seed=0, subset_size=100)[0],
        lambda x: kernel_error(x, REFERENCE),
        lambda seed: scale * normal(400, 20, seed) + shift,
    )
    assert 0.67 * spread < error < 1.5 * spread


def test_the_kernel_error_is_that_of_the_halves_distances(monkeypatch):
    """By its definition, one half after the other, over several blocks of rows."""
    monkeypatch.setattr(errors, "BLOCK_ROWS", 50)
    x, y = normal(121, 3, seed=1) + 0.2, normal(110, 3, seed=2)
    distances = ([], [])
    for half in errors.random_halves(len(x), 0, "kernel distance: halves").bool():
        for found, rows in zip(distances, (x[half], x[~half]), strict=True):
            gram = (rows @ rows.T / 3 + 1) ** 3
            cross = (rows @ y.T / 3 + 1) ** 3
            within = (gram.sum() - gram.diagonal().sum()) / (len(rows) * (len(rows) - 1))
            found.append(float(within - 2 * cross.mean()))  # y with itself is the same for all halves
    expected = errors.error_of_halves(*map(np.array, distances))
    assert kernel_distance_error([x], [y], seed=0, deviation=0.0) == pytest.approx(expected, rel=1e-9)
    both = kernel_distance_error([x], [y], seed=0, deviation=7.0)
    assert both == pytest.approx((expected**2 + 0.49) ** 0.5, rel=1e-9)  # 7 / √100, of the subsets


def test_halves_are_disjoint_keyed_and_half():
    halves = errors.random_halves(11, 3, "purpose")
    assert halves.shape == (50, 11) and set(halves.flatten().tolist()) == {0, 1}
    assert halves.sum(dim=1).tolist() == [5] * 50 and len({tuple(half) for half in halves.tolist()}) > 40
    torch.testing.assert_close(halves, errors.random_halves(11, 3, "purpose"), rtol=0, atol=0)
    assert not torch.equal(halves, errors.random_halves(11, 4, "purpose"))


def test_an_error_is_between_the_first_order_and_its_root_of_a_half():
    """Halves that differ and whose sums do not: E[L²]; whose sums vary as much: half of it at the least."""
    differing = np.array([1.0, -1.0] * 25)
    assert errors.error_of_halves(differing, -differing) == 1
    assert errors.error_of_halves(3 * differing, 1 * differing) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("error", [frechet_distance_error, kernel_distance_error])
def test_errors_depend_on_seed_and_order_alone(error):
    x, y = normal(1100, 4, seed=1), normal(200, 4, seed=2)
    more = {"deviation": 0.1} if error is kernel_distance_error else {}
    before = torch.get_rng_state()
    whole = error([x], [y], seed=5, **more)
    assert whole == error(x.split(7), y.split(30), seed=5, **more) != error([x], [y], seed=6, **more)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("error", [frechet_distance_error, kernel_distance_error])
def test_three_samples_have_no_error_and_one_is_refused(error):
    more = {"deviation": 0.0} if error is kernel_distance_error else {}
    x = normal(4, 3, seed=0)
    assert error([x[:3]], [x], seed=0, **more) is None and error([x], [x], seed=0, **more) >= 0
    with pytest.raises(ValueError, match="samples has 1 samples; it must have at least 2"):
        error([x[:1]], [x], seed=0, **more)
    with pytest.raises(ValueError, match="samples have 3 features and reference 2"):
        error([x], [x[:, :2]], seed=0, **more)
