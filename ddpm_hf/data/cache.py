"""Many image files → one uint8 array, decoded once: in memory, or in a mapped file that later runs use."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader

from ..machine import put_in_place, replaced
from .decoding import BadImage, DecodeOptions, decode
from .samples import NUM_LEVELS, finish_digest

CACHE_FORMAT = 1  # raise it when the same files would decode to other pixels
STALE_PARTIAL_S = 3600.0
MOST_NAMED = 10  # bad images in one message


class ImageFiles(Protocol):
    """Encoded images in a fixed order; `files[i]` is (label for messages, what Pillow opens, or None)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[str, str | Path | BinaryIO | None]: ...


class DecodedImages(NamedTuple):
    """`array` is uint8 [N, C, H, W], read-only; `skipped` says "label: reason" of each image left out of it."""

    array: np.ndarray
    fingerprint: str
    skipped: tuple[str, ...]


def decode_all(
    files: ImageFiles,
    options: DecodeOptions,
    *,
    cache: Cache,
    skip_bad_images: int,
    max_memory_bytes: int,
    num_workers: int,
) -> DecodedImages:
    """All images in order; grey ones become RGB as soon as one of them is in colour. Uses `cache` if it is filled.

    Raises:
        ValueError: more than `skip_bad_images` cannot be used, or none can; sizes differ and no resolution is given.
        OSError: the cache's disk has not enough space.
    """
    decoded = cache.read()
    if decoded is None:
        decoded = _fill(files, options, cache, skip_bad_images, max_memory_bytes, num_workers)
    _check_skipped(decoded.skipped, skip_bad_images)
    return decoded


def _fill(
    files: ImageFiles, options: DecodeOptions, cache: Cache, skip: int, max_memory_bytes: int, num_workers: int
) -> DecodedImages:
    # DataLoader runs the worker processes, in order and with bounded memory. It gets a generator of its own: otherwise
    # it would draw a number from torch's global one when it starts.
    loader = DataLoader(
        _Decoder(files, options),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),
    )
    store, first, skipped = None, "", []
    try:
        for label, image in loader:
            if isinstance(image, str):
                skipped.append(f"{label}: {image}")
            if isinstance(image, str) or len(skipped) > skip:  # after too many, only to name all bad images
                continue
            if store is None:
                store, first = _Store(len(files), image.shape, max_memory_bytes, cache), label
            if image.shape[1:] != store.shape[1:]:
                sizes = [f"{width} x {height}" for _, height, width in (store.shape, image.shape)]
                raise ValueError(f"{first} is {sizes[0]}, {label} is {sizes[1]}; pass resolution to make them equal")
            if image.shape[0] > store.shape[0]:
                store = store.in_colour()
            store.append(image)
        _check_skipped(skipped, skip)
        if store is None:
            raise ValueError(f"none of the {len(skipped)} images can be used: {first_of(skipped)}")
        return store.finish(tuple(skipped))
    except BaseException:
        if store is not None:
            store.discard()
        raise


def _check_skipped(skipped: Sequence[str], skip_bad_images: int) -> None:
    if len(skipped) > skip_bad_images:
        count = f"{len(skipped)} bad image{'s' if len(skipped) > 1 else ''}"
        advice = f"skip_bad_images={skip_bad_images} allows no more: mend or remove them, or raise it"
        raise ValueError(f"{count}: {first_of(skipped)} ({advice})")


def first_of(skipped: Sequence[str]) -> str:
    """The first bad images with their reasons, and how many more there are."""
    more = [f"and {len(skipped) - MOST_NAMED:,} more"] if len(skipped) > MOST_NAMED else []
    return "; ".join([*skipped[:MOST_NAMED], *more])


@dataclass(frozen=True)
class _Decoder:
    """A map-style data set for DataLoader: the label, and either pixels [C, H, W] or the reason why there are none."""

    files: ImageFiles
    options: DecodeOptions

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray | str]:
        label, file = self.files[index]
        if file is None:
            return label, "the row holds no image"
        try:
            return label, decode(file, self.options).pixels
        except BadImage as error:
            return label, str(error)


def _unchanged(item: Any) -> Any:
    return item  # a named function, because a lambda cannot be sent to worker processes


