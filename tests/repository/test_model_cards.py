"""The checkpoints that come with the repository: they load, carry this package's code, and draw digits and clothes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.data.arrays import FASHION_FOLDERS
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.runs import read_results, weights_sha256

ROOT = Path(__file__).resolve().parents[1].parent
DIGITS = ROOT / "model_cards" / "ddpm-digits"
LABELLED = ROOT / "model_cards" / "ddpm-digits-labels"
FOUR_STEPS = ROOT / "model_cards" / "ddpm-digits-4steps"
DEBIAN = Path(FASHION_FOLDERS[1])
FASHION = ROOT / "model_cards" / "ddpm-fashion"
CARDS = [DIGITS, LABELLED, FOUR_STEPS, FASHION]


@pytest.fixture(scope="module")
def pipe() -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.docs
def test_its_samples_are_digits(pipe):
    """A nearest-neighbour check in 50 steps; benchmarks/digits_quality.py measures the real thing in 1000.

    A classifier of real digits recognises at least 7 of the 10 in 64 samples, and to it they lie about as far from its
    decision borders as real ones do: noise, or one digit drawn 64 times, fails both.
    """
    real, labels = load_digits(return_X_y=True)
    classifier = SVC(gamma=0.001, decision_function_shape="ovr").fit(real, labels)

    def margins(images: np.ndarray) -> np.ndarray:
        best = np.sort(classifier.decision_function(images), axis=1)
        return best[:, -1] - best[:, -2]

    images = pipe(seeds=range(64), num_inference_steps=50, output_type="np").images.reshape(64, -1) * 16
    assert len(set(classifier.predict(images))) >= 7
    assert np.median(margins(images)) > 0.9 * np.median(margins(real))
    noise = np.random.default_rng(0).random((64, 64)) * 16
    assert len(set(classifier.predict(noise))) < 7  # the check can fail


@pytest.mark.docs
def test_its_samples_are_the_digits_that_were_asked_for():
    """Of 60 samples of 10 classes, guided, in 50 steps, a classifier of real digits reads most as asked."""
    pipe: Any = DDPMPaperPipeline.from_pretrained(LABELLED)
    pipe.set_progress_bar_config(disable=True)
    classifier = SVC(gamma=0.001).fit(*load_digits(return_X_y=True))
    labels = np.arange(60) % 10
    options = {"num_inference_steps": 50, "guidance_scale": 2.0, "output_type": "np"}
    images = pipe(seeds=range(60), class_labels=labels, **options).images.reshape(60, -1) * 16
    read = classifier.predict(images)
    assert (read == labels).mean() > 0.85 and (read == np.roll(labels, 1)).mean() < 0.15


@pytest.mark.docs
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_its_clothes_are_those_that_were_asked_for():
    """Of 40 samples, guided, in 25 steps, the nearest of 10,000 training images are of the class that was asked for.

    Of real test images that is right for five in six; benchmarks/fashion_quality.py has better classifiers.
    """
    pipe: Any = DDPMPaperPipeline.from_pretrained(FASHION)
    pipe.set_progress_bar_config(disable=True)
    train = load_samples("fashion_mnist", split="train", label_column="label")
    images = train.batch(range(10_000)).flatten(1).float().numpy()
    classifier = KNeighborsClassifier(n_neighbors=5).fit(images, np.asarray(train.labels)[:10_000])
    asked = np.arange(40) % 10
    options = {"num_inference_steps": 25, "guidance_scale": 2.0, "output_type": "np"}
    drawn = pipe(seeds=range(40), class_labels=asked, **options).images.reshape(40, -1) * 255
    read = classifier.predict(drawn)
    assert (read == asked).mean() > 0.85 and (read == np.roll(asked, 1)).mean() < 0.25


@pytest.mark.docs
def test_the_distilled_ones_samples_are_digits_in_four_steps():
    """A classifier of real digits is as far from its borders about them as it is about real ones."""
    pipe: Any = DDPMPaperPipeline.from_pretrained(FOUR_STEPS)
    pipe.set_progress_bar_config(disable=True)
    real, labels = load_digits(return_X_y=True)
    classifier = SVC(gamma=0.001, decision_function_shape="ovr").fit(real, labels)
    images = pipe(seeds=range(64), output_type="np").images.reshape(64, -1) * 16
    assert pipe.num_timesteps == 4 and len(set(classifier.predict(images))) >= 7
    best, of_real = (np.sort(classifier.decision_function(rows), axis=1) for rows in (images, real))
    assert np.median(best[:, -1] - best[:, -2]) > 0.9 * np.median(of_real[:, -1] - of_real[:, -2])


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_its_code_is_this_package_s(card):
    """People are asked to trust the carried code, so sha256sum must settle what they run.

    After a change to a shipped file bring it there, in Python:

    >>> DDPMPaperPipeline.from_pretrained(card).save_config(card)
    """
    for carried, source in {
        "pipeline.py": "pipeline_ddpm_paper.py",
        "unet/unet_ddpm_paper.py": "unet/unet_ddpm_paper.py",
        "scheduler/scheduling_ddpm_paper.py": "scheduler/scheduling_ddpm_paper.py",
    }.items():
        ours = hashlib.sha256((ROOT / "ddpm_hf" / source).read_bytes()).hexdigest()
        assert hashlib.sha256((card / carried).read_bytes()).hexdigest() == ours, carried


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_it_is_small_and_tells_nothing_about_the_machine_that_made_it(card):
    files = [path for path in card.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= (9_000_000 if card == FASHION else 4_000_000)
    for path in files:
        if path.suffix in (".json", ".yaml", ".md"):
            text = path.read_text(encoding="utf-8")
            assert "_name_or_path" not in text and "/home/" not in text


def test_the_bound_it_states_is_that_of_its_weights(pipe):
    """The stored evaluation is of these weights and of all held-out digits, and the card says what it says.

    An estimate from 8 terms of 64 images lies within 5 of its standard errors of it.
    """
    (result,) = read_results(DIGITS / "evaluation.json")
    held_out = load_samples("digits", split="test")
    assert result["model"]["weights_sha256"] == weights_sha256(pipe.unet.state_dict())
    assert result["data"]["fingerprint"] == held_out.fingerprint
    assert result["protocol"]["num_images"] == len(held_out)
    (stated,) = ModelCard.load(DIGITS / "README.md").data.eval_results
    assert (stated.metric_name, stated.metric_value) == (result["name"], round(result["value"], 4))
    x_start = to_model_range(held_out.batch(range(64)), held_out.num_levels)
    terms = bits_per_dim(pipe.unet, pipe.scheduler, x_start, seed=1, num_levels=17, num_timesteps_subset=8)
    error = float(terms.total_b.std()) / 64**0.5
    assert abs(float(terms.total_b.mean()) - result["value"]) < 5 * error
