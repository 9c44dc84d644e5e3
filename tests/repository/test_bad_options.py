"""training/train.py and its YAML files refuse bad options before anything is trained."""

# pyright: reportArgumentType=false
# (wrong arguments are what this file is about)

import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm_hf.runs import parse_options
from training import train as train_py

pytestmark = pytest.mark.usefixtures("place")


# ---- training: command line and configuration files ----------------------------------------------------------------


# An unpublishable size: what is not refused would otherwise train.
SMALL = "--num_train_timesteps=20 --beta_end=0.5 --block_out_channels 8 --layers_per_block=1 --attention_resolutions"
SMALL += " --norm_num_groups=4 --global_batch_size=16 --cpu_threads=1"


def train(place: Path, words: list[str]) -> None:
    train_py.main([f"--output_dir={place / 'run'}", *SMALL.split(), *words])


@pytest.fixture
def not_training(monkeypatch):
    """Training that was not refused fails the test at once."""

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail("it would have trained")

    monkeypatch.setattr(train_py, "train", fail)


# exit code 2: known from the options alone
OPTIONS = [
    *(
        (f"--{name}=-1", f"--{name}=-1 must be at least {least}")
        for least, names in (
            (0, "seed warmup_steps sample_every skip_bad_images num_workers"),
            (1, "num_train_timesteps num_steps global_batch_size log_every gradient_accumulation_steps num_samples"),
            (1, "layers_per_block num_layers checkpoint_every resolution in_channels sample_steps cpu_threads"),
            (1, "norm_num_groups hidden_size"),
            (2, "keep_checkpoints"),
        )
        for name in names.split()
    ),
    ("--norm_num_groups=0", "--norm_num_groups=0 must be at least 1"),
    ("--num_train_timesteps=1000000000", "--num_train_timesteps=1000000000 must be at most 1000000"),
    ("--num_samples=1000000", "--num_samples=1000000 must be at most 10000"),
    ("--num_workers=100000", "--num_workers=100000 must be at most 1024"),
    ("--cpu_threads=100000", "--cpu_threads=100000 must be at most 1024"),
    ("--layers_per_block=100000000", "--layers_per_block=100000000 must be at most 100"),
    ("--hidden_size=10000000", "--hidden_size=10000000 must be at most 16384"),
    ("--num_layers=10000000", "--num_layers=10000000 must be at most 1000"),
    ("--block_out_channels", "--block_out_channels=[] must hold"),
    ("--block_out_channels 8 -8", "--block_out_channels=[8, -8] must each lie in [1, 16384]"),
    ("--block_out_channels 100000", "--block_out_channels=[100000] must each lie in [1, 16384]"),
    ("--attention_resolutions -1", "--attention_resolutions=[-1] must each lie in [1, 16384]"),
    *(
        (f"--{name}={value}", f"--{name}={float(value)} must be positive and finite")
        for name in ("learning_rate", "max_grad_norm")
        for value in ("0", "-1", "nan", "inf")
    ),
    *(
        (f"--{name}={value}", f"--{name}={float(value)}", "must lie in [0, 1)")
        for name in ("ema_decay", "dropout")
        for value in ("1", "-0.1", "nan")
    ),
    *(
        (f"--{name}={value}", f"--{name}={float(value)} must lie inside (0, 1)")
        for name in ("beta_start", "beta_end")
        for value in ("0", "1", "-0.1", "nan", "inf")
    ),
    ("--beta_start=1e-30", "betas are too small or too many for float64: ᾱ must stay inside (0, 1)"),
    ("--num_train_timesteps=100000", "betas are too small or too many for float64"),
    ("--beta_schedule=jsd", "--beta_schedule jsd", "--prediction_type epsilon", "use v_prediction or sample"),
    ("--beta_schedule=cosine", "--beta_schedule", "'cosine' is not one of linear, quad"),
    ("--beta_schedule=lineal", "'lineal'", "did you mean linear?"),
    ("--objective=vbl", "--objective", "'vbl' is not one of simple, vlb; did you mean vlb?"),
    ("--prediction_type=eps", "--prediction_type", "'eps' is not one of epsilon, sample"),
    ("--variance_type=fixed_smal", "did you mean fixed_small?"),
    ("--mixed_precision=b16", "'b16' is not one of no, fp16, bf16; did you mean bf16?"),
    ("--report_to=tensorbord", "did you mean tensorboard?"),
    ("--report_to=wandb", "--report_to wandb is not installed: pip install wandb"),
    ("--hub_strategy=never", "'never' is not one of end, every_save"),
    ("--timestep_sampling=loss", "'loss' is not one of uniform, loss_history"),
    ("--variance_type=learned", "--variance_type learned needs --objective vlb"),
    ("--timestep_sampling=loss_history", "--timestep_sampling loss_history is for --objective vlb"),
    ("--sample_steps=21", "--sample_steps=21 exceeds --num_train_timesteps=20"),
    ("--prediction_type=previous_sample --sample_steps=5", "--sample_steps=5: with --prediction_type previous_sample"),
    ("--objective=vlb --variance_type=learned --sample_steps=5", "--sample_steps=5: with --variance_type learned"),
    ("--dataset_name=none", "give one of --dataset_name (None) and --train_data_dir (None)"),
    ("--train_data_dir=photos", "--dataset_name (digits) and --train_data_dir (photos)", "folder64.yaml"),
    ("--dataset_name=", "--dataset_name='' is empty"),
    ("--train_data_dir= --dataset_name=none", "--train_data_dir='' is empty"),
    ("--output_dir=", "--output_dir='' must be a folder"),
    ("--push_to_hub", "--push_to_hub needs --hub_model_id user/name"),
    ("--hub_model_id=x", "the repository is 'x'; give it as user/name"),
    ("--hub_model_id=../x/y", "the repository is '../x/y'; give it as user/name"),
    ("--num_steps=many", "--num_steps", "'many'"),
    ("--num_steps=1e3", "--num_steps", "'1e3'"),
    ("--num_steps=1.5", "--num_steps", "'1.5'"),
    ("--num_steps=true", "--num_steps", "'true'"),
    ("--num_steps=", "--num_steps", "''"),
    ("--num_steps=none", "--num_steps", "'none'"),
    ("--learning_rate=fast", "--learning_rate", "'fast'"),
    ("--learning_rate=1,5", "--learning_rate", "'1,5'"),
    ("--random_flip=perhaps", "--random_flip", "perhaps"),
    ("--block_out_channels 8 x", "--block_out_channels", "'x'"),
    ("--block_out_channels 8,16", "--block_out_channels", "'8,16'"),
    ("--lerning_rate=1", "unknown option --lerning_rate; did you mean learning_rate?"),
    ("--batch_size=4", "unknown option --batch_size; did you mean global_batch_size?"),
    ("--learning=1", "unknown option --learning"),
    ("--zzz", "unknown option --zzz"),
    ("digits", "unexpected words: digits"),
    ("--num_steps", "--num_steps", "expected one argument"),
    ("--config=missing.yaml", "--config missing.yaml", "No such file"),
    ("--config=.", "--config .", "Is a directory"),
]


