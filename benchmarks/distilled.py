"""How good are distilled models in 8, 4, 2 and 1 steps, beside what solvers make of their teachers?

    python training/distill.py --stages 1000 200 40 8 4 2 1 --num_steps 700 250 250 300 400 400 400 \\
        --output_dir runs/digits-few
    python benchmarks/distilled.py --digits runs/digits-few --points --output benchmarks/results/distilled.json
    python benchmarks/distilled.py --table benchmarks/results/distilled.json       # print the tables, renew the docs
    python benchmarks/distilled.py --digits runs/digits-few --picture docs/pictures/distilled.png

--digits measures the student of each stage of at most 8 steps as digits_quality.py does, over four ranges of 512
seeds: the Fréchet distance to the real digits and the shares about which two classifiers are sure; the same for the
teacher in all its steps, whose distance is subtracted seed by seed, and for diffusers' DDIM, DPM-Solver++, UniPC and
DEIS with the teacher's network at the same steps ("trailing", so that they begin at T). Also the time of 64 digits,
of the teacher in all its steps and of each student, in turns, the median of several.

--points trains a small MLP on draws of a mixture of Gaussians in the plane, of which everything is known (oracle.py),
distils it, and compares 4,000 samples with exact draws by the energy distance. "exact ε*, DDIM" in a thousand steps is
where a student ends that has learned every stage exactly, in any number of steps. Beside it the solvers, with the MLP
and with the exact ε*. Needs the extra `train`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from digits_quality import (
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
from PIL import Image
from points_quality import energy_distance
from speed import documents, report
from speed.distilled_tables import table

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, pictures
from ddpm_hf.inference import speed_up
from ddpm_hf.oracle import GaussianMixture, OracleNetwork
from ddpm_hf.scheduler import paper_scheduler

CHECKPOINT = report.ROOT / "model_cards" / "ddpm-digits"
SOLVERS = {
    "DDIM": "DDIMScheduler",
    "DPM-Solver++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "DEIS": "DEISMultistepScheduler",
}
STEPS, FEWEST_TIMED = (8, 4, 2, 1), 5
NUM_POINTS, NUM_DRAWS, NUM_TRAINED_ON = 4000, 20, 50_000
MIXTURE = GaussianMixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-0.6, -0.3], [0.5, 0.6], [0.6, -0.5]]),
    torch.tensor([[[0.04, 0.02], [0.02, 0.03]], [[0.02, 0.0], [0.0, 0.06]], [[0.03, -0.02], [-0.02, 0.03]]]),
)
MLP = ["--hidden_size", "96", "--num_layers", "3", "--global_batch_size", "512", "--cpu_threads", "1"]


def with_solver(pipe: DDPMPaperPipeline, name: str) -> DDPMPaperPipeline:
    """The same network with a solver of diffusers that begins at T, built from the model's configuration."""
    solver = getattr(diffusers, SOLVERS[name]).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    solved = DDPMPaperPipeline(pipe.unet, solver)
    solved.set_progress_bar_config(disable=True)
    return solved


def loaded(folder: str | Path) -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline.from_pretrained(folder)
    pipe = speed_up(pipe) if len(pipe.sample_shape) == 3 else pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def students_in(folder: Path) -> dict[int, DDPMPaperPipeline]:
    """By their number of steps, the most first."""
    return {n: loaded(folder / "stages" / f"{n}-steps") for n in STEPS if (folder / "stages" / f"{n}-steps").is_dir()}


# ---- digits --------------------------------------------------------------------------------------------------------


def digits_row(
    name: str, steps: int, found: list[dict[str, float]], teacher: list[dict[str, float]] | None
) -> dict[str, Any]:
    """What is kept of a sampler at a number of steps: means with errors, and the difference from the teacher."""
    means, row = over_ranges(found), {"sampler": name, "steps": steps, "ranges": found}
    for key, measure in (("frechet_distance", FRECHET), ("confident", SURE_BY_GAMMA), ("confident_c10", SURE_BY_C)):
        row[key] = means[measure]._asdict()
    if teacher is not None:
        row["minus_teacher"] = differences(found, teacher)[FRECHET]._asdict()
    print(f"{name:14} {steps:5} steps: Fréchet distance {means[FRECHET]}, sure {means[SURE_BY_GAMMA]}", flush=True)
    return row


