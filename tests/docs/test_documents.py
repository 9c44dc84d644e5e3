"""All pages: links lead somewhere, names exist, commands parse and run, snippets run, messages are the code's.

Pages are README.md, docs/, the course's notebooks with what they say, and the model cards. Numbers in tables are held
by the tests of what measures them, and by `test_results_are_those_of_their_files`.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import datasets
import diffusers
import diffusers.utils.dynamic_modules_utils
import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from huggingface_hub.cli.hf import app as hf
from PIL import Image
from torch.distributed.run import get_args_parser

import ddpm_hf
from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet, GaussianDiffusion
from ddpm_hf.cli.commands import SCHEDULERS, build_parser
from ddpm_hf.evaluation.paper_tables import TABLES
from ddpm_hf.likelihood import vb_terms_bpd
from ddpm_hf.runs import parse_options
from ddpm_hf.runs.options import OptionParser
from ddpm_hf.scheduler.scheduling_ddpm_paper import make_betas

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]


def text_of(path: Path) -> str:
    """A page, or what a notebook says between its code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join(
        "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
    )


PAGE_FILES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "docs" / "course" / "README.md",
    *sorted(ROOT.glob("docs/course/*.ipynb")),
    *sorted(ROOT.glob("model_cards/**/README.md")),
]
PAGES = {path.relative_to(ROOT).as_posix(): text_of(path) for path in PAGE_FILES}
# by tests/test_oracle.py, test_errata.py, test_reading.py, test_carried_code.py
RUN_ELSEWHERE = {"docs/oracle.md", "docs/errata.md", "docs/reading.md", "model_cards/ddpm-digits/README.md"}
EXPLAINED = {  # every code span of theirs must mean something; how many there are at least
    "docs/paper.md": 60,
    "docs/troubleshooting.md": 60,
    "docs/sampling.md": 40,
}
QUOTING = ("docs/paper.md", "docs/troubleshooting.md")
SOURCES = [*sorted((ROOT / "ddpm_hf").rglob("*.py")), ROOT / "training" / "train.py"]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
WORDS = set(re.findall(r"\w+", TEXT))
ENVIRONMENT = {"ACCELERATE_USE_CPU", "DDPM_HF_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "OMP_NUM_THREADS"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
MESSAGE = re.compile(r"“`([^`\n]+)`”")  # how a page quotes the code, with … for what differs


def spans(page: str) -> list[str]:
    """Code within the lines of a page, but quoted messages."""
    return SPAN.findall(MESSAGE.sub("", BLOCK.sub("", PAGES[page])))


# ---- links ---------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    text = SPAN.sub("", BLOCK.sub("", PAGES[page]))
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://", target)]
    for target in targets:
        file, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert linked.exists() and linked.is_relative_to(ROOT), f"{page}: no {target}"
        assert not anchor or anchor in anchors(text_of(linked)), f"{page}: no heading for {target}"
    assert targets or page not in ("README.md", "docs/README.md", "docs/training.md", *EXPLAINED)


def test_the_index_has_every_page():
    """docs/README.md leads to each page of docs/, the course's to each chapter, and README.md to both."""
    for index, others in {
        "docs/README.md": [path.name for path in ROOT.glob("docs/*.md")],
        "docs/course/README.md": [path.name for path in ROOT.glob("docs/course/*.ipynb")],
        "README.md": ["docs/README.md", "docs/course/README.md"],
    }.items():
        assert others and all(f"]({name})" in PAGES[index] for name in others if name != Path(index).name), index


# ---- names ---------------------------------------------------------------------------------------------------------


def is_test(name: str) -> bool:
    """Whether there is such a `test_x.py::test_y`."""
    file, _, function = name.partition("::")
    path = ROOT / "tests" / file
    return path.exists() and f"\ndef {function}(" in path.read_text(encoding="utf-8")


def is_name(name: str, script: ModuleType) -> bool | None:
    """Whether there is such a `module.thing` or `Class.thing`; None where it begins with nothing of ours."""
    first, *rest = name.split(".")
    if first == "train":
        found: Any = script
    elif hasattr(ddpm_hf, first):
        found = getattr(ddpm_hf, first)
    else:
        places = [path for path in SOURCES if path.stem == first and path.parent.name != "training"]
        if not places:
            return None
        relative = places[0].relative_to(ROOT).with_suffix("")
        found = importlib.import_module(".".join(relative.parts))
    for part in rest:
        if not hasattr(found, part) and part not in getattr(found, "__dataclass_fields__", {}):
            return False
        found = getattr(found, part, None)
    return True


@pytest.fixture(scope="module")
def options(script) -> dict[str, list[argparse.Action]]:
    """Every command-line option, of the script and of all subcommands."""
    parsers = [OptionParser(script.TrainingOptions), build_parser()]
    found: dict[str, list[argparse.Action]] = {}
    for parser in parsers:  # which grows: parsers within parsers
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += list(action.choices.values())
            for word in action.option_strings:
                found.setdefault(word, []).append(action)
    return found


def means_something(span: str, script: ModuleType, options: dict[str, list[argparse.Action]]) -> bool:
    """Whether a code span is a test, an option, a variable, a path, a name, or code that consists of known words."""
    if "::" in span:
        return is_test(span)
    if span.startswith("--"):
        word, *values = span.split()
        known = options.get(word, [])
        return bool(known) and all(any(not a.choices or v in a.choices for a in known) for v in values)
    if variable := re.fullmatch(r"\$?([A-Z_]{4,})(=\S+)?", span):
        return variable[1] in ENVIRONMENT
    if span.startswith("hf ") or commands_in(span):
        return True  # held by the test of commands
    if "/" in span and ((ROOT / span).exists() or span.endswith((".py", ".yaml"))):
        return (ROOT / span).exists()
    if re.fullmatch(r"\w+(\.\w+)*", span) and not span.endswith((".json", ".png", ".yaml")):
        if (known_name := is_name(span, script)) is not None:
            return known_name
    words = set(re.findall(r"[^\W\d]\w*", span))
    verbatim = re.search(rf"(?<!\w){re.escape(span)}(?!\w)", TEXT)
    return bool(verbatim) or (bool(words) and all(word in WORDS or hasattr(diffusers, word) for word in words))


@pytest.mark.parametrize("page", EXPLAINED)
def test_names_options_and_tests_exist(page, script, options):
    found = spans(page)
    assert len(found) > EXPLAINED[page]
    unknown = [span for span in dict.fromkeys(found) if not means_something(span, script, options)]
    assert not unknown


def test_every_part_of_the_paper_has_a_row():
    """Eqs. 1–16, Algorithms 1–4, Tables 1–4, Figs. 1–19; each with a test, or a dash where it is not computed."""
    rows = re.findall(r"^\| (.+?) \|.*\| (.+?) \|$", PAGES["docs/paper.md"], re.MULTILINE)
    named: dict[str, set[int]] = {"Eq": set(), "Algorithm": set(), "Table": set(), "Fig": set()}
    for label, test in rows:
        if found := re.match(r"(Eq|Algorithm|Table|Fig)s?\.? (\d+ and \d+|[\d–, ]+)", label):
            kind, numbers = found.groups()
            for first, last in re.findall(r"(\d+)(?:–(\d+))?", numbers):
                named[kind] |= set(range(int(first), int(last or first) + 1))
        assert is_test(test.strip("`").split("`")[0]) or test in ("–", "test", "---"), label
    assert named == {kind: set(range(1, n + 1)) for kind, n in zip(named, (16, 4, 4, 19), strict=True)}
    assert any(label.startswith("Section 4.3") for label, _ in rows) and "## Appendix B" in PAGES["docs/paper.md"]


# ---- messages ------------------------------------------------------------------------------------------------------


def templates(path: Path) -> Iterator[str]:
    """Every text of a source file, with … for each value that is put into it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield re.sub("…+", "…", "".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[dgs]", "…", node.value)


def test_quoted_messages_are_those_of_the_code():
    theirs = Path(diffusers.utils.dynamic_modules_utils.__file__)  # who refuses code in a checkpoint
    known = [template for path in (*SOURCES, theirs) for template in templates(path)]
    quoted = [message for page in QUOTING for message in MESSAGE.findall(PAGES[page])]
    assert len(quoted) == sum(PAGES[page].count("“`") for page in QUOTING) > 40
    for message in quoted:
        assert len(re.findall(r"\w", message)) >= 5, f"{message!r} would match anything"
        assert any(message in template for template in known), f"no source says {message!r}"


# ---- commands ------------------------------------------------------------------------------------------------------


DIGITS = "training/configs/digits.yaml"
PROGRAMS = ("ddpm-hf", "accelerate", "torchrun", "python", "python3", "hf")


class Parsed(Exception):
    """Raised in place of what a benchmark would do once its arguments are read."""


def commands_in(text: str) -> list[list[str]]:
    """The words of each command in shell lines (or in one span) that is ours to parse, from its program's name on."""
    found = []
    text = re.sub(r"\$\([^)]*\)", "HOST", text.replace("\\\n", " ")).replace("--config ...", "--config " + DIGITS)
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe
            continue
        while words and (words[0] == "srun" or re.match(r"[A-Z_]+=", words[0])):
            words = words[1:]
        if len(words) > 1 and words[0] in PROGRAMS:
            found.append(words)
    return found


def check_arguments(program: str, words: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the words as the program would; a mistake exits."""
    if program == "training/train.py":
        parse_options(script.TrainingOptions, words, default_config=DIGITS)
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
    else:
        assert program == "dev.py" and words[0] in {"demo", "test", "check", "install"}, program


def check_command(words: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words
    if program == "ddpm-hf" and re.fullmatch(r"(draw )?\w+", " ".join(words)):  # a subcommand that is only mentioned
        with pytest.raises(SystemExit) as ended:
            build_parser().parse_args([*words, "--help"])
        assert ended.value.code == 0
    elif program == "ddpm-hf":
        check_arguments(program, words, script, monkeypatch)
    elif program in ("accelerate", "torchrun"):
        if program == "accelerate":
            assert words[0] == "launch"
            words = words[1:]
        if not any(word in ("training/train.py", "ddpm_hf.cli") for word in words):
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
        if words[0] == "ddpm-hf" and len(words) > 2 and words[2].startswith("-"):  # about options, not a whole command
            words.insert(2, "CHECKPOINT")
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
    r"^ddpm-hf demo": "it serves a page; tests/demo/test_demo.py",
    r"^ddpm-hf( draw)? [a-z_]+$(?<! env)|^ddpm-hf sample --|SOURCE|\.\.\.$": "only mentioned",
    r"^accelerate launch( --\S+( \d+)?)*$|^python training/train\.py$": "only mentioned",
    r"google/|uoft-cs|huggan/": "the network",
    r"^hf ": "the network, and an account",
    r"publish|--push_to_hub|user/": "the Hub; tests/hub/test_publishing.py has a local one",
    r"model\.ckpt": "the paper's weights; tests/convert/test_tensorflow.py",
    r"--nnodes|--num_machines|--num_processes 8|--nproc_per_node 8": "machines with GPUs",
    r"cifar10|celebahq256|lsun256|YOUR_FOLDER": "the paper's data, and days on GPUs",
    r"dev\.py": "it installs; tests/repository/test_dev.py runs it without a network",
    r"docs/course/run\.py": "tests/docs/test_course.py",
    r"benchmarks/exact_resume\.py": "five minutes; tests/training/test_exact_resume.py",
    r"benchmarks/kill_stress\.py": "minutes; tests/training/test_kills.py",
    r"benchmarks/(run|few_steps|codec)\.py (?!--(table|plot))": "minutes; tests/repository/test_benchmarks.py runs their parts",
    r"benchmarks/short_chains\.py": "ten minutes; tests/test_short_chains.py",
    r"benchmarks/points_quality\.py": "it fails, as it should, for the untrained points that are at hand here",
}
# What is added to the others, so that they take seconds: of two equal options the last one counts.
LESS = {
    "training/train.py": "--num_steps 2 --num_samples 1 --sample_steps 2 --resume never --cpu_threads 1",
    "training/configs/folder64.yaml": "--resolution 16 --block_out_channels 32 32 --attention_resolutions 8",
    "ddpm-hf sample model_cards": "--steps 4",
    "ddpm-hf sample runs": "--steps 4",
    "ddpm-hf draw progressive": "--steps 10",
    "ddpm-hf draw shared": "--steps 4",
    "ddpm-hf draw interpolate": "--seeds 0",
    "ddpm-hf draw coarse_to_fine": "--steps 8",
    "ddpm-hf draw nearest": "--steps 4",
    "ddpm-hf draw rate_distortion": "--steps 4 --num_images 2",
    "ddpm-hf draw points": "--steps 4 --seeds 0-49",
    "ddpm-hf evaluate": "--num_images 2 --num_timesteps_subset 5 --cpu_threads 1",
    "ddpm-hf shorten": "--num_images 2 --cpu_threads 1",
    "ddpm-hf compress model_cards": "--steps 5 --fit_images 4",
    "benchmarks/digits_quality.py": "--steps 50",
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
    """A copy of what the commands read and write, with 16 photos, and models where a reader's runs would be."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("benchmarks", "docs", "model_cards", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    shutil.copy(ROOT / "README.md", folder)
    shutil.copy(ROOT / "model_cards" / "ddpm-digits" / "options.yaml", folder)
    (folder / "my_photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 24, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / "my_photos" / f"{number}.png")
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


def run_shorter(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a command in seconds, and see that it ends well and leaves what it was told to make."""
    more = " ".join(less for part, less in LESS.items() if part in command)
    words = shlex.split(f"{command} {more}")
    words[0] = {"python": sys.executable}.get(words[0], words[0])
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{command} {more}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
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


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDS)
def test_commands_run_one_after_the_other(page, checkout, environment, tmp_path):
    """Each command that can run offline, on small models and in few steps, in a copy of the repository."""
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder)
    for command in COMMANDS[page]:
        run_shorter(command, folder, environment)
    shutil.rmtree(folder)


@pytest.mark.slow
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


# ---- what pages say about schedulers and results -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_schedulers_take_the_steps_of_the_table():
    """docs/sampling.md: each is asked so often in n steps, at both ends of its range, and one step beyond fails."""
    rows = re.findall(
        r"^\| `(\w+)`.*? \| (?:`(\S+)`|–) \| (\S.*?) \| (\d+) to (\d+) \|$", PAGES["docs/sampling.md"], re.M
    )
    assert len(rows) == 14
    assert {option: name for name, option, *_ in rows if option and option != "ddpm"} == {
        option: name for option, name in SCHEDULERS.items() if name
    }
    ours: Any = DDPMPaperScheduler(clip_sample=False)
    unet: Any = DDPMPaperMLP(in_channels=1, out_channels=1, hidden_size=8, num_layers=1)
    pipe = DDPMPaperPipeline(unet, ours)
    pipe.set_progress_bar_config(disable=True)
    asked: list[int] = []
    unet.register_forward_pre_hook(lambda module, args: asked.append(1))

    def draw(n: int) -> torch.Tensor:
        asked.clear()
        (x_start,) = pipe(seeds=[0], num_inference_steps=n, output_type="latent", return_dict=False)
        return x_start

    for name, _, evaluations, fewest, most in rows:
        pipe.scheduler = getattr(diffusers, name, DDPMPaperScheduler).from_config(ours.config)
        assert type(pipe.scheduler).__name__ == name
        for n in (int(fewest), 10, int(most)):
            assert (
                draw(n).isfinite().all() and len(asked) == {"n": n, "n + 9": n + 9, "2n − 1": 2 * n - 1}[evaluations]
            )
        for n in {int(fewest) - 1, int(most) + 1} - {0, 1001}:
            with pytest.raises(ValueError):
                draw(n)


def test_results_are_those_of_their_files():
    """docs/results.md: what was measured is in the JSON files that it names, what was published in `reproduce`."""
    measured, published, _ = PAGES["docs/results.md"].split("\n## ")[1:]
    values = {label: value for label, value in re.findall(r"^\| (.+?) \| (.+?) \| ", measured, re.M)}
    few = json.loads((ROOT / "benchmarks" / "results" / "few_steps.json").read_text(encoding="utf-8"))["rows"]
    by_steps = {(row["scheduler"], row["steps"]): row for row in few}
    ours = by_steps["ours, respaced", 1000]
    assert values["digits: a classifier is sure of"].startswith(f"{ours['confident']:.1%}".replace("%", " %"))
    assert values["digits: Fréchet distance to real digits"] == f"{ours['frechet_distance']:.1f}"
    assert f"| {ours['frechet_distance_real']:.1f}, real" in measured
    assert f"| {ours['confident_real']:.1%}".replace("%", " %") in measured
    for label, key in (
        ("digits, 50 steps of this process", ("ours, respaced", 50)),
        ("digits, 10 steps of DPM-Solver++", ("stock DPM-Solver++", 10)),
    ):
        assert values[label] == f"{by_steps[key]['frechet_distance']:.1f}"
    path = ROOT / "model_cards" / "ddpm-digits" / "evaluation.json"
    (bound,) = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert values["digits: bits/dim, at most"] == f"{bound['value']:.4f} ± {bound['spread']:.4f}"
    rates = bound["rate_distortion"]["rate_bpd"]
    first, *others, last = (f"{rates[steps - 1] / rates[-1]:.1%}".replace("%", " %") for steps in (500, 800, 900, 990))
    text = " ".join(PAGES["docs/evaluation.md"].split())
    assert (
        f"the first 500 take {first} of the bits, 800 take {others[0]}, 900 take {others[1]}, and the last 10" in text
    )
    assert 50 < float(last[:4]) < 55  # "nearly half" is left for the last 10
    coded = json.loads((ROOT / "benchmarks" / "results" / "codec.json").read_text(encoding="utf-8"))
    (row,) = [row for row in coded["rows"] if (row["num_levels"], row["steps"]) == (17, 25)]
    file, bz2 = row["file_bpd"], coded["formats"]["17"]["bz2, all in one"]
    assert f"| digits as a file, 25 steps: bits/dim of the file | {file:.2f} | {bz2:.2f} by bz2 |" in measured
    net, drawn, predicted = (row[key] for key in ("net_bpd", "bound_bpd", "chosen"))
    of_it = f"{net:.2f} | {drawn:.2f}, the bound of the coded latents; {predicted['bpd']:.2f}, the bound predicted"
    assert f"| of it net, without what is paid once | {of_it} |" in measured
    for label, row in {
        "sampling, CIFAR-10 network, batch 1": "sampling: CIFAR-10 UNet, batch 1 | sped up",
        "the same in bfloat16": "sampling: CIFAR-10 UNet, batch 1 | sped up, bf16",
        "a training step, float32": "training: CIFAR-10 UNet, float32 stock | ours",
        "a training step, bfloat16": "training: CIFAR-10 UNet, float32 stock | ours, bf16",
        "sampling on an H100, batch 64, bfloat16, compiled": (
            "sampling: CIFAR-10 UNet, batch 64 (GPU) | sped up, bf16, compiled"
        ),
        "a training step there, batch 128, compiled, both in bfloat16": (
            "training: CIFAR-10 UNet, batch 128, bf16 stock (GPU) | ours, bf16, compiled"
        ),
    }.items():
        assert re.search(
            rf"^\| {re.escape(row)} \|.*\| {values[label].split('×')[0]}× \(", PAGES["README.md"], re.M
        ), label
    rows = re.findall(r"^\| Table (\d) \| (?:CIFAR-10, )?(.+?) \| (.+?) \|$", published, re.M)
    assert len(rows) == 8
    for number, label, value in rows:
        known = {row.label.split(" (")[0]: row.published for row in TABLES[f"table{number}"].rows}
        assert value == known.get(label, f"`ddpm-hf reproduce table{number}`"), label


# ---- snippets ------------------------------------------------------------------------------------------------------

SNIPPET = re.compile(r"^(<!-- not run: \S[^\n]* -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = {
    name: SNIPPET.findall(text) for name, text in PAGES.items() if "```python" in text and name.endswith(".md")
}
TO_RUN = [name for name, found in SNIPPETS.items() if name not in RUN_ELSEWHERE and not all(mark for mark, _ in found)]
# What a snippet shows 16 times, the fast test sees once.
SHORTER = {
    "README.md": {"range(16)": "range(1)", "range(300)": "range(2)"},
    "docs/evaluation.md": {"range(4)": "range(1)"},
    "docs/sampling.md": {"range(16)).images": "range(1)).images", "(99, 199, 299, 499)": "(9,)"},
    "docs/speed.md": {"range(16)": "range(1)"},
}


@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets_compile(page):
    assert len(SNIPPETS[page]) == PAGES[page].count("```python")
    for _, code in SNIPPETS[page]:
        compile(code, page, "exec")


@pytest.mark.parametrize(
    ("page", "shorter"),
    [
        *((page, True) for page in TO_RUN),
        *(pytest.param(page, False, marks=pytest.mark.slow) for page in TO_RUN if page in SHORTER),
    ],
)
def test_snippets_run_one_after_the_other(page, shorter, tmp_path, monkeypatch):
    """In a folder with nothing but `model_cards`, offline."""
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    replaced = set()
    for mark, code in SNIPPETS[page]:
        for written, less in SHORTER.get(page, {}).items() if shorter else ():
            if written in code:
                code, replaced = code.replace(written, less), replaced | {written}
        if not mark:
            exec(compile(code, page, "exec"), namespace)
    assert replaced == (set(SHORTER.get(page, {})) if shorter else set())
    if page == "README.md":
        assert namespace["images"] and DDPMPaperPipeline.from_pretrained("my_model").sample_shape == (1, 8, 8)
        assert shorter or namespace["loss"] < 0.4  # of 1.0 for a network that knows nothing


# ---- the formulas that no function has -----------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_equations_8_to_12_are_the_bound_as_it_is_computed(variance_type):
    """At every t ≥ 1, for any ε_θ: the KL divergence is C plus each of the paper's forms, to float64's rounding.

    Its worst place is t = T−1, where ε is recovered from x_0 through a factor of 157 and differences are squared.
    """
    q = GaussianDiffusion(make_betas("linear", 1000, 1e-4, 0.02))
    t, num_dims = torch.arange(1, 1000), 6
    draw = np.random.default_rng(0).standard_normal((3, 999, num_dims))
    x_start, eps, guess = (torch.from_numpy(x) for x in draw)
    x_start = x_start.clamp(-1, 1)
    x_t = q.q_sample(x_start, t, eps)
    beta, alpha_bar = (torch.from_numpy(table[1:].copy())[:, None] for table in (q.betas, q.alphas_cumprod))
    alpha = 1 - beta
    sigma2 = beta if variance_type == "fixed_large" else torch.from_numpy(q.posterior_variance[1:].copy())[:, None]
    options: Any = {"prediction_type": "epsilon", "variance_type": variance_type, "clip_denoised": False}

    def mean(noise: torch.Tensor) -> torch.Tensor:  # of x_{t−1}, from x_t and noise: Eqs. 10 and 11
        return (x_t - beta / (1 - alpha_bar).sqrt() * noise) / alpha.sqrt()

    torch.testing.assert_close(q.p_mean_variance(guess, x_t, t, **options).mean, mean(guess), rtol=0, atol=1e-12)
    posterior = q.q_posterior_mean_variance(x_start, x_t, t).mean
    through_x_start = q.q_posterior_mean_variance((x_t - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), x_t, t).mean
    torch.testing.assert_close(through_x_start, posterior, rtol=0, atol=1e-12)  # Eq. 9
    torch.testing.assert_close(mean(eps), posterior, rtol=0, atol=1e-12)  # Eq. 10

    constant, kl = (
        vb_terms_bpd(q, noise, x_start, x_t, t, **options) * num_dims * math.log(2) for noise in (eps, guess)
    )
    eq_8 = (posterior - mean(guess)).square().sum(dim=1) / (2 * sigma2[:, 0])
    eq_12 = (beta**2 / (2 * sigma2 * alpha * (1 - alpha_bar)))[:, 0] * (eps - guess).square().sum(dim=1)
    torch.testing.assert_close(kl - constant, eq_8, rtol=1e-8, atol=0)
    torch.testing.assert_close(kl - constant, eq_12, rtol=1e-8, atol=0)
