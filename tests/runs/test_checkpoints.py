"""Checkpoints: whole or absent whatever happens while writing, verified when read, pruned only afterwards."""

import errno
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fork_server import Forked

from ddpm_hf.machine import files
from ddpm_hf.runs import CheckpointError, checkpoints
from ddpm_hf.runs.checkpoints import export_pipeline, found_in, newest_good, prune, to_resume, verify, write

MANIFEST = {
    "world_size": 1,
    "options": {"learning_rate": 1e-3, "channels": [8, 16], "num_steps": 10},
    "dataset": {"name": "digits", "num_samples": 3, "fingerprint": "abc"},
}


def save_pipeline(folder: Path) -> None:
    """Writes what a pipeline would, in miniature."""
    (folder / "unet").mkdir()
    (folder / "unet" / "weights.safetensors").write_bytes(b"weights" * 100)
    (folder / "model_index.json").write_text("{}", encoding="utf-8")


def save(folder: Path, step: int, **manifest) -> Path:
    tensors = {
        "model": {"weight": torch.full((3, 4), float(step)), "bias": torch.tensor(0.5)},
        "ema": {"weight": torch.arange(12.0).view(4, 3).T},  # not contiguous
    }
    return write(
        folder,
        step,
        save_pipeline=save_pipeline,
        tensors=tensors,
        state={"step": step, "scale": 0.1},
        manifest={**MANIFEST, **manifest},
    )


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in found_in(folder)]


def contents(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder; a folder is b""."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


# ---- writing and reading -------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(tmp_path):
    path = save(tmp_path / "checkpoints", 12)
    assert path == tmp_path / "checkpoints" / "step-12"
    assert verify(path).items() >= {**MANIFEST, "step": 12}.items()
    model, ema = checkpoints.read(path, "model"), checkpoints.read(path, "ema")
    assert model.keys() == {"weight", "bias"} and model["bias"].shape == ()
    assert torch.equal(model["weight"], torch.full((3, 4), 12.0)) and torch.equal(model["bias"], torch.tensor(0.5))
    assert torch.equal(ema["weight"], torch.arange(12.0).view(4, 3).T)
    assert checkpoints.read_state(path) == {"step": 12, "scale": 0.1}
    assert [p.name for p in path.parent.iterdir()] == ["step-12"]  # the temporary folder is gone


def test_manifest_lists_every_other_file(tmp_path):
    path = save(tmp_path, 1)
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert verify(path)["files"].keys() == files - {"train_state/manifest.json"}


def test_all_is_flushed_before_the_checkpoint_appears(tmp_path, monkeypatch):
    flushed, replace = [], Path.replace

    def checked_replace(self: Path, target: Path) -> Path:
        unflushed = {self, *self.rglob("*")} - set(flushed)
        assert not unflushed
        flushed.clear()
        return replace(self, target)

    monkeypatch.setattr(files, "fsync", flushed.append)
    monkeypatch.setattr(Path, "replace", checked_replace)
    save(tmp_path, 1)
    assert flushed == [tmp_path]  # the rename itself


def test_a_step_written_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 5, world_size=4)
    (tmp_path / "step-5" / "old").touch()
    path = save(tmp_path, 5)
    assert verify(path)["world_size"] == 1 and not (path / "old").exists()


# ---- damage --------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name"), [(flip_a_bit, "unet/weights.safetensors"), (truncate, "train_state/manifest.json")]
)
def test_a_warning_names_what_is_damaged(tmp_path, caplog, damage, name):
    """Every file in every way, of a real checkpoint: test_corruption.py."""
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    damage(bad / name)
    assert newest_good(tmp_path) == (good, verify(good))
    assert f"ignoring {bad}: {bad / name} is corrupt: sha256 " in caplog.text


