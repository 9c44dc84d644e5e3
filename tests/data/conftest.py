"""No test of data reads or writes the user's caches, or the network."""

import huggingface_hub
import pytest


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("DDPM_HF_CACHE", str(folder / "ours"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder
