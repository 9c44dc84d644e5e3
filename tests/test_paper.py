"""The paper's values agree wherever they stand: paper.py, the YAML files, and the defaults of options and classes."""

from dataclasses import MISSING, fields
from inspect import signature
from pathlib import Path

import pytest
import yaml

from ddpm_hf import DDPMPaperScheduler, DDPMPaperUNet
from ddpm_hf.paper import PAPER_256, PAPER_CIFAR10, PAPER_IMAGES, PAPER_PROCESS, compare_with_paper
from ddpm_hf.runs import TrainingOptions

CONFIGS = Path(__file__).parents[1] / "training" / "configs"
# The trainer has no such option: β comes from a schedule, and images are always clipped.
NO_OPTIONS = {"trained_betas", "clip_sample"}


def yaml_values(name: str) -> dict:
    """Numbers as YAML 1.1 leaves them: 2e-4 without a dot is text there."""
    values = yaml.safe_load((CONFIGS / name).read_text())
    return {key: float(value) if key == "learning_rate" else value for key, value in values.items()}


def defaults() -> dict:
    return {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(TrainingOptions)}


def test_the_trainers_defaults_are_the_papers_cifar10_run():
    """But for the flips, which need images, and so are in the YAML."""
    options, paper = defaults(), {key: value for key, value in PAPER_CIFAR10.items() if key not in NO_OPTIONS}
    assert {key: options.get(key, "no such option") for key in paper} == {**paper, "random_flip": False}


@pytest.mark.parametrize(
    ("name", "paper"), [("cifar10.yaml", PAPER_CIFAR10), ("celebahq256.yaml", PAPER_256), ("lsun256.yaml", PAPER_256)]
)
def test_the_configurations_name_the_papers_values(name, paper):
    """What a file leaves out is the trainer's default, which is the paper's too."""
    given = {**defaults(), **yaml_values(name)}
    expected = {key: value for key, value in paper.items() if key not in NO_OPTIONS}
    assert {key: given.get(key, "no such option") for key in expected} == expected


@pytest.mark.parametrize(
    ("kind", "among"),
    [(DDPMPaperScheduler, {"beta_schedule", "beta_end"}), (DDPMPaperUNet, {"layers_per_block", "norm_num_groups"})],
)
def test_the_classes_defaults_are_the_papers_for_images(kind, among):
    """Those that all of the paper's image models share; dropout and variance differ among them."""
    given = {name: parameter.default for name, parameter in signature(kind.__init__).parameters.items()}
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    shared = given.keys() & PAPER_IMAGES.keys()
    assert among <= shared
    assert {name: given[name] for name in shared} == {name: PAPER_IMAGES[name] for name in shared}


def test_a_configuration_differs_where_it_says_another_value():
    assert compare_with_paper({**PAPER_CIFAR10, "sample_size": 32}) == ("the paper's CIFAR-10 configuration", [])
    changed = {**PAPER_CIFAR10, "sample_size": [32, 48], "dropout": 0.3, "seed": 7}
    assert compare_with_paper(changed)[1] == [("dropout", 0.1, 0.3)]
    title, differences = compare_with_paper({**PAPER_256, "sample_size": 256, "learning_rate": 1e-4})
    assert "256×256" in title and differences == [("learning_rate", 2e-5, 1e-4)]
    title, differences = compare_with_paper({**PAPER_PROCESS, "beta_end": 0.1}, is_points=True)
    assert "no points" in title and differences == [("beta_end", 0.02, 0.1)]
    assert compare_with_paper({})[1] == []
