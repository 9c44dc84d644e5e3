"""A run that was killed and started again by the same command ends with the bits of one that was left alone.

What shares out, orders and augments the data has 32 combinations: the tier `long` has them all, the slow one pairs of
settings. Every run is a process of its own, or two, which a process that has imported everything forks
(benchmarks/kill_stress.py); one server forks the runs that are left alone, another those that are killed and those
that go on, so that not even the hash seed is the same.
"""

import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.runs import checkpoints

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from kill_stress import ForkServer, arguments, digests, outcome  # noqa: E402  # pyright: ignore[reportMissingImports]

NUM_IMAGES, BATCH, NUM_STEPS = 24, 8, 8  # an epoch is three steps
STOPS = {"mid-epoch": (4, 5), "epoch's end": (3, 3)}  # steps between checkpoints; steps made when it is killed
CASES = list(itertools.product([1, 2], [0, 2], [1, 2], [False, True], STOPS))
PAIRS = [  # each two settings of any two options meet
    (2, 2, 2, True, "mid-epoch"),
    (1, 0, 1, False, "epoch's end"),
    (1, 0, 1, True, "mid-epoch"),
    (1, 2, 2, False, "mid-epoch"),
    (2, 0, 2, False, "epoch's end"),
    (2, 2, 1, True, "epoch's end"),
]


def case_id(case: tuple[int, int, int, bool, str]) -> str:
    processes, workers, parts, flip, stop = case
    return f"{processes} processes, {workers} workers, {parts} parts, {'flip' if flip else 'no flip'}, {stop}"


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[ForkServer, ForkServer]]:
    with ForkServer() as one, ForkServer() as other:
        yield one, other


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8, 3), dtype=np.uint8)
    for i, array in enumerate(pixels):
        Image.fromarray(array).save(folder / f"{i:02}.png")
    return folder


def command(run: Path, pictures: Path, num_workers: int, parts: int, flip: bool, every: int) -> list[str]:
    own = {"dataset_name": "none", "train_data_dir": pictures, "num_workers": num_workers, "random_flip": flip}
    own |= {"gradient_accumulation_steps": parts, "global_batch_size": BATCH, "num_steps": NUM_STEPS}
    own |= {"block_out_channels": [32] if flip else [8]}  # 32 are trained by our own kernels, where they are
    return arguments(run, **own, checkpoint_every=every)


@pytest.fixture(scope="module")
def left_alone(servers, pictures, tmp_path_factory) -> Callable[..., Any]:
    """The outcome of a run that nothing stops: made once, whatever it is compared with."""
    made: dict[tuple, Any] = {}

    def make(processes: int, workers: int, parts: int, flip: bool) -> Any:
        key = processes, workers, parts, flip
        if key not in made:
            run = tmp_path_factory.mktemp("alone") / "run"
            started = servers[0].start(
                command(run, pictures, workers, parts, flip, NUM_STEPS),
                run.with_name("log"),
                num_processes=processes,
                environment={"DDPM_HF_CACHE": str(run.with_name("cache"))},
            )
            assert [p.wait(120) for p in started] == [0] * processes, run.with_name("log").read_text()
            made[key] = outcome(run, NUM_STEPS)
        return made[key]

    return make


@pytest.mark.slow
def test_all_pairs_of_settings_are_tried():
    for first, second in itertools.combinations(range(5), 2):
        assert {(case[first], case[second]) for case in PAIRS} == {(case[first], case[second]) for case in CASES}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=case_id(c), marks=pytest.mark.slow if c in PAIRS else pytest.mark.long) for c in CASES],
)
def test_a_killed_run_ends_with_the_bits_of_one_left_alone(tmp_path, servers, pictures, left_alone, case):
    processes, workers, parts, flip, stop = case
    every, killed_at = STOPS[stop]
    run, log = tmp_path / "run", tmp_path / "log"
    words = command(run, pictures, workers, parts, flip, every)
    common: dict[str, Any] = {"num_processes": processes, "environment": {"DDPM_HF_CACHE": str(tmp_path / "cache")}}

    deaths = {rank: ("between steps", killed_at) for rank in range(processes)}
    killed = servers[1].start(words, log, deaths=deaths, **common)
    codes = [process.wait(120) for process in killed]
    # the second may learn that the first is gone before it kills itself
    assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 1}, log.read_text()
    found = checkpoints.newest_good(run / "checkpoints")
    assert found is not None and found[1]["step"] == every and found[1]["world_size"] == processes
    assert (BATCH * every % NUM_IMAGES == 0) == (stop == "epoch's end")

    resumed = servers[1].start(words, log, **common)
    assert [process.wait(120) for process in resumed] == [0] * processes, log.read_text()
    assert f"resuming at step {every}, from" in log.read_text()
    hashes, logged = outcome(run, NUM_STEPS)
    assert (hashes, logged) == left_alone(processes, workers, parts, flip)
    assert len(hashes) == 5  # model, EMA, optimizer, counters, and the EMA weights of the pipeline
    assert digests(run, NUM_STEPS) != digests(run, every if stop == "mid-epoch" else 2 * every)
