"""Many image files → their pixels in order, decoded here or in worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch.utils.data import DataLoader

from ..machine import hear_again, postponed
from .decoding import BadImage, Decoded, DecodeOptions, decode

CHUNK_BYTES = 2**18  # of pixels that cross from a worker at once; a few such chunks wait for each worker
MOST_IN_A_CHUNK = 32


class ImageFiles(Protocol):
    """Encoded images in a fixed order; `files[i]` is (label for messages, what Pillow opens, None, or why not)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[str, str | Path | BinaryIO | BadImage | None]: ...


def decoded_in_order(
    files: ImageFiles, options: DecodeOptions, num_workers: int
) -> Iterator[tuple[str, Decoded | str]]:
    """(label, pixels or the reason why there are none) of each file; `num_workers` 0 decodes in this process."""
    decoder = _Decoder(files, options)
    if num_workers == 0:
        return map(decoder.one, range(len(files)))
    # DataLoader runs the worker processes, in order and with bounded memory. It gets a generator of its own: otherwise
    # it would draw a number from torch's global one when it starts.
    loader = DataLoader(
        _Chunks(decoder, _chunk_length(decoder)),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
        worker_init_fn=_started,
    )
    with postponed():
        chunks = iter(loader)
    return chain.from_iterable(chunks)


def _started(worker: int) -> None:
    hear_again()


class _Decoder:
    """One file at a time: its label, and either its pixels or the reason why there are none."""

    def __init__(self, files: ImageFiles, options: DecodeOptions):
        self.files, self.options = files, options
        self.measure_8_bits = True  # until a value above 1 is seen: the set is no set of masks then

    def one(self, index: int) -> tuple[str, Decoded | str]:
        label, file = self.files[index]
        if file is None:
            return label, "the row holds no image"
        if isinstance(file, BadImage):
            return label, str(file)
        try:
            decoded = decode(file, self.options, measure_8_bits=self.measure_8_bits)
        except BadImage as error:
            return label, str(error)
        if decoded.largest.bits == 8 and decoded.largest.value > 1:
            self.measure_8_bits = False
        return label, decoded


class _Chunks:
    """A map-style data set for DataLoader, of several neighbours each: one by one, small images cost more to send."""

    def __init__(self, decoder: _Decoder, length: int):
        self.decoder, self.length = decoder, length

    def __len__(self) -> int:
        return -(-len(self.decoder.files) // self.length)

    def __getitem__(self, chunk: int) -> list[tuple[str, Decoded | str]]:
        start = chunk * self.length
        return [self.decoder.one(index) for index in range(start, min(start + self.length, len(self.decoder.files)))]


def _chunk_length(decoder: _Decoder) -> int:
    """How many images have about CHUNK_BYTES of pixels; without a resolution all are as large as the first."""
    side, num_bytes = decoder.options.resolution, CHUNK_BYTES
    if side is not None:
        num_bytes = 3 * side**2
    elif len(decoder.files) and isinstance(first := decoder.one(0)[1], Decoded):
        num_bytes = first.pixels.nbytes
    return min(max(1, CHUNK_BYTES // num_bytes), MOST_IN_A_CHUNK)


def _unchanged(item: Any) -> Any:
    return item  # a named function, because a lambda cannot be sent to worker processes
