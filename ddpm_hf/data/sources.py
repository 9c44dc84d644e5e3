"""A data set by its name, its folder or its table → `Samples`.

`load_samples` decodes everything once into one array, so that the same index is the same image in every process and in
every run. Nothing is streamed: a stream has no index by which randomness could be keyed, or from which a run could
resume.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageColor

from .cache import Cache, DecodeOptions, ImageFiles, decode_all, first_of
from .decoding import EXTENSIONS, MAX_PIXELS
from .samples import BUILT_IN, NUM_LEVELS, Samples, built_in_samples, is_image_folder, is_integer

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


def load_samples(
    dataset_name: str | os.PathLike[str] | datasets.Dataset | None = None,
    *,
    train_data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    resolution: int | None = None,
    image_column: str | None = None,
    dataset_config: str | None = None,
    background: str = "white",
    skip_bad_images: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    max_memory_bytes: int = 8 * 2**30,
    num_workers: int = 0,
) -> Samples:
    """Every sample of one data set, decoded: from `dataset_name` or from `train_data_dir`, exactly one of the two.

    Images have one channel when all of them are grey, else three. `data.decoding` says how each kind of file is read,
    and which kinds are refused. The result depends neither on the number of workers nor on where it is stored.

    Args:
        dataset_name: one of BUILT_IN; or what `datasets.load_dataset` takes: a local folder or a name on the Hub; or
            a .parquet file; or a `datasets.Dataset` in memory.
        train_data_dir: a folder of images, searched with its sub-folders, in the order of their relative paths.
        split: "train" or "test" for BUILT_IN, any split of a named data set; a folder or a `Dataset` is all "train".
        resolution: images are centre-cropped to a square and resized to this many pixels; None takes them as they
            are, and then all must be of one size. Not for BUILT_IN.
        image_column: None takes the first column of images. Only for what `datasets` loads.
        dataset_config: which configuration of a named data set.
        background: a Pillow colour name or "#rrggbb" that shows through transparent pixels.
        skip_bad_images: how many unreadable or refused images to leave out before giving up.
        cache_dir: where decoded images go when they do not fit in memory; None means $DDPM_HF_CACHE, or
            ~/.cache/ddpm_hf. An entry there is used again while the source and these options stay the same; delete
            the folder to free its space.
        max_memory_bytes: the largest array in memory; a larger one is a memory-mapped file in `cache_dir`.
        num_workers: how many processes decode; 0 decodes in this process.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder or data set does not exist.
        ValueError: it holds no images or has no such column, too many images are bad, sizes differ, or an argument is
            wrong.
        OSError: the cache's disk has not enough space.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(f"got {dataset_name=} and {train_data_dir=}; pass exactly one of the two")
    _require_counts(skip_bad_images=skip_bad_images, max_memory_bytes=max_memory_bytes, num_workers=num_workers)
    _require_resolution(resolution)
    options = DecodeOptions(_parse_colour(background), resolution)
    if isinstance(dataset_name, str) and dataset_name in BUILT_IN:
        _refuse_given(dataset_name, resolution=resolution, image_column=image_column, dataset_config=dataset_config)
        return built_in_samples(dataset_name, split)
    if train_data_dir is not None:
        _require_name("train_data_dir", train_data_dir)
        _refuse_given(train_data_dir, image_column=image_column, dataset_config=dataset_config)
        source = _folder(Path(train_data_dir), split)
    else:
        source = _table(dataset_name, split, dataset_config, image_column)
    folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    decoded = decode_all(
        source.files,
        options,
        cache=Cache(folder, re.sub(r"[^\w-]", "_", source.name), source.identity, options),
        skip_bad_images=skip_bad_images,
        max_memory_bytes=max_memory_bytes,
        num_workers=num_workers,
    )
    if decoded.skipped:
        logger.warning("%s: %d bad images left out: %s", source.name, len(decoded.skipped), first_of(decoded.skipped))
    return Samples(source.name, decoded.array, NUM_LEVELS, decoded.fingerprint, decoded.skipped)


def real_samples(dataset: str, split: str, sample_shape: tuple[int, ...], *, skip_bad_images: int = 0) -> Samples:
    """The samples of a data set or of a folder of images; images are cropped and resized to `sample_shape`'s width.

    Raises ValueError where the samples then have another shape than `sample_shape`, and what `load_samples` raises.
    """
    resolution = None if dataset in BUILT_IN else sample_shape[-1]
    name, folder = (None, dataset) if is_image_folder(dataset) else (dataset, None)
    samples = load_samples(
        name, train_data_dir=folder, split=split, resolution=resolution, skip_bad_images=skip_bad_images
    )
    if samples.sample_shape != sample_shape:
        raise ValueError(f"samples of shape {sample_shape} are needed, {samples.name} has {samples.sample_shape}")
    return samples


def default_cache_dir() -> Path:
    """$DDPM_HF_CACHE, or ~/.cache/ddpm_hf."""
    return Path(os.environ.get("DDPM_HF_CACHE") or "~/.cache/ddpm_hf").expanduser()


# ---- the arguments --------------------------------------------------------------------------------------------------


def _require_counts(**counts: Any) -> None:
    for argument, value in counts.items():
        if not is_integer(value) or value < 0:
            raise ValueError(f"{argument}={value!r}: must be an integer, 0 or more")


def _require_resolution(resolution: int | None) -> None:
    largest = math.isqrt(MAX_PIXELS)
    if resolution is not None and not (is_integer(resolution) and 1 <= resolution <= largest):
        allowed = f"1 to {largest} pixels, or None to take images as they are"
        raise ValueError(f"resolution={resolution!r}: must be an integer, {allowed}")


