"""Do samples of a class show that class, what does guidance change, and what does it cost?

    python benchmarks/labels_quality.py runs/digits_labels            # ten minutes on two cores
    python benchmarks/labels_quality.py runs/digits_labels --only time

Of a model of scikit-learn's digits that was trained with their labels (`training/train.py --label_column label`).
Printed are tables in Markdown; with --output the numbers are kept as JSON.

quality, at each guidance scale, of 1,000 samples, a hundred of each class, in 50 steps:

- read as asked, by each of two classifiers (see digits_quality.py), ± the standard error, by Laplace's rule; beside it
  the share of real digits that the same classifier reads right, of those that it has not seen;
- spread: the samples' variance within their class, summed over pixels, over that of the real digits; ± by a bootstrap
  over samples.

time of one reverse step, with guidance and without, over that of the same network without classes: medians with
quartiles of interleaved rounds, plain and sped up, at two batch sizes; and how often the network was asked.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_quality import classifiers, drawn
from sklearn.datasets import load_digits

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.convert import given_class
from ddpm_hf.evaluation.errors import share_error
from ddpm_hf.inference import speed_up
from ddpm_hf.runs import environment

SCALES, BATCHES = (1.0, 2.0, 4.0), (1, 16)
PER_CLASS, FIRST_SEED, STEPS = 100, 10_000, 50
NUM_BOOTSTRAPS = 200
ROUNDS, TIMED_STEPS = 30, 10


def quality(pipe: DDPMPaperPipeline, scale: float) -> dict[str, Any]:
    """What classifiers read, and how different samples are, at one guidance scale."""
    labels = np.arange(10 * PER_CLASS) % 10
    seeds = range(FIRST_SEED, FIRST_SEED + len(labels))
    images = drawn(pipe, seeds, STEPS, class_labels=labels.tolist(), guidance_scale=scale)
    row: dict[str, Any] = {"scale": scale}
    for classifier in classifiers():
        row[classifier.name.removeprefix("sure, ")] = share_of(classifier.probabilities(images).argmax(1) == labels)
    random = np.random.default_rng(0)
    by_class = [images[labels == label] for label in range(10)]
    resampled = [
        spread([own[random.integers(len(own), size=len(own))] for own in by_class]) for _ in range(NUM_BOOTSTRAPS)
    ]
    real, truth = load_digits(return_X_y=True)
    of_real = spread([real[truth == label] for label in range(10)])
    row["spread"] = [spread(by_class) / of_real, float(np.std(resampled, ddof=1)) / of_real]
    return row


def share_of(right: np.ndarray) -> list[float]:
    """A share and its standard error, by Laplace's rule: also that of 1 is not sure."""
    return [float(right.mean()), share_error(int(right.sum()), len(right))]


def spread(by_class: list[np.ndarray]) -> float:
    """Variance within classes, summed over pixels, as the mean over classes."""
    return float(np.mean([own.var(axis=0, ddof=1).sum() for own in by_class]))


def times(pipe: DDPMPaperPipeline, batch: int, *, fast: bool) -> dict[str, Any]:
    """Seconds of a reverse step with and without guidance, over those without classes."""
    plain = DDPMPaperPipeline(given_class(pipe.unet, 0), pipe.scheduler)
    made = {"with classes": pipe, "without": plain}
    if fast:
        made = {name: speed_up(each) for name, each in made.items()}
    for each in made.values():
        each.set_progress_bar_config(disable=True)
    ways: dict[str, Any] = {
        "without classes": lambda: made["without"],
        "scale 1": lambda: made["with classes"],
        "scale 2": lambda: made["with classes"],
    }
    options = {"scale 1": {"class_labels": 3}, "scale 2": {"class_labels": 3, "guidance_scale": 2.0}}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 2):  # the first two warm up
        for name, way in ways.items():
            before = time.perf_counter()
            way()(seeds=range(batch), num_inference_steps=TIMED_STEPS, output_type="latent", **options.get(name, {}))
            if number >= 2:
                seconds[name].append((time.perf_counter() - before) / TIMED_STEPS)
    base = np.array(seconds["without classes"])
    ratios = {name: np.quantile(np.array(own) / base, [0.25, 0.5, 0.75]).tolist() for name, own in seconds.items()}
    return {"batch": batch, "fast": fast, "step_ms": 1000 * float(np.median(base)), "ratios": ratios}


def quality_table(rows: list[dict[str, Any]]) -> str:
    names = [name for name in rows[0] if name not in ("scale", "spread")]
    lines = [f"| guidance scale | {' | '.join(f'read as asked, {name}' for name in names)} | spread |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for row in rows:
        cells = [f"{row[name][0]:.3f} ± {row[name][1]:.3f}" for name in (*names, "spread")]
        lines.append(f"| {row['scale']:g} | {' | '.join(cells)} |")
    real = [f"{c.accuracy:.3f}" for c in classifiers()]
    return "\n".join([*lines, f"| real digits | {' | '.join(real)} | 1 |"])


def time_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | batch | a step without classes | scale 1 | scale 2 |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [
            f"{middle:.2f} ({low:.2f} – {high:.2f})"
            for low, middle, high in (row["ratios"][name] for name in ("scale 1", "scale 2"))
        ]
        kind = "sped up" if row["fast"] else "plain"
        lines.append(f"| {kind} | {row['batch']} | {row['step_ms']:.2f} ms | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--only", choices=("quality", "time"))
    parser.add_argument("--output", type=Path, help="a .json to keep the numbers in")
    args = parser.parse_args()
    pipe: Any = DDPMPaperPipeline.from_pretrained(args.checkpoint)
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output and args.output.is_file() else {}
    if args.only != "time":
        fast = speed_up(pipe)
        fast.set_progress_bar_config(disable=True)
        found["quality"] = [quality(fast, scale) for scale in SCALES]
        print(quality_table(found["quality"]) + "\n")
    if args.only != "quality":
        found["time"] = [times(pipe, batch, fast=fast) for fast in (False, True) for batch in BATCHES]
        print(time_table(found["time"]))
        found["environment"] = {**environment(pipe.device), "threads": torch.get_num_threads()}
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
