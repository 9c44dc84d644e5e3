"""Features as streams: batches that are read once, checked, and cut into blocks that do not depend on the batches."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 1000


def blocks_of(batches: Iterable[Tensor], argument: str) -> Iterator[Tensor]:
    """The rows of all batches, float64 on the CPU, 1000 at a time: sums over blocks do not depend on the batches.

    Raises ValueError for what is not a finite float [B, D] with the same D in every batch.
    """
    waiting: list[Tensor] = []
    num_rows, num_waiting, width = 0, 0, None
    for batch in batches:
        width = batch.shape[-1] if width is None and batch.ndim == 2 else width
        if batch.ndim != 2 or batch.shape[1] != width or not batch.is_floating_point():
            expected = f"[B, {'D' if width is None else width}]"
            raise ValueError(f"{argument}: a batch is {batch.dtype} {list(batch.shape)}; it must be float {expected}")
        if not bool(torch.isfinite(batch).all()):
            raise ValueError(f"{argument}: NaN or infinity among {len(batch)} rows from {num_rows} on")
        num_rows += len(batch)
        for piece in batch.detach().cpu().split(BLOCK_ROWS):
            waiting.append(piece.double())
            num_waiting += len(piece)
            if num_waiting >= BLOCK_ROWS:
                rows = torch.cat(waiting)
                yield rows[:BLOCK_ROWS]
                waiting, num_waiting = [rows[BLOCK_ROWS:]], num_waiting - BLOCK_ROWS
    if num_waiting:
        yield torch.cat(waiting)


class Stream:
    """A set of features that a metric reads once, and whose width is known before."""

    def __init__(self, batches: Iterable[Tensor], argument: str, *, minimum: int) -> None:
        blocks = blocks_of(batches, argument)
        first = next(blocks, torch.empty(0, 0))
        self.argument, self.minimum, self.width = argument, minimum, first.shape[1]
        self.blocks = itertools.chain([first] if len(first) else [], blocks)

    def rows(self) -> Iterator[Tensor]:
        """The blocks, float64 [B, D]. Raises ValueError after the last for fewer rows than the minimum."""
        num_rows = 0
        for block in self.blocks:
            yield block
            num_rows += len(block)
        if num_rows < self.minimum:
            raise ValueError(f"{self.argument} has {num_rows} samples; it must have at least {self.minimum}")


def two_streams(samples: Iterable[Tensor], reference: Iterable[Tensor], *, minimum: int) -> list[Stream]:
    """Both sets as streams. Raises ValueError where their widths differ."""
    streams = [Stream(samples, "samples", minimum=minimum), Stream(reference, "reference", minimum=minimum)]
    widths = [stream.width for stream in streams]
    if widths[0] != widths[1] and all(widths):
        raise ValueError(f"samples have {widths[0]} features and reference {widths[1]}; they must be of one extractor")
    return streams
