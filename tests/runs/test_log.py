"""The run's record: metrics.jsonl, pictures, images/s, one line of progress, trackers that work and that fail."""

import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
import torch
import tqdm.std
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from fork_server import Forked
from PIL import Image

from ddpm_hf.runs import RunLog, log as run_log, read_metrics
from ddpm_hf.runs.log import Progress, cut_metrics
from training import train as train_py

ROOT = Path(__file__).parents[2]
TINY = (
    "--block_out_channels 8 --attention_resolutions --layers_per_block 1 --norm_num_groups 4 --global_batch_size 16 "
    "--num_train_timesteps 5 --beta_end 0.5 --num_steps 6 --warmup_steps 2 --ema_decay 0.5 --checkpoint_every 3 "
    "--log_every 1 --sample_every 3 --num_samples 4 --cpu_threads 1"
).split()


class Clock:
    """In place of the module `time`: it stands still until a test moves it."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The log's clock, and tqdm's."""
    clock = Clock()
    monkeypatch.setattr(run_log, "time", clock)
    monkeypatch.setattr(tqdm.std, "time", clock.monotonic)
    return clock


def write_lines(path: Path, steps) -> None:
    path.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps), encoding="utf-8")


# ---- progress ------------------------------------------------------------------------------------------------------

ALL_FOUR = r"(\d[\d,]*)/1,000, (.+) left, 1,234 img/s, loss 0\.0312, lr 2\.0e-04"
NUMBERS = {"images_per_s": 1234.4, "loss": 0.03123, "learning_rate": 2e-4}


