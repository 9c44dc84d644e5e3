"""Evaluating a checkpoint with classes: bounds given the class, classes by their bounds, samples with labels."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from computed_at_once import digits, piece_files

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import main
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.evaluation import Protocol, metrics
from ddpm_hf.likelihood import bits_per_dim, class_bounds_bpd
from ddpm_hf.runs import read_results

DIGITS = {i: str(i) for i in range(10)}


def saved(unet: Any, scheduler: Any, folder: Path, names: dict[int, str] | None) -> str:
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)  # so that x̂_0 is not all clip
        unet.class_embedding.weight.mul_(20)  # so that classes count
    DDPMPaperPipeline(unet, scheduler, id2label=names).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def labelled(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """A pipeline's folder: 8×8 greyscale images of ten classes, in another order than the digits', in ten steps."""
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=11, null_class=0)
    names = {10 - i: name for i, name in DIGITS.items()}
    return saved(unet, tiny_scheduler(variance_type="fixed_large"), tmp_path_factory.mktemp("labelled"), names)


def truth(split: str, count: int) -> torch.Tensor:
    """The model's numbers of the first digits."""
    labels = load_samples("digits", split=split, label_column="label").labels[:count]
    return 10 - torch.from_numpy(labels)


def test_bits_per_dim_are_given_the_class(evaluator, labelled, tmp_path):
    (result,) = evaluator(source=labelled, num_images=20, label_column="label").run()
    (without,) = evaluator(source=labelled, num_images=20).run()
    pipe, x_start = DDPMPaperPipeline.from_pretrained(labelled), to_model_range(digits("test", 20), 17)
    for found, labels in ((result, truth("test", 20)), (without, None)):
        terms = bits_per_dim(pipe.unet, pipe.scheduler, x_start, class_labels=labels, seed=0, num_levels=17)
        assert found["value"] == pytest.approx(terms.total_b.mean().item(), rel=2e-6)
    assert result["value"] != pytest.approx(without["value"], rel=1e-5)
    assert (result["name"], without["name"]) == ("bits/dim given the class", "bits/dim")
    assert len(list((tmp_path / "work").glob("bpd-*"))) == 2  # one is not taken for the other


@pytest.mark.slow
def test_classes_are_told_by_their_bounds(evaluator, labelled, tmp_path):
    made = evaluator(source=labelled, num_images=37, label_column="label", metrics=("classify",), seed=5)
    (result,) = made.run()
    pipe, x_start = DDPMPaperPipeline.from_pretrained(labelled), to_model_range(digits("test", 37), 17)
    bounds = class_bounds_bpd(
        pipe.unet, pipe.scheduler, x_start, range(1, 11), seed=5, num_levels=17, num_timesteps_subset=10
    )
    accuracy = float((bounds.argmin(dim=1) + 1 == truth("test", 37)).double().mean())
    assert result["value"] == pytest.approx(accuracy) and 0 < accuracy < 1
    likely = (37 * accuracy + 1) / 39
    assert result["spread"] == pytest.approx(math.sqrt(likely * (1 - likely) / 37))
    assert result["protocol"]["num_timesteps_subset"] == 10  # the chain has no fifty
    assert len(piece_files(tmp_path, "classify")) == 3


