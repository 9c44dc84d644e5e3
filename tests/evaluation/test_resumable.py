"""Pieces of long work: shared by processes, whole or absent however a run ends, and never mixed with other work."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_hf.evaluation import resumable as pieces
from ddpm_hf.evaluation.resumable import Pieces

IDENTITY = {"model": "ab12", "seed": 3, "settings": {"clip": True, "steps": None}}


class Process:
    """Stands in for Accelerate's view of one of several processes, which here are threads."""

    def __init__(self, rank: int = 0, barrier: threading.Barrier | None = None):
        self.barrier = barrier or threading.Barrier(1)
        self.process_index, self.num_processes = rank, self.barrier.parties
        self.is_main_process = rank == 0

    def wait_for_everyone(self) -> None:
        self.barrier.wait(timeout=30)


def square(number: int) -> dict[str, Tensor]:
    return {"square": torch.full((2, 3), number**2), "rows": torch.arange(6.0).view(2, 3).T[: number % 3]}


def squares(count: int) -> list[dict[str, Tensor]]:
    return [square(number) for number in range(count)]


def assert_equal(found: Any, expected: list[dict[str, Tensor]]) -> None:
    found = list(found)
    assert len(found) == len(expected)
    for piece, other in zip(found, expected, strict=True):
        assert piece.keys() == other.keys() and all(torch.equal(piece[name], other[name]) for name in other)


def noting(done: list[int], compute: Callable[[int], Any] = square) -> Callable[[int], Any]:
    def note(number: int) -> Any:
        done.append(number)
        return compute(number)

    return note


def complete_together(work: list[Pieces], num_processes: int, compute: Callable[[int, int], Any]) -> None:
    """`complete` by several processes at once; `compute(rank, number)`."""
    barrier, errors = threading.Barrier(num_processes), []

    def run(rank: int) -> None:
        try:
            work[rank].complete(Process(rank, barrier), lambda number: compute(rank, number))  # type: ignore[arg-type]
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if errors:
        raise errors[0]


