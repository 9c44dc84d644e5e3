"""`ddpm-hf draw`, on small checkpoints: what it writes, and how it ends when something is wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from ddpm_hf import DDPMPaperPipeline, figures, likelihood, pictures
from ddpm_hf.cli import main
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.figures import unit_range
from ddpm_hf.pictures import captioned, image_grid, labelled_grid

WEIGHTS = [str(i / 10) for i in range(11)]


@pytest.fixture
def photos(tmp_path) -> str:
    """A folder of three photographs, larger than the model's images."""
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for i in range(3):
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return str(tmp_path / "photos")


def pipeline(checkpoint: str) -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(tmp_path: Path, *arguments: str) -> np.ndarray:
    output = tmp_path / "drawn" / "x.png"
    main(["draw", *arguments, "-o", str(output)])
    with Image.open(output) as picture:
        return np.asarray(picture.convert("RGB"))


def grid(rows: torch.Tensor, row_labels: list[str], column_labels: list[str], corner: str = "") -> np.ndarray:
    cells = [pictures.as_pictures(row) for row in rows]
    return np.asarray(labelled_grid(cells, row_labels=row_labels, column_labels=column_labels, corner=corner))


def digits(indices: list[int], split: str) -> torch.Tensor:
    return to_model_range(load_samples("digits", split=split).batch(indices), 17)


def numbers_of(figure: Figure) -> Image.Image:
    """What a figure shows, as a picture of bytes: drawing it would take longer than computing it."""
    parts = [line.get_xydata() for axes in figure.axes for line in axes.lines]
    for collection in (collection for axes in figure.axes for collection in axes.collections):
        parts += [collection.get_offsets(), *(vars(collection).get(name, np.zeros(0)) for name in "UV")]
    labels = [(axes.get_xlabel(), axes.get_ylabel(), axes.get_title(), axes.get_xlim()) for axes in figure.axes]
    data = b"".join(np.asarray(part, dtype=float).tobytes() for part in parts) + repr(labels).encode()
    return Image.frombytes("L", (len(data), 1), data)


@pytest.fixture
def figures_of_numbers(monkeypatch) -> None:
    monkeypatch.setattr(pictures, "drawn", numbers_of)


# ---- what it writes ------------------------------------------------------------------------------------------------


def test_progressive(images, tmp_path, capsys):
    found = drawn(tmp_path, "progressive", images, "--seeds", "3,1")
    assert capsys.readouterr().out == f"progressive in {tmp_path / 'drawn' / 'x.png'}\n"
    numbers = list(range(1, 11))
    frames = figures.progressive_x_start(pipeline(images), seeds=[3, 1], after_steps=numbers)
    expected = grid(frames.transpose(0, 1), ["seed 3", "seed 1"], [str(n) for n in numbers], "steps")
    assert np.array_equal(found, expected)


def test_animation_of_the_progress_ends_with_the_samples(images, tmp_path):
    main(["draw", "progressive", images, "--seeds", "0-4", "--steps", "5", "-o", str(tmp_path / "x.gif")])
    with Image.open(tmp_path / "x.gif") as animation:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == 5
    samples = pipeline(images)(seeds=range(5), num_inference_steps=5).images
    assert np.array_equal(frames[-1], np.asarray(captioned(image_grid(samples), "5 of 5 steps")))


def test_shared(images, tmp_path):
    found = drawn(tmp_path, "shared", images, "--seeds", "4,0,1", "--steps", "5")
    pipe = pipeline(images)
    timesteps = figures.chain_timesteps(pipe, (1, 0.75, 0.5, 0.25), num_inference_steps=5)
    latents = figures.shared_latents(pipe, seed=4, seeds=[0, 1], timesteps=timesteps, num_inference_steps=5)
    expected = torch.cat([latents.x_t[:, None], latents.samples], dim=1)
    assert timesteps == [8, 6, 4, 2]
    assert np.array_equal(found, grid(expected, [f"{t + 1} steps" for t in timesteps], ["x_t", "seed 0", "seed 1"]))


