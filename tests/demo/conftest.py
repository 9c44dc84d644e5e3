"""Three small checkpoints, and two of them as the page has them."""

from pathlib import Path

import pytest

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.demo.models import Model, load


@pytest.fixture(scope="session")
def checkpoints(tiny_unet, tiny_mlp, tiny_scheduler, tmp_path_factory) -> Path:
    """A folder of three checkpoints with ten timesteps: `grey`, `colour` and `points`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    DDPMPaperPipeline(tiny_unet(in_channels=1, out_channels=1), tiny_scheduler()).save_pretrained(folder / "grey")
    DDPMPaperPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(folder / "colour")
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained(folder / "points")
    return folder


@pytest.fixture(scope="session")
def grey(checkpoints) -> Model:
    return load([str(checkpoints / "grey")], "cpu")["grey"]


@pytest.fixture(scope="session")
def colour(checkpoints) -> Model:
    return load([str(checkpoints / "colour")], "cpu")["colour"]


@pytest.fixture(scope="session")
def pets(tiny_unet, tiny_scheduler, tmp_path_factory) -> Model:
    """A checkpoint with three classes, of which two have names, and a row for no label."""
    folder = tmp_path_factory.mktemp("pets") / "pets"
    unet = tiny_unet(num_class_embeds=4, null_class=3)
    DDPMPaperPipeline(unet, tiny_scheduler(), id2label={0: "cat", 1: "dog"}).save_pretrained(folder)
    return load([str(folder)], "cpu")["pets"]