class _Store:
    """A growing uint8 array [N, C, H, W], hashed as it grows: in memory, or in a partial file if it is large."""

    def __init__(self, capacity: int, shape: tuple[int, ...], max_memory_bytes: int, cache: Cache):
        self.capacity, self.shape, self.max_memory_bytes, self.cache = capacity, shape, max_memory_bytes, cache
        self.count, self.digest = 0, hashlib.sha256()
        self.file: io.BufferedRandom | None = None
        num_bytes = capacity * math.prod(shape)
        if num_bytes <= max_memory_bytes:
            self.memory = np.empty((capacity, *shape), np.uint8)
        else:
            self.file = cache.create_partial(num_bytes)
            self._write_header(self.file)

    def append(self, image: np.ndarray) -> None:
        """uint8 [C, H, W]; a grey one, [1, H, W], is repeated where the array is in colour."""
        image = np.ascontiguousarray(np.broadcast_to(image, self.shape))
        self.digest.update(image.data)
        if self.file is None:
            self.memory[self.count] = image
        else:
            self.file.write(image.data)  # not through a mapping: there, a full disk ends the process by SIGBUS
        self.count += 1

    def in_colour(self) -> _Store:
        """A store of the same images with three channels, in place of this one of grey images, which is discarded."""
        colour = _Store(self.capacity, (3, *self.shape[1:]), self.max_memory_bytes, self.cache)
        for image in self._array():
            colour.append(image)
        self.discard()
        return colour

    def finish(self, skipped: tuple[str, ...]) -> DecodedImages:
        array = self._array()
        array.flags.writeable = False
        decoded = DecodedImages(array, finish_digest(self.digest, array, NUM_LEVELS), skipped)
        if self.file is not None:
            self.cache.commit(self.file, decoded)
        return decoded

    def discard(self) -> None:
        if self.file is not None:
            self.file.close()
            Path(self.file.name).unlink(missing_ok=True)

    def _array(self) -> np.ndarray:
        if self.file is None:
            return self.memory[: self.count]
        self._write_header(self.file)
        self.file.flush()
        return np.load(self.file.name, mmap_mode="r", allow_pickle=False)

    def _write_header(self, file: io.BufferedRandom) -> None:
        """Write the .npy header with the present count; numpy pads it, so that its length does not depend on N."""
        file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *self.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(0, os.SEEK_END)


class Cache:
    """One entry in a cache folder: `path`.npy, and `path`.json, which appears last and makes the entry valid.

    Its name and its record say what it was made from, so that other files or options never find it. An entry that is
    found is always memory-mapped, even if it would fit in memory. Its content is not hashed again: only its size is
    checked.
    """

    def __init__(self, folder: Path, name: str, source: str, options: DecodeOptions):
        """`source` identifies the files' content; `name` is for people who look into the folder."""
        decoder = {"format": CACHE_FORMAT, "pillow": PIL.__version__, **asdict(options)}
        key = json.dumps({"source": source, "decoder": decoder}, sort_keys=True)
        self.made_from = json.loads(key)
        self.path = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def read(self) -> DecodedImages | None:
        """The images, memory-mapped; None when they are not there, not complete or made from something else."""
        try:
            record = json.loads(self.path.with_suffix(".json").read_text())
            # raises ValueError if the file is cut short, EOFError if it is empty
            array = np.load(self.path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
            if record["made_from"] != self.made_from or array.dtype != np.uint8 or array.ndim != 4:
                return None
            return DecodedImages(array, str(record["fingerprint"]), tuple(map(str, record["skipped"])))
        except (OSError, ValueError, EOFError, KeyError, TypeError):
            return None

    def create_partial(self, num_bytes: int) -> io.BufferedRandom:
        """A new file for this process alone to fill; removes what killed processes left of the same entry.

        Raises:
            OSError: the disk has fewer than `num_bytes` free.
        """
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"{self.path.name}.*.partial"):
            if time.time() - partial.stat().st_mtime > STALE_PARTIAL_S:  # one still in use is younger
                partial.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            need = f"the decoded images need {num_bytes:,} bytes and {free:,} are free"
            raise OSError(errno.ENOSPC, f"{need}; free some, or let DDPM_HF_CACHE name another folder", str(folder))
        return open(folder / f"{self.path.name}.{uuid.uuid4().hex}.partial", "w+b")

    def commit(self, file: io.BufferedRandom, decoded: DecodedImages) -> None:
        """Puts the filled file in its place, so that a crash at any moment leaves a whole entry or none."""
        file.close()
        put_in_place(Path(file.name), self.path.with_suffix(".npy"), durable=True)
        record = {"made_from": self.made_from, "fingerprint": decoded.fingerprint, "skipped": decoded.skipped}
        own = Path(f"{file.name}.json.partial")  # another process may fill the same entry
        with replaced(self.path.with_suffix(".json"), temporary=own) as temporary:
            temporary.write_text(json.dumps(record, indent=1))
