"""How good are the digits that a model draws?

    python benchmarks/digits_quality.py model_cards/ddpm-digits --steps 50              # four ranges of 512 seeds
    python benchmarks/digits_quality.py runs/digits --steps 50 --ranges 3 --num_samples 256 --gate     # as CI does

Samples of several ranges of seeds (10000, 10001, …; 20000, …), sped up in float32, of a model trained on
scikit-learn's digits. Each range is measured by itself, and each number is the mean over ranges ± its standard error:

- sure, SVC γ = 0.001 and sure, SVC C = 10: the share of samples about which a classifier is more than 0.9 sure. Both
  are support vector machines with an RBF kernel and calibrated probabilities. The first sees half of the real digits
  at the levels 0 … 16, the second 900 of them in [0, 1] with γ = "scale". Beside them stands the share of the real
  digits they have not seen; its error is binomial.
- Fréchet distance between Gaussians fitted to the first 20 principal components of all real digits. The real digits
  are split 100 times, by seed, into as many as there are samples in a range, and the rest: the distance of the samples
  to the rest, and that of the real digits to the rest, are means over the same splits.

A Fréchet distance falls with the number of samples, also that of real digits to real digits, which a perfect model
would have too. So only distances of equally many samples can be compared, and their difference to that of as many real
digits is printed. With --gate the exit code is 1 where a mean misses a bound of GATE. Needs the extra `train`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.evaluation.frechet import Gaussian, distance_of_gaussians, fitted as fitted_to
from ddpm_hf.inference import speed_up

NUM_SAMPLES, NUM_RANGES, RANGE_STEP = 512, 4, 10_000
NUM_COMPONENTS, NUM_SPLITS, SURE = 20, 100, 0.9
SURE_BY_GAMMA, SURE_BY_C, FRECHET, EXCESS = "sure, SVC γ = 0.001", "sure, SVC C = 10", "Fréchet distance", "above real"
# Least share that each classifier is sure of, and the most by which the distance may lie above that of real digits.
# The model of model_cards/ddpm-digits has 0.734 ± 0.016, 0.715 ± 0.012 and 3.7 ± 0.9 in three ranges of 256 at 50
# steps, so that each bound is five or more standard errors away; how much trainings differ was not measured.
GATE = {SURE_BY_GAMMA: 0.65, SURE_BY_C: 0.65, EXCESS: 10.0}


class Estimate(NamedTuple):
    """A mean and its standard error; NaN where a single value shows none."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def mean_of(values: Sequence[float]) -> Estimate:
    """Mean of independent values, with its standard error."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(np.mean(values)), float(error))


def over_ranges(rows: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Each measure's mean over ranges."""
    return {name: mean_of([row[name] for row in rows]) for name in rows[0]}


