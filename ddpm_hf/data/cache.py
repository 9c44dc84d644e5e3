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
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL

from ..machine import put_in_place, replaced
from .decoding import Decoded, DecodeOptions, Largest
from .samples import NUM_LEVELS, finish_digest
from .workers import ImageFiles, decoded_in_order

CACHE_FORMAT = 2  # raise it when the same files would decode to other pixels
STALE_PARTIAL_S = 3600.0
MOST_NAMED = 10  # bad images in one message


class DecodedImages(NamedTuple):
    """All images that could be used, and what a user should know of the others and of the whole.

    Attributes:
        array: uint8 [N, C, H, W], read-only.
        fingerprint: sha256 over content, dtype, shape and number of levels.
        skipped: "label: reason" of each image that was left out.
        left_out: the indices of these in the files, ascending.
        notes: lines about the whole set, such as a range of values that looks too small.
        first_in_colour: names the image that made a set of grey ones colour, and says how many there are; empty where
            all are grey or all in colour.
    """

    array: np.ndarray
    fingerprint: str
    skipped: tuple[str, ...]
    left_out: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    first_in_colour: str = ""


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
    store, first, survey = None, "", _Survey(options)
    try:
        for index, (label, image) in enumerate(decoded_in_order(files, options, num_workers)):
            if isinstance(image, str):
                survey.skipped.append(f"{label}: {image}")
                survey.left_out.append(index)
            if isinstance(image, str) or len(survey.skipped) > skip:  # after too many, only to name all bad images
                continue
            pixels = image.pixels
            if store is None:
                store, first = _Store(len(files), pixels.shape, max_memory_bytes, cache), label
            if pixels.shape[1:] != store.shape[1:]:
                sizes = [f"{width} x {height}" for _, height, width in (store.shape, pixels.shape)]
                raise ValueError(f"{first} is {sizes[0]}, {label} is {sizes[1]}; pass resolution to make them equal")
            if pixels.shape[0] > store.shape[0]:
                store = store.in_colour()
            store.append(pixels)
            survey.add(label, image)
        _check_skipped(survey.skipped, skip)
        if store is None:
            raise ValueError(f"none of the {len(survey.skipped)} images can be used: {first_of(survey.skipped)}")
        return store.finish(survey)
    except BaseException:
        if store is not None:
            store.discard()
        raise


class _Survey:
    """What is noticed of the images one by one and said of all of them."""

    def __init__(self, options: DecodeOptions):
        self.options = options
        self.skipped: list[str] = []
        self.left_out: list[int] = []
        self.count, self.in_colour, self.colour_label = 0, 0, ""
        self.largest: dict[int, Largest] = {}

    def add(self, label: str, image: Decoded) -> None:
        self.count += 1
        if len(image.pixels) == 3:
            self.colour_label = self.colour_label or label
            self.in_colour += 1
        bits, value, exact = image.largest
        if bits == 0:
            return
        _, before, was_exact = self.largest.get(bits, Largest(bits))
        self.largest[bits] = Largest(bits, max(value, before), exact and was_exact)

    def first_in_colour(self) -> str:
        if self.in_colour in (0, self.count):
            return ""
        return f"the first in colour is {self.colour_label} ({self.in_colour:,} of {self.count:,})"

    def notes(self) -> tuple[str, ...]:
        """A line for each depth of which the values fill a small part: up to 14 bits in 16, or 0 and 1 in 8 bits."""
        notes = []
        for bits, most in ((16, 2**14 - 1), (8, 1)):
            _, value, exact = self.largest.get(bits, Largest())
            if self.options.max_value is None and 0 < value <= most:
                found = f"the largest of its {bits}-bit values is {'' if exact else 'at most '}{value:,}"
                option = f", or give --max_value {value}" if exact else ""
                notes.append(f"{found}: scale them to 0–{2**bits - 1}{option}")
        return tuple(notes)


def _check_skipped(skipped: Sequence[str], skip_bad_images: int) -> None:
    if len(skipped) > skip_bad_images:
        count = f"{len(skipped)} bad image{'s' if len(skipped) > 1 else ''}"
        advice = f"skip_bad_images={skip_bad_images} allows no more: mend or remove them, or raise it"
        raise ValueError(f"{count}: {first_of(skipped)} ({advice})")


def first_of(skipped: Sequence[str]) -> str:
    """The first bad images with their reasons, and how many more there are."""
    more = [f"and {len(skipped) - MOST_NAMED:,} more"] if len(skipped) > MOST_NAMED else []
    return "; ".join([*skipped[:MOST_NAMED], *more])


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
        if image.shape != self.shape:
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

    def finish(self, survey: _Survey) -> DecodedImages:
        array = self._array()
        array.flags.writeable = False
        decoded = DecodedImages(
            array,
            finish_digest(self.digest, array, NUM_LEVELS),
            tuple(survey.skipped),
            tuple(survey.left_out),
            survey.notes(),
            survey.first_in_colour(),
        )
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
            skipped, notes = (tuple(map(str, record[name])) for name in ("skipped", "notes"))
            left_out, colour = tuple(map(int, record["left_out"])), str(record["first_in_colour"])
            return DecodedImages(array, str(record["fingerprint"]), skipped, left_out, notes, colour)
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
        facts = {name: value for name, value in decoded._asdict().items() if name != "array"}
        record = {"made_from": self.made_from, **facts}
        own = Path(f"{file.name}.json.partial")  # another process may fill the same entry
        with replaced(self.path.with_suffix(".json"), temporary=own) as temporary:
            temporary.write_text(json.dumps(record, indent=1))