@pytest.mark.parametrize("content", ["{}", "[]", "3", "null", '{"files": 3, "step": 1}', '{"files": {}, "step": []}'])
def test_a_manifest_of_another_shape_is_refused(tmp_path, content):
    path = save(tmp_path, 1)
    (path / "train_state" / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        verify(path)


def test_nothing_good_is_nothing(tmp_path):
    assert newest_good(tmp_path / "absent") is None
    shutil.rmtree(save(tmp_path, 10) / "train_state")
    assert newest_good(tmp_path) is None


# ---- what else lies in the folder ----------------------------------------------------------------------------------


def test_stray_names_are_ignored_with_a_warning_and_stay(tmp_path, caplog):
    save(tmp_path, 3)
    for name in ("step-x", "step-", "step-7.bak", "notes", "step--4"):
        (tmp_path / name).mkdir()
    for name in ("step-9", "README.md"):  # files
        (tmp_path / name).touch()
    before = contents(tmp_path)
    assert steps_in(tmp_path) == [3]
    for name in ("step-x", "step-", "step-7.bak", "notes", "step--4", "step-9", "README.md"):
        assert f"ignoring {tmp_path / name}: not a checkpoint" in caplog.text
    caplog.clear()
    prune(tmp_path, keep=2)
    assert contents(tmp_path) == before
    assert not caplog.text  # said when the run starts, not at every save


def test_the_newest_is_found_by_number_not_by_name_or_time(tmp_path):
    for step in (1000, 9, 100):
        save(tmp_path, step)
    assert steps_in(tmp_path) == [1000, 100, 9]
    assert newest_good(tmp_path) == (tmp_path / "step-1000", verify(tmp_path / "step-1000"))


def test_a_leftover_is_ignored_and_removed_by_the_next_save(tmp_path, caplog):
    good = save(tmp_path, 10)
    leftover = tmp_path / ".incomplete-step-20"
    shutil.copytree(good, leftover)
    assert newest_good(tmp_path) == (good, verify(good))
    assert f"ignoring incomplete {leftover}" in caplog.text
    save(tmp_path, 30)
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-30"]


def test_a_leftover_does_not_get_into_the_checkpoint(tmp_path):
    leftover = tmp_path / ".incomplete-step-20"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    assert not (save(tmp_path, 20) / "half").exists()


# ---- pruning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(3, [50, 40, 30]), (2, [50, 40]), (1, [50, 40]), (0, [50, 40])])
def test_prune_keeps_the_newest_and_at_least_two(tmp_path, keep, kept):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    prune(tmp_path, keep)
    assert steps_in(tmp_path) == kept
    for _, path in found_in(tmp_path):
        verify(path)


def test_an_interrupted_deletion_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    for step in (10, 20, 30):
        save(tmp_path, step)

    def die(path: Path) -> None:
        (path / "model_index.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep=2)
    monkeypatch.undo()
    assert steps_in(tmp_path) == [30, 20]
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-20", "step-30"]


def test_damaged_ones_do_not_push_out_the_one_just_written(tmp_path):
    """After two damaged checkpoints a run starts anew; what it saves must survive its own pruning."""
    folder = tmp_path / "checkpoints"
    for step in (80, 100):
        truncate(save(folder, step) / "model_index.json")
    assert newest_good(folder) is None
    checkpoints.move_aside(folder, -1)  # as train.py does when it starts
    for step in (20, 40):
        written = save(folder, step)
        prune(folder, keep=2)
        found = newest_good(folder)
        assert found is not None and found[0] == written


# ---- a crash at every stage of writing -----------------------------------------------------------------------------


class Crash(BaseException):
    """Like a kill: nothing in the code under test catches it."""


class Crashing:
    """Calls `function`, but raises Crash in place of call number `at` and of all that follow: the process is dead."""

    def __init__(self, function: Callable, at: int):
        self.function, self.at, self.num_calls = function, at, 0

    def __call__(self, *args, **kwargs):
        self.num_calls += 1
        if self.num_calls > self.at:
            raise Crash
        return self.function(*args, **kwargs)

    def __get__(self, instance, owner=None):
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)


STAGES = {
    "os.fsync": (os, "fsync"),
    "save_file": (checkpoints, "save_file"),
    "_write_json": (checkpoints, "_write_json"),
    "rename": (Path, "replace"),
}


@pytest.mark.parametrize("again", [False, True], ids=["new step", "step written before"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_crash_while_writing_leaves_a_whole_checkpoint(tmp_path, monkeypatch, stage, again):
    """Whichever call of a stage is the last that happens, the newest good checkpoint is the old or the new one."""
    owner, name = STAGES[stage]
    for at in itertools.count():
        folder = tmp_path / str(at)
        previous = save(folder, 10)
        if again:
            save(folder, 20)
        crashing = Crashing(getattr(owner, name), at)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, crashing)
            try:
                save(folder, 20)
            except Crash:
                crashed = True
            else:
                crashed = False
        if not crashed:
            assert at == crashing.num_calls > 0
            break
        found = newest_good(folder)
        assert found is not None and found[1]["step"] in (10, 20)
        verify(previous)
        verify(save(folder, 20))  # and the next attempt works
        prune(folder, keep=2)
        assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-20"]


def test_a_failing_pipeline_leaves_the_checkpoint_before(tmp_path):
    good = save(tmp_path, 10)

    def disk_full(folder: Path) -> None:
        save_pipeline(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 20, save_pipeline=disk_full, tensors={}, state={}, manifest=MANIFEST)
    assert newest_good(tmp_path) == (good, verify(good))


# ---- exporting -----------------------------------------------------------------------------------------------------


def test_export_copies_the_pipeline_without_the_state(tmp_path):
    run = tmp_path / "run"
    (run / "unet").mkdir(parents=True)
    (run / "unet" / "weights.safetensors").write_bytes(b"of an older step")
    (run / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    path = save(run / "checkpoints", 10)
    export_pipeline(path, run)
    files = {p.relative_to(run).as_posix() for p in run.rglob("*") if "checkpoints" not in p.parts and p.is_file()}
    assert files == {"model_index.json", "unet/weights.safetensors", "metrics.jsonl"}
    assert (run / "unet" / "weights.safetensors").read_bytes() == (path / "unet/weights.safetensors").read_bytes()


def test_an_interrupted_export_shows_no_model(tmp_path, monkeypatch):
    path = save(tmp_path / "checkpoints", 10)
    num_files = 2
    for at in range(num_files):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfile", Crashing(shutil.copyfile, at))
            with pytest.raises(Crash):
                export_pipeline(path, tmp_path)
        assert not (tmp_path / "model_index.json").exists()
    export_pipeline(path, tmp_path)
    assert (tmp_path / "model_index.json").exists()
    assert not list(tmp_path.glob(".incomplete-*")) + list(tmp_path.glob("unet/.incomplete-*"))


# ---- resuming ------------------------------------------------------------------------------------------------------


def resume(folder: Path, how: str = "latest", *, manifest=MANIFEST, free=("num_steps",), allow_changes=False):
    return to_resume(folder, how, manifest, free=set(free), allow_changes=allow_changes)


def changed(**options) -> dict:
    return {**MANIFEST, "options": {**MANIFEST["options"], **options}}


def test_latest_is_the_newest_or_nothing(tmp_path):
    assert resume(tmp_path / "absent") is None
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    assert resume(tmp_path) == newest


def test_a_path_is_taken_as_given_and_verified(tmp_path):
    old, new = save(tmp_path, 10), save(tmp_path, 20)
    assert resume(tmp_path, str(old)) == old
    flip_a_bit(new / "unet" / "weights.safetensors")
    with pytest.raises(CheckpointError, match="unet/weights.safetensors is corrupt"):
        resume(tmp_path, str(new))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "absent"))):
        resume(tmp_path, str(tmp_path / "absent"))