@pytest.mark.parametrize(("options", "t", "steps"), [([], 4, None), (["--timestep", "2", "--steps", "5"], 2, 5)])
def test_interpolate(images, tmp_path, options, t, steps):
    found = drawn(
        tmp_path, "interpolate", images, "--seeds", "0,5", "--images", "7", "2", "--split", "train", *options
    )
    x = digits([7, 2], "train")
    between = figures.interpolation(
        pipeline(images), *x, t=t, weights=[i / 10 for i in range(11)], seeds=[0, 5], num_inference_steps=steps
    )
    ends = unit_range(x).expand(2, 2, 1, 8, 8)
    expected = torch.cat([ends[:, :1], between, ends[:, 1:]], dim=1)
    assert np.array_equal(found, grid(expected, ["seed 0", "seed 5"], ["no. 7", *WEIGHTS, "no. 2"]))


def test_interpolate_takes_the_nearest_timestep(images, tmp_path, capsys):
    """The chain of five steps has 0, 2, 4, 6 and 8."""
    words = ["interpolate", images, "--seeds", "0", "--steps", "5", "--timestep"]
    of_the_chain = drawn(tmp_path, *words, "2")
    assert "--timestep" not in capsys.readouterr().out
    for timestep, taken in (("3", "2"), ("9", "8")):
        found = drawn(tmp_path, *words, timestep)
        said, _ = capsys.readouterr().out.splitlines()
        assert said == f"--timestep {timestep} is not one of this chain's 5; {taken}, the nearest, is taken"
        assert np.array_equal(found, of_the_chain) == (taken == "2")


@pytest.mark.slow
def test_coarse_to_fine(images, tmp_path):
    found = drawn(tmp_path, "coarse_to_fine", images, "--seed", "3", "--steps", "5")
    x, pipe = digits([0, 1], "test"), pipeline(images)
    timesteps = figures.chain_timesteps(pipe, [i / 8 for i in range(8, -1, -1)], num_inference_steps=5)
    assert timesteps == [8, 6, 4, 2, 0, -1]
    weights = [i / 10 for i in range(11)]
    between = figures.coarse_to_fine(pipe, *x, timesteps=timesteps, weights=weights, seed=3, num_inference_steps=5)
    ends = unit_range(x).expand(len(timesteps), 2, 1, 8, 8)
    expected = torch.cat([ends[:, :1], between, ends[:, 1:]], dim=1)
    assert np.array_equal(found, grid(expected, [f"{t + 1} steps" for t in timesteps], ["no. 0", *WEIGHTS, "no. 1"]))


def test_nearest(images, tmp_path, capsys):
    found = drawn(tmp_path, "nearest", images, "--seeds", "0,1", "--steps", "5")
    real = load_samples("digits", split="train")
    samples = pipeline(images)(seeds=[0, 1], num_inference_steps=5, output_type="pt").images
    neighbours = figures.nearest_images(samples, real, k=8)
    others = unit_range(digits(neighbours.indices.flatten().tolist(), "train")).view(2, 8, 1, 8, 8)
    labels = ["sample", *(str(i) for i in range(1, 9))]
    assert np.array_equal(found, grid(torch.cat([samples[:, None], others], dim=1), ["seed 0", "seed 1"], labels))
    lines = capsys.readouterr().out.splitlines()
    for seed, line in enumerate(lines[:2]):
        index, distance = int(neighbours.indices[seed, 0]), float(neighbours.distances[seed, 0])
        assert line == f"seed {seed}: nearest is image {index} of digits, at distance {distance:.3f}"


