"""The run's record: metrics.jsonl, pictures, images/s."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from ddpm_hf import run_log
from ddpm_hf.run_log import RunLog, cut_metrics, read_metrics


@pytest.fixture
def log(tmp_path):
    """A log of ten steps of four images in tmp_path."""
    log = RunLog(Accelerator(cpu=True), tmp_path, first_step=0, num_steps=10, global_batch_size=4)
    yield log
    log.close()
    AcceleratorState._reset_state(True)


class Clock:
    """In place of the module `time`: it stands still until told otherwise."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_log, "time", clock)
    return clock


def write_lines(path: Path, steps) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps), encoding="utf-8")


# ---- metrics.jsonl -------------------------------------------------------------------------------------------------


def test_a_line_says_where_the_run_stands(clock, log, tmp_path):
    for loss in (1.0, 2.0, 6.0):
        clock.now += 0.5
        log.update(torch.tensor(loss))
    log.write(3, epoch=0.123456, grad_norm=torch.tensor(0.5), learning_rate=1e-3)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line.pop("time_utc").endswith("+00:00")
    assert line == {
        "step": 3,
        "epoch": 0.1235,
        "loss": 3.0,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "images_per_s": 8.0,
    }


def test_every_line_is_about_the_steps_since_the_last_without_pauses(clock, log, tmp_path):
    for step, (loss, seconds) in enumerate([(1.0, 1.0), (5.0, 2.0)], start=1):
        log.update(torch.tensor(loss))
        clock.now += seconds
        with log.paused():
            clock.now += 1000.0
        log.write(step, epoch=0, grad_norm=torch.tensor(1.0), learning_rate=0.1)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [1.0, 5.0]
    assert [line["images_per_s"] for line in lines] == [4.0, 2.0]


def test_read_metrics_leaves_out_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    write_lines(path, [1, 2])
    whole = read_metrics(path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in whole] == [1, 2] and read_metrics(path) == whole


@pytest.mark.parametrize(("step", "left"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3, 4])])
def test_cut_metrics_keeps_the_lines_up_to_a_step(tmp_path, step, left):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [1, 2, 3, 4])
    before = read_metrics(path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 1, "lo')  # what a killed run leaves
    cut_metrics(path, step)
    assert read_metrics(path) == before[: len(left)]
    assert path.read_text(encoding="utf-8").count("\n") == len(left)  # the next line starts on its own
    assert list(tmp_path.iterdir()) == [path]


def test_cut_metrics_of_a_new_run_makes_no_file(tmp_path):
    cut_metrics(tmp_path / "metrics.jsonl", 0)
    assert not list(tmp_path.iterdir())


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_images_become_a_grid_with_the_values_they_have(log, tmp_path):
    samples = torch.zeros(3, 1, 64, 64)
    samples[1], samples[2] = 1.0, 0.5
    log.write_samples(20, "ema", samples)
    with Image.open(tmp_path / "samples" / "step-20-ema.png") as picture:
        assert picture.size == (128, 128)
        grid = np.asarray(picture.convert("L"))
    assert [grid[0, 0], grid[0, 64], grid[64, 0]] == [0, 255, 128]


def test_colours_keep_their_channels(log, tmp_path):
    samples = torch.tensor([1.0, 0.0, 0.2])[None, :, None, None].expand(1, 3, 64, 64)
    log.write_samples(1, "raw", samples)
    with Image.open(tmp_path / "samples" / "step-1-raw.png") as picture:
        assert picture.getpixel((5, 5)) == (255, 0, 51)


def test_points_become_a_density(log, tmp_path):
    log.write_samples(1, "raw", torch.tensor([[0.5, 0.5]]))
    with Image.open(tmp_path / "samples" / "step-1-raw.png") as picture:
        dark = np.argwhere(np.asarray(picture.convert("L")) < 255)
    assert len(dark) and (dark[:, 0] < picture.height / 2).all() and (dark[:, 1] >= picture.width / 2).all()


def test_curves_are_drawn_from_all_lines(log, tmp_path):
    log.write_overview()
    assert not (tmp_path / "curves.png").exists()  # nothing to draw yet
    for step in (1, 2):
        log.update(torch.tensor(1.0))
        log.write(step, epoch=0, grad_norm=torch.tensor(1.0), learning_rate=0.1)
    log.write_overview()
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) >= 400
        assert len(picture.convert("L").getcolors()) > 10  # lines and letters, not a blank page


def test_samples_over_time_go_from_the_first_grid_to_the_last(tmp_path):
    (tmp_path / "samples").mkdir()
    log = RunLog(Accelerator(cpu=True), tmp_path, first_step=0, num_steps=1, global_batch_size=1)
    log.write_overview()
    assert not (tmp_path / "samples_over_time.png").exists()
    for step in (5, 10, 20, 40, 80, 100, 200, 300, 400, 1000):  # ten, and in the order of numbers, not of names
        Image.new("L", (32, 32), step // 5).save(tmp_path / "samples" / f"step-{step}-ema.png")
        Image.new("L", (32, 32), 255).save(tmp_path / "samples" / f"step-{step}-raw.png")
    log.write_overview()
    log.close()
    with Image.open(tmp_path / "samples_over_time.png") as picture:
        levels = [picture.getpixel((256 // 2 + i * (256 + 8), 128))[0] for i in range(8)]
        assert picture.size == (8 * (256 + 8) - 8, 256)
    assert levels == sorted(levels) and (levels[0], levels[-1]) == (1, 200) and len(set(levels)) == 8
