"""The same data, cores and minutes: stock diffusers' training beside ours, by the pictures that come out.

    python benchmarks/head_to_head.py train                  # ten trainings of 15 minutes, two at a time: 80 minutes
    python benchmarks/head_to_head.py measure --output benchmarks/results/head_to_head.json       # an hour
    python benchmarks/head_to_head.py show benchmarks/results/head_to_head.json     # table and plot, renews the docs

Fashion-MNIST without labels, a network of the same channels and layers (3.9 M parameters), float32. Three ways:

- "stock": the loop of diffusers' example script with its own options (benchmarks/fashion/stock_loop.py);
- "stock, better rate": the same with the better of two learning rates, ours and twice ours, by seed 0;
- "ours": training/train.py with training/configs/fashion28.yaml, without its labels, and OURS_IN_MINUTES, which fit so
  short a run: stock's batch, so that both see as many steps per image, and averages over fewer of them. They were
  chosen by the loss on 1,000 test images after five minutes of another seed, among four.

Each run has one core for itself, and two go at the same time, ours beside stock's, so that what else the machine does
slows both; those of the better rate go beside each other. Its clock starts with the first step: starting, saving and
going on (ours is stopped by --max_minutes, and goes on exactly) are not counted. The averaged weights after 5, 10 and
15 minutes draw the same 500 seeds by DDIM in 25 steps, which clips x̂_0. (DPM-Solver++, which does not, draws noise
from networks that know so little yet.) Measures are those of fashion_quality.py; ± is the standard error over three
seeds of training. A run that was made already is not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from digits_quality import over_ranges
from fashion.classifiers import classifiers
from fashion.measures import FRECHET, quality, real_quality
from fashion_quality import Drawer, as_pairs, default_work_dir, line
from speed import documents, fashion_tables, report

SEEDS, MINUTES, BATCH = (0, 1, 2), (5, 10, 15), 16
OURS_IN_MINUTES = {"global_batch_size": BATCH, "learning_rate": 5e-4, "warmup_steps": 200, "ema_decay": 0.995}
RATES = (OURS_IN_MINUTES["learning_rate"], 2 * OURS_IN_MINUTES["learning_rate"])
STEPS, NUM_SAMPLES, FIRST_SEED = 25, 500, 10_000
STOCK_LOOP = report.ROOT / "benchmarks" / "fashion" / "stock_loop.py"
TRAIN = report.ROOT / "training" / "train.py"
CONFIG = report.ROOT / "training" / "configs" / "fashion28.yaml"
PLOT = report.ROOT / "docs" / "pictures" / "head_to_head.png"
OURS, STOCK, STOCK_RATE = "ours", "stock", "stock, better rate"


class Training(NamedTuple):
    """One run: which way, with which learning rate (None: its own) and seed."""

    way: str
    seed: int
    rate: float | None = None

    @property
    def folder_name(self) -> str:
        name = {OURS: "ours", STOCK: "stock", STOCK_RATE: "stock_rate"}[self.way]
        return f"{name}{'' if self.rate is None else f'_{self.rate:g}'}_{self.seed}"

    def commands(self, folder: Path) -> list[list[str]]:
        """Which must run one after the other."""
        if self.way != OURS:
            own = [] if self.rate is None else ["--batch", str(BATCH), "--learning_rate", str(self.rate)]
            minutes = ["--minutes", *(str(each) for each in MINUTES)]
            return [[str(STOCK_LOOP), str(folder), "--seed", str(self.seed), *minutes, *own]]
        common = [str(TRAIN), "--config", str(without_labels(folder))]
        common += [word for name, value in OURS_IN_MINUTES.items() for word in (f"--{name}", str(value))]
        common += ["--seed", str(self.seed), "--cpu_threads", "1", "--sample_every", "1000000"]
        common += ["--checkpoint_every", "1000000", "--keep_checkpoints", "4", "--output_dir", str(folder / "run")]
        spans = [now - before for now, before in zip(MINUTES, (0, *MINUTES), strict=False)]
        return [[*common, "--max_minutes", str(span)] for span in spans]


def without_labels(folder: Path) -> Path:
    """CONFIG, but unconditional, as a file in the folder."""
    options = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    file = folder / "unconditional.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in options.items() if not name.startswith("label_")}))
    return file


def first_trainings() -> list[Training]:
    """In pairs of what runs at the same time; the second learning rate's other seeds come when the better is known."""
    pilots = [Training(STOCK_RATE, 0, rate) for rate in RATES]
    others = [Training(way, seed) for seed in SEEDS for way in (OURS, STOCK)]
    return [*others, *pilots]


