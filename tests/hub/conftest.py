"""A run to publish, and a Hub of this process."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils._http as client
import pytest
import yaml
from huggingface_hub import close_session, constants
from local_hub import TOKEN, LocalHub

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.runs import checkpoints


@pytest.fixture(scope="session")
def small_run(tiny_mlp, tiny_scheduler, tmp_path_factory) -> Path:
    """A training run with a checkpoint of points, and with what must stay where it is."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoints.write(
        folder / "checkpoints",
        3,
        save_pipeline=DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained,
        tensors={},
        state={},
        manifest={"options": {}, "world_size": 1},
    )
    (folder / "options.yaml").write_text(yaml.safe_dump({"dataset_name": "ann/birds", "num_samples": 4}))
    line = {"step": 3, "loss": 0.5, "grad_norm": 1.0, "images_per_s": 9.0, "learning_rate": 1e-3}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for name in ("curves.png", "samples/step-3-ema.png", ".env", "optimizer.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}, not really")
    return folder


@pytest.fixture(scope="module")
def _hub() -> Iterator[LocalHub]:
    """One for all tests of a file: a new client reads the machine's certificates, which takes longer than a test."""
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        close_session()
        yield hub
        close_session()


@pytest.fixture
def server(_hub) -> LocalHub:
    """A Hub whose client is this process, without repositories, and with the data set ann/birds."""
    _hub.forget()
    _hub.datasets["ann/birds"] = False
    return _hub


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits of huggingface_hub before it tries again, which take no time."""
    seen: list[float] = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=seen.append))
    return seen
