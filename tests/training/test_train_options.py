"""What training/train.py takes, refuses and warns of, before it trains."""

import logging
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import CONFIGS, SCRIPT, arguments, refusal, train

from ddpm_hf.machine import distributed as processes
from ddpm_hf.runs import DistillationOptions, averaging_lags, build_network, parse_options
from training import train as train_py


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stepz": 3}, "did you mean num_steps?"),
        ({"mixed_precision": "bf61"}, "did you mean bf16?"),
        ({"beta_schedule": "linaer"}, "did you mean linear?"),
        ({"variance_type": "fitted"}, "'fitted' is not one of fixed_small, fixed_large, learned"),
        ({"objective": "vbl"}, "did you mean vlb?"),
        ({"variance_type": "learned"}, "--variance_type learned needs --objective vlb: L_simple does not train a var"),
        ({"timestep_sampling": "loss_history"}, "--timestep_sampling loss_history is for --objective vlb; L_simple"),
        ({"num_steps": 0}, "--num_steps=0 must be at least 1"),
        ({"keep_checkpoints": 1}, "--keep_checkpoints=1 must be at least 2"),
        ({"sample_every": -1}, "--sample_every=-1 must be at least 0"),
        ({"resolution": 0}, "--resolution=0 must be at least 1"),
        ({"learning_rate": "0"}, "--learning_rate=0.0 must be positive and finite"),
        ({"learning_rate": "inf"}, "--learning_rate=inf must be positive and finite"),
        ({"max_grad_norm": "nan"}, "--max_grad_norm=nan must be positive and finite"),
        ({"ema_decay": 1}, "--ema_decay=1.0 must lie in [0, 1)"),
        ({"sample_steps": 21}, "--sample_steps=21 exceeds --num_train_timesteps=20"),
        ({"train_data_dir": "photos"}, "give one of --dataset_name (digits) and --train_data_dir (photos)"),
        ({"dataset_name": "none"}, "start from --config training/configs/folder64.yaml"),
    ],
)
def test_options_that_make_no_sense_exit_with_2_and_a_reason(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        train(tmp_path / "run", **options)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(path):
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    needs_data = keys["dataset_name"] == "none"
    kind = DistillationOptions if "teacher" in keys else train_py.TrainingOptions
    parsed: Any = parse_options(kind, ["--config", str(path), *(["--train_data_dir=photos"] if needs_data else [])])
    folder = {"distill_digits": "runs/digits-4steps"}.get(path.stem, f"runs/{path.stem}")
    assert parsed.output_dir == folder and all(hasattr(parsed, key) for key in keys)
    stages = parsed.num_steps if isinstance(parsed.num_steps, list) else [parsed.num_steps]
    assert averaging_lags(min(stages), parsed.ema_decay) is None


PAPER = {
    "cifar10": ((3, 32, 32), 35_746_307, (2e-4, 128, 0.1, 800_000, "fixed_large")),
    "celebahq256": ((3, 256, 256), 113_673_219, (2e-5, 64, 0.0, 500_000, "fixed_small")),
    "lsun256": ((3, 256, 256), 113_673_219, (2e-5, 64, 0.0, 1_200_000, "fixed_small")),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_configs_have_its_values_and_its_network(name):
    shape, num_parameters, values = PAPER[name]
    data = "--dataset_name=uoft-cs/cifar10" if name == "cifar10" else "--train_data_dir=photos"
    options = parse_options(
        train_py.TrainingOptions, ["--config", str(SCRIPT.parent / "configs" / f"{name}.yaml"), data]
    )
    found = options.learning_rate, options.global_batch_size, options.dropout, options.num_steps, options.variance_type
    assert found == values
    assert (options.warmup_steps, options.max_grad_norm, options.ema_decay) == (5000, 1.0, 0.9999)
    process = options.num_train_timesteps, options.beta_schedule, options.beta_start, options.beta_end
    assert process == (1000, "linear", 1e-4, 0.02) and options.prediction_type == "epsilon"
    with torch.device("meta"):
        unet = build_network(options, shape)
    assert sum(p.numel() for p in unet.parameters()) == num_parameters


def test_printed_options_read_back_and_nothing_is_written(tmp_path, capsys):
    given = {"dropout": 0.25, "learning_rate": "3e-4", "sample_steps": 7, "block_out_channels": [8, 16]}
    train(tmp_path / "run", print_config=True, **given)
    assert not list(tmp_path.iterdir())
    config = tmp_path / "printed.yaml"
    config.write_text(capsys.readouterr().out, encoding="utf-8")
    read = parse_options(train_py.TrainingOptions, ["--config", str(config)])
    expected = parse_options(
        train_py.TrainingOptions,
        arguments(tmp_path / "run", print_config=True, **given),
        default_config=SCRIPT.parent / "configs" / "digits.yaml",
    )
    assert read == expected and read.learning_rate == 3e-4 and read.block_out_channels == [8, 16]


def test_a_dry_run_says_what_would_happen_and_draws_the_data(tmp_path, capsys, caplog):
    """Anew, then after three steps from there, then refused with what differs; the run's own files stay."""
    caplog.set_level(logging.INFO)
    run = tmp_path / "run"
    train(run, dry_run=True, label_column="label")
    shown = capsys.readouterr().out
    assert [path.name for path in run.iterdir()] == ["contact_sheet.png"] and len(shown.splitlines()) < 30
    assert "1,437 samples found in digits, 1,437 used" in shown and "levels 0 to 16 of 0 to 16" in shown
    assert "0 136, 1 154" in shown and "would begin anew" in shown and "6 steps take about" in shown
    assert "evaluations" not in shown
    train(run, num_steps=3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".in_use"}
    train(run, dry_run=True)
    assert "would go on at step 3" in capsys.readouterr().out
    assert "would be refused" in refusal(run, dry_run=True, dropout=0.3) + capsys.readouterr().out
    after = {path: path.read_bytes() for path in before}
    assert {p.name for p in before if before[p] != after[p]} <= {"contact_sheet.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 2000}, "digits has 1437 samples, fewer than global_batch_size=2000"),
        ({"gradient_accumulation_steps": 3}, "global_batch_size=16 cannot be divided among 1 processes"),
        ({"in_channels": 3}, "the model expects 3 channels (--in_channels), the data has 1"),
        ({"dataset_name": "none", "train_data_dir": "no/such/folder"}, "'no/such/folder': no such folder"),
        ({"block_out_channels": [6]}, "norm_num_groups"),
        ({"block_out_channels": [8] * 5}, "sample_size"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16 needs a GPU"),
        ({"resume": "no/such/checkpoint"}, "no/such/checkpoint"),
        ({"init_from": "no/such/model"}, "no/such/model"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path, options, message):
    assert message in refusal(tmp_path / "run", **options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal(tmp_path / "file" / "run")


def test_more_processes_launched_than_formed_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "Accelerator", lambda **kwargs: type("Alone", (), {"num_processes": 1}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were launched, but Accelerate formed 1" in refusal(tmp_path)


@pytest.mark.parametrize(("ema_decay", "warned"), [(0.5, True), (0.1666, False)])  # as advised
def test_a_run_too_short_for_its_ema_is_warned_about(tmp_path, caplog, ema_decay, warned):
    train(tmp_path, ema_decay=ema_decay, dry_run=True)  # 6 steps
    warning = "6 steps are too short for ema_decay 0.5: the averaged weights, which are saved, will lag behind; "
    assert (warning + "ema_decay 0.1666 or less would fit" in caplog.text) == warned
    assert ("too short" in caplog.text) == warned


def test_allow_tf32_sets_the_flags(tmp_path):
    for on in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        train(tmp_path, allow_tf32=on, dry_run=True)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == on


def test_the_list_of_files_follows_data_that_were_allowed_to_change(tmp_path):
    """Else a later refusal would name files that are trained on by now."""
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    run = tmp_path / "run"
    given = {"dataset_name": "none", "train_data_dir": tmp_path, "global_batch_size": 4}
    train(run, num_steps=3, **given)
    Image.new("L", (8, 8), 255).save(tmp_path / "new.png")
    assert "of the files 1 added (new.png)" in refusal(run, **given)
    train(run, num_steps=6, allow_changes=True, **given)
    assert "new.png" in (run / "data_files.tsv").read_text(encoding="utf-8")
