"""Bad input gets a clear error, at once: one table per area, each row what is done and the words the error must have.

A row passes where the exception is of a documented type, its one line names what is wrong, what arrived and what is
allowed or what to do, and nothing was written or trained. What is accepted is the affair of the other test files.
"""

# pyright: reportArgumentType=false
# (wrong arguments are what this file is about)

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet
from ddpm_hf.cli.commands import main
from ddpm_hf.convert import (
    from_stock,
    from_tf_checkpoint,
    from_tf_variables,
    pipeline_from_stock,
    pipeline_from_tf_checkpoint,
    pipeline_to_stock,
    to_stock,
)
from ddpm_hf.convert.tensor_bundle import TensorBundle
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.runs import KeyedBatches, parse_options, share_of
from ddpm_hf.scheduler.scheduling_ddpm_paper import GaussianDiffusion
from training import train as train_py

datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]
TF_CHECKPOINT = ROOT / "tests" / "golden" / "tf_checkpoint"
NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    name: str
    action: Callable[..., Any]
    words: tuple[str, ...]
    error: type[BaseException] = ValueError


def cases(rows: list[Case], faults: dict[str, str] | None = None) -> list[Any]:
    """The rows for parametrize; those that `faults` names are known to fall short, and why."""
    marks = {name: [pytest.mark.xfail(strict=True, reason=reason)] for name, reason in (faults or {}).items()}
    assert marks.keys() <= {row.name for row in rows}, marks.keys() - {row.name for row in rows}
    assert len({row.name for row in rows}) == len(rows), sorted(row.name for row in rows)
    return [pytest.param(row, id=row.name, marks=marks.get(row.name, [])) for row in rows]


def shown(keywords: dict[str, Any]) -> str:
    """Keyword arguments as the name of a case, the same in every process: no addresses."""

    def word(value: Any) -> str:
        if isinstance(value, DDPMPaperUNet):
            return f"{value.config['in_channels']}to{value.config['out_channels']}"
        if isinstance(value, torch.Tensor | np.ndarray):
            return f"{type(value).__name__}{tuple(value.shape)}"
        text = repr(value)
        return type(value).__name__ if " object at " in text or isinstance(value, torch.nn.Module) else text[:40]

    return ",".join(f"{key}={word(value)}" for key, value in keywords.items()).replace(" ", "")


def with_keywords(function: Callable[..., Any], table: list[tuple[Any, ...]]) -> list[Case]:
    """A case `function(**keywords)` of each row: keywords, words …"""
    return [Case(shown(keywords), lambda k=keywords: function(**k), words) for keywords, *words in table]


def refused(case: Case, *arguments: Any) -> str:
    """The message of the error, after its type and words were looked at."""
    with pytest.raises(case.error) as info:
        case.action(*arguments)
    message = str(info.value)
    for word in case.words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, tmp_path_factory) -> Iterator[Path]:
    """An empty working folder that stays empty, and no caches, network or other process's state."""
    caches = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("DDPM_HF_CACHE", str(caches))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", caches)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(True)
    yield tmp_path
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


