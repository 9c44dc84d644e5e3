"""`ddpm-hf evaluate`, `shorten` and `reproduce`, on small checkpoints: what they print, keep and refuse."""

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import commands, main
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.evaluation import evaluator as evaluation
from ddpm_hf.evaluation.paper_tables import TABLES, report
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.runs import read_results
from ddpm_hf.short_chains import shortened


@pytest.fixture
def measuring(own_process, tmp_path) -> Callable[..., None]:
    """measuring(command, *arguments): main() as in a process of its own, working in tmp_path."""

    def run(*arguments: str) -> None:
        AcceleratorState._reset_state(True)
        main([*arguments, "--cpu_threads", "1", "--work_dir", str(tmp_path / "work")])

    return run


@pytest.fixture
def copied(images, tmp_path) -> str:
    """The checkpoint for images, in a folder to write to."""
    shutil.copytree(images, tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def digits(split: str, count: int) -> torch.Tensor:
    samples = load_samples("digits", split=split)
    return to_model_range(samples.batch(range(count)), samples.num_levels)


def test_evaluate_prints_and_keeps_what_it_measured(measuring, copied, capsys):
    measuring("evaluate", copied, "--dataset", "digits", "--num_images", "5", "--seed", "3")
    (result,) = read_results(Path(copied) / "evaluation.json")
    pipe = DDPMPaperPipeline.from_pretrained(copied)
    terms = bits_per_dim(pipe.unet, pipe.scheduler, digits("test", 5), seed=3, num_levels=17)
    assert result["value"] == pytest.approx(terms.total_b.mean().item(), rel=1e-5)
    assert capsys.readouterr().out.splitlines() == [
        f"bits/dim {result['value']:.4f} ± {result['spread']:.4f}",
        *(f"    {name} {result['parts'][name]:.6f}" for name in ("prior_bpd", "kl_bpd", "decoder_bpd")),
        f"with the whole protocol in {Path(copied) / 'evaluation.json'}",
    ]
    measuring("evaluate", copied, "--dataset", "digits", "--num_images", "5", "--steps", "2")
    steps = [kept["model"]["num_inference_steps"] for kept in read_results(Path(copied) / "evaluation.json")]
    assert steps == [10, 2]


def test_evaluate_writes_to_the_output(measuring, images, tmp_path, capsys):
    output = tmp_path / "mine.json"
    measuring("evaluate", images, "--dataset", "digits", "--num_images", "1", "-o", str(output))
    assert len(read_results(output)) == 1 and not (Path(images) / "evaluation.json").exists()
    assert capsys.readouterr().out.endswith(f"with the whole protocol in {output}\n")


@pytest.fixture
def photos(tmp_path, monkeypatch) -> str:
    """A folder of four grey images, of which the second is damaged."""
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    folder, generator = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(4):
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"no image")
    return str(folder)


def test_evaluate_leaves_out_the_bad_images_that_it_may(measuring, images, photos, tmp_path, caplog):
    """They are named, and counted in the result; the number is that of the same folder without them."""
    words = ["--dataset", photos, "-o", str(tmp_path / "x.json")]
    with pytest.raises(SystemExit, match=r"1\.png: .*skip_bad_images=0 allows no more"):
        measuring("evaluate", images, *words)
    measuring("evaluate", images, *words, "--skip_bad_images", "2")
    assert "photos: 1 bad images left out: " in caplog.text and "1.png" in caplog.text
    measuring("evaluate", images, *words, "--skip_bad_images", "1")  # the same images: in place of the first result
    (first,) = read_results(tmp_path / "x.json")
    assert first["data"]["num_skipped"] == 1 and first["protocol"]["num_images"] == 3
    (Path(photos) / "1.png").unlink()
    measuring("evaluate", images, *words)
    second = read_results(tmp_path / "x.json")[1]
    assert second["value"] == first["value"]
    assert second["data"] == {name: value for name, value in first["data"].items() if name != "num_skipped"}