def open_terminal(columns: int, rows: int = 24) -> tuple[int, int]:
    """A pseudo terminal of this size: the end from which to read what it gets, and the end of those who write."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return master, slave


def all_from(master: int) -> str:
    """What a terminal got, once all who write to it have closed it."""
    drawn = b""
    with contextlib.suppress(OSError):  # how Linux says that they have
        while more := os.read(master, 1 << 16):
            drawn += more
    os.close(master)
    return drawn.decode()


def in_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 80, rows: int = 24) -> Callable[[], str]:
    """Make stderr a terminal of this size; the result returns what it got, and closes it."""
    master, slave = open_terminal(columns, rows)
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    stream = os.fdopen(slave, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)

    def drawn() -> str:
        stream.close()
        return all_from(master)

    return drawn


def test_in_a_terminal_one_line_of_80_columns_has_all_four(clock, monkeypatch):
    terminal = in_terminal(monkeypatch)
    progress = Progress(first_step=0, num_steps=1000, enabled=True)
    for _ in range(101):
        progress.update()
        clock.now += 3.0
    progress.show(**NUMBERS)
    progress.close()
    drawn = terminal()
    lines = [line for line in re.split(r"[\r\n]+", drawn) if line]
    assert drawn.rstrip().count("\n") == 0 and all(len(line) < 80 for line in lines)
    found = re.search(ALL_FOUR + "$", lines[-1])
    assert found and found.groups() == ("101", "45 min")  # 899 steps of 3 s, and the 3 s since the last
    assert lines[-1].startswith(" 10%|") and "█" in lines[-1]


@pytest.mark.parametrize(("columns", "rows"), [(0, 0), (0, 24), (80, 0)])
def test_a_terminal_without_a_size_gets_lines_as_a_file_does(clock, monkeypatch, columns, rows):
    terminal = in_terminal(monkeypatch, columns, rows)
    progress = Progress(first_step=0, num_steps=20, enabled=True)  # so few that a terminal holds what bars would draw
    for _ in range(20):
        progress.update()
        clock.now += 30.0
        progress.show(**NUMBERS)
    progress.close()
    lines = terminal().splitlines()
    assert 9 <= len(lines) <= 11
    for line in lines[1:-1]:
        assert re.fullmatch("step " + ALL_FOUR.replace("1,000", "20"), line)
    assert lines[-1] == "step 20/20, 1,234 img/s, loss 0.0312, lr 2.0e-04"


def test_a_terminal_is_not_drawn_on_more_than_once_a_second(clock, monkeypatch):
    terminal = in_terminal(monkeypatch)
    progress = Progress(first_step=0, num_steps=5000, enabled=True)
    for _ in range(1000):  # 30 draws of 100 bytes, which the terminal can hold until it is read
        progress.update()
        progress.show(**NUMBERS)
        clock.now += 0.02
    progress.close()
    assert 20 <= terminal().count("\r") <= 25  # tqdm itself draws at the start and the end


@pytest.mark.parametrize("shown_every", [1, 100])
def test_a_file_gets_a_line_a_minute_and_no_carriage_returns(clock, capsys, shown_every):
    """Three hours of training at two steps a second: at this rate a week is less than a megabyte."""
    num_steps = 3 * 7200
    progress = Progress(first_step=0, num_steps=num_steps, enabled=True)
    for step in range(1, num_steps + 1):
        progress.update()
        clock.now += 0.5
        if step % shown_every == 0 or step == num_steps:
            progress.show(**NUMBERS)
    progress.close()
    written = capsys.readouterr().err
    assert "\r" not in written and "\x1b" not in written and len(written) < 1e6 * 3 / (7 * 24)
    lines = written.splitlines()
    assert len(lines) > (175 if shown_every == 1 else 100)
    for line in lines[1:-1]:
        assert re.fullmatch("step " + ALL_FOUR.replace("1,000", "21,600"), line)
    assert lines[-1] == "step 21,600/21,600, 1,234 img/s, loss 0.0312, lr 2.0e-04"


def test_a_file_gets_the_first_numbers_at_once_and_none_after_a_stop(clock, capsys):
    progress = Progress(first_step=0, num_steps=1000, enabled=True)
    for _ in range(30):
        progress.update()
        clock.now += 1.0
        progress.show(**NUMBERS)
    progress.close()
    assert capsys.readouterr().err == "step 1/1,000, 1,234 img/s, loss 0.0312, lr 2.0e-04\n"


def test_the_time_left_is_that_of_the_steps_to_come(clock, capsys):
    """After a resumption too."""
    progress = Progress(first_step=600, num_steps=1000, enabled=True)
    assert np.isnan(progress.seconds_left())
    clock.now += 500.0  # compiling
    progress.update()
    assert np.isnan(progress.seconds_left())
    for _ in range(10):
        clock.now += 2.0
        progress.update()
    clock.now += 10.0  # sampling or saving, as often as it will come
    assert progress.n == 611 and progress.seconds_left() == pytest.approx(389 * 3.0)


def test_other_processes_print_nothing(clock, capsys):
    progress = Progress(first_step=0, num_steps=2, enabled=False)
    for _ in range(2):
        progress.update()
        progress.show(**NUMBERS)
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_real_run_in_a_terminal_and_into_a_file(tmp_path):
    """Sampling has a bar of its own, which goes away; into a file it writes nothing."""
    command = ["training/train.py", *TINY, "--output_dir", str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    master, slave = open_terminal(80)
    process = Forked(command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    drawn = all_from(master)
    assert process.wait() == 0
    bars = [line for line in re.split(r"[\r\n]+", drawn) if "%|" in line]
    assert any("sampling" in line for line in bars)
    assert re.fullmatch(r"100%\|█+\| 6/6, [\d,.]+ img/s, loss \d\.\d{4}, lr \d\.\de-\d\d", bars[-1])
    assert all(len(line.replace("\x1b[A", "")) < 80 for line in bars)

    command[-1] = str(tmp_path / "unknown size")
    master, slave = pty.openpty()  # 0 x 0, until somebody sets its size
    process = Forked(command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    lines = [line for line in re.split(r"[\r\n]+", all_from(master)) if line.startswith("step ")]
    assert process.wait() == 0 and lines[-1].startswith("step 6/6, ")

    command[-1] = str(tmp_path / "again")
    done = fork_server.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert "\r" not in done.stderr and "sampling" not in done.stderr and "%|" not in done.stderr
    assert 2 <= len(lines) <= 3 and lines[0].startswith("step 1/6, ") and lines[-1].startswith("step 6/6, ")


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


def test_curves_are_drawn_from_all_lines_and_shown_in_the_report(tmp_path):
    tables = {"Options": [("option", "here"), ("seed", 17)]}
    log = RunLog(Accelerator(cpu=True), tmp_path, first_step=4, num_steps=10, global_batch_size=4, tables=tables)
    log.write_overview()
    assert not (tmp_path / "curves.png").exists()  # nothing to draw yet
    for step in (5, 6):
        log.update(torch.tensor(0.25))
        log.write(step, epoch=0, grad_norm=torch.tensor(1.0), learning_rate=0.1)
    log.write_overview()
    log.close()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "6 of 10" in page and "0.25" in page and "17" in page and 'src="curves.png"' in page
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


# ---- trackers ------------------------------------------------------------------------------------------------------


FAILING = ["start", "store_init_configuration", "log", "finish", "picture"]


@pytest.fixture
def fails(request, monkeypatch, caplog) -> list[tuple]:
    """The calls of the tracker's method `request.param`, each of which fails."""
    pytest.importorskip("tensorboard")
    caplog.set_level(logging.WARNING)
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        raise ConnectionError("no route\nto host")

    owner, name = (run_log, "_log_picture") if request.param == "picture" else (TensorBoardTracker, request.param)
    monkeypatch.setattr(owner, name, fail)
    AcceleratorState._reset_state(True)
    yield calls
    AcceleratorState._reset_state(True)