def files_in(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---- scheduler: configuration --------------------------------------------------------------------------------------

SCHEDULES = "choose one of linear, scaled_linear, squaredcos_cap_v2, quad, const, jsd, warmup10, warmup50"
VARIANCES = "choose one of fixed_small, fixed_large, learned, fitted"
PREDICTIONS = "choose one of epsilon, sample, previous_sample, v_prediction"
BETAS = "betas must lie inside (0, 1), got "
ASCENDING = "timesteps must be a non-empty, strictly ascending list of integers, got "

SCHEDULER = [
    *(
        ({"num_train_timesteps": x}, f"num_train_timesteps={x!r} must be an int >= 1")
        for x in (0, -1, 1.0, 2.5, "10", None, NAN, True)
    ),
    ({"num_train_timesteps": 10**15}, f"num_train_timesteps={10**15}", "at most"),
    ({"beta_start": 0}, BETAS + "0.0 to 0.02"),
    ({"beta_start": -1e-4}, BETAS + "-0.0001 to 0.02"),
    ({"beta_start": 1}, BETAS + "0.02 to 1.0"),
    ({"beta_start": NAN}, BETAS + "nan"),
    ({"beta_start": INF}, BETAS + "nan"),
    ({"beta_start": 1e-30}, "betas are too small or too many for float64", "(0, 1)"),
    *(
        ({name: x}, f"{name}={x!r} must be a number")
        for name in ("beta_start", "beta_end")
        for x in ("1e-4", None, [1])
    ),
    ({"beta_start": True}, "beta_start=True must be a number"),
    ({"beta_end": 0}, BETAS + "0.0 to 0.0001"),
    ({"beta_end": 1}, BETAS + "0.0001 to 1.0"),
    ({"beta_end": 1.5}, BETAS + "0.0001 to 1.5"),
    ({"beta_end": NAN}, BETAS + "nan"),
    ({"trained_betas": [0.9] * 1000}, "betas are too small or too many for float64", "(0, 1)"),
    *(
        ({"beta_schedule": x}, f"beta_schedule={x!r} is not supported; {SCHEDULES}")
        for x in ("cosine", "Linear", "", None, 3, ["linear"], "sigmoid", "laplace")
    ),
    ({"trained_betas": []}, "trained_betas has shape (0,); it must be a non-empty list of numbers"),
    ({"trained_betas": 0.1}, "trained_betas has shape ()"),
    ({"trained_betas": [[0.1, 0.2]]}, "trained_betas has shape (1, 2)"),
    ({"trained_betas": [0.1, NAN]}, BETAS + "nan to nan"),
    ({"trained_betas": [0.1, 1.0]}, BETAS + "0.1 to 1.0"),
    ({"trained_betas": [0.0, 0.1]}, BETAS + "0.0 to 0.1"),
    ({"trained_betas": "linear"}, "trained_betas"),
    ({"trained_betas": {"a": 1}}, "trained_betas"),
    ({"trained_betas": [0.1, 0.2j]}, "trained_betas"),
    *(
        ({"variance_type": x}, f"variance_type={x!r} is not supported; {VARIANCES}")
        for x in ("fixed", "fixed_small_log", "learned_range", None, 1, ["fixed_small"])
    ),
    ({"variance_type": "fitted"}, "variance_type='fitted' needs x_start_mse"),
    *(
        ({"prediction_type": x}, f"prediction_type={x!r} is not supported; {PREDICTIONS}")
        for x in ("eps", "v", "", None, 0)
    ),
    *(
        (
            {"timestep_spacing": x},
            f"timestep_spacing={x!r} is not supported; choose one of leading, linspace, trailing",
        )
        for x in ("uniform", None, 1)
    ),
    *(({"steps_offset": x}, f"steps_offset={x!r} must be an int >= 0") for x in (-1, 1.5, "1", None, True)),
    *(({name: 1}, f"{name}=1 must be true or false") for name in ("clip_sample", "thresholding")),
    ({"rescale_betas_zero_snr": "true"}, "rescale_betas_zero_snr='true' must be true or false"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr", "prediction_type='epsilon'", "use v_prediction"),
    *(
        ({"dynamic_thresholding_ratio": x}, f"dynamic_thresholding_ratio={x!r} must be in (0, 1]")
        for x in (0, -1, 1.1, NAN)
    ),
    *(
        ({name: x}, f"{name}={x!r} must be > 0")
        for name in ("clip_sample_range", "sample_max_value")
        for x in (0, NAN)
    ),
    ({"clip_sample_range": "1"}, "clip_sample_range='1' must be a number"),
    *(
        ({"inference_timesteps": x}, f"inference_timesteps={x!r} must be a list of integers")
        for x in ([], "abc", 3, [[1, 2]], {})
    ),
    *(({"inference_timesteps": x}, f"{ASCENDING}{x}") for x in ([1, 1], [5, 3], [0.5], [NAN], ["1"], [True, False])),
    ({"inference_timesteps": [-1, 4]}, "timesteps must lie in [0, 1000), got -1 to 4"),
    ({"inference_timesteps": [0, 1000]}, "timesteps must lie in [0, 1000), got 0 to 1000"),
    ({"variance_type": "learned", "inference_timesteps": [1, 5]}, "variance_type='learned'", "2 of 1000"),
    ({"x_start_mse": [1.0] * 1000}, "x_start_mse", "variance_type='fitted'"),
    *(
        ({"variance_type": "fitted", "x_start_mse": x}, "x_start_mse must hold 1000 positive numbers")
        for x in ([1.0] * 999, [-1.0] * 1000, [NAN] * 1000, [INF] * 1000, 1.0)
    ),
    ({"variance_type": "fitted", "x_start_mse": "a"}, "x_start_mse"),
]
SCHEDULER_FAULTS: dict[str, str] = {}


@pytest.mark.parametrize("case", cases(with_keywords(DDPMPaperScheduler, SCHEDULER)))
def test_scheduler_configuration(case):
    refused(case)


# ---- scheduler: calls ----------------------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 3, 4, 4)
ONE_TO_TEN = "must be an integer in [1, 10]"


def ten(**config: Any) -> DDPMPaperScheduler:
    return DDPMPaperScheduler(**{"num_train_timesteps": 10, "beta_end": 0.5, **config})


def noised(t: Any, noise: Any = IMAGES, x: torch.Tensor = IMAGES) -> Callable[[], Any]:
    return lambda: ten().add_noise(x, noise, t)


def stepped(t: Any = 5, output: Any = IMAGES, x: Any = IMAGES, **kwargs: Any) -> Callable[[], Any]:
    return lambda: ten().step(output, t, x, **kwargs)


DIFFUSION = ten().diffusion
OF_TEN = "is not one of the current 10 timesteps in [0, 10)"
SCHEDULER_CALLS = [
    *(
        Case(f"steps={n!r}", lambda n=n: ten().set_timesteps(n), (f"num_inference_steps={n!r} {ONE_TO_TEN}",))
        for n in (0, -3, 11, 1.5, 2.0, "5", True, NAN, [5])
    ),
    *(
        Case(f"timesteps={t!r}", lambda t=t: ten().set_timesteps(timesteps=t), ("strictly descending", f"got {t}"))
        for t in ([], [1, 2], [5, 5], "abc", 5, [[3, 1]], [True, False], {3: 1}, ["3"])
    ),
    Case("timesteps-fractions", lambda: ten().set_timesteps(timesteps=[2.5, 1.0]), ("list of integers", "2.5")),
    Case("timesteps-nan", lambda: ten().set_timesteps(timesteps=[NAN]), ("list of integers", "nan")),
    Case("timesteps-T", lambda: ten().set_timesteps(timesteps=[10, 3]), ("must lie in [0, 10), got 10 to 3",)),
    Case("timesteps-minus", lambda: ten().set_timesteps(timesteps=[3, -1]), ("must lie in [0, 10), got 3 to -1",)),
    Case("timesteps-10^30", lambda: ten().set_timesteps(timesteps=[10**30]), ("must lie in [0, 10)", str(10**30))),
    Case("both", lambda: ten().set_timesteps(5, timesteps=[3, 1]), ("one of num_inference_steps and timesteps",)),
    Case(
        "learned-in-fewer",
        lambda: ten(variance_type="learned").set_timesteps(5),
        ("variance_type='learned'", "5 of 10", "sample with all of them"),
    ),
    Case(
        "mean-in-fewer",
        lambda: ten(prediction_type="previous_sample").set_timesteps(timesteps=[3, 1]),
        ("prediction_type='previous_sample'", "2 of 10"),
    ),
    *(
        Case(f"step-t={t!r}", stepped(t), (f"timestep={t} {OF_TEN}",))
        for t in (-1, 10, 1.5, None, NAN, [3], "3", torch.tensor(2.5), torch.tensor([3, 3]))
    ),
    Case("step-off-chain", lambda: short_chain().step(IMAGES, 4, IMAGES), ("timestep=4 ", "current 2 timesteps")),
    Case("step-output-shape", stepped(output=IMAGES[:1]), ("model_output (1, 3, 4, 4)", "(2, 3, 4, 4)")),
    Case("step-output-channels", stepped(output=IMAGES[:, :1]), ("model_output (2, 1, 4, 4)",)),
    Case("step-sample-shape", stepped(x=IMAGES[:1]), ("model_output (2, 3, 4, 4)", "(1, 3, 4, 4)")),
    Case("step-noise-shape", stepped(variance_noise=IMAGES[:1]), ("variance_noise (1, 3, 4, 4), sample (2,",)),
    Case(
        "step-learned-channels",
        lambda: ten(variance_type="learned").step(IMAGES, 5, IMAGES),
        ("learned variance needs 6 channels, got 3",),
    ),
    Case(
        "step-zero-snr",
        lambda: DDPMPaperScheduler(10, beta_schedule="jsd").step(IMAGES, 9, IMAGES),
        ("ᾱ is 0 at timestep 9", "use v_prediction or sample"),
    ),
    Case("step-integers", stepped(output=IMAGES.long(), x=IMAGES.long()), ("int64",)),
    Case("step-numpy", stepped(output=IMAGES.numpy(), x=IMAGES.numpy()), ("ndarray",)),
    Case("step-generator", stepped(generator=3), ("generator", "3")),
    Case("previous-timestep", lambda: ten().previous_timestep(17), (f"timestep=17 {OF_TEN}",)),
    *(
        Case(f"noise-t={name}", noised(t), (words,))
        for name, t, words in (
            ("T", torch.tensor([1, 10]), "t=[1, 10] leaves [0, 10)"),
            ("-1", torch.tensor([-1, 1]), "t=[-1, 1] leaves [0, 10)"),
            ("3", torch.tensor([1, 2, 3]), "t has shape (3,), torch.int64; expected one integer per sample, (2,)"),
            ("none", torch.tensor([]), "t has shape (0,)"),
            ("fractions", torch.tensor([1.0, 2.0]), "torch.float32; expected one integer per sample"),
            ("column", torch.tensor([[1], [2]]), "t has shape (2, 1)"),
            ("bools", torch.tensor([True, False]), "expected one integer per sample"),
            ("list", [1, 2], "expected one integer per sample"),
        )
    ),
    Case("noise-broadcast", noised(torch.tensor([1, 2]), IMAGES[:1]), ("noise (1, 3, 4, 4)", "x_start (2, 3, 4, 4)")),
    Case("noise-channels", noised(torch.tensor([1, 2]), IMAGES[:, :1]), ("noise (2, 1, 4, 4)",)),
    Case("velocity-shape", lambda: ten().get_velocity(IMAGES, IMAGES[:1], torch.tensor([1, 2])), ("noise (1, 3",)),
    *(
        Case(f"q_sample-t={t}", lambda t=t: DIFFUSION.q_sample(IMAGES, t, IMAGES), (f"t={t} is outside [0, 10)",))
        for t in (-1, 10)
    ),
    *(
        Case(
            f"q_sample-{dtype}",
            lambda d=dtype: DIFFUSION.q_sample(IMAGES.to(d), 1, IMAGES.to(d)),
            ("float32 or float64", str(dtype), "cast to float32 first"),
            TypeError,
        )
        for dtype in (torch.float16, torch.bfloat16, torch.int64)
    ),
    Case("x_start-type", lambda: DIFFUSION.predict_x_start(IMAGES, IMAGES, 1, "eps"), ("'eps'", PREDICTIONS)),
    Case(
        "reverse-variance",
        lambda: DIFFUSION.p_mean_variance(IMAGES, IMAGES, 1, prediction_type="epsilon", variance_type="small"),
        ("variance_type='small'", VARIANCES),
    ),
    Case(
        "reverse-fitted",
        lambda: DIFFUSION.p_mean_variance(IMAGES, IMAGES, 1, prediction_type="epsilon", variance_type="fitted"),
        ("variance_type='fitted' needs a process with x_start_mse",),
    ),
    *(
        Case(f"betas={name}", lambda b=betas: GaussianDiffusion(b), (words,))
        for name, betas, words in (
            ("none", [], "betas must be a non-empty vector inside (0, 1)"),
            ("matrix", [[0.1]], "got [[0.1]]"),
            ("0", [0.0], "got [0.]"),
            ("1-in-the-middle", [0.1, 1.0, 0.1], "only the last may be 1"),
            ("nan", [NAN], "got [nan]"),
            ("tiny", [1e-17] * 3, "too small or too many for float64"),
            ("many", [0.5] * 2000, "runs from 0.5 to 0.0"),
        )
    ),
    *(
        Case(f"respaced={name}", lambda r=r: DIFFUSION.respaced(r), (words,))
        for name, r, words in (
            ("empty", [], ASCENDING),
            ("down", [3, 2], f"{ASCENDING}[3, 2]"),
            ("T", [0, 10], "must lie in [0, 10), got 0 to 10"),
            ("fraction", [0.5], f"{ASCENDING}[0.5]"),
        )
    ),
    Case(
        "from-stock-learned",
        lambda: DDPMPaperScheduler.from_config({"_class_name": "DDPMScheduler", "variance_type": "learned"}),
        ("variance_type='learned' of stock",),
    ),
]
SCHEDULER_CALL_FAULTS: dict[str, str] = {}


def short_chain() -> DDPMPaperScheduler:
    scheduler = ten()
    scheduler.set_timesteps(2)
    return scheduler


@pytest.mark.parametrize("case", cases(SCHEDULER_CALLS))
def test_scheduler_calls(case):
    refused(case)


# ---- networks ------------------------------------------------------------------------------------------------------

TINY = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def tiny(**config: Any) -> DDPMPaperUNet:
    return DDPMPaperUNet(**{**TINY, "attention_resolutions": (4,), **config})  # type: ignore[arg-type]


HALVED = "divisible by 2, since block_out_channels=(8, 16) halves it 1 times"
NETWORK = [
    *(({"sample_size": x}, f"sample_size={x}", HALVED) for x in (0, -8, 7, (8,), (8, 8, 8), (8, 7), ())),
    *(({"sample_size": x}, "sample_size") for x in (8.0, "8", None, (8, "8"), NAN)),
    ({"in_channels": 0}, "in_channels=0"),
    ({"in_channels": 2}, "out_channels=3 must be in_channels=2, or twice that"),
    *(({"in_channels": x}, "in_channels") for x in (None, "3", 1.5)),
    *(({"out_channels": x}, f"out_channels={x} must be in_channels=3, or twice that") for x in (0, 1, 4, None)),
    ({"block_out_channels": (8, 10)}, "norm_num_groups=4 must divide (8, 10)"),
    ({"block_out_channels": (0, 8)}, "block_out_channels[0]=0 must be even and at least 4"),
    ({"block_out_channels": (7, 7), "norm_num_groups": 7}, "block_out_channels[0]=7 must be even and at least 4"),
    ({"block_out_channels": (-8, 8)}, "block_out_channels[0]=-8 must be even and at least 4"),
    *(({"block_out_channels": x}, "block_out_channels") for x in ((), (8, -8), (8, 0), 8, None, (8, None), (8.0, 16))),
    ({"layers_per_block": 0}, "layers_per_block=0"),
    ({"layers_per_block": -1}, "layers_per_block=-1"),
    *(({"layers_per_block": x}, "layers_per_block") for x in (1.5, "1", None)),
    *(({"attention_resolutions": x}, "attention_resolutions") for x in (3, "4", None, ("a",), (-1,))),
    *(({"dropout": x}, f"dropout={x}") for x in (-0.1, 1, 1.0, NAN)),
    *(({"dropout": x}, "dropout") for x in ("0.1", None)),
    *(({"norm_num_groups": x}, f"norm_num_groups={x} must divide (8, 16)") for x in (3, 5)),
    *(({"norm_num_groups": x}, "norm_num_groups") for x in (0, -4, "4", None, 1.0)),
]
NETWORK_FAULTS: dict[str, str] = {}


@pytest.mark.parametrize("case", cases(with_keywords(tiny, NETWORK)))
def test_unet_configuration(case):
    refused(case)


MLP = [
    *(({"out_channels": x}, f"out_channels={x} must be in_channels=2, or twice that") for x in (0, 3, 1, None)),
    *(({"hidden_size": x}, f"hidden_size={x} must be even and >= 4") for x in (0, -4, 2, 7, NAN)),
    *(({"hidden_size": x}, "hidden_size") for x in (16.0, "16", None)),
    *(({"num_layers": x}, f"num_layers={x}") for x in (0, -1)),
    *(({"num_layers": x}, "num_layers") for x in (1.5, "3", None)),
    *(({"in_channels": x, "out_channels": x}, "in_channels") for x in (0, -1, None)),
]
MLP_FAULTS: dict[str, str] = {}


@pytest.mark.parametrize("case", cases(with_keywords(DDPMPaperMLP, MLP)))
def test_mlp_configuration(case):
    refused(case)


UNET, POINTS = tiny(), DDPMPaperMLP(hidden_size=16, num_layers=1)
X, P = torch.zeros(2, 3, 8, 8), torch.zeros(2, 2)
EXPECTS = "this model expects [B, 3, H, W]"
NETWORK_CALLS = [
    Case("one-image", lambda: UNET(X[0], 0), ("sample has shape (3, 8, 8)", EXPECTS)),
    Case("channels", lambda: UNET(X[:, :1], 0), ("sample has shape (2, 1, 8, 8)", EXPECTS)),
    Case("video", lambda: UNET(X[None], 0), ("sample has shape (1, 2, 3, 8, 8)", EXPECTS)),
    Case("odd-height", lambda: UNET(X[:, :, :7], 0), ("(7, 8) must be divisible by 2",)),
    Case("odd-width", lambda: UNET(X[..., :5], 0), ("(8, 5) must be divisible by 2",)),
    Case("three-timesteps", lambda: UNET(X, torch.tensor([1, 2, 3])), ("timestep has shape (3,)", "(2,)")),
    Case("no-timesteps", lambda: UNET(X, torch.tensor([])), ("timestep has shape (0,)", "(2,)")),
    *(Case(f"timestep={t!r}", lambda t=t: UNET(X, t), ("timestep",)) for t in ("1", None, [1, 2])),
    Case("sample-integers", lambda: UNET(X.long(), 0), ("torch.int64",)),
    Case("sample-double", lambda: UNET(X.double(), 0), ("dtype",), RuntimeError),  # torch's own, which is clear
    Case("sample-half", lambda: UNET(X.half(), 0), ("dtype",), RuntimeError),
    Case("no-tensor", lambda: UNET(X.numpy(), 0), ("sample", "ndarray")),
    Case("points-3d", lambda: POINTS(P[None], 0), ("sample has shape (1, 2, 2)", "this model expects [B, 2]")),
    Case("points-1d", lambda: POINTS(P[0], 0), ("sample has shape (2,)", "this model expects [B, 2]")),
    Case("points-in-space", lambda: POINTS(torch.zeros(2, 3), 0), ("sample has shape (2, 3)", "[B, 2]")),
    Case("points-timesteps", lambda: POINTS(P, torch.tensor([1, 2, 3])), ("timestep has shape (3,)", "(2,)")),
]
NETWORK_CALL_FAULTS: dict[str, str] = dict.fromkeys(
    ["sample-torch.float64", "sample-torch.float16"], "torch's RuntimeError"
)


@pytest.mark.parametrize("case", cases(NETWORK_CALLS))
def test_network_calls(case):
    refused(case)


# ---- pipeline ------------------------------------------------------------------------------------------------------

LAST = DDPMPaperScheduler(num_train_timesteps=3, beta_end=0.5)
Generator = torch.Generator


def drawn(network: Any = UNET, scheduler: Any = LAST, **arguments: Any) -> Any:
    pipe = DDPMPaperPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments)


ONE_SAMPLE = "a batch needs at least one sample, as an integer; got "
SEEDS = "seeds must be integers in [0, 2**32), got "
GENERATOR = "generator must be a torch.Generator or a list of them, got "
PIPELINE = [
    *(({"batch_size": x}, f"{ONE_SAMPLE}{{'batch_size': {x!r}}}") for x in (0, -1, True, "4", 1.5, NAN, [2])),
    ({"seeds": []}, f"{ONE_SAMPLE}{{'seeds': 0}}"),
    ({"seeds": 3}, "seeds must be a list of integers, one per sample, got 3"),
    ({"seeds": 3.5}, "seeds", "3.5"),
    *(({"seeds": [x]}, f"{SEEDS}{x!r}") for x in (-1, 2**32, "a", 1.5, True, None, NAN, [1])),
    ({"seeds": "12"}, f"{SEEDS}'1'"),
    ({"seeds": b"12"}, "seeds", "b'12'"),
    ({"seeds": {1, 2}}, "seeds", "{1, 2}"),
    *(({"generator": x}, f"{GENERATOR}{x!r}") for x in (3, "a", [3], {}, Generator)),
    ({"generator": []}, f"{ONE_SAMPLE}{{'generator': 0}}"),
    *(
        ({"num_inference_steps": x}, f"num_inference_steps={x!r} must be an integer in [1, 3]")
        for x in (0, -3, 4, 1.5, "3", True, NAN, [1])
    ),
    *(
        ({"output_type": x}, f"output_type={x!r} is not supported; choose one of pil, np, pt, latent")
        for x in ("PIL", "numpy", "", None, 3, ["pil"])
    ),
    ({"latents": X[:, :1]}, "latents have shape (2, 1, 8, 8); expected [B, (3, 8, 8)]"),
    ({"latents": X[0]}, "latents have shape (3, 8, 8)"),
    ({"latents": X[..., :4]}, "latents have shape (2, 3, 8, 4)"),
    ({"latents": X[:0]}, f"{ONE_SAMPLE}{{'latents': 0}}"),
    ({"latents": X.numpy()}, "latents", "ndarray"),
    ({"latents": 3}, "latents", "int"),
    ({"latents": X[:1] * NAN}, "latents", "finite"),
    ({"seeds": [1], "generator": Generator()}, "pass seeds or generator, not both"),
    ({"seeds": [1, 2], "batch_size": 3}, "{'batch_size': 3, 'seeds': 2}; these must agree"),
    ({"batch_size": 2, "generator": [Generator()] * 3}, "{'batch_size': 2, 'generator': 3}; these must agree"),
    ({"latents": X, "seeds": [1]}, "{'seeds': 1, 'latents': 2}; these must agree"),
    ({"callback_on_step_end_tensor_inputs": ["x"]}, "['x']; only 'latents' can be passed"),
    ({"callback_on_step_end": 3}, "callback_on_step_end", "3"),
    ({"network": POINTS}, "samples of shape (2,) are not pictures; use output_type='np', 'pt' or 'latent'"),
    ({"network": POINTS, "latents": torch.zeros(2, 3), "output_type": "np"}, "latents have shape (2, 3); expected"),
    ({"network": tiny(in_channels=2, out_channels=2)}, "samples of shape (2, 8, 8) are not pictures"),
    ({"scheduler": ten(variance_type="learned")}, "learned variance needs 6 channels, got 3"),
    ({"network": tiny(out_channels=6)}, "model_output (1, 6, 8, 8)", "(1, 3, 8, 8)"),
]
PIPELINE_FAULTS: dict[str, str] = {}


@pytest.mark.parametrize("case", cases(with_keywords(drawn, PIPELINE)))
def test_pipeline_calls(case):
    refused(case)


# ---- training: command line and configuration files ----------------------------------------------------------------


# An unpublishable size: what is not refused would otherwise train.
SMALL = "--num_train_timesteps=20 --beta_end=0.5 --block_out_channels 8 --layers_per_block=1 --attention_resolutions"
SMALL += " --norm_num_groups=4 --global_batch_size=16 --cpu_threads=1"


def train(place: Path, words: list[str]) -> None:
    train_py.main([f"--output_dir={place / 'run'}", *SMALL.split(), *words])


@pytest.fixture
def not_training(monkeypatch):
    """Training that was not refused fails the test at once."""

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("it would have trained")

    monkeypatch.setattr(train_py, "train", fail)


# exit code 2: known from the options alone
OPTIONS = [
    *(
        (f"--{name}=-1", f"--{name}=-1 must be at least {least}")
        for least, names in (
            (0, "seed warmup_steps sample_every skip_bad_images num_workers"),
            (1, "num_train_timesteps num_steps global_batch_size log_every gradient_accumulation_steps num_samples"),
            (1, "layers_per_block num_layers checkpoint_every resolution in_channels sample_steps cpu_threads"),
            (1, "norm_num_groups hidden_size"),
            (2, "keep_checkpoints"),
        )
        for name in names.split()
    ),
    ("--norm_num_groups=0", "--norm_num_groups=0 must be at least 1"),
    ("--num_train_timesteps=1000000000", "--num_train_timesteps=1000000000 must be at most 1000000"),
    ("--num_samples=1000000", "--num_samples=1000000 must be at most 10000"),
    ("--num_workers=100000", "--num_workers=100000 must be at most 1024"),
    ("--cpu_threads=100000", "--cpu_threads=100000 must be at most 1024"),
    ("--layers_per_block=100000000", "--layers_per_block=100000000 must be at most 100"),
    ("--hidden_size=10000000", "--hidden_size=10000000 must be at most 16384"),
    ("--num_layers=10000000", "--num_layers=10000000 must be at most 1000"),
    ("--block_out_channels", "--block_out_channels=[] must hold"),
    ("--block_out_channels 8 -8", "--block_out_channels=[8, -8] must each lie in [1, 16384]"),
    ("--block_out_channels 100000", "--block_out_channels=[100000] must each lie in [1, 16384]"),
    ("--attention_resolutions -1", "--attention_resolutions=[-1] must each lie in [1, 16384]"),
    *(
        (f"--{name}={value}", f"--{name}={float(value)} must be positive and finite")
        for name in ("learning_rate", "max_grad_norm")
        for value in ("0", "-1", "nan", "inf")
    ),
    *(
        (f"--{name}={value}", f"--{name}={float(value)}", "must lie in [0, 1)")
        for name in ("ema_decay", "dropout")
        for value in ("1", "-0.1", "nan")
    ),
    *(
        (f"--{name}={value}", f"--{name}={float(value)} must lie inside (0, 1)")
        for name in ("beta_start", "beta_end")
        for value in ("0", "1", "-0.1", "nan", "inf")
    ),
    ("--beta_start=1e-30", "betas are too small or too many for float64: ᾱ must stay inside (0, 1)"),
    ("--num_train_timesteps=100000", "betas are too small or too many for float64"),
    ("--beta_schedule=jsd", "--beta_schedule jsd", "--prediction_type epsilon", "use v_prediction or sample"),
    ("--beta_schedule=cosine", "--beta_schedule", "'cosine' is not one of linear, quad"),
    ("--beta_schedule=lineal", "'lineal'", "did you mean linear?"),
    ("--objective=vbl", "--objective", "'vbl' is not one of simple, vlb; did you mean vlb?"),
    ("--prediction_type=eps", "--prediction_type", "'eps' is not one of epsilon, sample"),
    ("--variance_type=fixed_smal", "did you mean fixed_small?"),
    ("--mixed_precision=b16", "'b16' is not one of no, fp16, bf16; did you mean bf16?"),
    ("--report_to=tensorbord", "did you mean tensorboard?"),
    ("--report_to=wandb", "--report_to wandb is not installed: pip install wandb"),
    ("--hub_strategy=never", "'never' is not one of end, every_save"),
    ("--timestep_sampling=loss", "'loss' is not one of uniform, loss_history"),
    ("--variance_type=learned", "--variance_type learned needs --objective vlb"),
    ("--timestep_sampling=loss_history", "--timestep_sampling loss_history is for --objective vlb"),
    ("--sample_steps=21", "--sample_steps=21 exceeds --num_train_timesteps=20"),
    ("--prediction_type=previous_sample --sample_steps=5", "--sample_steps=5: with --prediction_type previous_sample"),
    ("--objective=vlb --variance_type=learned --sample_steps=5", "--sample_steps=5: with --variance_type learned"),
    ("--dataset_name=none", "give one of --dataset_name (None) and --train_data_dir (None)"),
    ("--train_data_dir=photos", "--dataset_name (digits) and --train_data_dir (photos)", "folder64.yaml"),
    ("--dataset_name=", "--dataset_name='' is empty"),
    ("--train_data_dir= --dataset_name=none", "--train_data_dir='' is empty"),
    ("--output_dir=", "--output_dir='' must be a folder"),
    ("--push_to_hub", "--push_to_hub needs --hub_model_id user/name"),
    ("--hub_model_id=x", "the repository is 'x'; give it as user/name"),
    ("--hub_model_id=../x/y", "the repository is '../x/y'; give it as user/name"),
    ("--num_steps=many", "--num_steps", "'many'"),
    ("--num_steps=1e3", "--num_steps", "'1e3'"),
    ("--num_steps=1.5", "--num_steps", "'1.5'"),
    ("--num_steps=true", "--num_steps", "'true'"),
    ("--num_steps=", "--num_steps", "''"),
    ("--num_steps=none", "--num_steps", "'none'"),
    ("--learning_rate=fast", "--learning_rate", "'fast'"),
    ("--learning_rate=1,5", "--learning_rate", "'1,5'"),
    ("--random_flip=perhaps", "--random_flip", "perhaps"),
    ("--block_out_channels 8 x", "--block_out_channels", "'x'"),
    ("--block_out_channels 8,16", "--block_out_channels", "'8,16'"),
    ("--lerning_rate=1", "unknown option --lerning_rate; did you mean learning_rate?"),
    ("--batch_size=4", "unknown option --batch_size; did you mean global_batch_size?"),
    ("--learning=1", "unknown option --learning"),
    ("--zzz", "unknown option --zzz"),
    ("digits", "unexpected words: digits"),
    ("--num_steps", "--num_steps", "expected one argument"),
    ("--config=missing.yaml", "--config missing.yaml", "No such file"),
    ("--config=.", "--config .", "Is a directory"),
]


@pytest.mark.parametrize(("words", "expected"), [(words, expected) for words, *expected in OPTIONS])
def test_training_command_line(place, not_training, monkeypatch, capsys, words, expected):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(SystemExit) as info:
        train(place, words.split())
    assert info.value.code == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert all(word in message for word in expected) and message.count("\n") == 1, message
    assert not list(place.iterdir())


# exit code 1: known only with the data, the checkpoint or the machine; the run's folder is there by then
UNTRAINABLE = [
    ("--global_batch_size=1438", "digits has 1437 samples, fewer than global_batch_size=1438; lower"),
    ("--gradient_accumulation_steps=3", "global_batch_size=16", "gradient_accumulation_steps=3", "a multiple of 3"),
    ("--in_channels=3", "the model expects 3 channels (--in_channels), the data has 1"),
    ("--norm_num_groups=3", "norm_num_groups=3 must divide (8,)"),
    ("--block_out_channels 6 --norm_num_groups=4", "norm_num_groups=4 must divide (6,)"),
    ("--block_out_channels 8 8 8 8 8", "sample_size=8", "divisible by 16"),
    ("--dataset_name=moons --hidden_size=3", "hidden_size=3 must be even and >= 4"),
    ("--dataset_name=moons --random_flip", "--random_flip mirrors images, and the data are points; leave it out"),
    ("--dataset_split=all", "split='all': digits has 'train' and 'test'"),
    ("--image_column=x", "image_column='x': means nothing for 'digits'; leave it out"),
    ("--dataset_config=x", "dataset_config='x': means nothing for 'digits'; leave it out"),
    ("--resolution=16", "resolution=16: means nothing for 'digits'; leave it out"),
    ("--resolution=100000", "resolution=100000: must be an integer, 1 to 7071 pixels"),
    ("--background=whitish", "background='whitish': pass a colour name such as 'white', or '#rrggbb'"),
    ("--dataset_name=digit", "dataset_name='digit': not built in (digits, swiss_roll, moons), no folder"),
    ("--dataset_name=none --train_data_dir=nowhere", "train_data_dir='nowhere': no such folder; check the path"),
    ("--init_from=nowhere/at/all", "nowhere/at/all"),
    ("--resume=nowhere", "nowhere/train_state/manifest.json cannot be read"),
    ("--mixed_precision=fp16", "--mixed_precision fp16 needs a GPU", "use bf16 or no"),
]


@pytest.mark.parametrize(("words", "expected"), [(words, expected) for words, *expected in UNTRAINABLE])
def test_what_cannot_be_trained(place, not_training, words, expected):
    with pytest.raises(SystemExit) as info:
        train(place, words.split())
    message = info.value.code
    assert isinstance(message, str) and message.startswith("train.py: ") and "\n" not in message
    assert all(word in message for word in expected), message
    assert {path.name for path in place.rglob("*")} <= {"run", ".in_use"}


def test_an_output_folder_that_is_a_file(place, not_training, capsys):
    (place / "file").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        train(place, ["--output_dir=file"])
    assert "--output_dir='file' must be a folder" in capsys.readouterr().err
    assert (place / "file").read_text() == "mine"


YAML = [
    ("lerning_rate: 1", "unknown key 'lerning_rate'; did you mean learning_rate?"),
    ("Seed: 1", "unknown key 'Seed'; did you mean seed?"),
    ("zzz: 1", "unknown key 'zzz'"),
    ("<<: {seed: 1}", "unknown key '<<'"),
    ("seed: 1\nseed: 2", "seed is given more than once"),
    ("seed: 1\nnum_steps: 5\nseed: 1", "seed is given more than once"),
    ("num_steps: many", "--num_steps", "'many'"),
    ("num_steps: 3.5", "--num_steps", "'3.5'"),
    ("num_steps: null", "num_steps needs a value"),
    ("num_steps:", "num_steps needs a value"),
    ("num_steps: [1, 2]", "num_steps takes one value, got a list of 2"),
    ("num_steps: {a: 1}", "num_steps must be a plain value or a flat list"),
    ("num_steps: 2026-01-01", "--num_steps", "'2026-01-01'"),
    ("num_steps: -5", "--num_steps=-5 must be at least 1"),
    ("learning_rate: fast", "--learning_rate", "'fast'"),
    ("learning_rate: .nan", "--learning_rate", ".nan"),
    ("learning_rate: nan", "--learning_rate=nan must be positive and finite"),
    ("random_flip: perhaps", "--random_flip", "perhaps"),
    ("random_flip: []", "random_flip takes one value, got a list of 0"),
    ("block_out_channels: [[8]]", "block_out_channels must be a plain value or a flat list"),
    ("block_out_channels: [8, none]", "block_out_channels needs a value"),
    ("block_out_channels: 8 16", "--block_out_channels", "'8 16'"),
    ("block_out_channels: []", "--block_out_channels=[] must hold"),
    ("mixed_precision: [bf16]", "mixed_precision takes one value"),
    ("mixed_precision: b16", "'b16' is not one of no, fp16, bf16; did you mean bf16?"),
    ("push_to_hub: true", "--push_to_hub needs --hub_model_id user/name"),
    ("variance_type: learned", "--variance_type learned needs --objective vlb"),
    ("- seed\n- 1", "expected lines of the form `key: value`"),
    ("seed", "expected lines of the form `key: value`"),
    ("seed: [1", "while parsing"),
    ("a: b: c", "mapping values are not allowed"),
    ("seed: 1\n---\nseed: 2", "expected a single document"),
    ("seed: *nothing", "undefined alias"),
    ("\tseed: 1", "cannot start any token"),
    ("? [1]\n: 2", "found unhashable key"),
    ("[" * 1200, "lists within lists"),
]


@pytest.mark.parametrize(("text", "expected"), [(t, e) for t, *e in YAML], ids=[t[:30] for t, *_ in YAML])
def test_training_configuration_files(place, not_training, capsys, text, expected):
    (place / "options.yaml").write_text(text)
    with pytest.raises(SystemExit) as info:
        parse_options(train_py.TrainingOptions, ["--dataset_name=digits", "--config", "options.yaml"])
    assert info.value.code == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert all(word in message for word in expected), message
    assert [path.name for path in place.iterdir()] == ["options.yaml"]


# ---- data ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(place) -> Path:
    """The working folder with `photos`, of which two are of different sizes, and other things that hold no images."""
    for name, size in (("0.png", (4, 4)), ("1.png", (5, 4))):
        (place / "photos").mkdir(exist_ok=True)
        Image.new("RGB", size).save(place / "photos" / name)
    for name in ("empty", "numbers", "script", "texts"):
        (place / name).mkdir()
    (place / "numbers" / "a.csv").write_text("x,y\n1,2\n")
    (place / "texts" / "a.txt").write_text("no image")
    (place / "script" / "script.py").write_text("open('canary', 'w')")
    (place / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    table = datasets.Dataset.from_dict({"bytes": [b"x"], "text": ["a"]})
    datasets.disable_progress_bars()
    table.to_parquet(place / "table.parquet")
    return place


PHOTOS = {"train_data_dir": "photos"}
DATA: list[tuple[Any, ...]] = [
    ({}, "dataset_name=None and train_data_dir=None; pass exactly one of the two"),
    ({"dataset_name": "digits", **PHOTOS}, "dataset_name='digits' and train_data_dir='photos'; pass exactly one"),
    *(
        ({name: x}, f"{name}={x!r}: pass a folder's path")
        for name in ("dataset_name", "train_data_dir")
        for x in ("", 3)
    ),
    ({"dataset_name": ["digits"]}, "dataset_name=['digits']: pass a folder's path"),
    *(
        ({**PHOTOS, name: x}, f"{name}={x!r}: must be an integer, 0 or more")
        for name in ("skip_bad_images", "num_workers", "max_memory_bytes")
        for x in (-1, "1", None, 1.5, True)
    ),
    *(
        ({**PHOTOS, "resolution": x}, f"resolution={x!r}: must be an integer, 1 to 7071 pixels, or None")
        for x in (0, -4, "64", 1.5, True, 10**6)
    ),
    *(
        ({**PHOTOS, "background": x}, f"background={x!r}: pass a colour name such as 'white', or '#rrggbb'")
        for x in (None, 255, "", "whitish", "rgb(1,2)", "#ffffff80")
    ),
    (PHOTOS, "photos/0.png is 4 x 4, photos/1.png is 5 x 4; pass resolution to make them equal"),
    ({**PHOTOS, "split": "test"}, "split='test': the folder photos has no splits"),
    ({**PHOTOS, "image_column": "x"}, "image_column='x': means nothing for 'photos'; leave it out"),
    ({**PHOTOS, "dataset_config": "x"}, "dataset_config='x': means nothing for 'photos'; leave it out"),
    ({"train_data_dir": "empty"}, "train_data_dir='empty': the folder is empty; put images into it"),
    ({"train_data_dir": "texts"}, "no image among its files (1 x .txt); allowed are", ".jpeg"),
    ({"dataset_name": "digits", "split": None}, "split=None: digits has 'train' and 'test'"),
    ({"dataset_name": "digits", "resolution": 8}, "resolution=8: means nothing for 'digits'; leave it out"),
    ({"dataset_name": "photos", "split": "test"}, "dataset_name='photos' with split='test'", "['train']"),
    ({"dataset_name": "photos", "split": "train["}, "dataset_name='photos' with split='train['"),
    ({"dataset_name": "photos", "dataset_config": "x"}, "dataset_name='photos'", "dataset_config='x'", "['default']"),
    ({"dataset_name": "photos", "image_column": "x"}, "image_column='x': not a column of images", "'image' (Image)"),
    ({"dataset_name": "photos/0.png"}, "dataset_name='photos/0.png': neither a folder nor a .parquet file"),
    ({"dataset_name": "empty"}, "dataset_name='empty': found, but it holds no data files"),
    ({"dataset_name": "json"}, "dataset_name='json' with split='train', dataset_config=None cannot be loaded"),
    ({"dataset_name": "numbers"}, "numbers: no column of images; its columns are 'x' (Value), 'y' (Value)"),
    ({"dataset_name": "script"}, "dataset_name='script'", "scripts are no longer supported"),
    ({"dataset_name": "damaged.parquet"}, "dataset_name='damaged.parquet'", "cannot be loaded: Parquet magic bytes"),
    ({"dataset_name": "table.parquet"}, "no column of images; its columns are 'bytes' (Value), 'text' (Value)"),
    ({"dataset_name": "table.parquet", "image_column": "text"}, "image_column='text': not a column of images"),
    (
        {"dataset_name": "table.parquet", "split": "test"},
        "dataset_name='table.parquet' with split='test'",
        "['train']",
    ),
    ({"dataset_name": "table.parquet", "dataset_config": "x"}, "dataset_config='x': means nothing"),
]
MISSING: list[tuple[Any, ...]] = [
    ({"train_data_dir": "nowhere"}, "train_data_dir='nowhere': no such folder; check the path"),
    ({"train_data_dir": "photos/0.png"}, "train_data_dir='photos/0.png': is a file; pass the folder"),
    ({"train_data_dir": "a\0b"}, "train_data_dir='a\\x00b': no such folder"),
    ({"dataset_name": "nowhere"}, "dataset_name='nowhere': not built in (digits, swiss_roll, moons), no folder"),
    ({"dataset_name": "Digits"}, "dataset_name='Digits': not built in (digits, swiss_roll, moons)"),
    ({"dataset_name": "nobody/nothing"}, "dataset_name='nobody/nothing'", "from the Hub: "),
]


@pytest.mark.parametrize(
    "case",
    cases(
        with_keywords(load_samples, DATA)
        + [case._replace(error=OSError) for case in with_keywords(load_samples, MISSING)]
    ),
)
def test_data(folder, case):
    before = files_in(folder)
    message = refused(case)
    assert "\n" not in message and files_in(folder) == before


BATCHES = [
    *(
        Case(
            f"indices={x}",
            lambda x=x: load_samples("moons").batch(x),
            ("indices: got", "list of one or more integers"),
        )
        for x in (None, 3, "a", [0.5], [True], [[1]], [], [None], [2**70])
    ),
    *(
        Case(
            f"index={x}",
            lambda x=x: load_samples("moons").batch([x]),
            (f"got {x}..{x}; moons has 0..9999",),
            IndexError,
        )
        for x in (-1, 10_000)
    ),
    *(
        Case(
            f"flip={x}",
            lambda x=x: load_samples("digits").batch([0], flip=x),
            ("flip: got", "pass bool of shape (1,)"),
        )
        for x in (3, "a", [1], [True, False], [None])
    ),
    Case("flip-points", lambda: load_samples("moons").batch([0], flip=[True]), ("flip: moons holds points",)),
    *(
        Case(
            f"levels={x}",
            lambda x=x: to_model_range(torch.zeros(2, dtype=torch.uint8), x),
            (f"num_levels={x!r}: must be an integer, 2 or more",),
        )
        for x in (1, 0, "256", 2.5, True)
    ),
    Case("scaled", lambda: to_model_range(torch.zeros(2), 256), ("got torch.float32; pass integer levels 0..255",)),
    Case(
        "batch-size",
        lambda: KeyedBatches(
            load_samples("moons"), seed=0, global_batch_size=10_001, num_timesteps=1, random_flip=False
        ),
        ("moons has 10000 samples, fewer than global_batch_size=10001; lower",),
    ),
    Case("shares", lambda: share_of(10, 2, 0, 0, 2), ("global_batch_size=10", "2 processes", "a multiple of 4")),
]


@pytest.mark.parametrize("case", cases(BATCHES))
def test_batches(case):
    refused(case)


# ---- conversion ----------------------------------------------------------------------------------------------------

BUNDLE = TensorBundle(TF_CHECKPOINT / "model.ckpt-790000")
_AVERAGED = "/ExponentialMovingAverage"
VARIABLES = {name.removesuffix(_AVERAGED): BUNDLE.read(name) for name in BUNDLE.entries if name.endswith(_AVERAGED)}
Q, CONV = "model/mid/attn_1/q/W", "model/conv_in/W"


def changed(name: str, value: Any) -> Callable[[], Any]:
    return lambda: from_tf_variables({**VARIABLES, name: value})


def without(name: str, **renamed: str) -> Callable[[], Any]:
    rest = {key: value for key, value in VARIABLES.items() if key != name}
    return lambda: from_tf_variables({**rest, **{new: VARIABLES[name] for new in renamed.values()}})


VARIABLE_CASES = [
    Case("none", lambda: from_tf_variables({}), ("the variables lack conv_in/W",)),
    Case("other", lambda: from_tf_variables({"x/W": np.zeros(3)}), ("'x/W' is not a variable of the paper's UNet",)),
    Case("missing-first", without(CONV), ("the variables lack conv_in/W",)),
    Case("missing", without(Q), ("missing ['mid_block.attentions.0.to_q.weight']",)),
    Case("renamed", without(Q, new="model/mid/attn_1/Q/W"), ("'mid/attn_1/Q' is not a layer of the paper's UNet",)),
    Case("renamed-end", without(Q, new="model/mid/attn_1/q/V"), ("'model/mid/attn_1/q/V' is not a variable",)),
    Case("misshapen", changed(Q, np.zeros((32, 31))), ("to_q.weight (31, 32) instead of (32, 32)",)),
    Case("misshapen-first", changed(CONV, np.zeros((3, 3, 3, 31))), ("conv_in.weight (31, 3, 3, 3) instead of (32,",)),
    Case("flat-first", changed(CONV, np.zeros(3)), ("misshapen", "four dimensions")),
    Case("scalar", changed(CONV, 1.0), ("misshapen", "four dimensions")),
    Case("text", changed(Q, np.array("abc")), (f"{Q!r} is not finite, or of no numbers at all",)),
    Case("nothing", changed(Q, None), (f"{Q!r} is not finite, or of no numbers at all (object)",)),
    Case("nan", changed(Q, np.full((32, 32), NAN)), (f"{Q!r} is not finite",)),
    Case("inf", changed(Q, np.full((32, 32), INF)), (f"{Q!r} is not finite",)),
    Case("extra", changed("model/mid/block_7/conv1/W", np.zeros((3, 3, 32, 32))), ("unexpected ['mid_block.",)),
    Case(
        "twice", lambda: from_tf_variables({**VARIABLES, f"copy/{CONV}": VARIABLES[CONV]}), ("several of conv_in/W",)
    ),
    *(
        Case(f"size={x!r}", lambda x=x: from_tf_variables(VARIABLES, sample_size=x), (f"sample_size={x!r}",))
        for x in (0, -1, 7, "8", 1.5)
    ),
    Case(
        "missing-checkpoint", lambda: from_tf_checkpoint("nowhere"), ("no TensorFlow checkpoint at nowhere",), OSError
    ),
    Case(
        "learned",
        lambda: pipeline_from_tf_checkpoint(TF_CHECKPOINT, variance_type="learned"),
        ("variance_type='learned' does not fit", "3 channels in and 3 out"),
    ),
    Case(
        "variance",
        lambda: pipeline_from_tf_checkpoint(TF_CHECKPOINT, variance_type="x"),
        ("variance_type='x' is not supported", VARIANCES),
    ),
]


@pytest.mark.parametrize("case", cases(VARIABLE_CASES))
def test_conversion_of_variables(case):
    refused(case)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "nothing"), (b'model_checkpoint_path: "../../x"', "../../x"), (b"\xff\xfe", "nothing")],
)
def test_a_file_that_names_no_checkpoint(place, content, found):
    (place / "checkpoint").write_bytes(content)
    with pytest.raises(ValueError, match="give the prefix itself") as info:
        from_tf_checkpoint(place)
    assert f"{place / 'checkpoint'} names {found!r}" in str(info.value)


