"""The laws of what the paper draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline, figures
from ddpm_hf.codec import bound
from ddpm_hf.data import Samples, load_samples, to_model_range
from ddpm_hf.figures import (
    chain_timesteps,
    coarse_to_fine,
    interpolation,
    learned_score,
    nearest_images,
    point_process,
    progressive_x_start,
    shared_latents,
    unit_range,
)
from ddpm_hf.pipeline_ddpm_paper import seeded_generators
from ddpm_hf.sampling import reverse_process

ROOT = Path(__file__).parents[1]
# A sample's numbers may depend on the others in its batch by the rounding of vectorised kernels, ten steps long.
ROUNDING = {"atol": 2e-5, "rtol": 0}


@pytest.fixture
def pipe(tiny_unet, tiny_scheduler) -> DDPMPaperPipeline:
    """Draws 8×8 RGB images in ten steps. The network is scaled down so that x̂_0 lies inside its clip."""
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    pipe = DDPMPaperPipeline(unet, tiny_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_distilled_network_is_not_asked_at_other_timesteps_than_its_own():
    """What follows another chain, or asks at a timestep of our choice, says so instead of drawing noise."""
    pipe = DDPMPaperPipeline.from_pretrained(ROOT / "model_cards" / "ddpm-digits-4steps")
    for ask in (
        lambda: progressive_x_start(pipe, seeds=[0], after_steps=[1]),
        lambda: chain_timesteps(pipe, (0.5,)),
        lambda: reverse_process(pipe, torch.zeros(1, 1, 8, 8), generators=seeded_generators([0])),
        lambda: bound(pipe, np.zeros((1, 1, 8, 8), np.uint8), num_levels=17),
    ):
        with pytest.raises(ValueError, match="distilled for the timesteps of 4 steps"):
            ask()


@pytest.fixture
def points_pipe(tiny_mlp, tiny_scheduler) -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline(tiny_mlp(), tiny_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sources() -> torch.Tensor:
    """Two images [3, 8, 8] in [−1, 1]."""
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1


# ---- progressive x̂_0 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "expected"), [(None, [9, 6, 4, 0, -1]), (3, [6, 3, 0, -1])])
def test_timesteps_nearest_to_fractions_without_repeats(pipe, steps, expected):
    assert chain_timesteps(pipe, (1, 0.7, 0.5, 0.1, 0.09, 0), num_inference_steps=steps) == expected
    with pytest.raises(ValueError, match=r"fractions=\[0.5, 1.1\] must lie in \[0, 1\]"):
        chain_timesteps(pipe, (0.5, 1.1))


@pytest.mark.parametrize("steps", [None, 4])
def test_progressive_frames_are_the_chains_and_the_last_is_the_pipelines_image(pipe, steps):
    total = steps or 10
    frames = progressive_x_start(pipe, seeds=[1, 2], after_steps=[1, 3, total], num_inference_steps=steps)
    assert frames.shape == (3, 2, 3, 8, 8) and frames.min() >= 0 and frames.max() <= 1
    assert torch.equal(frames[2], pipe(seeds=[1, 2], num_inference_steps=steps, output_type="pt").images)
    generators = seeded_generators([1, 2])
    x_t = torch.cat([torch.randn(1, 3, 8, 8, generator=generator) for generator in generators])
    chain = list(reverse_process(pipe, x_t, generators=generators, num_inference_steps=steps))
    for frame, number in zip(frames, (1, 3, total), strict=True):
        assert torch.equal(frame, chain[number - 1].x_start / 2 + 0.5)  # inside the clip, so no clamp either


@pytest.mark.parametrize("numbers", [[], [0, 3], [3, 1], [2, 2], [11]])
def test_progressive_refuses_other_numbers_of_steps(pipe, numbers):
    with pytest.raises(ValueError, match=r"after_steps=.* must be ascending numbers of steps in \[1, 10\]"):
        progressive_x_start(pipe, seeds=[0], after_steps=numbers)


# ---- samples that share x_t ----------------------------------------------------------------------------------------


def test_samples_share_x_t_and_differ_the_less_the_lower_t(pipe):
    timesteps = [9, 5, 1, 0]
    x_t, samples = shared_latents(pipe, seed=0, seeds=[1, 2, 3], timesteps=timesteps)
    assert x_t.shape == (4, 3, 8, 8) and samples.shape == (4, 3, 3, 8, 8)
    generators = seeded_generators([0])
    x = torch.randn(1, 3, 8, 8, generator=generators[0])
    before = {}
    for step in reverse_process(pipe, x, generators=generators):
        before[step.t], x = x, step.x
    for row, t in enumerate(timesteps):  # before t all have one chain; from there each has its own generator
        assert torch.equal(x_t[row], unit_range(before[t])[0])
        for sample, seed in zip(samples[row], [1, 2, 3], strict=True):
            *_, last = reverse_process(pipe, before[t], generators=seeded_generators([seed]), from_timestep=t)
            torch.testing.assert_close(sample, unit_range(last.x)[0], **ROUNDING)
    spread = samples.std(dim=1).mean(dim=(1, 2, 3))
    assert spread[0] > spread[1] > spread[2] > 0.001
    assert spread[3] < 1e-5  # the last step adds no noise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [1, 0]}, r"seeds=\[1, 0\] must be one or more, and not 0"),
        ({"seeds": []}, r"seeds=\[\] must be one or more"),
        ({"timesteps": [9, 10]}, r"timesteps=\[9, 10\] must be one or more of this chain's 10, 0 to 9"),
        ({"timesteps": [-1]}, "timesteps="),
        ({"timesteps": []}, "timesteps="),
    ],
)
def test_shared_latents_refuses(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        shared_latents(pipe, **{"seed": 0, "seeds": [1], "timesteps": [9], **arguments})


# ---- interpolation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "t"), [(None, 4), (None, 9), (5, 4)])
def test_interpolation_ends_at_the_reconstructions_of_its_sources(pipe, sources, steps, t):
    """Each source alone, diffused with the seed's ε and denoised with what its generator draws next."""
    images = interpolation(pipe, *sources, t=t, weights=[0, 0.25, 0.5, 1], seeds=[7, 8], num_inference_steps=steps)
    assert images.shape == (2, 4, 3, 8, 8)
    for row, seed in zip(images, [7, 8], strict=True):
        for image, source in ((row[0], sources[0]), (row[3], sources[1])):
            generators = seeded_generators([seed])
            x_t = pipe.scheduler.diffusion.q_sample(source[None], t, torch.randn(1, 3, 8, 8, generator=generators[0]))
            *_, last = reverse_process(pipe, x_t, generators=generators, from_timestep=t, num_inference_steps=steps)
            torch.testing.assert_close(image, unit_range(last.x)[0], **ROUNDING)
    assert (images[0] - images[1]).abs().max() > 0.01 and (images[:, 0] - images[:, 1]).abs().max() > 0.001


