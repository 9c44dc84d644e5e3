"""Pipelines and networks in a program of the user's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from . import Seen, use
from .running import Done, Runner

PIPELINES = "pipelines and networks"


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits(runner: Runner) -> Any:
    from ddpm_hf import DDPMPaperPipeline

    return quiet(DDPMPaperPipeline.from_pretrained(str(runner.digits)))


def tiny_pipeline(network: Any = None) -> Any:
    """Of a network with random weights in a process of 20 timesteps."""
    import torch

    from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet

    torch.manual_seed(0)
    shape: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 16)}
    shape |= {"layers_per_block": 1, "norm_num_groups": 8, "attention_resolutions": (4,)}
    made = DDPMPaperUNet(**shape) if network is None else network
    return quiet(DDPMPaperPipeline(made, DDPMPaperScheduler(20, 0.005, 0.5)))


def scrambled(network: Any) -> Any:
    """The network with weights that are not zero anywhere, or all networks would draw the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def images(pipe: Any, seeds: range = range(2), **options: Any) -> Any:
    return pipe(seeds=seeds, output_type="np", return_dict=False, **options)[0]


def value_or_error(done: Done, right: Callable[[Any], bool], shown: Callable[[Any], str], refused: str = "") -> Seen:
    """Right by its value, or by a refusal where `refused` is its pattern."""
    if done.code:
        return Seen(done.last, bool(refused) and done.refused(refused))
    return Seen(shown(done.value), right(done.value))


def or_documented(runner: Runner, seen: Seen, page: str, pattern: str) -> Seen:
    """Right as well where the page of this tree's docs says what comes of it."""
    said = (
        re.search(pattern, (runner.tree / "docs" / page).read_text())
        if (runner.tree / "docs" / page).exists()
        else None
    )
    return seen if seen.right or said is None else Seen(f"{seen.text}; docs/{page} says so", True)


def far(difference: float) -> str:
    return "the same images" if difference == 0 else f"images that differ by {difference:.2g} of 1"


# ---- two calls at once ---------------------------------------------------------------------------------------------


def threads_use(name: str, scheduler: str, said: str) -> None:
    @use(
        name,
        PIPELINES,
        f"two threads draw from one pipeline with {said}: 50 steps, and after the tenth another 100 steps",
        "the images that are drawn alone",
    )
    def _(runner: Runner) -> Seen:
        def task() -> float:
            import threading

            import diffusers
            import numpy as np

            pipe = digits(runner)
            if scheduler:
                pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
            alone, errors = images(pipe, range(4), num_inference_steps=50), []

            def other() -> None:
                try:
                    images(pipe, range(4, 5), num_inference_steps=100, callback_on_step_end=begun)
                except Exception as error:
                    errors.append(error)
                finally:
                    has_begun.set()

            def begun(pipe: Any, step: int, t: int, tensors: dict) -> dict:
                has_begun.set()
                return tensors

            def tenth(pipe: Any, step: int, t: int, tensors: dict) -> dict:
                if step == 9:
                    second.start()
                    assert has_begun.wait(60)
                return tensors

            has_begun, second = threading.Event(), threading.Thread(target=other)
            beside = images(pipe, range(4), num_inference_steps=50, callback_on_step_end=tenth)
            second.join()
            if errors:
                raise errors[0]
            return float(np.abs(beside - alone).max())

        done = runner.python(task)
        return value_or_error(done, lambda value: value == 0, far, "another thread")


threads_use("two-threads", "", "its own scheduler")
threads_use("two-threads-ddim", "DDIMScheduler", "DDIM")
threads_use("two-threads-dpm", "DPMSolverMultistepScheduler", "DPM-Solver++")
threads_use("two-threads-unipc", "UniPCMultistepScheduler", "UniPC")


# ---- networks of the user's own ------------------------------------------------------------------------------------


@use(
    "own-network-loaded",
    PIPELINES,
    "a subclass of DDPMPaperUNet, saved by save_pretrained, loaded by from_pretrained(folder, unet=…)",
    "the same images",
)
def _(runner: Runner) -> Seen:
    def task() -> float:
        import numpy as np

        from ddpm_hf import DDPMPaperPipeline, DDPMPaperUNet

        class MyNet(DDPMPaperUNet):
            pass

        pipe = tiny_pipeline()
        pipe.unet = scrambled(MyNet(**{key: pipe.unet.config[key] for key in pipe.unet.config if key[0] != "_"}))
        folder = runner.place / "mine"
        pipe.save_pretrained(folder)
        network = MyNet.from_pretrained(str(folder / "unet"))
        again = quiet(DDPMPaperPipeline.from_pretrained(str(folder), unet=network))
        return float(np.abs(images(again) - images(pipe)).max())

    return value_or_error(runner.python(task), lambda value: value == 0, far)


