"""The pipeline: seeds, arguments, outputs, callbacks, checkpoints, and that any scheduler samples the same process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import fork_server
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMPipeline, DDPMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler

ROOT = Path(__file__).parents[1]
NUM_TIMESTEPS = 10  # of conftest's tiny_scheduler

# EDMEulerScheduler is left out: its noise levels and its preconditioning are Karras's own, nothing of a DDPM
# configuration reaches them, so it cannot sample the process the network was trained on.
KARRAS = sorted(set(DDPMPaperScheduler._compatibles) - {"EDMEulerScheduler"})


class Oracle(ModelMixin, ConfigMixin):
    """The optimal ε for independent Gaussian pixels N(`mean`, `std`²), as a network; it keeps what it was called with.

    ε*(x_t, t) = √(1−ᾱ_t) (x_t − √ᾱ_t m) / (ᾱ_t s² + 1 − ᾱ_t), in float64. `mean` is one number, or the ends of a ramp
    over the pixels. Between whole timesteps, where some schedulers ask, log(√(1−ᾱ)/√ᾱ) is interpolated as they do.
    Every operation is elementwise, so that no kernel depends on the batch size.
    """

    @register_to_config
    def __init__(self, betas: list[float], mean=0.0, std: float = 0.5, sample_size: int = 8, in_channels: int = 1):
        super().__init__()
        alphas_cumprod = np.cumprod(1 - np.array(betas))
        self.log_sigma = 0.5 * np.log(1 / alphas_cumprod - 1)
        ends = (mean, mean) if isinstance(mean, float) else mean
        shape = (1, in_channels, sample_size, sample_size)
        self.mean = torch.linspace(*ends, int(np.prod(shape)), dtype=torch.float64).view(shape)
        self.weight = torch.nn.Parameter(torch.zeros(1))  # gives the model a dtype and a device
        self.calls: list[SimpleNamespace] = []

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        self.calls.append(SimpleNamespace(sample=sample.clone(), training=self.training, grad=torch.is_grad_enabled()))
        log_sigma = np.interp(timestep.double().numpy(), np.arange(len(self.log_sigma)), self.log_sigma)
        alpha = 1 / (1 + torch.from_numpy(np.exp(2 * log_sigma)).view(-1, 1, 1, 1))
        variance = alpha * self.config.std**2 + 1 - alpha
        return SimpleNamespace(sample=((1 - alpha).sqrt() * (sample - alpha.sqrt() * self.mean) / variance).float())


def quiet(pipe: DDPMPaperPipeline) -> DDPMPaperPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def oracle_pipe(scheduler: DDPMPaperScheduler, **config) -> DDPMPaperPipeline:
    return quiet(DDPMPaperPipeline(Oracle(scheduler.diffusion.betas.tolist(), **config), scheduler))


def generators(seeds) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def pipe(tiny_unet, tiny_scheduler) -> DDPMPaperPipeline:
    """8×8 RGB images in ten steps."""
    return quiet(DDPMPaperPipeline(tiny_unet(), tiny_scheduler()))


@pytest.fixture
def points_pipe(tiny_mlp, tiny_scheduler) -> DDPMPaperPipeline:
    """Points in the plane in ten steps."""
    return quiet(DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()))


@pytest.fixture
def stock_unet() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)


# ---- Algorithm 2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_unclipped_chain_is_algorithm_2(tiny_unet, tiny_scheduler, relative_error, variance_type):
    scheduler = tiny_scheduler(clip_sample=False, variance_type=variance_type)
    unet = tiny_unet()
    generator = torch.Generator().manual_seed(4)

    betas = scheduler.diffusion.betas
    alphas_cumprod = np.cumprod(1 - betas)
    x = torch.randn(2, 3, 8, 8, generator=generator).double()
    for t in reversed(range(NUM_TIMESTEPS)):
        previous = alphas_cumprod[t - 1] if t else 1.0
        variance = betas[t] * ((1 - previous) / (1 - alphas_cumprod[t]) if variance_type == "fixed_small" else 1)
        z = torch.randn(2, 3, 8, 8, generator=generator).double() if t else torch.zeros(())
        with torch.no_grad():
            eps = unet(x.float(), t).sample.double()
        x = (x - betas[t] / np.sqrt(1 - alphas_cumprod[t]) * eps) / np.sqrt(1 - betas[t]) + np.sqrt(variance) * z

    pipe = quiet(DDPMPaperPipeline(unet, scheduler))
    sampled = pipe(2, generator=torch.Generator().manual_seed(4), output_type="latent").images
    assert relative_error(sampled, x) < 1e-5  # the pipeline's x_t is float32


def test_clipped_chain_goes_through_the_clipped_x_start(tiny_unet, tiny_scheduler, relative_error):
    scheduler, unet = tiny_scheduler(variance_type="fixed_large"), tiny_unet()
    generator = torch.Generator().manual_seed(4)

    betas = scheduler.diffusion.betas
    alphas_cumprod = np.cumprod(1 - betas)
    x = torch.randn(2, 3, 8, 8, generator=generator).double()
    for t in reversed(range(NUM_TIMESTEPS)):
        alpha, previous = alphas_cumprod[t], alphas_cumprod[t - 1] if t else 1.0
        with torch.no_grad():
            eps = unet(x.float(), t).sample.double()
        x_start = ((x - np.sqrt(1 - alpha) * eps) / np.sqrt(alpha)).clamp(-1, 1)
        x = (np.sqrt(previous) * betas[t] * x_start + np.sqrt(1 - betas[t]) * (1 - previous) * x) / (1 - alpha)
        if t:
            x = x + np.sqrt(betas[t]) * torch.randn(2, 3, 8, 8, generator=generator)

    pipe = quiet(DDPMPaperPipeline(unet, scheduler))
    sampled = pipe(2, generator=torch.Generator().manual_seed(4), output_type="latent").images
    assert relative_error(sampled, x) < 1e-5


def test_equals_the_stock_pipeline(stock_unet, tiny_scheduler):
    stock_scheduler = DDPMScheduler(NUM_TIMESTEPS, beta_start=0.01, beta_end=0.6, variance_type="fixed_large")
    stock = quiet(DDPMPipeline(stock_unet, stock_scheduler))
    expected = stock(
        3, torch.Generator().manual_seed(1), num_inference_steps=NUM_TIMESTEPS, output_type="np", return_dict=False
    )[0]
    for scheduler in (
        tiny_scheduler(variance_type="fixed_large"),
        DDPMPaperScheduler.from_config(stock_scheduler.config),
        stock_scheduler,
    ):
        ours = quiet(DDPMPaperPipeline(stock_unet, scheduler))
        images = ours(3, generator=torch.Generator().manual_seed(1), output_type="np").images
        np.testing.assert_allclose(images, expected, atol=1e-4)  # stock's tables are float32


def test_learned_variance(tiny_unet, tiny_scheduler):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(out_channels=6), tiny_scheduler(variance_type="learned")))
    images = pipe(seeds=range(2), output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


# ---- seeds ---------------------------------------------------------------------------------------------------------


def test_one_image_per_seed(pipe):
    images = pipe(seeds=range(4)).images
    assert [(image.size, image.mode) for image in images] == [((8, 8), "RGB")] * 4
    assert len({image.tobytes() for image in images}) == 4


def test_noise_of_a_seed_is_bit_identical_whatever_the_batch(tiny_scheduler):
    # The network and the step are elementwise, so x_t at every step shows the noise of all steps before it.
    pipe = oracle_pipe(tiny_scheduler(clip_sample=False))

    def trajectory(seeds) -> Tensor:
        """x_T … x_0: [NUM_TIMESTEPS + 1, B, 1, 8, 8]."""
        pipe.unet.calls.clear()
        final = pipe(seeds=seeds, output_type="latent").images
        return torch.stack([*(call.sample for call in pipe.unet.calls), final])

    whole = trajectory(range(7))
    assert torch.equal(whole[0, 2], torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2)))  # x_T
    assert torch.equal(trajectory([2])[:, 0], whole[:, 2])
    assert torch.equal(trajectory([6, 5, 2])[:, 2], whole[:, 2])
    assert torch.equal(trajectory([2, 2]), whole[:, [2, 2]])


def test_image_of_a_seed_is_the_same_in_every_batch(pipe):
    in_batch = pipe(seeds=range(5), output_type="pt").images
    alone = torch.cat([pipe(seeds=[seed], output_type="pt").images for seed in range(5)])
    assert (in_batch - alone).abs().max() < 1e-5  # the batch size selects the kernels
    pictures = pipe(seeds=range(5)).images
    assert [image.tobytes() for image in pictures] == [pipe(seeds=[seed]).images[0].tobytes() for seed in range(5)]


def test_images_come_in_the_order_of_their_seeds(pipe):
    images = pipe(seeds=[9, 3, 3, 2**32 - 1], output_type="pt").images
    ascending = pipe(seeds=[3, 3, 9, 2**32 - 1], output_type="pt").images
    torch.testing.assert_close(images, ascending[[2, 0, 1, 3]], atol=1e-5, rtol=0)
    assert (images[0] - images[1]).abs().max() > 0.1


def test_seeds_are_a_list_of_generators(pipe):
    seeded = pipe(seeds=[3, 5], output_type="latent").images
    assert torch.equal(pipe(generator=generators([3, 5]), output_type="latent").images, seeded)
    assert torch.equal(pipe(generator=tuple(generators([3, 5])), output_type="latent").images, seeded)


def test_the_global_generator_is_left_alone(pipe):
    before = torch.get_rng_state()
    pipe(seeds=[3, 5], output_type="latent")
    assert torch.equal(torch.get_rng_state(), before)


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 1),
        ({"batch_size": 3}, 3),
        ({"batch_size": 3, "generator": torch.Generator()}, 3),
        ({"generator": torch.Generator()}, 1),
        ({"seeds": [4, 5]}, 2),
        ({"generator": generators([4, 5])}, 2),
        ({"latents": torch.zeros(2, 3, 8, 8)}, 2),
        ({"batch_size": 2, "seeds": [4, 5], "latents": torch.zeros(2, 3, 8, 8)}, 2),
    ],
)
def test_batch_size_follows_from_the_arguments(pipe, arguments, expected):
    assert pipe(**arguments, output_type="latent", num_inference_steps=1).images.shape == (expected, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "at least one sample.*'batch_size': 0"),
        ({"batch_size": -1}, "at least one sample.*'batch_size': -1"),
        ({"batch_size": True}, "as an integer.*'batch_size': True"),
        ({"batch_size": 2.0}, "as an integer.*'batch_size': 2.0"),
        ({"batch_size": "2"}, "as an integer.*'batch_size': '2'"),
        ({"seeds": []}, "at least one sample.*'seeds': 0"),
        ({"generator": []}, "at least one sample.*'generator': 0"),
        ({"latents": torch.zeros(0, 3, 8, 8)}, "at least one sample.*'latents': 0"),
        ({"batch_size": 3, "seeds": [4, 5]}, "'batch_size': 3, 'seeds': 2.*must agree"),
        ({"batch_size": 1, "generator": generators([4, 5])}, "'batch_size': 1, 'generator': 2.*must agree"),
        ({"batch_size": 1, "latents": torch.zeros(2, 3, 8, 8)}, "'batch_size': 1, 'latents': 2.*must agree"),
        ({"seeds": [4], "latents": torch.zeros(2, 3, 8, 8)}, "'seeds': 1, 'latents': 2.*must agree"),
        ({"seeds": [-1]}, r"integers in \[0, 2\*\*32\), got -1"),
        ({"seeds": [0, 2**32]}, r"integers in \[0, 2\*\*32\), got 4294967296"),
        ({"seeds": [0.5]}, r"integers in \[0, 2\*\*32\), got 0.5"),
        ({"seeds": [True]}, r"integers in \[0, 2\*\*32\), got True"),
        ({"seeds": "12"}, r"integers in \[0, 2\*\*32\), got '1'"),
        ({"seeds": [1], "generator": torch.Generator()}, "seeds or generator, not both"),
        ({"generator": 3}, "generator must be a torch.Generator or a list of them, got 3"),
        ({"generator": [torch.Generator(), 3]}, "generator must be a torch.Generator or a list of them"),
        ({"latents": torch.zeros(2, 1, 8, 8)}, r"latents have shape \(2, 1, 8, 8\); expected .*3, 8, 8"),
        ({"latents": torch.zeros(3, 8, 8)}, r"latents have shape \(3, 8, 8\); expected .*3, 8, 8"),
        ({"latents": torch.zeros(2, 3, 8)}, r"latents have shape \(2, 3, 8\); expected .*3, 8, 8"),
        ({"output_type": "jpg"}, "output_type='jpg' is not supported; choose one of pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["latents", "eps"]}, r"\['eps'\]; only 'latents'"),
    ],
)
def test_refused_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize("scheduler", [None, "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("steps", [0, -3, NUM_TIMESTEPS + 1, 2.5])
def test_refused_number_of_steps(pipe, scheduler, steps):
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"num_inference_steps.*{steps}"):
        pipe(num_inference_steps=steps)


@pytest.mark.parametrize("num_train_timesteps", [7, 1])
def test_all_training_timesteps_by_default(tiny_unet, tiny_scheduler, num_train_timesteps):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(), tiny_scheduler(num_train_timesteps=num_train_timesteps)))
    seen = []
    pipe(seeds=[0], callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append((step, timestep)))
    assert seen == [(i, num_train_timesteps - 1 - i) for i in range(num_train_timesteps)]
    assert pipe.num_timesteps == num_train_timesteps


def test_latents_replace_x_T(pipe):
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    kept = noise.clone()
    images = pipe(latents=noise, seeds=[4, 5], output_type="latent").images
    assert torch.equal(noise, kept)
    again = pipe(latents=noise.double(), seeds=[4, 5], output_type="latent").images
    assert images.dtype == again.dtype == torch.float32 and torch.equal(images, again)
    assert not torch.equal(pipe(seeds=[4, 5], output_type="latent").images, images)


# ---- outputs -------------------------------------------------------------------------------------------------------


def test_output_types_show_one_result(pipe):
    latent, pt, array, pil = (
        pipe(seeds=range(3), output_type=output_type).images for output_type in ("latent", "pt", "np", "pil")
    )
    assert latent.dtype == pt.dtype == torch.float32 and array.dtype == np.float32
    assert latent.shape == pt.shape == (3, 3, 8, 8) and array.shape == (3, 8, 8, 3)
    assert latent.min() < -0.5  # in about [−1, 1], not [0, 1]
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert pt.min() >= 0 and pt.max() <= 1
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype(np.uint8))


def test_return_dict_false_is_a_tuple_of_the_images(pipe):
    returned = pipe(seeds=[0], output_type="pt", return_dict=False)
    assert isinstance(returned, tuple) and len(returned) == 1
    assert torch.equal(returned[0], pipe(seeds=[0], output_type="pt").images)


def test_greyscale_and_non_square_pictures(tiny_unet, tiny_scheduler):
    unet = tiny_unet(sample_size=(8, 16), in_channels=1, out_channels=1)
    pipe = quiet(DDPMPaperPipeline(unet, tiny_scheduler()))
    assert [(image.mode, image.size) for image in pipe(2).images] == [("L", (16, 8))] * 2  # Pillow: width, height
    assert pipe(2, output_type="np").images.shape == (2, 8, 16, 1)


def test_four_channels_are_no_picture(tiny_unet, tiny_scheduler):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(in_channels=4, out_channels=4), tiny_scheduler()))
    with pytest.raises(ValueError, match=r"\(4, 8, 8\) are not pictures; use output_type='np', 'pt' or 'latent'"):
        pipe()
    assert pipe(output_type="np").images.shape == (1, 8, 8, 4)


def test_points_are_not_rescaled(points_pipe):
    latent, pt, array = (points_pipe(seeds=range(5), output_type=kind).images for kind in ("latent", "pt", "np"))
    assert latent.shape == (5, 2) and torch.equal(pt, latent)
    assert isinstance(array, np.ndarray) and np.array_equal(array, latent.numpy())
    assert latent.min() < 0
    with pytest.raises(ValueError, match=r"\(2,\) are not pictures; use output_type='np'"):
        points_pipe(seeds=range(5))


# ---- callbacks, modes ----------------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_the_result(pipe):
    seen = []

    def callback(of: DDPMPaperPipeline, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert of is pipe and list(tensors) == ["latents"]
        seen.append((step, timestep, tensors["latents"].clone()))
        return tensors

    images = pipe(seeds=[1, 2], output_type="latent", callback_on_step_end=callback).images
    assert [(step, t) for step, t, _ in seen] == [(i, NUM_TIMESTEPS - 1 - i) for i in range(NUM_TIMESTEPS)]
    assert torch.equal(seen[-1][2], images)
    assert torch.equal(pipe(seeds=[1, 2], output_type="latent").images, images)


def test_callback_may_replace_the_latents(tiny_scheduler):
    pipe = oracle_pipe(tiny_scheduler())

    def callback(of, step: int, timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return {"latents": torch.full_like(tensors["latents"], 0.25)} if step == 3 else None

    pipe(seeds=[1], callback_on_step_end=callback)
    assert (pipe.unet.calls[4].sample == 0.25).all() and (pipe.unet.calls[5].sample != 0.25).any()


def test_interrupt_returns_x_t_as_it_is(pipe):
    seen = []

    def callback(of: DDPMPaperPipeline, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"].clone())
        of._interrupt = step == 2

    images = pipe(seeds=[1], output_type="latent", callback_on_step_end=callback).images
    assert len(seen) == 3 and torch.equal(images, seen[2])
    seen.clear()
    pipe(seeds=[1], callback_on_step_end=lambda of, step, timestep, tensors: seen.append(step))
    assert len(seen) == NUM_TIMESTEPS  # the next call starts afresh


def test_samples_in_eval_mode_and_restores_the_mode(tiny_unet, tiny_scheduler):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(dropout=0.5), tiny_scheduler()))
    expected = pipe(seeds=[1], output_type="latent").images
    assert not any(module.training for module in pipe.unet.modules())
    pipe.unet.train()
    assert torch.equal(pipe(seeds=[1], output_type="latent").images, expected)
    assert all(module.training for module in pipe.unet.modules())


def test_mode_is_restored_when_the_network_raises(tiny_scheduler):
    pipe = oracle_pipe(tiny_scheduler())
    pipe.unet.train()

    def fail(module, inputs):
        raise RuntimeError("out of memory")

    hook = pipe.unet.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe()
    assert pipe.unet.training
    hook.remove()
    pipe()
    assert len(pipe.unet.calls) == NUM_TIMESTEPS and not any(call.training for call in pipe.unet.calls)


def test_no_gradients_while_sampling(tiny_scheduler):
    pipe = oracle_pipe(tiny_scheduler())
    noise = torch.zeros(1, 1, 8, 8, requires_grad=True)
    assert not pipe(latents=noise, output_type="latent").images.requires_grad
    assert not any(call.grad for call in pipe.unet.calls)
    assert torch.is_grad_enabled()


def test_bfloat16_network_leaves_x_t_in_float32(pipe):
    expected = pipe(seeds=range(4), output_type="pt").images
    pipe.to(torch.bfloat16)
    seen = []

    def callback(of, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"])

    images = pipe(seeds=range(4), output_type="pt", callback_on_step_end=callback).images
    assert pipe.unet.dtype == torch.bfloat16
    assert images.dtype == torch.float32 and all(x.dtype == torch.float32 for x in seen)
    assert not torch.equal(seen[0], seen[0].bfloat16().float())  # more than cast back
    assert images.isfinite().all()
    assert (images - expected).abs().mean() < 0.005  # bfloat16 rounds to 1/512; measured 0.0003


# ---- any scheduler samples the same process ------------------------------------------------------------------------

# Not the betas any stock scheduler has by default: one that dropped them would sample another process.
PROCESSES = {"linear": {"beta_start": 2e-4, "beta_end": 0.04}, "quad": {"beta_start": 2e-4, "beta_end": 0.04}}


def swapped(name: str, scheduler: DDPMPaperScheduler) -> object:
    """The stock scheduler `name`, built from our configuration."""
    kwargs = {}
    if name == "DPMSolverSDEScheduler":  # takes no generator: its Brownian tree has a seed of its own
        pytest.importorskip("torchsde")
        kwargs["noise_sampler_seed"] = 0
    return getattr(diffusers, name).from_config(scheduler.config, **kwargs)


SECONDS = ("LMSDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverSDEScheduler")
SECONDS += ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SECONDS else []) for name in KARRAS]
)
def test_karras_schedulers_are_deterministic_per_seed(pipe, name):
    scheduler = DDPMPaperScheduler()
    pipe.scheduler = swapped(name, scheduler)
    first = pipe(seeds=[3, 4], num_inference_steps=10, output_type="pt").images
    assert first.isfinite().all() and first.std() > 0.05
    assert torch.equal(pipe(seeds=[3, 4], num_inference_steps=10, output_type="pt").images, first)
    if name != "DPMSolverSDEScheduler":  # one tree for the whole batch
        alone = pipe(seeds=[4], num_inference_steps=10, output_type="pt").images
        torch.testing.assert_close(alone, first[1:], atol=1e-4, rtol=0)


# The stock ones with another schedule than the usual, and one that takes seconds for its Brownian tree.
LONGER = [("quad", name) for name in KARRAS] + [("linear", "DPMSolverSDEScheduler")]


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        pytest.param(schedule, name, marks=[pytest.mark.slow] if (schedule, name) in LONGER else [])
        for schedule in PROCESSES
        for name in ("DDPMPaperScheduler", *KARRAS)
    ],
)
def test_schedulers_bring_noise_to_the_data(name, schedule):
    ours = DDPMPaperScheduler(beta_schedule=schedule, clip_sample=False, **PROCESSES[schedule])
    pipe = oracle_pipe(ours, mean=(-0.5, 0.5), std=0.5)
    if name != "DDPMPaperScheduler":
        pipe.scheduler = swapped(name, ours)
    x = pipe(seeds=range(256), num_inference_steps=100, output_type="latent").images.double()
    mean, spread = pipe.unet.mean, (x - pipe.unet.mean).square().mean().sqrt()
    contrast = (x * mean).mean() / (mean * mean).mean()  # 1 where the mean image is the data's
    # 16384 pixels leave a standard error of 0.014, 0.004 and 0.003; the rest is for the discretisation.
    assert abs(contrast - 1) < 0.06
    assert abs(x.mean()) < 0.016
    assert abs(spread - 0.5) < 0.04


# ---- checkpoints ---------------------------------------------------------------------------------------------------

SEEDS = [3, 2**32 - 1, 0]
IN_A_FRESH_PROCESS = """
import sys
import numpy as np, torch
from ddpm_hf import DDPMPaperPipeline
torch.set_num_threads(int(sys.argv[1]))  # it decides how sums are cut, and so their last bits
for folder in sys.argv[2:]:
    samples = DDPMPaperPipeline.from_pretrained(folder)(seeds=[3, 2**32 - 1, 0], output_type="latent").images
    np.save(folder + "/samples.npy", samples.numpy())
