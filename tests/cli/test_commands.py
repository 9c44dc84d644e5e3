"""`ddpm-hf`, on small checkpoints: what it writes, and how it ends when something is wrong."""

import argparse
import dataclasses
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from local_hub import LocalHub
from PIL import Image

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import commands as cli
from ddpm_hf.cli.arguments import SCHEDULERS, parse_seeds
from ddpm_hf.cli.commands import build_parser, main
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.evaluation import Protocol, evaluator as evaluation
from ddpm_hf.evaluation.paper_tables import TABLES, report
from ddpm_hf.inference import cpu as inference
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.pictures import image_grid, point_density
from ddpm_hf.runs import read_results
from ddpm_hf.short_chains import shortened

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tiny_unet, tiny_scheduler, tmp_path_factory) -> str:
    """The folder of a checkpoint that draws 8×8 greyscale images in ten steps."""
    folder = tmp_path_factory.mktemp("images")
    DDPMPaperPipeline(tiny_unet(in_channels=1, out_channels=1), tiny_scheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def points(tiny_mlp, tiny_scheduler, tmp_path_factory) -> str:
    """The folder of a checkpoint that draws points in the plane in ten steps."""
    folder = tmp_path_factory.mktemp("points")
    DDPMPaperPipeline(tiny_mlp(), tiny_scheduler()).save_pretrained(folder)
    return str(folder)


def sampled(checkpoint: str, seeds: list[int], output_type: str = "np", **kwargs):
    pipe = DDPMPaperPipeline.from_pretrained(checkpoint)
    return pipe(seeds=seeds, output_type=output_type, **kwargs).images


def ddpm_hf(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "ddpm_hf.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# ---- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("0", [0]),
        ("3-6", [3, 4, 5, 6]),
        ("5-5", [5]),
        ("0-2,20", [0, 1, 2, 20]),
        ("7, 2,7", [7, 2, 7]),
        ("4294967295", [2**32 - 1]),
    ],
)
def test_parse_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1.5", "-1", "3-", "-", "1-2-3", "6-3", "1,,2", "1,", "²"])
def test_parse_seeds_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is neither a seed nor a range such as 0-15"):
        parse_seeds(text)


# ---- what it writes ------------------------------------------------------------------------------------------------


def test_grid_in_a_process_of_its_own(images, tmp_path):
    output = tmp_path / "new" / "grid.png"
    done = ddpm_hf("sample", images, "--seeds", "0-3,9", "-o", str(output))
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


def test_fast_draws_the_same(images, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(cli, "speed_up", lambda *args: made.append(inference.speed_up(*args)) or made[-1])
    for name, extra in (("plain", []), ("fast", ["--fast"])):
        main(["sample", images, "--seeds", "0-2", "-o", str(tmp_path / f"{name}.npy"), *extra])
    plain, fast = (np.load(tmp_path / f"{name}.npy") for name in ("plain", "fast"))
    np.testing.assert_allclose(fast, plain, atol=1e-5)
    assert len(made) == 1


def test_fast_is_for_images(points, tmp_path):
    with pytest.raises(SystemExit, match="only a DDPMPaperUNet can be sped up, not DDPMPaperMLP"):
        main(["sample", points, "--fast", "-o", str(tmp_path / "points.npy")])


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


def test_env_lists_versions_and_the_device(capsys):
    main(["env"])
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}\n" in text and "python 3." in text
    assert any(line.startswith("device ") for line in text.splitlines())


# ---- how it ends when something is wrong ---------------------------------------------------------------------------


def test_mistakes_end_with_one_line_and_no_traceback(images, tmp_path):
    done = ddpm_hf("sample", images, "--steps", "0", "-o", str(tmp_path / "x.png"))
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", str(2**32)], "seeds lie in [0, 2**32)"),
        (["--seeds", "0-99999999999"], "seeds lie in [0, 2**32)"),
        (["--device", "abacus"], "'abacus' cannot be used here"),
    ],
)
def test_arguments_that_cannot_be_read(images, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["sample", images, *arguments])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["sample"], "checkpoint"),
        (["sample", "x", "--seeds", "5-2"], "'5-2' is neither a seed nor a range such as 0-15"),
        (["sample", "x", "--scheduler", "dimm"], "invalid choice: 'dimm'"),
        (["sample", "x", "--steps", "ten"], "invalid int value: 'ten'"),
    ],
)
def test_unreadable_arguments_end_with_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


