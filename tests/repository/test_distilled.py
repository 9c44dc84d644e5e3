"""benchmarks/distilled.py: its parts on tiny models, and its tables. Nothing here is good or fast."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet, pictures
from ddpm_hf.distillation import student_scheduler

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import distilled  # noqa: E402  # pyright: ignore[reportMissingImports]
from speed import distilled_tables  # noqa: E402  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """A teacher of 20 timesteps, and a run with students of 20, 4 and 2 steps; none of them was ever trained."""
    teacher, run = tmp_path_factory.mktemp("teacher"), tmp_path_factory.mktemp("run")
    config: Any = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "attention_resolutions": ()}
    unet = DDPMPaperUNet(sample_size=8, layers_per_block=1, norm_num_groups=4, **config)
    scheduler = DDPMPaperScheduler(num_train_timesteps=20, beta_end=0.5)
    DDPMPaperPipeline(unet, scheduler).save_pretrained(teacher)
    for steps in (20, 4, 2):
        student = DDPMPaperPipeline(unet, student_scheduler(scheduler), num_inference_steps=steps)
        student.save_pretrained(run / "stages" / f"{steps}-steps")
    return teacher, run


def test_the_students_of_a_run_are_found(models):
    found = distilled.students_in(models[1])
    assert list(found) == [4, 2]
    for steps, pipe in found.items():
        pipe(seeds=[0], output_type="np")
        assert pipe.num_timesteps == steps


def test_the_picture_has_a_row_for_all_steps_and_for_each_student(models):
    teacher, run = models
    students = [distilled.loaded(run / "stages" / f"{steps}-steps") for steps in (20, 4, 2)]
    rows = [student(seeds=range(3)).images for student in students]
    columns = ["seed 0", "seed 1", "seed 2"]
    expected = pictures.labelled_grid(rows, row_labels=["20", "4", "2"], column_labels=columns, corner="steps")
    drawn = distilled.picture_of(run, teacher, range(3))
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_solvers_begin_at_the_end_of_the_process(models):
    teacher = distilled.loaded(models[0])
    for name in distilled.SOLVERS:
        assert distilled.with_solver(teacher, name).own_scheduler(4).timesteps[0] == 19


@pytest.mark.slow
def test_digits_are_measured_and_become_a_table(models):
    teacher, run = models
    found = distilled.of_digits(run, teacher, num_samples=64, num_ranges=2)
    samplers = {(row["sampler"], row["steps"]) for row in found["rows"]}
    assert samplers >= {("student", 4), ("student", 2), ("DDIM", 4), ("DDIM", 2)}
    for row in found["rows"]:
        both = [here["Fréchet distance"] - there["Fréchet distance"]
                for here, there in zip(row["ranges"], found["teacher"]["ranges"], strict=True)]  # fmt: skip
        assert row["minus_teacher"]["value"] == pytest.approx(np.mean(both))
    assert found["times"]["teacher_steps"] == 20 and [each["steps"] for each in found["times"]["students"]] == [4, 2]
    text = distilled_tables.of_digits(found)
    assert text.count("**") == 2 * 2  # the best solver of each number of steps
    for row in (found["teacher"], *found["rows"]):
        assert f"| {row['sampler']} | {row['steps']} |" in text


def test_the_mixtures_draws_are_the_same_at_every_call():
    points = distilled.mixture_points("train")
    assert points.shape == (distilled.NUM_TRAINED_ON, 2) and points.dtype == np.float32
    assert (points == distilled.mixture_points("test")).all()
    np.testing.assert_allclose(points.mean(axis=0), distilled.MIXTURE.mean, atol=0.01)  # 4 standard errors


def test_the_table_of_points_shows_what_is_refused():
    rows = [
        {"sampler": "distilled MLP", "steps": 2, "deviations": 1.26},
        {"sampler": "DDIM", "steps": 2, "deviations": 40.0},
        {"sampler": "DDIM", "steps": 1, "deviations": None, "refused": "…"},
    ]
    text = distilled_tables.of_points({"rows": rows, "num_points": 4000, "chance": 0.001})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:4]]
    assert lines[0] == ["", "2 steps", "1 step"]
    assert lines[2:] == [["distilled MLP", "1.3", ""], ["DDIM", "40.0", "refused"]]
