"""Arrays in memory, in .npy and .npz files and in IDX files (MNIST's format) → samples."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .samples import NUM_LEVELS, Samples, fingerprint
from .source import Labels, Source, printable, row_names

LAYOUTS = "[N, H, W], [N, C, H, W] or [N, H, W, C] with C = 1 or 3"


class ArrayFiles:
    """Images [N, C, H, W] of 8 or 16 bits as files in memory: grey ones of 16 bits in PNG, the others in PPM."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int, /) -> tuple[str, Any]:
        image = self.array[index]
        channels, height, width = image.shape
        if image.itemsize == 2 and channels == 1:  # in PPM the header states a range, and PNG is asked for its largest
            file = io.BytesIO()
            Image.fromarray(image[0].astype(np.uint16)).save(file, "PNG", compress_level=0)
            file.seek(0)
            return f"row {index}", file
        header = f"P{6 if channels == 3 else 5} {width} {height} {255 if image.dtype == np.uint8 else 65535}\n"
        pixels = image.transpose(1, 2, 0).astype(image.dtype.newbyteorder(">"))
        return f"row {index}", io.BytesIO(header.encode() + pixels.tobytes())


def array_source(array: np.ndarray, name: str, labels: Labels | None = None) -> Source:
    """Images of an array, uint8, uint16 or bool in one of `LAYOUTS`; bool becomes 0 and 255.

    Raises ValueError for other shapes and types, with the call that makes the array one of these.
    """
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        advice = (
            "their range is not stated: scale them to 0..255 and pass .round().astype('uint8')"
            if np.issubdtype(array.dtype, np.floating)
            else "pass .astype('uint8') if they lie in 0..255, or .astype('uint16') if in 0..65535"
        )
        raise ValueError(f"{name}: an array of {array.dtype} {array.shape}; {advice}")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"{name}: an array of shape {array.shape}; images are {LAYOUTS}, and not empty")
    identity = fingerprint(array, np.iinfo(array.dtype).max + 1)  # for 8 bits that of the samples
    return Source(name, ArrayFiles(array), identity, row_names(len(array)), labels)


def as_samples(source: Source) -> Samples:
    """The samples of an array source of 8 bits, whose pixels are what they are to become."""
    assert isinstance(source.files, ArrayFiles)
    array = np.ascontiguousarray(source.files.array)
    if array is source.files.array:  # the caller's own, who may write to it
        array = array.copy()
    array.flags.writeable = False
    return Samples(source.name, array, NUM_LEVELS, source.identity, names=source.names, notes=source.notes)


def point_samples(array: np.ndarray, name: str) -> Samples:
    """Points float [N, d] as samples in float32. Raises ValueError where some are not finite."""
    points = np.array(array, np.float32, order="C")
    if not len(points) or not points.shape[1]:
        raise ValueError(f"{name}: an array of shape {array.shape}; points are [N, d], and not empty")
    if not np.isfinite(points).all():
        raise ValueError(f"{name}: {(~np.isfinite(points).all(1)).sum()} of {len(points)} points are not finite")
    largest = float(np.abs(points).max())
    notes = ()
    if not 0.1 <= largest <= 10:
        notes = (f"{name}: the largest coordinate is {largest:g}; the process assumes points of about -1 to 1",)
    points.flags.writeable = False
    return Samples(name, points, None, fingerprint(points, None), notes=notes)


