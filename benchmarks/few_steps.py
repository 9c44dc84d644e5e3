"""How good are few steps, and how much time do they save?

    python benchmarks/few_steps.py --output benchmarks/results/few_steps.json       # about ten minutes on two cores
    python benchmarks/few_steps.py --steps 10 25 --num_samples 64                   # some of it
    python benchmarks/few_steps.py --table benchmarks/results/few_steps.json        # print the table, renew the docs

For the digits network, sped up (ddpm_hf.inference): the Fréchet distance of 256 samples to the real digits
(digits_quality.py), and the share of them that a classifier is sure of, by number of steps, for our scheduler
respaced and for stock's DDIM, DPM-Solver++ and UniPC built from our configuration. Our 1000 steps are the measure: the
least number of steps within 10 % of their distance is each scheduler's answer. Also the 1000 steps in bfloat16, for
what that costs in quality. Needs the extra `train`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from digits_quality import NUM_SAMPLES, quality
from speed import documents, report
from speed.few_steps_tables import BF16, OURS, table

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.inference import speed_up

CHECKPOINT = report.ROOT / "model_cards" / "ddpm-digits"
STEPS = (10, 20, 25, 50, 100, 250, 1000)
STOCK = {
    "stock DDIM": "DDIMScheduler",
    "stock DPM-Solver++": "DPMSolverMultistepScheduler",
    "stock UniPC": "UniPCMultistepScheduler",
}
SOLVERS = ("stock DPM-Solver++", "stock UniPC")


def measure(pipe: DDPMPaperPipeline, steps: int, num_samples: int) -> dict[str, float]:
    """Quality of `num_samples` samples of the seeds 0, 1, …, and the CPU time of one."""
    began = time.process_time()
    images: Any = pipe(seeds=range(num_samples), num_inference_steps=steps, output_type="np").images  # type: ignore[union-attr]
    cpu_s = (time.process_time() - began) / num_samples
    scores = quality(images.reshape(num_samples, -1) * 16)
    kept = ("frechet_distance", "frechet_distance_real", "confident", "confident_real")
    return {"steps": steps, "cpu_s_per_image": cpu_s, **{name: scores[name] for name in kept}}


def pipelines(checkpoint: str | Path) -> dict[str, DDPMPaperPipeline]:
    """By the scheduler's name, all with the same network."""
    plain = DDPMPaperPipeline.from_pretrained(checkpoint)
    fast = speed_up(plain)
    found = {OURS: fast, BF16: speed_up(plain, torch.bfloat16)}
    for name, scheduler in STOCK.items():
        found[name] = DDPMPaperPipeline(fast.unet, getattr(diffusers, scheduler).from_config(fast.scheduler.config))
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


def measure_all(checkpoint: str | Path, steps: Sequence[int], num_samples: int) -> list[dict[str, Any]]:
    rows = []
    for name, pipe in pipelines(checkpoint).items():
        chosen = [max(steps)] if name == BF16 else steps
        if name in SOLVERS:  # with all T steps diffusers' step past the end of their tables
            chosen = [n for n in steps if n < pipe.scheduler.config["num_train_timesteps"]]
        for num_steps in chosen:
            rows.append({"scheduler": name, **measure(pipe, num_steps, num_samples)})
            row = rows[-1]
            print(
                f"{name:20} {num_steps:5} steps: Fréchet distance {row['frechet_distance']:7.2f}, "
                f"sure {row['confident']:.3f}, {row['cpu_s_per_image']:.4f} s per image",
                flush=True,
            )
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="of the digits")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of results, and renew the docs")
    args = parser.parse_args(argv)
    if args.table:
        print(table(report.read_json(args.table)))
        documents.rewrite_documents()
        return 0
    torch.set_num_threads(1)
    results = {"kind": "few steps", "num_samples": args.num_samples, **report.surroundings()}
    results["rows"] = measure_all(args.checkpoint, args.steps, args.num_samples)
    if args.output:
        report.write_json(args.output, results)
    print("\n" + table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
