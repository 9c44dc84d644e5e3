"""Random numbers that depend on what they are for, not on when they are drawn.

Every draw of training is keyed (seed, purpose, step, sample index): it comes out the same whatever was drawn before,
in whichever process, on whichever device. So a run can start at any step, and any number of processes can share one.
NumPy's Philox does it: a counter-based generator (Salmon et al. 2011), here with the seed and purpose as its key and
step and index as its counter.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch


def _key(seed: int, purpose: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16], dtype=np.uint64)


def keyed_generator(seed: int, purpose: str, step: int = 0, index: int = 0) -> np.random.Generator:
    """A generator of its own for each (seed, purpose, step, index), the last two in [0, 2⁶⁴).

    Streams cannot overlap: index and step fill the upper half of Philox's 256-bit counter, so each has 2¹³⁰ numbers.
    """
    counter = np.array([0, 0, index, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=counter))


def keyed_generators(
    seed: int, purpose: str, steps: Iterable[int], indices: Iterable[int]
) -> Iterator[np.random.Generator]:
    """`keyed_generator` for each pair of step and index, one after the other: each serves until the next is asked for.

    One generator that is moved, because making thousands costs more than drawing from them.
    """
    philox = np.random.Philox(key=_key(seed, purpose))
    generator, state = np.random.Generator(philox), philox.state
    for step, index in zip(steps, indices, strict=True):
        state["state"]["counter"] = np.array([0, 0, index, step], dtype=np.uint64)
        philox.state = state
        yield generator


def keyed_seed(seed: int, purpose: str, step: int = 0, index: int = 0) -> int:
    """A seed in [0, 2³²) for generators of another kind, such as torch's global one, which dropout draws from."""
    return int(keyed_generator(seed, purpose, step, index).integers(2**32))


def normal(seed: int, purpose: str, step: int, indices: Iterable[int], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard Gaussian noise, one keyed draw per index: float32 [len(indices), *shape] on the CPU."""
    indices = list(indices)
    noise = np.empty((len(indices), *shape), dtype=np.float32)
    for row, generator in zip(noise, keyed_generators(seed, purpose, [step] * len(indices), indices), strict=True):
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)
