"""Sampling, the scheduler's step alone, and how sampling grows with batch, size and T."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.convert import pipeline_to_stock
from ddpm_hf.inference import speed_up

from .networks import (
    CIFAR10,
    DIGITS,
    SMALL,
    build_unet,
    counted,
    generator,
    largest,
    noise_of,
    relative_rms,
)
from .timing import STOCK, Difference, Timed, Work

FORWARD = 1e-4  # the same float32 sum in another order
FORWARD_TF32 = 2e-3  # relative RMS: GPUs compute float32 convolutions with 10 bits unless told otherwise
FORWARD_BF16 = 0.02  # bfloat16 keeps 8 bits of every activation: 0.4% each; relative RMS
STEP = 2e-4  # stock's float32 tables: up to 1.3e-4 at t = 2, relative to float64; ours 1.2e-7
PLAIN, FAST, FAST_BF16, STOCK_BF16 = "ours", "sped up", "sped up, bf16", "stock, bf16"
COMPILED_BF16, AUTO = "sped up, bf16, compiled", "sped up, auto"
# as fast as float32: where `auto` takes float32 both do the same work, and medians of its times differ by 1 % or 2 %
NEVER_SLOWER = (0.98, 1.0)


def contestant(name: str, ours: DDPMPaperPipeline, *, release: bool = False) -> DDPMPaperPipeline | DDPMPipeline:
    """The pipeline of this name that samples what `ours` does; with `release`, a sped up one takes its weights."""
    bf16 = name in (FAST_BF16, STOCK_BF16, COMPILED_BF16)
    if name in (STOCK, STOCK_BF16):
        pipe = pipeline_to_stock(ours)
        pipe = pipe.to(torch.bfloat16) if bf16 else pipe  # type: ignore[arg-type]
    else:
        dtype: Any = "auto" if name == AUTO else torch.bfloat16 if bf16 else torch.float32
        compile = name == COMPILED_BF16
        pipe = ours if name == PLAIN else speed_up(ours, dtype, compile=compile, release=release)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _same_forward(pipes: dict[str, Any], baseline: str, batch: int) -> list[Difference]:
    """One forward pass at an early, a middle and the last timestep, of every contestant against the baseline."""
    config, device = pipes[baseline].unet.config, pipes[baseline].device
    side = config["sample_size"]
    x_t = noise_of(batch, config["in_channels"], side, side).to(device)
    found = []
    for t in (999, 500, 3):
        timestep = torch.full((batch,), t, device=device)
        with torch.no_grad():
            outputs = {n: pipe.unet(x_t.to(pipe.unet.dtype), timestep).sample for n, pipe in pipes.items()}
        for name in [name for name in pipes if name != baseline]:
            pair = outputs[name], outputs[baseline]
            bf16 = "bf16" in name or getattr(pipes[name].unet, "compute_dtype", None) == torch.bfloat16
            if bf16 or device.type == "cuda":
                allowed = FORWARD_BF16 if bf16 else FORWARD_TF32
                found.append(Difference(f"{name}: ε at {t}, relative RMS", relative_rms(*pair), allowed))
            else:
                found.append(Difference(f"{name}: ε at {t}", largest(*pair), FORWARD))
    return found


def sample(pipe: Any, batch: int, steps: int) -> Any:
    draws = torch.Generator(pipe.device).manual_seed(0)
    return pipe(batch_size=batch, generator=draws, num_inference_steps=steps, output_type="pt").images


def build_sampling(
    quick: bool,
    *,
    config: dict[str, Any],
    batch: int,
    names: Sequence[str],
    steps: tuple[int, int],
    device: str = "cpu",
    baseline: str = STOCK,
) -> Work:
    """Whole pipelines; `steps` of them in the whole benchmark and in the quick one."""
    num_steps = steps[1 if quick else 0]
    ours = DDPMPaperPipeline(build_unet(**config).to(device), DDPMPaperScheduler())  # type: ignore[arg-type]
    pipes = {name: contestant(name, ours) for name in (baseline, *names)}

    def differences() -> list[Difference]:
        found = _same_forward(pipes, baseline, batch)
        for pipe in pipes.values():
            sample(pipe, batch, 1 if device == "cpu" else 5)  # a GPU's network is recorded after the first calls
        return found

    calls = {name: partial(sample, pipe, batch, num_steps) for name, pipe in pipes.items()}
    return Work(calls, differences, units=num_steps * batch, unit="image and step", flop=counted(config)[1])


def build_digits(quick: bool) -> Work:
    """The trained digits network: images on [0, 1] within 1e-4 after all 1000 steps."""
    ours = DDPMPaperPipeline.from_pretrained(DIGITS)
    pipes = {name: contestant(name, ours) for name in (STOCK, PLAIN, FAST)}
    batch, num_steps = (1, 100) if quick else (16, 1000)

    def differences() -> list[Difference]:
        images = {name: sample(pipe, batch, 1000) for name, pipe in pipes.items()}
        return [
            Difference(f"{name}: images", largest(found, images[STOCK]), 1e-4)
            for name, found in images.items()
            if name != STOCK
        ]

    calls = {name: partial(sample, pipe, batch, num_steps) for name, pipe in pipes.items()}
    return Work(calls, differences, units=num_steps * batch, unit="image and step")


# ---- the scheduler's step ------------------------------------------------------------------------------------------


def _stock_chain(scheduler: DDPMScheduler, model_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As DDPMPipeline calls it."""
    draws = generator()
    for t in scheduler.timesteps:
        x = scheduler.step(model_output, t, x, generator=draws).prev_sample  # type: ignore[union-attr]
    return x


