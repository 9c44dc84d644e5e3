"""Training input: uint8 levels by index against datasets, Pillow and transforms, as stock's script has them.

Stock's script takes its transforms from torchvision, for which the machines of these tests have no CPU build; here
they are the same operations of Pillow and NumPy, which is what torchvision calls for images of Pillow.
"""

import io
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ddpm_hf.data import Samples, load_samples, to_model_range
from ddpm_hf.runs import KeyedBatches

from .networks import largest
from .processes import alone
from .timing import STOCK, Difference, Read, Timed, Work

SIDE, BATCH = 32, 128
PIXELS = 1e-6  # x / 127.5 − 1 against (x / 255 − 0.5) / 0.5 in float32


@cache
def encoded_images(num: int) -> list[bytes]:
    """PNG files of smooth colours with a little noise, which compress as photographs of this size do."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(num):
        coarse = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-8, 9, size=(SIDE, SIDE, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


def image_table(num: int) -> datasets.Dataset:
    """A data set of PNG files; beyond a thousand they repeat."""
    files = encoded_images(min(num, 1000))
    rows = [{"bytes": files[i % len(files)], "path": None} for i in range(num)]
    return datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))


def stock_transform(examples: Mapping[str, Any], *, flip: bool) -> dict[str, list[Tensor]]:
    """Resize, CenterCrop, RandomHorizontalFlip, ToTensor, Normalize([0.5], [0.5])."""
    inputs = []
    for image in examples["image"]:
        image = image.convert("RGB")
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        if flip and torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        inputs.append(levels.to(torch.float32).div(255).sub_(0.5).div_(0.5))
    return {"input": inputs}


def stock_loader(table: datasets.Dataset, *, flip: bool = True, shuffle: bool = True) -> DataLoader:
    table = table.with_transform(partial(stock_transform, flip=flip))
    return DataLoader(table, batch_size=BATCH, shuffle=shuffle)  # type: ignore[arg-type]


def our_batches(samples: Samples) -> KeyedBatches:
    return KeyedBatches(samples, seed=0, global_batch_size=BATCH, num_timesteps=1000, random_flip=True)


def our_images(batches: KeyedBatches, steps: range) -> Iterator[Tensor]:
    """Images alone: shuffled, flipped and scaled."""
    rng = np.random.default_rng(0)
    for step in steps:
        levels = batches.samples.batch(batches.indices(step), rng.random(BATCH) < 0.5)
        yield to_model_range(levels, 256)


def our_inputs(batches: KeyedBatches, steps: range) -> Iterator[Tensor]:
    """All that a step needs: images, timesteps and noise, each draw keyed by step and row."""
    for step in steps:
        yield to_model_range(batches.rows(step, range(BATCH)).x_start, 256)


def stock_inputs(loader: DataLoader) -> Iterator[Tensor]:
    """The same as stock draws it."""
    for batch in loader:
        torch.randn(batch["input"].shape)
        torch.randint(0, 1000, (len(batch["input"]),))
        yield batch["input"]


def consume(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def build_input(quick: bool, *, with_draws: bool) -> Work:
    """One epoch."""
    table = image_table(2 * BATCH if quick else 8 * BATCH)
    samples = load_samples(table)
    batches, steps = our_batches(samples), range(len(table) // BATCH)
    loader = stock_loader(table)

    def differences() -> list[Difference]:
        theirs = torch.cat([batch["input"] for batch in stock_loader(table, flip=False, shuffle=False)])
        ours = to_model_range(samples.batch(range(len(table))), 256)
        return [Difference("pixels on [-1, 1]", largest(ours, theirs), PIXELS)]

    calls = {
        STOCK: lambda: consume(stock_inputs(loader) if with_draws else iter(loader)),
        "ours": lambda: consume((our_inputs if with_draws else our_images)(batches, steps)),
    }
    return Work(calls, differences, units=len(table), unit="image")


# ---- how it grows --------------------------------------------------------------------------------------------------


@cache
def loading(num: int) -> dict[str, dict[str, float]]:
    """What `alone.py` reports of reading `num` images from a Parquet file, for both: see there."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.parquet")
        image_table(num).to_parquet(path)
        for side in (STOCK, "ours"):
            found[side] = alone("loading", side, str(path), str(Path(folder, side)))
    return found


def _loaded(quick: bool, *, num: int, what: str) -> dict[str, float]:
    return {side: numbers[what] for side, numbers in loading(num).items()}


def first_and_next(batches: Iterator[Any], clock: Any, num: int = 20) -> tuple[float, float]:
    """Seconds until the first batch, and for each of the next."""
    began = clock()
    next(batches)
    first = clock()
    taken = sum(1 for _ in itertools.islice(batches, num))
    return first - began, (clock() - first) / max(1, taken)


DATA: list[Timed | Read] = [
    Timed(
        "data",
        "images, 32×32",
        partial(build_input, with_draws=False),
        {"ours": (15.0, 30.0)},
        rounds=(11, 5),
    ),
    Timed("data", "images with t and ε, 32×32", partial(build_input, with_draws=True), rounds=(11, 5)),
    *(
        Read("dataset", f"{num:,} images: {label}", partial(_loaded, num=num, what=what), unit, in_quick=num <= 10_000)
        for num in (1000, 10_000, 100_000)
        for label, what, unit in (
            ("CPU time to the first batch", "first_s", "s"),
            ("CPU time per further batch", "next_s", "s"),
            ("peak memory", "peak_bytes", "bytes"),
        )
    ),
]
