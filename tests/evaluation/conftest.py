"""A checkpoint of digits, a tiny extractor, and evaluations of the one by the other."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.data import Samples, real_samples
from ddpm_hf.evaluation import Evaluator, Protocol, evaluator as evaluator_module

EXTRACTOR = '''
"""Twelve features of an image, none of which depends on the others in its batch; counts its calls."""

import torch
from ddpm_hf.evaluation.metrics import Extractor

seen = []


class Tiny(Extractor):
    name = "tiny, of patches"

    def extract(self, images):
        seen.append(images.clone())
        patches = images.double().unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean(dim=(3, 5)).flatten(1) / 255
        return {"features": patches, "logits": 8 * patches[:, :5]}


class Faceless(Tiny):
    name = "tiny, without logits"

    def extract(self, images):
        return {"features": super().extract(images)["features"]}
'''


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """A pipeline's folder: 8×8 greyscale images in ten steps."""
    folder = tmp_path_factory.mktemp("checkpoint")
    unet = tiny_unet(in_channels=1, out_channels=1)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)  # so that x̂_0 is not all clip
    DDPMPaperPipeline(unet, tiny_scheduler(variance_type="fixed_large")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rgb(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """The same for colour images."""
    folder = tmp_path_factory.mktemp("rgb")
    DDPMPaperPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def extractor_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extractors")
    (folder / "tiny_extractors.py").write_text(EXTRACTOR, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(extractor_folder, monkeypatch) -> Any:
    """The module of the extractor above; give it as "tiny_extractors:Tiny"."""
    monkeypatch.syspath_prepend(str(extractor_folder))
    module = importlib.import_module("tiny_extractors")
    module.seen.clear()
    return module


@pytest.fixture
def few_digits(monkeypatch) -> None:
    """Samples are compared with the first 40 digits, so that small micro-batches do not make hundreds of pieces."""

    def first(dataset: str, split: str, *args: Any, **kwargs: Any) -> Samples:
        samples = real_samples(dataset, split, *args, **kwargs)
        if split != "train":
            return samples
        return replace(samples, array=samples.array[:40], fingerprint=f"{samples.fingerprint}, 40")

    monkeypatch.setattr(evaluator_module, "real_samples", first)


@pytest.fixture
def evaluator(checkpoint, tmp_path) -> Callable[..., Evaluator]:
    """evaluator(**protocol): of the checkpoint on digits, working in tmp_path."""

    def make(*, source: str | Path = checkpoint, **protocol: Any) -> Evaluator:
        AcceleratorState._reset_state(True)
        given = {"dataset": "digits", "extractor": "tiny_extractors:Tiny", **protocol}
        return Evaluator(Accelerator(cpu=True), str(source), Protocol(**given), work_dir=tmp_path / "work")

    return make
