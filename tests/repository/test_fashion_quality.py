"""The measures of benchmarks/fashion_quality.py on sets whose answer is known, and the tables from given results."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fashion_quality  # type: ignore  # noqa: E402
import head_to_head  # type: ignore  # noqa: E402
from fashion import measures  # type: ignore  # noqa: E402
from head_to_head import OURS, STOCK, STOCK_RATE, Training  # type: ignore  # noqa: E402
from speed import fashion_tables  # type: ignore  # noqa: E402

from ddpm_hf.runs import TrainingOptions, parse_options  # noqa: E402

LABELLED = ROOT / "model_cards" / "ddpm-digits-labels"
random = np.random.default_rng(0)


def pooled(images: np.ndarray) -> torch.Tensor:
    """Means of 7 × 7 pixels: features as good as any where only their distances count."""
    return torch.from_numpy(images.reshape(-1, 4, 7, 4, 7).mean(axis=(2, 4)).reshape(len(images), 16) / 255)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Blobs in place of clothes, 400 to train on and 300 to test with, and features that need no training."""
    random.bit_generator.state = np.random.default_rng(0).bit_generator.state  # whichever tests ran before
    places = {"train": random.integers(0, 4, (400, 2)), "test": random.integers(0, 4, (300, 2))}
    images = {split: blobs(where) for split, where in places.items()}
    reader = SimpleNamespace(name="first", classes=lambda pictures: pooled(pictures).argmax(1).numpy())
    for cached in (measures.test_features, measures.test_gaussian, measures.training_rows, measures.near_distance):
        cached.cache_clear()
    monkeypatch.setattr(measures, "features_of", pooled)
    monkeypatch.setattr(measures, "real_images", images.__getitem__)
    monkeypatch.setattr(measures, "classifiers", lambda: (reader,))
    yield images
    for cached in (measures.test_features, measures.test_gaussian, measures.training_rows, measures.near_distance):
        cached.cache_clear()


def blobs(places: np.ndarray) -> np.ndarray:
    """Bright squares at the places [N, 2] in a grid of 4 × 4, in noise: uint8 [N, 28, 28]."""
    images = random.integers(0, 60, (len(places), 28, 28))
    for image, (row, column) in zip(images, places, strict=True):
        image[7 * row : 7 * row + 7, 7 * column : 7 * column + 7] += 150
    return images.astype(np.uint8)


def test_real_images_are_close_and_noise_is_not(small):
    cells = random.integers(0, 4, (300, 2))
    real, noise = (
        measures.quality(blobs(cells), 4 * cells[:, 0] + cells[:, 1]),
        measures.quality(random.integers(0, 256, (300, 28, 28)).astype(np.uint8)),
    )
    assert real[measures.FRECHET] < 0.02 < 0.2 < noise[measures.FRECHET]
    assert real[measures.PRECISION] > 0.8 and real[measures.RECALL] > 0.8 and noise[measures.PRECISION] == 0
    assert real[measures.AS_ASKED["first"]] == 1 and measures.AS_ASKED["first"] not in noise


def test_one_picture_again_and_again_is_precise_and_recalls_little(small):
    one = np.repeat(small["test"][:1], 300, axis=0)
    found = measures.quality(one)
    assert found[measures.PRECISION] == 1 and found[measures.RECALL] < 0.1


def test_copies_of_training_images_are_seen_also_mirrored(small):
    copied = small["train"][:50]
    for pictures in (copied, copied[:, :, ::-1]):
        distances, nearest = measures.nearest_training(pictures)
        # squared lengths near 150 are rounded to 2e-5 in float32, and the root of that is 5e-3; others are 3 away
        assert distances.max() < 0.02 and nearest.tolist() == [*range(50)]
        assert measures.quality(pictures)[measures.NEAREST] == 1
    assert measures.quality(small["test"])[measures.NEAREST] == pytest.approx(0.01, abs=0.004)  # by its definition


