"""`ddpm-hf demo`: what its page computes, the page in a browser, and the Space that it writes."""

import html
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageDraw
from playwright.sync_api import Page as Tab, expect, sync_playwright

from ddpm_hf import DDPMPaperPipeline, figures
from ddpm_hf.cli.arguments import SCHEDULERS, parse_seeds
from ddpm_hf.cli.commands import main
from ddpm_hf.data import to_model_range
from ddpm_hf.demo import Page, load, tasks as demo_tasks
from ddpm_hf.demo.page import ONE_IN, frames_html, picture_html
from ddpm_hf.demo.tasks import Frame, Model, fitted, seeds_in, whole
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.pictures import as_pictures, image_grid
from ddpm_hf.pipeline_ddpm_paper import seeded_generators

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "model_cards" / "ddpm-digits"
expect.set_options(timeout=60_000)


def ignored(done: float) -> None:
    assert 0 < done <= 1


@pytest.fixture(scope="module")
def checkpoints(tiny_unet, tiny_mlp, tiny_scheduler, tmp_path_factory) -> Path:
    """A folder of three checkpoints with ten timesteps: `grey`, `colour` and `points`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    DDPMPaperPipeline(tiny_unet(in_channels=1, out_channels=1), tiny_scheduler()).save_pretrained(folder / "grey")
    DDPMPaperPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(folder / "colour")
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained(folder / "points")
    return folder


@pytest.fixture(scope="module")
def grey(checkpoints) -> Model:
    return load([str(checkpoints / "grey")], "cpu")["grey"]


@pytest.fixture(scope="module")
def colour(checkpoints) -> Model:
    return load([str(checkpoints / "colour")], "cpu")["colour"]


def same(picture: Image.Image, other: Image.Image) -> bool:
    return np.array_equal(np.asarray(picture), np.asarray(other))


def enlarged(images: torch.Tensor) -> list[Image.Image]:
    return [image_grid([picture], min_side=128) for picture in as_pictures(images)]


def some_levels(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.num_levels, model.pipe.sample_shape, generator=generator, dtype=torch.uint8)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_load_names_models_by_their_folders_and_knows_their_levels(checkpoints):
    models = load([str(checkpoints / "colour"), str(DIGITS)], "cpu")
    assert list(models) == ["colour", "ddpm-digits"]
    assert [model.num_levels for model in models.values()] == [256, 17]
    assert [model.num_timesteps for model in models.values()] == [10, 1000]
    assert {type(model.pipe.unet).__name__ for model in models.values()} == {"FastUNet"}


@pytest.mark.parametrize(("options", "levels"), [("dataset_name: digits", 17), ("dataset_name: null", 256)])
def test_levels_follow_the_options_of_the_run(checkpoints, tmp_path, options, levels):
    (tmp_path / "options.yaml").write_text(options)
    assert demo_tasks.num_levels(str(tmp_path), (1, 8, 8)) == levels


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


@pytest.mark.parametrize("steps", [1, 24, 25, 26, 50, 100])
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


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_what_the_command_draws(grey, checkpoints, tmp_path, scheduler):
    drawn = demo_tasks.sample(grey, seeds=[3, 4], steps=5, scheduler=SCHEDULERS[scheduler], report=ignored)
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
def test_noise_and_back_is_an_interpolation_that_stays_where_it_is(grey, t, steps, taken):
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
def test_progress_is_reported_to_the_end_and_what_it_raises_ends_the_work(grey, i):
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


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **kwargs: Any) -> str:
    image.save(tmp_path / name, **kwargs)
    return str(tmp_path / name)


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


# ---- the page without a browser ------------------------------------------------------------------------------------


def page_of(models: dict[str, Model], max_seconds: float = 60) -> Page:
    return Page(models, parse_seeds=parse_seeds, schedulers=SCHEDULERS, max_seconds=max_seconds)


def test_frames_are_all_there_and_one_is_shown():
    blank = Image.new("L", (8, 8))
    text = frames_html([Frame(t, blank, blank) for t in (10, 6, 3, 0)], shown=2)
    assert re.findall(r'data-t="(\d+)"( hidden)?>', text) == [
        ("10", " hidden"),
        ("6", ""),
        ("3", " hidden"),
        ("0", " hidden"),
    ]


def test_captions_are_escaped_and_large_pictures_made_smaller():
    text = picture_html(Image.new("RGB", (2000, 1000)), '"><script>')
    assert "<script>" not in text and html.escape('"><script>') in text and "image/webp" in text
    assert len(text) < 10_000


def test_mistakes_become_messages_and_leave_nothing_running(grey):
    page = page_of({"grey": grey})

    def refuse(*_: Any) -> None:
        assert list(page.running) == ["visitor"]
        raise ValueError("t < 3 & 'so' on")

    def exhaust(*_: Any) -> None:
        raise MemoryError

    for work, message in ((refuse, html.escape("t < 3 & 'so' on")), (exhaust, "not enough memory")):
        with pytest.raises(gradio.Error) as refused:
            page._answer(work, ("grey",), "visitor", ignored)
        assert message in refused.value.message and not refused.value.print_exception
        assert not page.running


def test_work_ends_when_it_is_stopped_or_takes_too_long(grey):
    page = page_of({"grey": grey})

    def stopped(report: Callable[[float], None], model: Model) -> None:
        report(0.5)
        page.running["visitor"].set()
        report(0.6)
        pytest.fail("it went on")

    with pytest.raises(gradio.Error) as ended:
        page._answer(stopped, ("grey",), "visitor", ignored)
    assert not ended.value.visible and not page.running
    with pytest.raises(gradio.Error, match="Stopped after 1e-09 seconds: ask for fewer"):
        page_of({"grey": grey}, 1e-9)._answer(lambda report, _: report(0.5), ("grey",), "visitor", ignored)


def test_works_never_overlap(grey):
    """A stopped one may still be at its last step when gradio starts the next: its hook must not see that one's."""
    page, goes_on, started = page_of({"grey": grey}), threading.Event(), []

    def work(report: Callable[[float], None], model: Model, name: str) -> str:
        started.append(name)
        assert goes_on.wait(60)
        return name

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(page._answer, work, ("grey", "a"), "a", ignored)
        while not started:
            time.sleep(0.01)
        second = pool.submit(page._answer, work, ("grey", "b"), "b", ignored)
        time.sleep(0.3)
        assert started == ["a"] and list(page.running) == ["a"]
        goes_on.set()
        assert (first.result(60), second.result(60)) == ("a", "b")
    assert started == ["a", "b"] and not page.running


