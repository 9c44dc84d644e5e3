"""Schedulers in our pipeline: of the network's process on any grid, or refused by name; a late start is named; η."""

import logging

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, pipeline_ddpm_paper
from ddpm_hf.scheduler.scheduling_ddpm_paper import BETA_SCHEDULES, make_betas

OURS = DDPMPaperScheduler(100, 1e-3, 0.2)
GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def pipe_with(network, scheduler) -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def built(name: str, of: DDPMPaperScheduler = OURS, **config):
    return getattr(diffusers, name).from_config(of.config, **config)


class Shifted(DDIMScheduler):
    """As CogVideoX's, under a name that no list has."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alphas_cumprod = self.alphas_cumprod / (3 - 2 * self.alphas_cumprod)


class Halved(DDIMScheduler):
    """Every second ᾱ."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alphas_cumprod = self.alphas_cumprod[::2]


# ---- another process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("EDMEulerScheduler", "has no alphas_cumprod"),
        ("IPNDMScheduler", "has no alphas_cumprod"),
        ("FlowMatchEulerDiscreteScheduler", "has no alphas_cumprod"),
        ("HeliosScheduler", "has no alphas_cumprod"),  # whose own set_timesteps would fail first
        ("CogVideoXDDIMScheduler", "has another ᾱ than the β of its configuration make"),
        ("CogVideoXDPMScheduler", "has another ᾱ than the β of its configuration make"),
    ],
)
def test_another_process_is_refused_by_name(tiny_mlp, name, reason):
    pipe = pipe_with(tiny_mlp(), built(name))
    for steps in (None, 1, 10):
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            pipe(seeds=[0], num_inference_steps=steps, output_type="pt")


