"""The parsers of `ddpm-hf`: what they accept, how they end where they do not, and what they import before that."""

import argparse
import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.cli import arguments as parsers, build_parser, draw_arguments, main
from ddpm_hf.cli.arguments import parse_seeds
from ddpm_hf.evaluation import Protocol

CLI = Path(parsers.__file__).parent
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "gradio", "numpy")


def all_parsers(parser: argparse.ArgumentParser, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every parser with the words that lead to it."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from all_parsers(inner, *words, name)


PARSERS = dict(all_parsers(build_parser()))


def functions(path: Path) -> list[str]:
    return [
        node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]


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


# ---- the order of things -------------------------------------------------------------------------------------------


def test_what_commands_do_stands_in_the_order_of_their_options():
    own_modules = {path.stem for path in CLI.glob("*.py")}
    names = [command.__name__ for command in parsers.COMMANDS]
    assert functions(CLI / "commands.py") == [name for name in names if name not in own_modules]
    assert [name for name in functions(CLI / "arguments.py") if name in names] == names
    kinds = [kind.__name__ for kind in draw_arguments.KINDS]
    for file in ("draw.py", "draw_arguments.py"):
        assert [name for name in functions(CLI / file) if name in kinds] == kinds


# ---- `~` -----------------------------------------------------------------------------------------------------------

# What takes any text and is no path; an option that is in neither this list nor a path must be sorted.
NO_PATHS = {
    *("device", "split", "extractor", "repo_id", "revision", "license", "host", "words"),
    *("classes", "label_column", "variant"),
}


def takes_text(action: argparse.Action) -> bool:
    return action.type in (None, str, parsers.place, parsers.folder) and action.choices is None and action.nargs != 0


PATHS = {
    " ".join([*words, action.dest]): (words, action)
    for words, parser in PARSERS.items()
    for action in parser._actions
    if takes_text(action) and action.dest not in NO_PATHS
}


@pytest.mark.parametrize("name", PATHS)
def test_every_path_expands_the_home_folder(name, monkeypatch):
    """Also after `=`, where a shell leaves `~` to us. What is no path, as a name on the Hub, stays what it is."""
    monkeypatch.setenv("HOME", "/home/of/me")
    words, action = PATHS[name]
    for given, expected in (("~/x/y", "/home/of/me/x/y"), ("~", "/home/of/me"), ("user/name", "user/name")):
        line = [*words]
        for other in PARSERS[words]._actions:
            value = given if other is action else next(iter(other.choices or ["other"]))
            if not other.option_strings:
                line += [value]
            elif other is action or other.required:
                line += [f"{other.option_strings[-1]}={value}"]
        found = getattr(build_parser().parse_args(line), action.dest)
        assert (found if isinstance(action.nargs, str) else str(found)) == ([expected] if action.nargs else expected)


# ---- before anything heavy is imported -----------------------------------------------------------------------------

PARSE = f"""
import contextlib, io, json, sys
from ddpm_hf.cli import main
found = {{}}
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(line)
        except SystemExit as error:
            code = error.code
    found[" ".join(line)] = code, bool(out.getvalue() or err.getvalue()), sorted(set(sys.modules) & set({HEAVY}))
print(json.dumps(found))
"""


@pytest.mark.integration
def test_help_and_mistakes_come_before_heavy_imports():
    """In one fresh interpreter, which notes after each line what was imported so far."""
    lines = {(*words, "--help"): 0 for words in PARSERS} | {("--version",): 0, (): 2, ("smaple",): 2}
    lines |= {(*words, "x", "--sede", "3"): 2 for words in PARSERS if words}
    lines |= {("sample", "x", "--steps", "ten"): 2, ("draw", "shared", "x", "--seeds", "5-2"): 2}
    lines |= {("reproduce", "table5"): 2, ("train", "--num_stesp", "3"): 2, ("train", "--num_steps", "ten"): 2}
    lines |= {("distill", "--stagse", "4"): 2, ("distill", "--stages", "4", "3"): 2}
    done = subprocess.run([sys.executable, "-c", PARSE, json.dumps(list(lines))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {" ".join(line): [code, True, []] for line, code in lines.items()}
    assert json.loads(done.stdout) == expected


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_a_misspelt_option_is_answered_with_the_one_it_may_be(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["sample", "x", "--sede", "3"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --sede 3; did you mean --seeds?\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", str(2**32)], "seeds lie in [0, 2**32)"),
        (["--seeds", "0-99999999999"], "seeds lie in [0, 2**32)"),
        (["--device", "abacus"], "'abacus' cannot be used here"),
    ],
)
def test_values_that_sample_cannot_use(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["sample", "x", *arguments])
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "x", "--metrics", "fdi"], "invalid choice: 'fdi'"),
        (["evaluate", "x", "--weights", "both"], "invalid choice: 'both'"),
        (["shorten", "x", "y"], "the following arguments are required: --dataset"),
        (["reproduce", "table5"], "invalid choice: 'table5'"),
    ],
)
def test_words_that_evaluate_and_its_kin_do_not_know(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_the_options_of_evaluate_are_those_of_the_protocol():
    args = build_parser().parse_args(["evaluate", "x"])
    for field in dataclasses.fields(Protocol):
        default = None if field.name == "dataset" else field.default
        found = getattr(args, field.name)
        assert (tuple(found) if isinstance(found, list) else found) == default, field.name
    words = "--metrics bpd kid --dataset d --split s --num_samples 2000 --num_images 3 --num_timesteps_subset 4"
    words += " --steps 5 --seed 6 --batch_size 7 --weights raw --extractor a:b --skip_bad_images 8"
    words += " --label_column l --guidance 9"
    args = build_parser().parse_args(["evaluate", "x", *words.split()])
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Protocol)}
    assert Protocol(**given) == Protocol("d", ["bpd", "kid"], "s", 2000, 3, 4, 5, 6, 7, "raw", "a:b", 8, "l", 9)  # type: ignore[arg-type]
