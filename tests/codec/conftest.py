"""Fixtures of the codec's tests: the shipped digits model with a short chain, and a tiny model's file."""

from pathlib import Path

import numpy as np
import pytest
from coded_models import noise_levels, tiny_pipe

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.codec import Encoded, compress, fit_chain
from ddpm_hf.data import load_samples

CARD = Path(__file__).parents[2] / "model_cards" / "ddpm-digits"
NUM_DIGITS, NUM_STEPS = 30, 12


@pytest.fixture(scope="session")
def digits_pipe() -> DDPMPaperPipeline:
    return DDPMPaperPipeline.from_pretrained(CARD)


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    return load_samples("digits", split="test").array[:NUM_DIGITS]


@pytest.fixture(scope="session")
def chain(digits_pipe, digits) -> dict:
    """Of few images and steps, where the variances need not be good."""
    return fit_chain(digits_pipe, digits[:1], NUM_STEPS, num_levels=17)


@pytest.fixture(scope="session")
def encoded(digits_pipe, digits, chain) -> Encoded:
    return compress(digits_pipe, digits, num_levels=17, chain=chain)


@pytest.fixture(scope="session")
def small() -> tuple[DDPMPaperPipeline, np.ndarray, bytes]:
    pipe = tiny_pipe()
    levels = noise_levels(4, pipe, 17)
    return pipe, levels, compress(pipe, levels, num_levels=17, names=["a.png", "b.png", "c.jpg", "d/e.png"]).data