@pytest.mark.parametrize(("words", "expected"), [(words, expected) for words, *expected in OPTIONS])
def test_training_command_line(place, not_training, monkeypatch, capsys, words, expected):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(SystemExit) as info:
        train(place, words.split())
    assert info.value.code == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert all(word in message for word in expected) and message.count("\n") == 1, message
    assert not list(place.iterdir())


# exit code 1: known only with the data, the checkpoint or the machine; the run's folder is there by then
UNTRAINABLE = [
    ("--global_batch_size=1438", "digits has 1437 samples, fewer than global_batch_size=1438; lower"),
    ("--gradient_accumulation_steps=3", "global_batch_size=16", "gradient_accumulation_steps=3", "a multiple of 3"),
    ("--in_channels=3", "the model expects 3 channels (--in_channels), the data has 1"),
    ("--norm_num_groups=3", "norm_num_groups=3 must divide (8,)"),
    ("--block_out_channels 6 --norm_num_groups=4", "norm_num_groups=4 must divide (6,)"),
    ("--block_out_channels 8 8 8 8 8", "sample_size=8", "divisible by 16"),
    ("--dataset_name=moons --hidden_size=3", "hidden_size=3 must be even and at least 4"),
    ("--dataset_name=moons --random_flip", "--random_flip mirrors images, and the data are points; leave it out"),
    ("--dataset_split=all", "split='all': digits has 'train' and 'test'"),
    ("--image_column=x", "image_column='x': means nothing for 'digits'; leave it out"),
    ("--dataset_config=x", "dataset_config='x': means nothing for 'digits'; leave it out"),
    ("--resolution=16", "resolution=16: means nothing for 'digits'; leave it out"),
    ("--resolution=100000", "resolution=100000: must be an integer, 1 to 7071 pixels"),
    ("--background=whitish", "background='whitish': pass a colour name such as 'white', or '#rrggbb'"),
    (
        "--dataset_name=digit",
        "dataset_name='digit': not built in (digits, swiss_roll, moons, fashion_mnist), no folder",
    ),
    ("--dataset_name=none --train_data_dir=nowhere", "train_data_dir='nowhere': no such folder; check the path"),
    ("--init_from=nowhere/at/all", "nowhere/at/all"),
    ("--resume=nowhere", "nowhere/train_state/manifest.json cannot be read"),
    ("--mixed_precision=fp16", "--mixed_precision fp16 needs a GPU", "use bf16 or no"),
]