def run_all(trainings: Sequence[Training], root: Path) -> None:
    """Two at a time, one core each, in their order."""
    for first in range(0, len(trainings), 2):
        pair = [each for each in trainings[first : first + 2] if not (root / each.folder_name / "done.json").exists()]
        print("training " + " and ".join(each.folder_name for each in pair), flush=True)
        started = [subprocess.Popen([sys.executable, __file__, "one", str(root), *as_words(each)]) for each in pair]
        if any([process.wait() for process in started]):  # waits for both before it looks
            raise RuntimeError("a training failed; see its log.txt")


def as_words(training: Training) -> list[str]:
    return [training.way, str(training.seed), "" if training.rate is None else str(training.rate)]


def run_one(training: Training, root: Path) -> None:
    """One training to its end, with its averaged model after each of MINUTES in folder/MINUTES."""
    folder = root / training.folder_name
    folder.mkdir(parents=True, exist_ok=True)
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    steps = {}
    with (folder / "log.txt").open("a") as log:
        for minutes, command in zip(MINUTES, training.commands(folder), strict=False):
            subprocess.run([sys.executable, *command], stdout=log, stderr=log, env=surroundings, check=True)
            if training.way == OURS:
                checkpoints = (folder / "run" / "checkpoints").glob("step-*")
                steps[f"{minutes:g}"] = max(int(each.name.removeprefix("step-")) for each in checkpoints)
                (folder / f"{minutes:g}").symlink_to(Path("run", "checkpoints", f"step-{steps[f'{minutes:g}']}"))
    if training.way == OURS:
        (folder / "done.json").write_text(json.dumps({"steps": steps, "seed": training.seed}) + "\n")


# ---- measuring -----------------------------------------------------------------------------------------------------


def pictures(root: Path, training: Training, minutes: float, work_dir: Path) -> Any:
    """1,000 of a model, uint8 [N, 28, 28]: the same seeds, sampler and steps for all."""
    drawer = Drawer(root / training.folder_name / f"{minutes:g}", "ddim", work_dir)
    return drawer.draw(range(FIRST_SEED, FIRST_SEED + NUM_SAMPLES), STEPS)


def better_rate(root: Path, work_dir: Path) -> float:
    """The learning rate of the two that brings stock to the smaller distance with seed 0."""

    def distance(rate: float) -> float:
        return quality(pictures(root, Training(STOCK_RATE, 0, rate), MINUTES[-1], work_dir))[FRECHET]

    return min(RATES, key=distance)


def all_trainings(rate: float) -> list[Training]:
    stock = [Training(STOCK_RATE, seed, rate) for seed in SEEDS]
    return [Training(way, seed) for way in (OURS, STOCK) for seed in SEEDS] + stock


def train(root: Path, work_dir: Path) -> None:
    run_all(first_trainings(), root)
    run_all([each for each in all_trainings(better_rate(root, work_dir)) if each.rate and each.seed], root)


def measure(root: Path, work_dir: Path) -> dict[str, Any]:
    """Each way's measures after each of MINUTES, as mean and standard error over its seeds."""
    rate = better_rate(root, work_dir)
    rows = []
    for way in (OURS, STOCK, STOCK_RATE):
        own = [each for each in all_trainings(rate) if each.way == way]
        steps = [json.loads((root / each.folder_name / "done.json").read_text())["steps"] for each in own]
        for minutes in MINUTES:
            found = [quality(pictures(root, each, minutes, work_dir)) for each in own]
            row = {"way": way, "minutes": minutes, "steps": [each[f"{minutes:g}"] for each in steps]}
            rows.append(row | {"measures": as_pairs(over_ranges(found)), "runs": found})
            print(line(f"{way}, {minutes} minutes", rows[-1]["measures"]), flush=True)
    real = as_pairs(real_quality(NUM_SAMPLES, 4))
    return {"rows": rows, "rate": rate, "rates": list(RATES), "batch": BATCH, "real": real, "num_samples": NUM_SAMPLES}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "measure"):
        command = commands.add_parser(name)
        command.add_argument("--runs", type=Path, default=Path("runs/head_to_head"), help="default: %(default)s")
        command.add_argument("--work_dir", type=Path, default=default_work_dir(), help="default: %(default)s")
    command.add_argument("--output", type=Path, metavar="FILE", required=True)
    commands.add_parser("show").add_argument("results", type=Path)
    one = commands.add_parser("one")  # a process of `train`
    for name, kind in (("runs", Path), ("way", str), ("seed", int), ("rate", str)):
        one.add_argument(name, type=kind)
    args = parser.parse_args(argv)
    if args.command == "show":
        fashion_tables.head_to_head_plot(report.read_json(args.results), PLOT)
        return documents.show(args.results)
    if args.command == "one":
        run_one(Training(args.way, args.seed, float(args.rate) if args.rate else None), args.runs)
    elif args.command == "train":
        train(args.runs, args.work_dir)
    else:
        found = {"kind": "head to head", **measure(args.runs, args.work_dir), **report.surroundings()}
        found["accuracy"] = {c.name: c.accuracy for c in classifiers()}
        report.write_json(args.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
