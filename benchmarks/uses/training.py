"""Training as users start it: by a launcher, with variables in the environment, from other weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from . import Seen, use
from .running import Done, Runner

TRAINING = "training"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(done: Done, right: bool, text: str = "trained") -> Seen:
    """What a training that ended with exit code 0 is said to have done; else its last line."""
    return Seen(text, right) if done.code == 0 else Seen(done.last, False)


@use(
    "accumulation-in-the-environment",
    TRAINING,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is in the environment",
    "the gradient norm of the first step as without, or refused with the variable's name",
)
def _(runner: Runner) -> Seen:
    photos, norms = runner.pictures(), []
    for name, variables in (("without", {}), ("with", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})):
        run = runner.place / name
        done = runner.train("--train_data_dir", photos, "--output_dir", run, **variables)
        if done.code:
            return Seen(done.last, name == "with" and done.refused("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"))
        norms.append(metrics(run)[0]["grad_norm"])
    return Seen(f"gradient norm {norms[1]:.3f}, without the variable {norms[0]:.3f}", norms[0] == norms[1])


@use(
    "accumulation-of-the-launcher",
    TRAINING,
    "accelerate launch --gradient_accumulation_steps 4 training/train.py …",
    "refused or said, by the program or in docs/training.md",
)
def _(runner: Runner) -> Seen:
    run = runner.place / "run"
    script = [runner.tree / "training" / "train.py", *runner.tiny(), "--train_data_dir", runner.pictures()]
    done = runner.launch("--cpu", "--gradient_accumulation_steps", "4", *script, "--output_dir", run)
    page = (runner.tree / "docs" / "training.md").read_text()
    paragraphs = (text for text in page.split("\n\n") if "launcher" in text or "accelerate launch" in text)
    is_documented = any("gradient_accumulation_steps" in text for text in paragraphs)
    said = done.said("(?i)launcher|launch .*gradient_accumulation|GRADIENT_ACCUMULATION_STEPS")
    if done.code:
        return Seen(done.last, said is not None)
    if said:
        return Seen(said, True)
    return Seen(
        f"trained without a word; docs/training.md {'says it' if is_documented else 'is silent'}", is_documented
    )


@use(
    "two-processes-on-cpu",
    TRAINING,
    "accelerate launch --config_file …, whose file asks for MULTI_CPU with 2 processes",
    "two processes, or refused or said that one came",
)
def _(runner: Runner) -> Seen:
    lines = (
        "compute_environment: LOCAL_MACHINE",
        "distributed_type: MULTI_CPU",
        "num_machines: 1",
        "num_processes: 2",
    )
    others = ("machine_rank: 0", "mixed_precision: 'no'", "use_cpu: true", "main_training_function: main")
    file = runner.place / "accelerate.yaml"
    file.write_text("\n".join((*lines, *others)) + "\n")
    script = [runner.tree / "training" / "train.py", *runner.tiny(), "--train_data_dir", runner.pictures()]
    done = runner.launch("--config_file", file, *script, "--output_dir", runner.place / "run")
    said = done.said("WORLD_SIZE|several processes")
    counted = done.said(r"\d process(es|\(es\))? on cpu")
    return Seen(said or counted or done.last, said is not None or bool(counted and "2 process" in counted))


@use(
    "bf16-of-the-launcher",
    TRAINING,
    "accelerate launch --mixed_precision bf16 training/train.py …",
    "options.yaml holds the precision in force, bf16",
)
def _(runner: Runner) -> Seen:
    import yaml

    run = runner.place / "run"
    script = [runner.tree / "training" / "train.py", *runner.tiny(), "--train_data_dir", runner.pictures()]
    done = runner.launch("--cpu", "--mixed_precision", "bf16", *script, "--output_dir", run)
    if done.code:
        return Seen(done.last, False)
    found = yaml.safe_load((run / "options.yaml").read_text()).get("mixed_precision")
    return Seen(f"options.yaml: mixed_precision {found}", found == "bf16")


def size_use(name: str, first: int, second: int) -> None:
    @use(
        name,
        TRAINING,
        f"--resolution {second} --init_from a run of {first}×{first} pixels",
        "trained, or refused with both sizes",
    )
    def _(runner: Runner) -> Seen:
        photos, run = runner.pictures(), runner.place / "first"
        options = ["--train_data_dir", photos, "--sample_every", "0"]
        done = runner.train(*options, "--resolution", str(first), "--output_dir", run)
        assert done.code == 0, done.output
        checkpoint = run / "checkpoints" / "step-6"
        start = ["--resolution", str(second), "--init_from", checkpoint, "--output_dir", runner.place / "second"]
        done = runner.train(*options, *start)
        if done.code == 0:
            return Seen(f"trained, {len(metrics(runner.place / 'second'))} steps", True)
        return Seen(done.last, done.refused(f"{first}.*{second}|{second}.*{first}"))


size_use("larger-images", 16, 32)
size_use("smaller-images", 32, 16)


@use(
    "colour-from-grey-weights",
    TRAINING,
    "--init_from model_cards/ddpm-digits on pictures in colour",
    "refused with the name of the weights and both numbers of channels",
)
def _(runner: Runner) -> Seen:
    digits = runner.digits
    options = ["--resolution", "8", "--train_data_dir", runner.pictures(), "--output_dir", runner.place / "run"]
    done = runner.train(*options, "--init_from", digits)
    return Seen(done.last, done.refused("init_from.* 1 channel.* 3"))


@use(
    "advice-on-averaging",
    TRAINING,
    "--num_steps 50 --ema_decay 0.9, which the advice for shorter runs names",
    "no warning",
)
def _(runner: Runner) -> Seen:
    run = runner.place / "run"
    done = runner.train(
        *("--train_data_dir", runner.pictures(), "--output_dir", run, "--num_steps", "50"),
        *("--ema_decay", "0.9", "--checkpoint_every", "50", "--log_every", "25"),
    )
    warned = done.said("too short for")
    return Seen(warned, False) if warned else trained(done, True, "trained without a warning")


@use(
    "home-in-an-option",
    TRAINING,
    "--output_dir=~/runs/x, which the shell leaves as it is",
    "the folder is in the home folder",
)
def _(runner: Runner) -> Seen:
    home = runner.place / "home"
    home.mkdir()
    done = runner.train("--train_data_dir", runner.pictures(), "--output_dir=~/runs/x", HOME=str(home))
    found = [str(file.parent.relative_to(runner.place)) for file in runner.place.rglob("options.yaml")]
    wanted = str((home / "runs" / "x").relative_to(runner.place))
    return trained(done, wanted in found, f"trained into {', '.join(sorted(found, key=len)[:1])}")


@use(
    "home-in-yaml",
    TRAINING,
    "train_data_dir: ~/pics in a configuration",
    "the pictures in the home folder are read",
)
def _(runner: Runner) -> Seen:
    home = runner.place / "home"
    runner.pictures("home/pics")
    text = (runner.tree / "training" / "configs" / "folder64.yaml").read_text()
    config = runner.place / "config.yaml"
    config.write_text(re.sub(r"train_data_dir:.*", "train_data_dir: ~/pics", text))
    done = runner.train("--config", config, *runner.tiny()[2:], "--output_dir", "run", HOME=str(home))
    return trained(done, True, "trained")


@use(
    "home-that-cannot-be-written",
    TRAINING,
    "--dataset_name my_data, a good folder, where HOME cannot be written and HF_HOME is not set",
    "refused with the words HF_HOME or HF_DATASETS_CACHE",
)
def _(runner: Runner) -> Seen:
    words = [runner.tree / "training" / "train.py", *runner.tiny(), "--dataset_name", runner.pictures("my_data")]
    dropped = ("HF_HOME", "HF_DATASETS_CACHE")
    done = runner.start(*words, "--output_dir", "run", drop=dropped, HOME="/proc/none")
    return Seen(done.last, done.refused("HF_HOME|HF_DATASETS_CACHE"))


@use(
    "numpy-for-datasets",
    TRAINING,
    "pip installs the lowest versions that pyproject.toml allows; pyarrow, which datasets brings, needs NumPy 2 "
    "(pyproject.toml is read; the installation, which fails with NumPy 1.26, is not repeated)",
    "numpy>=2 where datasets is asked for",
)
def _(runner: Runner) -> Seen:
    import tomllib

    project = tomllib.loads((runner.tree / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    bounds = [text for text in asked if re.match(r"numpy\b", text)]
    return Seen(" and ".join(bounds) or "numpy is not named", any(re.search(r">=\s*2", text) for text in bounds))