"""


@pytest.mark.integration
def test_saved_and_loaded_samples_are_identical(pipe, points_pipe, tmp_path):
    saved = {str(tmp_path / "images"): pipe, str(tmp_path / "points"): points_pipe}
    for folder, original in saved.items():
        original.save_pretrained(folder)
    words = ["-c", IN_A_FRESH_PROCESS, str(torch.get_num_threads()), *saved]
    fork_server.run(words, cwd=ROOT, check=True, capture_output=True)
    for folder, original in saved.items():
        expected = original(seeds=SEEDS, output_type="latent").images
        loaded = quiet(DDPMPaperPipeline.from_pretrained(folder))
        assert type(loaded.unet) is type(original.unet) and type(loaded.scheduler) is DDPMPaperScheduler
        assert torch.equal(loaded(seeds=SEEDS, output_type="latent").images, expected)
        assert torch.equal(torch.from_numpy(np.load(folder + "/samples.npy")), expected)


def test_stock_components_are_saved_and_loaded(stock_unet, tmp_path):
    pipe = quiet(DDPMPaperPipeline(stock_unet, DDIMScheduler(NUM_TIMESTEPS)))
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DDPMPaperPipeline.from_pretrained(tmp_path))
    assert type(loaded.unet) is UNet2DModel and type(loaded.scheduler) is DDIMScheduler
    expected = pipe(seeds=[1], output_type="pt").images
    # Stock models compute on memory-mapped weights, whose alignment changes the last bits.
    torch.testing.assert_close(loaded(seeds=[1], output_type="pt").images, expected, atol=1e-5, rtol=0)


def test_a_checkpoint_saved_again_does_not_say_where_it_lay(pipe, stock_unet, tmp_path):
    """diffusers writes the folder that a model was loaded from into what is saved of it."""
    for name, original in {"ours": pipe, "stock": DDPMPaperPipeline(stock_unet, DDIMScheduler(NUM_TIMESTEPS))}.items():
        quiet(original).save_pretrained(tmp_path / "private" / name)
        loaded = quiet(DDPMPaperPipeline.from_pretrained(tmp_path / "private" / name))
        loaded.save_pretrained(tmp_path / name)
        for file in (tmp_path / name).rglob("*.json"):
            assert "private" not in file.read_text(), file
        again = quiet(DDPMPaperPipeline.from_pretrained(tmp_path / name))
        assert type(again.unet) is type(original.unet) and again.sample_shape == original.sample_shape


def test_from_pipe_shares_the_components(pipe, stock_unet):
    other = DDPMPaperPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and other.scheduler is pipe.scheduler
    stock = DDPMPipeline(stock_unet, DDPMScheduler(NUM_TIMESTEPS))
    ours = quiet(DDPMPaperPipeline.from_pipe(stock))
    assert ours.unet is stock_unet
    assert ours(seeds=range(2), output_type="np").images.shape == (2, 8, 8, 3)


# ---- a scheduler's own chain ---------------------------------------------------------------------------------------

OWN_CHAINS: dict[str, Any] = {
    "own": {"inference_timesteps": [0, 2, 5, 9]},
    "fitted": {
        "inference_timesteps": [0, 2, 5, 9],
        "variance_type": "fitted",
        "x_start_mse": [0.01, 0.05, 0.1, 0.3],
    },
}


@pytest.mark.parametrize("name", OWN_CHAINS)
def test_the_schedulers_own_chain_by_default(tiny_unet, tiny_scheduler, name):
    """And the same with its number of steps; samples are those of its steps by hand."""
    scheduler, unet = tiny_scheduler(**OWN_CHAINS[name]), tiny_unet()
    pipe, seen = quiet(DDPMPaperPipeline(unet, scheduler)), []

    def callback(of, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        seen.append(timestep)

    images = pipe(seeds=[3], output_type="latent", callback_on_step_end=callback).images
    assert seen == [9, 5, 2, 0] and pipe.num_timesteps == 4
    assert torch.equal(pipe(seeds=[3], num_inference_steps=4, output_type="latent").images, images)

    generator, by_hand = torch.Generator().manual_seed(3), tiny_scheduler(**OWN_CHAINS[name])
    x = torch.randn(1, 3, 8, 8, generator=generator)
    for t in (9, 5, 2, 0):
        with torch.no_grad():
            x = by_hand.step(unet(x, t).sample, t, x, generator=generator).prev_sample
    assert torch.equal(x, images)


def test_an_own_chain_gives_way_to_a_number_of_steps(tiny_unet, tiny_scheduler):
    """And comes back afterwards: a call leaves nothing behind."""
    pipe = quiet(DDPMPaperPipeline(tiny_unet(), tiny_scheduler(**OWN_CHAINS["own"])))
    ordinary = quiet(DDPMPaperPipeline(pipe.unet, tiny_scheduler()))
    expected = ordinary(seeds=[3], num_inference_steps=7, output_type="latent").images
    assert torch.equal(pipe(seeds=[3], num_inference_steps=7, output_type="latent").images, expected)
    pipe(seeds=[3])
    assert pipe.num_timesteps == 4


def test_steps_without_a_fitted_variance_are_refused(tiny_unet, tiny_scheduler):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(), tiny_scheduler(**OWN_CHAINS["fitted"])))
    with pytest.raises(ValueError, match=r"have no fitted variance; those that have one are \[0, 2, 5, 9\]"):
        pipe(seeds=[3], num_inference_steps=7)


def test_a_stock_scheduler_still_takes_all_training_timesteps_by_default(tiny_unet):
    pipe = quiet(DDPMPaperPipeline(tiny_unet(), DDIMScheduler(NUM_TIMESTEPS)))
    pipe(seeds=[3], num_inference_steps=3)
    pipe(seeds=[3])
    assert pipe.num_timesteps == NUM_TIMESTEPS


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_that_would_divide_by_an_empty_step_are_refused(tiny_unet, tiny_scheduler, name):
    """With all T steps two of theirs are at one timestep: diffusers fails with an IndexError, or returns NaN."""
    config = tiny_scheduler().config
    pipe = DDPMPaperPipeline(tiny_unet(), getattr(diffusers, name).from_config(config))
    with pytest.raises(ValueError, match=f"{name} visits timesteps twice in 10 steps; pass a smaller"):
        pipe(seeds=[0])
    assert np.isfinite(pipe(seeds=[0], num_inference_steps=9, output_type="np").images).all()
