"""Evaluation: its numbers are those of the functions computed directly, however the work is cut, shared or stopped."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from computed_at_once import digits, drawn, of_digits, piece_files, without_circumstances
from fork_server import Forked, pair_variables
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import main
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.evaluation import evaluator as evaluation, frechet_distance_error, kernel_distance_error, metrics
from ddpm_hf.evaluation.evaluator import IMAGES_PER_PIECE
from ddpm_hf.likelihood import bits_per_dim, rate_distortion
from ddpm_hf.runs import environment, read_results, weights_sha256

pytest.importorskip("torchmetrics")

ROOT = Path(__file__).parents[2]


# ---- bits/dim ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_timesteps_subset": 4, "seed": 5}, {"num_inference_steps": 5}],
    ids=lambda settings: ", ".join(settings) or "plain",
)
def test_bits_per_dim_is_that_of_the_set_computed_at_once(evaluator, checkpoint, tmp_path, settings):
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


def test_bits_per_dim_of_points_by_a_model_without_clip(evaluator, tiny_mlp, tiny_scheduler, tmp_path):
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_images_are_the_pipelines_in_micro_batches(evaluator, few_digits, checkpoint, tmp_path, tiny):
    """Ten samples in micro-batches of four: the seeds 16 and 17 of the last are drawn and then left out."""
    (result,) = evaluator(metrics=("fid",), num_samples=10, batch_size=4, seed=6).run()
    files = piece_files(tmp_path, "samples")
    assert len(files) == 3
    for number, path in enumerate(files):
        images = load_file(path)["images"]
        assert torch.equal(images, drawn(checkpoint, range(6 + 4 * number, 10 + 4 * number)))
    samples = torch.cat([load_file(path)["images"] for path in files])[:10]
    expected = metrics.frechet_distance([tiny.Tiny()(samples)["features"]], [of_digits(tiny.Tiny(), "features", 40)])
    assert result["value"] == pytest.approx(expected, rel=1e-9) and result["spread"] > 0
    assert result["name"] == "FID-10"
    assert result["protocol"] == {
        "extractor": "tiny, of patches",
        "seeds": "6-15",
        "num_reference": 40,
        "num_samples": 10,
    }


def test_progress_moves_within_a_micro_batch(evaluator, few_digits, tiny, capsys):
    made = evaluator(metrics=("fid",), num_samples=7, batch_size=4)
    made.pipe.set_progress_bar_config(**made.pipe._progress_bar_config, mininterval=0, miniters=1)
    list(made.run())
    counted = re.findall(r"reverse steps:[^\r\n]*?(\d+)/10 ", capsys.readouterr().err)
    assert [int(n) for n in counted] == 2 * list(range(11))


def test_further_samples_are_added_to_those_there_are(evaluator, few_digits, tmp_path, tiny, monkeypatch):
    list(evaluator(metrics=("fid",), num_samples=8, batch_size=4, num_inference_steps=2).run())
    (result,) = evaluator(metrics=("fid",), num_samples=11, batch_size=4, num_inference_steps=2).run()
    assert len(piece_files(tmp_path, "samples")) == 3  # one folder, one more piece
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "elsewhere"))
    fresh = evaluator(metrics=("fid",), num_samples=11, batch_size=4, num_inference_steps=2)
    fresh.work_dir = evaluation.default_work_dir()
    assert fresh.work_dir == tmp_path / "elsewhere" / "evaluation"
    (at_once,) = fresh.run()
    assert at_once["value"] == result["value"]


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_size": 3}, {"num_inference_steps": 3}], ids=str)
def test_no_samples_of_another_protocol_are_taken(evaluator, few_digits, tmp_path, tiny, changed):
    protocol = {"metrics": ("fid",), "num_samples": 7, "batch_size": 4, "num_inference_steps": 2}
    list(evaluator(**protocol).run())
    (beside,) = evaluator(**{**protocol, **changed}).run()
    (tmp_path / "work").rename(tmp_path / "aside")
    (alone,) = evaluator(**{**protocol, **changed}).run()
    assert beside["value"] == alone["value"]


@pytest.mark.slow
def test_every_metric_of_samples_in_one_run(evaluator, checkpoint, tiny, monkeypatch):
    """A thousand samples, of one step each; drawn once, seen by each extractor once."""
    calls = []
    call = DDPMPaperPipeline.__call__
    monkeypatch.setattr(DDPMPaperPipeline, "__call__", lambda *args, **kw: calls.append(kw) or call(*args, **kw))
    monkeypatch.setattr(metrics, "Dinov2Extractor", tiny.Faceless)
    monkeypatch.setattr(metrics, "KERNEL_SUBSETS", 5)  # of 1000 samples each; 100 say no more here
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
    mean, deviation = metrics.kernel_distance([ours], [real], seed=3)
    expected = {
        "fid": (metrics.frechet_distance([ours], [real]), frechet_distance_error([ours], [real], seed=3)),
        "is": metrics.inception_score([extractor(images)["logits"]], seed=3),
        "kid": (mean, kernel_distance_error([ours], [real], seed=3, deviation=deviation)),
        "fd_dinov2": (metrics.frechet_distance([ours], [real]), frechet_distance_error([ours], [real], seed=3)),
    }
    names = {"fid": "FID-1k", "is": "IS-1k", "kid": "KID-1k", "fd_dinov2": "FD-DINOv2-1k"}
    assert list(results) == list(expected)
    assert [result["spread_is"].split()[0] for result in results.values()] == [
        *("standard", "deviation", "standard", "standard"),  # IS: over its splits, as it is published
    ]
    for metric, (value, spread) in expected.items():
        result = results[metric]
        assert (result["value"], result["spread"], result["name"]) == (
            pytest.approx(value, rel=1e-9),
            pytest.approx(spread, rel=1e-9),
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
    assert result["environment"] == {**environment(torch.device("cpu")), "num_processes": 1}
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


# ---- runs that were stopped, and several processes -----------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_numbers(evaluator, few_digits, tmp_path, tiny, monkeypatch):
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
def test_two_processes_that_were_killed_give_the_numbers_of_one(checkpoint, extractor_folder, tmp_path, monkeypatch):
    """Every digit of every number, as no kernel sees another batch; those that end by torchrun and by accelerate."""
    arguments = ["evaluate", checkpoint, "--dataset", "digits", "--metrics", "bpd", "fid", "is"]
    arguments += ["--num_images", "100", "--num_samples", "410", "--batch_size", "40"]
    arguments += ["--extractor", "tiny_extractors:Tiny", "--cpu_threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = f"{extractor_folder}:{ROOT}"

    def own(name: str) -> list[str]:
        return ["--work_dir", str(tmp_path / f"{name} work"), "-o", str(tmp_path / f"{name}.json")]

    def start(name: str, launcher: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, *arguments, *own(name)]
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

    words = ["-m", "ddpm_hf.cli", *arguments, *own("two")]
    pair = [Forked(words, cwd=tmp_path, env=environment | variables) for variables in pair_variables()]
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "two work").glob("samples-*/piece-*.safetensors"))) < 4:
        assert pair[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    for killed in pair:
        killed.kill()
        killed.wait()
    assert [result["metric"] for result in numbers("two")] == ["bpd"]
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "two work").glob("*/piece-*.safetensors")}
    assert finish(start("two", TORCHRUN)).count("with the whole protocol in") == 1  # one writes and prints
    assert all(path.stat().st_mtime_ns == then for path, then in pieces.items())
    assert numbers("two") == numbers("one")
    results = read_results(tmp_path / "two.json")
    assert {result["environment"]["num_processes"] for result in results} == {2}
    finish(start("accelerate", [*ACCELERATE, "-m", "ddpm_hf.cli"]))
    assert numbers("accelerate") == numbers("one")