def test_all_classes_see_the_same_noise(labelled):
    """A class's bounds are those of bits_per_dim with its label, which differ by the network alone."""
    pipe, x_start = DDPMPaperPipeline.from_pretrained(labelled), to_model_range(digits("test", 3), 17)
    options: Any = {"seed": 5, "num_levels": 17, "num_timesteps_subset": 4}
    bounds = class_bounds_bpd(pipe.unet, pipe.scheduler, x_start, [4, 4, 7], **options)
    assert torch.equal(bounds[:, 0], bounds[:, 1]) and not torch.equal(bounds[:, 0], bounds[:, 2])


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_samples_have_the_labels_of_the_data(evaluator, labelled, tiny, few_digits, monkeypatch, scale):
    """Seed i that of image i, from the first again where there are more seeds than images."""
    pytest.importorskip("torchmetrics")
    asked: list[torch.Tensor] = []
    call = DDPMPaperPipeline.__call__
    monkeypatch.setattr(
        DDPMPaperPipeline, "__call__", lambda pipe, **options: asked.append(options) or call(pipe, **options)
    )
    options = {"metrics": ("fid",), "num_samples": 20, "batch_size": 16, "seed": 7, "label_column": "label"}
    (result,) = evaluator(source=labelled, guidance_scale=scale, **options).run()
    labels = torch.cat([each["class_labels"] for each in asked])
    assert torch.equal(labels, truth("train", 32)) and {each["guidance_scale"] for each in asked} == {scale}
    protocol = result["protocol"]
    assert (protocol["label_column"], protocol["guidance_scale"]) == ("label", scale)
    pipe = DDPMPaperPipeline.from_pretrained(labelled)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(seeds=range(7, 27), class_labels=truth("train", 20), guidance_scale=scale, output_type="pt").images
    expected = metrics.frechet_distance(
        [tiny.Tiny()((255 * images).round().to(torch.uint8))["features"]],
        [tiny.Tiny()((digits("train", 40) * (255 / 16)).round().to(torch.uint8))["features"]],
    )
    assert result["value"] == pytest.approx(expected, rel=1e-3)


def test_classes_that_the_model_lacks_are_named(evaluator, checkpoint, tiny_unet, tiny_scheduler, tmp_path):
    few = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=9, null_class=8)
    names = saved(few, tiny_scheduler(), tmp_path / "names", {i: str(i) for i in range(8)})
    with pytest.raises(ValueError, match="images of 8, 9, and the model has the classes 0, 1, 2, 3, 4, 5, 6, 7"):
        evaluator(source=names, label_column="label")
    numbers = saved(few, tiny_scheduler(), tmp_path / "numbers", None)  # 8 is the row for no label
    with pytest.raises(ValueError, match="images of 8, 9, and the model has 8 classes"):
        evaluator(source=numbers, label_column="label")
    with pytest.raises(ValueError, match="and the model has 0 classes"):
        evaluator(label_column="label")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("classify",)}, "classify needs the labels"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs the labels"),
        ({"dataset": None, "metrics": ("is",), "label_column": "label"}, "label_column needs a dataset"),
    ],
)
def test_impossible_protocols_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**{"dataset": "digits", **options})


def test_the_command_prints_and_keeps_it(labelled, tmp_path, capsys):
    output = tmp_path / "evaluation.json"
    arguments = ["--dataset", "digits", "--label_column", "label", "--num_images", "8", "-o", str(output)]
    main(["evaluate", labelled, "--metrics", "bpd", "classify", *arguments, "--work_dir", str(tmp_path / "work")])
    printed = capsys.readouterr().out
    assert "bits/dim given the class " in printed and "accuracy of classes by their bounds 0." in printed
    assert [result["metric"] for result in read_results(output)] == ["bpd", "classify"]


def test_another_row_for_no_label_is_another_model(evaluator, labelled, tmp_path):
    """The weights are the same, and kept work is of the one or of the other."""
    pipe = DDPMPaperPipeline.from_pretrained(labelled)
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    other = type(pipe.unet)(**{**config, "null_class": 10})
    other.load_state_dict(pipe.unet.state_dict())
    folder = tmp_path / "other"
    DDPMPaperPipeline(other, pipe.scheduler, id2label={9 - i: name for i, name in DIGITS.items()}).save_pretrained(
        folder
    )
    for options in ({"num_images": 4}, {"num_images": 4, "metrics": ("classify",), "label_column": "label"}):
        kept = [len(list((tmp_path / "work").glob("*"))) for _ in [*evaluator(source=labelled, **options).run()]]
        after = [len(list((tmp_path / "work").glob("*"))) for _ in [*evaluator(source=folder, **options).run()]]
        assert after[0] == kept[0] + 1