def test_without_bad_images_results_and_pieces_are_as_before(measuring, copied, tmp_path, monkeypatch):
    """An evaluation without bad images says and keeps what it did when there was no such option."""
    words = ["evaluate", copied, "--dataset", "digits", "--num_images", "2"]
    measuring(*words)
    (result,) = read_results(Path(copied) / "evaluation.json")
    assert set(result["data"]) == {"name", "split", "fingerprint"}
    assert set(result["protocol"]) == {
        *("num_images", "seed", "clip_denoised", "num_levels", "num_inference_steps", "num_timesteps_subset")
    }
    (identity,) = (tmp_path / "work").glob("bpd-*/identity.json")
    assert "skip" not in identity.read_text()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluation, "bits_per_dim", refuse)
    measuring(*words, "--skip_bad_images", "3")
    (again,) = read_results(Path(copied) / "evaluation.json")
    assert again["value"] == result["value"]


def test_shorten_leaves_out_the_bad_images_that_it_may(measuring, images, photos, tmp_path, caplog):
    with pytest.raises(SystemExit, match=r"1\.png: .*skip_bad_images=0 allows no more"):
        measuring("shorten", images, str(tmp_path / "short"), "--dataset", photos)
    measuring("shorten", images, str(tmp_path / "short"), "--dataset", photos, "--skip_bad_images", "1")
    assert "photos: 1 bad images left out: " in caplog.text and (tmp_path / "short" / "model_index.json").is_file()


def test_progress_moves_within_a_piece(measuring, images, tmp_path, monkeypatch, capsys):
    """Five images are one piece; the bar counts their 5 × 10 terms, four of them at a time."""
    monkeypatch.setattr(evaluation, "tqdm", functools.partial(evaluation.tqdm, mininterval=0, miniters=1))
    words = ["--dataset", "digits", "--num_images", "5", "--batch_size", "1", "-o", str(tmp_path / "x.json")]
    measuring("evaluate", images, *words)
    counted = re.findall(r"bits/dim:[^\r\n]*?(\d+)/50 ", capsys.readouterr().err)
    assert [int(n) for n in counted] == [*range(0, 50, 4), 50]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 4])
def test_shorten_fits_variances_and_chooses_timesteps(measuring, images, tmp_path, monkeypatch, capsys, steps):
    """By the network's error on training data; and what it leaves is a checkpoint like any other."""
    output, levels = tmp_path / "short", []

    def noting(*args: Any, num_levels: int, **kwargs: Any) -> Any:
        levels.append(num_levels)
        return shortened(*args, num_levels=num_levels, **kwargs)

    monkeypatch.setattr(commands, "shortened", noting)
    words = ["--dataset", "digits", "--num_images", "20", "--seed", "1", *(["--steps", str(steps)] if steps else [])]
    measuring("shorten", images, str(output), *words)
    assert capsys.readouterr().out == f"{output}: {steps or 10} reverse steps, variances of {images}\n"
    pipe = DDPMPaperPipeline.from_pretrained(images)
    terms = bits_per_dim(pipe.unet, pipe.scheduler, digits("train", 20), seed=1, num_levels=17)
    expected: Any = shortened(pipe.scheduler, terms.x_start_mse_bt.mean(dim=0).numpy(), num_steps=steps, num_levels=17)
    short: Any = DDPMPaperPipeline.from_pretrained(output)
    assert short.scheduler.config["variance_type"] == "fitted" and set(levels) == {17}
    assert np.array_equal(short.scheduler.chain().timesteps, expected.chain().timesteps)
    np.testing.assert_allclose(short.scheduler.chain().x_start_mse, expected.chain().x_start_mse, rtol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(short.unet.parameters(), pipe.unet.parameters(), strict=True))
    measuring("evaluate", str(output), "--dataset", "digits", "--num_images", "2")
    (result,) = read_results(output / "evaluation.json")
    assert (result["model"]["variance_type"], result["model"]["num_inference_steps"]) == ("fitted", steps or 10)
    assert len(result["rate_distortion"]["rmse"]) == (steps or 10)
    main(["sample", str(output), "--no-fast", "-o", str(tmp_path / "x.npy")])
    assert np.array_equal(np.load(tmp_path / "x.npy"), short(seeds=[0], output_type="np").images)


