"""Evaluation: its numbers are those of the functions computed directly, however the work is cut, shared or stopped."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli.commands import main
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.evaluation import METRICS, Evaluator, Protocol, evaluator as evaluation, metrics
from ddpm_hf.evaluation.evaluator import IMAGES_PER_PIECE, is_training_data
from ddpm_hf.hub import card, load_model
from ddpm_hf.likelihood import bits_per_dim, rate_distortion
from ddpm_hf.runs import checkpoints, read_results, weights_sha256
from training import train as train_py

pytest.importorskip("torchmetrics")

ROOT = Path(__file__).parents[2]
EXTRACTOR = '''
"""Twelve features of an image, none of which depends on the others in its batch; counts its calls."""

import torch
from ddpm_hf.evaluation.metrics import Extractor

seen = []


class Tiny(Extractor):
    name = "tiny, of patches"

    def extract(self, images):
        seen.append(images.clone())
        patches = images.double().unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean(dim=(3, 5)).flatten(1) / 255
        return {"features": patches, "logits": 8 * patches[:, :5]}


class Faceless(Tiny):
    name = "tiny, without logits"

    def extract(self, images):
        return {"features": super().extract(images)["features"]}
'''


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """A pipeline's folder: 8×8 greyscale images in ten steps."""
    folder = tmp_path_factory.mktemp("checkpoint")
    unet = tiny_unet(in_channels=1, out_channels=1)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)  # so that x̂_0 is not all clip
    DDPMPaperPipeline(unet, tiny_scheduler(variance_type="fixed_large")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rgb(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """The same for colour images."""
    folder = tmp_path_factory.mktemp("rgb")
    DDPMPaperPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def extractor_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("extractors")
    (folder / "tiny_extractors.py").write_text(EXTRACTOR, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(extractor_folder, monkeypatch) -> Any:
    """The module of the extractor above; give it as "tiny_extractors:Tiny"."""
    monkeypatch.syspath_prepend(str(extractor_folder))
    module = importlib.import_module("tiny_extractors")
    module.seen.clear()
    return module


@pytest.fixture
def evaluator(checkpoint, tmp_path) -> Callable[..., Evaluator]:
    """evaluator(**protocol): of the checkpoint on digits, working in tmp_path."""

    def make(*, source: str | Path = checkpoint, **protocol: Any) -> Evaluator:
        AcceleratorState._reset_state(True)
        given = {"dataset": "digits", "extractor": "tiny_extractors:Tiny", **protocol}
        return Evaluator(Accelerator(cpu=True), str(source), Protocol(**given), work_dir=tmp_path / "work")

    return make


def digits(split: str, count: int | None = None) -> torch.Tensor:
    """Levels 0 to 16, uint8 [N, 1, 8, 8]."""
    samples = load_samples("digits", split=split)
    return samples.batch(list(range(count or len(samples))))


def of_digits(extractor: Any, name: str, split: str = "train") -> torch.Tensor:
    return extractor((digits(split) * (255 / 16)).round().to(torch.uint8))[name]


def drawn(checkpoint: str, seeds: range, **kwargs: Any) -> torch.Tensor:
    pipe: Any = DDPMPaperPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return (255 * pipe(seeds=seeds, output_type="pt", **kwargs).images).round().to(torch.uint8)


def piece_files(tmp_path: Path, kind: str) -> list[Path]:
    (folder,) = (tmp_path / "work").glob(f"{kind}-*")
    return sorted(folder.glob("piece-*.safetensors"))


def without_circumstances(result: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on when, and by how many processes, it was measured."""
    environment = {key: value for key, value in result["environment"].items() if key != "num_processes"}
    return {**result, "environment": environment, "time_utc": None}


# ---- bits/dim ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_timesteps_subset": 4, "seed": 5}, {"num_inference_steps": 5}],
    ids=lambda settings: ", ".join(settings) or "plain",
)
def test_bits_per_dim_is_that_of_the_whole_set_computed_at_once(evaluator, checkpoint, tmp_path, settings):
    """Of 37 images: two full pieces and a part of one. The pieces' batches round the network's output otherwise."""
    made = evaluator(num_images=37, **settings)
    (result,) = made.run()
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    x_start = to_model_range(digits("test", 37), 17)
    terms = bits_per_dim(pipe.unet, pipe.scheduler, x_start, num_levels=17, **{"seed": 0, **settings})
    assert result["metric"] == "bpd" and result["name"] == "bits/dim"
    assert result["value"] == pytest.approx(terms.total_b.mean().item(), rel=1e-5)
    assert result["spread"] == pytest.approx(terms.total_b.std().item() / 37**0.5, rel=1e-5)
    parts = result["parts"]
    assert parts["prior_bpd"] == pytest.approx(terms.prior_b.mean().item(), rel=1e-9)
    assert parts["decoder_bpd"] == pytest.approx(terms.terms_bt[:, 0].mean().item(), rel=1e-5)
    assert sum(parts.values()) == pytest.approx(result["value"], rel=1e-12)
    assert len(piece_files(tmp_path, "bpd")) == 3 == -(-37 // IMAGES_PER_PIECE)
    if "num_timesteps_subset" in settings:  # zeros where no term was drawn: no curve
        assert "rate_distortion" not in result
        return
    curve, expected = result["rate_distortion"], rate_distortion(terms)
    np.testing.assert_array_equal(curve["num_reverse_steps"], expected.num_reverse_steps)
    np.testing.assert_allclose(curve["rate_bpd"], expected.rate_bpd, rtol=1e-5)  # six digits are written
    np.testing.assert_allclose(curve["rmse"], expected.rmse, rtol=1e-5)


def test_bits_per_dim_of_points_and_of_a_model_that_samples_without_clip(
    evaluator, tiny_mlp, tiny_scheduler, tmp_path
):
    pipe = DDPMPaperPipeline(tiny_mlp(), tiny_scheduler(clip_sample=False))
    pipe.save_pretrained(tmp_path / "points")
    (result,) = evaluator(source=tmp_path / "points", dataset="moons", num_images=20).run()
    x_start = load_samples("moons", split="test").batch(list(range(20)))
    terms = bits_per_dim(pipe.unet, pipe.scheduler, x_start, seed=0, clip_denoised=False, num_levels=None)
    assert result["value"] == pytest.approx(terms.total_b.mean().item(), rel=1e-5)
    assert result["protocol"]["num_levels"] is None and result["protocol"]["clip_denoised"] is False


def test_the_subset_estimate_says_that_it_is_one(evaluator):
    (estimate,) = evaluator(num_images=3, num_timesteps_subset=2).run()
    (whole,) = evaluator(num_images=3).run()
    assert estimate["protocol"] == whole["protocol"] | {"num_timesteps_subset": 2}
    assert whole["protocol"]["num_timesteps_subset"] is None
    assert estimate["value"] != whole["value"]


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"num_images": 19}, {"split": "train"}, {"num_inference_steps": 5}, {"num_timesteps_subset": 3}],
    ids=str,
)
def test_no_piece_of_another_protocol_is_taken(evaluator, changed):
    protocol = {"num_images": 20}
    (first,) = evaluator(**protocol).run()
    (other,) = evaluator(**{**protocol, **changed}).run()
    assert other["value"] != first["value"]
    (again,) = evaluator(**protocol).run()
    assert again["value"] == first["value"]


def test_no_piece_of_another_model_is_taken(evaluator, checkpoint, tmp_path):
    (first,) = evaluator(num_images=5).run()
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1e-3
    pipe.save_pretrained(tmp_path / "trained on")
    (other,) = evaluator(source=tmp_path / "trained on", num_images=5).run()
    assert other["value"] != first["value"] and other["model"]["weights_sha256"] != first["model"]["weights_sha256"]
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, variance_type="fixed_small")
    pipe.save_pretrained(tmp_path / "another process")
    (other,) = evaluator(source=tmp_path / "another process", num_images=5).run()
    assert other["value"] != first["value"] and other["model"]["weights_sha256"] == first["model"]["weights_sha256"]


# ---- metrics of samples --------------------------------------------------------------------------------------------


def test_images_are_the_pipelines_in_micro_batches_of_which_the_last_is_filled_up(
    evaluator, checkpoint, tmp_path, tiny
):
    """Ten samples in micro-batches of four: the seeds 16 and 17 of the last are drawn and then left out."""
    (result,) = evaluator(metrics=("fid",), num_samples=10, batch_size=4, seed=6).run()
    files = piece_files(tmp_path, "samples")
    assert len(files) == 3
    for number, path in enumerate(files):
        images = load_file(path)["images"]
        assert torch.equal(images, drawn(checkpoint, range(6 + 4 * number, 10 + 4 * number)))
    samples = torch.cat([load_file(path)["images"] for path in files])[:10]
    expected = metrics.frechet_distance([tiny.Tiny()(samples)["features"]], [of_digits(tiny.Tiny(), "features")])
    assert result["value"] == pytest.approx(expected, rel=1e-9) and result["spread"] is None
    assert result["name"] == "FID-10"
    assert result["protocol"] == {
        "extractor": "tiny, of patches",
        "seeds": "6-15",
        "num_reference": 1437,
        "num_samples": 10,
    }


def test_progress_moves_within_a_micro_batch(evaluator, tiny, capsys):
    made = evaluator(metrics=("fid",), num_samples=7, batch_size=4)
    made.pipe.set_progress_bar_config(**made.pipe._progress_bar_config, mininterval=0, miniters=1)
    list(made.run())
    counted = re.findall(r"reverse steps:[^\r\n]*?(\d+)/10 ", capsys.readouterr().err)
    assert [int(n) for n in counted] == 2 * list(range(11))


def test_further_samples_are_added_to_those_there_are(evaluator, tmp_path, tiny, monkeypatch):
    list(evaluator(metrics=("fid",), num_samples=8, batch_size=4, num_inference_steps=2).run())
    (result,) = evaluator(metrics=("fid",), num_samples=11, batch_size=4, num_inference_steps=2).run()
    assert len(piece_files(tmp_path, "samples")) == 3  # one folder, one more piece
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "elsewhere"))
    fresh = evaluator(metrics=("fid",), num_samples=11, batch_size=4, num_inference_steps=2)
    fresh.work_dir = evaluation.default_work_dir()
    assert fresh.work_dir == tmp_path / "elsewhere" / "evaluation"
    (at_once,) = fresh.run()
    assert at_once["value"] == result["value"]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 3}, {"num_inference_steps": 3}], ids=str)
def test_no_samples_of_another_protocol_are_taken(evaluator, tmp_path, tiny, changed):
    protocol = {"metrics": ("fid",), "num_samples": 7, "batch_size": 4, "num_inference_steps": 2}
    list(evaluator(**protocol).run())
    (beside,) = evaluator(**{**protocol, **changed}).run()
    (tmp_path / "work").rename(tmp_path / "aside")
    (alone,) = evaluator(**{**protocol, **changed}).run()
    assert beside["value"] == alone["value"]


def test_every_metric_of_samples_in_one_run(evaluator, checkpoint, tiny, monkeypatch):
    """A thousand samples, of one step each; drawn once, seen by each extractor once."""
    calls = []
    call = DDPMPaperPipeline.__call__
    monkeypatch.setattr(DDPMPaperPipeline, "__call__", lambda *args, **kw: calls.append(kw) or call(*args, **kw))
    monkeypatch.setattr(metrics, "Dinov2Extractor", tiny.Faceless)
    made = evaluator(
        metrics=("fid", "is", "kid", "fd_dinov2"), num_samples=1000, batch_size=250, num_inference_steps=1, seed=3
    )
    results = {result["metric"]: result for result in made.run()}
    assert [kw["seeds"] for kw in calls] == [range(3 + 250 * i, 253 + 250 * i) for i in range(4)]
    # by two extractors: 1000 samples and 1437 digits in batches of 250; and a blank one, to look for logits
    assert len(tiny.seen) == 2 * (4 + 6) + 1
    extractor = tiny.Tiny()
    images = torch.cat([drawn(checkpoint, kw["seeds"], num_inference_steps=1) for kw in calls[:4]])
    ours, real = extractor(images)["features"], of_digits(extractor, "features")
    expected = {
        "fid": (metrics.frechet_distance([ours], [real]), None),
        "is": metrics.inception_score([extractor(images)["logits"]], seed=3),
        "kid": metrics.kernel_distance([ours], [real], seed=3),
        "fd_dinov2": (metrics.frechet_distance([ours], [real]), None),
    }
    names = {"fid": "FID-1k", "is": "IS-1k", "kid": "KID-1k", "fd_dinov2": "FD-DINOv2-1k"}
    assert list(results) == list(expected)
    for metric, (value, spread) in expected.items():
        result = results[metric]
        assert (result["value"], result["spread"], result["name"]) == (
            pytest.approx(value, rel=1e-9),
            spread if spread is None else pytest.approx(spread, rel=1e-9),
            names[metric],
        )
        name = "tiny, without logits" if metric == "fd_dinov2" else "tiny, of patches"
        assert result["protocol"]["extractor"] == name
        assert result["model"]["num_inference_steps"] == 1
        if metric != "is":
            assert result["protocol"]["num_reference"] == 1437 and result["data"]["split"] == "train"
    # an Inception Score needs no real images
    (alone,) = evaluator(
        metrics=("is",), dataset=None, num_samples=1000, batch_size=250, num_inference_steps=1, seed=3
    ).run()
    assert alone["value"] == results["is"]["value"] and alone["data"] is None and len(calls) == 8


def test_real_images_of_a_folder_are_fitted_to_the_model(evaluator, rgb, tmp_path, tiny, monkeypatch):
    """RGB against RGB, 20 pixels cut and scaled to 8, in all 256 levels; `split` is "train" for every metric."""
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    pipe = DDPMPaperPipeline.from_pretrained(rgb)
    made = evaluator(source=rgb, dataset=str(folder), metrics=("bpd", "fid"), num_samples=4, batch_size=4)
    bound, distance = made.run()
    real = load_samples(train_data_dir=folder, resolution=8)
    terms = bits_per_dim(pipe.unet, pipe.scheduler, to_model_range(real.batch(range(6)), 256), seed=0)
    assert bound["value"] == pytest.approx(terms.total_b.mean().item(), rel=1e-5)
    ours, theirs = (tiny.Tiny()(images)["features"] for images in (drawn(rgb, range(4)), real.batch(range(6))))
    assert distance["value"] == pytest.approx(metrics.frechet_distance([ours], [theirs]), rel=1e-9)
    for result in (bound, distance):
        assert result["data"] == {"name": "photos", "split": "train", "fingerprint": real.fingerprint}


# ---- what a result says --------------------------------------------------------------------------------------------


def test_a_result_states_its_protocol(evaluator, checkpoint):
    (result,) = evaluator(num_images=20, num_inference_steps=5, seed=2).run()
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    assert result["model"] == {
        "weights": "as saved",
        "weights_sha256": weights_sha256(pipe.unet.state_dict()),
        "scheduler": "DDPMPaperScheduler",
        "variance_type": "fixed_large",
        "num_inference_steps": 5,
    }
    assert result["data"] == {
        "name": "digits",
        "split": "test",
        "fingerprint": load_samples("digits", split="test").fingerprint,
    }
    assert result["protocol"] == {
        "num_images": 20,
        "seed": 2,
        "clip_denoised": True,
        "num_levels": 17,
        "num_inference_steps": 5,
        "num_timesteps_subset": None,
    }
    assert result["environment"] == {**card.environment(torch.device("cpu")), "num_processes": 1}
    assert result["time_utc"].endswith("+00:00")
    assert json.loads(json.dumps(result)) == result
    (result,) = evaluator(num_images=1).run()
    assert result["model"]["num_inference_steps"] == 10 and result["spread"] is None


def test_the_identity_of_weights_is_their_names_shapes_and_bits(tiny_unet):
    unet = tiny_unet()
    identity = weights_sha256(unet.state_dict())
    assert weights_sha256(tiny_unet().state_dict()) == identity
    with torch.no_grad():
        unet.conv_in.bias[3] = torch.nextafter(unet.conv_in.bias[3], torch.tensor(torch.inf))
    assert weights_sha256(unet.state_dict()) != identity
    linear, transposed = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.reshape(2, 3))
    assert weights_sha256(linear.state_dict()) != weights_sha256(transposed.state_dict())


# ---- weights of a training run -------------------------------------------------------------------------------------

TINY_RUN = (
    "--block_out_channels 8 --attention_resolutions --layers_per_block 1 --norm_num_groups 4 --global_batch_size 16 "
    "--num_train_timesteps 10 --beta_end 0.5 --num_steps 4 --warmup_steps 0 --learning_rate 1e-2 --ema_decay 0.5 "
    "--checkpoint_every 2 --log_every 1 --sample_every 0 --cpu_threads 1"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a training of four steps, with its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    AcceleratorState._reset_state(True)
    train_py.main([*TINY_RUN, "--output_dir", str(folder)])
    return folder


def test_averaged_and_raw_weights_of_a_run(evaluator, run):
    step = run / "checkpoints" / "step-4"
    pipe = DDPMPaperPipeline.from_pretrained(run)
    x_start = to_model_range(digits("test", 18), 17)
    found = {}
    for weights, name in (("ema", "ema"), ("raw", "model"), (None, "ema")):
        (result,) = evaluator(source=run, num_images=18, weights=weights).run()
        pipe.unet.load_state_dict(checkpoints.read(step, name))
        terms = bits_per_dim(pipe.unet, pipe.scheduler, x_start, seed=0, num_levels=17)
        assert result["value"] == pytest.approx(terms.total_b.mean().item(), rel=1e-5)
        assert result["model"]["weights"] == (weights or "ema")
        found[weights] = result["value"]
    assert found[None] == found["ema"] and abs(found["raw"] - found["ema"]) > 1e-3
    assert load_model(str(step), "raw")[1] == "raw"  # a checkpoint itself, given in place of its run
    older = load_model(str(run / "checkpoints" / "step-2"), "ema")[0]
    assert weights_sha256(older.unet.state_dict()) != weights_sha256(load_model(str(run), "ema")[0].unet.state_dict())


def test_weights_that_are_not_there_are_refused(run, checkpoint, tmp_path):
    """A finished run without its checkpoints has its averaged weights; a mere pipeline, one may not know which."""
    finished = tmp_path / "finished"
    finished.mkdir()
    pipe = DDPMPaperPipeline.from_pretrained(run)
    pipe.save_pretrained(finished)
    assert load_model(str(finished), None)[1] == "as saved"
    (finished / "options.yaml").write_bytes((run / "options.yaml").read_bytes())
    assert load_model(str(finished), None)[1] == load_model(str(finished), "ema")[1] == "ema"
    for folder, weights in ((finished, "raw"), (checkpoint, "raw"), (checkpoint, "ema")):
        with pytest.raises(ValueError, match=f"weights='{weights}': .* is no training checkpoint and has one kind"):
            load_model(str(folder), weights)


# ---- data that the network was trained on --------------------------------------------------------------------------


def warned(made: Evaluator, caplog) -> str:
    """What an evaluation itself warns of."""
    caplog.clear()
    list(made.run())
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "ddpm_hf.evaluation")


def test_a_bound_of_the_training_data_is_told_to_be_one(evaluator, run, checkpoint, tmp_path, caplog):
    """By the fingerprint in a checkpoint, or by the options beside a finished run; of bits/dim alone."""
    finished = tmp_path / "finished"
    DDPMPaperPipeline.from_pretrained(run).save_pretrained(finished)
    (finished / "options.yaml").write_bytes((run / "options.yaml").read_bytes())
    told = (
        "bits/dim of digits, split train: the network was trained on these data, and new ones would have more; "
        "measure it with --split test"
    )
    for source in (run, run / "checkpoints" / "step-2", finished):
        assert warned(evaluator(source=source, num_images=2, split="train"), caplog) == told
        assert not warned(evaluator(source=source, num_images=2), caplog)
    for unknown in (checkpoint, tmp_path / "unreadable"):
        if unknown != checkpoint:
            DDPMPaperPipeline.from_pretrained(run).save_pretrained(unknown)
            (tmp_path / "unreadable" / "options.yaml").write_text("[")
        assert not warned(evaluator(source=unknown, num_images=2, split="train"), caplog)


def test_what_is_measured_on_training_data_by_convention_is_not_told_of(evaluator, run, tiny, caplog):
    assert not warned(evaluator(source=run, metrics=("fid",), num_samples=4, batch_size=4), caplog)
    caplog.clear()
    evaluator(source=run, split="train", num_images=2).bound_terms()  # as `shorten` measures
    assert not caplog.records


NAMED = {"dataset_name": "digits", "dataset_split": "train", "dataset_config": None, "train_data_dir": None}


@pytest.mark.parametrize(
    ("options", "fingerprint", "dataset", "expected"),
    [
        (NAMED, None, "digits", True),
        (NAMED, "ab12", "renamed", True),
        (NAMED, "cd34", "digits", True),  # the same set, of another version
        (NAMED, "cd34", "renamed", False),
        ({**NAMED, "dataset_split": "train[:90%]"}, None, "digits", False),
        ({**NAMED, "dataset_config": "large"}, None, "digits", False),
        ({"train_data_dir": "{here}/photos", "dataset_split": "train"}, None, "photos", True),
        ({"train_data_dir": "{here}/photos", "dataset_split": "train"}, "cd34", "photos", True),  # one was added
        ({"train_data_dir": "photos", "dataset_split": "train"}, "ab12", "photos", True),
        ({"train_data_dir": "photos", "dataset_split": "train"}, None, "photos", False),  # from where?
        ({"train_data_dir": "{here}/photos", "dataset_split": "train"}, None, "held out", False),
        ({}, None, "digits", False),
    ],
)
def test_training_data_are_known_by_their_fingerprint_or_their_name(
    tmp_path, monkeypatch, options, fingerprint, dataset, expected
):
    """Without a fingerprint as of a finished run, else as of a training checkpoint; the data's is ab12."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "held out", "run/train_state"):
        Path(name).mkdir(parents=True)
    options = {key: value and value.format(here=tmp_path) for key, value in options.items()}
    if fingerprint:
        manifest = {"options": options, "dataset": {"fingerprint": fingerprint}}
        Path("run/train_state/manifest.json").write_text(json.dumps(manifest))
    elif options:
        Path("run/options.yaml").write_text(json.dumps(options))  # which is YAML too
    assert is_training_data("run", dataset, "train", "ab12") is expected


def test_a_bound_of_the_folder_of_training_is_told_to_be_one(evaluator, rgb, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    model, photos = tmp_path / "model", tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (8, 8), "teal").save(photos / "0.png")
    DDPMPaperPipeline.from_pretrained(rgb).save_pretrained(model)
    (model / "options.yaml").write_text(f"train_data_dir: {photos}\n")
    message = warned(evaluator(source=model, dataset=str(photos)), caplog)
    assert message.startswith("bits/dim of photos, split train: ") and "--split" not in message
    assert message.endswith("measure it on a folder of held-out images")


# ---- runs that were stopped, and several processes -----------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_numbers(evaluator, tmp_path, tiny, monkeypatch):
    protocol = {"metrics": ("bpd", "fid"), "num_images": 50, "num_samples": 18, "batch_size": 4}
    undisturbed = list(evaluator(**protocol).run())
    stopped = tmp_path / "stopped"
    calls = {"bits_per_dim": 0, "pipe": 0}
    bound, call = evaluation.bits_per_dim, DDPMPaperPipeline.__call__

    def counting(name: str, function: Any, limit: list[int]) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            if calls[name] == limit[0]:
                raise KeyboardInterrupt
            calls[name] += 1
            return function(*args, **kwargs)

        return count

    def attempt(pieces_of_the_bound: int, micro_batches: int) -> list[dict[str, Any]]:
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "bits_per_dim", counting("bits_per_dim", bound, [pieces_of_the_bound]))
            patch.setattr(DDPMPaperPipeline, "__call__", counting("pipe", call, [micro_batches]))
            made = evaluator(**protocol)
            made.work_dir = stopped
            return list(made.run())

    for limits in ((1, 0), (3, 0), (4, 2)):
        with pytest.raises(KeyboardInterrupt):
            attempt(*limits)
    continued = attempt(99, 99)
    assert calls == {"bits_per_dim": 4, "pipe": 5}  # nothing twice
    assert list(map(without_circumstances, continued)) == list(map(without_circumstances, undisturbed))


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ddpm_hf.cli"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.mark.slow
def test_two_processes_killed_and_repeated_give_the_numbers_of_one(
    checkpoint, extractor_folder, tmp_path, monkeypatch
):
    """Real ones, by torchrun and by accelerate; every digit of every number, as no kernel sees another batch."""
    arguments = ["evaluate", checkpoint, "--dataset", "digits", "--metrics", "bpd", "fid", "is"]
    arguments += ["--num_images", "100", "--num_samples", "410", "--batch_size", "40"]
    arguments += ["--extractor", "tiny_extractors:Tiny", "--cpu_threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = f"{extractor_folder}:{ROOT}"

    def start(name: str, launcher: list[str]) -> subprocess.Popen[str]:
        own = ["--work_dir", str(tmp_path / f"{name} work"), "-o", str(tmp_path / f"{name}.json")]
        command = [sys.executable, *launcher, *arguments, *own]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT
        )

    def finish(process: subprocess.Popen[str]) -> str:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def numbers(name: str) -> list[dict[str, Any]]:
        return [without_circumstances(result) for result in read_results(tmp_path / f"{name}.json")]

    monkeypatch.syspath_prepend(str(extractor_folder))
    monkeypatch.chdir(tmp_path)
    main([*arguments, "--work_dir", str(tmp_path / "one work"), "-o", "one.json"])
    assert [result["metric"] for result in numbers("one")] == ["bpd", "fid", "is"]

    killed = start("two", TORCHRUN)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "two work").glob("samples-*/piece-*.safetensors"))) < 4:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    parent = psutil.Process(killed.pid)
    for each in [parent, *parent.children(recursive=True)]:  # torchrun puts its processes into sessions of their own
        each.kill()
    killed.communicate()
    assert [result["metric"] for result in numbers("two")] == ["bpd"]
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "two work").glob("*/piece-*.safetensors")}
    assert finish(start("two", TORCHRUN)).count("with the whole protocol in") == 1  # one writes and prints
    assert all(path.stat().st_mtime_ns == then for path, then in pieces.items())
    assert numbers("two") == numbers("one")
    results = read_results(tmp_path / "two.json")
    assert {result["environment"]["num_processes"] for result in results} == {2}
    finish(start("accelerate", [*ACCELERATE, "-m", "ddpm_hf.cli"]))
    assert numbers("accelerate") == numbers("one")


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metrics": ("bpd", "fdi")}, r"metrics \['fdi'\] are unknown; choose among bpd, fid, is, kid, fd_dinov2"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
        ({"num_timesteps_subset": -1}, "num_timesteps_subset=-1 must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
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
    protocol = Protocol(dataset="uoft-cs/cifar10", metrics=METRICS)
    assert protocol.num_samples == 50_000 and protocol.extractor == "inception"
    assert {metric: protocol.split_for(metric) for metric in METRICS} == {
        "bpd": "test", "fid": "train", "is": "train", "kid": "train", "fd_dinov2": "train"
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
def test_data_that_do_not_fit_are_refused_before_any_sampling(evaluator, photos, rgb, tiny, no_sampling, metric):
    def message(**changed: Any) -> str:
        with pytest.raises(ValueError) as error:
            list(evaluator(**{"metrics": (metric,), "num_samples": 4, **changed}).run())
        return str(error.value)

    assert "samples of shape (1, 8, 8) are needed, photos has (3, 8, 8)" in message(dataset=photos)
    assert f"split='test': the folder {photos} has none; give another folder" in message(dataset=photos, split="test")
    assert "samples of shape (3, 8, 8) are needed, digits has (1, 8, 8)" in message(source=rgb)
    assert "split='validation': digits has 'train' and 'test'" in message(split="validation")


def test_too_few_real_images_are_refused_before_any_sampling(evaluator, tiny, no_sampling):
    with pytest.raises(ValueError, match="kid needs 1000 real images; digits has 360"):
        list(evaluator(metrics=("kid",), split="test", num_samples=1000).run())


@pytest.mark.parametrize(
    ("metric", "module"), [("fid", "torch_fidelity"), ("is", "torch_fidelity"), ("fd_dinov2", "transformers")]
)
def test_without_the_extra_its_name_is_told_before_any_sampling(evaluator, no_sampling, monkeypatch, metric, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'{module} cannot be imported .*: pip install "ddpm_hf\[eval\]"'):
        list(evaluator(metrics=(metric,), extractor="inception").run())


def test_an_extractor_that_is_not_there_is_told_before_any_sampling(evaluator, no_sampling):
    with pytest.raises(ValueError, match="extractor 'no_such_module:Tiny': No module named 'no_such_module'"):
        list(evaluator(metrics=("fid",), extractor="no_such_module:Tiny").run())


# Refusals come before hours of work.


def test_a_split_that_is_not_there_is_refused_before_sampling_for_an_inception_score(
    evaluator, photos, tiny, no_sampling
):
    with pytest.raises(ValueError, match="split='test'"):
        list(evaluator(metrics=("is",), dataset=photos, split="test", num_samples=100).run())


def test_without_torchmetrics_it_is_told_before_sampling(evaluator, tiny, no_sampling, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ValueError, match=r"pip install"):
        list(evaluator(metrics=("fid",), num_samples=4).run())


def test_too_few_real_images_of_a_later_metric_are_refused_before_the_first(evaluator, tiny, no_sampling):
    with pytest.raises(ValueError, match="kid needs 1000 real images"):
        list(evaluator(metrics=("fid", "kid"), split="test", num_samples=1000).run())


def test_an_extractor_without_logits_is_refused_for_an_inception_score(evaluator, tiny):
    with pytest.raises(ValueError, match="logits"):
        list(evaluator(metrics=("is",), num_samples=100, extractor="tiny_extractors:Faceless").run())


@pytest.mark.parametrize("metric", ["fid", "is"])
def test_points_are_refused_for_metrics_of_images(
    evaluator, tiny, tiny_mlp, tiny_scheduler, tmp_path, no_sampling, metric
):
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler(clip_sample=False)).save_pretrained(tmp_path / "points")
    with pytest.raises(ValueError, match="points"):
        list(evaluator(source=tmp_path / "points", dataset="moons", metrics=(metric,), num_samples=100).run())
