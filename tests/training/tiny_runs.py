"""Runs of training/train.py so small that tests may train them: a network of 10,593 parameters."""

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from accelerate.state import AcceleratorState
from fork_server import Forked, pair_variables
from PIL import Image

from ddpm_hf.runs import Batch, TrainingOptions, checkpoints, parse_options, read_metrics, share_of
from training import train as train_py

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "train.py"
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
TINY = {
    "block_out_channels": [8],
    "layers_per_block": 1,
    "attention_resolutions": [],
    "norm_num_groups": 4,
    "global_batch_size": 16,
    "num_train_timesteps": 20,
    "beta_end": 0.5,
    "num_steps": 6,
    "warmup_steps": 2,
    "ema_decay": 0.5,
    "checkpoint_every": 3,
    "log_every": 1,
    "sample_every": 0,
    "num_samples": 4,
    "cpu_threads": 1,
}
# of the bound, by its importance, over few timesteps: after three steps the network has seen each often enough
IMPORTANCE = {"objective": "vlb", "timestep_sampling": "loss_history", "num_train_timesteps": 3, "warmup_steps": 0}


def arguments(folder: Path, **options: Any) -> list[str]:
    """The command line of a tiny run in `folder`."""
    words = []
    for name, value in {"output_dir": folder, **TINY, **options}.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return words


def train(folder: Path, *, curves: bool = False, **options: Any) -> Path:
    """Run main() as in a process of its own. Drawing curves.png takes longer than all else, so a blank stands for it.

    Those of test_log.py draw it too, and all that are processes.
    """
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        if not curves:
            patch.setattr("ddpm_hf.runs.log.training_curves", lambda *lines, **marks: Image.new("L", (8, 8)))
        train_py.main(arguments(folder, **options))
    return folder


def refusal(folder: Path, **options: Any) -> str:
    """The line with which main() exits instead of training."""
    with pytest.raises(SystemExit) as exit_info:
        train(folder, **options)
    message = exit_info.value.code
    assert isinstance(message, str), f"exit code {message}"  # Python prints it and exits with 1
    assert message.startswith("train.py: ") and "\n" not in message
    return message


def build(folder: Path, **options: Any) -> Any:
    """The script's Run, ready for training_step."""
    AcceleratorState._reset_state(True)
    parsed = parse_options(
        TrainingOptions, arguments(folder, **options), default_config=CONFIGS[0].with_name("digits.yaml")
    )
    accelerator, samples = train_py.make_accelerator(parsed), train_py.load_data(parsed)
    return train_py.build_run(parsed, accelerator, samples, train_py.hold_out(parsed, accelerator, samples))


def stream_of(run: Any) -> Iterator[Batch]:
    options = run.options
    parts = range(options.gradient_accumulation_steps)
    for step in itertools.count(run.state.step):
        for part in parts:
            yield run.batches.rows(step, share_of(options.global_batch_size, len(parts), part, 0, 1))


def column(folder: Path, name: str) -> list[Any]:
    """A number of every line of metrics.jsonl."""
    return [line[name] for line in read_metrics(folder / "metrics.jsonl")]


def final_hashes(folder: Path, step: int) -> dict[str, str]:
    """sha256 of every file of a checkpoint that holds weights, optimizer or counters."""
    checkpoint = folder / "checkpoints" / f"step-{step}"
    names = [p for p in checkpoint.rglob("*") if p.suffix == ".safetensors" or p.name == "state.json"]
    assert len(names) == 5 + checkpoints.has(checkpoint, "loss_history")
    return {str(p.relative_to(checkpoint)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


def steps_of(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints.found_in(folder / "checkpoints")]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def is_grid_of_four(picture: np.ndarray) -> bool:
    """2 × 2 small images, each enlarged to 64 pixels or a little more (a frame), and not all alike."""
    height, width, _ = picture.shape
    return height == width and 128 <= height <= 160 and (picture[:64, :64] != picture[-64:, -64:]).any()


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def start(
    folder: Path,
    *,
    launcher: Sequence[str] = (),
    interpreter: bool = False,
    start_new_session: bool = False,
    variables: Mapping[str, str] | None = None,
    command: Sequence[str] = (),
    **options: Any,
) -> subprocess.Popen:
    """The script in a process of its own: a fork, unless there is a launcher, or an interpreter is wanted.

    `command` is another script with its words.
    """
    words = [*launcher, *(command or [str(SCRIPT), *arguments(folder, **options)])]
    streams: Any = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    place: Any = {
        "cwd": ROOT,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(variables or {})},
    }
    if launcher or interpreter:
        return subprocess.Popen([sys.executable, *words], start_new_session=start_new_session, **streams, **place)
    return Forked(words, start_new_session=start_new_session, **streams, **place)


def start_pair(folder: Path, **options: Any) -> list[subprocess.Popen]:
    """Two processes as torchrun would start them."""
    return [start(folder, variables=variables, **options) for variables in pair_variables()]


def finish_pair(pair: list[subprocess.Popen]) -> str:
    """What the first printed."""
    first, _ = [finish(process) for process in pair]
    return first


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def send_when(process: subprocess.Popen, number: int, is_due: Callable[[], bool], *, to_group: bool = False) -> str:
    """Send the signal to the process, or its group, as soon as `is_due`, and return what it printed."""
    deadline = time.monotonic() + 300
    while not is_due() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    if to_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.communicate(timeout=120)[0]


def kill_when(process: subprocess.Popen, is_due: Callable[[], bool]) -> None:
    """kill -9 to the process and all it started, as soon as `is_due`."""
    deadline = time.monotonic() + 300
    while not is_due() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    kill(process)


def kill(process: subprocess.Popen) -> None:
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:  # torchrun puts its processes into sessions of their own
        each.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