@pytest.mark.parametrize("scheduler_class", [Shifted, Halved])
def test_so_is_one_that_nobody_has_listed(tiny_mlp, scheduler_class):
    pipe = pipe_with(tiny_mlp(), scheduler_class.from_config(OURS.config))
    with pytest.raises(ValueError, match=f"{scheduler_class.__name__} has another ᾱ"):
        pipe(seeds=[0], num_inference_steps=10, output_type="pt")


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"],
)
def test_sigmas_of_flows_are_refused(tiny_mlp, name):
    """The ᾱ of these is ours; what they walk is not."""
    pipe = pipe_with(tiny_mlp(), built(name, use_flow_sigmas=True))
    with pytest.raises(ValueError, match=f"{name} (begins with σ = |goes from t = )"):
        pipe(seeds=[0], num_inference_steps=10, output_type="pt")


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "SASolverScheduler"])
def test_noise_that_would_stay_in_the_samples_is_refused(tiny_mlp, name):
    """These two end at the level of t = 0, which is little only where β_1 is."""
    short = DDPMPaperScheduler(trained_betas=[0.3, 0.6, 0.9, 0.99])
    with pytest.raises(ValueError, match=f"{name} ends with σ = 0.65: samples would keep this noise"):
        pipe_with(tiny_mlp(), built(name, short))(seeds=[0], num_inference_steps=2, output_type="pt")


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize(
    "name", ["SASolverScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_a_step_of_no_length_is_refused(tiny_mlp, name, spacing):
    """SA-Solver would draw NaN, or end in an assertion."""
    pipe = pipe_with(tiny_mlp(), built(name, timestep_spacing=spacing))
    with pytest.raises(ValueError, match=f"{name} visits timesteps twice in 100 steps"):
        pipe(seeds=[0], num_inference_steps=100, output_type="pt")


def test_a_grid_with_nan_is_refused(tiny_mlp):
    """KDPM2's ancestral one divides by 0 in two steps with linspace."""
    pipe = pipe_with(tiny_mlp(), built("KDPM2AncestralDiscreteScheduler", timestep_spacing="linspace"))
    with pytest.raises(ValueError, match="KDPM2AncestralDiscreteScheduler goes from t = 99 to "):
        pipe(seeds=[0], num_inference_steps=2, output_type="pt")


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
def test_a_way_up_is_refused(tiny_mlp, name):
    pipe = pipe_with(tiny_mlp(), built(name))
    with pytest.raises(ValueError, match=f"{name} goes from t = 0 to .*; sampling goes down, from 99"):
        pipe(seeds=[0], num_inference_steps=10, output_type="pt")


# ---- the same process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_every_schedule_is_the_same_process(tiny_mlp, name, schedule, spacing):
    ours = DDPMPaperScheduler(1000, beta_schedule=schedule, prediction_type="v_prediction")
    pipe = pipe_with(tiny_mlp(), built(name, ours, timestep_spacing=spacing))
    for steps in (1, 7, 999):
        assert pipe.own_scheduler(steps).timesteps[0] < 1000


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_zero_terminal_snr_is_the_same_process(tiny_mlp, name):
    ours = DDPMPaperScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    pipe = pipe_with(tiny_mlp(), built(name, ours, timestep_spacing="trailing"))
    assert pipe.own_scheduler(20).timesteps[0] == 999


@pytest.mark.parametrize("grid", [{}, *({grid: True} for grid in GRIDS), {"final_sigmas_type": "sigma_min"}], ids=str)
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_another_grid_is_the_same_process(tiny_mlp, name, grid):
    pipe = pipe_with(tiny_mlp(), built(name, DDPMPaperScheduler(), **grid))
    for steps in (2, 20, 100):
        assert pipe.own_scheduler(steps).timesteps[0] < 1000


def test_what_is_shifted_by_nothing_is_ddim(tiny_mlp):
    """CogVideoX's is refused for its ᾱ, not for its name; it does not clip."""
    unclipped, network = DDPMPaperScheduler(100, 1e-3, 0.2, clip_sample=False), tiny_mlp()
    cog, ddim = (
        pipe_with(network, built(name, unclipped, **config))(seeds=range(4), num_inference_steps=10, output_type="pt")
        for name, config in (("CogVideoXDDIMScheduler", {"snr_shift_scale": 1.0}), ("DDIMScheduler", {}))
    )
    torch.testing.assert_close(cog.images, ddim.images, rtol=1e-4, atol=1e-4)


# ---- a chain that begins too late ----------------------------------------------------------------------------------


@pytest.fixture
def warned(caplog):
    pipeline_ddpm_paper._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "ddpm_hf.pipeline_ddpm_paper")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", [None, "DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_one_step_at_t_0_is_warned_about(tiny_mlp, warned, name):
    """It hands x_T to a network that expects an image, and returns it almost unchanged."""
    scheduler = OURS if name is None else built(name)
    pipe = pipe_with(tiny_mlp(), scheduler)
    for _ in range(3):
        pipe(seeds=[0], num_inference_steps=1, output_type="pt")
    (message,) = warned()
    assert message == (
        "the chain begins with noise at t = 0, and x_t is 100% image there: set timestep_spacing='trailing', or take "
        "another number of steps"
    )


def test_so_is_leading_with_more_than_half_of_the_steps(tiny_mlp, warned):
    """T // n is 1 there, so that 51 of 100 steps are the last 51."""
    pipe_with(tiny_mlp(), OURS)(seeds=[0], num_inference_steps=51, output_type="pt")
    (message,) = warned()
    assert message.startswith("the chain begins with noise at t = 50, and x_t is 7% image there")


@pytest.mark.parametrize("name", [None, "DDIMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_the_remedies_are_not_warned_about(tiny_mlp, warned, name):
    trailing = DDPMPaperScheduler(100, 1e-3, 0.2, timestep_spacing="trailing")
    for steps, ours in ((1, trailing), (10, OURS), (100, OURS)):
        scheduler = ours if name is None else built(name, ours)
        pipe_with(tiny_mlp(), scheduler)(seeds=[0], num_inference_steps=steps, output_type="pt")
    assert not warned()


def test_a_process_that_never_becomes_noise_has_no_late_start(tiny_mlp, warned):
    pipe = pipe_with(tiny_mlp(), DDPMPaperScheduler(4))
    pipe(seeds=[0], num_inference_steps=1, output_type="pt")
    assert not warned()


# ---- η -------------------------------------------------------------------------------------------------------------


def test_eta_0_to_1_is_ddim_to_ours(tiny_mlp):
    """η = 1 has the variances of `fixed_small`, and draws its noise in the same order; η = 0 is what DDIM does."""
    network = tiny_mlp()
    arguments = {"seeds": range(8), "num_inference_steps": 10, "output_type": "pt"}
    ours = pipe_with(network, DDPMPaperScheduler(100, 1e-3, 0.2, clip_sample=False))
    ddim = pipe_with(network, built("DDIMScheduler", ours.scheduler))
    plain, none, half, full = (ddim(**arguments, **eta).images for eta in ({}, {"eta": 0}, {"eta": 0.5}, {"eta": 1.0}))
    assert torch.equal(plain, none)
    torch.testing.assert_close(full, ours(**arguments).images, rtol=1e-4, atol=1e-4)
    assert (half - full).abs().max() > 0.1 < (half - none).abs().max()
    assert torch.equal(ddim(**arguments).images, plain)  # a call's η is its own


def test_ddim_with_the_clipped_output_is_ours_with_clipping(tiny_mlp):
    """By default it keeps the ε from before x̂_0 was clipped, and draws other samples where the clip acts."""
    network = tiny_mlp()
    arguments = {"seeds": range(8), "num_inference_steps": 10, "output_type": "pt"}
    ours = pipe_with(network, DDPMPaperScheduler(100, 1e-3, 0.2, clip_sample_range=0.3))
    ddim = pipe_with(network, built("DDIMScheduler", ours.scheduler))
    wanted, kept = ours(**arguments).images, ddim(**arguments, eta=1.0).images
    found = ddim(**arguments, eta=1.0, use_clipped_model_output=True).images
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (kept - wanted).abs().max() > 0.05
    assert torch.equal(ddim(**arguments, eta=1.0, use_clipped_model_output=False).images, kept)


@pytest.mark.parametrize("option", [{"eta": 0.0}, {"use_clipped_model_output": True}])
@pytest.mark.parametrize("scheduler", [OURS, EulerDiscreteScheduler, DPMSolverMultistepScheduler, DDPMScheduler])
def test_what_ddim_alone_has_is_refused_elsewhere(tiny_mlp, scheduler, option):
    scheduler = scheduler if scheduler is OURS else scheduler.from_config(OURS.config)
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name}={value}: {type(scheduler).__name__} has none; DDIM has"):
        pipe_with(tiny_mlp(), scheduler)(seeds=[0], num_inference_steps=5, output_type="pt", **option)


# ---- variances and noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "HeunDiscrete", "PNDM", "UniPCMultistep", "DEISMultistep", "DPMSolverMultistep"]
)
def test_learned_variances_are_left_out_by_samplers_that_have_no_use_for_them(name, tiny_unet):
    """The images are those of the same network without the channels of the variances."""
    learned = DDPMPaperScheduler(100, 1e-3, 0.2, variance_type="learned")
    network = tiny_unet(in_channels=1, out_channels=2)
    plain = tiny_unet(in_channels=1, out_channels=1)
    own = plain.state_dict()
    plain.load_state_dict({key: value[: len(own[key])] for key, value in network.state_dict().items()})
    arguments = {"seeds": [0, 1], "num_inference_steps": 10, "output_type": "pt"}
    with_variances = pipe_with(network, built(f"{name}Scheduler", learned))(**arguments).images
    without = pipe_with(plain, built(f"{name}Scheduler"))(**arguments).images
    torch.testing.assert_close(with_variances, without, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "remedy"), [("learned", "DDPMPaperScheduler"), ("fixed_large_log", "fixed_large, the same variance")]
)
def test_variances_whose_root_stock_takes_of_a_logarithm_are_refused(kind, remedy, tiny_unet):
    network = tiny_unet(in_channels=1, out_channels=1 + (kind == "learned"))
    pipe = pipe_with(network, DDPMScheduler(100, 1e-3, 0.2, variance_type=kind))
    with pytest.raises(ValueError, match=f"DDPMScheduler draws NaN with {kind}; take {remedy}"):
        pipe(seeds=[0], num_inference_steps=10, output_type="pt")


