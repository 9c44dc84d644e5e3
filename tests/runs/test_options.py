"""The options of training/train.py: ranges, paths, advice, and that none of it waits for torch."""

import subprocess
import sys
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from ddpm_hf.hub import check_names as check_names_of_the_hub
from ddpm_hf.runs import FREE_TO_CHANGE, TrainingOptions, averaging_lags, check_names, parse_options

ROOT = Path(__file__).parents[2]
RANGED = [f for f in fields(TrainingOptions) if any(v is not None for v in vars(f.metadata["range"]).values())]
PATHS = ["output_dir", "dataset_name", "train_data_dir", "init_from", "eval_data_dir", "resume"]
NEEDED = {"train_data_dir": ["--dataset_name=none"], "eval_data_dir": ["--eval_every=1"]}  # to parse one of them


def parse(*words: str) -> TrainingOptions:
    return parse_options(TrainingOptions, ["--dataset_name=digits", *words])


def refusal(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        parse(*words)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2].strip()


# ---- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", RANGED, ids=lambda f: f.name)
def test_values_just_outside_an_options_range_are_refused(capsys, option):
    bounds, is_real = option.metadata["range"], "float" in str(option.type)
    outside = [bounds.above, bounds.below]
    outside += [] if bounds.at_least is None else [bounds.at_least - (1e-9 if is_real else 1)]
    outside += [] if bounds.at_most is None else [bounds.at_most + 1]
    outside += [float("nan")] if is_real else []
    for value in (value for value in outside if value is not None):
        message = refusal(capsys, f"--{option.name}={value}")
        assert message.startswith(f"--{option.name}=") and " must " in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_steps=0", "--num_steps=0 must be at least 1"),
        ("--cpu_threads=1025", "--cpu_threads=1025 must be at most 1024"),
        ("--learning_rate=inf", "--learning_rate=inf must be positive and finite"),
        ("--max_minutes=0", "--max_minutes=0.0 must be positive and finite"),
        ("--dropout=1", "--dropout=1.0 must lie in [0, 1)"),
        ("--beta_start=0", "--beta_start=0.0 must lie inside (0, 1)"),
        ("--block_out_channels=0", "--block_out_channels=[0] must each lie in [1, 16384]"),
        (
            "--label_dropout=0.3",
            "--label_dropout=0.3 is for training on labels; --label_column says where they are",
        ),
        ("--block_out_channels", "--block_out_channels=[] must hold a number of channels for every level"),
    ],
)
def test_a_refusal_names_option_value_and_range(capsys, words, message):
    assert refusal(capsys, words) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--eval_every=5"],
            "--eval_every=5 needs held-out samples: --held_out_every 10 keeps about a tenth of the data from "
            "training; or give --eval_data_dir FOLDER, or --eval_split NAME",
        ),
        (
            ["--eval_every=5", "--held_out_every=10", "--eval_split=test"],
            "give one of --held_out_every 10 and --eval_split test: each says which samples are held out",
        ),
        (
            ["--eval_split=test"],
            "--eval_split test is only evaluated, and --eval_every is 0; say how often, or leave it out",
        ),
        (["--eval_every=5", "--eval_split=train"], "--eval_split=train is the split that is trained on; name another"),
        (
            ["--dataset_name=none", "--train_data_dir=photos", "--eval_every=5", "--eval_split=test"],
            "--eval_split=test: a folder has no splits; give --eval_data_dir FOLDER or --held_out_every 10",
        ),
        (
            ["--dataset_name=none", "--train_data_dir=photos", "--eval_every=5", "--eval_data_dir=photos/test"],
            "--eval_data_dir=photos/test and --train_data_dir=photos share images, as folders are searched through; "
            "move one out of the other, or give --held_out_every 10",
        ),
        (["--eval_every=5", "--eval_data_dir="], "--eval_data_dir='' is empty; name a data set, or give none"),
    ],
)
def test_held_out_samples_that_cannot_be_are_refused(capsys, words, message):
    assert refusal(capsys, *words) == message


def test_held_out_samples_may_be_kept_without_being_evaluated():
    assert parse("--held_out_every=10").eval_every == 0 and parse().held_out_every is None
    assert "held_out_every" not in FREE_TO_CHANGE  # it says what is trained on


