"""A run of training/train.py goes on where it stopped, and only with the mathematics that it began with."""

import logging
import os

import pytest
from tiny_runs import IMPORTANCE, SCRIPT, column, final_hashes, refusal, train

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.runs import checkpoints
from training import train as train_py

pytestmark = pytest.mark.integration


# ---- exact ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {  # 500 of 1,437: the interruptions fall into the second epoch
            "dropout": 0.3,
            "random_flip": True,
            "gradient_accumulation_steps": 4,
            "global_batch_size": 500,
        },
        {"config": SCRIPT.parent / "configs" / "points.yaml", "hidden_size": 16},
    ],
    ids=["images", "points"],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, interrupted, caplog, options):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(whole, num_steps=8, **options)
    for after in (4, 7):  # after the first checkpoint and after the second
        interrupted(parted, after=after, num_steps=8, **options)
    caplog.set_level(logging.INFO)
    train(parted, num_steps=8, **options)
    assert "resuming at step 6" in caplog.text
    assert final_hashes(parted, 8) == final_hashes(whole, 8)
    assert column(parted, "step") == [1, 2, 3, 4, 5, 6, 7, 8]  # cut at each resumption, then written again
    assert column(parted, "loss") == column(whole, "loss")
    assert column(parted, "learning_rate") == column(whole, "learning_rate")


def test_an_interrupted_run_by_importance_ends_as_if_it_had_not_been(tmp_path, interrupted, caplog):
    """With its weights, and with its history to the last bit."""
    options = {
        **IMPORTANCE,
        "num_steps": 8,
        "dropout": 0.3,
        "gradient_accumulation_steps": 2,
        "variance_type": "learned",
    }
    whole, parted = train(tmp_path / "whole", **options), tmp_path / "parted"
    for after in (4, 7):
        interrupted(parted, after=after, **options)
    caplog.set_level(logging.INFO)
    train(parted, **options)
    assert "resuming at step 6" in caplog.text
    assert final_hashes(parted, 8) == final_hashes(whole, 8)
    assert column(parted, "loss") == column(whole, "loss")
    saved = checkpoints.read(whole / "checkpoints" / "step-6", "loss_history")
    assert saved["counts"].min() >= 10 and len(set(saved["losses"].square().mean(dim=1).tolist())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("global_batch_size", [16, 364])  # the latter crosses an epoch's end every fourth step
def test_resumption_is_exact_for_every_cut_of_the_data(tmp_path, interrupted, parts, random_flip, global_batch_size):
    options = {
        "num_steps": 12,
        "checkpoint_every": 1,
        "dropout": 0.2,
        "gradient_accumulation_steps": parts,
        "random_flip": random_flip,
        "global_batch_size": global_batch_size,
    }
    train(tmp_path / "whole", **options)
    for after in range(1, 12):
        interrupted(tmp_path / "parted", after=after, **options)
    train(tmp_path / "parted", **options)
    assert final_hashes(tmp_path / "parted", 12) == final_hashes(tmp_path / "whole", 12)
    assert column(tmp_path / "parted", "loss") == column(tmp_path / "whole", "loss")


def test_a_damaged_checkpoint_costs_one_interval(finished_run, finished, caplog):
    path = finished / "checkpoints" / "step-6" / "train_state" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    caplog.set_level(logging.INFO)
    train(finished)
    assert f"{path} is corrupt" in caplog.text and "resuming at step 3" in caplog.text
    assert final_hashes(finished, 6) == final_hashes(finished_run, 6)


def test_a_finished_run_started_again_says_so_and_trains_nothing(finished, caplog, monkeypatch):
    lines = (finished / "metrics.jsonl").read_bytes()
    hashes = final_hashes(finished, 6)
    monkeypatch.setattr(train_py, "training_step", None)
    caplog.set_level(logging.INFO)
    train(finished)
    assert "already trained to step 6; more with --num_steps" in caplog.text
    assert (finished / "metrics.jsonl").read_bytes() == lines and final_hashes(finished, 6) == hashes
    DDPMPaperPipeline.from_pretrained(finished)


def test_more_steps_go_on_and_end_where_a_longer_run_does(tmp_path, finished, caplog):
    caplog.set_level(logging.INFO)
    train(finished, num_steps=9)
    assert "resuming at step 6" in caplog.text
    assert final_hashes(finished, 9) == final_hashes(train(tmp_path / "at once", num_steps=9), 9)


def test_resume_never_starts_anew_and_moves_the_old_checkpoints_aside(finished):
    old = final_hashes(finished, 6)
    train(finished, resume="never", seed=1)
    assert (finished / "checkpoints.1" / "step-6").is_dir()
    assert final_hashes(finished, 6) != old


def test_resume_from_a_path(tmp_path, finished_run, caplog):
    caplog.set_level(logging.INFO)
    branch = train(tmp_path / "branch", resume=finished_run / "checkpoints" / "step-3")
    assert "resuming at step 3" in caplog.text and column(branch, "step") == [4, 5, 6]
    assert final_hashes(branch, 6) == final_hashes(finished_run, 6)
    ended = train(tmp_path / "ended", resume=finished_run / "checkpoints" / "step-6")  # nothing left to train
    DDPMPaperPipeline.from_pretrained(ended)


def test_a_second_run_in_the_same_folder_is_refused(finished):
    with checkpoints.exclusive(finished):
        assert f"{finished} is in use by process {os.getpid()} on " in refusal(finished, num_steps=7)
        assert column(finished, "step") == [1, 2, 3, 4, 5, 6]  # and nothing was touched
    train(finished, num_steps=7)
    assert column(finished, "step") == [1, 2, 3, 4, 5, 6, 7]


# ---- what may change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate was 0.002, is 0.001"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"global_batch_size": 32}, "global_batch_size was 16, is 32"),
        ({"dataset_split": "test"}, "data (sha256) was"),
        ({"objective": "vlb"}, "objective was 'simple', is 'vlb'"),
        ({"prediction_type": "sample"}, "prediction_type was 'epsilon', is 'sample'"),
    ],
)
def test_changed_mathematics_is_refused_by_name(finished_run, options, change):
    before = {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()}
    message = refusal(finished_run, **{"num_steps": 9, **options})
    assert change in message and "num_steps was" not in message and "--allow_changes" in message
    assert {path: path.read_bytes() for path in finished_run.rglob("*") if path.is_file()} == before


