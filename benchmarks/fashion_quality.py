"""How good are the clothes that a model draws, beside the official test images of Fashion-MNIST?

    python benchmarks/fashion_quality.py model_cards/ddpm-fashion --steps 50 --scheduler ddim      # four ranges of 500
    python benchmarks/fashion_quality.py CHECKPOINT --guidance 1 2 --output FILE.json              # kept as rows
    python benchmarks/fashion_quality.py --real                                                   # real images alone
    python benchmarks/fashion_quality.py --table benchmarks/results/fashion.json                  # renew the docs

Pictures of four ranges of seeds (10000, 10001, …; 20000, …), a class each in turn where the model knows classes, sped
up in float32 where ours. Each range is measured by itself; each number is the mean over ranges ± its standard error:

- Fréchet distance between Gaussians fitted to the features of a classifier (benchmarks/fashion/classifiers.py, trained
  on the training images): of the pictures, and of the 10,000 test images;
- precision and recall in the same features (Kynkäänniemi et al. 2019, k = 3) beside as many test images;
- read as asked: the share of pictures in which this and a second classifier see the class that was asked for;
- near a training image: the share that is nearer to one, mirrored or not, than all but one in a hundred test images.

Beside them stand real training images, as many: what a perfect model would have. A Fréchet distance falls with the
number of pictures, so that only distances of equally many can be compared; --real prints by how much. The classifiers
are trained first where they are not kept (ten minutes). Pictures are kept in --work_dir, so that a run that was
stopped goes on. Needs the extra `train`, and the data as docs/data.md says.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from digits_quality import NUM_RANGES, over_ranges, seed_ranges
from fashion.classifiers import classifiers
from fashion.measures import distance_by_size, quality, real_quality
from speed import documents, report

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli.arguments import SCHEDULERS
from ddpm_hf.data import default_cache_dir
from ddpm_hf.inference import can_speed_up, speed_up
from ddpm_hf.runs import weights_sha256
from ddpm_hf.scheduler import distilled_steps

NUM_SAMPLES, BATCH, SIZES = 500, 50, (250, 500, 1000, 2000, 5000)


class Drawer:
    """Draws a checkpoint's pictures, sped up, and keeps them by what they depend on."""

    def __init__(self, checkpoint: str | Path, scheduler: str, work_dir: Path) -> None:
        plain = DDPMPaperPipeline.from_pretrained(checkpoint)
        self.weights = weights_sha256(plain.unet.state_dict())
        self.pipe: Any = speed_up(plain) if can_speed_up(plain, torch.float32) else plain
        name, self.options = SCHEDULERS[scheduler]
        own = name is None and distilled_steps(plain) is not None
        self.name = "distilled" if own else scheduler  # as its row is called
        if name is not None:
            self.pipe.scheduler = getattr(diffusers, name).from_config(plain.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.work_dir = work_dir

    def asked_for(self, seeds: range) -> np.ndarray | None:
        """A class for each seed, in turn; None of a model without classes."""
        return np.array(seeds) % len(self.pipe.classes) if self.pipe.classes else None

    def draw(self, seeds: range, steps: int | None, guidance: float = 1.0) -> np.ndarray:
        """uint8 [N, 28, 28], in batches of 50; read where the same pictures are kept."""
        config = sorted((k, repr(v)) for k, v in self.pipe.scheduler.config.items() if not k.startswith("_"))
        chain = type(self.pipe.scheduler).__name__, config, seeds, steps, float(guidance), *self.options
        identity = repr((self.weights, *chain))
        file = self.work_dir / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
        if not file.is_file():
            parts, asked = [], self.asked_for(seeds)
            for first in range(0, len(seeds), BATCH):
                part = slice(first, first + BATCH)
                options: Any = {**self.options} | ({} if asked is None else {"class_labels": asked[part].tolist()})
                options |= {} if guidance == 1 else {"guidance_scale": guidance}
                drawn = self.pipe(seeds=list(seeds[part]), num_inference_steps=steps, output_type="np", **options)
                parts.append((drawn.images[..., 0] * 255).round().astype(np.uint8))
            self.work_dir.mkdir(parents=True, exist_ok=True)
            np.save(file, np.concatenate(parts), allow_pickle=False)
        return np.load(file, allow_pickle=False)


def default_work_dir() -> Path:
    return default_cache_dir() / "benchmarks" / "fashion"


def as_pairs(found: dict[str, Any]) -> dict[str, list[float]]:
    """Estimates as JSON has them: a value and its standard error."""
    return {name: [estimate.value, estimate.error] for name, estimate in found.items()}


def measured(drawer: Drawer, steps: int | None, guidance: float, ranges: Sequence[range]) -> dict[str, list[float]]:
    """Each measure of the model's pictures, as the mean over ranges of seeds and its standard error."""
    rows = [quality(drawer.draw(seeds, steps, guidance), drawer.asked_for(seeds)) for seeds in ranges]
    return as_pairs(over_ranges(rows))


def row_of(args: argparse.Namespace, drawer: Drawer, guidance: float) -> dict[str, Any]:
    ranges = seed_ranges(args.ranges, args.num_samples)
    began = time.perf_counter()
    found = measured(drawer, args.steps, guidance, ranges)
    steps = args.steps or len(drawer.pipe.own_scheduler().timesteps)
    row = {"scheduler": drawer.name, "steps": steps, "guidance": guidance, "ranges": args.ranges}
    row |= {"num_samples": args.num_samples, "seconds": round(time.perf_counter() - began), "weights": drawer.weights}
    print(line(f"{drawer.name}, {steps} steps, guidance {guidance:g}", found), flush=True)
    return row | {"measures": found}


def line(name: str, found: dict[str, list[float]]) -> str:
    return f"{name}: " + ", ".join(f"{what} {value:.3f} ± {error:.3f}" for what, (value, error) in found.items())


def replaced(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with the new one, in place of one of the same kind."""
    kind = ("scheduler", "steps", "guidance")
    return sorted(
        [row for row in rows if any(row[key] != new[key] for key in kind)] + [new],
        key=lambda row: (row["scheduler"] != "ddpm", row["scheduler"], -row["steps"], row["guidance"]),
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--steps", type=int, help="reverse steps; default: all")
    parser.add_argument("--scheduler", choices=SCHEDULERS, default="ddpm", help="default: %(default)s")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="scales; default: 1")
    parser.add_argument("--ranges", type=int, default=NUM_RANGES, help="of seeds; default: %(default)s")
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES, help="of a range; default: %(default)s")
    parser.add_argument("--real", action="store_true", help="measure real training images, alone or as well")
    parser.add_argument("--work_dir", type=Path, default=default_work_dir(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the rows there, as JSON, beside older ones")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of results, and renew the docs")
    args = parser.parse_args(argv)
    if args.table:
        return documents.show(args.table)
    if not (args.checkpoint or args.real):
        parser.error("name a checkpoint, or give --real")
    found = json.loads(args.output.read_text()) if args.output and args.output.is_file() else {"rows": []}
    found |= {"kind": "fashion", "accuracy": {c.name: c.accuracy for c in classifiers()}, **report.surroundings()}
    if args.real:
        real = as_pairs(real_quality(args.num_samples, args.ranges))
        found["real"] = {"ranges": args.ranges, "num_samples": args.num_samples, "measures": real}
        found["by_size"] = {str(size): list(each) for size, each in distance_by_size(SIZES, args.ranges).items()}
        print(line(f"real images, {args.ranges} sets of {args.num_samples}", real))
        print("Fréchet distance of real images, by their number: " + json.dumps(found["by_size"]))
    if args.checkpoint:
        drawer = Drawer(args.checkpoint, args.scheduler, args.work_dir)
        for guidance in args.guidance:
            found["rows"] = replaced(found["rows"], row_of(args, drawer, guidance))
    if args.output:
        report.write_json(args.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