@use(
    "plain-module",
    PIPELINES,
    "DDPMPaperPipeline(a plain nn.Module, scheduler), and a call",
    "images, or refused in the constructor with the reason",
)
def _(runner: Runner) -> Seen:
    def task() -> list[int]:
        import torch

        class Plain(torch.nn.Module):
            def forward(self, sample: Any, timestep: Any) -> Any:
                return sample

        return list(images(tiny_pipeline(Plain())).shape)

    return value_or_error(runner.python(task), lambda shape: True, "images {}".format, "Plain|ModelMixin|config")


@use(
    "data-parallel",
    PIPELINES,
    "pipe.unet = torch.nn.DataParallel(pipe.unet), and a call",
    "the same images, or refused with what to do",
)
def _(runner: Runner) -> Seen:
    def task() -> float:
        import numpy as np
        import torch

        pipe = tiny_pipeline()
        scrambled(pipe.unet)
        before = images(pipe)
        pipe.unet = torch.nn.DataParallel(pipe.unet)
        return float(np.abs(images(pipe) - before).max())

    return value_or_error(runner.python(task), lambda value: value == 0, far, "DataParallel|one process per GPU")


@use(
    "another-size-saved",
    PIPELINES,
    "pipe.unet.register_to_config(sample_size=16) on the digits of 8×8: draw, save, load, draw",
    "the same images, or refused when it is set",
)
def _(runner: Runner) -> Seen:
    def task() -> float:
        import numpy as np

        from ddpm_hf import DDPMPaperPipeline

        pipe = digits(runner)
        pipe.unet.register_to_config(sample_size=16)
        before = images(pipe, num_inference_steps=5)
        pipe.save_pretrained(runner.place / "sixteen")
        again = quiet(DDPMPaperPipeline.from_pretrained(str(runner.place / "sixteen")))
        return float(np.abs(images(again, num_inference_steps=5) - before).max())

    return value_or_error(runner.python(task), lambda value: value == 0, far)


# ---- schedulers ----------------------------------------------------------------------------------------------------


def foreign_use(scheduler: str) -> None:
    @use(
        f"scheduler-{scheduler}",
        PIPELINES,
        f"digits by {scheduler}.from_config(pipe.scheduler.config), 20 steps",
        "refused by name, or mean and deviation within 0.05 of the digits' −0.39 and 0.75",
    )
    def _(runner: Runner) -> Seen:
        def task() -> tuple[float, float]:
            import diffusers

            pipe = digits(runner)
            pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
            x = pipe(seeds=range(64), num_inference_steps=20, output_type="latent", return_dict=False)[0]
            return float(x.mean()), float(x.std())

        def right(moments: list[float]) -> bool:
            return abs(moments[0] + 0.39) <= 0.05 and abs(moments[1] - 0.75) <= 0.05

        return value_or_error(runner.python(task), right, moments_shown, scheduler)


def moments_shown(moments: list[float]) -> str:
    return f"mean {moments[0]:.2f}, deviation {moments[1]:.2f}".replace("-", "−")


for name in ("EDMEulerScheduler", "IPNDMScheduler", "CogVideoXDDIMScheduler"):
    foreign_use(name)


def oracle_moments(scheduler: str, num_steps: int, **process: Any) -> Callable[[], tuple[float, float]]:
    """Mean and deviation of 2000 samples that a scheduler draws from the oracle of N(0.3, 0.2²)."""

    def task() -> tuple[float, float]:
        import diffusers
        import torch

        from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
        from ddpm_hf.oracle import GaussianMixture, OracleNetwork

        ours = DDPMPaperScheduler(clip_sample=False, **process)
        mixture = GaussianMixture(torch.ones(1), torch.tensor([[0.3]]), torch.tensor([[[0.04]]]))
        kind = getattr(diffusers, scheduler)
        seed = {"noise_sampler_seed": 0} if scheduler == "DPMSolverSDEScheduler" else {}
        network = OracleNetwork(mixture, ours.diffusion)
        pipe = quiet(DDPMPaperPipeline(network, kind.from_config(ours.config, **seed)))
        drawn = pipe(seeds=range(2000), num_inference_steps=num_steps, output_type="latent", return_dict=False)[0]
        return float(drawn.mean()), float(drawn.std())

    return task


@use(
    "pndm-of-four",
    PIPELINES,
    "PNDM with the oracle of N(0.3, 0.2²) and T = 4, 4 steps",
    "mean 0.3 within 0.03, refused, or named in the docs as what fails",
)
def _(runner: Runner) -> Seen:
    done = runner.python(oracle_moments("PNDMScheduler", 4, trained_betas=[0.99] * 4))
    seen = value_or_error(done, lambda moments: abs(moments[0] - 0.3) <= 0.03, moments_shown, "PNDM")
    return or_documented(runner, seen, "schedulers.md", r"PNDM\*\* begins .*a table of four timesteps is too short")


