"""Programs of a tree, each in a process of its own: commands, training, and functions that import the package.

Most are forks of this process, which has imported torch and diffusers and nothing of the package: importing these anew
would take longer than most of what is done then. What a user starts by a launcher, or what is about the start itself,
is an interpreter of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SECONDS = 300  # for each process
TINY = """--config training/configs/folder64.yaml --resolution 16 --block_out_channels 16 16 --norm_num_groups 8
    --num_steps 6 --warmup_steps 0 --ema_decay 0.1 --global_batch_size 4 --layers_per_block 1 --attention_resolutions 8
    --sample_every 0 --checkpoint_every 3 --log_every 1 --seed 0 --cpu_threads 1""".split()
IMPORTS = ("accelerate", "datasets", "matplotlib.figure", "pandas", "sklearn.datasets", "torchsde", "yaml")
CLASSES = ("DDIMScheduler", "DDPMPipeline", "DDPMScheduler", "UNet2DModel")  # which diffusers imports when asked


def import_libraries(caches: Path) -> None:
    """All that the forks need of others; no network, and no cache but in the folder `caches`."""
    places = {"HF_HOME": str(caches / "hf"), "DDPM_HF_CACHE": str(caches / "cache"), "HF_HUB_OFFLINE": "1"}
    os.environ.update(places | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    for name in IMPORTS:
        importlib.import_module(name)
    for name in CLASSES:
        getattr(importlib.import_module("diffusers"), name)
    assert "ddpm_hf" not in sys.modules, "the forks could not import that of another tree"


@dataclass(frozen=True)
class Done:
    """What a process left.

    Attributes:
        code: its exit code; that of the signal, negative, where one ended it.
        output: what it wrote to both streams.
        value: what the function returned, as JSON keeps it.
        of_function: whether it was one, whose errors come with a traceback; those of commands should not.
        cpu_seconds: of it and of the processes that it waited for.
    """

    code: int
    output: str
    value: Any = None
    cpu_seconds: float = 0.0
    of_function: bool = False

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in re.split(r"[\r\n]+", self.output) if line.strip()]

    @property
    def last(self) -> str:
        """The last line of the output, which is that of the error where one ended the process."""
        return self.lines[-1] if self.lines else f"no word, exit code {self.code}"

    def refused(self, pattern: str) -> bool:
        """Whether it ended with an error whose last line has the pattern; a command without a traceback."""
        if self.of_function:
            return (
                bool(self.code) and re.match(rf"(ValueError|TypeError|OSError): .*?({pattern})", self.last) is not None
            )
        return bool(self.code) and "Traceback" not in self.output and re.search(pattern, self.last) is not None

    def said(self, pattern: str) -> str | None:
        """The first line with the pattern."""
        return next((line for line in self.lines if re.search(pattern, line)), None)


class Runner:
    """A tree, and an empty folder in which its programs work."""

    def __init__(self, tree: Path, place: Path):
        self.tree, self.place = tree, place
        self.digits = tree / "model_cards" / "ddpm-digits"

    # ---- forks ----

    def python(self, task: Callable[[], Any], **environment: str) -> Done:
        """The function in a fork that imports the package of this tree."""
        return replace(self._fork(task, environment), of_function=True)

    def command(self, *words: str | Path, **environment: str) -> Done:
        """`ddpm-hf` and these words."""

        def task() -> None:
            sys.argv = ["ddpm-hf", *map(str, words)]
            runpy.run_module("ddpm_hf.cli", run_name="__main__", alter_sys=True)

        return self._fork(task, environment)

    def train(self, *words: str | Path, **environment: str) -> Done:
        """training/train.py with a tiny network, 6 steps, and these words."""

        def task() -> None:
            sys.argv = [str(self.tree / "training" / "train.py"), *self.tiny(), *map(str, words)]
            runpy.run_path(sys.argv[0], run_name="__main__")

        return self._fork(task, environment)

    def tiny(self) -> list[str]:
        return [str(self.tree / word) if word.endswith(".yaml") else word for word in TINY]

    def _fork(self, task: Callable[[], Any], environment: Mapping[str, str]) -> Done:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as answer:
            child = os.fork()
            if child == 0:
                self._become(task, output.fileno(), answer, environment)
            _, status, used = os.wait4(child, 0)
            for file in (output, answer):
                file.seek(0)
            value = answer.read()
            seconds = used.ru_utime + used.ru_stime
            return Done(
                os.waitstatus_to_exitcode(status), output.read(), json.loads(value) if value else None, seconds
            )

    def _become(self, task: Callable[[], Any], output: int, answer: Any, environment: Mapping[str, str]) -> None:
        code = 1
        try:
            os.setsid()
            signal.alarm(SECONDS)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.chdir(self.place)
            os.environ.update(environment)
            sys.path.insert(0, str(self.tree))
            try:
                json.dump(task(), answer)
                answer.flush()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # ---- interpreters of their own ----

    def start(self, *words: str | Path, drop: tuple[str, ...] = (), **environment: str) -> Done:
        """`python` and these words, without the variables `drop`."""
        variables = {name: value for name, value in os.environ.items() if name not in drop} | environment
        variables["PYTHONPATH"] = str(self.tree)
        before = os.times()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                env=variables,
                cwd=self.place,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # a launcher's workers are in its group
                code = process.wait()
            output.seek(0)
            text = output.read()
        after = os.times()
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        return Done(code, text, cpu_seconds=seconds)

    def launch(self, *words: str | Path) -> Done:
        """`accelerate launch` with these words, of which the last are training/train.py's."""
        return self.start("-m", "accelerate.commands.launch", *words, drop=("ACCELERATE_USE_CPU",))

    # ---- what users have ----

    def pictures(self, name: str = "photos", count: int = 8) -> Path:
        """A folder of pictures in colour."""
        import numpy as np
        from PIL import Image

        folder = self.place / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        return folder