def test_visitors_choose_among_the_checkpoints_that_were_named_and_reach_nothing_else(grey, colour):
    page = page_of({"grey": grey, "colour": colour}).build()
    config = page.get_config_file()
    (checkpoint,) = [c["props"] for c in config["components"] if c["props"].get("label") == "Checkpoint"]
    assert [value for _, value in checkpoint["choices"]] == ["grey", "colour"]
    assert not checkpoint["allow_custom_value"]
    assert {dependency["api_visibility"] for dependency in config["dependencies"]} == {"private"}
    heavy = [fn for fn in page.fns.values() if fn.concurrency_id == "model"]
    assert len(heavy) == 4 and {fn.concurrency_limit for fn in heavy} == {1}
    assert not page.analytics_enabled and not list((ROOT / "ddpm_hf").rglob("*.pyi"))


def test_sliders_follow_the_checkpoint(grey):
    digits = load([str(DIGITS)], "cpu")["ddpm-digits"]
    page = page_of({"digits": digits, "grey": grey})
    page.build()
    updates = page._limits("grey")
    assert [(u["minimum"], u["maximum"], u["value"]) for u in updates[:3]] == [(1, 10, 10)] * 3
    assert [(u["minimum"], u["maximum"], u["step"]) for u in updates[3:]] == [(0, 10, 1), (1, 10, 1)]
    assert all(u["minimum"] < u["value"] < u["maximum"] for u in updates[3:])


def test_the_number_of_terms_is_never_none(grey):
    for one_in in ONE_IN.values():
        assert np.isfinite(demo_tasks.bound(grey, some_levels(grey), one_in=one_in, seed=0, report=ignored).total)


# ---- the command ---------------------------------------------------------------------------------------------------


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    line = ended.value.code
    assert isinstance(line, str) and line.startswith("ddpm-hf: ") and "\n" not in line
    return line


