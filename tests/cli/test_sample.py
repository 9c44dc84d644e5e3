"""`ddpm-hf sample` and `env`, on small checkpoints: what they write, and how they end when something is wrong."""

import subprocess
import sys
from pathlib import Path

import fork_server
import numpy as np
import pytest
import torch
from custom_nets import OwnNet
from diffusers import DDIMScheduler
from PIL import Image

from ddpm_hf import DDPMPaperPipeline, pipeline_ddpm_paper
from ddpm_hf.cli import commands, main
from ddpm_hf.cli.arguments import SCHEDULERS
from ddpm_hf.inference import speed_up
from ddpm_hf.pictures import image_grid, point_density

ROOT = Path(__file__).parents[2]


def sampled(checkpoint: str, seeds: list[int], output_type: str = "np", **kwargs):
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    return pipe(seeds=seeds, output_type=output_type, **kwargs).images


# ---- what it writes ------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_grid_in_a_process_of_its_own(images, tmp_path):
    output = tmp_path / "new" / "grid.png"
    command = [sys.executable, "-m", "ddpm_hf.cli", "sample", images, "--seeds", "0-3,9", "-o", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"5 samples in {output}\n"
    expected = image_grid(sampled(images, [0, 1, 2, 3, 9], "pil"))
    with Image.open(output) as grid:
        assert grid.size == expected.size == (3 * 68, 2 * 68)  # each in a frame
        assert np.abs(np.asarray(grid).astype(int) - np.asarray(expected)).max() <= 1  # rounded from other threads


def test_folder_with_one_picture_per_seed(images, tmp_path, capsys):
    main(["sample", images, "--seeds", "7,3", "-o", str(tmp_path / "pictures")])
    assert capsys.readouterr().out == f"2 samples in {tmp_path / 'pictures'}\n"
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["seed-3.png", "seed-7.png"]
    for seed, expected in zip([7, 3], sampled(images, [7, 3], "pil"), strict=True):
        with Image.open(tmp_path / "pictures" / f"seed-{seed}.png") as picture:
            assert picture.mode == "L" and picture.tobytes() == expected.tobytes()


def test_one_step_at_t_0_is_named(images, tmp_path, caplog):
    pipeline_ddpm_paper._warn_once.cache_clear()
    for steps in ("1", "10"):
        main(["sample", images, "--steps", steps, "-o", str(tmp_path / "x.png")])
    (record,) = caplog.records
    assert "begins with noise at t = 0" in record.getMessage() and "timestep_spacing='trailing'" in record.getMessage()


@pytest.mark.parametrize(("size", "shape"), [("12x6", (12, 6)), ("16", (16, 16)), ("4×8", (4, 8)), ("8X8", (8, 8))])
def test_other_sizes(size, shape, images, tmp_path):
    for name, extra in (("plain", ["--no-fast"]), ("fast", ["--fast"])):
        main(["sample", images, "--seeds", "0-2", "--size", size, "-o", str(tmp_path / f"{name}.npy"), *extra])
    plain, fast = (np.load(tmp_path / f"{name}.npy") for name in ("plain", "fast"))
    assert plain.shape == (3, *shape, 1)
    pipe = DDPMPaperPipeline.from_pretrained(images)
    noise = torch.stack([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    drawn = torch.Generator().manual_seed(0)
    torch.randn(1, *shape, generator=drawn)  # as the seed's noise was drawn
    first = pipe(latents=noise[:1], generator=drawn, output_type="np").images
    np.testing.assert_allclose(plain[:1], first, atol=1e-5)
    np.testing.assert_allclose(fast, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpoint", "size", "message"),
    [
        ("images", "12x7", "sample_size=(12, 7) must be a side or (height, width) divisible by 2"),
        ("points", "12x6", "--size 12x6: the checkpoint is one of points"),
    ],
)
def test_sizes_that_cannot_be(checkpoint, size, message, request, tmp_path):
    folder = request.getfixturevalue(checkpoint)
    with pytest.raises(SystemExit) as ended:
        main(["sample", folder, "--size", size, "-o", str(tmp_path / "a.npy")])
    assert message in str(ended.value.code)


@pytest.mark.parametrize("size", ["0", "12x", "x", "1x2x3", "big", "-4", "99999999"])
def test_sizes_that_are_none(size, images, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sample", images, f"--size={size}"])
    assert ended.value.code == 2 and f"{size!r} is no size; give height x width" in capsys.readouterr().err


def test_own_networks_are_drawn_from_by_trust(tiny_scheduler, tmp_path, carried_code):
    DDPMPaperPipeline(OwnNet(), tiny_scheduler()).save_pretrained(tmp_path / "own")
    words = ["sample", str(tmp_path / "own"), "-o", str(tmp_path / "a.npy")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert "trust_remote_code=True, which runs unet/own_custom_nets.py" in str(ended.value.code)
    main([*words, "--trust_remote_code", "--size", "9x5"])
    assert np.load(tmp_path / "a.npy").shape == (1, 9, 5, 1)


def test_fast_draws_the_same(images, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(commands, "speed_up", lambda *args, **kw: made.append(speed_up(*args, **kw)) or made[-1])
    ways = {"plain": ["--no-fast"], "fast": ["--fast"], "default": [], "auto": ["--dtype", "auto"]}
    for name, extra in ways.items():
        main(["sample", images, "--seeds", "0-2", "-o", str(tmp_path / f"{name}.npy"), *extra])
    arrays = {name: np.load(tmp_path / f"{name}.npy") for name in ways}
    for array in arrays.values():
        np.testing.assert_allclose(array, arrays["plain"], atol=1e-5)
    assert np.array_equal(arrays["fast"], arrays["default"])
    assert len(made) == 3


@pytest.mark.parametrize("extra", [[], ["--dtype", "auto"]])
def test_what_cannot_be_sped_up_is_drawn_as_it_is(points, tmp_path, extra):
    main(["sample", points, "--seeds", "0-2", "-o", str(tmp_path / "points.npy"), *extra])
    assert np.load(tmp_path / "points.npy").shape == (3, 2)


def test_fast_is_for_images(points, tmp_path):
    with pytest.raises(SystemExit, match="only a DDPMPaperUNet can be sped up, not DDPMPaperMLP"):
        main(["sample", points, "--fast", "-o", str(tmp_path / "points.npy")])


@pytest.mark.slow
def test_arrays_do_not_depend_on_the_batch_size(images, tmp_path):
    for batch_size in ("1", "2", "64"):
        output = tmp_path / f"{batch_size}.npy"
        main(["sample", images, "--seeds", "0-4", "--batch_size", batch_size, "-o", str(output)])
        array = np.load(output)
        assert array.shape == (5, 8, 8, 1) and array.dtype == np.float32
        np.testing.assert_allclose(array, sampled(images, list(range(5))), atol=1e-5)


def test_points_as_an_array_and_as_a_density(points, tmp_path):
    main(["sample", points, "--seeds", "0-19", "-o", str(tmp_path / "points.npy")])
    array = np.load(tmp_path / "points.npy")
    np.testing.assert_allclose(array, sampled(points, list(range(20))), atol=1e-5)
    main(["sample", points, "--seeds", "0-19", "-o", str(tmp_path / "points.png")])
    with Image.open(tmp_path / "points.png") as picture:
        assert picture.size == (256, 256) and picture.tobytes() == point_density(array).tobytes()


def test_scheduler_and_steps(images, tmp_path):
    main(["sample", images, "--scheduler", "ddim", "--steps", "5", "-o", str(tmp_path / "ddim.npy")])
    pipe = DDPMPaperPipeline.from_pretrained(images)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(seeds=[0], num_inference_steps=5, output_type="np").images
    np.testing.assert_allclose(np.load(tmp_path / "ddim.npy"), expected, atol=1e-6)
    main(["sample", images, "--scheduler", "ddim_clipped", "--steps", "5", "-o", str(tmp_path / "clipped.npy")])
    clipped = pipe(seeds=[0], num_inference_steps=5, use_clipped_model_output=True, output_type="np").images
    np.testing.assert_allclose(np.load(tmp_path / "clipped.npy"), clipped, atol=1e-6)
    assert np.abs(clipped - expected).max() > 1e-3
    main(["sample", images, "--steps", "5", "-o", str(tmp_path / "ddpm.npy")])
    expected = sampled(images, [0], num_inference_steps=5)
    np.testing.assert_allclose(np.load(tmp_path / "ddpm.npy"), expected, atol=1e-6)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_that_is_offered_runs(points, tmp_path, scheduler):
    main(["sample", points, "--scheduler", scheduler, "--steps", "5", "--seeds", "0-9", "-o", str(tmp_path / "x.npy")])
    array = np.load(tmp_path / "x.npy")
    assert array.shape == (10, 2) and np.isfinite(array).all() and array.std() > 0


def test_dtype_of_the_network(images, tmp_path):
    main(["sample", images, "--dtype", "bfloat16", "-o", str(tmp_path / "x.npy")])
    difference = np.abs(np.load(tmp_path / "x.npy") - sampled(images, [0]))
    assert 0 < difference.mean() < 0.01  # rounded to 1/512 in every layer


@pytest.mark.filterwarnings("error::FutureWarning")
def test_uses_nothing_that_diffusers_is_about_to_remove(points, tmp_path):
    main(["sample", points, "-o", str(tmp_path / "x.npy")])


@pytest.mark.integration  # Python asks `uname` for the processor's name
def test_env_lists_versions_and_the_device(capsys):
    main(["env"])
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}\n" in text and "python 3." in text
    assert any(line.startswith("device ") for line in text.splitlines())


# ---- how it ends when something is wrong ---------------------------------------------------------------------------


@pytest.mark.integration
def test_mistakes_end_with_one_line_and_no_traceback(images, tmp_path):
    words = ["-m", "ddpm_hf.cli", "sample", images, "--steps", "0", "-o", tmp_path / "x.png"]
    done = fork_server.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith("ddpm-hf: num_inference_steps=0 ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "11"], "num_inference_steps=11 "),
        (["--steps", "0", "--scheduler", "ddim"], "num_inference_steps"),
        (["--steps", "11", "--scheduler", "heun"], "num_inference_steps"),
        (["--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["-o", "x.jpg"], "--output x.jpg: give a .png, a .npy, or for images a folder"),
    ],
)
def test_refused_arguments(images, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["sample", images, *arguments])
    line = exit_info.value.code  # a string: Python prints it to stderr and exits with 1
    assert line.startswith("ddpm-hf: ") and message in line and "\n" not in line
    assert not list(tmp_path.iterdir())


def test_refused_paths(points, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "empty").mkdir()
    for checkpoint, output, message in (
        (str(tmp_path / "missing"), "x.png", str(tmp_path / "missing")),
        (str(tmp_path / "empty"), "x.png", "model_index.json"),
        (points, str(tmp_path / "folder"), "give a .png, a .npy"),
        (points, str(tmp_path / "file" / "x.npy"), str(tmp_path / "file")),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["sample", checkpoint, "-o", output])
        line = exit_info.value.code
        assert line.startswith("ddpm-hf: ") and message in line and "\n" not in line