@pytest.mark.parametrize(("words", "expected"), [(words, expected) for words, *expected in UNTRAINABLE])
def test_what_cannot_be_trained(place, not_training, words, expected):
    with pytest.raises(SystemExit) as info:
        train(place, words.split())
    message = info.value.code
    assert isinstance(message, str) and message.startswith("train.py: ") and "\n" not in message
    assert all(word in message for word in expected), message
    assert {path.name for path in place.rglob("*")} <= {"run", ".in_use"}


def test_an_output_folder_that_is_a_file(place, not_training, capsys):
    (place / "file").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        train(place, ["--output_dir=file"])
    assert "--output_dir='file' must be a folder" in capsys.readouterr().err
    assert (place / "file").read_text() == "mine"


YAML = [
    ("lerning_rate: 1", "unknown key 'lerning_rate'; did you mean learning_rate?"),
    ("Seed: 1", "unknown key 'Seed'; did you mean seed?"),
    ("zzz: 1", "unknown key 'zzz'"),
    ("<<: {seed: 1}", "unknown key '<<'"),
    ("seed: 1\nseed: 2", "seed is given more than once"),
    ("seed: 1\nnum_steps: 5\nseed: 1", "seed is given more than once"),
    ("num_steps: many", "--num_steps", "'many'"),
    ("num_steps: 3.5", "--num_steps", "'3.5'"),
    ("num_steps: null", "num_steps needs a value"),
    ("num_steps:", "num_steps needs a value"),
    ("num_steps: [1, 2]", "num_steps takes one value, got a list of 2"),
    ("num_steps: {a: 1}", "num_steps must be a plain value or a flat list"),
    ("num_steps: 2026-01-01", "--num_steps", "'2026-01-01'"),
    ("num_steps: -5", "--num_steps=-5 must be at least 1"),
    ("learning_rate: fast", "--learning_rate", "'fast'"),
    ("learning_rate: .nan", "--learning_rate", ".nan"),
    ("learning_rate: nan", "--learning_rate=nan must be positive and finite"),
    ("random_flip: perhaps", "--random_flip", "perhaps"),
    ("random_flip: []", "random_flip takes one value, got a list of 0"),
    ("block_out_channels: [[8]]", "block_out_channels must be a plain value or a flat list"),
    ("block_out_channels: [8, none]", "block_out_channels needs a value"),
    ("block_out_channels: 8 16", "--block_out_channels", "'8 16'"),
    ("block_out_channels: []", "--block_out_channels=[] must hold"),
    ("mixed_precision: [bf16]", "mixed_precision takes one value"),
    ("mixed_precision: b16", "'b16' is not one of no, fp16, bf16; did you mean bf16?"),
    ("push_to_hub: true", "--push_to_hub needs --hub_model_id user/name"),
    ("variance_type: learned", "--variance_type learned needs --objective vlb"),
    ("- seed\n- 1", "expected lines of the form `key: value`"),
    ("seed", "expected lines of the form `key: value`"),
    ("seed: [1", "while parsing"),
    ("a: b: c", "mapping values are not allowed"),
    ("seed: 1\n---\nseed: 2", "expected a single document"),
    ("seed: *nothing", "undefined alias"),
    ("\tseed: 1", "cannot start any token"),
    ("? [1]\n: 2", "found unhashable key"),
    ("[" * 1200, "lists within lists"),
]


@pytest.mark.parametrize(("text", "expected"), [(t, e) for t, *e in YAML], ids=[t[:30] for t, *_ in YAML])
def test_training_configuration_files(place, not_training, capsys, text, expected):
    (place / "options.yaml").write_text(text)
    with pytest.raises(SystemExit) as info:
        parse_options(train_py.TrainingOptions, ["--dataset_name=digits", "--config", "options.yaml"])
    assert info.value.code == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert all(word in message for word in expected), message
    assert [path.name for path in place.iterdir()] == ["options.yaml"]
