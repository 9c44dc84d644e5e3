"""How many of the pictures that a model draws are those it was trained on?

    python benchmarks/memorised.py CHECKPOINT --train_data_dir emoji --resolution 32 --held_out_every 10 \\
        --steps 100 --guidance 1 2 --output FILE.json                            # kept as rows
    python benchmarks/memorised.py --table benchmarks/results/emoji.json         # print the table, renew the docs

The data are those of the training, and `held_out_every` is its option: what it kept from training is what a picture
that is no copy looks like. From each picture the distances (L2 over all pixels and channels in [0, 1]) to the pictures
that were trained on are taken, mirrored or not, whichever is less:

- near: the share that is nearer to one of them than all but one in twenty held-out pictures;
- copies: the share whose nearest one is less than a third as far away as the second nearest (the criterion of Yoon et
  al. 2023, "Diffusion Probabilistic Models Generalize when They Fail to Memorize"). Of data with near-duplicates, such
  as faces of a clock, it finds too few.

Pictures of several ranges of seeds (10000, 10001, …; 20000, …), a class each in turn where the model knows classes,
sped up where ours. Each number is the mean over ranges ± its standard error. Held-out pictures stand beside them.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from digits_quality import over_ranges, seed_ranges
from fashion_quality import as_pairs
from speed import documents, report
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.data import Samples, load_samples, to_model_range
from ddpm_hf.figures import nearest_images, unit_range
from ddpm_hf.inference import can_speed_up, speed_up
from ddpm_hf.runs import weights_sha256
from ddpm_hf.runs.held_out import is_held_out

NEAR, COPIES = "near", "copies"
OF_HELD_OUT, OF_SECOND = 0.05, 1 / 3
NUM_RANGES, NUM_SAMPLES, BATCH = 4, 240, 40


def parts_of(samples: Samples, every: int) -> tuple[Samples, Samples]:
    """What is trained on with `held_out_every`, and what is held out."""
    held_out = is_held_out(samples, every)
    if held_out.all() or not held_out.any():
        raise ValueError(f"--held_out_every {every} leaves one side of {samples.name} without pictures")
    return replace(samples, array=samples.array[~held_out]), replace(samples, array=samples.array[held_out])


def pictures_of(samples: Samples) -> Tensor:
    """All of them in [0, 1], float32 [N, C, H, W]."""
    return unit_range(to_model_range(samples.batch(range(len(samples))), samples.num_levels))


def two_nearest(pictures: Tensor, trained_on: Samples) -> Tensor:
    """Distances to the two nearest of `trained_on`, each as it is or mirrored: [N, 2]."""
    found = [nearest_images(turned, trained_on, k=2) for turned in (pictures, pictures.flip(-1))]
    distances = torch.cat([each.distances for each in found], dim=1)
    indices = torch.cat([each.indices for each in found], dim=1)
    first, at = distances.min(dim=1)
    others = distances.masked_fill(indices == indices.gather(1, at[:, None]), torch.inf)  # the same one, turned
    return torch.stack([first, others.min(dim=1).values], dim=1)


def shares(distances: Tensor, near: float) -> dict[str, float]:
    """What is measured of a set of pictures, from its `two_nearest`."""
    copied = distances[:, 0] < OF_SECOND * distances[:, 1]
    return {NEAR: float((distances[:, 0] < near).double().mean()), COPIES: float(copied.double().mean())}


def drawn(pipe: Any, seeds: range, steps: int | None, guidance: float) -> Tensor:
    """Pictures in [0, 1], float32 [N, C, H, W]."""
    parts = []
    for first in range(0, len(seeds), BATCH):
        part = seeds[first : first + BATCH]
        options: Any = {"class_labels": [s % len(pipe.classes) for s in part]} if pipe.classes else {}
        options |= {} if guidance == 1 else {"guidance_scale": guidance}
        parts.append(pipe(seeds=part, num_inference_steps=steps, output_type="pt", **options).images)
    return torch.cat(parts)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--train_data_dir", help="the folder that the model was trained on")
    data.add_argument("--dataset_name", help="or the name")
    parser.add_argument("--resolution", type=int, help="as in the training")
    parser.add_argument("--held_out_every", type=int, default=10, help="as in the training; default: %(default)s")
    parser.add_argument("--steps", type=int, help="reverse steps; default: all")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="scales; default: 1")
    parser.add_argument("--ranges", type=int, default=NUM_RANGES, help="of seeds; default: %(default)s")
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES, help="of a range; default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of results, and renew the docs")
    args = parser.parse_args(argv)
    if args.table:
        return documents.show(args.table)
    if not args.checkpoint or not (args.train_data_dir or args.dataset_name):
        parser.error("name a checkpoint, and --train_data_dir or --dataset_name")
    plain = DDPMPaperPipeline.from_pretrained(args.checkpoint)
    pipe: Any = speed_up(plain) if can_speed_up(plain, torch.float32) else plain
    pipe.set_progress_bar_config(disable=True)
    samples = load_samples(
        args.dataset_name,
        train_data_dir=args.train_data_dir,
        resolution=args.resolution,
        channels=plain.sample_shape[0] if args.resolution else None,
    )
    trained_on, held_out = parts_of(samples, args.held_out_every)
    other = two_nearest(pictures_of(held_out), trained_on)
    near = float(other[:, 0].quantile(OF_HELD_OUT))
    results: dict[str, Any] = {"kind": "memorised", "rows": [], **report.surroundings()}
    results |= {"weights": weights_sha256(plain.unet.state_dict()), "held_out": shares(other, near)}
    results |= {"num_trained_on": len(trained_on), "num_held_out": len(held_out), "near": near}
    for guidance in args.guidance:
        ranges = seed_ranges(args.ranges, args.num_samples)
        found = [shares(two_nearest(drawn(pipe, seeds, args.steps, guidance), trained_on), near) for seeds in ranges]
        row = {
            "steps": args.steps or len(plain.scheduler),
            "guidance": guidance,
            "measures": as_pairs(over_ranges(found)),
        }
        results["rows"].append(row | {"ranges": args.ranges, "num_samples": args.num_samples})
        print(row, flush=True)
    if args.output:
        report.write_json(args.output, results)
    print(documents.table_of(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
