"""The flow's bits/dim of a checkpoint: those of `flow_bits_per_dim`, however the work is cut or stopped."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from computed_at_once import digits, piece_files

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import main
from ddpm_hf.data import to_model_range
from ddpm_hf.evaluation import flows
from ddpm_hf.flow import flow_bits_per_dim
from ddpm_hf.runs import read_results


@pytest.fixture(scope="module")
def tame(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """A pipeline's folder: 8×8 greyscale images, whose random network of v has small outputs: the flow is calm."""
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=11, null_class=10)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.02)
        unet.class_embedding.weight.mul_(20)
    folder = tmp_path_factory.mktemp("tame")
    names = {i: str(i) for i in range(10)}
    DDPMPaperPipeline(unet, tiny_scheduler(prediction_type="v_prediction"), id2label=names).save_pretrained(folder)
    return str(folder)


SETTINGS: dict[str, Any] = {"tolerance": 1e-2, "num_probes": 1}


@pytest.mark.slow
def test_it_is_that_of_the_pieces(evaluator, tame, tmp_path, monkeypatch):
    """Of 18 images: a piece and a part of one; a second run measures nothing, and another tolerance does."""
    protocol = {"source": tame, "metrics": ("flow",), "num_images": 18, **SETTINGS}
    (result,) = evaluator(**protocol).run()
    pipe, x_start = DDPMPaperPipeline.from_pretrained(tame), to_model_range(digits("test", 18), 17)
    bits = flow_bits_per_dim(pipe.unet, pipe.scheduler, x_start, seed=0, num_levels=17, batch_size=16, **SETTINGS)
    assert result["value"] == pytest.approx(bits.total_b.mean().item(), rel=1e-6)
    assert result["spread"] == pytest.approx(bits.total_b.std().item() / math.sqrt(18), rel=1e-6)
    assert result["parts"]["prior_bpd"] == pytest.approx(bits.prior_b.mean().item(), rel=1e-6)
    assert result["parts"]["bins_bpd"] == pytest.approx(3)  # of width 1/8
    assert sum(result["parts"].values()) == pytest.approx(result["value"])
    assert (result["metric"], result["name"]) == ("flow", "bits/dim of the flow")
    settings = {"num_images": 18, "num_levels": 17, "seed": 0, "num_dequantizations": 1, **SETTINGS}
    assert result["protocol"] == settings and len(piece_files(tmp_path, "flow")) == 2

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(flows, "flow_bits_per_dim", refuse)
    (again,) = evaluator(**protocol).run()
    assert again["value"] == result["value"]
    for changed in ({"tolerance": 0.1}, {"num_probes": 2}, {"num_dequantizations": 2}, {"seed": 1}):
        with pytest.raises(AssertionError, match="measured again"):
            list(evaluator(**{**protocol, **changed}).run())


def test_it_is_given_the_class(evaluator, tame):
    options = {"source": tame, "metrics": ("flow",), "num_images": 3, **SETTINGS}
    (without,) = evaluator(**options).run()
    (given,) = evaluator(**options, label_column="label").run()
    assert given["name"] == "bits/dim of the flow given the class"
    assert given["value"] != pytest.approx(without["value"], rel=1e-6)


def test_points_have_a_density(evaluator, tiny_mlp, tiny_scheduler, tmp_path):
    """The exact divergence by default, and no bins."""
    pipe = DDPMPaperPipeline(tiny_mlp(), tiny_scheduler(clip_sample=False, prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path / "points")
    (result,) = evaluator(source=tmp_path / "points", dataset="moons", num_images=5, metrics=("flow",)).run()
    assert result["parts"]["bins_bpd"] == pytest.approx(0, abs=1e-12) and result["protocol"]["num_levels"] is None


def test_the_command_prints_and_keeps_it(tame, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    words = ["--dataset", "digits", "--num_images", "2", "--tolerance", "0.01", "--num_probes", "1", "-o", str(output)]
    main(["evaluate", tame, "--metrics", "flow", *words, "--work_dir", str(tmp_path / "work")])
    (result,) = read_results(output)
    assert capsys.readouterr().out.splitlines() == [
        f"bits/dim of the flow {result['value']:.4f} ± {result['spread']:.4f}",
        *(f"    {name} {result['parts'][name]:.6f}" for name in ("prior_bpd", "contraction_bpd", "bins_bpd")),
        f"with the whole protocol in {output}",
    ]


def test_what_has_no_flow_is_refused_at_once(evaluator, tame, checkpoint, tmp_path, monkeypatch):
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="previous_sample")
    pipe.save_pretrained(tmp_path / "mean")
    with pytest.raises(ValueError, match="previous_sample is the mean of single steps"):
        evaluator(source=Path(tmp_path / "mean"), metrics=("flow",))
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)  # what cannot be imported
    with pytest.raises(ValueError, match=r"pip install 'ddpm_hf\[flow\]'"):
        evaluator(source=tame, metrics=("flow",))
