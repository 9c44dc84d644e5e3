"""Joining the processes of a run: how many, with how many threads, and what is refused rather than quietly changed."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from ddpm_hf.machine import distributed as processes, join_processes


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch) -> Iterator[None]:
    """Without what an earlier test or a launcher set, and with the threads given back."""
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


@pytest.fixture
def formed(monkeypatch) -> SimpleNamespace:
    """What Accelerate was asked for, where it forms `formed.num_processes` of type `formed.device`."""
    seen = SimpleNamespace(num_processes=1, device="cpu", arguments={})

    def accelerator(**arguments: Any) -> SimpleNamespace:
        seen.arguments = arguments
        device = SimpleNamespace(type=seen.device)
        return SimpleNamespace(num_processes=seen.num_processes, device=device, mixed_precision="no")

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    return seen


def test_alone_it_is_one_process_with_the_threads_it_was_given():
    accelerator = join_processes(cpu_threads=3)
    assert accelerator.num_processes == 1 and accelerator.is_main_process
    assert torch.get_num_threads() == 3
    assert accelerator.mixed_precision == "no"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
@pytest.mark.parametrize(("local_world_size", "threads"), [(None, 6), ("2", 3), ("4", 1), ("12", 1)])
def test_processes_of_a_machine_share_its_cores(monkeypatch, formed, local_world_size, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10, 16)))
    if local_world_size:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    join_processes()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("world_size", "has_gpu", "cpu"), [("1", False, False), ("2", False, True), ("2", True, False)]
)
def test_without_a_gpu_several_processes_are_joined_on_the_cpu(monkeypatch, formed, world_size, has_gpu, cpu):
    """`cpu=True` makes Accelerate join them; for one process it would overrule how it is configured."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_gpu)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    formed.num_processes, formed.device = int(world_size), "cuda" if has_gpu else "cpu"
    threads = torch.get_num_threads()
    join_processes(cpu_threads=5, project_dir="runs/x")
    assert formed.arguments["cpu"] == cpu and formed.arguments["project_dir"] == "runs/x"
    assert torch.get_num_threads() == (threads if has_gpu else 5)
    (patience,) = formed.arguments["kwargs_handlers"]
    assert isinstance(patience, InitProcessGroupKwargs) and patience.timeout is not None
    assert patience.timeout.total_seconds() >= 3600  # gloo's and NCCL's own are 30 and 10 minutes


@pytest.mark.parametrize(("world_size", "found"), [("2", 1), ("4", 2)])
def test_fewer_processes_than_were_launched_are_refused(monkeypatch, formed, world_size, found):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    formed.num_processes = found
    with pytest.raises(ValueError, match=f"{world_size} processes were launched, but Accelerate formed {found}"):
        join_processes()


@pytest.mark.parametrize("by", ["argument", "launcher"])
def test_float16_on_a_cpu_is_refused(monkeypatch, by):
    """Accelerate would compute in float32, and say nothing."""
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    arguments: dict[str, Any] = {"mixed_precision": "fp16"} if by == "argument" else {}
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a GPU"):
        join_processes(**arguments)
