"""Evaluations of a training run: averaged or raw weights, and a warning where its own data are measured."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from computed_at_once import digits
from PIL import Image

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.data import to_model_range
from ddpm_hf.evaluation import Evaluator
from ddpm_hf.evaluation.evaluator import is_training_data
from ddpm_hf.hub import load_model
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.runs import checkpoints, weights_sha256
from training import train

pytest.importorskip("torchmetrics")


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
    train.main([*TINY_RUN, "--output_dir", str(folder)])
    return folder


@pytest.mark.slow
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


@pytest.mark.integration
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
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "ddpm_hf.evaluation.evaluator")


@pytest.mark.integration
def test_a_bound_of_the_training_data_is_said_to_be_one(evaluator, run, checkpoint, tmp_path, caplog):
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


@pytest.mark.integration
def test_metrics_of_samples_do_not_warn_of_training_data(evaluator, few_digits, run, tiny, caplog):
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
def test_training_data_are_known_by_fingerprint_or_name(
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


def test_a_bound_of_the_training_folder_is_said_to_be_one(evaluator, rgb, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    model, photos = tmp_path / "model", tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (8, 8), "teal").save(photos / "0.png")
    DDPMPaperPipeline.from_pretrained(rgb).save_pretrained(model)
    (model / "options.yaml").write_text(f"train_data_dir: {photos}\n")
    message = warned(evaluator(source=model, dataset=str(photos)), caplog)
    assert message.startswith("bits/dim of photos, split train: ") and "--split" not in message
    assert message.endswith("measure it on a folder of held-out images")
