"""Whole commands with their start, as they are, and without our kernels and the fast network."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddpm_hf.runs import read_metrics

from .networks import DIGITS, largest
from .processes import NO_KERNELS, run
from .timing import Difference, Timed, Work

OURS, BEFORE = "ours", "without our kernels"
COMPARED_STEPS, LOG_EVERY = 40, 20  # of training
LOSS = 1e-4  # relative; rounding makes 3e-6 of it within 80 steps, and more later


def train_digits(folder: Path, steps: int, *, kernels: bool) -> list[float]:
    """Training by training/configs/digits.yaml into `folder`; the losses that it logged."""
    shutil.rmtree(folder, ignore_errors=True)  # else it would be resumed
    options = {"config": "training/configs/digits.yaml", "output_dir": folder, "num_steps": steps}
    options |= {"checkpoint_every": steps, "sample_every": 0, "log_every": LOG_EVERY, "cpu_threads": 1}
    given = (f"--{name}={value}" for name, value in options.items())
    run("training/train.py", *given, settings={} if kernels else NO_KERNELS)
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def build_digits_training(quick: bool) -> Work:
    """The demo's network, batch and number of steps; without its samples."""
    root = tempfile.TemporaryDirectory()
    folder, steps = Path(root.name, "run"), 60 if quick else 1000

    def differences() -> list[Difference]:
        ours, before = (train_digits(folder, COMPARED_STEPS, kernels=kernels) for kernels in (True, False))
        pairs = zip(ours, before, strict=True)
        return [Difference("loss, relative", abs(own / other - 1), LOSS) for own, other in pairs]

    calls: dict[str, Callable[[], object]] = {
        BEFORE: lambda: train_digits(folder, steps, kernels=False),
        OURS: lambda: train_digits(folder, steps, kernels=True),
    }
    return Work(calls, differences, unit="process", close=root.cleanup)


def build_digits_sampling(quick: bool) -> Work:
    """16 digits in 1000 steps by `ddpm-hf sample`; what is compared has 50 of them when quick."""
    root = tempfile.TemporaryDirectory()

    def call(name: str, steps: int = 1000) -> Path:
        output = Path(root.name, f"{name}.npy")
        arguments = ["sample", str(DIGITS), "--seeds=0-15", f"--steps={steps}", f"--output={output}"]
        if name == BEFORE:
            run("-m", "ddpm_hf.cli", *arguments, "--no-fast", settings=NO_KERNELS)
        else:
            run("-m", "ddpm_hf.cli", *arguments)
        return output

    compared = 50 if quick else 1000

    def differences() -> list[Difference]:
        ours, before = (np.load(call(name, compared), allow_pickle=False) for name in (OURS, BEFORE))
        return [Difference("images", largest(ours, before), 1e-4)]

    calls = {name: lambda name=name: call(name) for name in (BEFORE, OURS)}
    return Work(calls, differences, unit="process", close=root.cleanup)


COMMANDS: list[Timed] = [
    Timed(
        "commands",
        "training the digits of the demo, 1000 steps (quick: 60), beside DDPM_HF_NATIVE=0",
        build_digits_training,
        {OURS: (1.6, 2.5)},
        rounds=(3, 1),
        baseline=BEFORE,
    ),
    Timed(
        "commands",
        "16 digits, 1000 steps, `ddpm-hf sample`, beside --no-fast and DDPM_HF_NATIVE=0",
        build_digits_sampling,
        {OURS: (1.8, 2.5)},
        rounds=(5, 1),
        baseline=BEFORE,
    ),
]
