"""benchmarks/labels_quality.py: what it measures of samples whose truth is known, and its tables in docs/labels.md."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddpm_hf import DDPMPaperPipeline

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import labels_quality  # noqa: E402  # pyright: ignore[reportMissingImports]

KEPT = ROOT / "benchmarks" / "results" / "labels.json"
PAGE = ROOT / "docs" / "labels.md"


def test_real_digits_are_read_as_asked_and_have_their_own_spread(monkeypatch):
    """A hundred real digits of each class in place of samples; half of them with the wrong label halve the share."""
    images, labels = load_digits(return_X_y=True)
    chosen = np.stack([np.flatnonzero(labels == label)[:100] for label in range(10)], axis=1).ravel()
    monkeypatch.setattr(labels_quality, "drawn", lambda *args, **options: images[chosen])
    pipe: Any = None
    row = labels_quality.quality(pipe, 1.0)
    for name in ("SVC γ = 0.001", "SVC C = 10"):
        share, error = row[name]
        assert share > 0.97 and 0.001 <= error < 0.006
    assert row["spread"][0] == pytest.approx(1, abs=0.05)
    swapped = images[np.where(np.arange(1000) % 2, chosen, np.roll(chosen, 1))]
    monkeypatch.setattr(labels_quality, "drawn", lambda *args, **options: swapped)
    assert labels_quality.quality(pipe, 1.0)["SVC C = 10"][0] == pytest.approx(0.5, abs=0.02)


def test_samples_are_asked_for_by_class(monkeypatch):
    asked: dict[str, Any] = {}

    def drawn(pipe: Any, seeds: range, steps: int, **options: Any) -> np.ndarray:
        asked.update(seeds=seeds, steps=steps, **options)
        return np.random.default_rng(0).random((len(seeds), 64)) * 16

    monkeypatch.setattr(labels_quality, "drawn", drawn)
    pipe: Any = None
    labels_quality.quality(pipe, 2.0)
    assert np.bincount(asked["class_labels"]).tolist() == [100] * 10
    assert (len(asked["seeds"]), asked["steps"], asked["guidance_scale"]) == (1000, 50, 2.0)


@pytest.mark.slow
def test_times_are_of_equal_work(monkeypatch):
    monkeypatch.setattr(labels_quality, "ROUNDS", 1)
    pipe: Any = DDPMPaperPipeline.from_pretrained(ROOT / "model_cards" / "ddpm-digits-labels")
    row = labels_quality.times(pipe, 1, fast=True)
    assert row["ratios"]["without classes"] == [1, 1, 1] and row["step_ms"] > 0


@pytest.mark.docs
def test_the_page_has_the_numbers_that_are_kept():
    kept, page = json.loads(KEPT.read_text(encoding="utf-8")), PAGE.read_text(encoding="utf-8")
    assert labels_quality.quality_table(kept["quality"]) in page
    assert labels_quality.time_table(kept["time"]) in page