def test_allow_changes_goes_on_with_the_new_value(finished, caplog):
    train(finished, learning_rate="1e-3", num_steps=8, allow_changes=True)
    assert "resuming although learning_rate was 0.002, is 0.001" in caplog.text
    assert column(finished, "learning_rate")[5:] == [2e-3, 1e-3, 1e-3]


def test_importance_sampling_may_begin_in_the_middle_of_a_run(tmp_path):
    options = {"objective": "vlb", "num_train_timesteps": 3}
    train(tmp_path, num_steps=2, **options)
    changed = {**IMPORTANCE, "warmup_steps": 2, "num_steps": 3}
    assert "timestep_sampling was 'uniform'" in refusal(tmp_path, **changed)
    train(tmp_path, **changed, allow_changes=True)
    assert checkpoints.read(tmp_path / "checkpoints" / "step-3", "loss_history")["counts"].sum() == 16


def test_another_network_cannot_be_allowed(finished):
    message = refusal(finished, block_out_channels=[12], num_steps=8, allow_changes=True)
    assert "block_out_channels" in message or "network" in message


def test_a_precision_that_accelerate_chose_counts_as_a_change(finished_run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what `accelerate launch --mixed_precision bf16` sets
    assert "mixed_precision was 'no', is 'bf16'" in refusal(finished_run, num_steps=8)


def test_what_does_not_touch_the_mathematics_may_change(finished):
    changed = {"log_every": 2, "checkpoint_every": 4, "num_samples": 1, "gradient_checkpointing": True}
    train(finished, num_steps=8, max_minutes=60, **changed)
    assert column(finished, "step") == [1, 2, 3, 4, 5, 6, 8]
