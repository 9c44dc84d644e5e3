"""The random draws of Algorithm 1 (lines 2–4), which images, timesteps, noise and labels, by the step alone."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ..data import Samples
from ..randomness import keyed_generator, normal


class Batch(NamedTuple):
    """x_0 as stored (uint8 levels [B, C, H, W], or float32 points [B, d]), t int64 [B] 0-based, ε float32 like x_0.

    `quantiles` [B], uniform in [0, 1), are there for another distribution of t: one that changes as training goes on
    cannot be drawn from ahead of time. `labels`, int64 [B], are the classes, and the number of classes where a label
    was dropped; None for samples without labels.
    """

    x_start: Tensor
    t: Tensor
    noise: Tensor
    indices: np.ndarray
    quantiles: np.ndarray
    labels: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The tensors on `device`, copied without waiting where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved = {name: move(value) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**moved)


class KeyedBatches:
    """Every global batch of a run, and any rows of it.

    The data is an endless row of epochs, each a permutation of all samples; batch `step` is the next
    `global_batch_size` of it, so no sample is dropped at an epoch's end. Order, flips, t, noise and dropped labels are
    keyed (seed, purpose, step or epoch, row): processes and accumulation steps only say who computes which rows, and a
    run can start at any step.

    Args:
        samples: the data.
        seed: of every draw.
        global_batch_size: samples per step, over all processes.
        num_timesteps: T.
        random_flip: mirror every other image, at random.
        allowed: the indices of the samples that may be drawn, int64 [N], each once; None for all. So what is held out
            of a memory-mapped array needs no copy of the rest.
        label_dropout: the probability that a sample's label is left out, of samples that have labels.

    Raises ValueError when there are fewer samples than `global_batch_size`.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int,
        global_batch_size: int,
        num_timesteps: int,
        random_flip: bool,
        allowed: np.ndarray | None = None,
        label_dropout: float = 0.0,
    ):
        self.allowed, self.num_samples = allowed, len(samples) if allowed is None else len(allowed)
        if self.num_samples < global_batch_size:
            num_left_out = len(samples) - self.num_samples
            count = f"{self.num_samples} ({num_left_out} are held out)" if num_left_out else self.num_samples
            raise ValueError(
                f"{samples.name} has {count} samples, fewer than global_batch_size={global_batch_size}; "
                "lower global_batch_size or add data"
            )
        self.samples, self.seed, self.random_flip, self.label_dropout = samples, seed, random_flip, label_dropout
        self.global_batch_size, self.num_timesteps = global_batch_size, num_timesteps
        self._epochs: dict[int, np.ndarray] = {}

    def epoch(self, step: int) -> float:
        """Epochs completed before `step`."""
        return step * self.global_batch_size / self.num_samples

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {
                e: order for e, order in self._epochs.items() if e == epoch - 1
            }  # a batch spans two at most
            self._epochs[epoch] = keyed_generator(self.seed, "order", epoch).permutation(self.num_samples)
        return self._epochs[epoch]

    def indices(self, step: int) -> np.ndarray:
        """Sample indices of the global batch `step`, int64 [global_batch_size]."""
        epoch, start = divmod(step * self.global_batch_size, self.num_samples)
        indices = self._order(epoch)[start : start + self.global_batch_size]
        missing = self.global_batch_size - len(indices)
        if missing:
            indices = np.concatenate([indices, self._order(epoch + 1)[:missing]])
        return indices if self.allowed is None else self.allowed[indices]

    def rows(self, step: int, rows: range) -> Batch:
        """The given rows of the global batch `step`."""
        chosen = slice(rows.start, rows.stop)
        indices = self.indices(step)[chosen]
        flip = None
        if self.random_flip:
            flip = keyed_generator(self.seed, "flip", step).random(self.global_batch_size)[chosen] < 0.5
        t = keyed_generator(self.seed, "t", step).integers(self.num_timesteps, size=self.global_batch_size)[chosen]
        noise = normal(self.seed, "noise", step, rows, self.samples.sample_shape)
        quantiles = keyed_generator(self.seed, "t quantile", step).random(self.global_batch_size)[chosen]
        x_start, labels = self.samples.batch(indices, flip), self._labels(step, indices, chosen)
        return Batch(x_start, torch.from_numpy(t.copy()), noise, indices, quantiles, labels)

    def _labels(self, step: int, indices: np.ndarray, chosen: slice) -> Tensor | None:
        """Their classes, or the number of classes where the label is dropped."""
        if self.samples.labels is None:
            return None
        labels = self.samples.labels[indices]
        if self.label_dropout:
            quantiles = keyed_generator(self.seed, "label dropout", step).random(self.global_batch_size)[chosen]
            labels = np.where(quantiles < self.label_dropout, len(self.samples.label_names), labels)
        return torch.from_numpy(labels)


def share_of(global_batch_size: int, micro_steps: int, micro_step: int, rank: int, world_size: int) -> range:
    """The rows of a global batch that one process computes in one accumulation step.

    Raises ValueError where they cannot be cut evenly.
    """
    parts = world_size * micro_steps
    if global_batch_size % parts:
        raise ValueError(
            f"global_batch_size={global_batch_size} cannot be divided among {world_size} processes × "
            f"gradient_accumulation_steps={micro_steps}; choose a multiple of {parts}"
        )
    size = global_batch_size // parts
    start = (micro_step * world_size + rank) * size
    return range(start, start + size)


def batches_of(
    batches: KeyedBatches, accelerator: Accelerator, steps: Iterable[int], *, num_parts: int = 1
) -> Iterator[Batch]:
    """This process's batches of these steps, `num_parts` for each, the next one prepared in a thread meanwhile.

    Raises ValueError, at once, where a global batch cannot be cut evenly.
    """
    size, rank, world_size = batches.global_batch_size, accelerator.process_index, accelerator.num_processes
    shares = [share_of(size, num_parts, part, rank, world_size) for part in range(num_parts)]
    wanted = ((step, share) for step in steps for share in shares)
    return prefetched(batches, wanted, pin_memory=accelerator.device.type == "cuda")


def prefetched(batches: KeyedBatches, wanted: Iterable[tuple[int, range]], *, pin_memory: bool) -> Iterator[Batch]:
    """`batches.rows(step, rows)` for each wanted (step, rows), the next one prepared in a thread meanwhile."""

    def prepare(step: int, rows: range) -> Batch:
        batch = batches.rows(step, rows)
        return batch.pin_memory() if pin_memory else batch

    with ThreadPoolExecutor(max_workers=1) as worker:
        waiting = None
        for step, rows in wanted:
            following = worker.submit(prepare, step, rows)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
