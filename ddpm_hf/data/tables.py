"""What `datasets` loads, from the Hub, from local files or in memory → encoded images with names and labels."""

from __future__ import annotations

import io
import os
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from .arrays import array_data
from .decoding import BadImage
from .folders import METADATA, listing
from .samples import ARCHIVES, BUILT_IN, Samples
from .source import Labels, Source, printable, row_names, sha256_of

if TYPE_CHECKING:
    import datasets

CHANNELS_OF_MODE = {"L": 1, "RGB": 3}  # of datasets.Image(mode=…)
SPLIT_WORDS = "train(ing), val(id), validation, dev, test(ing) and eval(uation)"  # that `datasets` looks for in names


class _TableFiles:
    """The encoded images of one column of a `datasets.Dataset`."""

    def __init__(self, table: datasets.Dataset, column: str):
        import datasets

        # datasets' own decoding hides what the file is (its mode, orientation, damage), so only its bytes are read.
        self.table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.column = column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int, /) -> tuple[str, Any]:
        image = self.table[index][self.column] or {}
        path, encoded = image.get("path"), image.get("bytes")
        label = f"row {index} ({printable(path)})" if path else f"row {index}"
        if encoded is not None:
            return label, io.BytesIO(encoded)
        if path and "://" in path:  # in an archive, on the Hub or at an address, as datasets would read it
            return label, _opened(path)
        return label, Path(path) if path else None


def _opened(path: str) -> io.BytesIO | BadImage:
    """What lies at an address or in an archive; every protocol has errors of its own."""
    try:
        if path.startswith(("http://", "https://")) and "::" not in path:  # fsspec would need two more packages
            with urllib.request.urlopen(path, timeout=60) as response:
                return io.BytesIO(response.read())
        with fsspec.open(path, "rb") as file:
            return io.BytesIO(file.read())  # pyright: ignore[reportAttributeAccessIssue]
    except Exception as error:
        return BadImage(f"cannot be opened ({type(error).__name__}: {error})")


def table_source(
    dataset: Any, split: str, config: str | None, column: str | None, label_column: str | None
) -> Source | Samples:
    """The images of a `Dataset`, or of what `datasets.load_dataset` makes of a name. Raises as `load_samples`."""
    import datasets

    folder = None
    if isinstance(dataset, datasets.Dataset):
        if split != "train" or config is not None:
            raise ValueError(f"got {split=} and dataset_config={config!r} for a Dataset in memory; select before")
        name, table = "in-memory", dataset
    else:
        folder = Path(dataset) if Path(dataset).is_dir() else None
        name = Path(os.path.abspath(dataset)).name if Path(dataset).exists() else str(dataset)
        table = _load_table(dataset, split, config)
    notes = []
    if table.format["type"] is not None:
        kind = "transform" if table.format["type"] == "custom" else f"format ({table.format['type']})"
        notes.append(f"{name}: the {kind} of the Dataset is not applied: its images are read as they are stored")
        table = table.with_format(None)
    if len(table) == 0:
        raise ValueError(f"{name}: split {split!r} has no rows")
    column, others = _image_column(table, name, column)
    if others:
        notes.append(
            f"{name}: {column!r} is used and {', '.join(map(repr, others))} not, which hold images too: name one by "
            "image_column. (A tar file gives a column for each ending after the first dot of a name: unpack it and "
            "pass the folder as train_data_dir to use all)"
        )
    labels = None if label_column is None else _labels(table, label_column)
    feature = table.features[column]
    if not isinstance(feature, datasets.Image) and not _holds_encoded(feature):
        return array_data(_array(table, name, column), name, labels)
    channels = _channels_of(feature, column)
    if folder is not None and not any(mark in split for mark in "[+"):
        notes += _not_in_the_table(folder, table, column, split)
    identity = sha256_of([table._fingerprint, column])
    rows = row_names(len(table))
    return Source(name, _TableFiles(table, column), identity, rows, labels, tuple(notes), channels)


# ---- columns --------------------------------------------------------------------------------------------------------


