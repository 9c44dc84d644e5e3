"""A whole data set in one array, `Samples`, and the sets that are built in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

BUILT_IN = ("digits", "swiss_roll", "moons")  # sets that need no download
LABEL_NAMES = {"digits": tuple("0123456789"), "moons": ("upper", "lower")}  # of the built-in sets that have classes
ARCHIVES = (".zip", ".tar")  # of images, read as folders are
NUM_LEVELS = 256  # of decoded image files


@dataclass(frozen=True, eq=False)
class Samples:
    """A whole data set in one array. Two are the same data exactly when their fingerprints are equal.

    Attributes:
        name: what the data set is called, without the folders it lies in.
        array: uint8 [N, C, H, W] with values 0..num_levels-1, or float32 [N, d] points; read-only.
        num_levels: 256 for images, 17 for the digits, None for points.
        fingerprint: sha256 over content, dtype, shape and num_levels.
        skipped: what `skip_bad_images` left out, each "file or row: reason".
        names: of each sample its file, as a path within the folder with forward slashes, or "row 12"; empty for what
            is built in.
        notes: what was found and is not used, or not as one might expect; each a line that was logged.
        first_in_colour: where grey and colour images are mixed, "the first in colour is a.png (1 of 20)".
        labels: int64 [N], the class of each sample as an index of `label_names`; None where no labels were asked for.
        label_names: of the classes, in the order of their indices.
    """

    name: str
    array: np.ndarray
    num_levels: int | None
    fingerprint: str
    skipped: tuple[str, ...] = ()
    names: Sequence[str] = ()
    notes: tuple[str, ...] = ()
    first_in_colour: str = ""
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.array)

    @property
    def is_points(self) -> bool:
        return self.num_levels is None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) or (d,)."""
        return self.array.shape[1:]

    def class_counts(self) -> dict[str, int]:
        """How many samples each class has, by its name and in the order of the indices; empty without labels."""
        counts = [] if self.labels is None else np.bincount(self.labels, minlength=len(self.label_names)).tolist()
        return dict(zip(self.label_names, counts, strict=True)) if counts else {}

    def labels_sha256(self) -> str:
        """Changes with any sample's label, and with the names."""
        assert self.labels is not None
        return hashlib.sha256(self.labels.tobytes() + repr(self.label_names).encode()).hexdigest()

    def batch(self, indices: Sequence[int] | np.ndarray | torch.Tensor, flip: Any = None) -> torch.Tensor:
        """Samples by index: uint8 [B, C, H, W] in levels, or float32 [B, d]; a copy, on the CPU.

        Args:
            indices: B integers in 0..N-1, in any order, repeats allowed.
            flip: bool [B], which images to mirror left to right; None mirrors none. Not for points.

        Raises:
            IndexError: an index outside 0..N-1; a negative one does not count from the end.
            ValueError: indices or flip of another type or shape, or flip for points.
        """
        rows = np.asarray(indices)
        if rows.ndim != 1 or rows.size == 0 or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(f"indices: got {rows.dtype} of shape {rows.shape}; pass a list of one or more integers")
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"indices: got {rows.min()}..{rows.max()}; {self.name} has 0..{len(self) - 1}")
        batch = torch.from_numpy(np.asarray(self.array[rows]))
        if flip is None:
            return batch
        if self.is_points:
            raise ValueError(f"flip: {self.name} holds points, which have no left and right; pass flip=None")
        try:
            mirror = torch.as_tensor(flip, device="cpu")
        except (TypeError, RuntimeError):
            raise ValueError(f"flip: got {flip!r}; pass bool of shape ({len(rows)},)") from None
        if mirror.dtype != torch.bool or mirror.shape != (len(rows),):
            raise ValueError(f"flip: got {mirror.dtype} {tuple(mirror.shape)}; pass bool of shape ({len(rows)},)")
        chosen = mirror.numpy()
        batch.numpy()[chosen] = batch.flip(-1).numpy()[chosen]  # five times as fast as torch.where
        return batch


