"""Random configurations: what is accepted works, and what is not is refused with a documented error.

The examples are the same in every run (`derandomize`): a fifth of NUM_EXAMPLES of them for each property, and all of
them with `pytest tests/repository/test_fuzz.py --hypothesis-profile many`.
"""

import argparse
import contextlib
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from ddpm_hf import DDPMPaperMLP, DDPMPaperScheduler, DDPMPaperUNet
from ddpm_hf.runs import build_scheduler, parse_options, to_yaml
from ddpm_hf.scheduler.scheduling_ddpm_paper import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    VARIANCE_TYPES,
    GaussianDiffusion,
)
from training import train as train_py

NUM_EXAMPLES = {"scheduler": 400, "wrong_types": 300, "timesteps": 300, "unet": 150, "mlp": 150, "options": 300}


def examples(name: str) -> settings:
    share = settings.default.max_examples / settings.get_profile("many").max_examples  # of the profile that is loaded
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=round(share * NUM_EXAMPLES[name]),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


# ---- the process ---------------------------------------------------------------------------------------------------

SMALL_NUMBERS = st.floats(1e-6, 0.999) | st.sampled_from([0.0, 1.0, 1e-300, 1e-17, 0.5, 1 - 1e-16])
NUMBERS = SMALL_NUMBERS | st.floats() | st.integers(-3, 3)
FLAGS = st.booleans()
PROCESS: dict[str, st.SearchStrategy] = {
    "num_train_timesteps": st.integers(-1, 60) | st.sampled_from([1, 2, 3, 1000]),
    "beta_start": NUMBERS,
    "beta_end": NUMBERS,
    "beta_schedule": st.sampled_from(BETA_SCHEDULES),
    "trained_betas": st.none() | st.lists(NUMBERS, max_size=6),
    "variance_type": st.sampled_from(VARIANCE_TYPES),
    "prediction_type": st.sampled_from(PREDICTION_TYPES),
    "timestep_spacing": st.sampled_from(TIMESTEP_SPACINGS),
    "steps_offset": st.integers(-1, 3),
    "clip_sample": FLAGS,
    "clip_sample_range": NUMBERS,
    "thresholding": FLAGS,
    "dynamic_thresholding_ratio": NUMBERS,
    "sample_max_value": NUMBERS,
    "rescale_betas_zero_snr": FLAGS,
    "inference_timesteps": st.none() | st.lists(st.integers(-1, 6), max_size=4),
    "x_start_mse": st.none() | st.lists(NUMBERS, max_size=4),
}
GARBAGE = (
    st.none()
    | st.text(max_size=3)
    | st.booleans()
    | st.lists(st.none() | st.text(max_size=2) | st.integers(-5, 50), max_size=2)
    | st.dictionaries(st.text(max_size=2), st.integers(-5, 50), max_size=1)
    | st.floats()
    | st.integers(-5, 50)
)


