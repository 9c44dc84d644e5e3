"""What the tests of training/train.py share."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_runs import train

from training import train as train_py


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """What a run sets for its whole process, taken back."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    AcceleratorState._reset_state(True)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def interrupted(monkeypatch) -> Callable[..., None]:
    """interrupted(folder, after=n, **options): a run that stops without warning after n steps."""

    def run(folder: Path, *, after: int, **options: Any) -> None:
        training_step = train_py.training_step

        def step(run, stream):
            if run.state.step == after:
                raise KeyboardInterrupt
            return training_step(run, stream)

        with monkeypatch.context() as patch:
            patch.setattr(train_py, "training_step", step)
            with pytest.raises(KeyboardInterrupt):
                train(folder, **options)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A tiny run of six steps with checkpoints at 3 and 6, for tests that change nothing of it."""
    return train(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A copy of that run, to go on with."""
    return Path(shutil.copytree(finished_run, tmp_path / "finished"))