# ---- a checkpoint that is not there --------------------------------------------------------------------------------

EVERY_COMMAND = {
    "sample": "sample {} -o new.png",
    "convert": "convert {} new",
    "convert to stock": "convert {} new --to stock",
    "evaluate": "evaluate {} --dataset digits --work_dir new",
    "shorten": "shorten {} new --dataset digits --work_dir new",
    "draw": "draw progressive {} -o new.png",
    "compress": "compress {} photo.png -o new",
    "decompress": "decompress {} compressed -o new",
}


@pytest.fixture
def runs(images, tmp_path, monkeypatch) -> Path:
    """The working folder, with the checkpoint `runs/digits` and an image; and no Hub that could be asked."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.model_info", refuse)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, tmp_path / "runs" / "digits")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "photo.png")
    return tmp_path


def refusal(line: str) -> str:
    """What `main` ends with, which is one line."""
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as exit_info:
        main(line.split())
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)
    message = exit_info.value.code  # a string: Python prints it to stderr and exits with 1
    assert isinstance(message, str) and message.startswith("ddpm-hf: ") and "\n" not in message
    return message.removeprefix("ddpm-hf: ")


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_a_slip_in_a_folders_name_is_told_by_every_command(runs, command):
    """With what it may have been, and without asking the Hub: `runs` is a folder here."""
    if command == "decompress":
        main(["compress", "runs/digits", "photo.png", "--steps", "2", "-o", "compressed"])
    before = sorted(runs.rglob("*"))
    message = refusal(EVERY_COMMAND[command].format("runs/digitz"))
    assert message == (
        f"there is no folder runs/digitz in {runs}; a repository of that name on the Hub is looked for only where "
        "there is no folder runs; did you mean runs/digits?"
    )
    assert sorted(runs.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("./runs/digitz", "runs/digits"),
        ("../{name}/runs/digit", "../{name}/runs/digits"),
        ("{here}/runs/digitz", "{here}/runs/digits"),
        ("./rnus/digits", "runs/digits"),
        ("./rnus/digitz", "runs/digits"),
        ("~/runs/digitz", "{here}/runs/digits"),
        ("~/runs/digits", "{here}/runs/digits"),
        ("runs/digits/checkpoints/step-4", None),
        ("runs/--", None),
        ("/nowhere/at/all", None),
    ],
)
def test_a_path_that_is_no_name_on_the_hub_is_not_looked_for_there(runs, monkeypatch, given, suggested):
    monkeypatch.setenv("HOME", str(runs))
    places = {"here": runs, "name": runs.name}
    given = given.format(**places)
    message = refusal(f"sample {given}")
    where = "" if given.startswith(("/", "~")) else f" in {runs}"
    hint = f"; did you mean {suggested.format(**places)}?" if suggested else ""
    assert message == f"there is no folder {given}{where}{hint}"


def test_a_file_in_place_of_a_checkpoint_is_told(runs):
    assert refusal("sample photo.png") == "photo.png is a file; give the folder of a checkpoint"


ON_THE_HUB = """
import sys

from huggingface_hub import close_session, constants

from ddpm_hf.cli.commands import main

def attempt(name):
    try:
        main(["sample", name, "--steps", "1", "-o", "x.npy"])
    except SystemExit as error:
        print(f"{name}: {error.code}")

for name in sys.argv[1:]:
    attempt(name)
print("next", flush=True)
input()
close_session()  # a connection that is open would be served to its end
for name in ("tester/tiny", "tester/gone"):
    attempt(name)
