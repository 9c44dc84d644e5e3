"""Checkpoints that the tests of the command line use."""

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from ddpm_hf import DDPMPaperPipeline


@pytest.fixture(scope="session")
def images(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """The folder of a checkpoint that draws images like the digits, 8×8 and grey, in ten steps."""
    folder = tmp_path_factory.mktemp("images")
    DDPMPaperPipeline(tiny_unet(in_channels=1, out_channels=1), tiny_scheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def colour(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """The folder of a checkpoint that draws 8×8 images in colour in ten steps."""
    folder = tmp_path_factory.mktemp("colour")
    DDPMPaperPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def points(tiny_mlp, tiny_scheduler, tmp_path_factory) -> str:
    """The folder of a checkpoint that draws points in the plane in ten steps."""
    folder = tmp_path_factory.mktemp("points")
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def own_process() -> Iterator[None]:
    """What a subcommand sets for its whole process is as it was, before and after."""
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)
