"""What the page computes, compared with the pipeline, the figures and the bound; and what visitors give it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from small_models import DIGITS, FOUR_STEPS, ignored, saved, some_levels

from ddpm_hf import DDPMPaperPipeline, figures
from ddpm_hf.cli import main
from ddpm_hf.cli.arguments import SCHEDULERS, parse_seeds
from ddpm_hf.data import to_model_range
from ddpm_hf.demo import tasks as demo_tasks
from ddpm_hf.demo.models import Model, load, num_levels
from ddpm_hf.demo.tasks import fitted, seeds_in, whole
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.pictures import as_pictures, image_grid
from ddpm_hf.pipeline_ddpm_paper import seeded_generators


def same(picture: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(picture), np.asarray(other))


def enlarged(images: torch.Tensor) -> list[Image.Image]:
    return [image_grid([picture], min_side=128) for picture in as_pictures(images)]


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_models_are_named_by_their_folders_and_know_levels(checkpoints):
    models = load([str(checkpoints / "colour"), str(DIGITS)], "cpu")
    assert list(models) == ["colour", "ddpm-digits"]
    assert [model.num_levels for model in models.values()] == [256, 17]
    assert [model.num_timesteps for model in models.values()] == [10, 1000]
    assert {type(model.pipe.unet).__name__ for model in models.values()} == {"FastUNet"}


def test_a_distilled_model_is_sampled_in_its_steps_and_asked_nothing_else():
    model = load([str(FOUR_STEPS)], "cpu", fast=False)["ddpm-digits-4steps"]
    assert model.default_steps == 4 and load([str(DIGITS)], "cpu")["ddpm-digits"].default_steps == 100
    drawn = model.pipe(seeds=range(2), output_type="latent").images
    shown = demo_tasks.sample(model, seeds=range(2), steps=4, scheduler=None, report=ignored)
    assert same(shown.grid, demo_tasks._grid(figures.unit_range(drawn), min_side=96, side=384))
    levels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    for ask in (
        lambda: demo_tasks.interpolate(model, ends=(0, 1), t=500, steps=4, noise_seed=2, report=ignored),
        lambda: demo_tasks.noise_and_back(model, levels, t=500, steps=4, seeds=[0], report=ignored),
        lambda: demo_tasks.bound(model, levels, one_in=10, seed=0, report=ignored),
    ):
        with pytest.raises(ValueError, match="distilled for the timesteps of 4 steps"):
            ask()


@pytest.mark.parametrize(("options", "levels"), [("dataset_name: digits", 17), ("dataset_name: null", 256)])
def test_levels_follow_the_options_of_the_run(checkpoints, tmp_path, options, levels):
    (tmp_path / "options.yaml").write_text(options)
    assert num_levels(str(tmp_path), (1, 8, 8)) == levels


def test_load_refuses_what_the_page_cannot_show(checkpoints, tmp_path, tiny_unet, tiny_scheduler):
    with pytest.raises(ValueError, match=r"shows images of 1 or 3 channels; .*points draws points"):
        load([str(checkpoints / "points")], "cpu")
    two = DDPMPaperPipeline(tiny_unet(in_channels=2, out_channels=2), tiny_scheduler())
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="draws images of 2 channels"):
        load([str(tmp_path / "two")], "cpu")
    shutil.copytree(checkpoints / "grey", tmp_path / "grey")
    with pytest.raises(ValueError, match="two checkpoints are called grey"):
        load([str(checkpoints / "grey"), str(tmp_path / "grey")], "cpu")


# ---- what the page computes ----------------------------------------------------------------------------------------


def test_samples_and_frames_are_those_of_algorithm_2(colour):
    seeds = list(range(18))
    drawn = demo_tasks.sample(colour, seeds=seeds, steps=5, scheduler=None, report=ignored)
    images = colour.pipe(seeds=seeds, num_inference_steps=5, output_type="pt").images
    assert same(drawn.grid, image_grid(as_pictures(images), min_side=96))
    assert [frame.t for frame in drawn.frames] == [9, 7, 5, 3, 1, 0]
    noise = randn_tensor((16, 3, 8, 8), generator=seeded_generators(seeds[:16]))
    assert same(drawn.frames[0].x_t, image_grid(as_pictures(figures.unit_range(noise))))
    expected = figures.progressive_x_start(
        colour.pipe, seeds=seeds[:16], after_steps=range(1, 6), num_inference_steps=5
    )
    for frame, x_start in zip(drawn.frames, expected, strict=False):
        difference = np.asarray(frame.x_start, int) - np.asarray(image_grid(as_pictures(x_start)), int)
        assert np.abs(difference).max() <= 1
    assert same(drawn.frames[-1].x_t, image_grid(as_pictures(images[:16])))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 25, 26, 100])
def test_frames_are_evenly_spread_over_any_chain(tiny_unet, tiny_scheduler, steps):
    pipe = DDPMPaperPipeline(tiny_unet(), tiny_scheduler(num_train_timesteps=100))
    pipe.set_progress_bar_config(disable=True)
    drawn = demo_tasks.sample(Model(pipe, 256), seeds=[0], steps=steps, scheduler=None, report=ignored)
    times = [frame.t for frame in drawn.frames]
    assert len(times) == min(steps, demo_tasks.NUM_FRAMES) + 1 and times[-1] == 0
    if steps == 100:
        assert times == list(range(100, -1, -4))
    else:
        assert times == sorted(set(times), reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_what_the_command_draws(grey, checkpoints, tmp_path, scheduler):
    scheduler_class, told = SCHEDULERS[scheduler]
    options = {"scheduler": scheduler_class, "scheduler_options": told}
    drawn = demo_tasks.sample(grey, seeds=[3, 4], steps=5, report=ignored, **options)
    arguments = ["--seeds", "3,4", "--steps", "5", "--scheduler", scheduler, "--fast", "--device", "cpu"]
    main(["sample", str(checkpoints / "grey"), *arguments, "-o", str(tmp_path / "x.npy")])
    images = torch.from_numpy(np.load(tmp_path / "x.npy")).permute(0, 3, 1, 2)
    assert same(drawn.grid, image_grid(as_pictures(images), min_side=192))  # few are enlarged to more
    times = [frame.t for frame in drawn.frames]
    assert times == sorted(times, reverse=True) and times[-1] == 0 and 6 <= times[0] <= 10
    for frame in drawn.frames[:-1]:
        assert frame.x_t.size == frame.x_start.size and not same(frame.x_t, frame.x_start)


def test_a_learned_variance_is_no_part_of_x_start(tiny_unet, tiny_scheduler):
    pipe = DDPMPaperPipeline(tiny_unet(in_channels=3, out_channels=6), tiny_scheduler(variance_type="learned"))
    pipe.set_progress_bar_config(disable=True)
    drawn = demo_tasks.sample(Model(pipe, 256), seeds=[0], steps=10, scheduler=None, report=ignored)
    expected = figures.progressive_x_start(pipe, seeds=[0], after_steps=[1])[0]
    assert same(drawn.frames[0].x_start, image_grid(as_pictures(expected), min_side=256))


@pytest.mark.parametrize(
    ("label", "guidance", "options"),
    [
        ("dog", 2.0, {"class_labels": "dog", "guidance_scale": 2.0}),
        ("class 2", 1.0, {"class_labels": 2}),
        ("any", 5.0, {}),  # nothing to guide towards
    ],
)
def test_classes_are_drawn_as_the_pipeline_draws_them(pets, label, guidance, options):
    drawn = demo_tasks.sample(
        pets, seeds=range(4), steps=10, scheduler=None, report=ignored, label=label, guidance=guidance
    )
    images = pets.pipe(seeds=range(4), output_type="pt", **options).images
    expected = image_grid(as_pictures(images), min_side=192)
    assert np.abs(np.asarray(drawn.grid).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_classes_of_the_page(pets, grey):
    assert demo_tasks.chosen_class(pets, "cat") == "cat" and demo_tasks.chosen_class(grey, "cat") is None
    with pytest.raises(ValueError, match="Class: choose one"):
        demo_tasks.chosen_class(pets, "fox")
    assert demo_tasks.number("Guidance", 2.5, 0, 8) == 2.5
    for value in (9, -1, True, "2", float("nan")):
        with pytest.raises(ValueError, match="Guidance: give a number from 0 to 8"):
            demo_tasks.number("Guidance", value, 0, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("t", "steps", "taken"), [(0, 10, 0), (5, 10, 5), (6, 5, 5), (10, 10, 10)])
def test_interpolation_is_that_of_the_figure(colour, t, steps, taken):
    found, ends, between = demo_tasks.interpolate(colour, ends=(3, 5), t=t, steps=steps, noise_seed=7, report=ignored)
    x = colour.pipe(seeds=[3, 5], num_inference_steps=steps, output_type="latent").images.clamp(-1, 1)
    weights = [i / 8 for i in range(9)]
    expected = figures.interpolation(
        colour.pipe, *x, t=taken - 1, weights=weights, seeds=[7], num_inference_steps=steps
    )
    assert found == taken
    assert all(map(same, between, enlarged(expected[0]))) and len(between) == 9
    assert all(map(same, ends, enlarged(figures.unit_range(x)))) and len(ends) == 2


@pytest.mark.parametrize(("t", "steps", "taken"), [(1, 10, 1), (6, 5, 5), (10, 10, 10)])
def test_noise_and_back_is_an_interpolation_of_one_image(grey, t, steps, taken):
    levels = some_levels(grey)
    made = demo_tasks.noise_and_back(grey, levels, t=t, steps=steps, seeds=[2, 9], report=ignored)
    x = to_model_range(levels, 17)
    back = figures.interpolation(grey.pipe, x, x, t=taken - 1, weights=[0.0], seeds=[2, 9], num_inference_steps=steps)
    assert made.t == taken
    assert same(made.original, enlarged(figures.unit_range(x[None]))[0])
    assert all(map(same, made.denoised, enlarged(back[:, 0]))) and len(made.denoised) == 2
    noise = randn_tensor((2, 1, 8, 8), generator=seeded_generators([2, 9]))
    x_t = grey.process.diffusion.q_sample(x.expand(2, 1, 8, 8), taken - 1, noise)
    assert all(map(same, made.x_t, enlarged(figures.unit_range(x_t)))) and len(made.x_t) == 2


def test_all_terms_of_the_bound(grey):
    levels = some_levels(grey)
    found = demo_tasks.bound(grey, levels, one_in=1, seed=3, report=ignored)
    pipe = grey.pipe
    expected = bits_per_dim(pipe.unet, pipe.scheduler, to_model_range(levels, 17)[None], seed=3, num_levels=17)
    assert found.total == pytest.approx(float(expected.total_b[0]), rel=1e-5)
    assert found.prior == pytest.approx(float(expected.prior_b[0]))
    assert found.terms == pytest.approx(expected.terms_bt[0].numpy(), rel=1e-4)
    assert found.decoder == pytest.approx(float(expected.terms_bt[0, 0]), rel=1e-4)
    assert found.prior + found.kl + found.decoder == pytest.approx(found.total)


@pytest.mark.parametrize("seed", [0, 1])
def test_some_terms_of_the_bound_stand_for_all(grey, seed):
    """L_0, and one of each of the ranges from 1, 2 and 4 on, with the noise that it has among all."""
    found = demo_tasks.bound(grey, some_levels(grey), one_in=3, seed=seed, report=ignored)
    every = demo_tasks.bound(grey, some_levels(grey), one_in=1, seed=seed, report=ignored)
    drawn = np.flatnonzero(~np.isnan(found.terms[1:])) + 1
    assert np.searchsorted([1, 2, 4], drawn, side="right").tolist() == [1, 2, 3] and len(found.terms) == 10
    assert found.terms[drawn] == pytest.approx(every.terms[drawn], rel=1e-4)
    assert found.kl == pytest.approx(float(every.terms[drawn] @ [1, 2, 6]), rel=1e-4)
    assert found.terms[0] == found.decoder == pytest.approx(every.decoder, rel=1e-4)
    assert found.total == pytest.approx(every.prior + found.kl + found.decoder)


def works(model: Model, report: Callable[[float], None]) -> list[Callable[[], Any]]:
    levels = some_levels(model)
    return [
        lambda: demo_tasks.sample(model, seeds=[0], steps=10, scheduler=None, report=report),
        lambda: demo_tasks.interpolate(model, ends=(0, 1), t=5, steps=10, noise_seed=2, report=report),
        lambda: demo_tasks.noise_and_back(model, levels, t=10, steps=10, seeds=[0], report=report),
        lambda: demo_tasks.bound(model, levels, one_in=1, seed=0, report=report),
        lambda: demo_tasks.bound(model, levels, one_in=4, seed=0, report=report),
    ]


@pytest.mark.parametrize("i", range(5))
def test_progress_is_reported_and_what_it_raises_ends_work(grey, i):
    seen: list[float] = []
    works(grey, seen.append)[i]()
    assert seen == sorted(seen) and 0 < seen[0] < 1 and seen[-1] == 1 and seen.count(1.0) == 1

    class Enough(Exception):
        pass

    calls = []

    def stop(done: float) -> None:
        calls.append(done)
        raise Enough

    with pytest.raises(Enough):
        works(grey, stop)[i]()
    assert len(calls) == 1 and not grey.pipe.unet._forward_hooks


# ---- what visitors type and drop -----------------------------------------------------------------------------------


def test_whole_numbers():
    assert whole("Steps", 5, 1, 10) == 5 and whole("Steps", 5.0, 1, 10) == 5
    for value in (0, 11, 2.5, None, "5", True, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Steps: give a whole number from 1 to 10"):
            whole("Steps", value, 1, 10)


def test_seeds():
    assert seeds_in("0-2, 20", parse_seeds, 4) == [0, 1, 2, 20]
    with pytest.raises(ValueError, match="Seeds: give at most 3"):
        seeds_in("0-2,20", parse_seeds, 3)
    with pytest.raises(ValueError, match="Seeds: give at most 64"):
        seeds_in(",".join(["0-999999"] * 100_000), parse_seeds, 64)
    with pytest.raises(ValueError, match="Seeds: 'x' is neither a seed nor a range such as 0-15"):
        seeds_in("1,x", parse_seeds, 64)
    with pytest.raises(ValueError) as refused:
        seeds_in("9" * 10_000, parse_seeds, 64)
    assert len(str(refused.value)) < 300


def test_grey_images_are_quantised_as_the_digits_are(grey, tmp_path):
    steps = np.tile(np.array([0, 7, 8, 16, 128, 247, 248, 255], np.uint8), (8, 1))
    levels = fitted(grey, saved(tmp_path, Image.fromarray(steps)), "white")
    assert levels.dtype == torch.uint8 and levels.shape == (1, 8, 8)
    assert levels[0, 0].tolist() == [0, 0, 1, 1, 8, 15, 16, 16]


def test_channels_are_made_to_fit(grey, colour, tmp_path):
    red = saved(tmp_path, Image.new("RGB", (8, 8), (255, 0, 0)))
    assert set(fitted(grey, red, "white").flatten().tolist()) == {round(76 * 16 / 255)}  # 0.299 of 255
    assert fitted(colour, red, "white")[:, 0, 0].tolist() == [255, 0, 0]
    shade = saved(tmp_path, Image.new("L", (8, 8), 90))
    assert fitted(colour, shade, "white")[:, 3, 3].tolist() == [90, 90, 90]


def test_the_centred_square_is_cut_out_and_scaled(colour, tmp_path):
    image = Image.new("RGB", (64, 16), "red")
    image.paste("blue", (20, 0, 44, 16))
    levels = fitted(colour, saved(tmp_path, image), "white")
    assert levels[2].min() >= 253 and levels[:2].max() <= 2  # Lanczos looks a little beyond its square


@pytest.mark.parametrize(("background", "level"), [("white", 16), ("black", 0)])
def test_what_stands_behind_transparent_images(grey, tmp_path, background, level):
    path = saved(tmp_path, Image.new("RGBA", (20, 20), (90, 90, 90, 0)))
    assert fitted(grey, path, background).unique().tolist() == [level]


def test_files_that_are_refused(grey, tmp_path, tiny_unet, tiny_scheduler, monkeypatch):
    whole_file = Path(saved(tmp_path, Image.effect_noise((60, 60), 50), "whole.png")).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole_file[: len(whole_file) // 2])
    (tmp_path / "text.png").write_text("no image")
    for name, message in (
        ("cut.png", "The file cannot be used: cannot be decoded"),
        ("text.png", "The file cannot be used: no readable image header"),
        ("gone.png", "Drop an image first"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(grey, str(tmp_path / name), "white")
    with pytest.raises(ValueError, match="Drop an image first"):
        fitted(grey, None, "white")
    huge = saved(tmp_path, Image.new("1", (9000, 9000)), "huge.png")
    with pytest.raises(ValueError, match="9000 x 9000 is more than 50,000,000 pixels"):
        fitted(grey, huge, "white")
    monkeypatch.setattr(demo_tasks, "MAX_FILE_BYTES", 2**10)
    with pytest.raises(ValueError, match="The file is larger than"):
        fitted(grey, str(tmp_path / "whole.png"), "white")


def test_a_model_of_oblong_images_takes_none(tiny_unet, tiny_scheduler, tmp_path):
    oblong = Model(DDPMPaperPipeline(tiny_unet(sample_size=(8, 16)), tiny_scheduler()), 256)
    with pytest.raises(ValueError, match="This model draws 16 x 8; only squares"):
        fitted(oblong, saved(tmp_path, Image.new("RGB", (20, 20))), "white")


def test_animations_are_told_from_still_images(tmp_path):
    frames = [Image.new("L", (20, 20), shade) for shade in (0, 255)]
    assert demo_tasks.is_animated(saved(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:]))
    assert not demo_tasks.is_animated(saved(tmp_path, frames[0], "y.gif"))


def test_a_class_called_any_hides_nothing(tiny_unet, tiny_scheduler):
    unet = tiny_unet(num_class_embeds=3, null_class=2)
    model = Model(DDPMPaperPipeline(unet, tiny_scheduler(), {0: "any", 1: "cat"}), 256)
    assert model.classes == {"any class": None, "any": 0, "cat": 1}
