"""README.md and docs/: links lead somewhere, names exist, commands parse, snippets run, messages are the code's.

Numbers in tables are held by the tests of what measures them.
"""

import argparse
import ast
import importlib
import importlib.util
import math
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import diffusers.utils.dynamic_modules_utils
import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import ddpm_hf
from ddpm_hf import DDPMPaperPipeline, GaussianDiffusion
from ddpm_hf.cli import build_parser
from ddpm_hf.likelihood import vb_terms_bpd
from ddpm_hf.options import OptionParser, parse_options
from ddpm_hf.scheduler.scheduling_ddpm_paper import make_betas

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
RUN_ELSEWHERE = {"oracle.md", "errata.md", "reading.md"}  # by tests/test_oracle.py, …
EXPLAINED = ("paper.md", "troubleshooting.md")  # every code span of theirs must mean something
SOURCES = [*sorted((ROOT / "ddpm_hf").rglob("*.py")), ROOT / "training" / "train.py"]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
WORDS = set(re.findall(r"\w+", TEXT))
ENVIRONMENT = {"ACCELERATE_USE_CPU", "DDPM_HF_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "OMP_NUM_THREADS"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
MESSAGE = re.compile(r"“`([^`\n]+)`”")  # how a page quotes the code, with … for what differs


def path_of(page: str) -> Path:
    return ROOT / page if page == "README.md" else ROOT / "docs" / page


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
        linked = (path_of(page).parent / file).resolve() if file else path_of(page)
        assert linked.exists() and linked.is_relative_to(ROOT), f"{page}: no {target}"
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), f"{page}: no heading for {target}"
    assert targets or page not in ("README.md", "training.md", *EXPLAINED)


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
    assert len(found) > 60
    unknown = [span for span in dict.fromkeys(found) if not means_something(span, script, options)]
    assert not unknown


def test_every_part_of_the_paper_has_a_row():
    """Eqs. 1–16, Algorithms 1–4, Tables 1–4, Figs. 1–19; each with a test, or a dash where it is not computed."""
    rows = re.findall(r"^\| (.+?) \|.*\| (.+?) \|$", PAGES["paper.md"], re.MULTILINE)
    named: dict[str, set[int]] = {"Eq": set(), "Algorithm": set(), "Table": set(), "Fig": set()}
    for label, test in rows:
        if found := re.match(r"(Eq|Algorithm|Table|Fig)s?\.? (\d+ and \d+|[\d–, ]+)", label):
            kind, numbers = found.groups()
            for first, last in re.findall(r"(\d+)(?:–(\d+))?", numbers):
                named[kind] |= set(range(int(first), int(last or first) + 1))
        assert is_test(test.strip("`").split("`")[0]) or test in ("–", "test", "---"), label
    assert named == {kind: set(range(1, n + 1)) for kind, n in zip(named, (16, 4, 4, 19), strict=True)}
    assert any(label.startswith("Section 4.3") for label, _ in rows) and "## Appendix B" in PAGES["paper.md"]


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
    quoted = [message for page in EXPLAINED for message in MESSAGE.findall(PAGES[page])]
    assert len(quoted) == sum(PAGES[page].count("“`") for page in EXPLAINED) > 40
    for message in quoted:
        assert len(re.findall(r"\w", message)) >= 5, f"{message!r} would match anything"
        assert any(message in template for template in known), f"no source says {message!r}"


# ---- commands ------------------------------------------------------------------------------------------------------


DIGITS = "training/configs/digits.yaml"


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
        if words and words[0] == "srun":  # ... bash -c 'torchrun ...'
            words = shlex.split(words[-1])
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if len(words) > 1 and words[0] in ("ddpm-hf", "accelerate", "torchrun", "python", "python3"):
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
    else:
        assert program == "dev.py" and words[0] in {"demo", "test", "check"}, program


def check_command(words: list[str], script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = words
    if program == "ddpm-hf" and len(words) == 1:  # a subcommand that is only mentioned
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
        try:
            check_command(list(words), script, monkeypatch)
        except SystemExit as error:
            pytest.fail(f"{page}: {shlex.join(words)}: {error.code} {capsys.readouterr().err}")
    at_least = {"README.md": 15, "training.md": 12, "evaluation.md": 20, "sharing.md": 5, "scaling.md": 5}
    assert len(found) >= at_least.get(page, 0)


# ---- snippets ------------------------------------------------------------------------------------------------------

SNIPPET = re.compile(r"^(<!-- not run: \S[^\n]* -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = {name: SNIPPET.findall(text) for name, text in PAGES.items() if "```python" in text}
TO_RUN = [name for name, found in SNIPPETS.items() if name not in RUN_ELSEWHERE and not all(mark for mark, _ in found)]
# What a snippet shows 16 times, the fast test sees once.
SHORTER = {
    "README.md": {"range(16)": "range(1)", "range(300)": "range(2)"},
    "evaluation.md": {"range(4)": "range(1)"},
    "speed.md": {"range(16)": "range(1)"},
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