def _image_column(table: datasets.Dataset, name: str, column: str | None) -> tuple[str, list[str]]:
    """The column to take, and the others that hold images where none was asked for."""
    import datasets

    features = dict(table.features)
    if column is not None:
        feature = features.get(column)
        if _is_text(feature) and not _names_a_file(table, column):
            feature = None
        if feature is None or not (
            isinstance(feature, datasets.Image) or _holds_encoded(feature) or _holds_arrays(feature)
        ):
            raise ValueError(
                f"image_column={column!r}: not a column of images of {name}, which has {described(features)}"
            )
        return column, []
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    # bytes may be anything; with a path beside them they are what datasets itself writes for images
    images = images or [
        key for key, feature in features.items() if isinstance(feature, dict) and _holds_encoded(feature)
    ]
    images = images or [key for key, feature in features.items() if _holds_arrays(feature)]
    if not images:
        encoded = [key for key, feature in features.items() if _holds_encoded(feature)]
        advice = f"; image_column={encoded[0]!r} takes it for encoded images or their paths" if encoded else ""
        raise ValueError(f"{name}: no column of images; its columns are {described(features)}{advice}")
    return images[0], images[1:]


def _holds_encoded(feature: Any) -> bool:
    """Whether `datasets` can cast a column to images: bytes, paths, or both."""
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _names_a_file(table: datasets.Dataset, column: str) -> bool:
    """Whether the first text of a column is the path of a file here, or an address."""
    first = str(table[0][column]) if len(table) else ""
    return "://" in first or os.path.isfile(first)


def _holds_arrays(feature: Any) -> bool:
    """Whether a column holds one matrix or volume of numbers in each row."""
    dtype, dimensions = _type_and_depth(feature)
    return dimensions in (2, 3) and dtype.startswith(("uint", "int", "float", "bool"))


def _type_and_depth(feature: Any) -> tuple[str, int]:
    """The type of a column's numbers, and how many dimensions each row has."""
    import datasets

    depth = 0
    while isinstance(feature, datasets.Sequence | datasets.LargeList):
        feature, depth = getattr(feature, "feature", None), depth + 1
    return str(getattr(feature, "dtype", "")), len(getattr(feature, "shape", ())) or depth


def _array(table: datasets.Dataset, name: str, column: str) -> np.ndarray:
    """The arrays of all rows, in the type that the column declares: NumPy's own would be int64 for all integers."""
    dtype = _type_and_depth(table.features[column])[0]
    rows = table.select_columns([column]).with_format("numpy", dtype=np.dtype(dtype))[:][column]
    try:
        return np.stack(list(rows))
    except ValueError as error:
        raise ValueError(f"{name}: the arrays of {column!r} are of several shapes; store them as images") from error


def _channels_of(feature: Any, column: str) -> int | None:
    """What a column's own mode makes of its images. Raises ValueError for modes other than L and RGB."""
    mode = getattr(feature, "mode", None)
    if mode is not None and mode not in CHANNELS_OF_MODE:
        raise ValueError(
            f"image_column={column!r} has the mode {mode!r}; only 'L' and 'RGB' are read: "
            f"table.cast_column({column!r}, datasets.Image())"
        )
    return None if mode is None else CHANNELS_OF_MODE[mode]


def _labels(table: datasets.Dataset, column: str) -> Labels:
    import datasets

    if column not in table.features:
        raise ValueError(f"label_column={column!r}: the columns are {described(dict(table.features))}")
    feature, values = table.features[column], list(table[column])
    rows = row_names(len(values))
    if isinstance(feature, datasets.ClassLabel):
        missing = [row for row, value in zip(rows, values, strict=True) if value is None or value < 0]
        if missing:
            raise ValueError(f"label_column={column!r}: {len(missing)} rows have no class, the first is {missing[0]}")
        return Labels(np.asarray(values, np.int64), tuple(feature.names))
    return Labels.of(values, rows, f"column {column!r}")


def described(columns: dict[str, Any]) -> str:
    """Names and types of columns."""
    return ", ".join(f"{name!r} ({type(feature).__name__})" for name, feature in columns.items()) or "none"


# ---- loading --------------------------------------------------------------------------------------------------------


