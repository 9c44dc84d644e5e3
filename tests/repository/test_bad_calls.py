"""Schedulers, networks and pipelines refuse bad configurations and calls, each with a clear error."""

# pyright: reportArgumentType=false
# (wrong arguments are what this file is about)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_input import (
    HALVED,
    INF,
    NAN,
    POINTS,
    PREDICTIONS,
    SCHEDULES,
    VARIANCES,
    Case,
    cases,
    refused,
    tiny,
    with_keywords,
)

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.scheduler.scheduling_ddpm_paper import GaussianDiffusion

pytestmark = pytest.mark.usefixtures("place")


# ---- scheduler: configuration --------------------------------------------------------------------------------------

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
        for x in ("cosine", "Linear", "", None, 3, ["linear"], "Sigmoid", "laplace")
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
        ({"dynamic_thresholding_ratio": x}, f"dynamic_thresholding_ratio={x!r} must be a number in (0, 1]")
        for x in (0, -1, 1.1, NAN)
    ),
    *(
        ({name: x}, f"{name}={x!r} must be a number > 0")
        for name in ("clip_sample_range", "sample_max_value")
        for x in (0, NAN)
    ),
    ({"clip_sample_range": "1"}, "clip_sample_range='1' must be a number"),
    *(({"inference_timesteps": x}, f"inference_{ASCENDING}{x}") for x in ([], "abc", 3, [[1, 2]], {})),
    *(({"inference_timesteps": x}, f"{ASCENDING}{x}") for x in ([1, 1], [5, 3], [0.5], [NAN], ["1"], [True, False])),
    ({"inference_timesteps": [-1, 4]}, "timesteps must lie in [0, 1000), got -1 to 4"),
    ({"inference_timesteps": [0, 1000]}, "timesteps must lie in [0, 1000), got 0 to 1000"),
    ({"variance_type": "learned", "inference_timesteps": [1, 5]}, "variance_type='learned'", "2 of 1000"),
    ({"x_start_mse": [1.0] * 1000}, "x_start_mse", "variance_type='fitted'"),
    *(
        ({"variance_type": "fitted", "x_start_mse": x}, "x_start_mse must hold 1000 positive numbers")
        for x in ([1.0] * 999, [-1.0] * 1000, [NAN] * 1000, [INF] * 1000)
    ),
    *(({"variance_type": "fitted", "x_start_mse": x}, "x_start_mse") for x in ("a", 1.0)),
]


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
TEN_BETAS = DIFFUSION.betas
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
    Case("timesteps-10^30", lambda: ten().set_timesteps(timesteps=[10**30]), ("timesteps must be", str(10**30))),
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
    Case("x_start-type", lambda: GaussianDiffusion(TEN_BETAS, "eps"), ("'eps'", PREDICTIONS)),
    Case(
        "reverse-variance",
        lambda: GaussianDiffusion(TEN_BETAS, "epsilon", "small"),
        ("variance_type='small'", VARIANCES),
    ),
    Case(
        "reverse-fitted",
        lambda: GaussianDiffusion(TEN_BETAS, "epsilon", "fitted"),
        ("variance_type='fitted' needs x_start_mse",),
    ),
    *(
        Case(f"betas={name}", lambda b=betas: GaussianDiffusion(b), (words,))
        for name, betas, words in (
            ("none", [], "betas has shape (0,); it must be a non-empty list"),
            ("matrix", [[0.1]], "betas has shape (1, 1)"),
            ("0", [0.0], "got 0.0 to 0.0"),
            ("1-in-the-middle", [0.1, 1.0, 0.1], "only the last may be 1"),
            ("nan", [NAN], "got nan to nan"),
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


def short_chain() -> DDPMPaperScheduler:
    scheduler = ten()
    scheduler.set_timesteps(2)
    return scheduler


@pytest.mark.parametrize("case", cases(SCHEDULER_CALLS))
def test_scheduler_calls(case):
    refused(case)


# ---- networks ------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("case", cases(with_keywords(tiny, NETWORK)))
def test_unet_configuration(case):
    refused(case)


MLP = [
    *(({"out_channels": x}, f"out_channels={x} must be in_channels=2, or twice that") for x in (0, 3, 1, None)),
    *(({"hidden_size": x}, f"hidden_size={x} must be even and at least 4") for x in (0, -4, 2, 7, NAN)),
    *(({"hidden_size": x}, "hidden_size") for x in (16.0, "16", None)),
    *(({"num_layers": x}, f"num_layers={x}") for x in (0, -1)),
    *(({"num_layers": x}, "num_layers") for x in (1.5, "3", None)),
    *(({"in_channels": x, "out_channels": x}, "in_channels") for x in (0, -1, None)),
]


@pytest.mark.parametrize("case", cases(with_keywords(DDPMPaperMLP, MLP)))
def test_mlp_configuration(case):
    refused(case)


UNET = tiny()
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
    ({"latents": X[..., :1]}, "height and width (8, 1) must be divisible by 2"),
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


@pytest.mark.parametrize("case", cases(with_keywords(drawn, PIPELINE)))
def test_pipeline_calls(case):
    refused(case)