@pytest.mark.parametrize(
    ("unet", "process", "message"),
    [
        ({"out_channels": 2}, {"variance_type": "learned"}, "variance_type='learned': variances are fitted to"),
        ({"out_channels": 1}, {"prediction_type": "previous_sample"}, "prediction_type='previous_sample': variances"),
    ],
)
def test_shorten_refuses_networks_that_say_more_than_x_start(
    measuring, tiny_unet, tiny_scheduler, tmp_path, unet, process, message
):
    DDPMPaperPipeline(tiny_unet(in_channels=1, **unet), tiny_scheduler(**process)).save_pretrained(tmp_path / "source")
    with pytest.raises(SystemExit, match=message):
        measuring(
            "shorten", str(tmp_path / "source"), str(tmp_path / "new"), "--dataset", "digits", "--num_images", "2"
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("table", TABLES)
def test_reproduce_prints_the_table(table, copied, capsys):
    main(["reproduce", table])
    assert capsys.readouterr().out == report(table, checkpoint=None, results=None) + "\n"
    main(["reproduce", table, "--checkpoint", copied])
    text = capsys.readouterr().out
    assert text == report(table, checkpoint=copied, results=[]) + "\n" and "nothing yet" in text


def test_reproduce_shows_what_evaluate_measured(measuring, copied, capsys):
    measuring("evaluate", copied, "--dataset", "digits", "--num_images", "3")
    (result,) = read_results(Path(copied) / "evaluation.json")
    capsys.readouterr()
    main(["reproduce", "table1", "--checkpoint", copied])
    text = capsys.readouterr().out
    line = f"  bits/dim {result['value']:.4f} ± {result['spread']:.4f}, digits test, as saved weights"
    assert (
        line in text.splitlines() and "data digits (test); 10 reverse steps; as saved weights; exact decoder" in text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{images}"], "dataset is missing"),
        (["evaluate", "{images}", "--dataset", "digits", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["evaluate", "{images}", "--dataset", "digits", "--num_images", "0"], "num_images=0 must be at least 1"),
        (["evaluate", "{images}", "--dataset", "digits", "--steps", "11"], "num_inference_steps=11 "),
        (["evaluate", "{images}", "--dataset", "digits", "--weights", "raw"], "weights='raw': "),
        (["evaluate", "{images}", "--dataset", "digits", "--split", "dev"], "split='dev': digits has"),
        (
            ["evaluate", "{images}", "--dataset", "digits", "--num_timesteps_subset", "11"],
            "num_timesteps_subset=11 must ",
        ),
        (["evaluate", "{empty}", "--dataset", "digits"], "holds no model"),
        (["shorten", "{images}", "{images}", "--dataset", "digits"], "exists; give a new or an empty folder"),
        (["shorten", "{images}", "new", "--dataset", "digits", "--num_images", "2", "--steps", "11"], "num_steps=11 "),
        (["reproduce", "table1", "--checkpoint", "{empty}"], "holds no model"),
        (["reproduce", "table1", "--checkpoint", "{garbage}"], "is not a list of evaluation results"),
    ],
    ids=lambda x: " ".join(x[:1] + x[2:]) if isinstance(x, list) else "",
)
@pytest.mark.usefixtures("own_process")
def test_mistakes_are_refused_in_one_line(images, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    shutil.copytree(images, tmp_path / "garbage")
    (tmp_path / "garbage" / "evaluation.json").write_text("garbage")
    places = {"images": images, "empty": tmp_path / "empty", "garbage": tmp_path / "garbage"}
    with pytest.raises(SystemExit) as exit_info:
        main([word.format(**places) for word in arguments])
    line = exit_info.value.code
    assert isinstance(line, str) and line.startswith("ddpm-hf: ") and message in line and "\n" not in line
    assert not capsys.readouterr().out and not (tmp_path / "new").exists()


def test_another_file_at_the_output_is_refused_before_measuring(measuring, images, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("measured before the refusal")

    monkeypatch.setattr(evaluation, "bits_per_dim", refuse)
    (tmp_path / "garbage.json").write_text("garbage")
    with pytest.raises(SystemExit, match=r"\.json"):
        measuring("evaluate", images, "--dataset", "digits", "--num_images", "1", "-o", str(tmp_path / "garbage.json"))


def test_a_shortened_checkpoint_cannot_be_shortened_again(measuring, images, tmp_path):
    words = ["--dataset", "digits", "--num_images", "2"]
    measuring("shorten", images, str(tmp_path / "short"), "--steps", "4", *words)
    with pytest.raises(SystemExit, match="has been shortened before"):
        measuring("shorten", str(tmp_path / "short"), str(tmp_path / "shorter"), "--steps", "2", *words)