def test_refused_commands(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey = str(checkpoints / "grey")
    assert "there is no model_cards/ddpm-digits here; name a training run" in refused()
    assert "draws points" in refused(str(checkpoints / "points"))
    assert "--port 0 must lie in [1, 65535]" in refused(grey, "--port", "0")
    assert "--max_seconds 0 must be above 0" in refused(grey, "--max_seconds", "0")
    assert "exists; give a new or an empty folder" in refused(grey, "--space", str(checkpoints))
    assert "draws points" in refused(str(checkpoints / "points"), "--space", "space")
    assert not list(tmp_path.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is taken" in refused(grey, "--port", port)


def test_a_missing_package_is_named(checkpoints, monkeypatch):
    monkeypatch.delitem(sys.modules, "ddpm_hf.demo.page")
    monkeypatch.delattr("ddpm_hf.demo.page")
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    assert refused(str(checkpoints / "grey")) == "ddpm-hf: gradio is not installed: pip install 'ddpm_hf[demo]'"


def test_gradio_is_loaded_by_the_page_alone():
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "ddpm_hf").rglob("*.py")}
    assert {name for name, text in sources.items() if re.search(r"^\s*(import|from) gradio", text, re.M)} == {
        "demo_page.py"
    }
    lines = [line for text in sources.values() for line in re.findall(r".*import.*", text) if "demo_page" in line]
    assert lines == ["        from .demo_page import Page, launch"]  # indented: where the command runs


# ---- as a Space ----------------------------------------------------------------------------------------------------


