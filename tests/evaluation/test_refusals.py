"""What evaluation refuses, and that it does so before hours of work."""

import sys
from typing import Any

import pytest
from PIL import Image

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.evaluation import METRICS, Protocol, evaluator as evaluation

pytest.importorskip("torchmetrics")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"metrics": ("bpd", "fdi")},
            r"metrics \['fdi'\] are unknown; choose among bpd, flow, classify, fid, is, kid, fd_dinov2",
        ),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
        ({"num_timesteps_subset": -1}, "num_timesteps_subset=-1 must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_dequantizations": 0}, "num_dequantizations=0 must be at least 1"),
        ({"tolerance": 0.0}, r"tolerance=0.0 must lie in \[1e-12, 1\]"),
        ({"num_probes": -1}, "num_probes=-1 must be 0, for the exact divergence, or more"),
        ({"metrics": ("fid",), "num_samples": 1}, "num_samples=1: fid needs at least 2"),
        ({"metrics": ("is",), "num_samples": 99}, "num_samples=99: is needs at least 100"),
        ({"metrics": ("bpd", "fid", "kid"), "num_samples": 999}, "num_samples=999: kid needs at least 1000"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 2\*\*32\)"),
        ({"seed": 2**32 - 50_000}, r"seed=.* with room for 50000 samples"),
        ({"dataset": None}, "dataset is missing: every metric but `is` compares with real images"),
        ({"dataset": None, "metrics": ("is", "fid")}, "dataset is missing"),
    ],
    ids=str,
)
def test_a_protocol_that_makes_no_sense_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"dataset": "digits", **changed})


def test_the_protocol_of_published_values_is_the_default():
    """50,000 samples; FID against the training set and bits/dim of the test set, as in Table 1."""
    protocol = Protocol(dataset="uoft-cs/cifar10", metrics=METRICS, label_column="label")
    assert protocol.num_samples == 50_000 and protocol.extractor == "inception"
    assert {metric: protocol.split_for(metric) for metric in METRICS} == {
        **{"bpd": "test", "flow": "test", "classify": "test"},
        **{"fid": "train", "is": "train", "kid": "train", "fd_dinov2": "train"},
    }  # fmt: skip
    assert Protocol(dataset="x", split="validation").split_for("bpd") == "validation"


@pytest.fixture
def no_sampling(monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("sampled before the refusal")

    monkeypatch.setattr(DDPMPaperPipeline, "__call__", refuse)
    monkeypatch.setattr(evaluation, "bits_per_dim", refuse)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (8, 8), "teal").save(folder / "a.png")
    Image.new("RGB", (9, 9), "navy").save(folder / "b.png")
    return str(folder)


@pytest.mark.parametrize("metric", ["bpd", "fid"])
def test_data_that_do_not_fit_are_refused_before_sampling(evaluator, photos, rgb, tiny, no_sampling, metric):
    def message(**changed: Any) -> str:
        with pytest.raises(ValueError) as error:
            list(evaluator(**{"metrics": (metric,), "num_samples": 4, **changed}).run())
        return str(error.value)

    assert "samples of shape (1, 8, 8) are needed, photos has (3, 8, 8)" in message(dataset=photos)
    assert f"split='test': the folder {photos} has none; give another folder" in message(dataset=photos, split="test")
    assert "samples of shape (3, 8, 8) are needed, digits has (1, 8, 8)" in message(source=rgb)
    assert "split='validation': digits has 'train' and 'test'" in message(split="validation")


def test_too_few_images_are_refused_before_sampling(evaluator, tiny, no_sampling):
    with pytest.raises(ValueError, match="kid needs 1000 real images; digits has 360"):
        list(evaluator(metrics=("kid",), split="test", num_samples=1000).run())


@pytest.mark.parametrize(
    ("metric", "module"), [("fid", "torch_fidelity"), ("is", "torch_fidelity"), ("fd_dinov2", "transformers")]
)
def test_a_missing_extra_is_named_before_any_sampling(evaluator, no_sampling, monkeypatch, metric, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'{module} cannot be imported .*: pip install "ddpm_hf\[eval\]"'):
        list(evaluator(metrics=(metric,), extractor="inception").run())


def test_a_missing_extractor_is_named_before_any_sampling(evaluator, no_sampling):
    with pytest.raises(ValueError, match="extractor 'no_such_module:Tiny': No module named 'no_such_module'"):
        list(evaluator(metrics=("fid",), extractor="no_such_module:Tiny").run())


def test_a_missing_split_is_refused_for_an_inception_score(evaluator, photos, tiny, no_sampling):
    with pytest.raises(ValueError, match="split='test'"):
        list(evaluator(metrics=("is",), dataset=photos, split="test", num_samples=100).run())


def test_missing_torchmetrics_is_named_before_sampling(evaluator, tiny, no_sampling, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.kid", None)
    with pytest.raises(ValueError, match=r"pip install"):
        list(evaluator(metrics=("fid",), num_samples=4).run())


def test_too_few_images_of_a_later_metric_are_refused_first(evaluator, tiny, no_sampling):
    with pytest.raises(ValueError, match="kid needs 1000 real images"):
        list(evaluator(metrics=("fid", "kid"), split="test", num_samples=1000).run())


def test_an_inception_score_needs_logits(evaluator, tiny):
    with pytest.raises(ValueError, match="logits"):
        list(evaluator(metrics=("is",), num_samples=100, extractor="tiny_extractors:Faceless").run())


@pytest.mark.parametrize("metric", ["fid", "is"])
def test_points_are_refused_for_metrics_of_images(
    evaluator, tiny, tiny_mlp, tiny_scheduler, tmp_path, no_sampling, metric
):
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler(clip_sample=False)).save_pretrained(tmp_path / "points")
    with pytest.raises(ValueError, match="points"):
        list(evaluator(source=tmp_path / "points", dataset="moons", metrics=(metric,), num_samples=100).run())
