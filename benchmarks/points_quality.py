"""Are the points where they should be?  python benchmarks/points_quality.py CHECKPOINT --dataset swiss_roll

The energy distance between 2,000 samples and 2,000 held-out real points (Székely & Rizzo 2013),

    2 E|X − Y| − E|X − X'| − E|Y − Y'|,

which is zero only for equal distributions; the estimate is unbiased, so may be negative. Beside it the same between
two sets of 2,000 real points, 20 times: its mean is near zero, and its deviation what chance does. Printed too: how
many such deviations the samples are off. Exits with 1 when that is more than 10.

It hardly sees whether lines are sharp, so there is a second number: the mean distance from a sample to the nearest of
5,000 real points, beside that from other real points to them.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist, pdist

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.data import load_samples

NUM_POINTS, NUM_REFERENCE, NUM_DRAWS, MAX_DEVIATIONS = 2000, 5000, 20, 10.0


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'| from the rows of a and b, pairs of equal rows left out (unbiased)."""
    return float(2 * cdist(a, b).mean() - pdist(a).mean() - pdist(b).mean())


def quality(samples: np.ndarray, dataset: str) -> dict[str, float]:
    """Energy distance of samples [2000, d] to held-out points, and between real points."""
    held_out = load_samples(dataset, split="test").array.astype(np.float64)
    rng = np.random.default_rng(0)
    between_real = []
    for _ in range(NUM_DRAWS):
        draw = rng.permutation(len(held_out))
        one, other = held_out[draw[:NUM_POINTS]], held_out[draw[NUM_POINTS : 2 * NUM_POINTS]]
        between_real.append(energy_distance(one, other))
    nearest = cKDTree(held_out[:NUM_REFERENCE])
    distance = energy_distance(samples.astype(np.float64), held_out[:NUM_POINTS])
    return {
        "nearest_distance": float(nearest.query(samples)[0].mean()),
        "nearest_distance_real": float(nearest.query(held_out[NUM_REFERENCE:])[0].mean()),
        "energy_distance": distance,
        "energy_distance_real_mean": float(np.mean(between_real)),
        "energy_distance_real_std": float(np.std(between_real)),
        "deviations_off": (distance - float(np.mean(between_real))) / float(np.std(between_real)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dataset", required=True, choices=("swiss_roll", "moons"))
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    pipe = DDPMPaperPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    numbers = quality(pipe(seeds=range(NUM_POINTS), output_type="np").images, args.dataset)  # type: ignore[union-attr]
    for name, value in numbers.items():
        print(f"{name:30} {value:.6f}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")
    if numbers["deviations_off"] > MAX_DEVIATIONS:
        sys.exit(f"too far from the real points: deviations_off must be at most {MAX_DEVIATIONS}")


if __name__ == "__main__":
    main()
