"""What the tests of the page give its tasks, and how they compare pictures."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ddpm_hf.demo.models import Model

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "model_cards" / "ddpm-digits"
LABELLED = ROOT / "model_cards" / "ddpm-digits-labels"
FOUR_STEPS = ROOT / "model_cards" / "ddpm-digits-4steps"


def ignored(done: float) -> None:
    assert 0 < done <= 1


def some_levels(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.num_levels, model.pipe.sample_shape, generator=generator, dtype=torch.uint8)


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **kwargs: Any) -> str:
    image.save(tmp_path / name, **kwargs)
    return str(tmp_path / name)
