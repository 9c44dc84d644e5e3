"""How this process joins the others of its run."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from .signals import StopSignals

MEETING_S = 50.0
PRECISIONS = ("no", "fp16", "bf16")
SHARDING = {  # variables of `accelerate launch` by its options, under which a process holds a part of the network only
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}


@contextlib.contextmanager
def _meeting(world_size: int) -> Iterator[None]:
    """Inside, the processes of a run find each other; this one ends with exit code 1 where that takes too long.

    Launchers notice when a process dies before it came. Without a launcher the others would wait for it as long as
    for any exchange: hours, in a call that no signal interrupts. So a thread ends this process, and no exception.
    """

    def give_up() -> None:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(
            f"process {os.environ.get('RANK')}: not all of the {world_size} processes came to {place} within "
            f"{MEETING_S:.0f} s; see why one did not, or start them by torchrun or accelerate launch, which wait for "
            "slow ones",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(MEETING_S, give_up)
    timer.daemon = True
    if world_size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:  # which those launchers set
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def agree_to_stop(accelerator: Accelerator, signals: StopSignals, deadline: float = math.inf) -> bool:
    """Whether any process was asked to stop or is past its deadline, which all of them then know, after the same step.

    `deadline` is in seconds of `time.monotonic`. A signal is then in `signals.received` of all; None there says that
    it was the deadline.
    """
    signaled, late = signals.received is not None, time.monotonic() >= deadline
    if accelerator.num_processes > 1:
        asked = torch.tensor([float(signaled), float(late)], device=accelerator.device)
        # by this sum alone: a signal that comes meanwhile is for the next step, or this process would leave by itself
        num_asked: Any = accelerator.reduce(asked, reduction="sum")
        signaled, late = (num_asked > 0).tolist()
        if signaled and signals.received is None:
            signals.received = signal.SIGTERM
    return signaled or late


def leave_processes(accelerator: Accelerator) -> None:
    """Call it after the last thing that processes do together, before anything of theirs is taken apart.

    Gloo's threads hold tensors of the last exchanges and need the interpreter to release them. A process group that is
    deleted before they could waits for them with the interpreter locked and never returns: seen once in some hundred
    runs on a crowded machine (torch 2.13). So this gives them time.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        time.sleep(0.5)


def check_surroundings(mixed_precision: str | None = None) -> None:
    """Raises ValueError where variables that `accelerate launch` sets ask for what this package cannot do or record.

    Its options and configuration files arrive as these variables alone. `mixed_precision` overrules the one for it.
    """
    for name, option in SHARDING.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(
                f"{name}=true (accelerate launch {option}, or its configuration file) shares a network out among "
                "processes, and here each holds all of it; leave it out, or name a configuration without it by "
                "--config_file"
            )
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in ("", "no"):
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND={compiler} (accelerate launch --dynamo_backend, or its configuration file) "
            "would compile the network without a record of it; leave it out (train.py has --compile)"
        )
    chosen = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision is None and chosen not in PRECISIONS:  # of those that Accelerate does not know it computes none
        raise ValueError(f"ACCELERATE_MIXED_PRECISION={chosen} is not one of {', '.join(PRECISIONS)}")
    by_launcher = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "MASTER_ADDR" in os.environ
    if by_launcher and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does by --cpu or by a "
            "configuration file of several processes on CPUs. N of them start by `accelerate launch --multi_gpu "
            "--num_processes N ...`, on CPUs with ACCELERATE_USE_CPU=true before it; one by --num_processes 1"
        )


def join_processes(*, cpu_threads: int | None = None, **accelerator_arguments: Any) -> Accelerator:
    """An Accelerator over all processes that `accelerate launch` or `torchrun` started; just one without them.

    On a CPU each gets `cpu_threads` threads, by default its share of this machine's cores. The other arguments are
    Accelerator's. Raises ValueError where Accelerate would quietly form fewer processes than were launched, compute
    in another precision than it was asked for, or do what no option of ours records.
    """
    if cpu_threads is not None and cpu_threads < 1:
        raise ValueError(f"cpu_threads={cpu_threads} must be at least 1")
    check_surroundings(accelerator_arguments.get("mixed_precision"))
    world_size = int(os.environ.get("WORLD_SIZE") or "1")
    with _meeting(world_size):
        accelerator = Accelerator(
            # without a GPU Accelerate joins the processes that torchrun started only if `cpu` is given
            cpu=world_size > 1 and not torch.accelerator.is_available(),
            # the first process may decode a large data set for hours while the others wait
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
            **accelerator_arguments,
        )
    if accelerator.num_processes != world_size:
        raise ValueError(
            f"{world_size} processes were launched, but Accelerate formed {accelerator.num_processes}; "
            "launch as in `python training/train.py --help`"
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("--mixed_precision fp16 needs a GPU (on a CPU it would be float32); use bf16 or no")
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves a process one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(cpu_threads or max(1, cores // local_world_size))
    return accelerator
