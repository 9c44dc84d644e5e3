"""Pillow's Lanczos of a square, bit by bit, in half of Pillow's time where an image shrinks much.

Pillow rounds its weights to multiples of 2^-22 and resizes first along rows, then along columns, each time to whole
levels. Products of such weights and levels are exact in float64, and so are their sums in any order, which leaves them
to matrix products.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import NamedTuple

import numpy as np
from PIL import Image

WORTH_IT = 2  # from this factor of shrinking on it is faster than Pillow
_LOBES = 3
_UNIT = 2**22  # weights are multiples of its inverse
_COLUMNS = 8  # outputs of one product: neighbours, which share most of their inputs
_MOST_PRODUCTS = 2**18  # in one product of matrices: OpenBLAS starts its threads for more, and this fits the cache
_KEPT_BYTES = 2**23
_memory = threading.local()


class _Band(NamedTuple):
    """Outputs `first`…`end` come from the inputs `begin`…`stop`, by weights [inputs, outputs]."""

    begin: int
    stop: int
    first: int
    end: int
    weights: np.ndarray


def lanczos(image: Image.Image, left: int, top: int, side: int, resolution: int) -> np.ndarray:
    """uint8 [C, resolution, resolution], as `image.resize` makes them of the square; `image` is of mode L or RGB.

    The filter also reads what lies around the square, as Pillow's does.
    """
    width, height = image.size
    across, down = _bands(width, left, side, resolution), _bands(height, top, side, resolution)
    begin, stop = across[0].begin, across[-1].stop
    first_row, last_row = down[0].begin, down[-1].stop
    channels = len(image.getbands())
    rows = max(1, _MOST_PRODUCTS // (max(band.stop - band.begin for band in across) * _COLUMNS * channels))
    levels = _scratch("levels", channels * rows, stop - begin)
    narrow = _scratch("narrow", channels * rows, resolution)
    columns = _scratch("columns", last_row - first_row, channels, resolution)
    for row in range(first_row, last_row, rows):
        strip = image.crop((begin, row, stop, min(row + rows, last_row)))
        count = strip.height
        inputs, outputs = levels[: channels * count], narrow[: channels * count]
        for channel, each in enumerate(strip.split()):
            pixels = np.frombuffer(each.tobytes(), np.uint8)
            inputs[channel * count : (channel + 1) * count] = pixels.reshape(count, -1)
        for band in across:
            place = outputs[:, band.first : band.end]
            np.matmul(inputs[:, band.begin - begin : band.stop - begin], band.weights, out=place)
        place = columns[row - first_row : row - first_row + count]
        place[...] = _round(outputs).reshape(channels, count, resolution).transpose(1, 0, 2)
    result = np.empty((resolution, channels * resolution))
    for band in down:
        inputs = columns[band.begin - first_row : band.stop - first_row].reshape(-1, channels * resolution)
        np.matmul(band.weights.T, inputs, out=result[band.first : band.end])
    pixels = _round(result).astype(np.uint8).reshape(resolution, channels, resolution)
    return np.ascontiguousarray(pixels.transpose(1, 0, 2))


def _scratch(name: str, *shape: int) -> np.ndarray:
    """An array to write to, the same memory at each call in a thread: the system hands out new pages slowly."""
    size = math.prod(shape)
    kept = getattr(_memory, name, None)
    if kept is None or kept.size < size:
        kept = np.empty(size)
        if kept.nbytes <= _KEPT_BYTES:
            setattr(_memory, name, kept)
    return kept[:size].reshape(shape)


def _round(levels: np.ndarray) -> np.ndarray:
    """In place, to whole levels 0…255, halves upwards."""
    levels += 0.5
    np.floor(levels, levels)
    return np.clip(levels, 0, 255, levels)


@functools.lru_cache(maxsize=128)
def _bands(size: int, begin: int, side: int, resolution: int) -> list[_Band]:
    """The weights of `resolution` outputs over `side` of `size` inputs, from `begin` on."""
    outputs = [_weights(size, begin + (i + 0.5) * side / resolution, side / resolution) for i in range(resolution)]
    bands = []
    for first in range(0, resolution, _COLUMNS):
        group = outputs[first : first + _COLUMNS]
        low, high = group[0][0], max(start + len(weights) for start, weights in group)
        matrix = np.zeros((high - low, len(group)))
        for column, (start, weights) in enumerate(group):
            matrix[start - low : start - low + len(weights), column] = weights
        bands.append(_Band(low, high, first, first + len(group), matrix))
    return bands


def _weights(size: int, centre: float, scale: float) -> tuple[int, list[float]]:
    """The first input of one output, and the weights from there on, in Pillow's order of operations."""
    scale = max(scale, 1.0)
    start = max(int(centre - _LOBES * scale + 0.5), 0)
    stop = min(int(centre + _LOBES * scale + 0.5), size)
    values = [_filter((x - centre + 0.5) * (1 / scale)) for x in range(start, stop)]
    total = 0.0
    for value in values:  # sum() of Python 3.12 rounds otherwise
        total += value
    whole = [int(value / total * _UNIT + math.copysign(0.5, value)) for value in values]
    return start, [value / _UNIT for value in whole]


def _filter(x: float) -> float:
    return _sinc(x) * _sinc(x / _LOBES) if -_LOBES <= x < _LOBES else 0.0


def _sinc(x: float) -> float:
    x *= math.pi
    return math.sin(x) / x if x else 1.0
