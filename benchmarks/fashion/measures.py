"""What is measured of a set of pictures, uint8 [N, 28, 28], beside as many real ones."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from digits_quality import Estimate, mean_of, over_ranges
from torch import Tensor

from ddpm_hf.evaluation.frechet import Gaussian, distance_of_gaussians, fitted

from .classifiers import classifiers, fashion, real_images

NEIGHBOURS = 3  # of precision and recall, as in the paper that defines them
NEAR = 0.01  # the share of test images whose nearest training image is nearer than what counts as "near"
FRECHET, PRECISION, RECALL, NEAREST = "Fréchet distance", "precision", "recall", "near a training image"
AS_ASKED = {"first": "read as asked, first", "second": "read as asked, second"}


def gaussian_of(features: Tensor) -> Gaussian:
    return fitted([features], features.shape[1])


def features_of(images: np.ndarray) -> Tensor:
    """float64 [N, 128], of the first classifier."""
    return classifiers()[0].features(images)


@lru_cache
def test_features() -> Tensor:
    return features_of(real_images("test"))


@lru_cache
def test_gaussian() -> Gaussian:
    return gaussian_of(test_features())


def reach(points: Tensor) -> Tensor:
    """From each point the distance to its third nearest other one, [N]."""
    return torch.cdist(points, points).kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest is the point itself


def share_within(points: Tensor, others: Tensor) -> float:
    """The share of points that lie nearer to some of the others than that one's third neighbour among them."""
    return float((torch.cdist(points, others) <= reach(others)).any(dim=1).double().mean())


def test_subset(num_images: int) -> Tensor:
    """Features of as many test images, chosen by seed; the same ones for all that are compared."""
    chosen = np.random.default_rng(0).permutation(len(test_features()))[:num_images]
    return test_features()[torch.from_numpy(chosen)]


@lru_cache
def training_rows() -> tuple[Tensor, Tensor]:
    """All training images in [0, 1] as float32 [N, 784], and their squared lengths."""
    images = real_images("train")
    rows = torch.tensor(images.reshape(len(images), -1)).float() / 255
    return rows, rows.square().sum(1)


def nearest_training(images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Distance (L2 in pixels of [0, 1]) to the nearest training image, mirrored or not, and its index: both [N]."""
    rows, squares = training_rows()
    best = torch.full((len(images),), torch.inf), torch.zeros(len(images), dtype=torch.int64)
    for turned in (images, images[:, :, ::-1]):
        own = torch.tensor(np.ascontiguousarray(turned).reshape(len(images), -1)).float() / 255
        for first in range(0, len(own), 500):
            part = slice(first, first + 500)
            distances = squares - 2 * own[part] @ rows.T + own[part].square().sum(1, keepdim=True)
            found = distances.min(dim=1)
            nearer = found.values < best[0][part]
            best[0][part] = torch.where(nearer, found.values, best[0][part])
            best[1][part] = torch.where(nearer, found.indices, best[1][part])
    return best[0].clamp(min=0).sqrt(), best[1]


@lru_cache
def near_distance() -> float:
    """The distance below which one of a hundred test images lies from its nearest training image."""
    return float(np.quantile(nearest_training(real_images("test"))[0].numpy(), NEAR))


def quality(images: np.ndarray, asked: np.ndarray | None = None) -> dict[str, float]:
    """All measures of one set; `asked` [N] are the classes that its pictures should show."""
    features, real = features_of(images), test_subset(len(images))
    found = {
        FRECHET: distance_of_gaussians(gaussian_of(features), test_gaussian()),
        PRECISION: share_within(features, real),
        RECALL: share_within(real, features),
        NEAREST: float((nearest_training(images)[0] < near_distance()).double().mean()),
    }
    for classifier in classifiers() if asked is not None else ():
        found[AS_ASKED[classifier.name]] = float((classifier.classes(images) == asked).mean())
    return found


def real_sets(num_images: int, num_sets: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Disjoint sets of training images, by seed, with their classes: what a perfect model would draw."""
    order = np.random.default_rng(1).permutation(60_000)[: num_images * num_sets].reshape(num_sets, num_images)
    labels: Any = fashion("train").labels
    return [(real_images("train")[rows], labels[rows]) for rows in order]


def real_quality(num_images: int, num_sets: int) -> dict[str, Estimate]:
    """Of real training images; without the nearest one, which is itself."""
    rows = [quality(images, asked) for images, asked in real_sets(num_images, num_sets)]
    for row in rows:
        del row[NEAREST]
    return over_ranges(rows)


def distance_by_size(sizes: Sequence[int], num_sets: int) -> dict[int, Estimate]:
    """The Fréchet distance of real training images from the test images, by how many there are: it falls."""
    return {
        size: mean_of(
            [
                distance_of_gaussians(gaussian_of(features_of(own)), test_gaussian())
                for own, _ in real_sets(size, num_sets)
            ]
        )
        for size in sizes
    }