def array_file_source(path: Path, image_column: str | None, label_column: str | None) -> Source | Samples:
    """What a .npy or .npz file holds; for .npz the two columns name its arrays. Raises ValueError."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{printable(path)} cannot be read as an array without pickle: {error}") from error
    if isinstance(loaded, np.ndarray):
        if image_column or label_column:
            raise ValueError(f"{printable(path)}: one array, so image_column and label_column name nothing")
        return array_data(loaded, path.name)
    with loaded:
        column = image_column or (loaded.files[0] if len(loaded.files) == 1 else "arr_0")
        for argument, key in (("image_column", column), ("label_column", label_column)):
            if key is not None and key not in loaded.files:
                names = ", ".join(map(repr, loaded.files))
                raise ValueError(f"{argument}={key!r}: {printable(path)} has the arrays {names}; name one of them")
        labels = None
        array = loaded[column]
        if label_column:
            values = loaded[label_column].ravel().tolist()
            if len(values) != len(array):
                raise ValueError(f"label_column={label_column!r}: {len(values)} labels for {len(array)} images")
            labels = Labels.of(values, row_names(len(array)), f"array {label_column!r}")
        return array_data(array, path.name, labels)


def array_data(array: np.ndarray, name: str, labels: Labels | None = None) -> Source | Samples:
    """Points where the array is float [N, d], else images."""
    if array.ndim == 2 and np.issubdtype(array.dtype, np.floating):
        if labels is not None:
            raise ValueError(f"{name}: points take no labels")
        return point_samples(array, name)
    return array_source(array, name, labels)


# ---- IDX files ------------------------------------------------------------------------------------------------------

IDX_PREFIXES = {"train": "train", "test": "t10k"}
FASHION_LABELS = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
# of the pixels as published at github.com/zalandoresearch/fashion-mnist, by which its classes get their names
FASHION_FINGERPRINTS = {
    "train": "8b576b372b9469aa1a23277e0d80927e6f55e2b6c48276b005f2d058e94a6174",
    "test": "29cf25ce729c3c15a436230ee844b22c0a66bf5a98c1b989420697374c4655d8",
}
FASHION_FOLDERS = ("fashion_mnist", "/usr/share/datasets/fashion-mnist")  # the second is where Debian puts it
FASHION_ON_THE_HUB = "zalando-datasets/fashion_mnist"


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds the four files that MNIST and Fashion-MNIST are published as, or some of them."""
    return folder.is_dir() and any(_idx_file(folder, prefix, "images-idx3") for prefix in IDX_PREFIXES.values())


def _idx_file(folder: Path, prefix: str, kind: str) -> Path | None:
    names = (f"{prefix}-{form}{suffix}" for form in (f"{kind}-ubyte", f"{kind.replace('-', '.')}-ubyte")
             for suffix in ("", ".gz"))  # fmt: skip
    return next((folder / name for name in names if (folder / name).is_file()), None)


def idx_source(folder: Path, split: str, label_column: str | None) -> Source:
    """The images [N, 1, H, W] of a split of a folder of IDX files. Raises ValueError."""
    if split not in IDX_PREFIXES:
        raise ValueError(f"split={split!r}: a folder of IDX files has 'train' and 'test'")
    path = _idx_file(folder, IDX_PREFIXES[split], "images-idx3")
    if path is None:
        wanted = f"{IDX_PREFIXES[split]}-images-idx3-ubyte"
        raise ValueError(f"split={split!r}: {printable(folder)} has no {wanted} or {wanted}.gz")
    images = read_idx(path, dimensions=3)
    source = array_source(images, folder.resolve().name)
    if label_column is None:
        return source
    if label_column != "label":
        raise ValueError(f"label_column={label_column!r}: IDX files have 'label'")
    path = _idx_file(folder, IDX_PREFIXES[split], "labels-idx1")
    if path is None:
        raise ValueError(f"label_column='label': {printable(folder)} has no {IDX_PREFIXES[split]}-labels-idx1-ubyte")
    values = read_idx(path, dimensions=1)
    if len(values) != len(images):
        raise ValueError(f"{printable(path)}: {len(values)} labels for {len(images)} images")
    labels = Labels.of(values.tolist(), source.names, path.name)
    if is_fashion_mnist(source, split):
        labels = Labels(labels.indices, FASHION_LABELS)
    return replace(source, labels=labels)


def is_fashion_mnist(source: Source, split: str) -> bool:
    """Whether an array source holds the pixels of Fashion-MNIST's split "train" or "test"."""
    return source.identity == FASHION_FINGERPRINTS.get(split)


def read_idx(path: Path, *, dimensions: int) -> np.ndarray:
    """uint8 array of an IDX file, compressed by gzip or not. Raises ValueError where it is no such file, or cut."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        kind, found = content[2], content[3]
        shape = struct.unpack_from(f">{found}I", content, 4)
    except (OSError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise ValueError(f"{printable(path)} cannot be read as an IDX file: {error}") from error
    if content[:2] != b"\0\0" or kind != 8 or found != dimensions:
        raise ValueError(f"{printable(path)}: no IDX file of {dimensions} dimensions of unsigned bytes")
    pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * found)
    if len(pixels) != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{printable(path)}: {len(pixels):,} values, its header says {shape}; download it again")
    return pixels.reshape(shape)
