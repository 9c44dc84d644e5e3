"""What a training run tells: metrics.jsonl, curves, grids of samples, a page, a tracker, and one line of progress."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..machine import leave_processes
from ..pictures import image_grid, point_density, side_by_side, training_curves
from ..pipeline_ddpm_paper import DDPMPaperPipeline
from .records import read_metrics
from .report import Table, duration, write_report

logger = logging.getLogger(__name__)

REDRAW_EVERY_S = 1.0
LINE_EVERY_S = 60.0  # in a file: a week of training is less than a megabyte


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


def can_be_drawn_on(stream: Any) -> bool:
    """Whether it is a terminal that has a size: those that programs open may be 0 wide or high."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return False


class Progress:
    """One line: step, time left, images/s, loss and learning rate, of which the last three come from `tell`.

    A terminal shows it under a bar and draws it anew about once a second. Elsewhere, as in a file or in a terminal
    that does not tell its size, it is printed to stderr when there is something new to tell, at most once a minute,
    and at the end.
    """

    def __init__(self, *, first_step: int, num_steps: int, enabled: bool):
        self.first_step, self.step, self.num_steps, self.enabled = first_step, first_step, num_steps, enabled
        self.is_terminal = can_be_drawn_on(sys.stderr)
        self.started, self.shown, self.told = math.nan, -math.inf, ""
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
            dynamic_ncols=True,
            disable=not (enabled and self.is_terminal),
        )

    def update(self) -> None:
        """Count a step."""
        self.step += 1
        if self.step == self.first_step + 1:
            self.started = time.monotonic()  # the first step compiles, and fills caches
        if self.is_terminal and time.monotonic() - self.shown >= REDRAW_EVERY_S:
            self._show()

    def tell(self, *, images_per_s: float, loss: float, learning_rate: float) -> None:
        speed = f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"
        self.told = f", {speed} img/s, loss {loss:.4f}, lr {learning_rate:.1e}"
        interval = REDRAW_EVERY_S if self.is_terminal else LINE_EVERY_S
        if self.step == self.num_steps or time.monotonic() - self.shown >= interval:
            self._show()

    def seconds_left(self) -> float:
        """At the pace since this process's first step, sampling and saving included; NaN until there is one."""
        num_timed = self.step - self.first_step - 1
        elapsed = time.monotonic() - self.started
        return (self.num_steps - self.step) * elapsed / num_timed if num_timed > 0 else math.nan

    def _show(self) -> None:
        self.shown, left = time.monotonic(), self.seconds_left()
        left_text = f", {duration(left)} left" if left > 0 else ""
        text = f"{self.step:,}/{self.num_steps:,}{left_text}{self.told}"
        if self.is_terminal:
            self.bar.n = self.step
            self.bar.set_description_str(text, refresh=False)
            self.bar.refresh()
        elif self.enabled:
            print(f"step {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line as it is now; for a terminal it is drawn a last time."""
        if not self.bar.disable:
            self._show()
        self.bar.close()


class RunLog:
    """Every process counts, only the main one writes. Losses stay on the device until a line is due.

    `folder` receives metrics.jsonl, curves.png, samples/, samples_over_time.png and report.html, which shows `tables`
    by their headings beside the rest.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        first_step: int,
        num_steps: int,
        global_batch_size: int,
        tables: Mapping[str, Table] | None = None,
    ):
        self.accelerator, self.folder, self.global_batch_size = accelerator, folder, global_batch_size
        self.tables = tables or {}
        enabled = accelerator.is_main_process
        self.progress = Progress(first_step=first_step, num_steps=num_steps, enabled=enabled)
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
        self.progress.update()

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
        with trackers_left_out_if_they_fail(self.accelerator):
            self.accelerator.log(numbers, step=step)
        images_per_s = numbers["images_per_s"]
        self.progress.tell(images_per_s=images_per_s, loss=loss, learning_rate=learning_rate)
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
        with trackers_left_out_if_they_fail(self.accelerator):
            for tracker in self.accelerator.trackers:
                _log_picture(tracker, f"samples/{kind}", picture, step)

    def write_overview(self) -> None:
        """curves.png, from all of metrics.jsonl; samples_over_time.png, up to 8 of the grids with the EMA weights.

        report.html shows them with everything else that is known of the run.
        """
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
        progress = self.progress
        write_report(
            self.folder,
            metrics=metrics,
            step=progress.step,
            num_steps=progress.num_steps,
            seconds_left=progress.seconds_left(),
            tables=self.tables,
        )

    def close(self) -> None:
        self.progress.close()
        leave_processes(self.accelerator)
        with trackers_left_out_if_they_fail(self.accelerator):
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers.clear()
        self.accelerator.end_training()
        leave_processes(self.accelerator)


@contextlib.contextmanager
def trackers_left_out_if_they_fail(accelerator: Accelerator) -> Iterator[None]:
    """A tracker that fails inside is told of in one line and not asked again: training goes on without it."""
    try:
        yield
    except Exception as error:  # whatever a tracker's package may raise
        accelerator.trackers.clear()
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("the tracker failed (%s); this run goes on without it. Nothing is lost: metrics.jsonl and "
                       "samples/ hold the same", cause)  # fmt: skip


def start_trackers(accelerator: Accelerator, options: Mapping[str, Any]) -> None:
    """Start the tracker that `accelerator` was made with, in its project `ddpm_hf`; where it fails, do without it."""
    plain = {name: str(value) if isinstance(value, list) else value for name, value in options.items()}
    with trackers_left_out_if_they_fail(accelerator):
        accelerator.init_trackers("ddpm_hf", config=plain)


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
