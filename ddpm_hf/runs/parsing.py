"""The options of a script: one flat dataclass, filled from a YAML file and then from the command line, which wins.

The YAML is turned into arguments placed ahead of the command line, so both are read, converted and checked by the same
parser. Whatever is wrong ends with exit code 2 and a line that names the key. Nothing imported here is slow.
"""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # a number that YAML may take for text
VALUE = "\0"  # put before a word that argparse must not take for an option; no command line and no YAML contains it
TRUE, FALSE = {"yes", "true", "t", "y", "1"}, {"no", "false", "f", "n", "0"}


# ---- an option and its range ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Where a number, or every number of a list, must lie. NaN lies nowhere."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def contains(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def demand(self, value: Any) -> str:
        """What is asked of `value`, which lies outside."""
        if isinstance(value, list):
            return f"must each lie in [{self.at_least}, {self.at_most}]"
        if self.above is not None:
            is_open = self.below == math.inf
            return "must be positive and finite" if is_open else f"must lie inside ({self.above}, {self.below})"
        if self.below is not None:
            return f"must lie in [{self.at_least}, {self.below})"
        too_small = self.at_least is not None and value < self.at_least
        return f"must be at least {self.at_least}" if too_small else f"must be at most {self.at_most}"


def option(default: Any, help: str, *, is_path: bool = False, alone: str | None = None, **bounds: float) -> Any:
    """A dataclass field for `parse_options`, with the bounds of `Range`; in a path `~` is expanded.

    `alone` is the value where the option is given without one.
    """
    shown = f"{help} (default: {default})"
    metadata = {"help": shown, "is_path": is_path, "alone": alone, "range": Range(**bounds)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(options: Any) -> None:
    """Raises ValueError for the first value outside its option's range; None lies in every range."""
    for each in fields(options):
        bounds, value = each.metadata["range"], getattr(options, each.name)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(bounds.contains(number) for number in numbers):
            raise ValueError(f"--{each.name}={value} {bounds.demand(value)}")


# ---- from words to values ------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _choice(word: str, choices: Sequence[str]) -> str:
    if word not in choices:
        hint = did_you_mean(word, choices)
        raise argparse.ArgumentTypeError(f"{word!r} is not one of {', '.join(choices)}{hint}")
    return word


def _truth(word: str) -> bool:
    if word.lower() not in TRUE | FALSE:
        expected = "yes/no, true/false, t/f, y/n, 1/0 (case insensitive)"
        raise argparse.ArgumentTypeError(f"Truthy value expected: got {word} but expected one of {expected}.")
    return word.lower() in TRUE


def _number(word: str, kind: type) -> Any:
    try:
        return kind(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {word!r}") from None


def _mapping(word: str) -> dict[str, Any] | None:
    """`{name: value}` or lines of `name: value`, as YAML has them: plain values and flat lists of these; None for {}.

    A number such as 1e-3 is text to YAML, and refused, as a name that stands twice is: neither may change silently.
    """
    try:
        content, node = yaml.safe_load(word), yaml.compose(word, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{word.strip()!r}: {error}") from None
    if not isinstance(content, dict) or node is None or len(node.value) > len(content):
        raise argparse.ArgumentTypeError(f"{word.strip()!r} is no mapping of the form {{name: value}}, each name once")
    for name, value in content.items():
        parts = value if isinstance(value, list) else [value]
        if not isinstance(name, str):
            raise argparse.ArgumentTypeError(f"the name {name!r} is no text to YAML; put it in quotes")
        if any(not isinstance(part, str | int | float | None) for part in parts):
            raise argparse.ArgumentTypeError(f"{name} must be a plain value or a flat list")
        if wrong := [part for part in parts if isinstance(part, float) and not math.isfinite(part)]:
            raise argparse.ArgumentTypeError(f"{name}: {wrong[0]} is no finite number")
        if wrong := [part for part in parts if isinstance(part, str) and EXPONENT.fullmatch(part)]:
            raise argparse.ArgumentTypeError(f"{name}: {wrong[0]} is text to YAML; write 1.0e-3 for 1e-3")
    return content or None


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` as X, and whether None was allowed."""
    others = [each for each in get_args(hint) if each is not type(None)]
    may_be_none = len(others) < len(get_args(hint))
    return (others[0] if may_be_none else hint), may_be_none


def _reader(hint: Any, *, is_path: bool = False) -> Callable[[str], Any]:
    """What turns a word into a value of this type, `none` into None where that is allowed."""
    kind, may_be_none = _without_none(hint)

    def read(word: str) -> Any:
        word = word.removeprefix(VALUE)
        if may_be_none and word.lower() == "none":
            return None
        if get_origin(kind) is Literal:
            return _choice(word, get_args(kind))
        if kind is bool:
            return _truth(word)
        if get_origin(kind) is dict:
            return _mapping(word)
        if kind is str:
            return os.path.expanduser(word) if is_path else word
        return _number(word, get_args(kind)[0] if get_origin(kind) is list else kind)

    return read


def _parser(dataclass_type: Any, **keywords: Any) -> argparse.ArgumentParser:
    """An option for each field, spelt with _ or -; a list takes several words, a bool that is on has a --no_… too."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **keywords,
    )
    hints = get_type_hints(dataclass_type)
    for each in fields(dataclass_type):
        kind, _ = _without_none(hints[each.name])
        names = dict.fromkeys([f"--{each.name}", f"--{each.name.replace('_', '-')}"])
        shown: dict[str, Any] = {"help": each.metadata.get("help")}
        if kind is bool:
            shown |= {"nargs": "?", "const": True}
        elif each.metadata.get("alone") is not None:
            shown |= {"nargs": "?", "const": each.metadata["alone"]}
        elif get_origin(kind) is list:
            shown |= {"nargs": "*"}
        elif get_origin(kind) is Literal:
            shown |= {"metavar": f"{{{','.join(get_args(kind))}}}"}
        default = each.default if each.default_factory is MISSING else each.default_factory()
        read = _reader(hints[each.name], is_path=each.metadata.get("is_path", False))
        parser.add_argument(*names, type=read, default=default, **shown)
        if default is True:
            no_names = dict.fromkeys([f"--no_{each.name}", f"--no-{each.name.replace('_', '-')}"])
            parser.add_argument(*no_names, action="store_false", dest=each.name, help=each.metadata.get("help"))
    return parser


def _config_path(given: str, default: str | Path | None) -> str:
    """`given`, or where there is no such file the one of its name beside the default, which may lie in a wheel."""
    path = Path(given or "")
    if default is None or path.exists() or path.parent not in (Path("."), Path("training") / "configs"):
        return given
    beside = Path(default).parent / path.name
    return str(beside) if beside.is_file() else given


def _yaml_arguments(path: str, dataclass_type: Any, parser: argparse.ArgumentParser) -> list[str]:
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
    types = {name: _without_none(hint) for name, hint in get_type_hints(dataclass_type).items()}
    arguments = []
    for key, value in content.items():
        if key not in types:
            parser.error(f"--config {path}: unknown key {key!r}{did_you_mean(key, types)}")
        kind, may_be_none = types[key]
        if get_origin(kind) is dict and isinstance(value, dict):
            inner = next(each for name, each in node.value if name.value == key)
            lines = text[inner.start_mark.index : inner.end_mark.index]
            arguments.append(f"--{key}={' ' * inner.start_mark.column}{lines}")
            continue
        items = value if isinstance(value, list) else [value]
        if any(not isinstance(item, str) for item in items):
            parser.error(f"--config {path}: {key} must be a plain value or a flat list")
        if isinstance(value, list) and get_origin(kind) is not list:
            parser.error(f"--config {path}: {key} takes one value, got a list of {len(value)}")
        words = ["none" if item.lower() in ("", "~", "null") else item for item in items]
        if "none" in words and not may_be_none:
            parser.error(f"--config {path}: {key} needs a value")
        is_list = isinstance(value, list)
        arguments += [f"--{key}", *(VALUE + word for word in words)] if is_list else [f"--{key}={words[0]}"]
    return arguments


def parse_options(
    dataclass_type: type[Options],
    argv: Sequence[str],
    *,
    default_config: str | Path | None = None,
    description: str | None = None,
) -> Options:
    """The options that `--config FILE` and then the rest of `argv` give; `default_config` stands in for `--config`.

    `--config NAME.yaml` and `--config training/configs/NAME.yaml` find the file beside `default_config`, too, where
    there is none in the working folder.

    Types must be plain, Literal, list[...], dict[str, Any] or `X | None`. A ValueError from the dataclass's own checks
    is reported like any other mistake: exit code 2 and one line on stderr.
    """
    parser = _parser(dataclass_type, description=description)
    config_help = "YAML file with values for any option below; the command line wins"
    parser.add_argument("--config", metavar="FILE", default=default_config, help=config_help)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=parser.usage)
    first.add_argument("--config", type=_reader(str, is_path=True), default=default_config)
    # argparse before Python 3.14 takes -1e-5 for an option
    words = [VALUE + word if NEGATIVE_NUMBER.fullmatch(word) else word for word in argv]
    config, rest = first.parse_known_args(words)
    path = _config_path(config.config, default_config)
    from_file = _yaml_arguments(path, dataclass_type, parser) if path else []
    namespace, unknown = parser.parse_known_args([*from_file, *rest])
    known = [each.name for each in fields(dataclass_type)]
    for word in unknown:
        if word.startswith("-"):
            name = word.lstrip("-").split("=")[0]
            parser.error(f"unknown option --{name}{did_you_mean(name, known)}")
    if unknown:
        parser.error(f"unexpected words: {' '.join(unknown).replace(VALUE, '')}")
    values = {name: getattr(namespace, name) for name in known}
    # a list that was given as the one word `none`
    values |= {name: None for name, value in values.items() if value == [None]}
    try:
        return dataclass_type(**values)
    except ValueError as error:
        parser.error(str(error))


def to_yaml(options: Any) -> str:
    """The options as the YAML that `--config` reads back to equal options."""
    return yaml.safe_dump(asdict(options), sort_keys=False, allow_unicode=True)