def to_model_range(batch: torch.Tensor, num_levels: int | None) -> torch.Tensor:
    """x = levels / ((num_levels - 1) / 2) - 1 in float32, on the batch's device; 256 levels give x / 127.5 - 1.

    Args:
        batch: integers 0..num_levels-1 of any shape, or points, which come back as float32 unchanged.
        num_levels: at least 2, or None for points.

    Raises:
        ValueError: num_levels is below 2, or the levels are not integers (scaled twice?).
    """
    if num_levels is None:
        return batch.to(torch.float32)
    if not is_integer(num_levels) or num_levels < 2:
        raise ValueError(f"num_levels={num_levels!r}: must be an integer, 2 or more, or None for points")
    if batch.is_floating_point() or batch.dtype == torch.bool:
        raise ValueError(f"batch: got {batch.dtype}; pass integer levels 0..{num_levels - 1}, not scaled values")
    return batch.to(torch.float32).div_((num_levels - 1) / 2).sub_(1)


def is_image_folder(dataset: str) -> bool:
    """Whether a data set given by one word is a folder, or a zip or tar file, of images.

    A folder named as a built-in set does not count.
    """
    path = Path(dataset)
    return dataset not in BUILT_IN and (path.is_dir() or (path.suffix.lower() in ARCHIVES and path.is_file()))


def is_integer(value: object) -> bool:
    """Whether a value is a whole number, Python's or NumPy's; a bool is none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def fingerprint(array: np.ndarray, num_levels: int | None) -> str:
    """sha256 over content, dtype, shape and num_levels."""
    return finish_digest(hashlib.sha256(np.ascontiguousarray(array).data), array, num_levels)


def finish_digest(digest: Any, array: np.ndarray, num_levels: int | None) -> str:
    """The fingerprint of an array whose content `digest` has seen; the shape comes last, as N may be known last."""
    digest.update(f"{array.dtype.str} {array.shape} {num_levels}".encode())
    return digest.hexdigest()


# ---- built-in sets --------------------------------------------------------------------------------------------------


def built_in_samples(name: str, split: str, *, label_column: str | None = None) -> Samples:
    """One of `BUILT_IN`, by `label_column="label"` with its labels.

    Raises ValueError for a split other than "train" and "test", or labels that the set does not have.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: {name} has 'train' and 'test'")
    label_names = LABEL_NAMES.get(name, ())
    if label_column not in (None, "label") or (label_column and not label_names):
        having = "has no labels" if not label_names else "has labels in 'label'"
        raise ValueError(f"label_column={label_column!r}: {name} {having}")
    (array, labels), num_levels = (_digits(split), 17) if name == "digits" else (_points(name, split), None)
    array.flags.writeable = False
    samples = Samples(name, array, num_levels, fingerprint(array, num_levels))
    return replace(samples, labels=labels, label_names=label_names) if label_column else samples


def digits_labels(split: str) -> np.ndarray:
    """int64 [N], the digit 0..9 that each image of `load_samples("digits", split=split)` shows."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: digits has 'train' and 'test'")
    return _digits(split)[1]


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 1, 8, 8] of levels 0..16 and labels int64 [N]; every fifth of the 1,797 is test (360)."""
    from sklearn.datasets import load_digits

    pixels, labels = (np.asarray(values) for values in load_digits(return_X_y=True))
    chosen = (np.arange(len(pixels)) % 5 == 0) == (split == "test")
    return pixels[chosen].astype(np.uint8).reshape(-1, 1, 8, 8), labels[chosen].astype(np.int64)


def _points(name: str, split: str) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 [10000, 2], and which moon int64 [10000]; the splits differ by seed alone.

    Fixed constants, the same for both splits, bring the points into about [-1, 1]: the roll, seen from the side, is
    divided by 15 (its radius ends at 4.5 pi = 14.1); the moons are centred on (0.5, 0.25) and divided by 1.5.
    """
    from sklearn.datasets import make_moons, make_swiss_roll

    seed, labels = ("train", "test").index(split), None
    if name == "swiss_roll":
        points = make_swiss_roll(10_000, noise=0.5, random_state=seed)[0][:, [0, 2]] / 15
    else:
        points, labels = make_moons(10_000, noise=0.05, random_state=seed)
        points = (np.asarray(points) - (0.5, 0.25)) / 1.5
    return np.ascontiguousarray(points, dtype=np.float32), labels