constants.HF_HUB_OFFLINE = True
attempt("tester/absent")
"""


def test_what_the_hub_answered_is_told_and_its_repositories_are_loaded(images, tmp_path):
    """Against a Hub over HTTP, which then goes away; what came from it before is still loaded."""
    (tmp_path / "digits").mkdir()
    upload = f"from ddpm_hf import DDPMPaperPipeline as P\nP.from_pretrained({images!r}).push_to_hub('tester/tiny')"
    upload += "\nfrom huggingface_hub import HfApi\nHfApi().create_repo('tester/bare')"
    names = ["tester/tiny", "tester/nothing", "digitz", "tester/secret", "tester/troubled", "tester/bare"]
    with LocalHub() as hub:
        environment = {**hub.client(tmp_path / "home", "hf_abc"), "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", upload], env=environment, check=True, capture_output=True)
        hub.failing |= {"tester/secret": 403, "tester/troubled": 503}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", ON_THE_HUB, *names],
            cwd=tmp_path, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe,
        )  # fmt: skip
        assert process.stdout is not None
        lines = list(iter(process.stdout.readline, "next\n"))
    output, errors = process.communicate("\n", timeout=60)
    lines = [*lines, *output.splitlines(keepends=True)]
    missing = f"ddpm-hf: there is no folder {{}} in {tmp_path}, and "
    none = "the Hub has no repository of that name, or not without `hf auth login` (HTTP 404)"
    expected = [
        "1 samples in x.npy",
        f"tester/nothing: {missing.format('tester/nothing')}{none}",
        f"digitz: {missing.format('digitz')}{none}; did you mean digits?",
        f"tester/secret: {missing.format('tester/secret')}the Hub does not let you read it (HTTP 403)",
        f"tester/troubled: {missing.format('tester/troubled')}the Hub is in trouble; try again later (HTTP 503)",
        f"tester/bare: {missing.format('tester/bare')}the Hub's repository has no model_index.json",
        "1 samples in x.npy",
        f"tester/gone: {missing.format('tester/gone')}the Hub cannot be reached ([Errno 111] Connection refused)",
        f"tester/absent: {missing.format('tester/absent')}"
        "it was not downloaded from the Hub before, which HF_HUB_OFFLINE forbids to ask",
    ]
    assert [line.rstrip("\n") for line in lines] == expected
    # diffusers tells that it could not ask, where it then found what it needed; where not, our line says so
    assert errors.count("Couldn't connect to the Hub") == 1 and "Traceback" not in errors


# ---- evaluate, shorten, reproduce ----------------------------------------------------------------------------------


@pytest.fixture
def measuring(tmp_path) -> Iterator[Callable[..., None]]:
    """measuring(command, *arguments): main() as in a process of its own, working in tmp_path."""
    threads = torch.get_num_threads()

    def run(*arguments: str) -> None:
        AcceleratorState._reset_state(True)
        main([*arguments, "--cpu_threads", "1", "--work_dir", str(tmp_path / "work")])

    yield run
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


@pytest.fixture
def copied(images, tmp_path) -> str:
    """The checkpoint for images, in a folder to write to."""
    shutil.copytree(images, tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def digits(split: str, count: int) -> torch.Tensor:
    samples = load_samples("digits", split=split)
    return to_model_range(samples.batch(range(count)), samples.num_levels)


def test_evaluate_prints_and_keeps_what_it_measured(measuring, copied, capsys):
    measuring("evaluate", copied, "--dataset", "digits", "--num_images", "5", "--seed", "3")
    (result,) = read_results(Path(copied) / "evaluation.json")
    pipe = DDPMPaperPipeline.from_pretrained(copied)
    terms = bits_per_dim(pipe.unet, pipe.scheduler, digits("test", 5), seed=3, num_levels=17)
    assert result["value"] == pytest.approx(terms.total_b.mean().item(), rel=1e-5)
    assert capsys.readouterr().out.splitlines() == [
        f"bits/dim {result['value']:.4f} ± {result['spread']:.4f}",
        *(f"    {name} {result['parts'][name]:.6f}" for name in ("prior_bpd", "kl_bpd", "decoder_bpd")),
        f"with the whole protocol in {Path(copied) / 'evaluation.json'}",
    ]
    measuring("evaluate", copied, "--dataset", "digits", "--num_images", "5", "--steps", "2")
    steps = [kept["model"]["num_inference_steps"] for kept in read_results(Path(copied) / "evaluation.json")]
    assert steps == [10, 2]


def test_evaluate_writes_where_it_is_told(measuring, images, tmp_path, capsys):
    output = tmp_path / "mine.json"
    measuring("evaluate", images, "--dataset", "digits", "--num_images", "1", "-o", str(output))
    assert len(read_results(output)) == 1 and not (Path(images) / "evaluation.json").exists()
    assert capsys.readouterr().out.endswith(f"with the whole protocol in {output}\n")


def test_the_options_of_evaluate_are_those_of_the_protocol():
    args = build_parser().parse_args(["evaluate", "x"])
    for field in dataclasses.fields(Protocol):
        default = None if field.name == "dataset" else field.default
        found = getattr(args, field.name)
        assert (tuple(found) if isinstance(found, list) else found) == default, field.name
    words = "--metrics bpd kid --dataset d --split s --num_samples 2000 --num_images 3 --num_timesteps_subset 4"
    words += " --steps 5 --seed 6 --batch_size 7 --weights raw --extractor a:b --skip_bad_images 8"
    args = build_parser().parse_args(["evaluate", "x", *words.split()])
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Protocol)}
    assert Protocol(**given) == Protocol("d", ["bpd", "kid"], "s", 2000, 3, 4, 5, 6, 7, "raw", "a:b", 8)  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path, monkeypatch) -> str:
    """A folder of four grey images, of which the second is damaged."""
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    folder, generator = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(4):
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"no image")
    return str(folder)


def test_evaluate_leaves_out_as_many_bad_images_as_it_is_told(measuring, images, photos, tmp_path, caplog):
    """They are named, and counted in the result; the number is that of the same folder without them."""
    words = ["--dataset", photos, "-o", str(tmp_path / "x.json")]
    with pytest.raises(SystemExit, match=r"1\.png: .*skip_bad_images=0 allows no more"):
        measuring("evaluate", images, *words)
    measuring("evaluate", images, *words, "--skip_bad_images", "2")
    assert "photos: 1 bad images left out: " in caplog.text and "1.png" in caplog.text
    measuring("evaluate", images, *words, "--skip_bad_images", "1")  # the same images: in place of the first result
    (first,) = read_results(tmp_path / "x.json")
    assert first["data"]["num_skipped"] == 1 and first["protocol"]["num_images"] == 3
    (Path(photos) / "1.png").unlink()
    measuring("evaluate", images, *words)
    second = read_results(tmp_path / "x.json")[1]
    assert second["value"] == first["value"]
    assert second["data"] == {name: value for name, value in first["data"].items() if name != "num_skipped"}


def test_a_result_of_before_bad_images_could_be_left_out_is_replaced_and_its_pieces_are_taken(
    measuring, copied, tmp_path, monkeypatch
):
    """An evaluation without bad images says and keeps what it did when there was no such option."""
    words = ["evaluate", copied, "--dataset", "digits", "--num_images", "2"]
    measuring(*words)
    (result,) = read_results(Path(copied) / "evaluation.json")
    assert set(result["data"]) == {"name", "split", "fingerprint"}
    assert set(result["protocol"]) == {
        *("num_images", "seed", "clip_denoised", "num_levels", "num_inference_steps", "num_timesteps_subset")
    }
    (identity,) = (tmp_path / "work").glob("bpd-*/identity.json")
    assert "skip" not in identity.read_text()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluation, "bits_per_dim", refuse)
    measuring(*words, "--skip_bad_images", "3")
    (again,) = read_results(Path(copied) / "evaluation.json")
    assert again["value"] == result["value"]


def test_shorten_leaves_out_as_many_bad_images_as_it_is_told(measuring, images, photos, tmp_path, caplog):
    with pytest.raises(SystemExit, match=r"1\.png: .*skip_bad_images=0 allows no more"):
        measuring("shorten", images, str(tmp_path / "short"), "--dataset", photos)
    measuring("shorten", images, str(tmp_path / "short"), "--dataset", photos, "--skip_bad_images", "1")
    assert "photos: 1 bad images left out: " in caplog.text and (tmp_path / "short" / "model_index.json").is_file()


def test_progress_moves_within_a_piece(measuring, images, tmp_path, monkeypatch, capsys):
    """Five images are one piece; the bar counts their 5 × 10 terms, four of them at a time."""
    monkeypatch.setattr(evaluation, "tqdm", functools.partial(evaluation.tqdm, mininterval=0, miniters=1))
    words = ["--dataset", "digits", "--num_images", "5", "--batch_size", "1", "-o", str(tmp_path / "x.json")]
    measuring("evaluate", images, *words)
    counted = re.findall(r"bits/dim:[^\r\n]*?(\d+)/50 ", capsys.readouterr().err)
    assert [int(n) for n in counted] == [*range(0, 50, 4), 50]


@pytest.mark.parametrize("steps", [None, 4])
def test_shorten_fits_the_variances_and_chooses_the_timesteps(measuring, images, tmp_path, monkeypatch, capsys, steps):
    """By the network's error on training data; and what it leaves is a checkpoint like any other."""
    output, levels = tmp_path / "short", []

    def noting(*args: Any, num_levels: int, **kwargs: Any) -> Any:
        levels.append(num_levels)
        return shortened(*args, num_levels=num_levels, **kwargs)

    monkeypatch.setattr(cli, "shortened", noting)
    words = ["--dataset", "digits", "--num_images", "20", "--seed", "1", *(["--steps", str(steps)] if steps else [])]
    measuring("shorten", images, str(output), *words)
    assert capsys.readouterr().out == f"{output}: {steps or 10} reverse steps, variances of {images}\n"
    pipe = DDPMPaperPipeline.from_pretrained(images)
    terms = bits_per_dim(pipe.unet, pipe.scheduler, digits("train", 20), seed=1, num_levels=17)
    expected: Any = shortened(pipe.scheduler, terms.x_start_mse_bt.mean(dim=0).numpy(), num_steps=steps, num_levels=17)
    short: Any = DDPMPaperPipeline.from_pretrained(output)
    assert short.scheduler.config["variance_type"] == "fitted" and set(levels) == {17}
    assert np.array_equal(short.scheduler.chain().timesteps, expected.chain().timesteps)
    np.testing.assert_allclose(short.scheduler.chain().x_start_mse, expected.chain().x_start_mse, rtol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(short.unet.parameters(), pipe.unet.parameters(), strict=True))
    measuring("evaluate", str(output), "--dataset", "digits", "--num_images", "2")
    (result,) = read_results(output / "evaluation.json")
    assert (result["model"]["variance_type"], result["model"]["num_inference_steps"]) == ("fitted", steps or 10)
    assert len(result["rate_distortion"]["rmse"]) == (steps or 10)
    main(["sample", str(output), "-o", str(tmp_path / "x.npy")])
    assert np.array_equal(np.load(tmp_path / "x.npy"), np.asarray(sampled(str(output), [0])))


