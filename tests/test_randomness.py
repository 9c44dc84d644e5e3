"""Keyed random numbers: the same for the same key, whatever else is drawn, and independent between keys."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_hf.randomness import keyed_generator, keyed_generators, normal

KEY = (7, "noise", 3, 5)  # seed, purpose, step, index


def numbers(*key, count: int = 100) -> np.ndarray:
    return keyed_generator(*key).standard_normal(count)


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    expected = numbers(*KEY)
    keyed_generator(*KEY[:3], 4).standard_normal(1000)
    np.random.default_rng(0).standard_normal(10)
    torch.randn(10)
    assert np.array_equal(numbers(*KEY), expected)
    one, other = keyed_generator(*KEY), keyed_generator(7, "noise", 3, 6)  # and two can be drawn from in turns
    parts = [(one.standard_normal(50), other.standard_normal(50))[0] for _ in range(2)]
    assert np.array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("other", [(8, "noise", 3, 5), (7, "order", 3, 5), (7, "noise", 4, 5), (7, "noise", 5, 3)])
def test_every_part_of_the_key_counts(other):
    assert np.intersect1d(numbers(*KEY), numbers(*other)).size == 0


def test_large_steps_and_indices_are_keys_of_their_own():
    keys = [(0, "noise", step, index) for step in (0, 2**32, 2**64 - 1) for index in (0, 2**32, 2**64 - 1)]
    assert len({numbers(*key, count=1)[0] for key in keys}) == len(keys)
    for step, index in ((0, 2**64), (-1, 0)):
        with pytest.raises(OverflowError):
            keyed_generator(0, "noise", step, index)


def test_neighbouring_streams_are_not_shifted_copies():
    count = 10_000
    here = keyed_generator(*KEY).integers(2**64, size=count, dtype=np.uint64)
    for other in ((7, "noise", 3, 6), (7, "noise", 4, 5)):
        there = keyed_generator(*other).integers(2**64, size=count, dtype=np.uint64)
        assert np.intersect1d(here, there).size == 0  # by chance 10⁸ / 2⁶⁴


def test_neighbouring_streams_are_uncorrelated():
    draws = normal(0, "noise", 0, range(64), (4096,)).numpy()
    correlation = np.corrcoef(draws)[~np.eye(64, dtype=bool)]
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)  # five standard errors, over 2016 pairs


def test_normal_has_the_moments_of_a_standard_gaussian():
    x = normal(0, "noise", 0, range(100), (100, 100)).double()
    # A million numbers: standard errors 0.001 of the mean, 0.0014 of the variance, 0.0024 and 0.01 of the next two.
    assert abs(x.mean()) < 0.004
    assert abs(x.var() - 1) < 0.006
    assert abs((x**3).mean()) < 0.016
    assert abs((x**4).mean() - 3) < 0.04


def test_rows_are_the_draws_of_their_indices():
    whole = normal(7, "noise", 3, range(6), (2, 4, 4))
    assert whole.shape == (6, 2, 4, 4) and whole.dtype == torch.float32
    assert torch.equal(normal(7, "noise", 3, [5, 0, 2, 2], (2, 4, 4)), whole[[5, 0, 2, 2]])
    assert torch.equal(normal(7, "noise", 3, torch.tensor([4, 1]).tolist(), (2, 4, 4)), whole[[4, 1]])
    assert torch.equal(normal(7, "noise", 3, (i for i in (1, 3)), (2, 4, 4)), whole[[1, 3]])
    assert normal(7, "noise", 3, [], (2,)).shape == (0, 2)


def test_recorded_numbers():
    """These must never change: a run that is resumed with another version of the package draws them again."""
    assert keyed_generator(*KEY).integers(2**32, size=3).tolist() == [361662481, 2650314299, 4059731478]
    torch.testing.assert_close(normal(7, "noise", 3, [5], (3,)), torch.tensor([[0.054456, 0.653048, 0.67415]]))


@pytest.mark.slow
def test_a_fresh_process_draws_the_same():
    code = "from ddpm_hf.randomness import normal; print(normal(7, 'noise', 3, [5, 6], (2, 3)).tolist())"
    root = Path(__file__).parents[1]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str(normal(7, "noise", 3, [5, 6], (2, 3)).tolist())


def test_a_moved_generator_draws_what_a_fresh_one_does():
    """Also after draws that leave half of a 64-bit number, or of a block, behind."""
    steps, indices = [3, 3, 0, 2**63, 3], [5, 6, 0, 2**64 - 1, 5]
    for step, index, moved in zip(steps, indices, keyed_generators(7, "noise", steps, indices), strict=True):
        fresh = keyed_generator(7, "noise", step, index)
        for generator in (moved, fresh):
            generator.integers(10, dtype=np.uint32)
        assert np.array_equal(moved.standard_normal(7, dtype=np.float32), fresh.standard_normal(7, dtype=np.float32))
        assert moved.random() == fresh.random()
    with pytest.raises(ValueError, match="zip"):
        list(keyed_generators(7, "noise", [1, 2], [1]))