def test_nearest_of_a_folder_of_few_photographs(colour, photos, tmp_path):
    found = drawn(tmp_path, "nearest", colour, "--seeds", "0", "--dataset", photos)
    real = load_samples(train_data_dir=photos, resolution=8)
    samples = pipeline(colour)(seeds=[0], output_type="pt").images
    order = figures.nearest_images(samples, real, k=3).indices[0]
    images = torch.cat([samples, unit_range(to_model_range(real.batch(order), 256))])
    assert np.array_equal(found, grid(images[None], ["seed 0"], ["sample", "1", "2", "3"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["interpolate", "coarse_to_fine", "nearest", "rate_distortion"])
def test_bad_images_of_a_folder_may_be_left_out(colour, photos, tmp_path, caplog, figures_of_numbers, kind):
    (Path(photos) / "1.png").write_bytes(b"no image")
    words = [kind, colour, "--dataset", photos, "--steps", "1"]
    with pytest.raises(SystemExit, match=r"1\.png: .*skip_bad_images=0 allows no more"):
        drawn(tmp_path, *words)
    found = drawn(tmp_path, *words, "--skip_bad_images", "1")
    assert "photos: 1 bad images left out: " in caplog.text
    (Path(photos) / "1.png").unlink()
    assert np.array_equal(found, drawn(tmp_path, *words))


def test_rate_distortion(images, tmp_path, capsys, figures_of_numbers):
    found = drawn(tmp_path, "rate_distortion", images, "--num_images", "3", "--seed", "2", "--steps", "5")
    pipe = pipeline(images)
    terms = likelihood.bits_per_dim(
        pipe.unet, pipe.scheduler, digits([0, 1, 2], "test"), seed=2, num_levels=17, num_inference_steps=5
    )
    expected = pictures.rate_distortion_plot(likelihood.rate_distortion(terms))
    assert np.array_equal(found, np.asarray(expected.convert("RGB")))
    assert capsys.readouterr().out.startswith(f"3 images of digits: {terms.total_b.mean():.3f} bits/dim\n")


def test_points(points, tmp_path, figures_of_numbers):
    found = drawn(tmp_path, "points", points, "--seeds", "5-24", "--dataset", "moons", "--steps", "5")
    data = load_samples("moons", split="test").batch(range(20))
    pipe = pipeline(points)
    timesteps = figures.chain_timesteps(pipe, (0, 0.03, 0.15, 1), num_inference_steps=5)
    expected = pictures.point_process_plot(
        figures.point_process(pipe, data, seeds=range(5, 25), timesteps=timesteps, num_inference_steps=5)
    )
    assert np.array_equal(found, np.asarray(expected.convert("RGB")))


# ---- how it ends when something is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shared", "-o", "x.gif"], "--output x.gif: give a .png"),
        (["progressive", "-o", "x.jpg"], "--output x.jpg: give a .png or a .gif"),
        (["progressive", "--steps", "11"], "num_inference_steps=11 "),
        (["shared", "--seeds", "3"], "seeds=[] must be one or more"),
        (["interpolate", "--images", "0", "360"], "--images [0, 360]: digits has 0 to 359"),
        (["interpolate", "--images", "-1", "0"], "--images [-1, 0]: digits has 0 to 359"),
        (["interpolate", "--timestep", "10"], "--timestep 10 must lie in [0, 10)"),
        (["coarse_to_fine", "--seed", "-1"], "seeds must be integers in [0, 2**32), got -1"),
        (["nearest", "--split", "tets"], "split='tets'"),
        (["nearest", "--dataset", "moons"], "samples of shape"),
        (["rate_distortion", "--num_images", "0"], "--num_images 0 must be at least 1"),
        (["points", "--dataset", "moons"], "draw points is for points; "),
    ],
)
def test_refused_arguments(images, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["draw", arguments[0], images, *arguments[1:]])
    line = exit_info.value.code
    assert line.startswith("ddpm-hf: ") and message in line and "\n" not in line
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_do_not_fit(points, colour, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["progressive", points], f"draw progressive is for images; {points} draws points"),
        (["points", points], "--dataset is missing: name data of samples (2,)"),
        (["points", points, "--dataset", "moons", "--seeds", "0-10000"], "--seeds: got 10001; moons has 10000 points"),
        (["nearest", colour], "--dataset is missing: name data of samples (3, 8, 8)"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["draw", *arguments])
        line = exit_info.value.code
        assert line.startswith("ddpm-hf: ") and message in line and "\n" not in line
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(SystemExit) as exit_info:
        drawn(tmp_path, "rate_distortion", images, "--num_images", "1", "--steps", "1")
    assert exit_info.value.code == "ddpm-hf: matplotlib.figure is not installed; it comes with the extra `train`"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "KIND"),
        (["regressive"], "invalid choice: 'regressive'"),
        (["progressive"], "checkpoint"),
        (["progressive", "x", "--dataset", "digits"], "--dataset"),
        (["shared", "x", "--timestep", "3"], "--timestep"),
        (["coarse_to_fine", "x", "--seeds", "0-3"], "--seeds"),
        (["nearest", "x", "--images", "0", "1"], "--images"),
        (["points", "x", "--num_images", "3"], "--num_images"),
        (["points", "x", "--skip_bad_images", "1"], "--skip_bad_images"),
        (["shared", "x", "--skip_bad_images", "1"], "--skip_bad_images"),
        (["interpolate", "x", "--seeds", "5-2"], "'5-2' is neither a seed nor a range such as 0-15"),
        (["interpolate", "x", "--device", "abacus"], "'abacus' cannot be used here"),
    ],
)
def test_only_the_options_that_a_kind_uses_are_accepted(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["draw", *arguments])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err