def test_an_epsilon_network_does_not_begin_where_no_signal_is(tiny_mlp):
    """In a chain that begins below T it may: there is some signal there."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    arguments = {"seeds": [0], "num_inference_steps": 10, "output_type": "pt"}
    for name in ("EulerDiscreteScheduler", "DDIMScheduler"):
        with pytest.raises(ValueError, match=f"{name} begins at ᾱ = 0, where an ε tells nothing of x_0"):
            pipe_with(tiny_mlp(), built(name, **config))(**arguments)
    leading = built("DDIMScheduler", **config | {"timestep_spacing": "leading"})
    assert pipe_with(tiny_mlp(), leading)(**arguments).images.isfinite().all()


class PassesOn(DDPMScheduler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


def test_seeds_reach_a_step_that_passes_its_arguments_on(tiny_mlp):
    pipe = pipe_with(tiny_mlp(), PassesOn(100, 1e-3, 0.2, clip_sample=False))
    stock = pipe_with(pipe.unet, DDPMScheduler(100, 1e-3, 0.2, clip_sample=False))
    arguments = {"seeds": [0, 1], "num_inference_steps": 10, "output_type": "pt"}
    assert torch.equal(pipe(**arguments).images, stock(**arguments).images)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), True, "1"])
def test_eta_outside_0_to_1_is_refused(tiny_mlp, eta):
    with pytest.raises(ValueError, match=f"eta={eta!r} must be a number from 0 to 1"):
        pipe_with(tiny_mlp(), built("DDIMScheduler"))(seeds=[0], eta=eta, output_type="pt")


# ---- sigmoid -------------------------------------------------------------------------------------------------------


def test_sigmoid_is_stocks():
    """Its own is float32; all others of diffusers, of which most do not know the name, get β as a list."""
    stock = DDPMScheduler(50, 1e-3, 0.1, "sigmoid")
    ours = DDPMPaperScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.betas, stock.betas, rtol=1e-5, atol=0)
    assert make_betas("sigmoid", 3, 0.1, 0.3)[1] == pytest.approx(0.2)
    torch.testing.assert_close(DDIMScheduler.from_config(ours.config).betas, ours.betas, rtol=1e-6, atol=0)


def test_a_pipeline_with_stocks_sigmoid_draws(tiny_mlp):
    pipe = pipe_with(tiny_mlp(), DDPMScheduler(50, 1e-3, 0.1, "sigmoid"))
    assert pipe(seeds=[0], num_inference_steps=5, output_type="pt").images.isfinite().all()