def test_every_weight_has_the_noise_level_of_t(pipe, sources):
    """x̄_t = √ᾱ_t x̄_0 + √(1 − ᾱ_t) ε with one ε for all λ: the network first sees just that."""
    seen, t, weights = [], 5, [0, 0.5, 1]
    pipe.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(inputs[0]))
    interpolation(pipe, *sources, t=t, weights=weights, seeds=[7])
    noise = torch.randn(1, 3, 8, 8, generator=seeded_generators([7])[0])
    for x_t, weight in zip(seen[0], weights, strict=True):
        blend = (1 - weight) * sources[0] + weight * sources[1]
        expected = pipe.scheduler.diffusion.q_sample(blend[None], t, noise)[0]
        torch.testing.assert_close(x_t, expected, atol=1e-6, rtol=0)  # rounding of sums of order 1


def test_coarse_to_fine_goes_down_to_the_blend_of_the_pixels(pipe, sources):
    weights = [0, 0.5, 1]
    images = coarse_to_fine(pipe, *sources, timesteps=[9, 4, -1], weights=weights, seed=7)
    assert images.shape == (3, 3, 3, 8, 8)
    for row, t in zip(images[:2], [9, 4], strict=True):
        assert torch.equal(row, interpolation(pipe, *sources, t=t, weights=weights, seeds=[7])[0])
    blends = torch.stack([(1 - weight) * sources[0] + weight * sources[1] for weight in weights])
    assert torch.equal(images[2], unit_range(blends))
    change = (images - images[:, :1]).abs().mean(dim=(1, 2, 3, 4))
    assert change[0] < change[1] < change[2]  # the lower t, the more is left of the difference of the sources


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": 10}, r"t=10 is outside \[0, 10\)"),
        ({"t": 3, "num_inference_steps": 5}, "from_timestep=3 is not one of this chain's 5 timesteps"),
        ({"seeds": []}, "pass at least one of each"),
        ({"weights": []}, "pass at least one of each"),
        ({"x_start": torch.zeros(3, 4, 4)}, r"shapes \(3, 4, 4\) and \(3, 8, 8\)"),
    ],
)
def test_interpolation_refuses(pipe, sources, change, message):
    arguments = {"x_start": sources[0], "x_start_other": sources[1], "t": 4, "weights": [0.5], "seeds": [0]}
    with pytest.raises(ValueError, match=message):
        interpolation(pipe, **{**arguments, **change})


