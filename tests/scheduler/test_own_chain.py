"""A chain of the scheduler's own: its timesteps and fitted variances, saved with its configuration."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.convert import pipeline_to_stock

PREDICTION_TYPES = {"eps": "epsilon", "xstart": "sample", "xprev": "previous_sample"}
VARIANCE_TYPES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


OWN: dict[str, Any] = {"inference_timesteps": [0, 7, 50, 400, 999]}
FITTED: dict[str, Any] = {**OWN, "variance_type": "fitted", "x_start_mse": [1e-4, 1e-3, 0.01, 0.1, 0.5]}


@pytest.mark.parametrize("config", [OWN, FITTED], ids=["own", "fitted"])
def test_the_own_chain_is_the_default(config):
    """With neither argument, with its own number of steps, and from the start; `diffusion` stays the training one."""
    scheduler = DDPMPaperScheduler(**config)
    assert scheduler.timesteps.tolist() == [999, 400, 50, 7, 0]
    assert scheduler.diffusion.num_timesteps == len(scheduler) == 1000
    for chain in (scheduler.chain(), scheduler.chain(5), scheduler.chain(timesteps=[999, 400, 50, 7, 0])):
        assert chain.timesteps.tolist() == OWN["inference_timesteps"]
        np.testing.assert_allclose(
            chain.alphas_cumprod, scheduler.diffusion.alphas_cumprod[chain.timesteps], rtol=1e-11
        )
    scheduler.set_timesteps(timesteps=[50, 7])
    assert scheduler.timesteps.tolist() == [50, 7]
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == [999, 400, 50, 7, 0]
    assert [int(scheduler.previous_timestep(t)) for t in (999, 400, 7, 0)] == [400, 50, 0, -1]


def test_without_one_it_is_all_training_timesteps():
    scheduler = DDPMPaperScheduler()
    assert scheduler.chain() is scheduler.diffusion
    scheduler.set_timesteps(10)
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))


def test_other_numbers_of_steps_are_spaced_as_ever():
    """Where no variance has to be fitted: the own chain is but a default."""
    scheduler = DDPMPaperScheduler(**OWN)
    for number in (1, 4, 50, 1000):
        np.testing.assert_array_equal(scheduler.chain(number).timesteps, DDPMPaperScheduler().chain(number).timesteps)
    assert scheduler.chain(timesteps=[800, 2]).timesteps.tolist() == [2, 800]


def test_a_step_of_the_own_chain_is_that_of_the_same_timesteps_given():
    own, given = DDPMPaperScheduler(**OWN), DDPMPaperScheduler()
    given.set_timesteps(timesteps=[999, 400, 50, 7, 0])
    x, eps, z = (normal(seed, 2, 3, 4, 4) for seed in (0, 1, 2))
    for t in (999, 400, 7, 0):
        first, second = (s.step(eps, t, x, variance_noise=z).prev_sample for s in (own, given))
        assert torch.equal(first, second)
    with pytest.raises(ValueError, match="timestep=998 is not one of the current 5 timesteps"):
        own.step(eps, 998, x)


def test_a_fitted_step_adds_noise_of_the_fitted_variance():
    """σ_t² = β̃_t + c_t² mse_t of the chain of five, in float64; for a part of the chain those of the part."""
    scheduler, mse = (
        DDPMPaperScheduler(**FITTED),
        dict(zip(OWN["inference_timesteps"], FITTED["x_start_mse"], strict=True)),
    )
    x, eps, z = (normal(seed, 2, 3, dtype=torch.float64) for seed in (0, 1, 2))
    for timesteps in ([999, 400, 50, 7, 0], [999, 50, 7]):
        scheduler.set_timesteps(timesteps=timesteps)
        for t, previous in zip(timesteps, timesteps[1:], strict=False):
            now, before = scheduler.diffusion.alphas_cumprod[[t, previous]]
            beta = 1 - now / before
            weight, posterior = beta * math.sqrt(before) / (1 - now), beta * (1 - before) / (1 - now)
            noisy, plain = (scheduler.step(eps, t, x, variance_noise=noise).prev_sample for noise in (z, 0 * z))
            torch.testing.assert_close(noisy - plain, math.sqrt(posterior + weight**2 * mse[t]) * z, rtol=1e-9, atol=0)
            variance = scheduler._get_variance(t).item()
            assert variance == pytest.approx(posterior + weight**2 * mse[t], rel=1e-6)


def test_only_configurations_that_need_them_have_the_two_keys(tmp_path):
    """Other schedulers warn of keys they do not know."""
    for config, keys in (
        ({}, set()),
        (OWN, {"inference_timesteps"}),
        (FITTED, {"inference_timesteps", "x_start_mse"}),
    ):
        scheduler = DDPMPaperScheduler(**config)
        scheduler.save_pretrained(tmp_path)
        for saved in (scheduler.config, json.loads((tmp_path / "scheduler_config.json").read_text())):
            assert saved.keys() & {"inference_timesteps", "x_start_mse"} == keys
        loaded = DDPMPaperScheduler.from_pretrained(tmp_path)
        assert loaded.timesteps.tolist() == scheduler.timesteps.tolist()
        again = DDPMPaperScheduler.from_config(loaded.config)
        assert {key: again.config.get(key) for key in keys} == {key: config[key] for key in keys}


@pytest.mark.parametrize(
    "arguments", [{"num_inference_steps": 4}, {"timesteps": [998, 400]}, {"num_inference_steps": 1000}], ids=str
)
def test_timesteps_without_a_fitted_variance_are_refused(arguments):
    scheduler = DDPMPaperScheduler(**FITTED)
    with pytest.raises(ValueError, match=r"timesteps \[.*\] have no fitted variance; .* \[0, 7, 50, 400, 999\]"):
        scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == [999, 400, 50, 7, 0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"variance_type": "fitted"}, "variance_type='fitted' needs x_start_mse"),
        (
            {**FITTED, "variance_type": "fixed_small"},
            "variance_type='fitted' needs x_start_mse, and no other variance",
        ),
        ({**FITTED, "x_start_mse": [0.1] * 4}, "x_start_mse must hold 5 positive numbers"),
        ({"variance_type": "fitted", "x_start_mse": [0.1] * 5}, "x_start_mse must hold 1000 positive numbers"),
        ({**FITTED, "x_start_mse": [0.1, 0.1, 0.0, 0.1, 0.1]}, "x_start_mse must hold 5 positive numbers"),
        ({"inference_timesteps": []}, "inference_timesteps must be a non-empty, strictly ascending list"),
        ({"inference_timesteps": [5, 3]}, "timesteps must be .*strictly ascending"),
        ({"inference_timesteps": [0.0, 3.0]}, "timesteps must be .*integers"),
        ({"inference_timesteps": [0, 1000]}, r"timesteps must lie in \[0, 1000\), got 0 to 1000"),
    ],
    ids=str,
)
def test_an_impossible_own_chain_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DDPMPaperScheduler(**config)


@pytest.mark.parametrize("config", [OWN, FITTED], ids=["own", "fitted"])
def test_stock_has_no_word_for_an_own_chain(config, tiny_unet):
    """Stock's DDPMScheduler would ignore both: other timesteps and, for `fitted`, the variance fixed_small."""
    with pytest.raises(ValueError, match="fitted|inference_timesteps"):
        pipeline_to_stock(DDPMPaperPipeline(tiny_unet(), DDPMPaperScheduler(**config)))


def test_skipped_steps_are_refused_where_the_network_predicts_the_next():
    """μ̃ of one training step is not the mean of a longer one, which `previous_sample` would be taken for."""
    with pytest.raises(ValueError, match="previous_sample"):
        DDPMPaperScheduler(prediction_type="previous_sample").set_timesteps(10)


def test_a_configuration_that_is_read_back_is_the_one_that_was_written(tmp_path):
    """Nor does a way through another scheduler change it, by so much as what diffusers notes about defaults."""
    written = DDPMPaperScheduler(beta_start=0.0002)
    written.save_config(tmp_path)
    read = DDPMPaperScheduler.from_pretrained(tmp_path)
    assert read.config == {key: value for key, value in written.config.items() if key != "_use_default_values"}
    through: Any = DDPMPaperScheduler.from_config(DDIMScheduler.from_config(written.config).config)
    assert {key: value for key, value in through.config.items() if key in written.config} == dict(written.config)