STOCK = {
    **{key: value for key, value in TINY.items() if key != "sample_size"},
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}


def stock(**config: Any) -> UNet2DModel:
    return UNet2DModel(**{**STOCK, **config})


def with_nan(network: Any) -> Any:
    with torch.no_grad():
        network.conv_out.bias[0] = NAN
    return network


CANNOT = "which the paper's UNet cannot express; it needs "
STOCK_TABLE = [
    ({"center_input_sample": True}, f"center_input_sample=True, {CANNOT}False"),
    ({"time_embedding_type": "fourier"}, f"time_embedding_type='fourier', {CANNOT}'positional'"),
    ({"freq_shift": 0}, f"freq_shift=0, {CANNOT}1"),
    ({"flip_sin_to_cos": True}, f"flip_sin_to_cos=True, {CANNOT}False"),
    ({"downsample_padding": 1}, f"downsample_padding=1, {CANNOT}0"),
    ({"downsample_type": "resnet"}, f"downsample_type='resnet', {CANNOT}'conv'"),
    ({"upsample_type": "resnet"}, f"upsample_type='resnet', {CANNOT}'conv'"),
    ({"act_fn": "relu"}, f"act_fn='relu', {CANNOT}'silu'"),
    ({"norm_eps": 1e-5}, f"norm_eps=1e-05, {CANNOT}1e-06"),
    ({"attention_head_dim": 4}, f"attention_head_dim=4, {CANNOT}one head"),
    ({"resnet_time_scale_shift": "scale_shift"}, f"resnet_time_scale_shift='scale_shift', {CANNOT}'default'"),
    ({"add_attention": False}, f"add_attention=False, {CANNOT}True"),
    ({"class_embed_type": "timestep"}, f"class_embed_type='timestep', {CANNOT}None"),
    ({"num_class_embeds": 3}, f"num_class_embeds=3, {CANNOT}None"),
    ({"sample_size": None}, f"sample_size=None, {CANNOT}a side or (height, width)"),
    ({"out_channels": 5}, "out_channels=5 must be in_channels=3, or twice that"),
    ({"sample_size": 7}, "sample_size=7", HALVED),
    ({"down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D")}, "ResnetDownsampleBlock2D", CANNOT),
    ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "up_block_types=", "attention on the same levels"),
]


