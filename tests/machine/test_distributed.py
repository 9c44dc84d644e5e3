"""Joining the processes of a run: how many, with how many threads, and what is refused rather than quietly changed."""

import importlib
import inspect
import os
import re
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
    for name in list(os.environ):
        if name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR") or name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
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


# ---- what `accelerate launch` asks for by variables ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ACCELERATE_USE_FSDP", "true", "accelerate launch --use_fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate launch --use_deepspeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "accelerate launch --use_megatron_lm"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "accelerate launch --use_parallelism_config"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "leave it out (train.py has --compile)"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "is not one of no, fp16, bf16"),
        ("ACCELERATE_MIXED_PRECISION", "BF16", "is not one of no, fp16, bf16"),  # Accelerate: float32, and no word
    ],
)
def test_variables_that_ask_for_what_is_not_done_are_refused_by_name(monkeypatch, name, value, remedy):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as raised:
        join_processes()
    assert str(raised.value).startswith(f"{name}={value} ") and remedy in str(raised.value)


def test_variables_that_ask_for_nothing_are_taken(monkeypatch):
    """What `accelerate launch` sets for one process."""
    ordinary = {"DYNAMO_BACKEND": "NO", "MIXED_PRECISION": "no", "USE_CPU": "True", "USE_FSDP": "false"}
    for name, value in ordinary.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert join_processes().num_processes == 1


def test_a_precision_as_an_argument_overrules_the_variable(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert join_processes(mixed_precision="bf16").mixed_precision == "bf16"


@pytest.mark.parametrize("by_launcher", [True, False])
def test_an_address_without_a_number_of_processes_is_of_a_launcher_that_started_one(monkeypatch, by_launcher):
    """Left by accelerate launch it is refused; set in the shell, for something else, it is nobody's business."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    if not by_launcher:
        assert join_processes().num_processes == 1
        return
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    with pytest.raises(ValueError, match="was asked for several processes and started one"):
        join_processes()


KNOWN = {  # to us, by what becomes of them
    "obeyed": {"MIXED_PRECISION", "USE_CPU", "TORCH_DEVICE"},
    "refused": {
        "GRADIENT_ACCUMULATION_STEPS",
        "FP8_BACKEND",
        *(name.partition("_")[2] for name in processes.SHARDING),
    },
    "without effect on numbers": {"BYPASS_DEVICE_MAP", "CPU_AFFINITY", "DEBUG_MODE"},
    "of machines that are not ours": {
        "USE_SAGEMAKER",
        "SAGEMAKER_DISTRIBUTED_TYPE",
        "DOWNCAST_BF16",
        "USE_IPEX",
        "USE_XPU",
    },
    "of what is refused": {"ALLOW_CP_STANDALONE"},
}


@pytest.mark.parametrize("module", ["accelerator", "state"])
def test_no_variable_of_accelerate_is_unknown(module):
    """Where a new version has another, decide what becomes of it, and say so in docs/training.md."""
    source = inspect.getsource(importlib.import_module(f"accelerate.{module}"))
    found = set(re.findall(r"\bACCELERATE_([A-Z0-9_]*[A-Z0-9])\b", source))
    assert len(found) > 5 and found <= set().union(*KNOWN.values())
