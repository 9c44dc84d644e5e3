"""What a training run tells: metrics.jsonl, a curve, grids of samples, a tracker, and one line of progress."""

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .pictures import (
    image_grid,
    point_density,
    side_by_side,
    training_curves,
)
from .pipeline_ddpm_paper import DDPMPaperPipeline
from .processes import leave_processes


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without one that was cut off or damaged; [] where there is no file."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


class RunLog:
    """Every process counts, only the main one writes. Losses stay on the device until a line is due.

    `folder` receives metrics.jsonl, curves.png, samples/ and samples_over_time.png.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, *, first_step: int, num_steps: int, global_batch_size: int
    ):
        self.accelerator, self.folder, self.global_batch_size = accelerator, folder, global_batch_size
        self.bar = tqdm(
            total=num_steps * global_batch_size,
            initial=first_step * global_batch_size,
            unit="img",
            unit_scale=True,
            mininterval=1.0,
            disable=not accelerator.is_main_process,
        )
        self._restart()

    def _restart(self) -> None:
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.num_steps, self.started, self.paused_s = 0, time.monotonic(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside, sampling or saving, does not count in images/s."""
        before = time.monotonic()
        yield
        self.paused_s += time.monotonic() - before

    def update(self, loss: Tensor) -> None:
        """Count a step with this process's mean loss, 0-d."""
        self.loss_sum += loss
        self.num_steps += 1
        self.bar.update(self.global_batch_size)

    def write(self, step: int, *, epoch: float, grad_norm: Tensor, learning_rate: float) -> None:
        """One line about the steps since the last; the loss is their mean over all processes, who all call this."""
        loss = float(self.accelerator.reduce(self.loss_sum / self.num_steps, reduction="mean"))  # type: ignore[operator]
        seconds = max(time.monotonic() - self.started - self.paused_s, 1e-9)
        numbers = {
            "epoch": round(epoch, 4),
            "loss": loss,
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate,
            "images_per_s": round(self.num_steps * self.global_batch_size / seconds, 1),
        }
        if self.accelerator.is_main_process:
            line = {"step": step, **numbers, "time_utc": datetime.now(UTC).isoformat(timespec="seconds")}
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log(numbers, step=step)
        self.bar.set_postfix(step=step, loss=f"{loss:.4f}", lr=f"{learning_rate:.1e}")
        self._restart()

    def has_samples(self, step: int) -> bool:
        """Whether both grids of `write_samples` are there; on the main process."""
        return all((self.folder / "samples" / f"step-{step}-{kind}.png").is_file() for kind in ("raw", "ema"))

    def write_samples(self, step: int, kind: str, samples: Tensor) -> None:
        """samples/step-N-kind.png from images [N, C, H, W] in [0, 1] or points [N, d], and to the tracker."""
        if not self.accelerator.is_main_process:
            return
        array = samples.cpu().numpy()
        if samples.ndim == 4:
            picture = image_grid(DDPMPaperPipeline.numpy_to_pil(array.transpose(0, 2, 3, 1)))
        else:
            picture = point_density(array)
        path = self.folder / "samples" / f"step-{step}-{kind}.png"
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
        for tracker in self.accelerator.trackers:
            _log_picture(tracker, f"samples/{kind}", picture, step)

    def write_overview(self) -> None:
        """curves.png, from all of metrics.jsonl; samples_over_time.png, up to 8 of the grids with the EMA weights."""
        if not self.accelerator.is_main_process:
            return
        metrics = read_metrics(self.folder / "metrics.jsonl")
        if metrics:
            training_curves(metrics).save(self.folder / "curves.png")
        grids = sorted(self.folder.glob("samples/step-*-ema.png"), key=lambda path: int(path.stem.split("-")[1]))
        if grids:
            chosen = sorted({round(i) for i in np.linspace(0, len(grids) - 1, 8)})
            pictures = [Image.open(grids[i]) for i in chosen]
            side_by_side(pictures).save(self.folder / "samples_over_time.png")

    def close(self) -> None:
        self.bar.close()
        leave_processes(self.accelerator)
        self.accelerator.end_training()
        leave_processes(self.accelerator)


def _log_picture(tracker: Any, name: str, picture: Image.Image, step: int) -> None:
    """Accelerate's trackers take images each in its own way."""
    if tracker.name == "tensorboard":
        tracker.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    elif tracker.name == "wandb":
        import wandb  # type: ignore[import-not-found]

        tracker.log({name: wandb.Image(picture)}, step=step)
    elif tracker.name == "trackio":
        import trackio  # type: ignore[import-not-found]

        tracker.log({name: trackio.Image(picture)}, step=step)
