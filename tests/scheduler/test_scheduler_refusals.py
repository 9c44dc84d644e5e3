"""What DDPMPaperScheduler refuses: the message names the argument and what it was given."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ddpm_hf import DDPMPaperScheduler

PREDICTION_TYPES = {"eps": "epsilon", "xstart": "sample", "xprev": "previous_sample"}
VARIANCE_TYPES = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large", "learned": "learned"}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace' is not supported; choose one of linear, "),
        ({"variance_type": "fixed_small_log"}, "variance_type='fixed_small_log' is not supported; choose one of "),
        ({"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log' is not supported"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range' is not supported"),
        ({"prediction_type": "eps"}, "prediction_type='eps' is not supported; choose one of epsilon, "),
        ({"timestep_spacing": "lead"}, "timestep_spacing='lead' is not supported; choose one of leading, "),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr .*prediction_type='epsilon'.* use v_prediction"),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "previous_sample"},
            "rescale_betas_zero_snr .*prediction_type='previous_sample'",
        ),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be an int >= 1"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps=10.0 must be an int >= 1"),
        ({"steps_offset": -1}, "steps_offset=-1 must be an int >= 0"),
        ({"dynamic_thresholding_ratio": 0}, r"dynamic_thresholding_ratio=0 must be a number in \(0, 1\]"),
        ({"dynamic_thresholding_ratio": 1.5}, r"dynamic_thresholding_ratio=1.5 must be a number in \(0, 1\]"),
        ({"clip_sample_range": 0.0}, "clip_sample_range=0.0 must be a number > 0"),
        ({"sample_max_value": 0.0}, "sample_max_value=0.0 must be a number > 0"),
        ({"beta_start": 0.0}, r"betas must lie inside \(0, 1\), got 0.0 to 0.02"),
        ({"beta_start": -0.1}, r"betas must lie inside \(0, 1\), got -0.1 to 0.02"),
        ({"beta_end": 1.0}, r"betas must lie inside \(0, 1\), got 0.0001 to 1.0"),
        ({"beta_end": float("nan")}, r"betas must lie inside \(0, 1\), got nan"),
        ({"trained_betas": [0.1, 1.0]}, r"betas must lie inside \(0, 1\), got 0.1 to 1.0"),
        ({"trained_betas": [[0.1, 0.2]]}, "trained_betas has shape"),
        ({"trained_betas": []}, "trained_betas has shape"),
        ({"beta_schedule": "const", "beta_end": 0.9}, "betas"),  # ᾱ underflows to 0 long before T
        ({"beta_start": 1e-20}, "betas"),  # 1 − β_1 is 1: q would add no noise
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DDPMPaperScheduler(**config)


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "fixed_large_log", "learned_range", "learned"])
def test_a_stock_configuration_without_a_meaning_here_is_refused(variance_type, tmp_path):
    """Also `learned`: stock takes the square root of the network's output, to us it is a log-variance.

    Told apart by the class's name, which diffusers writes into the file; a configuration in memory does not have it.
    """
    DDPMScheduler(variance_type=variance_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"variance_type='{variance_type}'"):
        DDPMPaperScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("number", [0, -3, 1001, 10.0, "10"])
def test_an_impossible_number_of_steps_is_refused(number):
    with pytest.raises(ValueError, match=rf"num_inference_steps={number!r} must be an integer in \[1, 1000\]"):
        DDPMPaperScheduler().set_timesteps(number)


def test_the_number_of_steps_or_the_timesteps_but_not_both():
    with pytest.raises(ValueError, match="pass one of num_inference_steps and timesteps"):
        DDPMPaperScheduler().set_timesteps(num_inference_steps=3, timesteps=[2, 1, 0])


@pytest.mark.parametrize(
    "timesteps", [[], [0, 1], [5, 5], [1000, 3], [5, -1], [[5, 3]], [5.0, 3.0]], ids=lambda timesteps: str(timesteps)
)
def test_impossible_timesteps_are_refused(timesteps):
    scheduler = DDPMPaperScheduler()
    with pytest.raises(ValueError, match="timesteps.* must "):
        scheduler.set_timesteps(timesteps=timesteps)
    assert len(scheduler.timesteps) == 1000  # and the chain is the one it was


def test_an_offset_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match=r"timesteps must lie in \[0, 1000\), got 1000 to 1"):
        DDPMPaperScheduler(steps_offset=1).set_timesteps(1000)


@pytest.mark.parametrize("t", [2.7, float("nan"), torch.tensor([3, 3])])
def test_a_timestep_that_is_not_one_integer_is_refused(t):
    with pytest.raises(ValueError, match="timestep"):
        DDPMPaperScheduler().step(torch.zeros(2, 2), t, torch.zeros(2, 2))


@pytest.mark.parametrize("t", [-1, 1000, torch.tensor(1000)])
def test_a_step_outside_the_table_is_refused(t):
    with pytest.raises(ValueError, match=f"timestep={int(t)} is not one of the current 1000 timesteps"):
        DDPMPaperScheduler().step(torch.zeros(1, 2), t, torch.zeros(1, 2))


@pytest.mark.parametrize("t", [torch.tensor([-1, 0]), torch.tensor([0, 1000]), torch.tensor([0, 1, 2])])
def test_noising_at_impossible_times_is_refused(t):
    for name in ("add_noise", "get_velocity"):
        with pytest.raises(ValueError, match=r"t=\[.*\] leaves \[0, 1000\)|t has shape \(3,\)"):
            getattr(DDPMPaperScheduler(), name)(torch.zeros(2, 3), torch.zeros(2, 3), t)


def test_shapes_that_would_broadcast_are_refused():
    scheduler, x, row = DDPMPaperScheduler(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 1)
    for call in (
        lambda: scheduler.step(row, 5, x),
        lambda: scheduler.step(x, 5, row),
        lambda: scheduler.step(x, 5, x, variance_noise=row),
        lambda: scheduler.add_noise(x, row, torch.tensor([5, 5])),
        lambda: scheduler.get_velocity(row, x, torch.tensor([5, 5])),
    ):
        with pytest.raises(ValueError, match=r"shapes differ: .*\(2, 3, 4, 1\)"):
            call()


def test_learned_variance_with_other_channels_is_refused():
    scheduler, x = DDPMPaperScheduler(variance_type="learned"), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="learned variance needs 6 channels, got 3"):
        scheduler.step(x, 5, x)


def test_epsilon_where_nothing_is_left_of_x_start_is_refused():
    scheduler, x = DDPMPaperScheduler(beta_schedule="jsd"), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="ᾱ is 0 at timestep 999.*use v_prediction or sample"):
        scheduler.step(x, 999, x)
    assert scheduler.step(x, 998, x).prev_sample.isfinite().all()