def _our_chain(scheduler: DDPMPaperScheduler, model_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As DDPMPaperPipeline calls it."""
    draws = generator()
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(model_output, t, x, return_dict=False, generator=draws)[0]
    return x


def build_step(quick: bool) -> Work:
    ours = DDPMPaperScheduler()
    stock: Any = DDPMScheduler.from_config(ours.config)
    num_steps = 1000  # also when quick: a shorter chain times how the caches are filled
    for scheduler in (ours, stock):
        scheduler.set_timesteps(num_steps)
    x_t, model_output = noise_of(1, 3, 32, 32), noise_of(1, 3, 32, 32)

    def differences() -> list[Difference]:
        worst = 0.0
        for t in ours.timesteps.tolist():
            steps = [
                scheduler.step(model_output, t, x_t, return_dict=False, generator=generator())[0]
                for scheduler in (stock, ours)
            ]
            error = largest(steps[1], steps[0]) / float(steps[0].abs().max())
            worst = error if not error <= worst else worst
        return [Difference("x_{t−1}, relative", worst, STEP)]

    calls = {
        STOCK: torch.no_grad()(partial(_stock_chain, stock, model_output, x_t)),
        PLAIN: torch.no_grad()(partial(_our_chain, ours, model_output, x_t)),
    }
    return Work(calls, differences, units=num_steps, unit="step")


# ---- what there is -------------------------------------------------------------------------------------------------


def _sampling(name: str, config: dict[str, Any], batch: int, *, steps: tuple[int, int], **options: Any) -> Timed:
    """`names`: the contestants beside the baseline."""
    names, case = options.pop("names", (PLAIN, FAST)), options.pop("case", "sampling")
    baseline = options.get("baseline", STOCK)
    build = partial(build_sampling, config=config, batch=batch, names=names, steps=steps, baseline=baseline)
    return Timed(case, name, build, **options)


SAMPLING: list[Timed] = [
    _sampling(
        "CIFAR-10 UNet, batch 1",
        CIFAR10,
        1,
        names=(PLAIN, FAST, FAST_BF16, STOCK_BF16),
        steps=(20, 3),
        targets={FAST: (1.9, 2.5)},
        targets_amx={FAST_BF16: (5.5, 8.0)},
        all_cores=True,
    ),
    _sampling(
        "CIFAR-10 UNet, batch 16",
        CIFAR10,
        16,
        names=(PLAIN, FAST, FAST_BF16, STOCK_BF16),
        steps=(20, 1),
        targets={FAST: (1.6, 2.2)},
        targets_amx={FAST_BF16: (6.5, 9.0)},
        rounds=(5, 2),
        all_cores=True,
    ),
    *(
        _sampling(
            f"CIFAR-10 UNet, batch {batch}, beside our float32",
            CIFAR10,
            batch,
            names=(AUTO,),
            steps=(20, 3),
            targets={AUTO: NEVER_SLOWER},
            rounds=rounds,
            baseline=FAST,
        )
        for batch, rounds in ((1, (11, 3)), (16, (5, 0)))
    ),
    _sampling(
        "small UNet, batch 1", SMALL, 1, steps=(20, 20), targets={FAST: (1.7, 2.2)}, rounds=(21, 7), all_cores=True
    ),
    _sampling(
        "small UNet, batch 64", SMALL, 64, steps=(20, 3), targets={FAST: (1.15, 1.35)}, rounds=(11, 3), all_cores=True
    ),
    Timed("sampling", "digits, 1000 steps", build_digits, rounds=(5, 1)),
    Timed("scheduler", "step, 1×3×32×32", build_step, {PLAIN: (5.0, 8.0)}, rounds=(21, 7)),
]

SWEEPS: list[Timed] = [
    *(
        _sampling(f"small UNet, batch {batch}", SMALL, batch, steps=(8, 1), rounds=(7, quick), case="batch")
        for batch, quick in ((1, 2), (2, 0), (4, 0), (8, 2), (16, 0), (32, 0), (64, 2))
    ),
    *(
        _sampling(
            f"small UNet, {side}×{side}",
            {**SMALL, "sample_size": side, "attention_resolutions": (side // 2,)},
            4,
            steps=(8, 1),
            rounds=(7, quick),
            case="side",
        )
        for side, quick in ((8, 2), (16, 2), (32, 2), (64, 0))
    ),
    *(
        _sampling(f"small UNet, T = {steps}", SMALL, 1, steps=(steps, steps), rounds=(5, quick), case="steps")
        for steps, quick in ((10, 2), (100, 1), (1000, 0))
    ),
]


def _on_gpu(batch: int, target: float) -> Timed:
    """Against stock in its default precision; what lies beyond the target is the roofline."""
    names = (PLAIN, FAST, FAST_BF16, COMPILED_BF16, STOCK_BF16)
    build = partial(build_sampling, config=CIFAR10, batch=batch, names=names, steps=(200, 100), device="cuda")
    targets = dict.fromkeys((FAST, FAST_BF16, COMPILED_BF16), (target, target))
    return Timed("sampling", f"CIFAR-10 UNet, batch {batch}", build, targets, rounds=(3, 2), device="cuda")


GPU_SAMPLING = [_on_gpu(1, 5.0), _on_gpu(64, 2.5)]
