"""Image files, folders of them and data sets → levels for the codec, and back to image files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ..data import BUILT_IN, BadImage, Samples, decode_image, first_of, image_files, is_image_folder, load_samples
from .bits_back import CodingError

logger = logging.getLogger(__name__)


class Decoded(NamedTuple):
    """levels: uint8 [N, C, H, W] in [0, num_levels); names: those of the images, or None."""

    levels: Tensor
    num_levels: int
    names: list[str] | None


def read_images(
    images: str, split: str = "test", skip_bad_images: int = 0
) -> tuple[np.ndarray, int, list[str] | None]:
    """Levels [N, C, H, W], how many levels there are, and the images' names, of an image file, a folder or a data set.

    Files have the 256 levels that `data.decode_image` reads. Of a data set, `split` is taken, and its images have no
    names. Up to `skip_bad_images` images that cannot be read are left out, with a warning. Raises CodingError where
    nothing of that name exists, for more bad images than that, and unless all have one size; and what
    `data.image_files` and `data.load_samples` raise.
    """
    path = Path(images)
    if not is_image_folder(images) and not path.is_file():
        samples = _data_set(images, split, skip_bad_images)
        if samples.num_levels is None:
            raise CodingError(f"{images} holds points; the codec is for images")
        return samples.array, samples.num_levels, None
    pixels, names, bad = [], [], []
    for name in image_files(path) if path.is_dir() else [path.name]:
        try:
            image = decode_image(path / name if path.is_dir() else path)
        except (BadImage, OSError) as error:
            bad.append(f"{name}: {error}")
            continue
        if pixels and image.shape != pixels[0].shape:
            ours, first = _size(image.shape), _size(pixels[0].shape)
            raise CodingError(f"{name} is {ours} and {names[0]} {first}; all must be alike")
        pixels.append(image)
        names.append(name)
    if len(bad) > skip_bad_images:
        advice = f"skip_bad_images={skip_bad_images} allows no more: mend or remove them, or raise it"
        raise CodingError(f"{counted(len(bad), 'bad image')}: {first_of(bad)} ({advice})")
    if not pixels:
        raise CodingError(f"none of the images can be read: {first_of(bad)}")
    if bad:
        logger.warning("%s: %s left out: %s", path.resolve().name, counted(len(bad), "bad image"), first_of(bad))
    return np.stack(pixels), 256, names


def write_images(folder: Path, decoded: Decoded) -> None:
    """Write one PNG per image, named by its name or its number; levels are spread over 0 … 255.

    Raises CodingError, before anything is written, for names that lead out of the folder or twice to one file.
    """
    names = decoded.names or [f"{index:05}.png" for index in range(len(decoded.levels))]
    paths = [PurePosixPath(name if name.lower().endswith(".png") else f"{name}.png") for name in names]
    for path in paths:
        if path.is_absolute() or ".." in path.parts or not str(path).isprintable() or set(str(path)) & set("\\:"):
            raise CodingError(f"the file names an image {str(path)!r}, which is no place inside of a folder")
    if len(set(paths)) < len(paths):
        raise CodingError("the file gives two images one name")
    pixels = np.rint(decoded.levels.numpy() * (255 / (decoded.num_levels - 1))).astype(np.uint8)
    for path, image in zip(paths, pixels, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(folder / path)


def check_levels(levels: np.ndarray, shape: tuple[int, ...], num_levels: int | None, name: str | None = None) -> None:
    """Raises CodingError unless `levels` are images that a model of `shape` can code; `name` is for the message."""
    if len(shape) != 3:
        raise CodingError("the codec is for images, and this is a model of points")
    if levels.ndim != 4 or not len(levels) or levels.dtype.kind not in "iu":
        raise CodingError(f"images are {levels.dtype} {list(levels.shape)}; this model codes integers [N, *{shape}]")
    if levels.shape[1:] != shape:
        found = f"{f'{name} is' if name else 'images are'} {_size(levels.shape[1:])}"
        raise CodingError(f"{found}; this model is for {_size(shape)}, and nothing is cropped or resized")
    if num_levels is None or not 2 <= num_levels <= 256 or levels.min() < 0 or levels.max() >= num_levels:
        raise CodingError(
            f"levels run from {levels.min()} to {levels.max()}, for num_levels={num_levels}, which is 256 at most"
        )


def _data_set(name: str, split: str, skip_bad_images: int) -> Samples:
    """`data.load_samples`; CodingError where there is no such data set, or no package that it would need."""
    try:
        return load_samples(name, split=split, skip_bad_images=skip_bad_images)
    except FileNotFoundError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise CodingError(f"{not_here('image or folder', name)}, nor a data set of that name: {reason}") from error
    except ModuleNotFoundError as error:
        if name in BUILT_IN:
            raise CodingError(f"{name} needs scikit-learn: pip install 'ddpm_hf[codec]'") from error
        missing = not_here("image or folder", name)
        raise CodingError(f"{missing}; for a data set of that name: pip install 'ddpm_hf[train]'") from error


def not_here(kind: str, name: str) -> str:
    """The beginning of a message: that nothing of this name exists, and where it was looked for."""
    where = "" if Path(name).is_absolute() else f" in {Path.cwd()}"
    return f"there is no {kind} {name}{where}"


def counted(number: int, what: str) -> str:
    """(1, "image") → "1 image", (2000, "image") → "2,000 images"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(shape: Sequence[int]) -> str:
    """A shape [C, H, W] in words: "500×300 in colour"."""
    channels, height, width = shape
    return f"{width}×{height} {({1: 'grey', 3: 'in colour'}).get(channels, f'with {channels} channels')}"
