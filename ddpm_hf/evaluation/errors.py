"""Standard errors of the distances, by random halves of the drawn samples.

A distance T is computed of random halves of the samples and of the other halves. With L half the difference of such a
pair and Q half its sum, the variance of T over other seeds is E[L²] − Var(Q): half-samples vary as whole ones do to
first order, and Var(Q) takes away what is of second order, which is all there is where the distance is near 0. (The
bootstrap lacks that term: of Gaussian features its error was 1.8 times the true one at distance 0, where this one is
within a third. With fewer samples than features it is too large by half, and the bootstrap four times too large.
`tests/evaluation/test_errors.py` has such cases.)

The reference is not resampled: it belongs to the protocol, and is the same for all models that are compared. What a
distance of few samples has too much, its bias, is in no such error.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..randomness import keyed_generator
from .features import BLOCK_ROWS, two_streams
from .frechet import distance_of_gaussians, fitted
from .metrics import KERNEL_SUBSETS

NUM_HALVES = 50  # the error's own error is then about 10 %
LEAST_ROWS = 4  # two in each half


def share_error(right: int, count: int) -> float:
    """Standard error of a share, by Laplace's rule: that all were right does not say that no other would be wrong."""
    likely = (right + 1) / (count + 2)
    return math.sqrt(likely * (1 - likely) / count)


def random_halves(num_rows: int, seed: int, purpose: str) -> Tensor:
    """1 where a row is in the half and 0 elsewhere, [50, num_rows] in float64; keyed by (seed, purpose, number)."""
    halves = torch.zeros(NUM_HALVES, num_rows, dtype=torch.float64)
    for number, half in enumerate(halves):
        half[keyed_generator(seed, purpose, number).permutation(num_rows)[: num_rows // 2]] = 1
    return halves


def error_of_halves(distances: np.ndarray, others: np.ndarray) -> float:
    """Standard error of a distance, from those of halves and of the other halves, both [50].

    To second order E[L²] − Var(Q) is between half of E[L²], at distance 0, and all of it; by chance it may come out
    smaller, and is not taken then.
    """
    first_order = float(np.mean(((distances - others) / 2) ** 2))
    return math.sqrt(max(first_order - float(np.var((distances + others) / 2, ddof=1)), first_order / 2))


def frechet_distance_error(samples: Iterable[Tensor], reference: Iterable[Tensor], *, seed: int) -> float | None:
    """Standard error of `frechet_distance` over other samples, by 50 pairs of random halves; None below four.

    Both are streams of batches, float [B, D], read once; the samples are kept in float64, 0.8 GB per 50,000 of 2048
    features. A pair costs about as much as the distance itself.

    Raises ValueError for fewer than two samples, and for features that are not finite or differ in D.
    """
    first, second = two_streams(samples, reference, minimum=2)
    blocks, target = list(first.rows()), fitted(second.rows(), second.width)
    sizes = [len(block) for block in blocks]
    if sum(sizes) < LEAST_ROWS:
        return None

    def distance(counts: Tensor) -> float:
        return distance_of_gaussians(fitted(blocks, first.width, counts.split(sizes)), target)

    halves = random_halves(sum(sizes), seed, "Fréchet distance: halves")
    return error_of_halves(*(np.array([distance(half) for half in part]) for part in (halves, 1 - halves)))


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    """KID's kernel (xᵀy / D + 1)³ of all pairs."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def kernel_distance_error(
    samples: Iterable[Tensor], reference: Iterable[Tensor], *, seed: int, deviation: float
) -> float | None:
    """Standard error of the mean that `kernel_distance` gives, whose second value is `deviation`; None below four.

    Two independent parts: that of the squared MMD between all samples and all of the reference, by 50 pairs of random
    halves of the samples; and, since `kernel_distance` looks at 100 random subsets of both, deviation / √100.

    Both are streams of batches, float [B, D], read once and kept, in float64. The work grows as N² D.

    Raises ValueError for fewer than two samples, and for features that are not finite or differ in D.
    """
    first, second = two_streams(samples, reference, minimum=2)
    x, y = torch.cat(list(first.rows())), torch.cat(list(second.rows()))
    if len(x) < LEAST_ROWS:
        return None
    halves = random_halves(len(x), seed, "kernel distance: halves")
    sums = torch.zeros(2, 3, NUM_HALVES, dtype=torch.float64)  # pairs within a half, its rows with themselves, with y
    for rows, half in zip(x.split(BLOCK_ROWS), halves.split(BLOCK_ROWS, dim=1), strict=True):
        pairs, to_y = _kernel(rows, x), torch.stack([_kernel(rows, part).sum(dim=1) for part in y.split(BLOCK_ROWS)])
        own = (rows.square().sum(dim=1) / x.shape[1] + 1) ** 3
        for part, inside, everyone in zip(sums, (half, 1 - half), (halves, 1 - halves), strict=True):
            part += torch.stack([((inside @ pairs) * everyone).sum(dim=1), inside @ own, inside @ to_y.sum(dim=0)])
    distances = []
    for (pairs, own, to_y), size in zip(sums, (len(x) // 2, len(x) - len(x) // 2), strict=True):
        distances.append(((pairs - own) / (size * (size - 1)) - 2 * to_y / (size * len(y))).numpy())
    return math.hypot(error_of_halves(*distances), deviation / math.sqrt(KERNEL_SUBSETS))