def _load_table(dataset: str | os.PathLike[str], split: str, config: str | None) -> datasets.Dataset:
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetsError

    path = Path(dataset)
    given = f"dataset_name={str(dataset)!r}"
    if config is not None and (path.is_file() or (path / "state.json").is_file()):
        raise ValueError(f"dataset_config={config!r}: means nothing for {str(path)!r}; leave it out")
    try:
        if path.suffix.lower() == ".parquet" and path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split=split)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(datasets.load_from_disk(str(path)), split)
        # "." has no name, which `datasets` would ask for
        return datasets.load_dataset(os.path.abspath(path) if path.is_dir() else str(dataset), config, split=split)
    except EmptyDatasetError as error:
        raise ValueError(f"{given}: found, but it holds no data files") from error
    except OSError as error:
        if not _can_be_made(cache := _cache_folder()):
            reason = f"the cache of datasets, {cache}, cannot be written ({error})"
            raise ValueError(f"{given}: {reason}; set HF_HOME or HF_DATASETS_CACHE to a folder that can") from error
        if path.is_dir() and isinstance(error, FileNotFoundError):
            found = f"datasets finds no data in this folder ({str(error).splitlines()[0]})"
            raise ValueError(f"{given}: {found}; {_other_way(path)}") from error
        if not isinstance(error, FileNotFoundError | ConnectionError):
            raise
        if path.exists():
            kinds = "neither a folder nor a .parquet, .npy, .npz, .zip or .tar file"
            raise ValueError(f"{given}: {kinds}: {error}") from error
        places = f"not built in ({', '.join(BUILT_IN)}, fashion_mnist), no folder or .parquet file here; from the Hub"
        raise FileNotFoundError(f"{given}: {places}: {error}") from error
    except (ValueError, RuntimeError, DatasetsError) as error:  # unknown splits and configurations, damaged files
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        if path.is_dir() and "split" in reason.lower():
            reason += f" (the words {SPLIT_WORDS} in names make splits; {_other_way(path)})"
        elif path.is_dir() and "class label" in reason:
            reason += f" (folders in an archive are taken for labels; {_other_way(path)})"
        raise ValueError(
            f"{given} with split={split!r}, dataset_config={config!r} cannot be loaded: {reason}"
        ) from error


def _other_way(folder: Path) -> str:
    """How to read what `datasets` cannot."""
    archives = sorted(path for path in folder.iterdir() if path.suffix.lower() in ARCHIVES)
    if len(archives) == 1:
        return f"pass the archive itself: train_data_dir={str(archives[0])!r}"
    return "train_data_dir takes all images of a folder"


def _saved(loaded: Any, split: str) -> datasets.Dataset:
    """One split of what `save_to_disk` wrote; a single Dataset is all "train"."""
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    if split not in splits:
        raise ValueError(f"unknown split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def _cache_folder() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)  # pyright: ignore[reportAttributeAccessIssue]


def _can_be_made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _not_in_the_table(folder: Path, table: datasets.Dataset, column: str, split: str) -> list[str]:
    """A line where images of a local folder are in no row of the table that `datasets` made of it."""
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    try:
        there = {os.path.realpath(folder / name): name for name in listing(folder).images}
    except ValueError:  # no image files: tables or archives
        return []
    paths = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))[column]
    used = Counter(os.path.realpath(image["path"]) for image in paths if image and image.get("path"))
    if not used.keys() & there.keys():
        return []
    lines = []
    if repeated := sum(count > 1 for count in used.values()):
        lines.append(f"{folder.name}: {repeated} of its images are in more than one row")
    missing = sorted(name for path, name in there.items() if path not in used)
    if missing:
        unknown = [name for name in missing if os.path.splitext(name)[1].lower() not in ImageFolder.EXTENSIONS]
        has_metadata = any((folder / name).is_file() for name in METADATA)
        reasons = [f"{len(unknown)} are of formats that datasets does not know"] if unknown else []
        if len(unknown) < len(missing):
            reasons.append(
                "images that metadata.csv does not name are left out"
                if has_metadata
                else f"the words {SPLIT_WORDS} in names of files and folders make splits"
            )
        lines.append(
            f"{folder.name}: {len(there) - len(missing)} of its {len(there)} images are in split {split!r}, and "
            f"{len(missing)} not, the first is {printable(missing[0])}: {'; '.join(reasons)}. With train_data_dir all "
            "are used"
        )
    return lines
