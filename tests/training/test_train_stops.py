"""Signals and time limits end training/train.py in one line, with the step saved and no step lost."""

import os
import shlex
import signal
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import psutil
import pytest
from PIL import Image
from tiny_runs import (
    ROOT,
    TORCHRUN,
    build,
    column,
    final_hashes,
    finish,
    finish_pair,
    send_when,
    start,
    start_pair,
    train,
)

from ddpm_hf.machine import Stopped
from ddpm_hf.runs import KeyedBatches, RunFolder, checkpoints, read_metrics, setup, watching
from training import train as train_py

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        pytest.param(signal.SIGINT, 130, "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_its_step_and_loses_none(tmp_path, number, code, name):
    options = {"num_steps": 60, "checkpoint_every": 200, "dropout": 0.2, "random_flip": True}
    folder = tmp_path / "stopped"
    process = start(folder, **{**options, "num_steps": 2000})
    output = send_when(process, number, lambda: len(read_metrics(folder / "metrics.jsonl")) >= 10)
    assert process.returncode == code
    (step,) = (int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())
    lines = [line for line in output.splitlines() if "stopped" in line]
    assert lines == [f"stopped by {name} after step {step}, which is saved; the same command goes on"]
    assert "Traceback" not in output and step >= 10
    options["num_steps"] = step + 10
    whole = train(tmp_path / "whole", **options)
    train(folder, **options)
    assert final_hashes(folder, step + 10) == final_hashes(whole, step + 10)
    assert column(folder, "step") == list(range(1, step + 11))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_in_one_line(tmp_path, number):
    process = start(tmp_path / "run", interpreter=True)
    maps = Path(f"/proc/{process.pid}/maps")  # the libraries that it has loaded
    output = send_when(process, number, lambda: not maps.exists() or "libtorch" in maps.read_text())
    assert process.returncode == 128 + number and output == f"stopped by {signal.Signals(number).name}\n"
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_images_are_decoded_ends_in_one_line(tmp_path):
    """A terminal sends it to the processes that decode as well."""
    (tmp_path / "photos").mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    picture.save(tmp_path / "photos" / "0.png", compress_level=1)
    for i in range(1, 300):  # minutes of decoding
        (tmp_path / "photos" / f"{i}.png").hardlink_to(tmp_path / "photos" / "0.png")
    data = {"dataset_name": "none", "train_data_dir": tmp_path / "photos", "resolution": 16, "num_workers": 2}
    process = start(tmp_path / "run", start_new_session=True, **data)
    is_decoding = lambda: len(psutil.Process(process.pid).children()) >= 2  # noqa: E731
    output = send_when(process, signal.SIGINT, is_decoding, to_group=True)
    assert process.returncode == 130 and output == "stopped by SIGINT; the same command goes on\n"


def test_max_minutes_stops_with_a_checkpoint_and_names_the_command(tmp_path):
    folder = tmp_path / "a run"
    output = finish(start(folder, max_minutes=1e-5))
    (line,) = (line for line in output.splitlines() if "--max_minutes" in line)
    assert line.startswith("stopped after 1e-05 minutes by --max_minutes at step 1, which is saved; to go on: python ")
    assert checkpoints.verify(folder / "checkpoints" / "step-1") and not (folder / "model_index.json").exists()
    command = shlex.split(line.partition("to go on: ")[2])
    again = fork_server.run(command[1:], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "resuming at step 1" in again.stderr and "at step 2, which" in again.stderr
    train(folder, max_minutes=60)
    assert final_hashes(folder, 6) == final_hashes(train(tmp_path / "whole"), 6)


@pytest.mark.slow
def test_max_minutes_stops_two_processes_after_the_same_step(tmp_path):
    output = finish_pair(start_pair(tmp_path, max_minutes=1e-5))
    assert "at step 1, which is saved; to go on: torchrun --nproc_per_node 2 " in output
    assert checkpoints.verify(tmp_path / "checkpoints" / "step-1")["world_size"] == 2


PHASED = {"num_steps": 6, "checkpoint_every": 2, "sample_every": 2, "num_samples": 4, "sample_steps": 2}


PHASES = {  # where the signal arrives: at the first call of what; and the step that is then saved, the next to end
    "data": (setup, "load_samples", None),
    "network": (setup, "build_network", 1),
    "folder": (checkpoints, "to_resume", 1),
    "batch": (KeyedBatches, "rows", 1),
    "step": (train_py, "losses_of", 1),
    "metrics": (train_py.RunLog, "write", 2),
    "save": (checkpoints, "_write_files", 3),
    "prune": (checkpoints, "prune", 3),
    "sampling": (watching, "sample_together", 2),
}


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed"), **PHASED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "number"), [*((p, signal.SIGTERM) for p in PHASES), ("step", signal.SIGINT), ("save", signal.SIGINT)]
)
def test_a_signal_in_any_phase_loses_no_step(tmp_path, undisturbed_run, monkeypatch, phase, number):
    """Sent by the process to itself, so that it comes exactly there."""
    owner, name, saved = PHASES[phase]
    whole, folder = undisturbed_run, tmp_path / "run"
    original, received = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not received:
            received.append(number)
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with pytest.raises(SystemExit) as exit_info:
            train(folder, **PHASED)
    assert received and exit_info.value.code == 128 + number
    assert [step for step, _ in checkpoints.found_in(folder / "checkpoints")][:1] == ([saved] if saved else [])
    train(folder, **PHASED)
    assert final_hashes(folder, 6) == final_hashes(whole, 6)
    assert column(folder, "step") == column(whole, "step")
    assert {path.name for path in (folder / "samples").iterdir()} == {p.name for p in (whole / "samples").iterdir()}


def test_a_run_that_is_stopped_while_it_draws_samples_saves_and_draws_them_later(tmp_path):
    """Drawing would take minutes here: the signal does not wait for it, and the grid is not lost."""
    slow = {"num_steps": 8, "sample_every": 4, "num_samples": 16, "num_train_timesteps": 20_000, "beta_end": 0.001}
    options = {**slow, "beta_start": 0.0005, "checkpoint_every": 8, "block_out_channels": [32]}
    folder = tmp_path / "run"
    process = start(folder, **options)
    output = send_when(process, signal.SIGTERM, lambda: len(read_metrics(folder / "metrics.jsonl")) >= 4)
    assert process.returncode == 143 and "stopped by SIGTERM after step 4" in output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-4"]
    train(folder, **{**options, "sample_steps": 2})
    names = {f"step-{step}-{kind}.png" for step in (4, 8) for kind in ("raw", "ema")}
    assert {path.name for path in (folder / "samples").iterdir()} == names


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(tmp_path):
    """torchrun passes SIGTERM on, and exits with a code of its own."""
    options = {"num_steps": 2000, "checkpoint_every": 2000}
    process = start(tmp_path, launcher=TORCHRUN, **options)
    output = send_when(process, signal.SIGTERM, lambda: len(read_metrics(tmp_path / "metrics.jsonl")) >= 10)
    assert process.returncode != 0
    (step,) = (int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert f"stopped by SIGTERM after step {step}" in output
    assert checkpoints.verify(tmp_path / "checkpoints" / f"step-{step}")["world_size"] == 2


@pytest.mark.slow
def test_one_of_two_processes_that_is_asked_stops_both(tmp_path):
    options = {"num_steps": 2000, "checkpoint_every": 2000}
    first, second = start_pair(tmp_path, **options)
    send_when(second, signal.SIGTERM, lambda: len(read_metrics(tmp_path / "metrics.jsonl")) >= 10)
    output = first.communicate(timeout=120)[0]
    (step,) = (int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert first.returncode == second.returncode == 143 and f"stopped by SIGTERM after step {step}" in output


def test_a_second_stop_before_the_missing_grid_is_drawn_leaves_the_checkpoint_alone(tmp_path, monkeypatch):
    """It is the only copy of its step; writing it again could only lose it."""
    run = build(tmp_path, sample_every=1, num_steps=2)
    run.state.step = 1
    monkeypatch.setattr(run.state, "save", lambda *args: pytest.fail("saved again"))
    log = train_py.RunLog(run.accelerator, tmp_path, first_step=1, num_steps=2, global_batch_size=16)
    with train_py.StopSignals() as signals:
        signals.received = signal.SIGTERM
        with pytest.raises(Stopped):
            folder = RunFolder(tmp_path, run.accelerator, {})
            watching.Watch(run.options, run.state, run.scheduler, log, folder, signals).write_due(only_missing=True)
    log.close()