def in_a_process_of_its_own(function: Callable[[], None]) -> int:
    """The exit code of a real process that does this; negative for a signal."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(timeout=60)
    assert process.exitcode is not None
    return process.exitcode


def make(folder: Path, count: int = 7, **changed: Any) -> Pieces:
    return Pieces(folder, "squares", {**IDENTITY, **changed}, count)


@pytest.fixture(autouse=True)
def no_progress_bar(monkeypatch):
    monkeypatch.setattr(pieces, "tqdm", lambda numbers, **kwargs: numbers)


# ---- one run -------------------------------------------------------------------------------------------------------


def test_pieces_come_back_in_order_and_are_not_computed_again(tmp_path):
    work, done = make(tmp_path, 12), []
    work.complete(Process(), noting(done))  # type: ignore[arg-type]
    assert done == list(range(12))
    assert_equal(work, squares(12))
    assert_equal(work, squares(12))  # as often as one likes
    again = make(tmp_path, 12)
    again.complete(Process(), noting(done))  # type: ignore[arg-type]
    assert done == list(range(12))
    assert_equal(again, squares(12))


def test_more_pieces_of_the_same_work_are_added(tmp_path):
    done: list[int] = []
    make(tmp_path, 3).complete(Process(), noting(done))  # type: ignore[arg-type]
    make(tmp_path, 5).complete(Process(), noting(done))  # type: ignore[arg-type]
    assert done == [0, 1, 2, 3, 4]
    assert_equal(make(tmp_path, 2), squares(2))


def test_the_folder_says_what_it_holds(tmp_path):
    work = make(tmp_path)
    work.complete(Process(), square)  # type: ignore[arg-type]
    assert json.loads((work.folder / "identity.json").read_text()) == IDENTITY
    assert work.folder.parent == tmp_path and work.folder.name.startswith("squares-")
    assert len(list(work.folder.iterdir())) == 8  # and nothing temporary


@pytest.mark.parametrize(
    "changed",
    [{"model": "ab13"}, {"seed": 4}, {"settings": {"clip": True, "steps": 1}}, {"seed": 3.0000000000000004}],
    ids=str,
)
def test_other_work_has_another_folder(tmp_path, changed):
    work, other = make(tmp_path), make(tmp_path, **changed)
    work.complete(Process(), square)  # type: ignore[arg-type]
    done: list[int] = []
    other.complete(Process(), noting(done))  # type: ignore[arg-type]
    assert other.folder != work.folder and done == list(range(7))
    assert Pieces(tmp_path, "cubes", IDENTITY, 7).folder != work.folder
    reordered = dict(reversed(IDENTITY.items()))
    assert Pieces(tmp_path, "squares", reordered, 7).folder == work.folder


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_each_process_does_its_share_and_all_get_the_whole(tmp_path, num_processes):
    work = [make(tmp_path) for _ in range(num_processes)]
    done: list[tuple[int, int]] = []
    complete_together(work, num_processes, lambda rank, number: done.append((rank, number)) or square(number))
    assert sorted(number for _, number in done) == list(range(7))
    shares = [sum(rank == mine for rank, _ in done) for mine in range(num_processes)]
    assert max(shares) - min(shares) <= 1
    for each in work:
        assert_equal(each, squares(7))


def test_missing_pieces_are_shared_evenly_and_the_same(tmp_path):
    """Pieces 0, 2 and 4 are there; the first to write must not change what the others think is missing."""
    make(tmp_path).complete(Process(), square)  # type: ignore[arg-type]
    for number in (1, 3, 5, 6):
        make(tmp_path).path(number).unlink()
    for _ in range(20):  # the order of the threads is left to chance
        done: list[tuple[int, int]] = []
        complete_together(
            [make(tmp_path), make(tmp_path)],
            2,
            lambda rank, number, to=done: to.append((rank, number)) or square(number),
        )
        assert sorted(done) == [(0, 1), (0, 5), (1, 3), (1, 6)]
        for number in (1, 3, 5, 6):
            make(tmp_path).path(number).unlink()


def test_nobody_goes_on_before_all_pieces_are_there(tmp_path):
    late, found = threading.Event(), []

    def compute(rank: int, number: int) -> dict[str, Tensor]:
        if rank == 1:
            late.wait(timeout=0.3)
        return square(number)

    class Watched(Pieces):
        def complete(self, *args: Any) -> None:
            super().complete(*args)
            found.append(all(self.is_done(number) for number in range(self.count)))

    complete_together([Watched(tmp_path, "squares", IDENTITY, 2) for _ in range(2)], 2, compute)
    assert found == [True, True]


# ---- runs that end early -------------------------------------------------------------------------------------------


def test_after_an_error_the_next_run_does_the_rest(tmp_path):
    def fail_at_four(number: int) -> dict[str, Tensor]:
        if number == 4:
            raise RuntimeError("out of memory")
        return square(number)

    with pytest.raises(RuntimeError, match="out of memory"):
        make(tmp_path).complete(Process(), fail_at_four)  # type: ignore[arg-type]
    done: list[int] = []
    work = make(tmp_path)
    work.complete(Process(), noting(done))  # type: ignore[arg-type]
    assert done == [4, 5, 6]
    assert_equal(work, squares(7))


@pytest.mark.integration
@pytest.mark.parametrize("moment", ["computing", "half written", "before the rename"])
def test_a_killed_run_leaves_whole_pieces_only(tmp_path, monkeypatch, moment):
    work = make(tmp_path)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        def compute(number: int) -> dict[str, Tensor]:
            if number == 3 and moment == "computing":
                die()
            return square(number)

        save_file = pieces.save_file

        def save(tensors: Any, path: Path) -> None:
            save_file(tensors, path)
            if "piece-000003" in path.name and moment != "computing":
                if moment == "half written":
                    path.write_bytes(path.read_bytes()[:-5])
                die()

        pieces.save_file = save
        work.complete(Process(), compute)  # type: ignore[arg-type]

    assert in_a_process_of_its_own(killed) == -signal.SIGKILL
    assert [work.is_done(number) for number in range(7)] == [True] * 3 + [False] * 4
    assert sorted(work.folder.glob("*.safetensors")) == [work.path(number) for number in range(3)]
    done: list[int] = []
    make(tmp_path).complete(Process(), noting(done))  # type: ignore[arg-type]
    assert done == [3, 4, 5, 6]
    assert_equal(make(tmp_path), squares(7))


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_a_file_that_was_cut_off_is_done_again(tmp_path, length):
    """As a full disk or a power cut may leave it: empty, inside its header, or short of its last byte."""
    work = make(tmp_path)
    work.complete(Process(), square)  # type: ignore[arg-type]
    work.path(2).write_bytes(work.path(2).read_bytes()[:length])
    assert [work.is_done(number) for number in range(7)] == [number != 2 for number in range(7)]
    done: list[int] = []
    work.complete(Process(), noting(done))  # type: ignore[arg-type]
    assert done == [2]
    assert_equal(work, squares(7))
