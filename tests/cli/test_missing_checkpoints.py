"""A checkpoint that is not there: how every subcommand says so, and when the Hub is asked."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import fork_server
import numpy as np
import pytest
from local_hub import LocalHub
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.hub import load_pipeline

ROOT = Path(__file__).parents[2]
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
def runs(images, own_process, tmp_path, monkeypatch) -> Path:
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
    with pytest.raises(SystemExit) as exit_info:
        main(line.split())
    message = exit_info.value.code  # a string: Python prints it to stderr and exits with 1
    assert isinstance(message, str) and message.startswith("ddpm-hf: ") and "\n" not in message
    return message.removeprefix("ddpm-hf: ")


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_every_command_refuses_a_misspelt_folder(runs, command):
    """It suggests the folder that was meant, and does not ask the Hub: `runs` is a folder here."""
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
        ("~/runs/digits", "{here}/runs/digits"),  # in Python `~` is no home; the command line expands it
        ("runs/digits/checkpoints/step-4", None),
        ("runs/--", None),
        ("/nowhere/at/all", None),
    ],
)
def test_a_path_is_not_looked_for_on_the_hub(runs, monkeypatch, given, suggested):
    monkeypatch.setenv("HOME", str(runs))
    places = {"here": runs, "name": runs.name}
    given = given.format(**places)
    with pytest.raises(ValueError) as error_info:
        load_pipeline(given)
    message = str(error_info.value)
    if not given.startswith("~"):
        assert refusal(f"sample {given}") == message
    where = "" if given.startswith(("/", "~")) else f" in {runs}"
    hint = f"; did you mean {suggested.format(**places)}?" if suggested else ""
    assert message == f"there is no folder {given}{where}{hint}"


def test_a_file_in_place_of_a_checkpoint_is_refused(runs):
    assert refusal("sample photo.png") == "photo.png is a file; give the folder of a checkpoint"
    (runs / "diffusion_pytorch_model.safetensors").touch()  # of a folder, which convert does not take alone
    assert refusal("sample diffusion_pytorch_model.safetensors").endswith("is a file; give the folder of a checkpoint")


ON_THE_HUB = """
import sys

from huggingface_hub import close_session, constants

from ddpm_hf.cli import main

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


@pytest.mark.slow
def test_the_hubs_answer_is_reported_and_its_models_load(images, tmp_path):
    """Against a Hub over HTTP, which then goes away; what came from it before is still loaded."""
    (tmp_path / "digits").mkdir()
    upload = f"from ddpm_hf import DDPMPaperPipeline as P\nP.from_pretrained({images!r}).push_to_hub('tester/tiny')"
    upload += "\nfrom huggingface_hub import HfApi\nHfApi().create_repo('tester/bare')"
    names = ["tester/tiny", "tester/nothing", "digitz", "tester/secret", "tester/troubled", "tester/bare"]
    with LocalHub() as hub:
        environment = {**hub.client(tmp_path / "home", "hf_abc"), "PYTHONPATH": str(ROOT)}
        fork_server.run(["-c", upload], env=environment, check=True, capture_output=True)
        hub.failing |= {"tester/secret": 403, "tester/troubled": 503}
        pipe = subprocess.PIPE
        process = fork_server.Forked(
            ["-c", ON_THE_HUB, *names], cwd=tmp_path, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe
        )
        assert process.stdout is not None
        lines = list(iter(process.stdout.readline, "next\n"))
    output, errors = process.communicate("\n", timeout=60)
    lines = [*lines, *output.splitlines(keepends=True)]
    missing = f"ddpm-hf: there is no folder {{}} in {tmp_path}, and "
    none = "the Hub has no repository of that name, or not without `hf auth login` (HTTP 404)"
    expected = [
        "1 sample in x.npy",
        f"tester/nothing: {missing.format('tester/nothing')}{none}",
        f"digitz: {missing.format('digitz')}{none}; did you mean digits?",
        f"tester/secret: {missing.format('tester/secret')}the Hub does not let you read it (HTTP 403)",
        f"tester/troubled: {missing.format('tester/troubled')}the Hub is in trouble; try again later (HTTP 503)",
        f"tester/bare: {missing.format('tester/bare')}the Hub's repository has no model_index.json",
        "1 sample in x.npy",
        f"tester/gone: {missing.format('tester/gone')}the Hub cannot be reached ([Errno 111] Connection refused)",
        f"tester/absent: {missing.format('tester/absent')}"
        "it was not downloaded from the Hub before, which HF_HUB_OFFLINE forbids to ask",
    ]
    assert [line.rstrip("\n") for line in lines] == expected
    # diffusers says that it could not ask, where it then found what it needed; where not, our line says so
    assert errors.count("Couldn't connect to the Hub") == 1 and "Traceback" not in errors
