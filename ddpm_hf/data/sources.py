"""A data set by its name, its folder or its table → `Samples`.

`load_samples` decodes everything once into one array, so that the same index is the same image in every process and in
every run. Nothing is streamed: a stream has no index by which randomness could be keyed, or from which a run could
resume.
"""

from __future__ import annotations

import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ImageColor

from ..machine import is_module_and_name, object_named
from .arrays import (
    FASHION_FOLDERS,
    FASHION_LABELS,
    FASHION_ON_THE_HUB,
    ArrayFiles,
    array_data,
    array_file_source,
    as_samples,
    idx_source,
    is_fashion_mnist,
    is_idx_folder,
)
from .cache import Cache, DecodeOptions, decode_all, first_of
from .decoding import MAX_PIXELS
from .folders import archive_source, folder_source
from .samples import ARCHIVES, BUILT_IN, NUM_LEVELS, Samples, built_in_samples, is_image_folder, is_integer
from .source import Labels, Source

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

PLAIN = DecodeOptions()  # nothing to do to pixels that are there already


def load_samples(
    dataset_name: str | os.PathLike[str] | datasets.Dataset | np.ndarray | None = None,
    *,
    train_data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    resolution: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    dataset_config: str | None = None,
    background: str = "white",
    channels: int | None = None,
    max_value: int | None = None,
    skip_bad_images: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    max_memory_bytes: int = 8 * 2**30,
    num_workers: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
) -> Samples:
    """Every sample of one data set, decoded: from `dataset_name` or from `train_data_dir`, exactly one of the two.

    Images have one channel when all of them are grey, else three. `data.decoding` says how each kind of file is read,
    and which kinds are refused. The result depends neither on the number of workers nor on where it is stored.

    Args:
        dataset_name: one of BUILT_IN; "fashion_mnist"; what `datasets.load_dataset` takes: a local folder or a name on
            the Hub; a folder of `save_to_disk`; a .parquet, .npy or .npz file; or a `datasets.Dataset` or an array in
            memory (images uint8 or uint16, or points float [N, d]); or "module:function", which is called with the
            split and returns one of these two, the same at every call.
        train_data_dir: a folder of images, searched with its sub-folders and linked folders, in the order of their
            relative paths; a zip or tar file of images; or a folder of IDX files.
        split: "train" or "test" for BUILT_IN and IDX files, any split of a named data set; a folder of images, a
            `Dataset` and an array are all "train".
        resolution: images are centre-cropped to a square and resized to this many pixels; None takes them as they
            are, and then all must be of one size. Not for BUILT_IN.
        image_column: None takes the first column of images. Only for tables and .npz files.
        label_column: where labels come from, None for no labels: a column of a table, of metadata.csv or of a .npz
            file; "label" means the sub-folders of a folder, and the labels of BUILT_IN and IDX files.
        dataset_config: which configuration of a named data set.
        background: a Pillow colour name or "#rrggbb" that shows through transparent pixels.
        channels: 1 or 3 converts every image to grey or to colour; None leaves grey images grey if all are.
        max_value: the value that stands for white, where files use fewer of their bits; None means all of them.
        skip_bad_images: how many unreadable or refused images to leave out before giving up.
        cache_dir: where decoded images go when they do not fit in memory; None means $DDPM_HF_CACHE, or
            ~/.cache/ddpm_hf. An entry there is used again while the source and these options stay the same; delete
            the folder to free its space.
        max_memory_bytes: the largest array in memory; a larger one is a memory-mapped file in `cache_dir`.
        num_workers: how many processes decode; 0 decodes in this process.
        output_dir: a folder within `train_data_dir` whose images are not of the data.

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
    options = DecodeOptions(_parse_colour(background), resolution, max_value, channels)
    if isinstance(dataset_name, str) and dataset_name in BUILT_IN:
        _refuse_given(
            dataset_name,
            **{"resolution": resolution, "image_column": image_column, "dataset_config": dataset_config},
            **{"channels": channels, "max_value": max_value},
        )
        return built_in_samples(dataset_name, split, label_column=label_column)
    if isinstance(dataset_name, str) and is_module_and_name(dataset_name) and not Path(dataset_name).exists():
        made = load_samples(
            _made(dataset_name, split),
            resolution=resolution,
            image_column=image_column,
            label_column=label_column,
            dataset_config=dataset_config,
            background=background,
            channels=channels,
            max_value=max_value,
            skip_bad_images=skip_bad_images,
            cache_dir=cache_dir,
            max_memory_bytes=max_memory_bytes,
            num_workers=num_workers,
        )
        return replace(made, name=dataset_name)
    if train_data_dir is not None:
        _require_name("train_data_dir", train_data_dir)
        _refuse_given(train_data_dir, image_column=image_column, dataset_config=dataset_config)
        excluded = None if output_dir is None else Path(output_dir)
        source = _place(Path(train_data_dir), split, label_column, excluded)
    else:
        source = _named(dataset_name, split, dataset_config, image_column, label_column)
    if isinstance(source, Source):
        folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        limits = {"skip_bad_images": skip_bad_images, "max_memory_bytes": max_memory_bytes, "num_workers": num_workers}
        source = _decoded(source, options, folder, **limits)
    else:
        _refuse_given(source.name, resolution=resolution, channels=channels, max_value=max_value)
    for note in source.notes:
        logger.warning("%s", note)
    return source


def _decoded(source: Source, options: DecodeOptions, cache_dir: Path, **limits: int) -> Samples:
    """The samples of encoded images, with the names and labels of those that could be read."""
    if source.channels is not None and options.channels is None:
        options = replace(options, channels=source.channels)
    array = source.files.array if isinstance(source.files, ArrayFiles) else None
    # a mask of 0 and 1 goes the long way, on which that is noticed
    if array is not None and array.dtype == np.uint8 and options == PLAIN and array.max() > 1:
        samples = as_samples(source)
    else:
        name = re.sub(r"[^\w-]", "_", source.name)
        decoded = decode_all(source.files, options, cache=Cache(cache_dir, name, source.identity, options), **limits)
        notes = (*source.notes, *(f"{source.name}: {note}" for note in decoded.notes))
        if decoded.first_in_colour:
            notes += (f"{source.name}: grey images get three channels; {decoded.first_in_colour}",)
        if decoded.skipped:
            notes += (f"{source.name}: {len(decoded.skipped)} bad images left out: {first_of(decoded.skipped)}",)
        names, left_out = source.names, set(decoded.left_out)
        if left_out:
            names = [name for index, name in enumerate(names) if index not in left_out]
        samples = Samples(
            source.name,
            decoded.array,
            NUM_LEVELS,
            decoded.fingerprint,
            decoded.skipped,
            names=names,
            notes=notes,
            first_in_colour=decoded.first_in_colour,
        )
        if source.labels is not None and left_out:
            kept = np.delete(source.labels.indices, sorted(left_out))
            source = replace(source, labels=Labels(kept, source.labels.names))
    if source.labels is None:
        return samples
    return replace(samples, labels=source.labels.indices, label_names=source.labels.names)


def _made(name: str, split: str) -> Any:
    """What the function called `name`, as module:function, returns for this split: an array or a `Dataset`."""
    function = object_named(name, "dataset_name")
    try:
        made = function(split)
    except Exception as error:  # of the user's own code
        raise ValueError(f"dataset_name={name!r}: {split!r} gives {type(error).__name__}: {error}") from error
    if not isinstance(made, np.ndarray) and type(made).__module__.split(".")[0] != "datasets":
        kind = type(made).__name__
        raise ValueError(f"dataset_name={name!r} returned a {kind}; it must return an array or a datasets.Dataset")
    return made


# ---- places ---------------------------------------------------------------------------------------------------------


def _place(path: Path, split: str, label_column: str | None, output_dir: Path | None) -> Source | Samples:
    """What `train_data_dir` names: IDX files, an archive or a folder of images."""
    if is_idx_folder(path):
        return idx_source(path, split, label_column)
    if split != "train":
        raise ValueError(f"split={split!r}: the folder {path} has no splits; pass 'train', or another folder")
    if path.suffix.lower() in ARCHIVES and path.is_file():
        return archive_source(path, label_column=label_column)
    return folder_source(path, label_column=label_column, output_dir=output_dir)


def _named(
    dataset: Any, split: str, config: str | None, image_column: str | None, label_column: str | None
) -> Source | Samples:
    """What `dataset_name` names or is."""
    if isinstance(dataset, np.ndarray):
        if split != "train" or config or image_column or label_column:
            raise ValueError(f"got {split=}, {image_column=} and {label_column=} for an array; it has none of these")
        return array_data(dataset, "in-memory")
    kind = type(dataset)
    if kind.__name__ in ("DatasetDict", "IterableDatasetDict") and kind.__module__.startswith("datasets."):
        raise ValueError(
            f"dataset_name: a {kind.__name__} of splits ({', '.join(dataset)}); pass one of them, ds['…']"
        )
    if kind.__name__ == "IterableDataset":
        raise ValueError("dataset_name: an IterableDataset; streams have no index: pass datasets.Dataset.from_list(…)")
    if kind.__module__.split(".")[0] != "datasets":
        _require_name("dataset_name", dataset)
        path = Path(dataset)
        if str(dataset) == "fashion_mnist" and not (path.is_dir() and not is_idx_folder(path)):
            return _fashion_mnist(split, label_column)
        if is_idx_folder(path):
            return idx_source(path, split, label_column)
        if path.is_file() and path.suffix.lower() in (".npy", ".npz", *ARCHIVES):
            if split != "train" or config:
                raise ValueError(f"got {split=} and dataset_config={config!r} for {str(path)!r}; it has neither")
            if path.suffix.lower() in ARCHIVES:
                return _place(path, split, label_column, None)
            return array_file_source(path, image_column, label_column)
    from .tables import table_source

    return table_source(dataset, split, config, image_column, label_column)


def _fashion_mnist(split: str, label_column: str | None) -> Source | Samples:
    """Fashion-MNIST from published IDX files in `FASHION_FOLDERS`, or else from the Hub: the same samples."""
    for folder in map(Path, FASHION_FOLDERS):
        if is_idx_folder(folder):
            source = idx_source(folder, split, label_column)
            if not is_fashion_mnist(source, split):
                raise ValueError(f"{folder}: not the published images of Fashion-MNIST; pass it as train_data_dir")
            return replace(source, name="fashion_mnist")
    from .tables import table_source

    source = table_source(FASHION_ON_THE_HUB, split, None, "image", label_column)
    labels = source.labels
    if isinstance(labels, Labels) and len(labels.names) == len(FASHION_LABELS):
        labels = Labels(labels.indices, FASHION_LABELS)
    return replace(source, name="fashion_mnist", labels=labels)


def real_samples(
    dataset: str,
    split: str,
    sample_shape: tuple[int, ...],
    *,
    label_column: str | None = None,
    skip_bad_images: int = 0,
) -> Samples:
    """The samples of a data set or of a folder of images; images are cropped and resized to `sample_shape`'s width.

    Raises ValueError where the samples then have another shape than `sample_shape`, and what `load_samples` raises.
    """
    resolution = None if dataset in BUILT_IN or len(sample_shape) == 1 else sample_shape[-1]
    name, folder = (None, dataset) if is_image_folder(dataset) else (dataset, None)
    samples = load_samples(
        name,
        train_data_dir=folder,
        split=split,
        label_column=label_column,
        resolution=resolution,
        skip_bad_images=skip_bad_images,
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
