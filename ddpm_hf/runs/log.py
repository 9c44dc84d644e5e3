"""The log of a training run: metrics.jsonl, curves, grids of samples, report.html, a tracker, a line of progress."""

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
from tqdm import tqdm

from ..machine import leave_processes, replaced
from ..pictures import image_grid, point_density, side_by_side, training_curves
from ..pipeline_loading import DDPMPaperPipeline
from .records import evaluations, grids_in, lowest_bound, read_metrics
from .report import Rows, duration, write_report

logger = logging.getLogger(__name__)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
        with replaced(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def drop_pictures(folder: Path, step: int) -> None:
    """Delete the grids of samples after `step`: a resumed run draws them again, and a new run others."""
    for path in folder.glob("step-*-*.png"):
        number = path.name.split("-")[1]
        if number.isdecimal() and int(number) > step:
            path.unlink()


def can_be_drawn_on(stream: Any) -> bool:
    """Whether it is a terminal that has a size: those that programs open may be 0 wide or high."""
    try:
        return stream.isatty() and min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return False


class _Lines:
    """A file for tqdm that is no terminal: each drawing becomes a line, and what clears a line becomes nothing."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=self.stream, flush=True)

    def flush(self) -> None:
        self.stream.flush()


class Progress(tqdm):
    """tqdm's bar with step, time left, images/s, loss and learning rate, of which `show` gets the last three.

    A terminal gets one line, drawn anew about once a second. Elsewhere, as in a file or in a terminal of unknown size,
    a line without a bar is printed to stderr when there are new numbers, at most once a minute, and at the end.
    """

    def __init__(self, *, first_step: int, num_steps: int, enabled: bool):
        self.is_terminal = can_be_drawn_on(sys.stderr)
        text = "{n:,}/{total:,}{left}{postfix}"
        how: dict[str, Any]
        if self.is_terminal:
            how = {"bar_format": "{percentage:3.0f}%|{bar}| " + text, "dynamic_ncols": True, "mininterval": 1.0}
        else:  # the delay leaves out tqdm's own first drawing, when there are no numbers yet
            how = {"bar_format": f"step {text}", "file": _Lines(sys.stderr), "leave": False}
            how |= {"mininterval": 0.0, "delay": 1e-9}
        # No smoothing: the time left goes by the pace since the start. No miniters: a step may take a millisecond or
        # an hour, so tqdm looks at the clock at each.
        super().__init__(total=num_steps, initial=first_step, disable=not enabled, smoothing=0, miniters=0, **how)
        self.initial = first_step + 1  # the first step compiles, and fills caches: the pace is that of the others

    def update(self, n: int = 1) -> None:
        """Count a step."""
        if self.n < self.initial:
            self.unpause()
        if self.is_terminal:
            super().update(n)
        else:
            self.n += n

    def show(self, *, images_per_s: float, loss: float, learning_rate: float) -> None:
        """Put these numbers into the line."""
        speed = f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"
        self.set_postfix_str(f"{speed} img/s, loss {loss:.4f}, lr {learning_rate:.1e}", refresh=False)
        if self.n >= self.total:
            self.refresh()
        elif super().update(0) and not self.is_terminal:  # it was time to draw
            self.mininterval = 60.0  # a week of training is less than a megabyte

    def seconds_left(self) -> float:
        """At the pace since this process's first step, sampling and saving included; NaN until there is one."""
        num_timed = self.n - self.initial
        return (self.total - self.n) * super().format_dict["elapsed"] / num_timed if num_timed > 0 else math.nan

    @property
    def format_dict(self) -> dict[str, Any]:
        left = self.seconds_left()
        return {**super().format_dict, "left": f", {duration(left)} left" if left > 0 else ""}


class RunLog:
    """Every process counts, only the main one writes. Losses stay on the device until a line is due.

    `folder` receives metrics.jsonl, curves.png, samples/, samples_over_time.png and report.html, which shows `tables`,
    rows by heading, beside the rest.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        *,
        first_step: int,
        num_steps: int,
        global_batch_size: int,
        tables: Mapping[str, Rows] | None = None,
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
        self._record(step, numbers)
        self.progress.show(images_per_s=numbers["images_per_s"], loss=loss, learning_rate=learning_rate)
        self._restart()

    def write_evaluation(self, step: int, numbers: Mapping[str, Any]) -> None:
        """A line of its own about held-out samples (`numbers_of`); all processes call this."""
        self._record(step, numbers)

    def has_evaluation(self, step: int, evaluated_on: str) -> bool:
        """Whether there is such a line of this step, about the same samples; on the main process."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        return any(line["step"] == step and line.get("evaluated_on") == evaluated_on for line in lines)

    def _record(self, step: int, numbers: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; the numbers in it, and no lists or words, go to the tracker as well."""
        if self.accelerator.is_main_process:
            line = {"step": step, **numbers, "time_utc": datetime.now(UTC).isoformat(timespec="seconds")}
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        with trackers_left_out_if_they_fail(self.accelerator):
            scalars = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
            self.accelerator.log(scalars, step=step)

    def has_samples(self, step: int) -> bool:
        """Whether both grids of `write_samples` are there; on the main process."""
        return all((self.folder / "samples" / f"step-{step}-{kind}.png").is_file() for kind in ("raw", "ema"))

    def write_samples(self, step: int, kind: str, samples: Tensor, *, columns: int | None = None) -> None:
        """samples/step-N-kind.png from images [N, C, H, W] in [0, 1] or points [N, d], and to the tracker.

        `columns` of the grid, by default as many as rows.
        """
        if not self.accelerator.is_main_process:
            return
        array = samples.cpu().numpy()
        if samples.ndim == 4:
            picture = image_grid(DDPMPaperPipeline.numpy_to_pil(array.transpose(0, 2, 3, 1)), columns=columns)
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
            evaluated = evaluations(metrics)
            lowest = lowest_bound(evaluated)
            curves = training_curves(metrics, evaluated, lowest=None if lowest is None else lowest["step"])
            curves.save(self.folder / "curves.png")
        steps = [step for step, kinds in reversed(grids_in(self.folder)) if "ema" in kinds]
        if steps:
            chosen = sorted({round(i) for i in np.linspace(0, len(steps) - 1, 8)})
            pictures = [Image.open(self.folder / "samples" / f"step-{steps[i]}-ema.png") for i in chosen]
            side_by_side(pictures).save(self.folder / "samples_over_time.png")
        write_report(
            self.folder,
            metrics=metrics,
            step=self.progress.n,
            num_steps=self.progress.total,
            seconds_left=self.progress.seconds_left(),
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
    """A tracker that fails inside is named in a one-line warning and not used again: training goes on without it."""
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