def test_a_space_holds_all_it_needs(checkpoints, tmp_path, capsys):
    space = tmp_path / "space"
    main(["demo", str(DIGITS), str(checkpoints / "colour"), "--space", str(space)])
    assert capsys.readouterr().out.startswith(f"{space} is a Space of {DIGITS} and ")
    assert {path.name for path in space.iterdir()} == {
        *("app.py", "requirements.txt", "README.md", "ddpm_hf", "checkpoints")
    }
    sources = {path.relative_to(ROOT) for path in (ROOT / "ddpm_hf").rglob("*.py")}
    for path in (*sources, Path("ddpm_hf/hub/card_template.md")):
        assert (space / path).read_bytes() == (ROOT / path).read_bytes()
    assert not list(space.rglob("__pycache__")) and not list(space.rglob("*.pyi"))
    header = (space / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert f"sdk: gradio\nsdk_version: {importlib.metadata.version('gradio')}\napp_file: app.py\n" in header
    names = [re.split(r"[<>=~]", line)[0] for line in (space / "requirements.txt").read_text().splitlines()]
    assert {"torch", "diffusers", "safetensors", "matplotlib"} <= set(names) and "gradio" not in names
    assert not {"pytest", "playwright", "ddpm_hf[train]"} & set(names) and len(names) == len(set(names))
    before = load([str(DIGITS), str(checkpoints / "colour")], "cpu")
    after = load([str(space / "checkpoints" / name) for name in before], "cpu")
    for name, model in after.items():
        assert model.num_levels == before[name].num_levels
        images = [m.pipe(seeds=[1], num_inference_steps=5, output_type="np").images for m in (model, before[name])]
        assert np.array_equal(*images)
    for text in ("options.yaml", "model_index.json"):
        assert str(ROOT) not in (space / "checkpoints" / "ddpm-digits" / text).read_text()


# ---- in a browser --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def served(command: list[str], log: Path, port: int, **kwargs: Any) -> Iterator[str]:
    """The address of a page in a process of its own, which must end quietly at Ctrl-C."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(log.parent / "gradio"), **kwargs.pop("env", {})}
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=output, env=environment, start_new_session=True, **kwargs
        )
        try:
            deadline = time.monotonic() + 180
            while "until Ctrl-C" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
            yield url
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert not [path for path in (log.parent / "gradio").rglob("*") if path.is_file()]  # visitors' images
            raised = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", log.read_text(), re.MULTILINE)
            assert not [line for line in raised if not line.startswith("gradio.exceptions.")]  # its own refusals
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def address(checkpoints, tmp_path_factory) -> Iterator[str]:
    """A page with the digits and a model of colour images."""
    port = free_port()
    command = ["-m", "ddpm_hf.cli", "demo", str(DIGITS), str(checkpoints / "colour"), "--port", str(port)]
    log = tmp_path_factory.mktemp("served") / "log"
    with served([*command, "--device", "cpu"], log, port, cwd=ROOT) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        reason = "there is no chromium: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A tab on the page. When it closes: no errors in the console, and nothing was asked of anybody else."""

    def __init__(self, browser: Any, url: str, width: int):
        self.tab: Tab = browser.new_page(viewport={"width": width, "height": 800})
        self.tab.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("websocket", lambda socket: self.requests.append(socket.url))
        self.tab.goto(url)
        expect(self.button("Draw samples")).to_be_visible(timeout=60_000)

    def button(self, name: str) -> Any:
        return self.tab.get_by_role("button", name=name, exact=True)

    def open(self, name: str) -> None:
        self.tab.get_by_role("tab", name=name, exact=True).click()
        expect(self.tab.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")

    @property
    def panel(self) -> Any:
        return self.tab.locator("[role=tabpanel]").locator("visible=true")

    def number(self, name: str, value: int) -> None:
        field = self.panel.get_by_role("spinbutton", name=f"number input for {name}")
        field.fill(str(value))
        field.press("Tab")

    def text(self, name: str, value: str) -> None:
        self.panel.get_by_role("textbox", name=name).fill(value)

    def drop(self, path: str | Path) -> None:
        self.panel.locator("input[type=file]").first.set_input_files(str(path))
        expect(self.panel.get_by_role("button", name="Remove Image")).to_be_visible()

    def figure(self, caption: str | re.Pattern[str]) -> Any:
        return self.panel.get_by_role("figure", name=caption)

    def expect_message(self, text: str) -> None:
        toast = self.tab.get_by_test_id("toast-body").filter(has_text=text)
        expect(toast).to_be_visible()
        assert "Traceback" not in toast.inner_text() and "/tmp" not in toast.inner_text()
        toast.get_by_test_id("toast-close").click()
        expect(toast).to_be_hidden()

    def check(self) -> None:
        outside = [url for url in self.requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
        assert not self.errors and not outside and len(self.requests) > 10


@pytest.fixture
def visit(browser, address) -> Iterator[Callable[..., Visit]]:
    visits = []

    def start(width: int = 1280) -> Visit:
        visits.append(Visit(browser, address, width))
        return visits[-1]

    yield start
    for visited in visits:
        visited.tab.close()
        visited.check()


@pytest.fixture
def zero(tmp_path) -> Path:
    """A photograph of a nought, white on black."""
    image = Image.new("RGB", (200, 260))
    ImageDraw.Draw(image).ellipse((50, 80, 150, 200), outline="white", width=26)
    image.save(tmp_path / "zero.png")
    return tmp_path / "zero.png"


def is_small(length: float) -> bool:
    """Too small for an image on a wide screen."""
    return length < 120


def draw_few(page: Visit) -> None:
    page.text("Seeds", "0-3")
    page.number("Steps", 40)
    page.button("Draw samples").click()
    expect(page.panel.get_by_role("img", name="One sample per seed")).to_be_visible()
    expect(page.figure(re.compile(r"x_t at t = \d+"))).to_be_visible()


@pytest.mark.slow
def test_sampling_and_the_slider_over_t(visit):
    page = visit()
    draw_few(page)
    assert page.panel.get_by_role("figure").count() == 2  # x_t and x̂_0
    picture = page.figure(re.compile("x_t at")).get_by_role("img")
    asked = len(page.requests)
    slider = page.panel.get_by_role("slider", name="range slider for Moment")
    expect(slider).to_have_attribute("max", "26")
    slider.focus()
    slider.press("Home")
    seen, times = [], []
    for _ in range(26):  # every stop of the slider is a moment of its own
        page.tab.wait_for_timeout(100)
        assert page.panel.get_by_role("figure").count() == 2
        seen.append(picture.get_attribute("src"))
        times.append(int(str(picture.get_attribute("alt")).removeprefix("x_t at t = ")))
        slider.press("ArrowRight")
    assert len(set(seen)) == 26 and times == sorted(set(times), reverse=True) and times[-1] == 0
    assert len([url for url in page.requests[asked:] if not url.startswith("data:")]) == 0  # nothing was recomputed
    page.tab.get_by_role("combobox", name="Scheduler").click()
    page.tab.get_by_role("option", name="ddim").click()
    page.button("Draw samples").click()
    expect(page.figure("x_t at t = 0").get_by_role("img")).not_to_have_attribute("src", str(seen[-1]))
    page.number("Steps", 5)  # fewer moments: the slider ends earlier, and stays on the last
    page.button("Draw samples").click()
    expect(slider).to_have_attribute("max", "6")
    expect(page.panel.get_by_role("spinbutton", name="number input for Moment")).to_have_value("6")
    expect(page.figure("x_t at t = 0")).to_be_visible()
    slider.press("ArrowLeft")
    expect(page.figure("x_t at t = 0")).to_be_hidden()
    expect(page.figure(re.compile("x_t at"))).to_be_visible()


@pytest.mark.slow
def test_interpolation(visit):
    page = visit()
    page.open("Interpolate")
    page.number("Steps", 40)
    page.text("Two seeds", "3,4")
    page.button("Interpolate").click()
    expect(page.figure("λ = 0.125")).to_be_visible()
    assert page.panel.get_by_role("figure").count() == 11
    boxes = [image.bounding_box() for image in page.panel.get_by_role("figure").get_by_role("img").all()]
    assert not [box for box in boxes if is_small(box["width"]) or is_small(box["height"])]
    assert len({box["y"] for box in boxes}) == 2  # the nine in one row
    for text, message in (("3", "Two seeds: give two"), ("2,3", "Seed of the noise: give another than 2")):
        page.text("Two seeds", text)
        page.button("Interpolate").click()
        page.expect_message(message)


@pytest.mark.slow
def test_noise_and_back(visit, zero):
    page = visit()
    page.open("Noise")
    page.drop(zero)
    page.number("Steps", 100)
    page.number("t", 100)
    page.button("Diffuse and denoise").click()
    expect(page.figure("seed 3")).to_have_count(2)
    expect(page.figure("as the network is given it")).to_be_visible()
    expect(page.panel.get_by_role("heading", name="x_t, t = 101")).to_be_visible()


@pytest.mark.slow
def test_bits(visit, zero):
    page = visit()
    page.open("Bits")
    page.drop(zero)
    totals = []
    for terms in ("1 in 40", "all"):
        page.panel.get_by_role("radio", name=terms, exact=True).check()
        page.button("Measure").click()
        expect(page.panel.get_by_text("on 17 levels per pixel")).to_contain_text(terms.replace("all", "every term"))
        totals.append(page.panel.get_by_role("row", name="total").get_by_role("cell").inner_text())
    assert all(re.fullmatch(r"[1-9]\.\d\d", total) for total in totals) and totals[0] != totals[1]
    expect(page.figure("Bits/dim of each term over t, both axes logarithmic")).to_be_visible()


@pytest.mark.slow
def test_a_dropped_image_is_large_enough_to_see_however_small_it_is(visit, zero, tmp_path):
    page = visit()
    page.open("Noise")
    shown = page.panel.locator("img").first
    (tmp_path / "broken.png").write_text("no image")
    for path, look, rendering in (
        (Path(saved(tmp_path, Image.new("L", (8, 8)), "tiny.png")), "small", "pixelated"),
        (zero, "large", "auto"),
        (tmp_path / "broken.png", "broken", "auto"),
    ):
        page.drop(path)
        expect(page.panel.locator("img").first).to_have_attribute("data-look", look)
        assert shown.evaluate("image => getComputedStyle(image).imageRendering") == rendering
        if look == "broken":  # no icon of a broken image
            expect(shown).to_be_hidden()
        else:
            assert not is_small(shown.bounding_box()["height"])
        page.panel.get_by_role("button", name="Remove Image").click()


@pytest.mark.slow
def test_another_checkpoint(visit, zero):
    page = visit()
    checkpoint = page.tab.get_by_role("combobox", name="Checkpoint")
    checkpoint.click()
    expect(page.tab.get_by_role("option")).to_have_text([re.compile("ddpm-digits"), re.compile("colour")])
    page.tab.get_by_role("option", name="colour").click()
    steps = page.panel.get_by_role("slider", name="range slider for Steps")
    expect(steps).to_have_attribute("max", "10")
    page.button("Draw samples").click()
    expect(page.figure(re.compile("x_t at"))).to_be_visible()
    page.open("Bits")
    page.drop(zero)
    page.button("Measure").click()
    expect(page.panel.get_by_text("on 256 levels per pixel")).to_be_visible()


def tab_to(page: Visit, role: str, name: str, *, at_most: int = 40) -> None:
    """Press Tab until the focus is there."""
    target = page.tab.get_by_role(role, name=name).locator("visible=true").first
    for _ in range(at_most):
        page.tab.keyboard.press("Tab")
        if target.evaluate("element => element === document.activeElement"):
            return
    pytest.fail(f"{name} is not reached by Tab")


@pytest.mark.slow
def test_with_the_keyboard_alone(visit, zero):
    page = visit()
    keyboard = page.tab.keyboard
    tab_to(page, "textbox", "Seeds")
    keyboard.press("Control+a")
    keyboard.type("5,6")
    tab_to(page, "slider", "range slider for Steps")
    keyboard.press("Home")
    keyboard.press("ArrowRight")
    tab_to(page, "button", "Draw samples")
    keyboard.press("Enter")
    tab_to(page, "slider", "range slider for Moment")
    expect(page.figure(re.compile("x_t at"))).to_be_visible()
    keyboard.press("End")
    expect(page.figure("x_t at t = 0")).to_be_visible()

    page = visit()
    keyboard = page.tab.keyboard
    tab_to(page, "tab", "Noise")
    keyboard.press("Enter")
    expect(page.button("Diffuse and denoise")).to_be_visible()
    tab_to(page, "button", "Drop an image file here to upload")
    choosers: list[Any] = []
    page.tab.on("filechooser", lambda chooser: choosers.append(chooser))
    for _ in range(20):  # on a busy machine the page may not listen yet
        keyboard.press("Enter")
        page.tab.wait_for_timeout(1000)
        if choosers:
            break
    choosers[0].set_files(str(zero))
    expect(page.panel.get_by_role("button", name="Remove Image")).to_be_visible()
    tab_to(page, "slider", "range slider for t")
    keyboard.press("Home")
    tab_to(page, "button", "Diffuse and denoise")
    keyboard.press("Space")
    expect(page.figure("seed 3")).to_have_count(2)


@pytest.mark.slow
def test_on_a_narrow_screen(visit, zero):
    page = visit(375)

    def check_width() -> None:
        page.tab.wait_for_timeout(500)
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= 375
        for element in page.panel.locator("button, input, img, table").all():
            box = element.bounding_box()
            assert box is None or element.is_hidden() or box["x"] + box["width"] <= 376, element.inner_html()

    for name in ("Sample", "Interpolate", "Noise", "Bits"):  # none of them behind a menu
        assert page.tab.get_by_role("tab", name=name, exact=True).is_visible()
    draw_few(page)
    check_width()
    grid, box = page.tab.locator("#samples img").bounding_box(), page.tab.locator("#samples").bounding_box()
    assert grid["width"] > 280 and 0 <= box["height"] - grid["height"] < 10
    for name, button, caption in (
        ("Interpolate", "Interpolate", "λ = 1"),
        ("Noise", "Diffuse and denoise", "seed 3"),
        ("Bits", "Measure", "x_0, as the network is given it"),
    ):
        page.open(name)
        if name != "Interpolate":
            page.drop(zero)
        page.button(button).click()
        expect(page.panel.get_by_role("figure", name=caption, exact=True).first).to_be_visible()
        check_width()


@pytest.mark.slow
def test_seeds_and_steps_that_are_refused(visit):
    page = visit()
    for text, message in (
        ("one", "Seeds: 'one' is neither a seed nor a range such as 0-15"),
        ("0-64", "Seeds: give at most 64"),
        ("", "is neither a seed"),
        ("<b>1</b>", "Seeds: '<b>1</b>' is neither a seed"),
        ("4294967296", "seeds lie in"),
    ):
        page.text("Seeds", text)
        page.button("Draw samples").click()
        page.expect_message(message)
    page.panel.get_by_role("textbox", name="Seeds").press("Enter")
    page.expect_message("seeds lie in")
    draw_few(page)


@pytest.mark.slow
def test_files_that_are_no_images_get_a_message(visit, zero, tmp_path):
    page = visit()
    page.open("Noise")
    page.button("Diffuse and denoise").click()
    page.expect_message("Drop an image first")
    (tmp_path / "text.png").write_text("no image")
    saved(tmp_path, Image.effect_noise((200, 200), 50), "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    saved(tmp_path, Image.new("1", (9000, 9000)), "huge.png")
    (tmp_path / "x.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'></svg>")
    for name, message in (
        ("text.png", "no readable image header"),
        ("cut.png", "cannot be decoded"),
        ("huge.png", "9000 x 9000 is more than 50,000,000 pixels"),
        ("x.svg", "no readable image header"),
    ):
        page.drop(tmp_path / name)
        page.button("Diffuse and denoise").click()
        page.expect_message(message)
        page.panel.get_by_role("button", name="Remove Image").click()
    (tmp_path / "notes.txt").write_text("no image")
    page.panel.locator("input[type=file]").first.set_input_files(str(tmp_path / "notes.txt"))
    page.expect_message("Invalid file type: notes.txt")
    assert not page.errors
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(demo_tasks.MAX_FILE_BYTES + 1)
    page.panel.locator("input[type=file]").first.set_input_files(str(tmp_path / "large.png"))
    page.expect_message('exceed the maximum allowed size of 20.0 Mb: "large.png"')
    page.errors.clear()  # the browser's own, about the upload that was refused
    page.number("Steps", 20)
    frames = [Image.new("L", (30, 30), shade) for shade in (0, 255)]
    page.drop(saved(tmp_path, frames[0], "moving.gif", save_all=True, append_images=frames[1:]))
    page.button("Diffuse and denoise").click()
    page.expect_message("the first frame is taken")
    expect(page.figure("seed 3")).to_have_count(2)


@pytest.mark.slow
def test_stop_frees_the_page_for_the_next(visit):
    page, other = visit(), visit()
    page.text("Seeds", "0-63")
    page.button("Draw samples").click()
    page.tab.wait_for_timeout(1500)
    expect(page.panel.get_by_text(re.compile(r"\d+\.\d%"))).to_be_visible()  # progress
    other.text("Seeds", "0")
    other.number("Steps", 20)
    other.button("Draw samples").click()
    page.button("Stop").click()
    expect(other.figure(re.compile("x_t at"))).to_be_visible()
    assert page.panel.get_by_role("img", name="One sample per seed").count() == 0
    page.number("Steps", 20)
    page.button("Draw samples").click()
    expect(page.figure(re.compile("x_t at"))).to_be_visible()


def asked(address: str, function: int, data: list[Any]) -> dict[str, Any]:
    """What the server answers to a request that no page of ours would make."""
    session = os.urandom(6).hex()
    body = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/queue/join?", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).read()
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60) as events:
        for line in events:
            message = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no answer")


@pytest.mark.slow
def test_no_other_checkpoints_or_files_can_be_asked_for(address, checkpoints):
    with urllib.request.urlopen(f"{address}/config", timeout=60) as response:
        config = json.load(response)
    labels = {component["id"]: component["props"].get("label") for component in config["components"]}
    functions = [
        (function["id"], [labels.get(i) for i in function["inputs"]])
        for function in config["dependencies"]
        if function["backend_fn"]
    ]
    (draw,) = (i for i, inputs in functions if "Scheduler" in inputs)
    (noise,) = (i for i, inputs in functions if "Image" in inputs and "Steps" in inputs)
    assert asked(address, draw, ["ddpm-digits", "0", 5, "ddpm", 1])["success"]
    for name in (str(checkpoints / "grey"), "google/ddpm-cifar10-32", "../colour"):
        answer = asked(address, draw, [name, "0", 5, "ddpm", 1])
        assert not answer["success"] and "not in the list of choices" in answer["output"]["error"]
    assert not asked(address, draw, ["ddpm-digits", "0", 10**9, "ddpm", 1])["success"]
    path = str(ROOT / "docs" / "pictures" / "digits.png")
    for image in ({"path": path}, {"path": path, "url": f"file://{path}"}, {"url": "http://127.0.0.1:9/x.png"}):
        image["meta"] = {"_type": "gradio.FileData"}
        answer = asked(address, noise, ["ddpm-digits", image, "white", "0", 5, 100])
        assert not answer["success"]
    assert asked(address, draw, ["ddpm-digits", "0", 5, "ddpm", 1])["success"]


@pytest.mark.slow
def test_a_space_runs_on_its_own_copy_of_the_package(tmp_path, browser):
    space = tmp_path / "space"
    main(["demo", str(DIGITS), "--space", str(space)])
    log, port = tmp_path / "log", free_port()
    env = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with served(["-v", str(space / "app.py")], log, port, cwd=tmp_path, env=env) as url:
        page = Visit(browser, url, 1280)
        draw_few(page)
        page.tab.close()
        page.check()
    imported = log.read_text()
    assert f"{space}/ddpm_hf/__pycache__/demo_page" in imported or f"{space}/ddpm_hf/demo/page.py" in imported
    assert f"{ROOT}/ddpm_hf/" not in imported