def _require_name(argument: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError(f"{argument}={value!r}: pass a folder's path, or for dataset_name the name of a data set")


def _refuse_given(dataset: object, **options: object) -> None:
    for argument, value in options.items():
        if value is not None:
            raise ValueError(f"{argument}={value!r}: means nothing for {str(dataset)!r}; leave it out")


def _parse_colour(background: str) -> tuple[int, int, int]:
    try:
        colour = ImageColor.getrgb(background)
    except (ValueError, TypeError):
        colour = ()
    if len(colour) != 3:
        raise ValueError(f"background={background!r}: pass a colour name such as 'white', or '#rrggbb'")
    return colour


# ---- folders of images ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Image files in a fixed order; `identity` changes whenever the files do."""

    name: str
    files: ImageFiles
    identity: str


def image_files(root: Path) -> list[str]:
    """The images in a folder and below it, by extension, as sorted paths within it with forward slashes.

    Hidden files are left out; a warning names the other files that are not images. Raises FileNotFoundError or
    NotADirectoryError for a root that is no folder, and ValueError where it holds no images.
    """
    if not root.exists():
        raise FileNotFoundError(f"train_data_dir={str(root)!r}: no such folder; check the path")
    if not root.is_dir():
        raise NotADirectoryError(f"train_data_dir={str(root)!r}: is a file; pass the folder that holds the images")
    names = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    names = sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
    images = [name for name in names if Path(name).suffix.lower() in EXTENSIONS]
    others = Counter(Path(name).suffix.lower() or "no extension" for name in names)
    others = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common() if suffix not in EXTENSIONS)
    if not names:
        raise ValueError(f"train_data_dir={str(root)!r}: the folder is empty; put images into it")
    if not images:
        allowed = ", ".join(sorted(EXTENSIONS))
        raise ValueError(f"train_data_dir={str(root)!r}: no image among its files ({others}); allowed are {allowed}")
    if others:
        logger.warning("%s: files that are not images are ignored: %s", root, others)
    return images


def _folder(root: Path, split: str) -> _Source:
    if split != "train":
        raise ValueError(f"split={split!r}: the folder {root} has no splits; pass 'train', or another folder")
    images = image_files(root)
    stats = [(name, (root / name).stat()) for name in images]
    identity = _sha256([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return _Source(root.resolve().name, [(_printable(root / name), root / name) for name in images], identity)


def _printable(path: object) -> str:
    """A path for messages: on one line, with an escape in place of every character that cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# ---- data sets that `datasets` loads --------------------------------------------------------------------------------


class _TableFiles:
    """The encoded images of one column of a `datasets.Dataset`."""

    def __init__(self, table: datasets.Dataset, column: str):
        import datasets

        # datasets' own decoding hides what the file is (its mode, orientation, damage), so only its bytes are read.
        self.table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[str, Path | io.BytesIO | None]:
        image = self.table[index][self.column] or {}
        path, encoded = image.get("path"), image.get("bytes")
        label = f"row {index} ({_printable(path)})" if path else f"row {index}"
        if encoded is not None:
            return label, io.BytesIO(encoded)
        return label, Path(path) if path else None


def _table(dataset: Any, split: str, config: str | None, column: str | None) -> _Source:
    import datasets

    if isinstance(dataset, datasets.Dataset):
        if split != "train" or config is not None:
            raise ValueError(f"got {split=} and dataset_config={config!r} for a Dataset in memory; select before")
        name, table = "in-memory", dataset
    else:
        _require_name("dataset_name", dataset)
        name = Path(dataset).name if Path(dataset).exists() else str(dataset)
        table = _load_table(dataset, split, config)
    columns = dict(table.features)
    images = [key for key, feature in columns.items() if isinstance(feature, datasets.Image)]
    if column is None and not images:
        raise ValueError(f"{name}: no column of images; its columns are {_describe(columns)}")
    if column is not None and column not in images:
        raise ValueError(f"image_column={column!r}: not a column of images of {name}, which has {_describe(columns)}")
    if len(table) == 0:
        raise ValueError(f"{name}: split {split!r} has no rows")
    column = column or images[0]
    return _Source(name, _TableFiles(table, column), _sha256([table._fingerprint, column]))


def _describe(columns: dict[str, Any]) -> str:
    return ", ".join(f"{name!r} ({type(feature).__name__})" for name, feature in columns.items()) or "none"


def _load_table(dataset: str | os.PathLike[str], split: str, config: str | None) -> datasets.Dataset:
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetsError

    path = Path(dataset)
    try:
        if path.suffix == ".parquet" and path.is_file():
            _refuse_given(path, dataset_config=config)
            return datasets.load_dataset("parquet", data_files=str(path), split=split)
        return datasets.load_dataset(str(dataset), config, split=split)
    except EmptyDatasetError as error:
        raise ValueError(f"dataset_name={str(dataset)!r}: found, but it holds no data files") from error
    except (FileNotFoundError, ConnectionError) as error:
        if path.exists():
            raise ValueError(
                f"dataset_name={str(dataset)!r}: neither a folder nor a .parquet file: {error}"
            ) from error
        places = f"not built in ({', '.join(BUILT_IN)}), no folder or .parquet file here; from the Hub"
        raise FileNotFoundError(f"dataset_name={str(dataset)!r}: {places}: {error}") from error
    except (ValueError, RuntimeError, DatasetsError) as error:  # unknown splits and configurations, damaged files
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        given = f"split={split!r}, dataset_config={config!r}"
        raise ValueError(f"dataset_name={str(dataset)!r} with {given} cannot be loaded: {reason}") from error