def some_of(strategies: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    return st.fixed_dictionaries({}, optional=strategies)


def wrong(strategies: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """A configuration of which one value is of any type."""
    return st.tuples(some_of(strategies), st.sampled_from(sorted(strategies)), GARBAGE).map(
        lambda drawn: {**drawn[0], drawn[1]: drawn[2]}
    )


# 0 alone would do, were smaller ones refused: see test_alphas_too_small_to_invert_are_refused
LEAST_INVERTIBLE = np.finfo(np.float64).tiny


def check_tables(diffusion: GaussianDiffusion) -> None:
    """ᾱ in (0, 1) and falling, where it may end at 0; β̃ ≥ 0; every table finite but the two that divide by ᾱ_T = 0."""
    alphas = diffusion.alphas_cumprod
    assert np.all(alphas < 1) and np.all(alphas[:-1] > 0) and alphas[-1] >= 0
    assert np.all(np.diff(alphas) <= 0)
    assert np.all(diffusion.posterior_variance >= 0) and diffusion.posterior_variance[0] == 0
    for name, value in vars(diffusion).items():
        if isinstance(value, np.ndarray):
            ends_at_zero = alphas[-1] < LEAST_INVERTIBLE and name.startswith(("sqrt_recip_", "sqrt_recipm1_"))
            assert np.isfinite(value[:-1] if ends_at_zero else value).all(), name


def accepted(config: dict[str, Any]) -> DDPMPaperScheduler | None:
    try:
        return DDPMPaperScheduler(**config)
    except ValueError:
        return None


def check_scheduler(scheduler: DDPMPaperScheduler) -> None:
    for diffusion in (scheduler.diffusion, scheduler.chain()):
        check_tables(diffusion)
    assert len(scheduler) == scheduler.diffusion.num_timesteps
    timesteps = scheduler.timesteps.tolist()
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert 0 <= timesteps[-1] and timesteps[0] < len(scheduler)


@examples("scheduler")
@given(some_of(PROCESS))
def test_an_accepted_process_has_finite_tables(config):
    with np.errstate(all="ignore"):
        scheduler = accepted(config)
    if scheduler is not None:
        check_scheduler(scheduler)
        again: Any = DDPMPaperScheduler.from_config(scheduler.config)
        np.testing.assert_array_equal(again.diffusion.betas, scheduler.diffusion.betas)


def test_alphas_too_small_to_invert_are_refused():
    """Found by the examples above."""
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="too small or too many"):
        DDPMPaperScheduler(beta_start=0.875)


@examples("wrong_types")
@given(wrong(PROCESS))
def test_a_process_with_a_value_of_any_type(config):
    with np.errstate(all="ignore"):
        scheduler = accepted(config)
    if scheduler is not None:
        check_scheduler(scheduler)


@examples("wrong_types")
@given(wrong({name: value for name, value in PROCESS.items() if name not in ("trained_betas", "x_start_mse")}))
def test_a_process_with_any_value_but_for_betas_of_its_own(config):
    with np.errstate(all="ignore"):
        scheduler = accepted(config)
    if scheduler is not None:
        check_scheduler(scheduler)


STEPS = st.integers(-2, 25) | st.none() | st.floats() | st.booleans()
LISTS = st.none() | st.lists(st.integers(-2, 22) | st.floats(0, 20) | st.booleans(), max_size=5)
DESCENDING = st.sets(st.integers(0, 19), min_size=1).map(lambda chosen: sorted(chosen, reverse=True))
TIMESTEPS = LISTS | DESCENDING


@examples("timesteps")
@given(STEPS, TIMESTEPS, some_of({name: PROCESS[name] for name in ("timestep_spacing", "variance_type")}))
def test_timesteps_descend_within_range_or_are_refused(num_steps, timesteps, config):
    scheduler = accepted({"num_train_timesteps": 20, "beta_end": 0.5, **config})
    if scheduler is None:
        return
    before = scheduler.timesteps.tolist()
    try:
        scheduler.set_timesteps(num_steps, timesteps=timesteps)
    except ValueError:
        assert scheduler.timesteps.tolist() == before  # a refusal leaves everything as it was
        return
    check_scheduler(scheduler)
    check_tables(scheduler._chain)
    if timesteps is not None:
        assert scheduler.timesteps.tolist() == timesteps
    elif num_steps is not None:
        assert len(scheduler.timesteps) == num_steps
    x: Any = torch.zeros(1, 1, 2, 2)
    for t in scheduler.timesteps.tolist():
        output = torch.zeros(1, 2 if config.get("variance_type") == "learned" else 1, 2, 2)
        x, _ = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0), return_dict=False)
    assert torch.isfinite(x).all()


# ---- networks ------------------------------------------------------------------------------------------------------

SIDES = st.sampled_from([0, 1, 2, 4, 6, 8])
UNET: dict[str, st.SearchStrategy] = {
    "sample_size": SIDES | st.tuples(SIDES, SIDES),
    "in_channels": st.integers(-1, 3),
    "out_channels": st.integers(-1, 6),
    "block_out_channels": st.lists(st.sampled_from([2, 3, 4, 6, 8]), min_size=1, max_size=3).map(tuple),
    "layers_per_block": st.integers(-1, 2),
    "attention_resolutions": st.lists(st.integers(0, 8), max_size=2).map(tuple),
    "dropout": NUMBERS,
    "norm_num_groups": st.integers(1, 4),
}
MLP: dict[str, st.SearchStrategy] = {
    "in_channels": st.integers(1, 3),
    "out_channels": st.integers(-1, 6),
    "hidden_size": st.integers(-2, 12),
    "num_layers": st.integers(-1, 3),
}


