"""Three small checkpoints, and two of them as the page has them."""

from pathlib import Path

import pytest

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.demo.tasks import Model, load


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