def oracle_use(scheduler: str) -> None:
    @use(
        f"oracle-{scheduler}",
        PIPELINES,
        f"the oracle of N(0.3, 0.2²) under {scheduler}, 20 steps",
        "mean 0.3 within 0.03, deviation 0.2 within 0.1",
    )
    def _(runner: Runner) -> Seen:
        done = runner.python(oracle_moments(scheduler, 20))
        near = [(0.3, 0.03), (0.2, 0.1)]
        return value_or_error(
            done,
            lambda moments: all(abs(one - at) <= by for one, (at, by) in zip(moments, near, strict=True)),
            moments_shown,
        )


for name in (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
):
    oracle_use(name)


@use("ddim-eta", PIPELINES, "pipe(eta=1.0) with DDIM", "images, other than with eta=0.0")
def _(runner: Runner) -> Seen:
    def task() -> float:
        import numpy as np
        from diffusers import DDIMScheduler

        pipe = digits(runner)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        with_noise, without = (images(pipe, num_inference_steps=10, eta=eta) for eta in (1.0, 0.0))
        return float(np.abs(with_noise - without).max())

    return value_or_error(runner.python(task), lambda value: value > 0, far)


# ---- functions -----------------------------------------------------------------------------------------------------


@use(
    "exported-with-any-batch",
    PIPELINES,
    "torch.export.export of DDPMPaperUNet with a dynamic batch, asked for batches of 1 and 5",
    "equal to the network within 1e-5",
)
def _(runner: Runner) -> Seen:
    def task() -> float:
        import torch

        network = scrambled(tiny_pipeline().unet).eval()
        batch = torch.export.Dim("batch", min=1, max=64)
        example = (torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.long))
        shapes = {"sample": {0: batch}, "timestep": {0: batch}}
        if "class_labels" in network.forward.__code__.co_varnames:
            shapes["class_labels"] = None  # type: ignore[assignment]
            example = (*example, None)
        exported = torch.export.export(network, example, dynamic_shapes=shapes).module()
        worst = 0.0
        for size in (1, 5):
            x, t = torch.randn(size, 1, 8, 8), torch.arange(size) * 3
            difference = exported(x, t, *example[2:]).sample - network(x, t).sample
            worst = max(worst, float(difference.abs().max()))
        return worst

    done = runner.python(task)
    if done.code:
        return Seen(done.said("specialized") or done.last, False)
    return Seen("equal" if done.value == 0 else f"off by {done.value:.0e}", done.value <= 1e-5)


@use(
    "bound-of-a-function", PIPELINES, "bits_per_dim(lambda x, t: net(x, t), …)", "the network's own bound, or refused"
)
def _(runner: Runner) -> Seen:
    def task() -> tuple[float, float]:
        import torch

        from ddpm_hf.likelihood import bits_per_dim

        pipe = tiny_pipeline()
        scrambled(pipe.unet).eval()
        x = torch.zeros(2, 1, 8, 8)
        own = bits_per_dim(pipe.unet, pipe.scheduler, x, seed=0)
        by_function = bits_per_dim(lambda x, t: pipe.unet(x, t), pipe.scheduler, x, seed=0)
        return float(by_function.total_b.mean()), float(own.total_b.mean())

    def shown(bounds: list[float]) -> str:
        return f"{bounds[0]:.4f} bits/dim, the network {bounds[1]:.4f}"

    return value_or_error(runner.python(task), lambda bounds: bounds[0] == bounds[1], shown, "network|ModelMixin")


@use(
    "stock-from-pipe",
    PIPELINES,
    "DDPMPipeline.from_pipe(ours)",
    "a pipeline, or refused in a sentence that names pipeline_to_stock, or the docs say what to take",
)
def _(runner: Runner) -> Seen:
    def task() -> str:
        from diffusers import DDPMPipeline

        return type(DDPMPipeline.from_pipe(tiny_pipeline())).__name__

    seen = value_or_error(runner.python(task), lambda name: True, str, "pipeline_to_stock")
    return or_documented(runner, seen, "sharing.md", r"pipeline_to_stock\(pipe\).*from_pipe\(pipe\)` cannot do it")


def frechet_use(name: str, offset: float, said: str) -> None:
    @use(
        name,
        PIPELINES,
        f"frechet_distance([x], [x]), 10 samples of 64 numbers{said}",
        "at least 0, and at most 0.01",
    )
    def _(runner: Runner) -> Seen:
        def task() -> float:
            import torch

            try:
                from ddpm_hf.evaluation import frechet_distance
            except ImportError:
                from ddpm_hf.metrics import frechet_distance  # its place at f8006bc

            x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
            return frechet_distance([x], [x])

        done = runner.python(task)
        return value_or_error(
            done, lambda value: 0 <= value <= 0.01, lambda value: f"{value:.2g}".replace("-", "−"), "offset|float64"
        )


frechet_use("frechet-of-equals", 0.0, "")
frechet_use("frechet-far-from-0", 1e8, " around 1e8")