def test_never_resumes_nothing(tmp_path):
    save(tmp_path, 1)
    assert resume(tmp_path, "never") is None and contents(tmp_path)


def test_what_lies_after_the_start_is_moved_aside(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    checkpoints.move_aside(folder, -1)
    assert not list(tmp_path.iterdir())
    for number, start, left in ((1, -1, []), (2, 2, ["step-2"])):
        for step in (2, 4, 10):
            save(folder, step)
        checkpoints.move_aside(folder, start)
        assert sorted(path.name for path in folder.iterdir()) == left
        moved = {"step-2", "step-4", "step-10"} - set(left)
        assert {path.name for path in (tmp_path / f"checkpoints.{number}").iterdir()} == moved
        assert str(tmp_path / f"checkpoints.{number}") in caplog.text
    before = contents(folder)
    checkpoints.move_aside(folder, 2)
    assert contents(folder) == before and not (tmp_path / "checkpoints.3").exists()


def test_changes_name_every_field_with_both_values():
    now = {
        "world_size": 2,
        "options": {"learning_rate": 2e-3, "channels": [8], "num_steps": 99, "dropout": 0.1},
        "dataset": {"name": "renamed", "num_samples": 3, "fingerprint": "xyz"},
    }
    lines = checkpoints.changes(MANIFEST, now, free={"num_steps"})
    assert lines == {
        "learning_rate": "learning_rate was 0.001, is 0.002",
        "channels": "channels was [8, 16], is [8]",
        "dropout": "dropout was None, is 0.1",
        "num_processes": "number of processes was 1, is 2",
        "data": "data (sha256) was 'abc', is 'xyz'",
    }
    assert checkpoints.changes(MANIFEST, MANIFEST, free=()) == {}


def test_options_are_unchanged_by_a_file(tmp_path):
    options = {"tuple": [1, 2], "none": None, "bool": True, "tiny": 1e-30, "third": 1 / 3, "text": "β “quoted”\n"}
    then = verify(save(tmp_path, 1, options=options))
    assert checkpoints.changes(then, {**MANIFEST, "options": options}, free=()) == {}


def test_changed_mathematics_is_refused_unless_allowed(tmp_path, caplog):
    path = save(tmp_path, 10)
    now = changed(learning_rate=5e-3)
    with pytest.raises(ValueError, match=r"learning_rate was 0.001, is 0.005\. Give .* --allow_changes"):
        resume(tmp_path, manifest=now)
    assert not caplog.records
    assert resume(tmp_path, manifest=now, allow_changes=True) == path
    assert "resuming although learning_rate was 0.001, is 0.005" in caplog.text


def test_changes_may_be_allowed_by_name(tmp_path, caplog):
    """What is refused is what was not named; what to give names all that differ."""
    path = save(tmp_path, 10)
    now = {**changed(learning_rate=5e-3), "world_size": 2}
    for allowed in ((), {"seed"}, {"learning_rate"}):
        with pytest.raises(ValueError, match="--allow_changes learning_rate,num_processes to go on") as raised:
            resume(tmp_path, manifest=now, allow_changes=allowed)
        assert "number of processes was 1, is 2" in str(raised.value)
        assert ("learning_rate was" in str(raised.value)) == ("learning_rate" not in allowed)
    assert resume(tmp_path, manifest=now, allow_changes={"learning_rate", "num_processes"}) == path
    assert "resuming although number of processes was 1, is 2" in caplog.text
    assert resume(tmp_path, manifest=now, free={"learning_rate", "num_processes"}) == path


def test_what_is_free_may_change_silently(tmp_path, caplog):
    path = save(tmp_path, 10)
    caplog.set_level(logging.INFO)
    assert resume(tmp_path, manifest=changed(num_steps=99)) == path
    assert not caplog.records


def test_a_checkpoint_holds_only_json_and_safetensors(tmp_path):
    path = save(tmp_path, 1)
    for file in path.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors"}


# ---- one run in a folder -------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_folder_belongs_to_one_process_until_it_is_killed(tmp_path):
    code = f"""
import time
from pathlib import Path
from ddpm_hf.runs.checkpoints import exclusive
with exclusive(Path({str(tmp_path)!r})):
    print("in", flush=True)
    time.sleep(600)
"""
    other = Forked(["-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=rf"in use by process {other.pid} on \S+; "):
            with checkpoints.exclusive(tmp_path):
                pass
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()
    for _ in range(2):  # free after the kill, and after having been left
        with checkpoints.exclusive(tmp_path):
            pass


def test_a_file_system_without_locks_warns_and_lets_the_run_in(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with checkpoints.exclusive(tmp_path):
        assert f"{tmp_path} cannot be locked" in caplog.text


def test_a_switch_newer_than_the_checkpoint_is_off():
    """Runs written before a switch existed go on; where it is on now, it is a change."""
    common = {"world_size": 1, "dataset": {"fingerprint": ""}}
    then = {**common, "options": {"learning_rate": 1e-3}}

    def differences(**newer):
        return list(
            checkpoints.changes(then, {**common, "options": {"learning_rate": 1e-3, **newer}}, free=()).values()
        )

    assert differences(convert_channels=False, held_out_every=None) == []
    assert differences(convert_channels=True) == ["convert_channels was None, is True"]
    assert differences(label_dropout=0.1) == ["label_dropout was None, is 0.1"]
    now = {**common, "options": {"learning_rate": 1e-3, "label_dropout": 0.1}}
    assert checkpoints.changes(then, now, free=(), defaults={"label_dropout": 0.1}) == {}