def differences(rows: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """Mean of rows − others, range by range, of the same seeds: what both owe to their seeds is not in its error."""
    return {name: mean_of([a[name] - b[name] for a, b in zip(rows, others, strict=True)]) for name in rows[0]}


def seed_ranges(num_ranges: int = NUM_RANGES, num_samples: int = NUM_SAMPLES, first: int = 1) -> list[range]:
    """Ranges number `first` and on: the second begins at 20000."""
    if not 1 <= num_samples <= RANGE_STEP:
        raise ValueError(f"num_samples={num_samples} must lie in [1, {RANGE_STEP}], so that no two ranges overlap")
    return [range(at, at + num_samples) for at in RANGE_STEP * np.arange(first, first + num_ranges)]


def drawn(pipe: DDPMPaperPipeline, seeds: range, steps: int | None, **options: Any) -> np.ndarray:
    """Samples on the data's scale 0 … 16, [N, 64]; `options` as of the pipeline's call."""
    seeds_given = [int(seed) for seed in seeds]
    images: Any = pipe(seeds=seeds_given, num_inference_steps=steps, output_type="np", **options).images  # type: ignore[union-attr]
    return images.reshape(len(seeds), -1) * 16


def gaussian_of(rows: np.ndarray) -> Gaussian:
    """Fitted to rows [N, D]."""
    return fitted_to([torch.from_numpy(rows).double()], rows.shape[1])


class Classifier(NamedTuple):
    name: str
    probabilities: Callable[[np.ndarray], np.ndarray]
    accuracy: float
    sure_of_real: Estimate

    def sure_of(self, images: np.ndarray) -> float:
        """The share of images [N, 64] about which it is more than 0.9 sure."""
        return float((self.probabilities(images).max(1) > SURE).mean())


def fitted(name: str, svc: SVC, scale: float, num_seen: int) -> Classifier:
    """A classifier that has seen `num_seen` of the real digits, with its accuracy on the others."""
    real, labels = load_digits(return_X_y=True)
    seen, unseen = np.split(np.random.default_rng(0).permutation(len(real)), [num_seen])
    model = CalibratedClassifierCV(svc, ensemble=False).fit(real[seen] * scale, labels[seen])
    probability = model.predict_proba(real[unseen] * scale)
    share = float((probability.max(1) > SURE).mean())
    return Classifier(
        name,
        lambda images: model.predict_proba(images * scale),
        float((probability.argmax(1) == labels[unseen]).mean()),
        Estimate(share, math.sqrt(share * (1 - share) / len(unseen))),
    )


@lru_cache
def classifiers() -> tuple[Classifier, Classifier]:
    half = len(load_digits().data) // 2
    return (
        fitted(SURE_BY_GAMMA, SVC(gamma=0.001), 1.0, half),
        fitted(SURE_BY_C, SVC(C=10, gamma="scale"), 1 / 16, 900),
    )


@lru_cache
def components() -> tuple[PCA, np.ndarray]:
    """Of all real digits, and these digits in them."""
    real = load_digits().data
    pca = PCA(NUM_COMPONENTS, random_state=0).fit(real)
    return pca, pca.transform(real)


@lru_cache
def splits(num_samples: int) -> list[tuple[Gaussian, Gaussian]]:
    """`num_samples` real digits and the rest of them, each as a Gaussian, 100 times."""
    rng, (_, projected) = np.random.default_rng(0), components()
    orders = (rng.permutation(len(projected)) for _ in range(NUM_SPLITS))
    return [(gaussian_of(projected[o[:num_samples]]), gaussian_of(projected[o[num_samples:]])) for o in orders]


def quality(samples: np.ndarray) -> dict[str, float]:
    """All measures of the samples of one range, [N, 64] on the scale 0 … 16."""
    own = gaussian_of(components()[0].transform(samples))
    distance = float(np.mean([distance_of_gaussians(own, rest) for _, rest in splits(len(samples))]))
    excess = distance - real_quality(len(samples))[FRECHET].value
    return {**{c.name: c.sure_of(samples) for c in classifiers()}, FRECHET: distance, EXCESS: excess}


@lru_cache
def real_quality(num_samples: int) -> dict[str, Estimate]:
    """The same measures of real digits."""
    distance = mean_of([distance_of_gaussians(taken, rest) for taken, rest in splits(num_samples)])
    return {**{c.name: c.sure_of_real for c in classifiers()}, FRECHET: distance}


def missed(found: Mapping[str, Estimate]) -> list[str]:
    """What lies on the wrong side of its bound."""
    return [
        f"{name} {found[name]}, bound {bound}"
        for name, bound in GATE.items()
        if not (found[name].value <= bound if name == EXCESS else found[name].value >= bound)
    ]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--steps", type=int, help="reverse steps; default: all")
    parser.add_argument("--ranges", type=int, default=NUM_RANGES, help="of seeds; default: %(default)s")
    parser.add_argument(
        "--first", type=int, default=1, help="number of the first range; default: 1, seeds 10000 and on"
    )
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES, help="of a range; default: %(default)s")
    parser.add_argument("--gate", action="store_true", help="exit with 1 where a mean misses its bound")
    args = parser.parse_args(argv)
    pipe = DDPMPaperPipeline.from_pretrained(args.checkpoint)
    if torch.cuda.is_available():
        pipe.to("cuda")
    pipe = speed_up(pipe)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for seeds in seed_ranges(args.ranges, args.num_samples, args.first):
        rows.append(quality(drawn(pipe, seeds, args.steps)))
        values = ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items())
        print(f"seeds {seeds[0]} to {seeds[-1]}: {values}", flush=True)
    found, real = over_ranges(rows), real_quality(args.num_samples)
    print(f"\n{'':22} {'samples':18} real digits")
    for name, estimate in found.items():
        print(f"{name:22} {str(estimate):18} {real.get(name, '')}")
    accuracies = ", ".join(f"{c.accuracy:.3f}" for c in classifiers())
    print(f"(right about digits they have not seen: {accuracies}; {args.ranges} ranges of {args.num_samples} seeds)")
    misses = missed(found) if args.gate else []
    if misses:
        print(f"below the bounds: {'; '.join(misses)}", file=sys.stderr)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
