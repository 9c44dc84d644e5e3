"""The Fréchet distance: of Gaussians fitted to two sets of features."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .features import Stream, two_streams

logger = logging.getLogger(__name__)


class Gaussian(NamedTuple):
    """What is fitted to N rows of features: mean [D], and a root R [D, D] of the covariance R Rᵀ over N − 1."""

    mean: Tensor
    root: Tensor
    num_rows: int


def fitted(blocks: Iterable[Tensor], width: int, counts: Iterable[Tensor] | None = None) -> Gaussian:
    """The Gaussian of rows in blocks, float64 [B, D], each row once or, of each block, as often as `counts` [B] says.

    Blocks are centred before they are squared and then merged (Chan, Golub and LeVeque 1983), so that an offset which
    all rows share costs no digits.
    """
    num_rows, mean, products = 0, torch.zeros(width).double(), torch.zeros(width, width).double()
    every = iter(counts) if counts is not None else None
    for block in blocks:
        times = torch.ones(len(block)).double() if every is None else next(every).double()
        added = int(times.sum())
        if added == 0:
            continue
        block_mean = times @ block / added
        centred = block - block_mean
        shift = block_mean - mean
        merged = num_rows + added
        products += centred.T @ (centred * times[:, None]) + shift.outer(shift) * (num_rows * added / merged)
        mean = mean + shift * (added / merged)
        num_rows = merged
    values, vectors = torch.linalg.eigh(products / max(num_rows - 1, 1))
    return Gaussian(mean, vectors * values.clamp(min=0).sqrt(), num_rows)  # rounding makes some negative


def distance_of_gaussians(first: Gaussian, second: Gaussian) -> float:
    """‖μ_1 − μ_2‖² + tr(Σ_1 + Σ_2 − 2 (Σ_1 Σ_2)^½), never negative.

    The trace of (Σ_1 Σ_2)^½ is the sum of the singular values of R_1ᵀ R_2. The eigenvalues of Σ_1 Σ_2 would give it
    too, but their roots make √e of a rounding error e where a covariance is singular.
    """
    means = (first.mean - second.mean).square().sum()
    traces = first.root.square().sum() + second.root.square().sum()
    return max(0.0, float(means + traces - 2 * torch.linalg.svdvals(first.root.T @ second.root).sum()))


def gaussian_of(stream: Stream) -> Gaussian:
    """Fitted to a stream; a warning is logged where it has no more rows than features."""
    found = fitted(stream.rows(), stream.width)
    if found.num_rows <= stream.width:
        logger.warning("%s: with %d samples of %d features, the Fréchet distance is much larger than with many; "
                       "compare it with others of as many", stream.argument, found.num_rows, stream.width)  # fmt: skip
    return found


def frechet_distance(samples: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """FID and FD-DINOv2: ‖μ_1 − μ_2‖² + tr(Σ_1 + Σ_2 − 2 (Σ_1 Σ_2)^½), of Gaussians fitted to two sets of features.

    Both are streams of batches, float [B, D], read once; means and covariances (over N − 1) are computed in float64.
    The distance is at least 0, and that of a set from itself is 0 up to rounding, whatever offset its features share.
    Few samples make it too large, and N ≤ D, where the covariance is singular, much too large: the value is then still
    defined, but only to be compared with those of as many samples, and a warning is logged.
    `frechet_distance_error` is its standard error.

    Raises ValueError for fewer than two samples, and for features that are not finite or differ in D.
    """
    first, second = (gaussian_of(stream) for stream in two_streams(samples, reference, minimum=2))
    return distance_of_gaussians(first, second)
