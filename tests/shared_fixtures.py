"""Fixtures that several test files share: recorded truth, tiny networks, schedulers."""

import copy
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import Tensor, nn

from ddpm_hf import DDPMPaperMLP, DDPMPaperScheduler, DDPMPaperUNet

# For tensors as small as the tests', threads only wait for each other: 100 times longer on a busy CPU.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _digits_read_once() -> Iterator[None]:
    """scikit-learn reads its digits from text, and that took longer than many of the tests that use them."""
    read = functools.cache(sklearn.datasets.load_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", lambda **options: copy.deepcopy(read(**options)))
        yield


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Scripts that run inside the tests' process silence logging for all of it."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """training/train.py."""
    from training import train

    return train


class Golden(dict[str, np.ndarray]):
    """The arrays of tests/golden/paper_reference.npz by key; its README.md says what each is."""

    def nchw(self, key: str) -> Tensor:
        """Images of the file, [..., H, W, C], as torch expects them: [..., C, H, W]."""
        return torch.from_numpy(self[key]).movedim(-1, -3).contiguous()


@pytest.fixture(scope="session")
def golden() -> Golden:
    with np.load(Path(__file__).parent / "golden" / "paper_reference.npz") as file:
        return Golden(file)


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """max |actual − expected| / max |expected|: single entries near 0 have no relative precision to speak of."""

    def measure(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())

    return measure


def _randomized(model: nn.Module) -> nn.Module:
    """The model in eval mode with random weights: the paper's initialisation leaves most branches almost 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def tiny_unet() -> Callable[..., DDPMPaperUNet]:
    """tiny_unet(**config): a UNet for 8×8 RGB images with attention; random weights, the same every time."""

    def make(**config) -> DDPMPaperUNet:
        small = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
        return _randomized(DDPMPaperUNet(**{**small, "attention_resolutions": (4,), **config}))

    return make


@pytest.fixture(scope="session")
def tiny_mlp() -> Callable[..., DDPMPaperMLP]:
    """tiny_mlp(**config): the same for points in the plane."""

    def make(**config) -> DDPMPaperMLP:
        return _randomized(DDPMPaperMLP(**{"hidden_size": 16, "num_layers": 2, **config}))

    return make


@pytest.fixture(scope="session")
def tiny_scheduler() -> Callable[..., DDPMPaperScheduler]:
    """tiny_scheduler(**config): ten training timesteps that end in almost pure noise (ᾱ_T = 0.018)."""

    def make(**config) -> DDPMPaperScheduler:
        return DDPMPaperScheduler(**{"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.6, **config})

    return make


@pytest.fixture(scope="session")
def carried_code(tmp_path_factory) -> Iterator[None]:
    """Carried code runs from a folder of diffusers' that all processes share; here from one of this process.

    One for all its tests: Python keeps the folder that it first imported from. And without compiled files, which it
    takes for those of a source of the same size that was written in the same second.
    """
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "dont_write_bytecode", True)
        yield