def test_points_are_refused_where_images_are_meant(points_pipe):
    for call in (
        lambda: progressive_x_start(points_pipe, seeds=[0], after_steps=[1]),
        lambda: shared_latents(points_pipe, seed=0, seeds=[1], timesteps=[9]),
    ):
        with pytest.raises(ValueError, match=r"samples of shape \(2,\) are not images"):
            call()


# ---- nearest images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Samples:
    return load_samples("digits")


@pytest.mark.parametrize("chunk_values", [2**24, 64 * 100, 1])
def test_nearest_images_are_those_of_an_exhaustive_search(digits, monkeypatch, chunk_values):
    few = Samples("few", digits.array[:333], digits.num_levels, "") if chunk_values == 1 else digits
    monkeypatch.setattr(figures, "CHUNK_VALUES", chunk_values)  # how the set is cut does not matter
    queries = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    indices, distances = nearest_images(queries, few, k=5)
    scaled = few.array.astype(np.float64) / 16
    exact = np.sqrt(((queries.double().numpy()[:, None] - scaled[None]) ** 2).sum(axis=(2, 3, 4)))
    assert np.array_equal(indices.numpy(), exact.argsort(axis=1)[:, :5])
    np.testing.assert_allclose(distances.numpy(), np.sort(exact, axis=1)[:, :5], rtol=1e-6)  # float32 sums of 64


@pytest.mark.parametrize("num_levels", [17, 256])
def test_an_image_of_the_set_is_its_own_nearest_at_distance_0(digits, num_levels):
    array = np.random.default_rng(0).integers(0, num_levels, (50, 3, 5, 5), dtype=np.uint8)
    array[40] = array[20]  # a copy: the first comes first
    samples = Samples("random", array, num_levels, "")
    found = nearest_images(unit_range(to_model_range(samples.batch([3, 40]), num_levels)), samples, k=2)
    assert found.indices[:, 0].tolist() == [3, 20] and found.indices[1, 1] == 40
    assert found.distances[:, 0].tolist() == [0, 0] and found.distances[1, 1] == 0 and found.distances[0, 1] > 0.1