@pytest.mark.parametrize(
    ("unet", "process", "message"),
    [
        ({"out_channels": 2}, {"variance_type": "learned"}, "variance_type='learned': variances are fitted to"),
        ({"out_channels": 1}, {"prediction_type": "previous_sample"}, "prediction_type='previous_sample': variances"),
    ],
)
def test_shorten_refuses_networks_that_say_more_than_x_start(
    measuring, tiny_unet, tiny_scheduler, tmp_path, unet, process, message
):
    DDPMPaperPipeline(tiny_unet(in_channels=1, **unet), tiny_scheduler(**process)).save_pretrained(tmp_path / "source")
    with pytest.raises(SystemExit, match=message):
        measuring(
            "shorten", str(tmp_path / "source"), str(tmp_path / "new"), "--dataset", "digits", "--num_images", "2"
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("table", TABLES)
def test_reproduce_prints_the_table(table, copied, capsys):
    main(["reproduce", table])
    assert capsys.readouterr().out == report(table, checkpoint=None, results=None) + "\n"
    main(["reproduce", table, "--checkpoint", copied])
    text = capsys.readouterr().out
    assert text == report(table, checkpoint=copied, results=[]) + "\n" and "nothing yet" in text


def test_reproduce_shows_what_evaluate_measured(measuring, copied, capsys):
    measuring("evaluate", copied, "--dataset", "digits", "--num_images", "3")
    (result,) = read_results(Path(copied) / "evaluation.json")
    capsys.readouterr()
    main(["reproduce", "table1", "--checkpoint", copied])
    text = capsys.readouterr().out
    line = f"  bits/dim {result['value']:.4f} ± {result['spread']:.4f}, digits test, as saved weights"
    assert (
        line in text.splitlines() and "data digits (test); 10 reverse steps; as saved weights; exact decoder" in text
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{images}"], "dataset is missing"),
        (["evaluate", "{images}", "--dataset", "digits", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["evaluate", "{images}", "--dataset", "digits", "--num_images", "0"], "num_images=0 must be at least 1"),
        (["evaluate", "{images}", "--dataset", "digits", "--steps", "11"], "num_inference_steps=11 "),
        (["evaluate", "{images}", "--dataset", "digits", "--weights", "raw"], "weights='raw': "),
        (["evaluate", "{images}", "--dataset", "digits", "--split", "dev"], "split='dev': digits has"),
        (
            ["evaluate", "{images}", "--dataset", "digits", "--num_timesteps_subset", "11"],
            "num_timesteps_subset=11 must ",
        ),
        (["evaluate", "{empty}", "--dataset", "digits"], "holds no model"),
        (["shorten", "{images}", "{images}", "--dataset", "digits"], "exists; give a new or an empty folder"),
        (["shorten", "{images}", "new", "--dataset", "digits", "--num_images", "2", "--steps", "11"], "num_steps=11 "),
        (["reproduce", "table1", "--checkpoint", "{empty}"], "holds no model"),
        (["reproduce", "table1", "--checkpoint", "{garbage}"], "is not a list of evaluation results"),
    ],
    ids=lambda x: " ".join(x[:1] + x[2:]) if isinstance(x, list) else "",
)
def test_evaluate_shorten_and_reproduce_refuse_in_one_line(images, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    shutil.copytree(images, tmp_path / "garbage")
    (tmp_path / "garbage" / "evaluation.json").write_text("garbage")
    places = {"images": images, "empty": tmp_path / "empty", "garbage": tmp_path / "garbage"}
    AcceleratorState._reset_state(True)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as exit_info:
        main([word.format(**places) for word in arguments])
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)
    line = exit_info.value.code
    assert isinstance(line, str) and line.startswith("ddpm-hf: ") and message in line and "\n" not in line
    assert not capsys.readouterr().out and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "x", "--metrics", "fdi"], "invalid choice: 'fdi'"),
        (["evaluate", "x", "--weights", "both"], "invalid choice: 'both'"),
        (["shorten", "x", "y"], "the following arguments are required: --dataset"),
        (["reproduce", "table5"], "invalid choice: 'table5'"),
    ],
)
def test_words_that_evaluate_shorten_and_reproduce_do_not_know(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


# What can be known before hours of work is told before.


def test_a_place_that_cannot_take_the_results_is_refused_before_measuring(measuring, images, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("measured before the refusal")

    monkeypatch.setattr(evaluation, "bits_per_dim", refuse)
    (tmp_path / "garbage.json").write_text("garbage")
    with pytest.raises(SystemExit, match=r"\.json"):
        measuring("evaluate", images, "--dataset", "digits", "--num_images", "1", "-o", str(tmp_path / "garbage.json"))


def test_a_shortened_checkpoint_cannot_be_shortened_again(measuring, images, tmp_path):
    words = ["--dataset", "digits", "--num_images", "2"]
    measuring("shorten", images, str(tmp_path / "short"), "--steps", "4", *words)
    with pytest.raises(SystemExit, match="has been shortened before"):
        measuring("shorten", str(tmp_path / "short"), str(tmp_path / "shorter"), "--steps", "2", *words)