def ours(**scheduler: Any) -> DDPMPaperPipeline:
    return DDPMPaperPipeline(UNET, DDPMPaperScheduler(**scheduler))


STOCK_CASES = [
    *with_keywords(lambda **config: from_stock(stock(**config)), STOCK_TABLE),
    Case("from-linear", lambda: from_stock(torch.nn.Linear(1, 1)), ("unet is a Linear; a UNet2DModel",)),  # type: ignore[arg-type]
    Case("to-mlp", lambda: to_stock(POINTS), ("unet is a DDPMPaperMLP; a DDPMPaperUNet",)),  # type: ignore[arg-type]
    Case("from-nan", lambda: from_stock(with_nan(stock())), ("UNet2DModel are not finite: conv_out.bias",)),
    Case("to-nan", lambda: to_stock(with_nan(tiny())), ("DDPMPaperUNet are not finite: conv_out.bias",)),
    Case("from-ours", lambda: pipeline_from_stock(ours()), ("DDPMPaperUNet", "stock's UNet2DModel")),
    Case("to-learned", lambda: pipeline_to_stock(ours(variance_type="learned")), ("no variance_type", "'learned'")),
    Case(
        "to-mean",
        lambda: pipeline_to_stock(ours(prediction_type="previous_sample")),
        ("no prediction_type", "'previous_sample'"),
    ),
    Case(
        "to-chain", lambda: pipeline_to_stock(ours(inference_timesteps=[0, 5])), ("cannot keep inference_timesteps",)
    ),
    Case(
        "to-points",
        lambda: pipeline_to_stock(DDPMPaperPipeline(POINTS, LAST)),
        ("DDPMPaperMLP", "a DDPMPaperUNet and a DDPMPaperScheduler can be converted"),
    ),
    *(
        Case(
            f"from-{key}={value}",
            lambda key=key, value=value: pipeline_from_stock(DDPMPipeline(stock(), DDPMScheduler(**{key: value}))),  # type: ignore[arg-type]
            (f"{key}='{value}'",),
        )
        for key, value in (
            ("variance_type", "learned"),
            ("variance_type", "fixed_large_log"),
            ("variance_type", "learned_range"),
            ("beta_schedule", "sigmoid"),
        )
    ),
]


