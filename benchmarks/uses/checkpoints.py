"""Checkpoints of stock diffusers, of older versions and of ports, which are read, or refused with what to do."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from . import ROOT, Seen, use
from .running import Done, Runner

CHECKPOINTS = "checkpoints of others"
DRAWN = 3  # reverse steps


def stock(runner: Runner, name: str, **options: Any) -> Path:
    """A tiny pipeline of stock diffusers, saved with these options of `save_pretrained`."""

    def task() -> None:
        import torch
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        torch.manual_seed(0)
        blocks: dict[str, Any] = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32),
        }
        details: dict[str, Any] = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
        details |= {"norm_num_groups": 8, "norm_eps": 1e-6, "layers_per_block": 1, "attention_head_dim": None}
        pipe = DDPMPipeline(UNet2DModel(sample_size=16, **blocks, **details), DDPMScheduler())
        if options.get("variant") == "fp16":
            pipe.to(dtype=torch.float16)
        pipe.save_pretrained(runner.place / name, **options)

    done = runner.python(task)
    assert done.code == 0, done.output
    return runner.place / name


def changed(file: Path, remove: tuple[str, ...] = (), **values: Any) -> None:
    content = {key: value for key, value in json.loads(file.read_text()).items() if key not in remove}
    file.write_text(json.dumps(content | values))


def drawn_from(runner: Runner, folder: Path, *words: str) -> Done:
    return runner.command("sample", folder, "--steps", DRAWN, "-o", "out.png", *words)


def outcome(done: Done, right: bool) -> Seen:
    return Seen(done.last if done.code or not done.said("Traceback") else "Traceback", right)


def refused_or_drawn(runner: Runner, done: Done, pattern: str) -> Seen:
    is_drawn = done.code == 0 and (runner.place / "out.png").exists()
    return outcome(done, is_drawn or done.refused(pattern))


# ---- a network that does not say its size --------------------------------------------------------------------------


def size_use(name: str, does: str, pattern: str, remove: tuple[str, ...] = (), **values: Any) -> None:
    @use(f"size-{name}", CHECKPOINTS, f"ddpm-hf sample of a stock network {does}", "drawn, or refused with the remedy")
    def _(runner: Runner) -> Seen:
        folder = stock(runner, "stock")
        changed(folder / "unet" / "config.json", remove, **values)
        return refused_or_drawn(runner, drawn_from(runner, folder), pattern)


size_use("null", "whose sample_size is null, the default", "sample_size", sample_size=None)
size_use("absent", "whose configuration has no sample_size", "sample_size", remove=("sample_size",))
size_use("odd", "whose sample_size is 15, with one halving", "multiple of 2", sample_size=15)
size_use("text", 'whose sample_size is the text "16"', "sample_size", sample_size="16")


# ---- the configuration of diffusers before 0.9 ---------------------------------------------------------------------


def old_scheduler(runner: Runner, **values: Any) -> Path:
    folder = stock(runner, "old")
    file = folder / "scheduler" / "scheduler_config.json"
    changed(file, ("prediction_type",), _diffusers_version="0.8.0", predict_epsilon=False, **values)
    return folder


@use(
    "predict-epsilon-false",
    CHECKPOINTS,
    "ddpm-hf convert of a checkpoint of diffusers 0.8 with predict_epsilon: false",
    "prediction_type sample",
)
def _(runner: Runner) -> Seen:
    done = runner.command("convert", old_scheduler(runner), "out")
    if done.code:
        return outcome(done, False)
    config = json.loads((runner.place / "out" / "scheduler" / "scheduler_config.json").read_text())
    return Seen(f"prediction_type {config['prediction_type']}", config["prediction_type"] == "sample")


@use(
    "predict-epsilon-contradicts",
    CHECKPOINTS,
    "the same with prediction_type: epsilon beside predict_epsilon: false",
    "refused with both keys",
)
def _(runner: Runner) -> Seen:
    done = runner.command("convert", old_scheduler(runner, prediction_type="epsilon"), "out")
    return outcome(done, done.refused("predict_epsilon.*prediction_type"))


# ---- weights under another name ------------------------------------------------------------------------------------


@use(
    "fp16-alone",
    CHECKPOINTS,
    "ddpm-hf sample of a stock checkpoint whose weights are ….fp16.safetensors alone",
    "drawn, or refused with the variant to ask for",
)
def _(runner: Runner) -> Seen:
    folder = stock(runner, "stock", variant="fp16")
    return refused_or_drawn(runner, drawn_from(runner, folder), "variant[ =]['\"]?fp16")


@use(
    "fp16-alone-ours",
    CHECKPOINTS,
    "the same of a checkpoint of ours",
    "drawn, or refused with the variant to ask for and no other remedy",
)
def _(runner: Runner) -> Seen:
    def task() -> None:
        import torch

        from ddpm_hf import DDPMPaperPipeline

        pipe = DDPMPaperPipeline.from_pretrained(str(runner.digits))
        pipe.to(dtype=torch.float16)
        pipe.save_pretrained(runner.place / "ours", variant="fp16")

    assert runner.python(task).code == 0
    seen = refused_or_drawn(runner, drawn_from(runner, runner.place / "ours"), "variant[ =]['\"]?fp16")
    return Seen(seen.text, seen.right and "use_safetensors" not in seen.text)


@use("fp16-asked-for", CHECKPOINTS, "ddpm-hf sample --variant fp16 of the stock checkpoint above", "drawn")
def _(runner: Runner) -> Seen:
    done = drawn_from(runner, stock(runner, "stock", variant="fp16"), "--variant", "fp16")
    return outcome(done, done.code == 0 and (runner.place / "out.png").exists())


@use(
    "bin-alone",
    CHECKPOINTS,
    "ddpm-hf sample of a stock checkpoint whose weights are a .bin alone",
    "refused with the file, the word pickle and what reads it",
)
def _(runner: Runner) -> Seen:
    folder = stock(runner, "stock", safe_serialization=False)
    done = drawn_from(runner, folder)
    words = ("diffusion_pytorch_model.bin", "pickle", "use_safetensors=False|--read_bin")
    return outcome(done, all(done.refused(word) for word in words))


# ---- folders and files that are no pipeline ------------------------------------------------------------------------


def training_checkpoint(runner: Runner) -> Path:
    folder = stock(runner, "stock")
    checkpoint = runner.place / "checkpoint-500"
    for name in ("unet", "unet_ema"):
        shutil.copytree(folder / "unet", checkpoint / name)
    return checkpoint


@use(
    "training-checkpoint-sampled",
    CHECKPOINTS,
    "ddpm-hf sample checkpoint-500, as the training script of diffusers leaves it: networks without a scheduler",
    "drawn, or refused with how to put a scheduler beside it",
)
def _(runner: Runner) -> Seen:
    done = drawn_from(runner, training_checkpoint(runner))
    return refused_or_drawn(runner, done, "without a scheduler.*DDPMScheduler")


@use(
    "training-checkpoint-converted",
    CHECKPOINTS,
    "ddpm-hf convert checkpoint-500/unet_ema out",
    "converted, or refused with how to put a scheduler beside it",
)
def _(runner: Runner) -> Seen:
    done = runner.command("convert", training_checkpoint(runner) / "unet_ema", "out")
    is_converted = done.code == 0 and (runner.place / "out" / "model_index.json").exists()
    return outcome(done, is_converted or done.refused("without a scheduler.*DDPMScheduler"))


@use(
    "pytorch-port",
    CHECKPOINTS,
    "ddpm-hf convert of weights under the names of the paper's PyTorch ports",
    "converted; the output differs from the port's forward pass by at most 1e-5",
)
def _(runner: Runner) -> Seen:
    file = runner.place / "diffusion-tiny.ckpt"

    def port() -> Any:
        sys.path.insert(0, str(ROOT / "tests" / "convert"))
        import port_files  # type: ignore

        return port_files, port_files.port_weights(port_files.port_shapes(32, (1, 2), 1, attended=(1,)))

    def write() -> None:
        import torch

        torch.save(port()[1], file)

    def compare() -> float:
        import torch

        from ddpm_hf import DDPMPaperUNet

        port_files, weights = port()
        x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
        right = port_files.Port({name: weight.double() for name, weight in weights.items()})(x.double(), t)
        network = DDPMPaperUNet.from_pretrained(str(runner.place / "out" / "unet"))
        return float((network(x, t).sample - right).abs().max())

    assert runner.python(write).code == 0
    done = runner.command("convert", file, "out", "--sample_size", "16")
    if done.said("unrecognized arguments"):
        done = runner.command("convert", file, "out")
    if done.code:
        return outcome(done, False)
    compared = runner.python(compare)
    if compared.code:
        return outcome(compared, False)
    return Seen(f"off by {re.sub('e-0', 'e-', f'{compared.value:.0e}')}", compared.value <= 1e-5)
