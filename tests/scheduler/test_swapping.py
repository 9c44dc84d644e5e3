"""A scheduler of diffusers in place of ours, and ours in place of it: the process stays the same."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from torch import Tensor

from ddpm_hf import DDPMPaperScheduler

PREDICTION_TYPES = {"eps": "epsilon", "xstart": "sample", "xprev": "previous_sample"}
VARIANCE_TYPES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# DPMSolverSDEScheduler alone needs a package that diffusers does not install.
KARRAS_SCHEDULERS = [e.name for e in KarrasDiffusionSchedulers if e.name != "DPMSolverSDEScheduler"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers hands tensors to numpy functions
@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {}) for name in KARRAS_SCHEDULERS),
        # KDPM2 builds its timesteps one by one, for seconds; its betas come from the same lines as the others'
        *(
            (name, {"beta_schedule": key})
            for key in ("quad", "warmup10")
            for name in KARRAS_SCHEDULERS
            if "KDPM2" not in name
        ),
    ],
    ids=str,
)
def test_every_karras_scheduler_takes_over_our_process(name, config):
    ours = DDPMPaperScheduler(**config)
    other = getattr(diffusers, name).from_config(ours.config)
    assert other.config.prediction_type == "epsilon"
    if name != "EDMEulerScheduler":  # has σ in place of β
        torch.testing.assert_close(other.betas, ours.betas, rtol=1e-5, atol=0)  # they run linspace in float32
        assert other.config.num_train_timesteps == 1000


def test_what_is_not_a_default_survives_the_swap():
    ours = DDPMPaperScheduler(prediction_type="v_prediction", clip_sample=False, clip_sample_range=2.0)
    ddim = DDIMScheduler.from_config(ours.config)
    assert ddim.config.prediction_type == "v_prediction"
    assert ddim.config.clip_sample is False
    assert ddim.config.clip_sample_range == 2.0


@pytest.mark.parametrize("other", [DDIMScheduler, DPMSolverMultistepScheduler, DDPMScheduler])
@pytest.mark.parametrize(
    "config", [{}, {"variance_type": "fixed_large", "beta_end": 0.01}, {"beta_schedule": "jsd"}], ids=str
)
def test_there_and_back_again_is_the_same_scheduler(other, config):
    ours = DDPMPaperScheduler(**config)
    back = DDPMPaperScheduler.from_config(other.from_config(ours.config).config)
    np.testing.assert_array_equal(back.diffusion.betas, ours.diffusion.betas)
    for key in ("variance_type", "prediction_type", "clip_sample", "num_train_timesteps"):
        assert back.config[key] == ours.config[key], key


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_schedulers_defaults_are_kept_where_training_depends_on_them():
    """Its configuration in memory has a list of them, which diffusers drops: Heun's are β from 0.00085 to 0.012."""
    ours = DDPMPaperScheduler.from_config(HeunDiscreteScheduler().config)
    assert ours.diffusion.betas[[0, -1]].tolist() == pytest.approx([0.00085, 0.012], rel=1e-12)
    assert ours.config.timestep_spacing == "linspace"


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_a_stock_ddpm_scheduler_keeps_its_variance_here(variance_type):
    stock = DDPMScheduler(variance_type=variance_type)
    assert DDPMPaperScheduler.from_config(stock.config).config.variance_type == variance_type


def test_a_saved_stock_scheduler_loads_here(tmp_path):
    DDPMScheduler(beta_schedule="squaredcos_cap_v2", thresholding=True).save_pretrained(tmp_path)
    loaded = DDPMPaperScheduler.from_pretrained(tmp_path)
    assert (loaded.config.variance_type, loaded.config.beta_schedule) == ("fixed_small", "squaredcos_cap_v2")
    assert loaded.config.thresholding is True


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "jsd", "num_train_timesteps": 100},
        {"trained_betas": (np.linspace(1, 2, 7) / 3 - 0.1).tolist(), "num_train_timesteps": 7},
        {"trained_betas": np.linspace(1, 2, 7) / 3 - 0.1, "num_train_timesteps": 7},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample", "beta_schedule": "quad"},
        {"variance_type": "learned", "timestep_spacing": "trailing", "steps_offset": 1},
    ],
    ids=["default", "jsd", "trained_betas list", "trained_betas array", "zero snr", "learned"],
)
def test_saving_and_loading_is_exact(tmp_path, config):
    ours = DDPMPaperScheduler(**config)
    ours.save_pretrained(tmp_path)
    loaded = DDPMPaperScheduler.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.diffusion.betas, ours.diffusion.betas)
    public = {key: value for key, value in ours.config.items() if not key.startswith("_")}
    assert {key: loaded.config[key] for key in public} == public
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "DDPMPaperScheduler"


def public(config) -> dict:
    """What decides; diffusers notes beside it which of the values were defaults, and its version."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*KARRAS_SCHEDULERS, "DPMSolverSDEScheduler", "DDPMPaperScheduler"])
@pytest.mark.parametrize("config", [{}, {"timestep_spacing": "trailing"}, {"beta_schedule": "quad"}], ids=str)
def test_built_in_memory_or_from_a_file_it_is_the_same(name, config, tmp_path):
    """Also what was left at its default, how timesteps are spaced too: a file has all of it."""
    scheduler_class = getattr(diffusers, name, DDPMPaperScheduler)
    ours = DDPMPaperScheduler(20, **config)
    ours.save_pretrained(tmp_path)
    in_memory = scheduler_class.from_config(ours.config)
    from_file = scheduler_class.from_config(DDPMPaperScheduler.from_pretrained(tmp_path).config)
    assert public(in_memory.config) == public(from_file.config)
    for scheduler in (in_memory, from_file):
        scheduler.set_timesteps(5)
    assert torch.equal(in_memory.timesteps, from_file.timesteps)
    if "timestep_spacing" in config:
        assert in_memory.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("name", [n for n in KARRAS_SCHEDULERS if n != "EDMEulerScheduler"])
def test_ours_is_the_same_from_their_memory_or_file(name, tmp_path):
    other = getattr(diffusers, name)(num_train_timesteps=20)
    other.save_pretrained(tmp_path)
    in_memory = DDPMPaperScheduler.from_config(other.config)
    from_file = DDPMPaperScheduler.from_pretrained(tmp_path)
    assert public(in_memory.config) == public(from_file.config)