def test_a_process_that_cannot_be_sampled_is_refused(capsys):
    """jsd ends at β = 1, so ᾱ = 0; the rest of the options is checked before, without torch."""
    assert "--beta_schedule jsd ends at ᾱ = 0" in refusal(capsys, "--beta_schedule=jsd")
    assert "sample_steps" in refusal(capsys, "--beta_schedule=jsd", "--sample_steps=1001")
    assert parse("--beta_schedule=jsd", "--prediction_type=v_prediction").beta_schedule == "jsd"
    assert parse("--beta_schedule=jsd", "--init_from=model").init_from == "model"  # then the process is the model's


def test_options_that_may_change_are_options():
    assert FREE_TO_CHANGE < {f.name for f in fields(TrainingOptions)}


# ---- paths ---------------------------------------------------------------------------------------------------------


def test_a_tilde_is_expanded_in_every_path(tmp_path, monkeypatch):
    """On the command line, where a shell leaves --x=~/y alone, in YAML, and in the path of the YAML itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in PATHS:
        others = NEEDED.get(name, [])
        assert getattr(parse(*others, f"--{name}=~/x"), name) == str(tmp_path / "x")
        (tmp_path / "options.yaml").write_text(f"{name}: ~/y")
        assert getattr(parse_options_of_file(name), name) == str(tmp_path / "y")
    assert parse("--background=~/x").background == "~/x"


def parse_options_of_file(name: str) -> TrainingOptions:
    data = [] if name in ("dataset_name", "train_data_dir") else ["--dataset_name=digits", *NEEDED.get(name, [])]
    return parse_options(TrainingOptions, ["--config", "~/options.yaml", *data])


def test_every_option_that_is_described_as_a_place_is_a_path():
    marked = [f.name for f in fields(TrainingOptions) if f.metadata["is_path"]]
    assert marked == PATHS
    words = ("dir", "path", "folder", "from")
    assert {f.name for f in fields(TrainingOptions) if any(word in f.name for word in words)} <= set(marked)


# ---- advice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "ema_decay", "advice"),
    [
        (50, 0.9, None),  # in floats 50 (1 − 0.9) is 4.999…
        (6, 0.5, "ema_decay 0.1666 or less would fit"),
        (1000, 0.9999, "ema_decay 0.995 or less would fit"),
        (3, 0.5, "ema_decay 0 or less would fit"),
        (3, 0, None),  # nothing is averaged
        (800_000, 0.9999, None),
        (800_000, 0.999999, "ema_decay 0.999993 or less would fit"),
    ],
)
def test_advice_on_a_lagging_average(num_steps, ema_decay, advice):
    assert averaging_lags(num_steps, ema_decay) == advice


@given(st.integers(1, 10**9), st.floats(0, 1, exclude_max=True))
def test_advice_that_is_followed_never_warns_again(num_steps, ema_decay):
    advice = averaging_lags(num_steps, ema_decay)
    assert (advice is not None) == (ema_decay > 0 and num_steps * (1 - Fraction(str(ema_decay))) < 5)
    if advice is not None:
        advised = float(advice.split()[1])
        assert 0 <= advised < 1 and averaging_lags(num_steps, advised) is None
        assert advised > 1 - 5 / num_steps - 1e-3  # and it is no lower than it must be


# ---- quick to import -----------------------------------------------------------------------------------------------


def test_names_of_the_hub_are_checked_by_the_function_of_the_options():
    assert check_names is check_names_of_the_hub


@pytest.mark.integration
@pytest.mark.parametrize("words", ["--help", "--num_stepz 3", "--num_steps 0", "--hub_model_id x", "--config no.yaml"])
def test_help_and_mistakes_import_nothing_slow(words):
    script = f"""
import runpy, sys
sys.argv = ["train.py", *{words.split()!r}]
try:
    runpy.run_path({str(ROOT / "training" / "train.py")!r}, run_name="__main__")
except SystemExit as ended:
    code = ended.code or 0
slow = {{"torch", "numpy", "diffusers", "transformers", "accelerate", "huggingface_hub"}} & set(sys.modules)
sys.exit(f"imported {{slow}}" if slow else code)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == (0 if words == "--help" else 2), ended.stderr
