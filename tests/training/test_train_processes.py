"""training/train.py in processes of its own: killed, stopped, shared among two, and on a full disk."""

import os

import fork_server
import numpy as np
import pytest
import torch
from tiny_runs import (
    ACCELERATE,
    IMPORTANCE,
    ROOT,
    SCRIPT,
    TORCHRUN,
    arguments,
    column,
    final_hashes,
    finish,
    finish_pair,
    kill,
    kill_when,
    pixels,
    start,
    start_pair,
    train,
)

from ddpm_hf.runs import checkpoints

pytestmark = pytest.mark.integration


# ---- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_do_what_one_does(tmp_path):
    options = {"num_steps": 20, "checkpoint_every": 20, "sample_every": 20, "num_samples": 5, "random_flip": True}
    pair = tmp_path / "two"
    processes = start_pair(pair, **options)
    alone = train(tmp_path / "one", **options)
    in_parts = train(tmp_path / "parts", gradient_accumulation_steps=2, **options)
    assert "2 process(es) on cpu" in finish_pair(processes)
    assert column(pair, "step") == list(range(1, 21))  # one writer
    for other in (pair, in_parts):
        assert column(other, "loss") == pytest.approx(column(alone, "loss"), abs=1e-4)
        assert column(other, "learning_rate") == column(alone, "learning_rate")
        for kind in ("raw", "ema"):
            name = f"step-20-{kind}.png"
            assert np.abs(pixels(other / "samples" / name) - pixels(alone / "samples" / name)).max() <= 2
    assert checkpoints.verify(pair / "checkpoints" / "step-20")["world_size"] == 2


@pytest.mark.slow
def test_losses_agree_within_1e_4_over_200_steps_however_the_batch_is_cut(tmp_path):
    options = {"num_steps": 200, "checkpoint_every": 200, "random_flip": True}
    alone = train(tmp_path / "one", **options)
    in_parts = train(tmp_path / "parts", gradient_accumulation_steps=2, **options)
    pairs = []
    for name, launcher in (("torchrun", TORCHRUN), ("accelerate", ACCELERATE)):
        pairs.append(tmp_path / name)
        assert "2 process(es) on cpu" in finish(start(tmp_path / name, launcher=launcher, **options))
    both = tmp_path / "both"
    finish_pair(start_pair(both, gradient_accumulation_steps=2, **options))
    for other in (in_parts, *pairs, both):
        assert column(other, "loss") == pytest.approx(column(alone, "loss"), abs=1e-4)
    assert final_hashes(pairs[0], 200) == final_hashes(pairs[1], 200)  # the launcher makes no difference at all


@pytest.mark.slow
def test_two_processes_have_the_history_of_one(tmp_path):
    options = {**IMPORTANCE, "num_steps": 20, "checkpoint_every": 20}
    alone = train(tmp_path / "one", **options)
    finish_pair(start_pair(tmp_path / "two", **options))
    assert column(tmp_path / "two", "loss") == pytest.approx(column(alone, "loss"), rel=1e-3)
    one, two = (
        checkpoints.read(tmp_path / name / "checkpoints" / "step-20", "loss_history") for name in ("one", "two")
    )
    assert torch.equal(one["counts"], two["counts"]) and int(one["counts"].sum()) == 20 * 16
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=0)  # twenty updates of rounding


# ---- kills, full disks, refusals ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path):
    options = {"num_steps": 120, "checkpoint_every": 20, "dropout": 0.2, "random_flip": True}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole, **options)
    kill_when(start(killed, **options), (killed / "checkpoints" / "step-40").exists)
    assert not (killed / "checkpoints" / "step-120").exists()
    output = finish(start(killed, **options))
    assert "resuming at step" in output
    finish(undisturbed)
    assert final_hashes(killed, 120) == final_hashes(whole, 120)
    assert column(killed, "step") == list(range(1, 121)) and column(killed, "loss") == column(whole, "loss")


@pytest.mark.slow
def test_two_processes_killed_three_times_end_with_the_weights_of_those_that_were_not(tmp_path):
    options = {"num_steps": 120, "checkpoint_every": 10, "dropout": 0.2, "random_flip": True}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish_pair(start_pair(whole, **options))
    kill_when(start(killed, launcher=TORCHRUN, **options), (killed / "checkpoints" / "step-20").exists)
    for step in (50, 80):
        first, second = start_pair(killed, **options)
        kill_when(first, (killed / "checkpoints" / f"step-{step}").exists)
        kill(second)
    finish_pair(start_pair(killed, **options))
    assert final_hashes(killed, 120) == final_hashes(whole, 120)


def test_a_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before(tmp_path):
    """RLIMIT_FSIZE stands for it: from the second checkpoint on, no file may be as long as its weights."""
    train(tmp_path, num_steps=3)
    before = final_hashes(tmp_path, 3)
    script = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.argv = [{str(SCRIPT)!r}, *{arguments(tmp_path, num_steps=6)!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = fork_server.run(["-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    line = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and "train.py: " in line and "Traceback" not in ended.stderr
    assert str(tmp_path / "checkpoints" / "step-6") in line and "bytes" in line and "untouched" in line
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert final_hashes(tmp_path, 3) == before
    train(tmp_path, num_steps=6)


def test_a_refusal_is_one_line_and_exit_code_1(tmp_path):
    process = start(tmp_path / "run", dataset_name="none", train_data_dir=tmp_path / "absent")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("train.py: ") and str(tmp_path / "absent") in output
