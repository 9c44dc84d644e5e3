"""Options of a script: one flat dataclass, filled from a YAML file and then from the command line, which wins.

The YAML is turned into arguments placed ahead of the command line, so both are read, converted and checked by the same
parser (transformers' HfArgumentParser). Whatever is wrong ends with exit code 2 and a line that names the key.
"""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import yaml

try:
    from transformers import HfArgumentParser
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; training needs more packages: pip install 'ddpm_hf[train]'") from None
if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class OptionParser(HfArgumentParser):
    """HfArgumentParser that takes `none` where a value may be absent, and helps with misspellings."""

    def __init__(self, dataclass_type: Any, **kwargs: Any):
        hints = get_type_hints(dataclass_type)
        self.may_be_none = {name for name, hint in hints.items() if type(None) in get_args(hint)}
        super().__init__(dataclass_type, allow_abbrev=False, **kwargs)
        # argparse before Python 3.14 takes -1e-5 for an option
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        self.lists = set()
        for action in self._actions:
            if action.nargs == "+":
                self.lists.add(action.dest)
                action.nargs = "*"  # an empty list is a value too

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if arg_string.lower() == "none" and action.dest in self.may_be_none:
            return None
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = _did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"{value!r} is not one of {', '.join(choices)}{hint}")


def _yaml_arguments(path: str, known: set[str], parser: OptionParser) -> list[str]:
    """The file's `key: value` lines as command-line arguments."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        # every scalar as it is written: the parser knows the types, and `no` or 012 must not become False or 10
        content = yaml.load(text, Loader=yaml.BaseLoader) or {}
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {error}")
    except RecursionError:
        parser.error(f"--config {path}: lists within lists within lists; expected lines of the form `key: value`")
    if not isinstance(content, dict):
        parser.error(f"--config {path}: expected lines of the form `key: value`")
    given = [key.value for key, _ in node.value] if node else []
    if len(given) > len(content):  # YAML would quietly take the last
        twice = next(key for key in given if given.count(key) > 1)
        parser.error(f"--config {path}: {twice} is given more than once; keep one of its values")
    arguments = []
    for key, value in content.items():
        if key not in known:
            parser.error(f"--config {path}: unknown key {key!r}{_did_you_mean(key, known)}")
        items = value if isinstance(value, list) else [value]
        if any(not isinstance(item, str) for item in items):
            parser.error(f"--config {path}: {key} must be a plain value or a flat list")
        if isinstance(value, list) and key not in parser.lists:
            parser.error(f"--config {path}: {key} takes one value, got a list of {len(value)}")
        words = ["none" if item.lower() in ("", "~", "null") else item for item in items]
        if "none" in words and key not in parser.may_be_none:
            parser.error(f"--config {path}: {key} needs a value")
        # joined by `=` where it is one value, so that a negative number is not taken for an option
        arguments += [f"--{key}", *words] if isinstance(value, list) else [f"--{key}={words[0]}"]
    return arguments


def parse_options(
    dataclass_type: type[Options],
    argv: Sequence[str],
    *,
    default_config: str | Path | None = None,
    description: str | None = None,
) -> Options:
    """The options that `--config FILE` and then the rest of `argv` give; `default_config` stands in for `--config`.

    Types must be plain, Literal, list[...] or `X | None`. A ValueError from the dataclass's own checks is reported
    like any other mistake: exit code 2 and one line on stderr.
    """
    parser = OptionParser(
        dataclass_type, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    config_help = "YAML file with values for any option below; the command line wins"
    parser.add_argument("--config", metavar="FILE", default=default_config, help=config_help)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=default_config)
    config, rest = first.parse_known_args(argv)
    known = {f.name for f in fields(dataclass_type)}
    from_file = _yaml_arguments(config.config, known, parser) if config.config else []
    namespace, unknown = parser.parse_known_args([*from_file, *rest])
    for word in unknown:
        if word.startswith("-"):
            name = word.lstrip("-").split("=")[0]
            parser.error(f"unknown option --{name}{_did_you_mean(name, known)}")
    if unknown:
        parser.error(f"unexpected words: {' '.join(unknown)}")
    values = {name: getattr(namespace, name) for name in known}
    values |= {name: None for name in parser.lists if values[name] == [None]}
    try:
        return dataclass_type(**values)
    except ValueError as error:
        parser.error(str(error))


def to_yaml(options: Any) -> str:
    """The options as the YAML that `--config` reads back to equal options."""
    return yaml.safe_dump(asdict(options), sort_keys=False, allow_unicode=True)
