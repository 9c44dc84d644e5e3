"""benchmarks/digits_quality.py: means with errors, ranges of seeds that do not overlap, and a gate that can close."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import digits_quality as quality  # type: ignore  # noqa: E402


def test_an_error_is_the_deviation_over_ranges_by_their_root():
    assert quality.mean_of([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert math.isnan(quality.mean_of([1.0]).error)


def test_what_both_owe_to_their_seeds_is_not_in_a_difference():
    rows = [{"distance": 10.0}, {"distance": 30.0}]
    found = quality.differences([{"distance": row["distance"] - 2} for row in rows], rows)["distance"]
    assert found == (-2, 0)


def test_ranges_of_seeds_do_not_overlap():
    ranges = quality.seed_ranges(4, 512)
    assert len(set().union(*ranges)) == 4 * 512
    with pytest.raises(ValueError, match="num_samples=10001 must lie in"):
        quality.seed_ranges(2, 10_001)


def test_a_frechet_distance_is_the_closed_form():
    """Means 3 apart and deviations 1 and 2 along each of four axes."""
    x = np.random.default_rng(0).standard_normal((500, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    first, second = quality.gaussian_of(x), quality.gaussian_of(2 * x + 3)
    assert quality.distance_of_gaussians(first, second) == pytest.approx(4 * 9 + 4, rel=1e-9)


@pytest.mark.parametrize("name", list(quality.GATE))
def test_the_gate_closes_at_each_bound(name):
    good = {n: quality.Estimate(bound, 0.0) for n, bound in quality.GATE.items()}
    worse = quality.GATE[name] + (0.01 if name == quality.EXCESS else -0.01)
    assert quality.missed(good) == []
    (line,) = quality.missed({**good, name: quality.Estimate(worse, 0.1)})
    assert name in line
    assert quality.missed({**good, name: quality.Estimate(math.nan, 0.1)})
