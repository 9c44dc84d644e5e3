"""What evaluations are compared with, computed at once."""

from pathlib import Path
from typing import Any

import torch

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.data import load_samples


def digits(split: str, count: int | None = None) -> torch.Tensor:
    """Levels 0 to 16, uint8 [N, 1, 8, 8]."""
    samples = load_samples("digits", split=split)
    return samples.batch(list(range(count or len(samples))))


def of_digits(extractor: Any, name: str, count: int | None = None) -> torch.Tensor:
    """What the extractor says of the first digits of the training split."""
    return extractor((digits("train", count) * (255 / 16)).round().to(torch.uint8))[name]


def drawn(checkpoint: str, seeds: range, **kwargs: Any) -> torch.Tensor:
    pipe: Any = DDPMPaperPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return (255 * pipe(seeds=seeds, output_type="pt", **kwargs).images).round().to(torch.uint8)


def piece_files(tmp_path: Path, kind: str) -> list[Path]:
    (folder,) = (tmp_path / "work").glob(f"{kind}-*")
    return sorted(folder.glob("piece-*.safetensors"))


def without_circumstances(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when, and by how many processes, it was measured."""
    environment = {key: value for key, value in result["environment"].items() if key != "num_processes"}
    return {**result, "environment": environment, "time_utc": None}
