"""Calls in several threads: each gets what it would get alone, from one pipeline or from one network."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.likelihood import bits_per_dim

STEPS = (4, 7, 10)
# the solvers refuse the tiny process' last steps where it visits timesteps twice, so theirs are of a longer one
SCHEDULERS = (DDPMPaperScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns every 10 µs: many times within one reverse step."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def pipe(tiny_unet, tiny_scheduler) -> DDPMPaperPipeline:
    """Its network is in training mode, with a dropout that would change every image."""
    made = DDPMPaperPipeline(tiny_unet(dropout=0.5), tiny_scheduler(num_train_timesteps=40, beta_end=0.2))
    made.set_progress_bar_config(disable=True)
    made.unet.train()
    return made


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that begin together, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(begin, calls))


def drawn(pipe: DDPMPaperPipeline, seed: int, steps: int) -> Callable[[], Tensor]:
    return lambda: pipe(seeds=[seed], num_inference_steps=steps, output_type="latent", return_dict=False)[0]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_three_threads_share_a_pipeline(pipe, scheduler):
    """With step counts of their own; solvers keep histories, which must not meet."""
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    calls = [drawn(pipe, seed, steps) for seed, steps in enumerate(STEPS)]
    alone = [call() for call in calls]
    for _ in range(3):
        for image, expected in zip(at_once(*calls), alone, strict=True):
            assert torch.equal(image, expected)
    assert all(module.training for module in pipe.unet.modules())


def test_pipelines_of_other_schedulers_share_a_network(pipe):
    """Whichever call ends first leaves the others in eval mode; the bound is one of them."""
    pipes = [DDPMPaperPipeline(pipe.unet, kind.from_config(pipe.scheduler.config)) for kind in SCHEDULERS]
    for made in pipes:
        made.set_progress_bar_config(disable=True)
    x_start = torch.zeros(1, *pipe.sample_shape)
    calls = [drawn(made, seed, steps) for seed, (made, steps) in enumerate(zip(pipes, (*STEPS, 13), strict=True))]
    calls.append(lambda: bits_per_dim(pipe.unet, pipe.scheduler, x_start, seed=0, batch_size=4).total_b)
    alone = [call() for call in calls]
    for result, expected in zip(at_once(*calls), alone, strict=True):
        assert torch.equal(result, expected)
    assert all(module.training for module in pipe.unet.modules())


def test_a_call_leaves_the_pipelines_scheduler_as_it_was(pipe):
    pipe.scheduler.set_timesteps(3)
    before = pipe.scheduler.timesteps.tolist()
    drawn(pipe, 0, 7)()
    assert pipe.scheduler.timesteps.tolist() == before and pipe.num_timesteps == 7


def test_a_callback_stops_its_own_call_alone(pipe):
    """And counts its own steps, whatever the others do."""
    counts: dict[int, list[int]] = {steps: [] for steps in STEPS}

    def call(steps: int) -> Tensor:
        def see(of: DDPMPaperPipeline, i: int, t: int, tensors: dict[str, Tensor]) -> None:
            counts[steps].append(of.num_timesteps)
            if steps == 7 and i == 2:
                of._interrupt = True

        return pipe(seeds=[0], num_inference_steps=steps, output_type="latent", callback_on_step_end=see).images

    at_once(*(lambda steps=steps: call(steps) for steps in STEPS))
    assert counts == {4: [4] * 4, 7: [7] * 3, 10: [10] * 10}


def test_a_thread_in_no_call_stops_them_all(pipe):
    seen, began = [], threading.Barrier(3)

    def call() -> None:
        def see(of: DDPMPaperPipeline, i: int, t: int, tensors: dict[str, Tensor]) -> None:
            seen.append(i)
            if i == 0:
                began.wait()  # until both calls run
                began.wait()  # until the third thread has stopped them

        pipe(seeds=[0], num_inference_steps=40, callback_on_step_end=see)

    def stop() -> None:
        began.wait()
        pipe._interrupt = True
        began.wait()

    at_once(call, call, stop)
    assert seen == [0, 0]


def test_a_callback_may_sample_with_the_same_pipeline(pipe):
    inner = drawn(pipe, 5, 4)
    expected, whole = inner(), drawn(pipe, 6, 7)()
    found = []

    def see(of: DDPMPaperPipeline, i: int, t: int, tensors: dict[str, Tensor]) -> None:
        found.append(inner())
        assert of.num_timesteps == 7

    images = pipe(seeds=[6], num_inference_steps=7, output_type="latent", callback_on_step_end=see).images
    assert torch.equal(images, whole) and all(torch.equal(image, expected) for image in found)
