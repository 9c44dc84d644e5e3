"""How good are few steps, and how much time do they save?

    python benchmarks/few_steps.py --output benchmarks/results/few_steps.json       # two hours on one core
    python benchmarks/few_steps.py --steps 10 25 --num_samples 64                   # some of it
    python benchmarks/few_steps.py --only "stock DDIM" --output FILE.json           # renews these rows of the file
    python benchmarks/few_steps.py --table benchmarks/results/few_steps.json        # print the table, renew the docs

For the digits network, sped up (ddpm_hf.inference): the Fréchet distance to the real digits (digits_quality.py), and
the share that each of two classifiers is sure of, by number of steps, for our scheduler respaced and for stock's
DDIM, DPM-Solver++ and UniPC built from our configuration, DDIM also with use_clipped_model_output; means over four
ranges of 512 seeds, above 100 steps over two, with their standard errors, and paired with our 50 steps on the same
seeds. Our 1000 steps are the measure: the least number of steps within 10 % of their distance is each scheduler's
answer. Also 50 steps in bfloat16, for what that costs in quality. Needs the extra `train`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from digits_quality import (
    EXCESS,
    FRECHET,
    NUM_RANGES,
    NUM_SAMPLES,
    SURE_BY_C,
    SURE_BY_GAMMA,
    differences,
    drawn,
    over_ranges,
    quality,
    real_quality,
    seed_ranges,
)
from speed import documents, report
from speed.few_steps_tables import BF16, OURS, table

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.inference import speed_up

CHECKPOINT = report.ROOT / "model_cards" / "ddpm-digits"
STEPS = (10, 20, 25, 50, 100, 250, 1000)
DDIM, DDIM_CLIPPED = "stock DDIM", "stock DDIM, use_clipped_model_output"
STOCK = {
    DDIM: "DDIMScheduler",
    DDIM_CLIPPED: "DDIMScheduler",
    "stock DPM-Solver++": "DPMSolverMultistepScheduler",
    "stock UniPC": "UniPCMultistepScheduler",
}
BF16_STEPS, SOLVER_STEPS, DDIM_STEPS, MANY_STEPS = 50, 100, 250, 100
SOLVERS = ("stock DPM-Solver++", "stock UniPC")
NAMES = (OURS, BF16, *STOCK)


def measure(
    pipe: DDPMPaperPipeline, steps: int, num_samples: int, **options: Any
) -> tuple[list[dict[str, float]], float]:
    """Quality of each range of seeds, half as many ranges above 100 steps, and the CPU time of a sample."""
    ranges = seed_ranges(NUM_RANGES if steps <= MANY_STEPS else NUM_RANGES // 2, num_samples)
    began = time.process_time()
    samples = [drawn(pipe, seeds, steps, **options) for seeds in ranges]
    cpu_s = (time.process_time() - began) / (len(ranges) * num_samples)
    return [quality(own) for own in samples], cpu_s


def row_of(name: str, steps: int, found: list[dict[str, float]], cpu_s: float, num_samples: int) -> dict[str, Any]:
    """What is kept of a scheduler at a number of steps: means with errors, and each range for what is paired later."""
    means, real = over_ranges(found), real_quality(num_samples)
    row: dict[str, Any] = {"scheduler": name, "steps": steps, "cpu_s_per_image": cpu_s, "ranges": found}
    for key, measure_name in (
        ("frechet_distance", FRECHET),
        ("confident", SURE_BY_GAMMA),
        ("confident_c10", SURE_BY_C),
    ):
        row |= {key: means[measure_name].value, f"{key}_error": means[measure_name].error}
        row |= {f"{key}_real": real[measure_name].value, f"{key}_real_error": real[measure_name].error}
    return row | {"above_real": means[EXCESS].value}


def pair(rows: list[dict[str, Any]]) -> None:
    """Add each row's difference from our 50 steps on the same seeds, where these were measured."""
    reference = next((r for r in rows if (r["scheduler"], r["steps"]) == (OURS, BF16_STEPS)), None)
    for row in rows if reference else []:
        common = min(len(row["ranges"]), len(reference["ranges"]))
        gap = differences(row["ranges"][:common], reference["ranges"][:common])[FRECHET]
        row["minus_ours_50"] = {"value": gap.value, "error": gap.error}


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


def measure_all(
    checkpoint: str | Path, steps: Sequence[int], num_samples: int, names: Sequence[str] = NAMES
) -> list[dict[str, Any]]:
    rows = []
    pipes = pipelines(checkpoint)
    for name in names:
        options = {"use_clipped_model_output": True} if name == DDIM_CLIPPED else {}
        most = {BF16: BF16_STEPS, DDIM: DDIM_STEPS} | dict.fromkeys(SOLVERS, SOLVER_STEPS)
        chosen = [n for n in steps if n <= most.get(name, n) and (name != BF16 or n == BF16_STEPS)]
        for num_steps in chosen:
            rows.append(row_of(name, num_steps, *measure(pipes[name], num_steps, num_samples, **options), num_samples))
            row = rows[-1]
            print(
                f"{name:20} {num_steps:5} steps: Fréchet distance {row['frechet_distance']:.2f} ± "
                f"{row['frechet_distance_error']:.2f}, sure {row['confident']:.3f} ± {row['confident_error']:.3f}",
                flush=True,
            )
    return rows


def renewed(old: dict[str, Any], new: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The old results with the new rows of these schedulers, and under `later` where these come from."""
    rows = [*new["rows"], *(row for row in old["rows"] if row["scheduler"] not in names)]
    kept = [{**each, "of": [name for name in each["of"] if name not in names]} for each in old.get("later", [])]
    source = {name: value for name, value in new.items() if name not in ("kind", "num_samples", "rows")}
    later = [*(each for each in kept if each["of"]), {**source, "of": [*names]}]
    return {**old, "rows": sorted(rows, key=lambda row: NAMES.index(row["scheduler"])), "later": later}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT, help="of the digits")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES)
    parser.add_argument(
        "--only", choices=NAMES, nargs="+", default=NAMES, help="these; others stay as the output has them"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of results, and renew the docs")
    args = parser.parse_args(argv)
    if args.table:
        return documents.show(args.table)
    torch.set_num_threads(1)
    results = {"kind": "few steps", "num_samples": args.num_samples, **report.surroundings()}
    results["rows"] = measure_all(args.checkpoint, args.steps, args.num_samples, args.only)
    if args.output and args.output.is_file() and tuple(args.only) != NAMES:
        results = renewed(report.read_json(args.output), results, args.only)
    pair(results["rows"])
    if args.output:
        report.write_json(args.output, results)
    if OURS in {row["scheduler"] for row in results["rows"]}:
        print("\n" + table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
