"""The commands of all pages: they parse, and those that can run offline are run, on small models and in few steps."""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import datasets
import fork_server
import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from huggingface_hub.cli.hf import app as hf
from pages import BLOCK, DIGITS, PAGES, ROOT, commands_in, spans
from PIL import Image
from torch.distributed.run import get_args_parser

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet
from ddpm_hf.cli import build_parser
from ddpm_hf.data import load_samples
from ddpm_hf.runs import DistillationOptions, parse_options

pytestmark = pytest.mark.docs


SCRIPTS = ("train", "distill")


class Parsed(Exception):
    """Raised in place of what a benchmark would do once its arguments are read."""


def check_arguments(program: str, words: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the words as the program would; a mistake exits."""
    if program in ("ddpm-hf", "ddpm_hf.cli") and words[0] in SCRIPTS:
        program, words = f"training/{words[0]}.py", words[1:]
    if program == "training/train.py":
        parse_options(script.TrainingOptions, words, default_config=DIGITS)
    elif program == "training/distill.py":
        parse_options(DistillationOptions, words, default_config=Path(DIGITS).with_name("distill_digits.yaml"))
    elif program in ("ddpm-hf", "ddpm_hf.cli"):
        build_parser().parse_args(words)
    elif program.startswith("benchmarks/"):
        parse = argparse.ArgumentParser.parse_args

        def parse_and_stop(parser: Any, *args: Any) -> None:
            parse(parser, *args)
            raise Parsed

        with monkeypatch.context() as patch:
            patch.syspath_prepend(ROOT / "benchmarks")
            patch.setattr(sys, "argv", [program, *words])
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            with pytest.raises(Parsed):
                runpy.run_path(str(ROOT / program), run_name="__main__")
    elif program == "docs/course/run.py":
        assert all(list((ROOT / "docs" / "course").glob(f"{number}*.ipynb")) for number in words), words
    elif program == "tests/golden/measure.py":
        assert not words and (ROOT / program).exists()
    else:
        assert program == "dev.py" and words[0] in {"demo", "test", "check", "install", "versions"}, program


def check_command(words: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words
    said = " ".join(words)
    is_mentioned = re.fullmatch(r"(draw )?\w+", said) and said not in SCRIPTS  # a subcommand, not a command
    if program == "ddpm-hf" and is_mentioned:
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args([*words, "--help"])
        assert ended.value.code == 0
    elif program == "ddpm-hf":
        check_arguments(program, words, script, monkeypatch)
    elif program in ("accelerate", "torchrun"):
        if program == "accelerate":
            if words == ["config"]:
                return
            assert words[0] == "launch"
            words = words[1:]
        if not any(word in ("training/train.py", "training/distill.py", "ddpm_hf.cli") for word in words):
            words = [*words, "training/train.py"]  # the launcher alone is only mentioned
        parser = launch_command_parser() if program == "accelerate" else get_args_parser()
        args = parser.parse_args(words)
        check_arguments(args.training_script, args.training_script_args, script, monkeypatch)
    elif program == "hf":
        name, command = "hf", hf
        while isinstance(command, click.Group):
            name, command, words = command.resolve_command(click.Context(command), words)
        assert name and command
        arguments = command.make_context(name, words).params  # what it does not know becomes the image
        assert not arguments.get("image", "").startswith("-"), words
        for inner in commands_in(arguments.get("command", [""])[-1].replace("&&", "\n")):
            check_command(inner, script, monkeypatch)
    else:
        check_arguments(words[0], words[1:], script, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, script, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shell = "\n".join(body for language, body in BLOCK.findall(PAGES[page]) if language in ("", "bash"))
    found = commands_in(shell)
    for words in (words for span in spans(page) for words in commands_in(span)):
        if words[0] == "ddpm-hf" and words[1] != "train" and len(words) > 2 and words[2].startswith("-"):
            words.insert(2, "CHECKPOINT")  # it is about options, and not a whole command
        found.append(words)
    for words in {tuple(words): None for words in found}:
        beside = [str((ROOT / page).parent / word) if word == "options.yaml" else word for word in words]
        try:
            check_command(beside, script, monkeypatch)
        except SystemExit as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error.code} {capsys.readouterr().err}")
    at_least = {"README.md": 15, "training": 12, "evaluation": 20, "sampling": 15, "sharing": 5, "scaling": 5}
    assert len(found) >= at_least.get(page.removeprefix("docs/").removesuffix(".md"), 0)


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```bash" in text])
def test_shell_lines_are_bash(page):
    for language, body in BLOCK.findall(PAGES[page]):
        if language == "bash":
            subprocess.run(["bash", "-n"], input=body, text=True, check=True)


# ---- commands, run -------------------------------------------------------------------------------------------------

# Why a command is not run here, by a part of it; the first that fits counts, and what fits none is run.
NOT_RUN = {
    r"^ddpm-hf demo": "it serves a page; tests/demo/test_browser.py",
    r"^ddpm-hf( draw)? [a-z_]+$(?<! env)|^ddpm-hf sample --|SOURCE|FOLDER NEW|\.\.\.$": "only mentioned",
    r"^accelerate config$": "it asks questions",
    r"^accelerate launch( --\S+( \d+)?)*$|^python training/train\.py$": "only mentioned",
    r"google/|uoft-cs|huggan/": "the network",
    r"^hf ": "the network, and an account",
    r"publish|--push_to_hub|user/": "the Hub; tests/hub/test_publishing.py has a local one",
    r"model\.ckpt": "the paper's weights; tests/convert/test_tensorflow.py",
    r"--nnodes|--num_machines|--num_processes 8|--nproc_per_node 8": "machines with GPUs",
    r"cifar10|celebahq256|lsun256|YOUR_FOLDER": "the paper's data, and days on GPUs",
    r"dev\.py": "it installs; tests/repository/test_dev.py runs it without a network",
    r"docs/course/run\.py": "tests/docs/test_course.py",
    r"tests/golden/measure\.py": "tests/docs/test_documents.py calls its functions",
    r"benchmarks/exact_resume\.py": "five minutes; tests/training/test_exact_resume.py",
    r"benchmarks/kill_stress\.py": "minutes; tests/training/test_kills.py",
    r"benchmarks/(run|few_steps|codec|schedulers|flow)\.py(?! --(table|plot))": (
        "minutes; tests/repository/test_benchmarks.py runs their parts"
    ),
    r"benchmarks/distilled\.py(?! --table)": "an hour; tests/repository/test_distilled.py runs its parts",
    r"benchmarks/fashion_quality\.py(?! --table)": "minutes; tests/repository/test_fashion_quality.py runs its parts",
    r"benchmarks/head_to_head\.py": "two hours; tests/repository/test_fashion_quality.py runs its parts",
    r"benchmarks/labels_quality\.py": "minutes; tests/repository/test_labels_quality.py runs its parts",
    r"benchmarks/decoding\.py(?! --table)": "half an hour",
    r"benchmarks/hard_inputs\.py": "minutes; tests/repository/test_hard_inputs.py runs some kinds",
    r"benchmarks/cases\.py(?! --(table|list))": "minutes; tests/repository/test_cases.py runs some uses",
    r"benchmarks/surprises\.py(?! --page)": "an hour; tests/docs/test_surprises.py",
    r"benchmarks/short_chains\.py": "ten minutes; tests/test_short_chains.py",
    r"benchmarks/points_quality\.py": "it fails, as it should, for the untrained points that are at hand here",
}
FEW_STEPS = "--num_steps 2 --num_samples 1 --sample_steps 2 --resume never --cpu_threads 1"
FEW_UPDATES = "--num_steps 1 --num_samples 0 --global_batch_size 8 --resume never --cpu_threads 1"
# What is added to the others, so that they take seconds: of two equal options the last one counts.
LESS = {
    "training/train.py": FEW_STEPS,
    "ddpm-hf train": FEW_STEPS,
    "training/distill.py": FEW_UPDATES,
    "ddpm-hf distill": FEW_UPDATES,
    "training/configs/folder64.yaml": "--resolution 16 --block_out_channels 32 32 --attention_resolutions 8",
    "training/configs/folder32.yaml": (
        "--resolution 16 --block_out_channels 32 32 --attention_resolutions 8 --global_batch_size 16"
    ),
    "ddpm-hf sample model_cards": "--steps 4",
    "ddpm-hf sample runs": "--steps 4",
    "ddpm-hf export": "--batches 1 64",
    "ddpm-hf draw progressive": "--steps 10",
    "ddpm-hf draw classes": "--steps 4 --seeds 0",
    "ddpm-hf draw guidance": "--steps 4 --scales 0 2",
    "ddpm-hf draw shared": "--steps 4",
    "ddpm-hf draw interpolate": "--seeds 0",
    "ddpm-hf draw coarse_to_fine": "--steps 8",
    "ddpm-hf draw nearest": "--steps 4",
    "ddpm-hf draw rate_distortion": "--steps 4 --num_images 2",
    "ddpm-hf draw points": "--steps 4 --seeds 0-49",
    "ddpm-hf evaluate": "--num_images 2 --num_timesteps_subset 5 --cpu_threads 1",
    "ddpm-hf shorten": "--num_images 2 --cpu_threads 1",
    "ddpm-hf compress model_cards": "--steps 5 --fit_images 4",
    "benchmarks/digits_quality.py": "--steps 4 --ranges 2 --num_samples 32",
}


# The reasons that no test makes up for here: a page has to say so, where it shows such a command in a block.
UNTRIED = {
    "the network",
    "the network, and an account",
    "the Hub; tests/hub/test_publishing.py has a local one",
    "the paper's weights; tests/convert/test_tensorflow.py",
    "machines with GPUs",
    "the paper's data, and days on GPUs",
}
# How a section, or a page's introduction, says so of all its commands; "(*) not run here" speaks of those with (*).
SAID = r"(?<!\(\*\) )\bnot run\b|\bonly launches on the CPU were run\b|\bno weights are released here\b"
# Lines of other programs, and why they are not run.
OTHERS = {"pip install": "it installs", "jupyter lab": "it serves a page"}


def why_not_run(command: str) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if re.search(part, command)), None)


def commands_to_run() -> dict[str, list[str]]:
    """By page, what is run of it, each command once. Raises AssertionError for a reason that nothing needs."""
    found: dict[str, list[str]] = {}
    needed = set()
    for page, text in PAGES.items():
        shell = "\n".join(body for language, body in BLOCK.findall(text) if language in ("", "bash"))
        words = [*commands_in(shell), *(words for span in spans(page) for words in commands_in(span))]
        for command in dict.fromkeys(map(shlex.join, words)):
            reason = why_not_run(command)
            needed.add(reason)
            # `shorten` makes what the commands after it on the same page take
            if reason is None and (command.startswith("ddpm-hf shorten") or command not in sum(found.values(), [])):
                found.setdefault(page, []).append(command)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of the commands: the programs of this Python, no network, a CPU, and a cache of their own."""
    cache = str(tmp_path_factory.mktemp("cache"))
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache, "DDPM_HF_CACHE": cache}
    return {**os.environ, **offline, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PATH": places}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the commands read and write, with 18 photos, and models where a reader's runs would be."""
    folder = tmp_path_factory.mktemp("checkout")
    for _, body in BLOCK.findall(PAGES["docs/own_parts.md"]):
        if body.startswith("# my_nets.py\n"):  # which the commands of that page name
            (folder / "my_nets.py").write_text(body, encoding="utf-8")
    for name in ("benchmarks", "docs", "model_cards", "training", "tests/golden"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    shutil.copy(ROOT / "README.md", folder)
    shutil.copy(ROOT / "model_cards" / "ddpm-digits" / "options.yaml", folder)
    noise = np.random.default_rng(0).integers(0, 256, (18, 20, 24, 3), dtype=np.uint8)
    digits = load_samples("digits").batch(range(26)).squeeze(1).numpy() * 15
    for name, pictures in {
        "my_photos": noise[:16],
        "new_photos": noise[16:],
        "few_digits": digits[:6],
        "digits/train": digits[:16],
        "digits/test": digits[16:],
        "pets/cat": noise[:8],
        "pets/dog": noise[8:16],
    }.items():
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(pictures):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    photos = datasets.load_dataset("imagefolder", data_dir=str(folder / "my_photos"), split="train")
    photos.to_parquet(folder / "photos.parquet")
    options: Any = {"in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32), "attention_resolutions": (8,)}
    photo_unet = DDPMPaperUNet(sample_size=16, **options)
    for name, unet in {
        "folder64": photo_unet,
        "other": photo_unet,
        "points": DDPMPaperMLP(in_channels=2, out_channels=2, hidden_size=16, num_layers=1),
    }.items():
        scheduler = DDPMPaperScheduler(variance_type="fixed_large", clip_sample=name != "points")
        DDPMPaperPipeline(unet, scheduler).save_pretrained(folder / "runs" / name)
    shutil.copytree(ROOT / "model_cards" / "ddpm-digits", folder / "runs" / "digits")
    return folder


def program_of(words: list[str]) -> list[str] | None:
    """The words after `python` that do the same in one process; a launcher of several starts its own interpreters."""
    program, *rest = words
    if program == "accelerate" and "--num_processes" not in rest:
        return rest[next(i for i, word in enumerate(rest) if word.endswith(".py")) :]
    return {"ddpm-hf": ["-m", "ddpm_hf.cli", *rest], "python": rest}.get(program)


def run_shorter(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a command in seconds, and see that it ends well and leaves what it was told to make."""
    more = " ".join(less for part, less in LESS.items() if part in command)
    words = shlex.split(f"{command} {more}")
    if words[:2] == ["ddpm-hf", "compress"] and words[3] == "digits":
        words[3] = "few_digits"  # of 360
    options: Any = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    program = program_of(words)
    done = subprocess.run(words, **options) if program is None else fork_server.run(program, **options)
    assert done.returncode == 0, f"{command} {more}\n{(done.stdout + done.stderr)[-4000:]}"
    for word in ("-o", "--output"):
        assert word not in words or (folder / words[words.index(word) + 1]).exists(), command


COMMANDS = commands_to_run()


def test_reasons_for_not_running_are_needed():
    every = [shlex.join(words) for text in PAGES.values() for words in commands_in(text)]
    every += [shlex.join(words) for page in PAGES for span in spans(page) for words in commands_in(span)]
    for part in NOT_RUN:
        assert any(re.search(part, command) for command in every), f"nothing needs {part}"
    assert sum(map(len, COMMANDS.values())) > 40
    for part in LESS:
        assert any(part in command for commands in COMMANDS.values() for command in commands), part


def without_a_mark(page: str) -> list[str]:
    """Commands in blocks that cannot run here, where neither (*), nor their section, nor the page's beginning says so.

    (*) stands in the command's line, or in the comment above it.
    """
    text = PAGES[page]
    prose = BLOCK.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), text)  # as long as the text
    borders = [0, *(heading.start() for heading in re.finditer(r"^#+ ", prose, re.MULTILINE)), len(text)]
    found = []
    for block in BLOCK.finditer(text):
        start = max(border for border in borders if border <= block.start())
        section = prose[start : min(border for border in borders if border > block.start())]
        introduction = re.split(r"^## ", prose, maxsplit=1, flags=re.MULTILINE)[0]
        if block[1] not in ("", "bash") or re.search(SAID, introduction + section, re.IGNORECASE):
            continue
        above = ""
        for line in block[2].replace("\\\n", " ").splitlines():
            reasons = {why_not_run(shlex.join(words)) for words in commands_in(line)}
            if reasons & UNTRIED and "(*)" not in line + above:
                found.append(line)
            above = line if line.startswith("#") else ""
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_cannot_run_here_is_marked(page):
    assert set(NOT_RUN.values()) >= UNTRIED
    assert not without_a_mark(page)
    assert ("(*)" in BLOCK.sub("", PAGES[page])) == any("(*)" in body for _, body in BLOCK.findall(PAGES[page]))


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```bash" in text])
def test_no_shell_line_is_left_out(page):
    """A line of shell is a command that is parsed, and run or listed above, or one of the other programs'."""
    for language, body in BLOCK.findall(PAGES[page]):
        if language == "bash" and not body.startswith("#!"):  # a script, which has a test of its own
            for line in body.replace("\\\n", " ").splitlines():
                known = not line or line.startswith(("#", *OTHERS)) or commands_in(line)
                assert known, f"{page}: {line}"


@pytest.mark.parametrize("page", COMMANDS)
def test_commands_run_one_after_the_other(page, checkout, environment, tmp_path):
    """Each command that can run offline, on small models and in few steps, in a copy of the repository."""
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder)
    beside = (ROOT / page).parent / "options.yaml"  # of a card
    if beside.is_file():
        shutil.copy(beside, folder)
    for command in COMMANDS[page]:
        run_shorter(command, folder, environment)
    shutil.rmtree(folder)


def test_the_slurm_script_trains(checkout, environment, tmp_path):
    """On one machine with two processes on the CPU: `srun` starts what it is given, `scontrol` knows one host."""
    (script,) = [body for _, body in BLOCK.findall(PAGES["docs/training.md"]) if body.startswith("#!/bin/bash")]
    less = f"--output_dir {tmp_path / 'run'} {LESS['training/train.py']}"
    for written, here in {
        "--nproc_per_node 8": "--nproc_per_node 2",
        "training/configs/cifar10.yaml": "training/configs/digits.yaml",
        "--mixed_precision bf16": less,
        "source .venv/bin/activate\n": "",
        ":29500": ":0",
    }.items():
        assert script.count(written) == 1, written
        script = script.replace(written, here)
    programs = {
        "srun": '#!/bin/sh\nexec "$@"\n',
        "scontrol": '#!/bin/sh\n[ "$*" = "show hostnames node" ] && echo localhost\n',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_NODELIST": "node", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}{os.pathsep}{environment['PATH']}"}
    done = subprocess.run(["bash"], input=script, env={**environment, **slurm}, capture_output=True, text=True)
    assert done.returncode == 0 and "2 process(es) on cpu" in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "run" / "model_index.json").exists()