def test_pictures_are_drawn_once_and_kept_by_what_they_depend_on(tmp_path):
    drawer = fashion_quality.Drawer(LABELLED, "ddim", tmp_path)
    seeds = range(10_000, 10_012)
    first = drawer.draw(seeds, 3)
    assert first.shape == (12, 8, 8) and first.dtype == np.uint8 and len(list(tmp_path.iterdir())) == 1
    assert drawer.asked_for(seeds).tolist() == [*range(10), 0, 1]
    drawer.pipe = SimpleNamespace(scheduler=drawer.pipe.scheduler, classes=drawer.pipe.classes)  # cannot draw
    assert np.array_equal(drawer.draw(seeds, 3), first)
    for other in ((seeds, 4), (seeds, 3, 2.0), (range(12), 3)):
        with pytest.raises(TypeError):
            drawer.draw(*other)


def test_a_distilled_model_draws_in_its_own_steps_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_quality, "quality", lambda images, asked: {"mean": float(images.mean())})
    drawer = fashion_quality.Drawer(ROOT / "model_cards" / "ddpm-digits-4steps", "ddpm", tmp_path)
    args = SimpleNamespace(ranges=1, num_samples=4, steps=None)
    row = fashion_quality.row_of(args, drawer, 1.0)
    assert (row["scheduler"], row["steps"]) == ("distilled", 4)
    assert fashion_quality.Drawer(LABELLED, "ddpm", tmp_path).name == "ddpm"


def test_trainings_run_as_their_scripts_read_them(tmp_path, monkeypatch):
    folder = tmp_path / "x"
    folder.mkdir()
    commands = Training(OURS, 2).commands(folder)
    assert len(commands) == 3 and Path(commands[0][0]) == ROOT / "training" / "train.py"
    options = parse_options(TrainingOptions, commands[0][1:])
    assert (options.seed, options.max_minutes, options.label_column) == (2, 5, None)
    assert options.block_out_channels == [32, 64, 128] and options.global_batch_size == 16
    (own,), (other,) = (Training(*each).commands(folder) for each in ((STOCK, 1), (STOCK_RATE, 1, 5e-4)))
    assert own[1:] == [str(folder), "--seed", "1", "--minutes", "5", "10", "15"]
    assert other[-4:] == ["--batch", "16", "--learning_rate", "0.0005"]
    names = {each.folder_name for each in (*head_to_head.first_trainings(), *head_to_head.all_trainings(5e-4))}
    assert len(names) == 10  # three of each way, and the other learning rate's pilot


def results(ours: float, stock: float, batch: float) -> dict[str, Any]:
    rows = [
        {
            "way": way,
            "minutes": minutes,
            "steps": [1000, 1001, 1002],
            "measures": {"Fréchet distance": [last * 15 / minutes, 0.1], "precision": [0.5, 0.01]},
        }
        for way, last in ((OURS, ours), (STOCK, stock), (STOCK_RATE, batch))
        for minutes in (5, 10, 15)
    ]
    machine = {"cpu": "a CPU", "cores": 2, "capability": "AVX2", "gpu": None}
    about = {"machine": machine, "versions": {"torch": "2"}, "date_utc": "2026", "commit": "abc"}
    real = {"Fréchet distance": [1.0, 0.1], "precision": [0.9, 0.01]}
    return {"rows": rows, "rate": 5e-4, "rates": [5e-4, 1e-3], "batch": 16, "real": real, "num_samples": 10, **about}


def test_the_verdict_is_beside_the_better_stock_run(tmp_path):
    table = fashion_tables.head_to_head_table(results(3.0, 8.0, 6.0))
    assert "Ours ends at 0.50 times the distance of the better stock run" in table and "by minute 10." in table
    lost = fashion_tables.head_to_head_table(results(9.0, 8.0, 6.0))
    assert "Ours ends at 1.50 times" in lost and "distance at none of these times." in lost
    fashion_tables.head_to_head_plot(results(3.0, 8.0, 6.0), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000