@pytest.mark.parametrize("case", cases(STOCK_CASES))
def test_conversion_from_and_to_stock(case):
    refused(case)


# ---- the command ddpm-hf -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Checkpoints for images and for points, and some that lack something."""
    folder = tmp_path_factory.mktemp("checkpoints")
    scheduler = DDPMPaperScheduler(num_train_timesteps=4, beta_end=0.5)
    DDPMPaperPipeline(tiny(in_channels=1, out_channels=1), scheduler).save_pretrained(folder / "im")
    DDPMPaperPipeline(POINTS, scheduler).save_pretrained(folder / "pt")
    (folder / "empty").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "file").write_text("in the way")
    for name in ("no_weights", "no_unet", "cut", "json", "index", "process"):
        shutil.copytree(folder / "im", folder / name)
    weights = "unet/diffusion_pytorch_model.safetensors"
    (folder / "no_weights" / weights).unlink()
    shutil.rmtree(folder / "no_unet" / "unet")
    (folder / "cut" / weights).write_bytes((folder / "im" / weights).read_bytes()[:5000])
    (folder / "json" / "unet" / "config.json").write_text("{")
    (folder / "index" / "model_index.json").write_text("[]")
    (folder / "process" / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "cosine"}))
    return folder


LOADING = [
    ("empty", "model_index.json", "empty"),
    ("no_weights", "no_weights/unet"),
    ("no_unet", "config.json", "no_unet"),
    ("cut", "cut/unet/diffusion_pytorch_model.safetensors"),
    ("json", "json/unet/config.json", "not a valid JSON"),
    ("index", "index/model_index.json"),
    ("process", "beta_schedule='cosine' is not supported", SCHEDULES),
    ("nobody/nothing", "nobody/nothing"),
    ("a/b/c", "there is no folder a/b/c in"),
    ("cut/process", "there is no folder cut/process in"),
    ("ptt", "there is no folder ptt in", "did you mean pt?"),
    ("file", "file is a file; give the folder of a checkpoint"),
]
COMMANDS = [
    *((f"sample {name}", *words) for name, *words in LOADING),
    *((f"sample im --steps {n}", f"num_inference_steps={n} must be an integer in [1, 4]") for n in (0, -1, 5)),
    ("sample im --steps 0 --scheduler ddim", "num_inference_steps=0 must be an integer in [1, 4]"),
    ("sample im --steps 5 --scheduler heun", "num_inference_steps=5 must be an integer in [1, 4]"),
    *((f"sample im --batch_size {n}", f"--batch_size {n} must be at least 1") for n in (0, -1)),
    *((f"sample im -o {name}", f"--output {name}: give a .png, a .npy") for name in ("x.jpg", "im/model_index.json")),
    ("sample im --output=", "--output '': give a .png, a .npy"),
    ("sample im -o file/x.png", "file/x.png cannot be made: file is a file"),
    ("sample im -o file", "file cannot be made: file is a file"),
    ("sample im -o folder.png", "--output folder.png is a folder; give the name of a file"),
    ("sample pt -o folder", "--output folder: give a .png, a .npy"),
    ("convert im im", "im exists; give a new or an empty folder"),
    ("convert im file", "file exists; give a new or an empty folder"),
    ("convert im file/new --to stock", "file/new cannot be made: file is a file"),
    ("convert empty new", "model_index.json", "empty"),
    ("convert im new", "DDPMPaperUNet", "stock's UNet2DModel and DDPMScheduler can be converted"),
    ("convert pt new --to stock", "DDPMPaperMLP", "a DDPMPaperUNet and a DDPMPaperScheduler can be converted"),
    ("convert im new --raw", "--raw, --sample_size and --variance_type are for TensorFlow checkpoints", "im.index"),
    ("convert im new --sample_size 8", "--sample_size", "for TensorFlow checkpoints"),
    ("evaluate im", "dataset is missing"),
    ("evaluate empty --dataset digits", "empty holds no model"),
    ("evaluate im --dataset moons", "samples of shape (1, 8, 8) are needed, moons has (2,)"),
    ("evaluate pt --dataset digits", "samples of shape (2,) are needed, digits has (1, 8, 8)"),
    ("evaluate pt --dataset moons --metrics fid", "fid is for images, and the model draws points (2,)"),
    ("evaluate im --dataset nowhere", "dataset_name='nowhere': not built in"),
    ("evaluate im --dataset empty", "'empty'", "the folder is empty"),
    ("evaluate im --dataset digits --split dev", "split='dev': digits has 'train' and 'test'"),
    ("evaluate im --dataset digits --num_images 0", "num_images=0 must be at least 1"),
    ("evaluate im --dataset digits --steps 0", "num_inference_steps=0 must be at least 1"),
    ("evaluate im --dataset digits --skip_bad_images -1", "skip_bad_images=-1: must be an integer, 0 or more"),
    ("evaluate im --dataset digits --seed -1", "seed=-1 must lie in [0, 2**32)"),
    ("evaluate im --dataset digits --num_timesteps_subset 99", "num_timesteps_subset=99", "4 at most"),
    ("evaluate im --dataset digits --metrics fid --num_samples 1", "num_samples=1: fid needs at least 2"),
    ("evaluate im --dataset digits --metrics is --num_samples 100 --extractor x:y", "extractor 'x:y'", "PYTHONPATH"),
    ("evaluate im --dataset digits --metrics is --num_samples 100 --extractor os:system", "extractor 'os:system'"),
    ("evaluate im --dataset digits --cpu_threads 0", "cpu_threads=0 must be at least 1"),
    ("evaluate im --dataset digits --weights raw", "weights='raw'", "one kind of weights"),
    ("evaluate im --dataset digits -o file", "file is not a list of evaluation results"),
    ("evaluate im --dataset digits -o file/x.json", "file"),
    ("evaluate im --dataset digits --work_dir file", "file"),
    ("shorten im file --dataset digits", "file exists; give a new or an empty folder"),
    ("shorten im im --dataset digits", "im exists; give a new or an empty folder"),
    ("shorten im new --dataset moons", "samples of shape (1, 8, 8) are needed, moons has (2,)"),
    ("shorten im new --dataset digits --steps 0", "num_steps=0 must lie in [1, 4]"),
    ("shorten im new --dataset digits --steps 5", "num_steps=5 must lie in [1, 4]"),
    ("shorten im new --dataset digits --skip_bad_images -1", "skip_bad_images=-1: must be an integer, 0 or more"),
    ("shorten im new --dataset digits --num_images 0", "num_images=0 must be at least 1"),
    *((f"compress im digits -o new --steps {n}", f"--steps {n} must lie in [1, 4]") for n in (0, -3, 5)),
    *((f"compress im digits -o new --fit_images {n}", f"--fit_images {n} must be at least 1") for n in (0, -1)),
    *((f"compress im digits -o new --max_batch {n}", f"--max_batch {n} must lie in [1, 4096]") for n in (0, 5000)),
    ("compress im digits -o new --skip_bad_images -1", "--skip_bad_images -1 must be at least 0"),
    ("compress im digits --dry_run --fit_images 0", "--fit_images 0 must be at least 1"),
    ("compress im digits", "--output is missing: name the file to write", "--dry_run"),
    ("compress im digits -o file", "file exists; give another name, or remove it"),
    ("compress im digits -o folder.png", "--output folder.png is a folder; give the name of a file"),
    ("compress im digits -o file/new", "file/new cannot be made: file is a file"),
    ("compress im nowhere -o new", "there is no image or folder nowhere in ", ", nor a data set of that name: "),
    ("compress im nowhere/x.png -o new", "there is no image or folder nowhere/x.png in ", ", nor a data set"),
    ("compress im /nowhere/x -o new", "there is no image or folder /nowhere/x, nor a data set of that name: "),
    ("compress im file -o new", "1 bad image: file: no readable image", "skip_bad_images=0 allows no more: mend or"),
    ("compress im file -o new --skip_bad_images 1", "none of the images can be read: file: no readable image"),
    ("compress im digits -o new --split dev", "split='dev': digits has 'train' and 'test'"),
    ("compress im moons -o new", "moons holds points; the codec is for images"),
    ("compress pt digits -o new", "the codec is for images, and this is a model of points"),
    ("decompress im nowhere -o new", "there is no file nowhere in "),
    ("decompress im /nowhere/x -o new", "there is no file /nowhere/x; give one that ddpm-hf compress wrote"),
    ("decompress im empty -o new", "empty is a folder; give a file that ddpm-hf compress wrote"),
    ("decompress im file -o new", "this is no file of ddpm-hf compress"),
    ("decompress im file -o file", "file exists; give a new or an empty folder"),
    ("decompress im file -o im", "im exists; give a new or an empty folder"),
    ("decompress im file -o new --micro_batch 0", "--micro_batch 0 must be at least 1"),
    ("draw progressive im -o x.jpg", "--output x.jpg: give a .png or a .gif"),
    ("draw progressive pt", "draw progressive is for images; pt draws points"),
    ("draw points im", "draw points is for points; im draws images"),
    ("draw progressive im --steps 0", "num_inference_steps=0 must be an integer in [1, 4]"),
    ("draw shared im --seeds 1", "seeds=[]"),
    ("draw interpolate im --images 0 5000", "--images [0, 5000]: digits has 0 to 359"),
    ("draw interpolate im --images -1 0", "--images [-1, 0]: digits has 0 to 359"),
    ("draw interpolate im --timestep 99", "--timestep 99 must lie in [0, 4)"),
    ("draw interpolate im --timestep -1", "-1", "[0, 4)"),
    ("draw coarse_to_fine im --seed -1", "seeds must be integers in [0, 2**32), got -1"),
    ("draw nearest im --dataset nowhere", "dataset_name='nowhere': not built in"),
    ("draw rate_distortion im --num_images 0", "--num_images 0 must be at least 1"),
    ("draw nearest im --skip_bad_images -1", "skip_bad_images=-1: must be an integer, 0 or more"),
    ("draw points pt", "--dataset is missing"),
    ("draw points pt --dataset moons --seeds 0-10000", "--seeds: got 10001; moons has 10000 points"),
    ("reproduce table1 --checkpoint nowhere", "nowhere holds no model"),
    ("reproduce table1 --checkpoint json", "json/unet/config.json"),
    ("publish nowhere a/b", "nowhere holds no model"),
    ("publish empty a/b", "empty holds no model"),
    ("publish im x", "the repository is 'x'; give it as user/name"),
    ("publish im ../a", "the repository is '../a'; give it as user/name"),
    ("publish im a/b --revision ../x", "the revision is '../x'; give the name of a branch"),
]
COMMAND_CASES = [Case(line, main, tuple(words)) for line, *words in COMMANDS]


