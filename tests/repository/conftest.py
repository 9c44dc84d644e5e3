"""The place where bad input is tried: it stays empty, and nothing of it outlives a test."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture
def place(tmp_path, monkeypatch, tmp_path_factory) -> Iterator[Path]:
    """An empty working folder that stays empty, and no caches, network or other process's state."""
    caches = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("DDPM_HF_CACHE", str(caches))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", caches)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(True)
    yield tmp_path
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)