def test_nearest_images_refuses(digits):
    for shape, samples, k, message in (
        ((1, 3, 8, 8), digits, 1, r"images have shape \(1, 3, 8, 8\); digits holds 1x8x8"),
        ((1, 2), load_samples("moons"), 1, "which are points"),
        ((1, 1, 8, 8), digits, 0, r"k=0 must lie in \[1, 1437\]"),
        ((1, 1, 8, 8), digits, 1438, r"k=1438 must lie in \[1, 1437\]"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest_images(torch.zeros(shape), samples, k=k)


# ---- points --------------------------------------------------------------------------------------------------------


class ExactForNormal(DDPMPaperMLP):
    """What the best network says of data N(0, I), whose x_t are N(0, I) too: E[· | x_t], and a log-variance."""

    def answer(self, diffusion, prediction_type):
        self.diffusion, self.prediction_type = diffusion, prediction_type
        return self

    def forward(self, sample, timestep, return_dict=True):
        def at(table):
            return torch.tensor(table)[timestep].float()[:, None]

        signal, sigma = at(self.diffusion.sqrt_alphas_cumprod), at(self.diffusion.sqrt_one_minus_alphas_cumprod)
        mean = at(self.diffusion.posterior_mean_coef1) * signal + at(self.diffusion.posterior_mean_coef2)
        factor = {"epsilon": sigma, "sample": signal, "v_prediction": 0 * sigma, "previous_sample": mean}
        output = factor[self.prediction_type] * sample
        return UNet2DOutput(sample=output if self.config.out_channels == 2 else torch.cat([output, output - 9], dim=1))


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "previous_sample"])
def test_score_of_normal_data_is_minus_x_at_every_t(tiny_scheduler, prediction_type, variance_type):
    scheduler = tiny_scheduler(prediction_type=prediction_type, variance_type=variance_type)
    unet = ExactForNormal(out_channels=4 if variance_type == "learned" else 2, hidden_size=4, num_layers=1)
    pipe = DDPMPaperPipeline(unet.answer(scheduler.diffusion, prediction_type).train(), scheduler)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    for t in range(10):
        # float32: at t = 0 ε is a difference of numbers 50 times as large as itself, divided by σ = 0.1
        torch.testing.assert_close(learned_score(pipe, x, t), -x, atol=1e-4, rtol=0)
    assert pipe.unet.training


def test_point_process_goes_from_the_data_to_the_noise_and_back(points_pipe):
    data = load_samples("moons").batch(range(40))
    process = point_process(points_pipe, data, seeds=range(40), timesteps=[9, -1, 3])
    assert process.timesteps == (-1, 3, 9) and process.forward.shape == process.reverse.shape == (3, 40, 2)
    x_T = torch.cat([torch.randn(1, 2, generator=generator) for generator in seeded_generators(range(40))])
    assert torch.equal(process.forward[0], data) and torch.equal(process.reverse[2], x_T)
    for row, t in ((1, 3), (2, 9)):
        assert torch.equal(process.forward[row], points_pipe.scheduler.diffusion.q_sample(data, t, x_T))
        assert torch.equal(process.scores[row], learned_score(points_pipe, process.positions[row], t))
    assert torch.equal(process.reverse[0], points_pipe(seeds=range(40), output_type="pt").images)
    chain = {step.t: step for step in reverse_process(points_pipe, x_T, generators=_after_x_T(range(40)))}
    assert torch.equal(process.reverse[1], chain[4].x)
    inside = process.forward.abs().amax(dim=2) <= process.positions.abs().amax(dim=(1, 2))[:, None]
    assert inside.float().mean() > 0.97


def _after_x_T(seeds) -> list[torch.Generator]:
    generators = seeded_generators(seeds)
    for generator in generators:
        torch.randn(1, 2, generator=generator)
    return generators


def test_point_process_refuses(points_pipe, tiny_mlp, tiny_scheduler, pipe):
    solid = DDPMPaperPipeline(tiny_mlp(in_channels=3, out_channels=3), tiny_scheduler())
    for model, shape, timesteps, message in (
        (points_pipe, (3, 2), [9], r"points have shape \(3, 2\), for 2 seeds"),
        (solid, (2, 3), [9], "expected points in the plane"),
        (pipe, (2, 2), [9], "expected points in the plane"),
        (points_pipe, (2, 2), [10], r"timesteps=\[10\] must be one or more of this chain's 11, -1 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            point_process(model, torch.zeros(shape), seeds=[0, 1], timesteps=timesteps)