@pytest.mark.parametrize("case", cases(COMMAND_CASES))
def test_commands(checkpoints, case, monkeypatch, capsys, caplog):
    """Exit code 1 and one line, and nothing is written."""
    monkeypatch.chdir(checkpoints)
    before = files_in(checkpoints)
    with pytest.raises(SystemExit) as info, caplog.at_level(logging.ERROR):
        case.action(case.name.split())
    line = info.value.code
    assert isinstance(line, str) and line.startswith("ddpm-hf: ") and "\n" not in line
    assert all(word in line for word in case.words), line
    assert files_in(checkpoints) == before and not capsys.readouterr().out


UNREADABLE = [
    ("", "command"),
    ("sampel im", "invalid choice: 'sampel'", "'sample'"),
    ("sample", "checkpoint"),
    ("sample im --stpes 3", "unrecognized arguments: --stpes 3; did you mean --steps?"),
    ("sample im --seed=3 --outptu x.png", "--outptu", "did you mean --output?"),
    ("draw progressive im --sedes 3", "unrecognized arguments: --sedes 3; did you mean --seeds?"),
    ("sample im more", "unrecognized arguments: more"),
    *((f"sample im --steps={x}", "argument --steps: invalid int value", repr(x)) for x in ("ten", "1.5", "")),
    *((f"sample im --seeds={x}", f"{x!r} is neither a seed nor a range") for x in ("x", "-1", "1-", "5-2", "", "1e3")),
    *((f"sample im --seeds={x}", f"{x!r}: seeds lie in [0, 2**32), at most") for x in ("4294967296", "0-1000000")),
    ("sample im --device=abacus", "argument --device: 'abacus' cannot be used here"),
    ("sample im --device=meta", "argument --device: 'meta' cannot be used here"),
    ("sample im --dtype=int8", "argument --dtype: invalid choice: 'int8'", "float32"),
    ("sample im --scheduler=dimm", "argument --scheduler: invalid choice: 'dimm'", "'ddim'"),
    ("convert im new --to=ours", "invalid choice: 'ours'", "'paper', 'stock'"),
    ("convert im", "output"),
    ("evaluate im --metrics fdi", "invalid choice: 'fdi'", "'fid'"),
    ("evaluate im --weights=both", "invalid choice: 'both'", "'ema', 'raw'"),
    ("shorten im new", "the following arguments are required: --dataset"),
    ("draw progresive im", "invalid choice: 'progresive'", "'progressive'"),
    ("draw interpolate im --images 1", "argument --images: expected 2 arguments"),
    ("decompress im file", "the following arguments are required: -o/--output"),
    ("reproduce table9", "invalid choice: 'table9'", "'table1'"),
    ("publish im", "user/name"),
]


@pytest.mark.parametrize(("line", "expected"), [(line, expected) for line, *expected in UNREADABLE])
def test_unreadable_commands(place, capsys, line, expected):
    with pytest.raises(SystemExit) as info:
        main(line.split())
    assert info.value.code == 2
    printed = capsys.readouterr()
    message = printed.err.partition("error: ")[2]
    assert all(word in message for word in expected) and not printed.out, message
    assert not list(place.iterdir())


# ---- how many ------------------------------------------------------------------------------------------------------

TABLES = (SCHEDULER, SCHEDULER_CALLS, NETWORK, MLP, NETWORK_CALLS, PIPELINE, OPTIONS, UNTRAINABLE, YAML, DATA, MISSING)
TABLES += (BATCHES, VARIABLE_CASES, STOCK_CASES, COMMANDS, UNREADABLE)
NUM_CASES = sum(map(len, TABLES))


def test_there_are_as_many_cases_as_promised():
    assert NUM_CASES >= 300, NUM_CASES