@examples("unet")
@given(st.fixed_dictionaries(UNET))
def test_an_accepted_unet_computes(config):
    try:
        unet = DDPMPaperUNet(**config).eval()
    except ValueError:
        return
    size = config["sample_size"]
    sides = (size, size) if isinstance(size, int) else size
    with torch.no_grad():
        output = unet(torch.ones(2, config["in_channels"], *sides), 3).sample
    assert output.shape == (2, config["out_channels"], *sides) and torch.isfinite(output).all()


@examples("mlp")
@given(st.fixed_dictionaries(MLP))
def test_an_accepted_mlp_computes(config):
    try:
        mlp = DDPMPaperMLP(**config).eval()
    except ValueError:
        return
    with torch.no_grad():
        output = mlp(torch.ones(2, config["in_channels"]), torch.tensor([0, 5])).sample
    assert output.shape == (2, config["out_channels"]) and torch.isfinite(output).all()


@examples("unet")
@given(wrong(UNET))
def test_a_unet_with_a_value_of_any_type(config):
    small = {"sample_size": 4, "block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2}
    with contextlib.suppress(ValueError):
        DDPMPaperUNet(**{**small, **config})


# ---- options -------------------------------------------------------------------------------------------------------

NAMES = [name for name in train_py.TrainingOptions.__dataclass_fields__ if name != "output_dir"]
SCALARS = (
    st.integers(-2, 2000)
    | st.floats(0, 1)
    | st.floats()
    | st.booleans()
    | st.none()
    | st.text("abcxyz01-. ~#:&*!", max_size=6)
    | st.sampled_from(["digits", "learned", "vlb", "simple", "epsilon", "linear", "bf16", "none", "1e-3", "user/name"])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
KNOWN = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)
UNKNOWN = st.dictionaries(st.text("abcdeglnr_", max_size=12) | st.sampled_from(NAMES), VALUES, max_size=3)
# values that are of the right kind more often than not
PLAUSIBLE = some_of(
    {
        **{
            name: st.integers(0, 300)
            for name in ("seed", "num_steps", "global_batch_size", "warmup_steps", "log_every")
        },
        **{name: st.floats(0, 1) for name in ("learning_rate", "ema_decay", "dropout", "beta_end", "beta_start")},
        **{name: st.booleans() for name in ("random_flip", "allow_tf32", "compile", "dry_run")},
        "block_out_channels": st.lists(st.integers(0, 64), max_size=4),
        "num_train_timesteps": st.integers(0, 200),
        "sample_steps": st.none() | st.integers(0, 200),
        "objective": st.sampled_from(["simple", "vlb"]),
        "variance_type": st.sampled_from(["fixed_small", "fixed_large", "learned"]),
        "prediction_type": st.sampled_from(PREDICTION_TYPES),
        "beta_schedule": st.sampled_from(BETA_SCHEDULES),
        "background": st.text(max_size=8),
        "train_data_dir": st.none() | st.text(max_size=8),
    }
)


def read(path: Any, content: str) -> Any:
    """The options of a file; None where they are refused with exit code 2 and a reason."""
    path.write_text(content, encoding="utf-8")
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return parse_options(train_py.TrainingOptions, ["--config", str(path)])
    except SystemExit as ended:
        assert ended.code == 2 and "error: " in errors.getvalue()
        return None
    except argparse.ArgumentError as error:  # only the parser's own exit is documented
        raise AssertionError(error) from error


@pytest.mark.slow
@examples("options")
@given(KNOWN | UNKNOWN | PLAUSIBLE)
def test_random_configuration_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    options = read(path, yaml.safe_dump({"dataset_name": "digits", **content}, allow_unicode=True))
    if options is None:
        return
    assert isinstance(options, train_py.TrainingOptions)
    assert options.num_steps >= 1 and 0 <= options.ema_decay < 1 and 0 < options.learning_rate < math.inf
    check_tables(build_scheduler(options, clip_sample=True).diffusion)
    assert read(path, to_yaml(options)) == options


@examples("options")
@given(st.text("abcseed_num:[]{}-&*!|>'\"%@`#, \n\t01", max_size=40))
def test_random_text_as_a_configuration_file(tmp_path_factory, text):
    options = read(tmp_path_factory.getbasetemp() / "text.yaml", text)
    assert options is None or isinstance(options, train_py.TrainingOptions)
