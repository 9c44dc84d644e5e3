"""Options: a YAML file, then the command line, and every mistake ends with exit code 2 and the name of the key."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ddpm_hf.runs import parse_options, to_yaml


@dataclass
class Options:
    learning_rate: float = 1e-3
    num_steps: int = 100
    output_dir: str = "runs"
    resolution: int | None = None
    flip: bool = True
    dry_run: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    channels: list[int] = field(default_factory=lambda: [8, 16])
    offsets: list[float] = field(default_factory=list)
    timesteps: list[int] | None = None
    network_args: dict[str, Any] | None = None

    def __post_init__(self):
        if not self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate} must be below 1")


@pytest.fixture
def config(tmp_path) -> Callable[[str], str]:
    """config(text): the path of a YAML file with that text."""

    def write(text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(capsys, *argv: str) -> str:
    """The line that explains why `argv` is refused, after exit code 2 was checked."""
    with pytest.raises(SystemExit) as exit_info:
        parse_options(Options, argv)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err.partition("error: ")[2]


# ---- what is read --------------------------------------------------------------------------------------------------


def test_defaults():
    assert parse_options(Options, []) == Options()


def test_the_command_line_wins_over_the_file(config):
    path = config("num_steps: 7\noutput_dir: from_file\n")
    expected = Options(num_steps=8, output_dir="from_file")
    assert parse_options(Options, ["--config", path, "--num_steps", "8"]) == expected
    assert parse_options(Options, ["--num_steps=8", f"--config={path}"]) == expected
    assert parse_options(Options, ["--num-steps", "8"], default_config=path) == expected


def test_config_replaces_the_default_config(config, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("num_steps: 9")
    path = config("num_steps: 7\nflip: false")
    assert parse_options(Options, ["--config", str(other)], default_config=path) == Options(num_steps=9)


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_changes_nothing(config, text):
    assert parse_options(Options, ["--config", config(text)]) == Options()


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("learning_rate: 2e-4", ["--learning_rate", "2e-4"], {"learning_rate": 2e-4}),  # a string, says YAML
        ("learning_rate: -3", ["--learning_rate", "-3"], {"learning_rate": -3.0}),
        ("learning_rate: -2e-4", ["--learning_rate=-2e-4"], {"learning_rate": -2e-4}),
        ("resolution: -5", ["--resolution", "-5"], {"resolution": -5}),
        ("resolution: 64", ["--resolution", "64"], {"resolution": 64}),
        ("output_dir: 5", ["--output_dir", "5"], {"output_dir": "5"}),
        ("output_dir: --odd name", ["--output_dir=--odd name"], {"output_dir": "--odd name"}),
        ("flip: false", ["--flip", "false"], {"flip": False}),
        ("flip: 0", ["--flip=0"], {"flip": False}),
        ("flip: no", ["--no_flip"], {"flip": False}),
        ("dry_run: true", ["--dry_run"], {"dry_run": True}),
        ("dry_run: yes", ["--dry_run", "yes"], {"dry_run": True}),
        ("dry_run: 'True'", ["--dry_run=True"], {"dry_run": True}),
        ("mixed_precision: bf16", ["--mixed_precision", "bf16"], {"mixed_precision": "bf16"}),
        ("mixed_precision: 'no'", ["--mixed_precision", "no"], {"mixed_precision": "no"}),
        ("channels: [4, 5]", ["--channels", "4", "5"], {"channels": [4, 5]}),
        ("channels:\n- 4", ["--channels", "4"], {"channels": [4]}),
        ("channels: 4", ["--channels=4"], {"channels": [4]}),
        ("channels: []", ["--channels"], {"channels": []}),
        ("offsets: [-1, -0.5]", ["--offsets", "-1", "-0.5"], {"offsets": [-1.0, -0.5]}),
        ("offsets: [-0.00001, 2]", ["--offsets", "-1e-05", "2"], {"offsets": [-1e-5, 2.0]}),
    ],
)
def test_values_are_read_alike_in_file_and_command_line(config, text, argv, expected):
    assert parse_options(Options, ["--config", config(text)]) == Options(**expected)
    assert parse_options(Options, argv) == Options(**expected)


@pytest.mark.parametrize("key", ["resolution", "mixed_precision", "timesteps"])
@pytest.mark.parametrize("absent", ["none", "None", "null", "~", ""])
def test_none_where_a_value_may_be_absent(config, key, absent):
    path = config("resolution: 5\nmixed_precision: fp16\ntimesteps: [3]\n")
    assert getattr(parse_options(Options, ["--config", path]), key) is not None
    assert getattr(parse_options(Options, ["--config", path, f"--{key}", "none"]), key) is None
    assert getattr(parse_options(Options, ["--config", config(f"{key}: {absent}")]), key) is None


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(learning_rate=1e-7, num_steps=3, resolution=64, flip=False, dry_run=True, mixed_precision="no"),
        Options(output_dir="ünïcode: #odd 'name'", channels=[], offsets=[1e-7, 1e20]),
        Options(output_dir="true", offsets=[-1e-5], learning_rate=-1e-5),
        Options(output_dir="-", timesteps=[9, 0]),
    ],
)
def test_to_yaml_is_read_back_to_equal_options(config, options):
    assert parse_options(Options, ["--config", config(to_yaml(options))]) == options


MAPPINGS = {
    "network_args:\n  width: 12\n  names: [a, b]\n  rate: 1.0e-3\n  wide: true\n  other: null": {
        **{"width": 12, "names": ["a", "b"], "rate": 1e-3, "wide": True, "other": None},
    },
    "network_args: {width: 12, name: 'no'}": {"width": 12, "name": "no"},
    "network_args:\n    a: |\n      two\n      lines\n    b: 1\nnum_steps: 7": {"a": "two\nlines\n", "b": 1},
    "network_args: {}": None,
    "network_args:": None,
    "network_args: none": None,
}


@pytest.mark.parametrize("text", MAPPINGS)
def test_a_mapping_of_the_file_keeps_its_types(text, config):
    read = parse_options(Options, ["--config", config(text)])
    assert read.network_args == MAPPINGS[text]
    assert repr(read.network_args) == repr(MAPPINGS[text])  # True is no 1
    assert parse_options(Options, ["--config", config(to_yaml(read))]) == read


def test_a_mapping_on_the_command_line_wins(config):
    words = ["--config", config("network_args: {width: 12}"), "--network_args", "{width: 3, deep: [1, 2]}"]
    assert parse_options(Options, words).network_args == {"width": 3, "deep": [1, 2]}
    assert parse_options(Options, [*words[:2], "--network-args=none"]).network_args is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: {b: 1}}", "a must be a plain value or a flat list"),
        ("{a: [[1]]}", "a must be a plain value or a flat list"),
        ("{a: 2020-01-01}", "a must be a plain value or a flat list"),
        ("{on: 2}", "the name True is no text to YAML; put it in quotes"),
        ("{a: 1, a: 2}", "is no mapping of the form {name: value}, each name once"),
        ("{a: 1e-3}", "a: 1e-3 is text to YAML; write 1.0e-3 for 1e-3"),
        ("{a: [1, 2e5]}", "a: 2e5 is text to YAML"),
        ("three", "'three' is no mapping of the form {name: value}"),
        ("{a: *x}", "undefined alias"),
        ("{a: 2020-99-99}", "month must be in 1..12"),
        ("{a: [1}", "expected ',' or ']'"),
        ("{a: .nan}", "a: nan is no finite number"),
    ],
)
def test_mappings_that_are_refused(text, message, config, capsys):
    for argv in (["--network_args", text], ["--config", config(f"network_args: {text}")]):
        assert message in refusal(capsys, *argv)


def test_mappings_are_for_options_that_take_one(config, capsys):
    assert "num_steps must be a plain value" in refusal(capsys, "--config", config("num_steps: {a: 1}"))
    assert "takes one value, got a list of 1" in refusal(capsys, "--config", config("network_args:\n- 1"))


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_unknown_key_of_the_file(config, capsys):
    message = refusal(capsys, "--config", config("lerning_rate: 1"))
    assert "options.yaml: unknown key 'lerning_rate'; did you mean learning_rate?" in message
    assert "did you mean" not in refusal(capsys, "--config", config("zzz: 1"))


@pytest.mark.parametrize("argv", [["--lerning_rate", "1"], ["--lerning_rate=1"], ["--lerning-rate", "1"]])
def test_unknown_option(capsys, argv):
    message = refusal(capsys, *argv)
    assert f"unknown option {argv[0].split('=')[0]}" in message and "did you mean learning_rate?" in message


def test_abbreviations_are_unknown_options(config, capsys):
    assert "unknown option --learning" in refusal(capsys, "--learning", "1")
    assert "unknown key 'learning'" in refusal(capsys, "--config", config("learning: 1"))
    assert "unknown option --conf" in refusal(capsys, "--conf", config("num_steps: 1"))


def test_misspelt_choice(config, capsys):
    for argv in (["--mixed_precision", "b16"], ["--config", config("mixed_precision: b16")]):
        message = refusal(capsys, *argv)
        assert "mixed_precision" in message
        assert "'b16' is not one of no, fp16, bf16; did you mean bf16?" in message


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("num_steps: many", "num_steps", "many"),
        ("num_steps: 3.5", "num_steps", "3.5"),
        ("num_steps: true", "num_steps", "true"),
        ("num_steps: null", "num_steps", "needs a value"),
        ("num_steps: [1, 2]", "num_steps", ""),
        ("learning_rate: fast", "learning_rate", "fast"),
        ("learning_rate: {value: 1}", "learning_rate", "a plain value or a flat list"),
        ("output_dir: null", "output_dir", ""),
        ("flip: perhaps", "flip", "perhaps"),
        ("dry_run: []", "dry_run", ""),
        ("channels: [1, a]", "channels", "a"),
        ("channels: [none]", "channels", "needs a value"),
        ("channels: [[1, 2]]", "channels", "a plain value or a flat list"),
    ],
)
def test_wrong_types_name_the_key_and_the_value(config, capsys, text, key, value):
    message = refusal(capsys, "--config", config(text))
    assert key in message and value in message


def test_words_without_an_option_are_refused(capsys):
    assert "unexpected words: digits now" in refusal(capsys, "digits", "now")


@pytest.mark.parametrize("text", ["- learning_rate\n- 1", "learning_rate", "learning_rate: [1", "a: b: c"])
def test_a_file_that_is_no_yaml_of_keys(config, capsys, text):
    assert "options.yaml: " in refusal(capsys, "--config", config(text))


def test_a_file_that_cannot_be_read(capsys, tmp_path):
    missing = str(tmp_path / "missing.yaml")
    assert f"--config {missing}: " in refusal(capsys, "--config", missing)
    assert f"--config {tmp_path}: " in refusal(capsys, "--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: " in refusal(capsys, f"--config={Path(tmp_path, 'binary.yaml')}")
    assert "--config: expected one argument" in refusal(capsys, "--config")


def test_the_checks_of_the_dataclass_are_reported_alike(config, capsys):
    assert refusal(capsys, "--learning_rate", "2") == "learning_rate=2.0 must be below 1\n"
    assert refusal(capsys, "--config", config("learning_rate: nan")) == "learning_rate=nan must be below 1\n"


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(Options, ["--help"], description="What it does.")
    text = capsys.readouterr().out
    assert exit_info.value.code == 0 and "What it does." in text
    for option in ("--config FILE", "--learning_rate", "--no_flip", "{no,fp16,bf16}", "--timesteps"):
        assert option in text
