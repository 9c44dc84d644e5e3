"""What a training command would do: its data, its cost, where it would begin; and a picture of what it sees."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..data import Samples, to_model_range
from ..pictures import as_pictures, image_grid, labelled_grid, point_density
from .batches import Batch, KeyedBatches
from .checkpoints import MANIFEST
from .folder import RunFolder
from .held_out import HeldOut, network_samples
from .options import TrainingOptions
from .records import read_json
from .report import duration
from .updates import Updates
from .watching import described_network, differing_options

CONTACT_SHEET = "contact_sheet.png"
NUM_SHOWN = 48  # samples on the contact sheet; with labels up to 8 in each of up to 20 rows
ROW, MOST_ROWS = 8, 20
MIN_SIDE = 96  # in pixels, of a sample there
MAX_COUNTED = 10_000  # samples behind the statistics
MEASURING_S = 6.0  # seconds that one measured micro-batch may take
MAX_LISTED = 12  # classes, in one line
LINE = 117


class DryRun:
    """The overview of a run that was built and is not started.

    Args:
        options, accelerator, samples: of the run.
        batches, updates: which it would train by; one update is measured, so its weights change.
        folder: of the run, not entered.
        held_out: what it would be evaluated on.
    """

    def __init__(
        self,
        options: TrainingOptions,
        accelerator: Accelerator,
        batches: KeyedBatches,
        updates: Updates,
        folder: RunFolder,
        held_out: HeldOut | None = None,
    ):
        self.options, self.accelerator = options, accelerator
        self.batches, self.updates, self.folder, self.held_out = batches, updates, folder, held_out
        self.samples: Samples = batches.samples

    def show(self) -> None:
        """Print the overview and write `contact_sheet.png`.

        Raises ValueError, after that, where the command would be refused.
        """
        refusal, step = None, 0
        try:
            step = self.first_step()
            start = (
                f"would go on at step {step:,}, from {self.folder.path}/checkpoints" if step else "would begin anew"
            )
            if step >= self.options.num_steps:
                start = f"is trained to step {step:,} already; more with --num_steps"
        except ValueError as error:
            refusal, start = error, f"would be refused: {error}"
        cost = self.cost(step)  # on every process, as the gradient is exchanged
        if self.accelerator.is_main_process:
            for name, lines in self.sections(cost, f"the run {start}").items():
                for i, line in enumerate(lines):
                    print(f"{name if not i else '':10}{line}")
            self.folder.path.mkdir(parents=True, exist_ok=True)
            path = self.folder.path / CONTACT_SHEET
            contact_sheet(self.samples).save(path)
            print(f"{'picture':10}{path} shows what training will see")
        if refusal is not None:
            raise refusal

    def first_step(self) -> int:
        """The step at which the run would go on, 0 for a new one. Raises ValueError where it would be refused."""
        if not self.folder.path.is_dir():
            return 0
        with self.folder:  # which decides once for all processes
            checkpoint = self.folder.checkpoint
        return 0 if checkpoint is None else int(read_json(checkpoint / MANIFEST)["step"])

    def sections(self, cost: list[str], start: str) -> dict[str, list[str]]:
        """The lines of the overview by their headings."""
        samples = self.samples
        said = ("dry_run", "dataset_name", "train_data_dir", "output_dir")
        differing = [
            f"{name} {_short(value)}" for name, value, _ in differing_options(self.options) if name not in said
        ]
        classes = [f"{name} {count:,}" for name, count in samples.class_counts().items()]
        if len(classes) > MAX_LISTED:
            classes = [*classes[:MAX_LISTED], f"and {len(classes) - MAX_LISTED} more"]
        sections = {
            "data": [
                f"{len(samples) + len(samples.skipped):,} samples found in {samples.name}, {len(samples):,} used",
                *samples.notes[:8],
            ],
            "values": statistics(samples),
            "classes": _wrapped(classes),
            "options": ["different from the defaults:", *_wrapped(differing)],
            "network": [described_network(self.updates.state.unet)],
            "cost": cost,
            "start": [start],
        }
        return {name: lines for name, lines in sections.items() if lines}

    def cost(self, first_step: int) -> list[str]:
        """Time and memory of the steps after one, from an update with as large a part of a micro-batch as is quick."""
        updates, device = self.updates, self.accelerator.device
        size = self.batches.global_batch_size // self.accelerator.num_processes // updates.num_parts
        updates.recorded = None  # no CUDA graphs: they pay off after many steps
        updates.model.train()
        updates.begin()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        part, batch = 1, self._rows(1)
        gradient, kept = self._measured(lambda: updates.add_gradient(batch))
        if gradient < MEASURING_S:  # the first is many times slower than those that follow
            updates.begin()
            gradient, kept = self._measured(lambda: updates.add_gradient(batch))
        while gradient < MEASURING_S / 4 and part < size:
            part = min(size, max(4 * part, int(MEASURING_S / 8 / gradient) * part))
            batch = self._rows(part)
            updates.begin()
            gradient, kept = self._measured(lambda batch=batch: updates.add_gradient(batch))
        finish, _ = self._measured(updates.finish)
        with torch.no_grad():
            network: Any = updates.state.unet
            seen = batch.to(device)
            x_start = to_model_range(seen.x_start, self.samples.num_levels)
            conditions = {} if seen.labels is None else {"class_labels": seen.labels}
            forward, _ = self._measured(lambda: network(x_start, seen.t, **conditions))
        per_step = updates.num_parts * gradient * size / part + finish
        parameters = sum(p.numel() for p in network.parameters())
        memory = 20 * parameters + kept * size / part
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) + kept * (size / part - 1)
        rate = size * updates.num_parts * self.accelerator.num_processes / per_step
        num_steps = max(self.options.num_steps - first_step, 0)
        left = f"{num_steps:,} steps" if num_steps else "no step"
        lines = [
            f"{per_step:.3g} s a step ({rate:,.3g} samples/s), measured with {part} of {size} samples of a "
            f"micro-batch: {left} take about {duration(num_steps * per_step)}",
            *self.watching(first_step, num_steps * per_step, forward / part),
        ]
        where = "GPU memory" if device.type == "cuda" else "memory"
        data = _bytes(self.samples.array.nbytes)
        lines.append(
            f"about {_bytes(memory)} of {where} for weights, averages, Adam and activations, {data} for the data"
        )
        return lines

    def watching(self, first_step: int, steps_s: float, forward_s: float) -> list[str]:
        """Times of the grids and evaluations after a step, and of all with `steps_s` of training; none without them.

        `forward_s` is what the network takes for one sample.
        """
        options, held_out = self.options, self.held_out
        timesteps = options.num_train_timesteps
        kinds = {"grid": (options.sample_every, 2 * (options.sample_steps or timesteps) * options.num_samples)}
        if held_out is not None and held_out.parts:
            kinds["evaluation"] = options.eval_every, network_samples(held_out.parts, timesteps)
        of = {"grid": "samples", "evaluation": "held-out samples"}
        lines, total = [], steps_s
        for name, (every, num_samples) in kinds.items():
            count = times_due(every, first_step, options.num_steps)
            seconds = num_samples / self.accelerator.num_processes * forward_s
            total += count * seconds
            if count:
                each = f"takes about {duration(seconds)}" if count == 1 else f"take about {duration(seconds)} each"
                lines.append(f"{count} {name}{'s' if count > 1 else ''} of {of[name]} {each}")
        return [*lines, f"all of it takes about {duration(total)}"] if lines else []

    def _rows(self, size: int) -> Batch:
        return self.batches.rows(0, range(size))

    def _measured(self, work: Callable[[], Any]) -> tuple[float, int]:
        """Seconds that `work` takes, and the bytes it keeps for the backward pass, each storage once."""
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        parameters = {p.untyped_storage().data_ptr() for p in self.updates.state.unet.parameters()}
        self._wait()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            work()
        self._wait()
        return time.perf_counter() - start, sum(size for key, size in kept.items() if key not in parameters)

    def _wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)


def times_due(every: int, first_step: int, num_steps: int) -> int:
    """How often something is due in the steps after `first_step`: at the multiples of `every`, and at the end."""
    if not every or first_step >= num_steps:
        return 0
    return num_steps // every - first_step // every + (num_steps % every > 0)


def statistics(samples: Samples) -> list[str]:
    """Shape and range of the values of up to 10,000 samples, and for images mean and standard deviation by channel."""
    rows = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), MAX_COUNTED)).astype(np.int64))
    values = samples.array[rows]
    of = "" if len(rows) == len(samples) else f", of {len(rows):,} of them"
    if samples.is_points:
        return [f"points {samples.sample_shape}, {values.min():.3g} to {values.max():.3g}{of}"]
    assert samples.num_levels is not None
    channels, height, width = samples.sample_shape
    counts = np.stack([np.bincount(values[:, c].ravel(), minlength=samples.num_levels) for c in range(channels)])
    levels = np.arange(counts.shape[1])
    shares = counts / counts.sum(1, keepdims=True)
    means = shares @ levels
    deviations = np.sqrt(np.maximum(shares @ levels**2 - means**2, 0))
    used = np.flatnonzero(counts.sum(0))
    kind = "grey" if channels == 1 else "colour"
    lines = [
        f"{width} x {height}, {kind}, levels {used[0]} to {used[-1]} of 0 to {samples.num_levels - 1}{of}",
        f"mean {_numbers(means)}, standard deviation {_numbers(deviations)}; {shares[:, 0].mean():.1%} of all values "
        f"are 0, {shares[:, samples.num_levels - 1].mean():.1%} are {samples.num_levels - 1}",
    ]
    if channels == 3 and (values[:, :1] == values).all():
        lines.append("all images are grey in three equal channels: --in_channels 1 --convert_channels saves two")
    return lines


def contact_sheet(samples: Samples) -> Image.Image:
    """Up to 48 samples, evenly over the data, enlarged to at least 96 pixels; with labels a row for each class."""
    if samples.is_points:
        return point_density(samples.array, side=512)
    if samples.labels is not None:
        classes = list(samples.class_counts().items())[:MOST_ROWS]
        rows = [_pictures(samples, np.flatnonzero(samples.labels == c)[:ROW]) for c in range(len(classes))]
        _, height, width = samples.sample_shape
        blank = Image.new("RGB", (width, height), "white")
        return labelled_grid(
            [[*row, *[blank] * (ROW - len(row))] for row in rows],
            row_labels=[_ascii(f"{name} ({count:,})") for name, count in classes],
            column_labels=[""] * ROW,
            min_side=MIN_SIDE,
        )
    rows = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), NUM_SHOWN)).astype(np.int64))
    return image_grid(_pictures(samples, rows), min_side=MIN_SIDE)


def _pictures(samples: Samples, rows: np.ndarray) -> list[Image.Image]:
    assert samples.num_levels is not None
    return as_pictures(samples.batch(rows).float() / (samples.num_levels - 1))


def _wrapped(words: list[str]) -> list[str]:
    """The words with commas, in lines that fit a terminal."""
    lines: list[str] = []
    for word in (f"{word}," for word in words):
        if lines and len(lines[-1]) + 1 + len(word) <= LINE - 10:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [*lines[:-1], lines[-1].rstrip(",")] if lines else []


def _short(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_short(each)}" for name, each in value.items())
    return str(value).replace("[", "").replace("]", "").replace(",", "")


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.1f}" for value in values)


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(count / 2**20, 1):.0f} MiB"