def assert_one_warning(caplog) -> None:
    (warning,) = [record for record in caplog.records if record.name == "ddpm_hf.runs.log"]
    assert warning.levelno == logging.WARNING and "\n" not in warning.getMessage()
    assert "ConnectionError: no route to host" in warning.getMessage() and "metrics.jsonl" in warning.getMessage()


@pytest.mark.parametrize("fails", FAILING, indirect=True)
def test_a_tracker_that_fails_is_named_once_and_left_out(fails, tmp_path, caplog):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    run_log.start_trackers(accelerator, {"seed": 0, "block_out_channels": [8]})
    log = RunLog(accelerator, tmp_path, first_step=0, num_steps=2, global_batch_size=4)
    for step in (1, 2):
        log.update(torch.tensor(1.0))
        log.write(step, epoch=0, grad_norm=torch.tensor(1.0), learning_rate=0.1)
        log.write_samples(step, "ema", torch.zeros(1, 1, 8, 8))
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert (tmp_path / "samples" / "step-2-ema.png").is_file() and len(fails) == 1
    assert_one_warning(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["log"], indirect=True)
def test_training_ends_without_the_tracker_that_failed(fails, tmp_path, caplog):
    train_py.main([*TINY, "--output_dir", str(tmp_path), "--report_to", "tensorboard"])
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "model_index.json").exists() and len(fails) == 1
    assert_one_warning(caplog)


@pytest.mark.slow
def test_trackio_gets_numbers_and_pictures_without_network(tmp_path):
    """Whoever connects, or still listens when training is over, is seen."""
    pytest.importorskip("trackio")
    place = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "home")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRACKIO_"))}
    script = f"""
import socket, psutil
connected = []
for name in ("connect", "connect_ex"):
    def watched(self, address, name=name, original=getattr(socket.socket, name)):
        if self.family != socket.AF_UNIX:
            connected.append((name, address))
        return original(self, address)
    setattr(socket.socket, name, watched)
from training import train
train.main({[*TINY, "--output_dir", str(tmp_path / "run"), "--report_to", "trackio"]!r})
me = psutil.Process()
assert not connected, connected
assert not [c for process in (me, *me.children(recursive=True)) for c in process.net_connections("inet")]
"""
    run = {"cwd": ROOT, "env": environment | place, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", script], **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr

    def asked(*words: str) -> Any:
        command = [sys.executable, "-m", "trackio.cli", *words, "--project", "ddpm_hf", "--json"]
        return json.loads(subprocess.run(command, check=True, **run).stdout)  # type: ignore[call-overload]

    (name,) = asked("list", "runs")["runs"]
    losses = asked("get", "metric", "--run", name, "--metric", "loss")["values"]
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(value["step"], value["value"]) for value in losses] == [(line["step"], line["loss"]) for line in metrics]
    for kind in ("raw", "ema"):
        images = asked("get", "metric", "--run", name, "--metric", f"samples/{kind}")["values"]
        assert [image["step"] for image in images] == [3, 6]
        for image in images:
            stored = tmp_path / "trackio" / "media" / image["value"]["file_path"]
            ours = tmp_path / "run" / "samples" / f"step-{image['step']}-{kind}.png"
            with Image.open(stored) as theirs, Image.open(ours) as mine:
                assert np.array_equal(np.asarray(theirs.convert("RGB")), np.asarray(mine.convert("RGB")))
