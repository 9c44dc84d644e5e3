"""Uploads beside training: what is kept while it waits, which one goes, and what is told when it does not."""

import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.hub import BackgroundUploads, files_to_upload, publishing as hub
from ddpm_hf.hub.background import SNAPSHOTS, take_snapshot
from ddpm_hf.runs import checkpoints

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(tiny_mlp, tiny_scheduler, tmp_path) -> Path:
    """A run with checkpoints of steps 1 to 4, and an older model in its root, with a part more than theirs."""
    folder = tmp_path / "run"
    pipe = DDPMPaperPipeline(tiny_mlp(), tiny_scheduler())
    for step in (1, 2, 3, 4):
        checkpoints.write(
            folder / "checkpoints", step, save_pipeline=pipe.save_pretrained, tensors={}, state={}, manifest={}
        )
    pipe.save_pretrained(folder)
    for name in ("metrics.jsonl", "samples/step-1-ema.png", ".env", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


class FakeHub:
    """In place of `hub.create` and `hub.publish`: each upload waits until the test says what becomes of it."""

    def __init__(self) -> None:
        self.begun: queue.Queue[str] = queue.Queue()
        self.outcomes: queue.Queue[Exception | float | None] = queue.Queue()  # a number: a wait before another try
        self.slept: list[float] = []
        self.may_wake = threading.Event()
        self.created = threading.Event()
        self.names: list[set[str]] = []

    def create(self, repo_id: str, *, private: bool, keep_trying: Callable[[], bool]) -> None:
        assert self.created.wait(30)

    def publish(
        self,
        run: Path,
        repo_id: str,
        *,
        private: bool,
        keep_trying: Callable[[], bool] = lambda: True,
        checkpoint: Path | None = None,
    ) -> str:
        assert self.created.is_set()  # never two uploads at once
        self.begun.put(run.name)
        while True:
            outcome = self.outcomes.get(timeout=30)
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is None:
                self.names.append(set(files_to_upload(run)))
                return "the page"
            self.slept.append(outcome)
            assert self.may_wake.wait(30)
            if not keep_trying():
                raise hub.PublishError("the Hub is in trouble")


@pytest.fixture
def fake(monkeypatch) -> Iterator[FakeHub]:
    fake = FakeHub()
    monkeypatch.setattr(hub, "create", fake.create)
    monkeypatch.setattr(hub, "publish", fake.publish)
    yield fake
    fake.created.set()


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number}"


def test_a_snapshot_outlives_what_training_deletes_and_writes_on(run, tmp_path):
    target = tmp_path / "snapshot"
    take_snapshot(run, step(run, 2), target)
    assert os.stat(target / WEIGHTS).st_nlink == 2  # the large ones take no room
    assert os.stat(target / "metrics.jsonl").st_nlink == 1
    shutil.rmtree(step(run, 2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("and more")
    model = {name for name in files_to_upload(step(run, 3)) if name.startswith(hub.MODEL_PARTS)}
    assert WEIGHTS in model  # and not what an older model had more
    assert set(files_to_upload(target)) == model | {"metrics.jsonl", "samples/step-1-ema.png"}
    assert (target / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert (target / WEIGHTS).read_bytes() == (step(run, 3) / WEIGHTS).read_bytes()
    assert (target / checkpoints.MANIFEST).is_file() and not (target / ".env").exists()


def test_a_snapshot_is_copied_where_links_are_not_possible(run, tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    take_snapshot(run, step(run, 2), tmp_path / "snapshot")
    assert (tmp_path / "snapshot" / WEIGHTS).read_bytes() == (step(run, 2) / WEIGHTS).read_bytes()


def test_only_the_newest_waiting_checkpoint_is_uploaded(run, fake):
    (run / SNAPSHOTS / "stale").mkdir(parents=True)
    uploads = BackgroundUploads(run, "tester/x")
    assert not (run / SNAPSHOTS).exists()
    fake.created.set()
    uploads.submit(step(run, 1))
    assert fake.begun.get(timeout=30) == "step-1"
    uploads.submit(step(run, 2))  # returns, though the first is still under way
    uploads.submit(step(run, 3))
    shutil.rmtree(run / "checkpoints")  # pruned
    assert sorted(path.name for path in (run / SNAPSHOTS).iterdir()) == ["step-1", "step-3"]
    fake.outcomes.put(None)
    assert fake.begun.get(timeout=30) == "step-3"
    fake.outcomes.put(None)
    fake.outcomes.put(None)
    assert uploads.finish() == "the page" and not (run / SNAPSHOTS).exists()
    assert fake.begun.get(timeout=30) == "run" and fake.begun.empty()
    assert all(WEIGHTS in names for names in fake.names) and len(fake.names) == 3


def test_a_failure_is_one_line_and_the_next_one_is_tried(run, fake, caplog):
    caplog.set_level(logging.INFO)
    uploads = BackgroundUploads(run, "tester/x")
    fake.created.set()
    for outcome in (hub.PublishError("refused"), ValueError("no such thing"), None):
        uploads.submit(step(run, 1))
        assert fake.begun.get(timeout=30) == "step-1"
        fake.outcomes.put(outcome)
        while (run / SNAPSHOTS / "step-1").exists():
            threading.Event().wait(0.01)
    fake.outcomes.put(hub.PublishError("refused again"))
    with pytest.raises(hub.PublishError, match="refused again"):
        uploads.finish()
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "step-1: refused; training goes on",
        "step-1: no such thing; training goes on",
        "step-1 is uploaded to the page",
    ]


def test_a_newer_checkpoint_overtakes_one_that_is_tried_again(run, fake, caplog):
    """But the wait that the Hub asked for is kept."""
    uploads = BackgroundUploads(run, "tester/x")
    fake.created.set()
    uploads.submit(step(run, 1))
    assert fake.begun.get(timeout=30) == "step-1"
    fake.outcomes.put(7.0)
    uploads.submit(step(run, 2))
    assert fake.begun.empty()
    fake.may_wake.set()
    assert fake.begun.get(timeout=30) == "step-2" and fake.slept == [7.0]
    fake.outcomes.put(None)
    fake.outcomes.put(None)
    uploads.finish()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["step-1: the Hub is in trouble; training goes on"]


def test_a_waiting_checkpoint_gives_way_to_the_finished_model(run, fake):
    uploads = BackgroundUploads(run, "tester/x")  # the Hub does not even answer whether the repository is there
    uploads.submit(step(run, 1))
    threading.Timer(0.1, fake.created.set).start()
    fake.outcomes.put(None)
    assert uploads.finish() == "the page"
    assert fake.begun.get(timeout=30) == "run" and fake.begun.empty()


def test_a_snapshot_that_cannot_be_taken_does_not_stop_training(run, fake, monkeypatch, caplog):
    uploads = BackgroundUploads(run, "tester/x")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    uploads.submit(step(run, 1))
    assert "step-1 is not uploaded: [Errno 28] No space left on device; training goes on" in caplog.text
    assert not (run / SNAPSHOTS / "step-1").exists()
    fake.created.set()
    fake.outcomes.put(None)
    uploads.finish()


def test_the_thread_dies_with_the_process(run, fake):
    BackgroundUploads(run, "tester/x")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "uploads" and thread.is_alive()]
    assert thread.daemon
