"""What `accelerate launch`, its configuration files and its variables do to a run: obeyed and recorded, or refused."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from accelerate.state import GradientState
from huggingface_hub import ModelCard
from tiny_runs import ROOT, build, column, final_hashes, finish, refusal, start, start_pair, train

from ddpm_hf.hub import model_card
from ddpm_hf.runs import checkpoints, linear_warmup

pytestmark = pytest.mark.integration

LAUNCH = ["-m", "accelerate.commands.launch"]
TWO_ON_CPUS = "distributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\nmachine_rank: 0\nuse_cpu: true\n"
CONFIGURATION = "compute_environment: LOCAL_MACHINE\nmain_training_function: main\nmixed_precision: 'no'\n"


def configuration(folder: Path, lines: str = TWO_ON_CPUS) -> str:
    """A file for `accelerate launch --config_file`."""
    path = folder / "accelerate.yaml"
    path.write_text(CONFIGURATION + lines, encoding="utf-8")
    return str(path)


def last_line(process: subprocess.Popen) -> str:
    """Of a process of train.py that refuses, and shows no traceback of its own."""
    output, _ = process.communicate(timeout=300)
    lines = [line for line in output.splitlines() if line.startswith("train.py: ")]
    assert process.returncode == 1 and len(lines) == 1, output
    return lines[0]


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_accumulation_by_a_variable_is_refused_with_the_option_that_does_it(tmp_path, monkeypatch):
    alone = train(tmp_path / "alone", num_steps=2, checkpoint_every=2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    line = refusal(tmp_path / "run", num_steps=2)
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4" in line and not (tmp_path / "run").exists()
    option = line.partition("--gradient_accumulation_steps ")[2].split(",")[0]
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    advised = train(tmp_path / "run", num_steps=2, checkpoint_every=2, gradient_accumulation_steps=option)
    assert column(advised, "grad_norm") == pytest.approx(column(alone, "grad_norm"), rel=1e-5)


def test_an_accelerator_that_divides_once_more_gets_no_updates(tmp_path):
    run = build(tmp_path)
    arguments: dict[str, Any] = {"learning_rate": linear_warmup(1e-3, 0)}
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        with pytest.raises(ValueError, match="divides gradients by 4 .*give num_parts"):
            type(run.updates)(accelerator, run.model, run.state, run.updates.losses, **arguments)
    finally:
        GradientState._reset_state()


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cards_command_trains_the_same_weights_in_the_launchers_precision(tmp_path):
    """Of one process and of two; the command is run as it stands, beside the options that the card speaks of."""
    options = {"num_steps": 4, "dropout": 0.2, "checkpoint_every": 4}
    launcher = [*LAUNCH, "--mixed_precision", "bf16"]
    pair = [*launcher, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    for name, words in (("one", launcher), ("two", pair)):
        run = tmp_path / name
        finish(start(run, launcher=words, **options))
        saved = yaml.safe_load((run / "options.yaml").read_text(encoding="utf-8"))
        assert saved["mixed_precision"] == "bf16"
        card = ModelCard(model_card(run, run / "checkpoints" / "step-4", "tester/tiny"))
        (command,) = [line for line in card.text.splitlines() if "--config options.yaml" in line]
        before = final_hashes(run, 4)
        again = tmp_path / "again" / name
        again.mkdir(parents=True)
        text = yaml.safe_dump({**saved, "output_dir": str(again / "run")})
        (again / "options.yaml").write_text(text, encoding="utf-8")
        (again / "training").symlink_to(ROOT / "training")
        bin_folder = shlex.quote(str(Path(sys.executable).parent))
        script = f"cd {shlex.quote(str(again))}; PATH={bin_folder}:$PATH; {command}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert final_hashes(again / "run", 4) == before
    alone = final_hashes(tmp_path / "one", 4)
    assert final_hashes(train(tmp_path / "float32", **options), 4) != alone  # the precision does matter


def test_the_precision_in_force_is_recorded_whoever_chose_it(tmp_path, monkeypatch):
    for chosen, given, expected in ((None, {}, "no"), ("bf16", {}, "bf16"), ("bf16", {"mixed_precision": "no"}, "no")):
        if chosen:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", chosen)
        run = train(tmp_path / f"{chosen}-{len(given)}", num_steps=1, **given)
        assert yaml.safe_load((run / "options.yaml").read_text(encoding="utf-8"))["mixed_precision"] == expected
        assert checkpoints.verify(run / "checkpoints" / "step-1")["options"]["mixed_precision"] == expected


# ---- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_configuration_of_two_processes_that_starts_one_is_refused(tmp_path):
    launcher = [*LAUNCH, "--config_file", configuration(tmp_path)]
    line = last_line(start(tmp_path / "run", launcher=launcher))
    assert "was asked for several processes and started one" in line
    assert "ACCELERATE_USE_CPU=true" in line and "accelerate launch --multi_gpu --num_processes N" in line


@pytest.mark.slow
def test_what_that_refusal_advises_works_beside_that_configuration(tmp_path):
    launcher = [*LAUNCH, "--config_file", configuration(tmp_path)]
    two = [*launcher, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    assert "2 process(es) on cpu" in finish(start(tmp_path / "two", launcher=two, num_steps=2))
    one = [*launcher, "--num_processes", "1"]
    assert "1 process(es) on cpu" in finish(start(tmp_path / "one", launcher=one, num_steps=2))
    by_cpu = [*LAUNCH, "--cpu", "--num_processes", "2"]
    assert "was asked for several processes and started one" in last_line(start(tmp_path / "cpu", launcher=by_cpu))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\ndynamo_config:\n  dynamo_backend: INDUCTOR\n",
         "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
        ("distributed_type: FSDP\nnum_processes: 2\nnum_machines: 1\nmachine_rank: 0\n"
         "fsdp_config:\n  fsdp_sharding_strategy: FULL_SHARD\n", "ACCELERATE_USE_FSDP=true"),
    ],
    ids=["compiler", "shards"],
)  # fmt: skip
def test_configurations_that_ask_for_what_no_option_records_are_refused(tmp_path, lines, name):
    launcher = [*LAUNCH, "--config_file", configuration(tmp_path, lines), "--main_process_port", "0"]
    output, _ = start(tmp_path / "run", launcher=launcher).communicate(timeout=300)
    assert f"train.py: {name}" in output and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accumulation_as_an_option_of_the_launcher_does_nothing(tmp_path):
    """docs/training.md says so: the launcher hands it on to DeepSpeed alone."""
    words = [*LAUNCH, "--gradient_accumulation_steps", "4"]
    finish(start(tmp_path / "four", launcher=words, num_steps=2))
    train(tmp_path / "one", num_steps=2)
    assert column(tmp_path / "four", "grad_norm") == column(tmp_path / "one", "grad_norm")


# ---- what may change ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_dropout_a_run_goes_on_by_other_processes_and_parts(tmp_path):
    """The losses are those of a run that was not changed, up to rounding, and no flag is needed."""
    whole = train(tmp_path / "whole", num_steps=6)
    parted = train(tmp_path / "parted", num_steps=2)
    for process in start_pair(parted, num_steps=4):
        finish(process)
    train(parted, num_steps=6, gradient_accumulation_steps=4)
    assert column(parted, "step") == [1, 2, 3, 4, 5, 6]
    assert column(parted, "loss") == pytest.approx(column(whole, "loss"), abs=1e-4)
    assert checkpoints.verify(parted / "checkpoints" / "step-4")["world_size"] == 2


def test_points_have_no_dropout_whatever_the_option_says(tmp_path):
    options = {"config": ROOT / "training" / "configs" / "points.yaml", "hidden_size": 16, "dropout": 0.1}
    train(tmp_path, num_steps=2, **options)
    train(tmp_path, num_steps=3, gradient_accumulation_steps=2, **options)
    assert column(tmp_path, "step") == [1, 2, 3]


def test_another_network_cannot_be_allowed(tmp_path):
    train(tmp_path, num_steps=2)
    line = refusal(tmp_path, num_steps=3, layers_per_block=2)
    assert line.endswith("or another --output_dir; another network cannot go on from these weights")


def test_with_dropout_they_are_refused_by_name_and_allowed_by_name(tmp_path, caplog):
    options = {"num_steps": 2, "dropout": 0.2}
    train(tmp_path, **options)
    changed = {**options, "num_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": "1e-3"}
    line = refusal(tmp_path, **changed)
    assert line.endswith("pass --allow_changes gradient_accumulation_steps,learning_rate to go on all the same")
    line = refusal(tmp_path, **changed, allow_changes="learning_rate,num_processes")
    assert "gradient_accumulation_steps was 1, is 2" in line and "learning_rate was" not in line
    train(tmp_path, **changed, allow_changes="learning_rate,gradient_accumulation_steps")
    assert "resuming although learning_rate was 0.002, is 0.001" in caplog.text
    assert column(tmp_path, "learning_rate")[-1] == 1e-3