def of_digits(folder: Path, checkpoint: Path, num_samples: int, num_ranges: int) -> dict[str, Any]:
    ranges, teacher, students = seed_ranges(num_ranges, num_samples), loaded(checkpoint), students_in(folder)

    def measured(pipe: DDPMPaperPipeline, steps: int | None) -> list[dict[str, float]]:
        return [quality(drawn(pipe, seeds, steps)) for seeds in ranges]

    total = len(teacher.scheduler)
    own = measured(teacher, None)
    found: dict[str, Any] = {"teacher": digits_row("teacher", total, own, None), "rows": []}
    for steps, student in students.items():
        found["rows"].append(digits_row("student", steps, measured(student, None), own))
        for name in SOLVERS:
            try:
                rows = measured(with_solver(teacher, name), steps)
            except ValueError as error:  # a solver may visit no timestep twice
                print(f"{name} {steps} steps: {error}", file=sys.stderr)
                continue
            found["rows"].append(digits_row(name, steps, rows, own))
    found |= {"num_samples": num_samples, "num_ranges": num_ranges, "times": times_of(teacher, students)}
    return found | {"real": real_quality(num_samples)[FRECHET]._asdict()}


def times_of(teacher: DDPMPaperPipeline, students: dict[int, DDPMPaperPipeline]) -> dict[str, Any]:
    """Wall time of 64 digits, in turns so that a busy machine slows all alike, after one call of each."""

    def timed(pipe: DDPMPaperPipeline) -> float:
        began = time.perf_counter()
        pipe(seeds=range(64), output_type="np")
        return time.perf_counter() - began

    pipes = {None: teacher, **students}
    for pipe in pipes.values():
        pipe(seeds=range(64), num_inference_steps=1, output_type="np")
    rounds = [{steps: timed(pipe) for steps, pipe in pipes.items()} for _ in range(FEWEST_TIMED)]
    median = {steps: statistics.median(each[steps] for each in rounds) for steps in pipes}
    several = [{"steps": steps, "s": median[steps]} for steps in students]
    total = len(teacher.scheduler)
    return {"threads": torch.get_num_threads(), "teacher_steps": total, "teacher_s": median[None], "students": several}


def picture_of(folder: Path, checkpoint: Path, seeds: range) -> Image.Image:
    """The same seeds in fewer and fewer steps, a row each; in all steps by the first student, the teacher made v.

    (DDIM with the teacher itself clips x̂_0 and keeps ε̂, so that the two no longer fit x_t: in a thousand steps that
    adds up to washed-out digits.)
    """
    total = len(paper_scheduler(loaded(checkpoint).scheduler))
    rows = {total: loaded(folder / "stages" / f"{total}-steps"), **students_in(folder)}
    images: list[Any] = [pipe(seeds=seeds).images for pipe in rows.values()]  # type: ignore[union-attr]
    columns = [f"seed {seed}" for seed in seeds]
    return pictures.labelled_grid(images, row_labels=[str(n) for n in rows], column_labels=columns, corner="steps")


# ---- points --------------------------------------------------------------------------------------------------------


def mixture_points(split: str) -> np.ndarray:
    """The training data, whatever the split: draws of the mixture, float32 [N, 2]."""
    return MIXTURE.sample(NUM_TRAINED_ON, torch.Generator().manual_seed(0)).float().numpy()


def trained_points(folder: Path, num_steps: int) -> tuple[Path, Path]:
    """A teacher and its students, by the scripts."""
    teacher, students, module = folder / "teacher", folder / "students", Path(__file__).parent
    data = ["--dataset_name", "distilled:mixture_points"]
    common = [*data, "--seed", "0", "--cpu_threads", "1", "--log_every", "500"]
    train = ["train.py", "--config", str(report.ROOT / "training" / "configs" / "points.yaml"), *MLP, *common]
    train += ["--num_steps", str(2 * num_steps), "--sample_every", "0", "--output_dir", str(teacher)]
    stages = ["--stages", "1000", "200", "40", "8", "4", "2", "1", "--num_steps", str(num_steps), "--num_samples", "0"]
    distil = ["distill.py", *common, *stages, "--teacher", str(teacher), "--output_dir", str(students)]
    distil += ["--global_batch_size", "512", "--learning_rate", "1e-3", "--ema_decay", "0.99"]
    for script, *words in (train, distil):
        subprocess.run([sys.executable, str(report.ROOT / "training" / script), *words], check=True, cwd=module)
    return teacher, students


def of_points(folder: Path, num_steps: int, steps: tuple[int, ...] = STEPS) -> dict[str, Any]:
    teacher, students = (
        loaded(path) if path.name == "teacher" else path for path in trained_points(folder, num_steps)
    )
    process = DDPMPaperScheduler(clip_sample=False)
    oracle = DDPMPaperPipeline(OracleNetwork(MIXTURE, process.diffusion), process)  # type: ignore[arg-type]
    truth = MIXTURE.sample(NUM_POINTS * (1 + NUM_DRAWS), torch.Generator().manual_seed(1)).numpy()
    reference, *others = np.split(truth, 1 + NUM_DRAWS)
    between = [energy_distance(other, reference) for other in others]
    chance, mean, rows = float(np.std(between, ddof=1)), float(np.mean(between)), []

    def add(name: str, num: int, pipe: DDPMPaperPipeline) -> None:
        row: dict[str, Any] = {"sampler": name, "steps": num, "deviations": None}
        try:
            pipe.set_progress_bar_config(disable=True)
            samples: Any = pipe(seeds=range(NUM_POINTS), num_inference_steps=num, output_type="np").images  # type: ignore[union-attr]
            row["energy_distance"] = energy_distance(samples.astype(np.float64), reference)
            row["deviations"] = (row["energy_distance"] - mean) / chance
        except ValueError as error:  # a solver may visit no timestep twice
            row["refused"] = str(error)
        print(f"{name:24} {num:5} steps: {row['deviations']}", flush=True)
        rows.append(row)

    add("exact ε*, DDIM", 1000, with_solver(oracle, "DDIM"))
    add("MLP, all steps", 1000, teacher)
    for num, student in students_in(students).items():
        add("distilled MLP", num, student)
    for num in steps:
        for name in SOLVERS:
            add(f"MLP, {name}", num, with_solver(teacher, name))
            add(f"exact ε*, {name}", num, with_solver(oracle, name))
    return {"rows": rows, "num_points": NUM_POINTS, "chance": chance, "num_steps": num_steps}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, metavar="RUN", help="a run of training/distill.py with its stages")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="its teacher; default: ddpm-digits")
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES, help="of a range; default: %(default)s")
    parser.add_argument("--ranges", type=int, default=NUM_RANGES, help="of seeds; default: %(default)s")
    parser.add_argument("--points", action="store_true", help="train, distil and measure points of a known law")
    parser.add_argument("--points_steps", type=int, default=2000, help="optimizer steps of a stage; default: 2000")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="keep the results there, as JSON, beside older ones"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of results, and renew the docs")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of --digits: draw the same seeds in fewer steps")
    args = parser.parse_args(argv)
    if args.table:
        return documents.show(args.table)
    torch.set_num_threads(1)
    if args.picture:
        if not args.digits:
            parser.error("--picture is of --digits")
        picture_of(args.digits, args.checkpoint, range(10)).save(args.picture)
        return 0
    results: dict[str, Any] = report.read_json(args.output) if args.output and args.output.is_file() else {}
    results["kind"] = "distilled"
    if args.digits:
        found = of_digits(args.digits, args.checkpoint, args.num_samples, args.ranges)
        results["digits"] = {**found, **report.surroundings()}
    if args.points:
        with tempfile.TemporaryDirectory() as folder:
            results["points"] = {**of_points(Path(folder), args.points_steps), **report.surroundings()}
    if args.output:
        report.write_json(args.output, results)
    print("\n" + table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
