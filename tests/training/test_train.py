"""training/train.py as it is used: what a run leaves, refuses, survives, and shares among processes.

Most tests call its main() in this process with a network of 10,593 parameters; where the promise is about processes,
they are real ones.
"""

import hashlib
import itertools
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from PIL import Image
from torch import Tensor

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline
from ddpm_hf.machine import distributed as processes
from ddpm_hf.objectives import simple_loss, vlb_loss
from ddpm_hf.runs import Batch, KeyedBatches, checkpoints, parse_options, read_metrics, share_of
from ddpm_hf.short_chains import shortened
from training import train as train_py

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "train.py"
CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
TINY = {
    "block_out_channels": [8],
    "layers_per_block": 1,
    "attention_resolutions": [],
    "norm_num_groups": 4,
    "global_batch_size": 16,
    "num_train_timesteps": 20,
    "beta_end": 0.5,
    "num_steps": 6,
    "warmup_steps": 2,
    "ema_decay": 0.5,
    "checkpoint_every": 3,
    "log_every": 1,
    "sample_every": 0,
    "num_samples": 4,
    "cpu_threads": 1,
}


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """What a run sets for its whole process, taken back."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    AcceleratorState._reset_state(True)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def arguments(folder: Path, **options: Any) -> list[str]:
    """The command line of a tiny run in `folder`."""
    words = []
    for name, value in {"output_dir": folder, **TINY, **options}.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return words


def train(folder: Path, **options: Any) -> Path:
    """Run main() as in a process of its own."""
    AcceleratorState._reset_state(True)
    train_py.main(arguments(folder, **options))
    return folder


def refusal(folder: Path, **options: Any) -> str:
    """The line with which main() exits instead of training."""
    with pytest.raises(SystemExit) as exit_info:
        train(folder, **options)
    message = exit_info.value.code
    assert isinstance(message, str), f"exit code {message}"  # Python prints it and exits with 1
    assert message.startswith("train.py: ") and "\n" not in message
    return message


def build(folder: Path, **options: Any) -> Any:
    """The script's Run, ready for training_step."""
    AcceleratorState._reset_state(True)
    parsed = parse_options(
        train_py.TrainingOptions, arguments(folder, **options), default_config=CONFIGS[0].with_name("digits.yaml")
    )
    return train_py.build_run(parsed, train_py.make_accelerator(parsed), train_py.load_data(parsed))


def stream_of(run: Any) -> Iterator[Batch]:
    options = run.options
    parts = range(options.gradient_accumulation_steps)
    for step in itertools.count(run.state.step):
        for part in parts:
            yield run.batches.rows(step, share_of(options.global_batch_size, len(parts), part, 0, 1))


def column(folder: Path, name: str) -> list[Any]:
    """A number of every line of metrics.jsonl."""
    return [line[name] for line in read_metrics(folder / "metrics.jsonl")]


def final_hashes(folder: Path, step: int) -> dict[str, str]:
    """sha256 of every file of a checkpoint that holds weights, optimizer or counters."""
    checkpoint = folder / "checkpoints" / f"step-{step}"
    names = [p for p in checkpoint.rglob("*") if p.suffix == ".safetensors" or p.name == "state.json"]
    assert len(names) == 5 + checkpoints.has(checkpoint, "loss_history")
    return {str(p.relative_to(checkpoint)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


def steps_of(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints.found_in(folder / "checkpoints")]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def is_grid_of_four(picture: np.ndarray) -> bool:
    """2 × 2 small images, each enlarged to 64 pixels or a little more (a frame), and not all alike."""
    height, width, _ = picture.shape
    return height == width and 128 <= height <= 160 and (picture[:64, :64] != picture[-64:, -64:]).any()


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_checkpoints_metrics_and_pictures(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, sample_every=4, checkpoint_every=2)
    assert steps_of(tmp_path) == [6, 4]
    published = DDPMPaperPipeline.from_pretrained(tmp_path)
    ema = checkpoints.read(tmp_path / "checkpoints" / "step-6", "ema")
    weights = dict(published.unet.named_parameters())
    assert weights.keys() == ema.keys() and all(torch.equal(weights[name], ema[name]) for name in ema)
    assert published(seeds=[0], output_type="np").images.shape == (1, 8, 8, 1)

    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    fields = {"step", "epoch", "loss", "grad_norm", "learning_rate", "images_per_s", "time_utc"}
    assert all(line.keys() == fields for line in metrics)
    assert all(0 < line[name] < math.inf for line in metrics for name in ("loss", "grad_norm", "images_per_s"))
    assert metrics[-1]["epoch"] == pytest.approx(6 * 16 / 1437, abs=1e-4)

    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {f"step-{step}-{kind}.png" for step in (4, 6) for kind in ("raw", "ema")}
    for name in names:
        assert is_grid_of_four(pixels(tmp_path / "samples" / name))
    raw, ema_pixels = (pixels(tmp_path / "samples" / f"step-6-{kind}.png") for kind in ("raw", "ema"))
    assert (raw != ema_pixels).any()
    assert min(pixels(tmp_path / "curves.png").shape[:2]) >= 400
    assert pixels(tmp_path / "samples_over_time.png").shape[0] == 256
    assert "10,593 parameters" in caplog.text and f"from_pretrained({str(tmp_path)!r})" in caplog.text


def test_options_yaml_reads_back_to_the_options_of_the_run(tmp_path):
    train(tmp_path / "run", dropout=0.25, num_steps=3)
    saved = tmp_path / "run" / "options.yaml"
    read = parse_options(train_py.TrainingOptions, ["--config", str(saved)])
    given = parse_options(
        train_py.TrainingOptions,
        arguments(tmp_path / "run", dropout=0.25, num_steps=3),
        default_config=SCRIPT.parent / "configs" / "digits.yaml",
    )
    assert read == given


def test_training_lowers_the_loss(tmp_path):
    train(tmp_path, num_steps=60, checkpoint_every=60)
    losses = column(tmp_path, "loss")
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_points_train(tmp_path):
    train(tmp_path, config=SCRIPT.parent / "configs" / "points.yaml", hidden_size=16, sample_every=6, num_samples=50)
    pipe = DDPMPaperPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.unet, DDPMPaperMLP) and not pipe.scheduler.config["clip_sample"]
    assert pixels(tmp_path / "samples" / "step-6-ema.png").shape == (256, 256, 3)


def test_a_folder_of_sixteen_pictures_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_HF_CACHE", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        picture = rng.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(picture).save(photos / f"{i}.png")
    run = train(
        tmp_path / "run",
        config=SCRIPT.parent / "configs" / "folder64.yaml",
        train_data_dir=photos,
        resolution=16,
        block_out_channels=[8, 8],
        attention_resolutions=[8],
        sample_every=6,
        sample_steps=5,
    )
    pipe = DDPMPaperPipeline.from_pretrained(run)
    assert pipe.sample_shape == (3, 16, 16) and pipe.unet.config["dropout"] == 0.1
    assert is_grid_of_four(pixels(run / "samples" / "step-6-raw.png"))


def test_tensorboard_receives_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, report_to="tensorboard", sample_every=6)
    (events,) = [path for path in tmp_path.rglob("events.out.tfevents*") if path.parent.name == "ddpm_hf"]
    found = EventAccumulator(str(events)).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(column(tmp_path, "loss"))
    (image,) = found.Images("samples/ema")
    assert image.step == 6
    assert (image.height, image.width) == pixels(tmp_path / "samples" / "step-6-ema.png").shape[:2]


# ---- options -------------------------------------------------------------------------------------------------------


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
    parsed = parse_options(
        train_py.TrainingOptions, ["--config", str(path), *(["--train_data_dir=photos"] if needs_data else [])]
    )
    assert parsed.output_dir == f"runs/{path.stem}" and all(hasattr(parsed, key) for key in keys)
    assert parsed.num_steps * (1 - parsed.ema_decay) >= 5  # the averaged weights keep up


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
        unet = train_py.build_network(options, shape)
    assert sum(p.numel() for p in unet.parameters()) == num_parameters


def test_dry_run_prints_options_that_read_back_and_writes_nothing(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    given = {"dropout": 0.25, "learning_rate": "3e-4", "sample_steps": 7, "block_out_channels": [8, 16]}
    train(tmp_path / "run", dry_run=True, **given)
    assert not list(tmp_path.iterdir())
    assert "DDPMPaperUNet with" in caplog.text and "on cpu, precision no" in caplog.text
    config = tmp_path / "printed.yaml"
    config.write_text(capsys.readouterr().out, encoding="utf-8")
    read = parse_options(train_py.TrainingOptions, ["--config", str(config)])
    expected = parse_options(
        train_py.TrainingOptions,
        arguments(tmp_path / "run", dry_run=True, **given),
        default_config=SCRIPT.parent / "configs" / "digits.yaml",
    )
    assert read == expected and read.learning_rate == 3e-4 and read.block_out_channels == [8, 16]


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


@pytest.mark.parametrize(("ema_decay", "warned"), [(0.999, True), (0.5, True), (0.1, False)])
def test_a_run_too_short_for_its_ema_is_warned_about(tmp_path, caplog, ema_decay, warned):
    train(tmp_path, ema_decay=ema_decay, dry_run=True)  # 6 steps
    assert (f"6 steps are too short for ema_decay {ema_decay:g}" in caplog.text) == warned
    assert ("ema_decay 0.1667 or less would fit" in caplog.text) == warned


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------


def test_learning_rate_rises_linearly_from_zero_and_stays(tmp_path):
    train(tmp_path, warmup_steps=4, learning_rate="8e-3")
    assert column(tmp_path, "learning_rate") == pytest.approx([0, 2e-3, 4e-3, 6e-3, 8e-3, 8e-3])


def test_without_warm_up_the_first_step_has_the_full_learning_rate(tmp_path):
    train(tmp_path, warmup_steps=0, learning_rate="8e-3", num_steps=2)
    assert column(tmp_path, "learning_rate") == [8e-3, 8e-3]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_first_update_is_algorithm_1_written_out(tmp_path, parts):
    """The same gradient step computed by hand from the batch: noise, network, L_simple, clipping, Adam."""
    twin = build(tmp_path).state.unet
    run = build(tmp_path, gradient_accumulation_steps=parts, max_grad_norm=0.05)
    run.state.num_updates = 2  # the warm-up is over
    batch = run.batches.rows(0, range(16))
    x_start = batch.x_start / 8.0 - 1  # the digits have 17 levels
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.5, 20, dtype=torch.float64), 0)[batch.t].view(-1, 1, 1, 1)
    x_t = (alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * batch.noise).float()
    loss = (twin(x_t, batch.t).sample - batch.noise).square().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    torch.optim.Adam(twin.parameters(), lr=2e-3).step()

    found_loss, found_norm = train_py.training_step(run, stream_of(run))
    assert float(found_loss) == pytest.approx(loss.item(), rel=1e-5)
    assert float(found_norm) == pytest.approx(float(norm), rel=1e-4) and float(norm) > 0.05
    for found, expected in zip(run.state.unet.parameters(), twin.parameters(), strict=True):
        # Adam's first update is lr · g / (|g| + ε): the rounding of tiny gradients shows, in units of lr
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_gradients_are_clipped_before_the_update(tmp_path):
    run = build(tmp_path, max_grad_norm=0.5)
    run.objective = lambda *args, **kwargs: 1000 * simple_loss(*args, **kwargs)
    norms = []

    def record(optimizer, args, kwargs) -> None:
        gradients = [p.grad for p in run.state.unet.parameters()]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    run.state.optimizer.optimizer.register_step_pre_hook(record)
    stream = stream_of(run)
    reported = [float(train_py.training_step(run, stream)[1]) for _ in range(3)]
    assert min(reported) > 0.5  # what is logged is the norm before clipping
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def nan_loss_of_the_third(*args: Any, **kwargs: Any) -> Tensor:
    losses = simple_loss(*args, **kwargs)
    return torch.where(torch.arange(len(losses)) == 2, math.nan, losses)


def nan_gradient(diffusion: Any, model_output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return (0 * model_output).abs().sqrt().flatten(1).mean(1)  # 0, but its derivative is 0 · ∞


@pytest.mark.parametrize(("objective", "what"), [(nan_loss_of_the_third, "loss"), (nan_gradient, "gradient")])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_is_not_finite_stops_before_it_touches_the_weights(tmp_path, objective, what, parts):
    run = build(tmp_path, gradient_accumulation_steps=parts)
    stream = stream_of(run)
    for _ in range(2):
        train_py.training_step(run, stream)
    before = [p.detach().clone() for p in run.state.unet.parameters()]
    shadow = [x.clone() for x in run.state.ema.shadow_params]
    run.objective = objective
    batches = [run.batches.rows(2, share_of(16, parts, part, 0, 1)) for part in range(parts)]
    with pytest.raises(FloatingPointError) as error:
        train_py.training_step(run, stream)
    message = str(error.value)
    assert f"the {what} is not finite at step 2, learning rate 0.002" in message
    if what == "loss":
        t, samples = [int(b.t[2]) for b in batches], [int(b.indices[2]) for b in batches]
        assert f"t={t}" in message and f"samples {samples}" in message
    assert all(torch.equal(p, b) for p, b in zip(run.state.unet.parameters(), before, strict=True))
    assert all(torch.equal(x, b) for x, b in zip(run.state.ema.shadow_params, shadow, strict=True))
    assert (run.state.step, run.state.num_updates) == (2, 2)


def test_a_run_that_is_not_finite_saves_nothing_of_it(tmp_path, monkeypatch):
    losses_of = train_py.losses_of
    monkeypatch.setattr(
        train_py, "losses_of", lambda run, *b: losses_of(run, *b) * (1 if run.state.step < 4 else math.nan)
    )
    with pytest.raises(FloatingPointError, match="at step 4"):
        train(tmp_path)
    assert steps_of(tmp_path) == [3] and column(tmp_path, "step") == [1, 2, 3, 4]
    assert not (tmp_path / "model_index.json").exists()


def test_learning_rate_and_ema_wait_for_a_skipped_update_and_twenty_in_a_row_stop_the_run(tmp_path, monkeypatch):
    """What float16's loss scaling does on a GPU, played here."""
    run = build(tmp_path, warmup_steps=4)
    skipped = [True] * 19 + [False] + [True] * 20
    monkeypatch.setattr(
        type(run.accelerator), "optimizer_step_was_skipped", property(lambda self: skipped[run.state.step - 1])
    )
    run.state.grad_scaler = object()
    stream = stream_of(run)
    for _ in range(19):
        train_py.training_step(run, stream)
    assert (run.state.step, run.state.num_updates, run.state.ema.optimization_step) == (19, 0, 0)
    train_py.training_step(run, stream)
    assert (run.state.num_updates, run.state.overflows_in_a_row, run.state.ema.optimization_step) == (1, 0, 1)
    assert run.state.optimizer.param_groups[0]["lr"] == 0  # of that update, the first
    for _ in range(19):
        train_py.training_step(run, stream)
    assert run.state.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3 / 4)
    with pytest.raises(FloatingPointError, match="20 times in a row"):
        train_py.training_step(run, stream)


def test_dropout_is_keyed_by_the_step(tmp_path):
    """Whatever drew from torch's generator before, a step drops the same, and the next step something else."""
    losses = []
    for seed in (1, 2):
        run = build(tmp_path, dropout=0.5)
        for block in run.state.unet.mid_block.resnets:
            torch.nn.init.ones_(block.conv2.weight)  # the paper's near 0 would hide the dropout
        torch.nn.init.ones_(run.state.unet.conv_out.weight)
        torch.manual_seed(seed)
        batch = run.batches.rows(0, range(16))  # twice: the first update, at learning rate 0, leaves the weights alone
        losses.append([float(train_py.training_step(run, iter([batch]))[0]) for _ in range(2)])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_ema_first_copies_and_then_decays_as_told(tmp_path):
    run = build(tmp_path, ema_decay=0.9)
    run.state.num_updates = 2  # the warm-up is over
    stream, expected = stream_of(run), None
    for _ in range(3):
        train_py.training_step(run, stream)
        weights = [p.detach().clone() for p in run.state.unet.parameters()]
        expected = [0.9 * e + 0.1 * w for e, w in zip(expected, weights, strict=True)] if expected else weights
        for shadow, e in zip(run.state.ema.shadow_params, expected, strict=True):
            torch.testing.assert_close(shadow, e, rtol=0, atol=1e-6)


# ---- objectives ----------------------------------------------------------------------------------------------------

PREDICTIONS = ["epsilon", "sample", "previous_sample", "v_prediction"]
ALLOWED = [
    *(("simple", prediction, variance) for prediction in PREDICTIONS for variance in ("fixed_small", "fixed_large")),
    *(("vlb", prediction, v) for prediction in PREDICTIONS for v in ("fixed_small", "fixed_large", "learned")),
]
# of the bound, by its importance, over few timesteps: after three steps the network has seen each often enough
IMPORTANCE = {"objective": "vlb", "timestep_sampling": "loss_history", "num_train_timesteps": 3, "warmup_steps": 0}


@pytest.mark.parametrize(("objective", "prediction", "variance"), ALLOWED)
def test_every_combination_that_makes_sense_trains(tmp_path, objective, prediction, variance):
    run = build(tmp_path, objective=objective, prediction_type=prediction, variance_type=variance, warmup_steps=0)
    stream = stream_of(run)
    for _ in range(2):
        loss, norm = train_py.training_step(run, stream)
        assert 0 < float(loss) < math.inf and 0 < float(norm) < math.inf
    assert all(torch.isfinite(p).all() for p in run.state.unet.parameters())
    config = run.scheduler.config
    assert (config["prediction_type"], config["variance_type"]) == (prediction, variance)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
@pytest.mark.parametrize(
    ("data", "num_levels"),
    [({}, 17), ({"config": SCRIPT.parent / "configs" / "points.yaml", "hidden_size": 16}, None)],
    ids=["digits", "points"],
)
def test_the_loss_of_the_bound_is_its_term_with_the_levels_of_the_data(tmp_path, data, num_levels, variance):
    """Of a batch with t = 0 in it, where the levels count; unclipped, unweighted, a mean in bits/dim."""
    run = build(tmp_path, objective="vlb", prediction_type="sample", variance_type=variance, **data)
    unet, diffusion = run.state.unet, run.scheduler.diffusion
    step = next(step for step in itertools.count() if (run.batches.rows(step, range(16)).t == 0).any())
    batch = run.batches.rows(step, range(16))
    x_start = batch.x_start / 8.0 - 1 if num_levels else batch.x_start
    x_t = diffusion.q_sample(x_start, batch.t, batch.noise)
    with torch.no_grad():
        output = unet(x_t, batch.t).sample
    options = {"prediction_type": "sample", "variance_type": variance}
    expected, otherwise = (
        vlb_loss(diffusion, output, x_start, x_t, batch.t, **options, num_levels=levels).mean().item()
        for levels in (num_levels, 256)
    )
    loss, _ = train_py.training_step(run, iter([batch]))
    assert float(loss) == pytest.approx(expected, rel=1e-5) and abs(expected - otherwise) > 0.1


def test_training_on_the_bound_lowers_the_bound(tmp_path):
    options = {"objective": "vlb", "variance_type": "learned", "prediction_type": "sample"}
    losses = column(train(tmp_path, num_steps=60, checkpoint_every=60, **options), "loss")
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_a_learned_variance_doubles_the_networks_channels(tmp_path):
    """Of images and of points; and such a model is saved, read and sampled from like any other."""
    options = {"objective": "vlb", "variance_type": "learned", "num_steps": 2, "sample_every": 2}
    points = {"config": SCRIPT.parent / "configs" / "points.yaml", "hidden_size": 16}
    for name, data, shape in (("digits", {}, (1, 8, 8)), ("points", points, (2,))):
        pipe: Any = DDPMPaperPipeline.from_pretrained(train(tmp_path / name, **options, **data))
        channels = shape[0]
        assert (pipe.unet.config["in_channels"], pipe.unet.config["out_channels"]) == (channels, 2 * channels)
        assert pipe.sample_shape == shape and pipe.scheduler.config["variance_type"] == "learned"
        samples = pipe(seeds=[0, 1], output_type="pt").images
        assert samples.shape == (2, *shape) and torch.isfinite(samples).all()


# ---- importance sampling -------------------------------------------------------------------------------------------


def test_a_step_by_importance_is_the_gradient_of_the_weighted_losses(tmp_path):
    """Written out: t at the batch's quantiles of p_t ∝ √E[L_t²], each loss weighted by 1 / (T p_t), then the mean."""
    options = {**IMPORTANCE, "num_train_timesteps": 20, "max_grad_norm": 1000}
    twin, run = build(tmp_path, **options).state.unet, build(tmp_path, **options)
    size = np.linspace(0.1, 3, 20)  # of the losses so far: alternating, so that their mean is 0 and only L² counts
    run.state.loss_history.losses[:] = size[:, None] * np.resize([1, -1], 10)
    run.state.loss_history.counts[:] = 10
    batch = run.batches.rows(0, range(16))
    probabilities = 0.999 * size / size.sum() + 0.001 / 20
    t = torch.from_numpy((np.cumsum(probabilities)[None] <= batch.quantiles[:, None]).sum(axis=1))
    assert not torch.equal(t, batch.t) and len(set(t.tolist())) > 5
    x_start = batch.x_start / 8.0 - 1
    diffusion = run.scheduler.diffusion
    x_t = diffusion.q_sample(x_start, t, batch.noise)
    choice = {"prediction_type": "epsilon", "variance_type": "fixed_large", "num_levels": 17}
    losses = vlb_loss(diffusion, twin(x_t, t).sample, x_start, x_t, t, **choice)
    weighted = (losses / torch.from_numpy(20 * probabilities).float()[t]).mean()
    weighted.backward()
    norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
    torch.optim.Adam(twin.parameters(), lr=2e-3).step()

    found, found_norm = train_py.training_step(run, iter([batch]))
    assert float(found) == pytest.approx(weighted.item(), rel=1e-5) and abs(weighted - losses.mean()) > 0.01
    assert float(found_norm) == pytest.approx(float(norm), rel=1e-4)
    for one, other in zip(run.state.unet.parameters(), twin.parameters(), strict=True):
        # Adam's first update is lr · g / (|g| + ε): the rounding of tiny gradients shows, in units of lr
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
    history = run.state.loss_history  # took in the unweighted losses
    assert history.counts.tolist() == (10 + np.bincount(t, minlength=20)).tolist()
    for place in set(t.tolist()):
        ours = losses[t == place].detach().numpy()[-10:]
        np.testing.assert_allclose(history.losses[place, : len(ours)], ours, rtol=1e-5)


def test_until_every_t_was_seen_often_importance_is_uniform(tmp_path):
    run = build(tmp_path, **IMPORTANCE)
    stream, uniform = stream_of(run), []
    for _ in range(6):
        uniform.append(len(set(run.state.loss_history.probabilities())) == 1)
        train_py.training_step(run, stream)
    assert uniform == [True] * uniform.index(False) + [False] * (6 - uniform.index(False)) and uniform[1]
    assert run.state.loss_history.counts.sum() == 6 * 16


def test_the_history_does_not_depend_on_the_parts_of_a_batch(tmp_path):
    """The same t and the same losses, to rounding, in the same order."""
    runs = []
    for parts in (1, 2, 8):
        run = build(tmp_path, gradient_accumulation_steps=parts, **IMPORTANCE)
        stream = stream_of(run)
        losses = [float(train_py.training_step(run, stream)[0]) for _ in range(8)]
        runs.append((run.state.loss_history, losses))
    (history, losses), *others = runs
    assert len(set(history.probabilities())) == 3
    for other, other_losses in others:
        assert other.counts.tolist() == history.counts.tolist()
        np.testing.assert_allclose(other.losses, history.losses, rtol=1e-3)  # eight updates of rounding
        assert other_losses == pytest.approx(losses, rel=1e-3)


def test_an_interrupted_run_by_importance_ends_as_if_it_had_not_been(tmp_path, interrupted, caplog):
    """With its weights, and with its history to the last bit."""
    options = {
        **IMPORTANCE,
        "num_steps": 8,
        "dropout": 0.3,
        "gradient_accumulation_steps": 2,
        "variance_type": "learned",
    }
    whole, parted = train(tmp_path / "whole", **options), tmp_path / "parted"
    for after in (4, 7):
        interrupted(parted, after=after, **options)
    caplog.set_level(logging.INFO)
    train(parted, **options)
    assert "resuming at step 6" in caplog.text
    assert final_hashes(parted, 8) == final_hashes(whole, 8)
    assert column(parted, "loss") == column(whole, "loss")
    saved = checkpoints.read(whole / "checkpoints" / "step-6", "loss_history")
    assert saved["counts"].min() >= 10 and len(set(saved["losses"].square().mean(dim=1).tolist())) == 3


def test_importance_sampling_may_begin_in_the_middle_of_a_run(tmp_path):
    options = {"objective": "vlb", "num_train_timesteps": 3}
    train(tmp_path, **options)
    assert "timestep_sampling was 'uniform'" in refusal(tmp_path, **{**IMPORTANCE, "warmup_steps": 2, "num_steps": 7})
    train(tmp_path, **{**IMPORTANCE, "warmup_steps": 2, "num_steps": 7}, allow_changes=True)
    assert checkpoints.read(tmp_path / "checkpoints" / "step-7", "loss_history")["counts"].sum() == 16


@pytest.mark.parametrize("options", [{"objective": "vlb"}, {"prediction_type": "sample"}])
def test_another_objective_is_another_run(tmp_path, options):
    train(tmp_path)
    assert f"{next(iter(options))} was " in refusal(tmp_path, num_steps=9, **options)


# ---- machine options -----------------------------------------------------------------------------------------------


def test_bf16_trains_to_the_loss_of_float32(tmp_path):
    exact, rounded = (
        column(train(tmp_path / precision, mixed_precision=precision, num_steps=60, checkpoint_every=60), "loss")
        for precision in ("no", "bf16")
    )
    assert exact != rounded
    assert np.mean(rounded[-20:]) == pytest.approx(np.mean(exact[-20:]), rel=0.02)  # found: 0.05 %


def test_gradient_checkpointing_computes_twice_and_changes_no_loss(tmp_path):
    calls = []
    for on in (False, True):
        run = build(tmp_path, gradient_checkpointing=on)
        seen = []
        run.state.unet.mid_block.resnets[0].register_forward_pre_hook(lambda *args, seen=seen: seen.append(args))
        train_py.training_step(run, stream_of(run))
        calls.append(len(seen))
    assert calls == [1, 2]
    plain, checkpointed = (
        column(train(tmp_path / str(on), gradient_checkpointing=on, dropout=0.3), "loss") for on in (False, True)
    )
    assert checkpointed == pytest.approx(plain, abs=1e-6)


def test_allow_tf32_sets_the_flags(tmp_path):
    for on in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        train(tmp_path, allow_tf32=on, dry_run=True)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == on


@pytest.mark.slow
def test_compile_compiles_and_changes_no_loss(tmp_path):
    from torch._dynamo.utils import counters

    plain = column(train(tmp_path / "plain"), "loss")
    torch._dynamo.reset()
    counters.clear()
    run = train(tmp_path / "compiled", compile=True, sample_every=6)
    assert counters["stats"]["unique_graphs"] >= 1
    assert column(run, "loss") == pytest.approx(plain, abs=1e-4)
    assert DDPMPaperPipeline.from_pretrained(run)(seeds=[0], output_type="np").images.shape == (1, 8, 8, 1)


# ---- fine-tuning ---------------------------------------------------------------------------------------------------

OTHER = {
    "block_out_channels": [12],
    "num_train_timesteps": 15,
    "beta_schedule": "quad",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
}


def test_init_from_starts_with_these_weights_and_adopts_network_and_process(tmp_path):
    source = DDPMPaperPipeline.from_pretrained(train(tmp_path / "source", dropout=0.3, **OTHER))
    run = build(tmp_path / "tuned", init_from=tmp_path / "source")
    for loaded in (run.state.unet.parameters(), run.state.ema.shadow_params):
        assert all(torch.equal(x, y) for x, y in zip(loaded, source.unet.parameters(), strict=True))
    assert {name: getattr(run.options, name) for name in OTHER} == OTHER
    assert dict(run.scheduler.config) == dict(source.scheduler.config)
    assert run.batches.num_timesteps == 15
    # training stays as it was told
    assert (run.options.learning_rate, run.options.dropout, run.state.unet.config["dropout"]) == (2e-3, 0.0, 0.0)


def test_a_tuned_run_saves_what_it_ran_and_resumes_by_the_same_command(tmp_path, caplog):
    source = train(tmp_path / "source", **OTHER)
    tuned = train(tmp_path / "tuned", init_from=source, num_steps=1)  # one update, at learning rate 0
    weights = [list(DDPMPaperPipeline.from_pretrained(run).unet.parameters()) for run in (source, tuned)]
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))
    saved = yaml.safe_load((tuned / "options.yaml").read_text(encoding="utf-8"))
    assert saved.items() >= OTHER.items()
    caplog.set_level(logging.INFO)
    train(tmp_path / "tuned", init_from=source, num_steps=4)
    assert "resuming at step 1" in caplog.text and column(tuned, "step") == [1, 2, 3, 4]


def test_tuning_a_learned_variance_goes_on_with_it(tmp_path):
    source = train(tmp_path / "source", objective="vlb", variance_type="learned")
    run = build(tmp_path / "tuned", init_from=source, objective="vlb")
    assert run.options.variance_type == "learned" and run.state.unet.config["out_channels"] == 2
    weights = DDPMPaperPipeline.from_pretrained(source).unet.parameters()
    assert all(torch.equal(x, y) for x, y in zip(run.state.unet.parameters(), weights, strict=True))
    assert "--variance_type learned needs --objective vlb" in refusal(tmp_path / "simple", init_from=source)


@pytest.mark.parametrize("num_steps", [None, 4])
def test_tuning_a_shortened_chain_is_refused(tmp_path, num_steps):
    """Its variances are of the weights as they are."""
    pipe = DDPMPaperPipeline.from_pretrained(train(tmp_path / "source", **OTHER))
    pipe.scheduler = shortened(pipe.scheduler, np.linspace(0.01, 0.5, 15), num_steps=num_steps, num_levels=17)
    pipe.save_pretrained(tmp_path / "short")
    message = refusal(tmp_path / "tuned", init_from=tmp_path / "short")
    assert (
        f"--init_from {tmp_path / 'short'} has variances fitted to its weights; start from the checkpoint" in message
    )


def test_tuning_on_other_channels_is_refused(tmp_path, tiny_unet, tiny_scheduler):
    DDPMPaperPipeline(tiny_unet(in_channels=3), tiny_scheduler()).save_pretrained(tmp_path / "source")
    message = refusal(tmp_path / "run", init_from=tmp_path / "source")
    assert "the model expects 3 channels" in message and "the data has 1" in message


def test_a_stock_unet_is_refused_by_name(tmp_path, tiny_scheduler):
    stock = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPaperPipeline(stock, tiny_scheduler()).save_pretrained(tmp_path / "stock")
    message = refusal(tmp_path / "run", init_from=tmp_path / "stock")
    assert f"--init_from {tmp_path / 'stock'} holds UNet2DModel" in message and "DDPMPaperUNet" in message


def test_more_sample_steps_than_the_adopted_process_has_are_refused(tmp_path):
    source = train(tmp_path / "source", **OTHER)
    assert "sample_steps" in refusal(tmp_path / "tuned", init_from=source, sample_steps=18, sample_every=3)


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch) -> Callable[..., None]:
    """interrupted(folder, after=n, **options): a run that stops without warning after n steps."""

    def run(folder: Path, *, after: int, **options: Any) -> None:
        training_step = train_py.training_step

        def step(run, stream):
            if run.state.step == after:
                raise KeyboardInterrupt
            return training_step(run, stream)

        with monkeypatch.context() as patch:
            patch.setattr(train_py, "training_step", step)
            with pytest.raises(KeyboardInterrupt):
                train(folder, **options)

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout": 0.3, "random_flip": True},
        {"gradient_accumulation_steps": 4, "dropout": 0.3},
        {"global_batch_size": 500, "random_flip": True},  # of 1,437: the interruption falls into the second epoch
        {"config": SCRIPT.parent / "configs" / "points.yaml", "hidden_size": 16},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, interrupted, caplog, options):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(whole, num_steps=8, **options)
    for after in (4, 7):  # after the first checkpoint and after the second
        interrupted(parted, after=after, num_steps=8, **options)
    caplog.set_level(logging.INFO)
    train(parted, num_steps=8, **options)
    assert "resuming at step 6" in caplog.text
    assert final_hashes(parted, 8) == final_hashes(whole, 8)
    assert column(parted, "step") == [1, 2, 3, 4, 5, 6, 7, 8]  # cut at each resumption, then written again
    assert column(parted, "loss") == column(whole, "loss")
    assert column(parted, "learning_rate") == column(whole, "learning_rate")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("random_flip", [False, True])
@pytest.mark.parametrize("global_batch_size", [16, 364])  # the latter crosses an epoch's end every fourth step
def test_resumption_is_exact_for_every_cut_of_the_data(tmp_path, interrupted, parts, random_flip, global_batch_size):
    options = {
        "num_steps": 12,
        "checkpoint_every": 1,
        "dropout": 0.2,
        "gradient_accumulation_steps": parts,
        "random_flip": random_flip,
        "global_batch_size": global_batch_size,
    }
    train(tmp_path / "whole", **options)
    for after in range(1, 12):
        interrupted(tmp_path / "parted", after=after, **options)
    train(tmp_path / "parted", **options)
    assert final_hashes(tmp_path / "parted", 12) == final_hashes(tmp_path / "whole", 12)
    assert column(tmp_path / "parted", "loss") == column(tmp_path / "whole", "loss")


def test_a_damaged_checkpoint_costs_one_interval(tmp_path, caplog):
    whole = train(tmp_path / "whole")
    damaged = train(tmp_path / "damaged")
    path = damaged / "checkpoints" / "step-6" / "train_state" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    caplog.set_level(logging.INFO)
    train(damaged)
    assert f"{path} is corrupt" in caplog.text and "resuming at step 3" in caplog.text
    assert final_hashes(damaged, 6) == final_hashes(whole, 6)


def test_a_finished_run_started_again_says_so_and_trains_nothing(tmp_path, caplog, monkeypatch):
    train(tmp_path, sample_every=6)
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    hashes = final_hashes(tmp_path, 6)
    monkeypatch.setattr(train_py, "training_step", None)
    caplog.set_level(logging.INFO)
    train(tmp_path, sample_every=6)
    assert "already trained to step 6; more with --num_steps" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines and final_hashes(tmp_path, 6) == hashes
    DDPMPaperPipeline.from_pretrained(tmp_path)


def test_more_steps_go_on_and_end_where_a_longer_run_does(tmp_path, caplog):
    train(tmp_path / "longer")
    caplog.set_level(logging.INFO)
    train(tmp_path / "longer", num_steps=9)
    assert "resuming at step 6" in caplog.text
    assert final_hashes(tmp_path / "longer", 9) == final_hashes(train(tmp_path / "at once", num_steps=9), 9)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate was 0.002, is 0.001"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"global_batch_size": 32}, "global_batch_size was 16, is 32"),
        ({"dataset_split": "test"}, "data (sha256) was"),
    ],
)
def test_changed_mathematics_is_refused_by_name(tmp_path, options, change):
    train(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = refusal(tmp_path, **{"num_steps": 9, **options})
    assert change in message and "num_steps was" not in message and "--allow_changes" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_allow_changes_goes_on_with_the_new_value(tmp_path, caplog):
    train(tmp_path)
    train(tmp_path, learning_rate="1e-3", num_steps=8, allow_changes=True)
    assert "resuming although learning_rate was 0.002, is 0.001" in caplog.text
    assert column(tmp_path, "learning_rate")[5:] == [2e-3, 1e-3, 1e-3]


def test_another_network_cannot_be_allowed(tmp_path):
    train(tmp_path)
    message = refusal(tmp_path, block_out_channels=[12], num_steps=8, allow_changes=True)
    assert "block_out_channels" in message or "network" in message


def test_a_precision_that_accelerate_chose_counts_as_a_change(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # what `accelerate launch --mixed_precision bf16` sets
    train(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert "mixed_precision" in refusal(tmp_path, num_steps=8)


def test_what_does_not_touch_the_mathematics_may_change(tmp_path):
    train(tmp_path / "run")
    train(tmp_path / "run", num_steps=8, log_every=2, checkpoint_every=4, num_samples=1, gradient_checkpointing=True)
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6, 8]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    train(tmp_path, num_steps=2)
    with checkpoints.exclusive(tmp_path):
        assert f"{tmp_path} is in use by process {os.getpid()} on " in refusal(tmp_path)
        assert column(tmp_path, "step") == [1, 2]  # and nothing was touched
    train(tmp_path)
    assert column(tmp_path, "step") == [1, 2, 3, 4, 5, 6]


def test_resume_never_starts_anew_and_moves_the_old_checkpoints_aside(tmp_path):
    train(tmp_path)
    old = final_hashes(tmp_path, 6)
    train(tmp_path, resume="never", seed=1)
    assert (tmp_path / "checkpoints.1" / "step-6").is_dir()
    assert column(tmp_path, "step") == [1, 2, 3, 4, 5, 6] and final_hashes(tmp_path, 6) != old


def test_resume_from_a_path(tmp_path, caplog):
    source = train(tmp_path / "source")
    caplog.set_level(logging.INFO)
    branch = train(tmp_path / "branch", resume=source / "checkpoints" / "step-3")
    assert "resuming at step 3" in caplog.text and column(branch, "step") == [4, 5, 6]
    assert final_hashes(branch, 6) == final_hashes(source, 6)
    finished = train(tmp_path / "finished", resume=source / "checkpoints" / "step-6")  # nothing left to train
    DDPMPaperPipeline.from_pretrained(finished)


# ---- real processes ------------------------------------------------------------------------------------------------

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def start(folder: Path, *, launcher: Sequence[str] = (), **options: Any) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), *arguments(folder, **options)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen, is_due: Callable[[], bool]) -> None:
    """kill -9 to the process and all it started, as soon as `is_due`."""
    deadline = time.monotonic() + 300
    while not is_due() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    parent = psutil.Process(process.pid)
    for each in [parent, *parent.children(recursive=True)]:  # torchrun puts its processes into sessions of their own
        each.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path):
    options = {"num_steps": 120, "checkpoint_every": 20, "dropout": 0.2, "random_flip": True}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole, **options)
    kill_when(start(killed, **options), (killed / "checkpoints" / "step-40").exists)
    assert not (killed / "checkpoints" / "step-120").exists()
    output = finish(start(killed, **options))
    assert "resuming at step" in output
    finish(undisturbed)
    assert final_hashes(killed, 120) == final_hashes(whole, 120)
    assert column(killed, "step") == list(range(1, 121)) and column(killed, "loss") == column(whole, "loss")


def test_two_processes_by_torchrun_do_what_one_does(tmp_path):
    options = {"num_steps": 40, "checkpoint_every": 40, "sample_every": 40, "num_samples": 5, "random_flip": True}
    pair = tmp_path / "two"
    process = start(pair, launcher=TORCHRUN, **options)
    alone = train(tmp_path / "one", **options)
    in_parts = train(tmp_path / "parts", gradient_accumulation_steps=2, **options)
    assert "2 process(es) on cpu" in finish(process)
    assert column(pair, "step") == list(range(1, 41))  # one writer
    for other in (pair, in_parts):
        assert column(other, "loss") == pytest.approx(column(alone, "loss"), abs=1e-4)
        assert column(other, "learning_rate") == column(alone, "learning_rate")
        for kind in ("raw", "ema"):
            name = f"step-40-{kind}.png"
            assert np.abs(pixels(other / "samples" / name) - pixels(alone / "samples" / name)).max() <= 2
    assert checkpoints.verify(pair / "checkpoints" / "step-40")["world_size"] == 2
    assert "number of processes was 2, is 1" in refusal(pair, **{**options, "num_steps": 50})


def test_a_refusal_is_one_line_and_exit_code_1(tmp_path):
    process = start(tmp_path / "run", dataset_name="none", train_data_dir=tmp_path / "absent")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("train.py: ") and str(tmp_path / "absent") in output


@pytest.mark.slow
def test_losses_agree_within_1e_4_over_200_steps_however_the_batch_is_cut(tmp_path):
    options = {"num_steps": 200, "checkpoint_every": 200, "random_flip": True}
    alone = train(tmp_path / "one", **options)
    in_parts = train(tmp_path / "parts", gradient_accumulation_steps=2, **options)
    pairs = []
    for name, launcher in (("torchrun", TORCHRUN), ("accelerate", ACCELERATE)):
        pairs.append(tmp_path / name)
        assert "2 process(es) on cpu" in finish(start(tmp_path / name, launcher=launcher, **options))
    both = tmp_path / "both"
    finish(start(both, launcher=TORCHRUN, gradient_accumulation_steps=2, **options))
    for other in (in_parts, *pairs, both):
        assert column(other, "loss") == pytest.approx(column(alone, "loss"), abs=1e-4)
    assert final_hashes(pairs[0], 200) == final_hashes(pairs[1], 200)  # the launcher makes no difference at all


@pytest.mark.slow
def test_two_processes_have_the_history_of_one(tmp_path):
    options = {**IMPORTANCE, "num_steps": 20, "checkpoint_every": 20}
    alone = train(tmp_path / "one", **options)
    finish(start(tmp_path / "two", launcher=TORCHRUN, **options))
    assert column(tmp_path / "two", "loss") == pytest.approx(column(alone, "loss"), rel=1e-3)
    one, two = (
        checkpoints.read(tmp_path / name / "checkpoints" / "step-20", "loss_history") for name in ("one", "two")
    )
    assert torch.equal(one["counts"], two["counts"]) and int(one["counts"].sum()) == 20 * 16
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=0)  # twenty updates of rounding


@pytest.mark.slow
def test_two_processes_killed_three_times_end_with_the_weights_of_those_that_were_not(tmp_path):
    options = {"num_steps": 120, "checkpoint_every": 10, "dropout": 0.2, "random_flip": True}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, launcher=TORCHRUN, **options))
    for step in (20, 50, 80):
        is_there = (killed / "checkpoints" / f"step-{step}").exists
        kill_when(start(killed, launcher=TORCHRUN, **options), is_there)
    finish(start(killed, launcher=TORCHRUN, **options))
    assert final_hashes(killed, 120) == final_hashes(whole, 120)


@pytest.mark.slow
def test_the_accelerate_cpu_flag_that_starts_one_process_is_not_taken_for_two(tmp_path):
    """`accelerate launch --cpu --num_processes 2` quietly runs one process: the run must say what it is."""
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    assert "1 process(es) on cpu" in finish(start(tmp_path, launcher=launcher))


# ---- signals and full disks ----------------------------------------------------------------------------------------


def send_when(process: subprocess.Popen, number: int, is_due: Callable[[], bool]) -> str:
    """Send the signal to the process as soon as `is_due`, and return what it printed."""
    deadline = time.monotonic() + 300
    while not is_due() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(number)
    return process.communicate(timeout=120)[0]


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        pytest.param(signal.SIGINT, 130, "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_its_step_and_loses_none(tmp_path, number, code, name):
    options = {"num_steps": 200, "checkpoint_every": 200, "dropout": 0.2, "random_flip": True}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    undisturbed = start(whole, **options)
    process = start(stopped, **options)
    output = send_when(process, number, lambda: len(read_metrics(stopped / "metrics.jsonl")) >= 10)
    assert process.returncode == code
    (step,) = (int(path.name.removeprefix("step-")) for path in (stopped / "checkpoints").iterdir())
    assert 10 <= step < 200 and f"stopped by {name} after step {step}, which is saved" in output
    assert f"resuming at step {step}" in finish(start(stopped, **options))
    finish(undisturbed)
    assert final_hashes(stopped, 200) == final_hashes(whole, 200)
    assert column(stopped, "step") == list(range(1, 201))


PHASED = {"num_steps": 6, "checkpoint_every": 2, "sample_every": 2, "num_samples": 4, "sample_steps": 2}
PHASES = {  # where the signal arrives: at the first call of what; and the step that is then saved, the next to end
    "data": (train_py, "load_samples", None),
    "network": (train_py, "build_network", 1),
    "folder": (checkpoints, "to_resume", 1),
    "batch": (KeyedBatches, "rows", 1),
    "step": (train_py, "losses_of", 1),
    "metrics": (train_py.RunLog, "write", 2),
    "save": (checkpoints, "_write_files", 3),
    "prune": (checkpoints, "prune", 3),
    "sampling": (train_py, "draw_samples", 2),
}


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed"), **PHASED)


@pytest.mark.parametrize(
    ("phase", "number"), [*((p, signal.SIGTERM) for p in PHASES), ("step", signal.SIGINT), ("save", signal.SIGINT)]
)
def test_a_signal_in_any_phase_loses_no_step(tmp_path, undisturbed_run, monkeypatch, phase, number):
    """Sent by the process to itself, so that it comes exactly there."""
    owner, name, saved = PHASES[phase]
    whole, folder = undisturbed_run, tmp_path / "run"
    original, received = getattr(owner, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if not received:
            received.append(number)
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with pytest.raises(SystemExit) as exit_info:
            train(folder, **PHASED)
    assert received and exit_info.value.code == 128 + number
    assert [step for step, _ in checkpoints.found_in(folder / "checkpoints")][:1] == ([saved] if saved else [])
    train(folder, **PHASED)
    assert final_hashes(folder, 6) == final_hashes(whole, 6)
    assert column(folder, "step") == column(whole, "step")
    assert {path.name for path in (folder / "samples").iterdir()} == {p.name for p in (whole / "samples").iterdir()}


def test_a_run_that_is_stopped_while_it_draws_samples_saves_and_draws_them_later(tmp_path):
    """Drawing would take minutes here: the signal does not wait for it, and the grid is not lost."""
    slow = {"num_steps": 8, "sample_every": 4, "num_samples": 16, "num_train_timesteps": 20_000, "beta_end": 0.001}
    options = {**slow, "beta_start": 0.0005, "checkpoint_every": 8, "block_out_channels": [32]}
    folder = tmp_path / "run"
    process = start(folder, **options)
    output = send_when(process, signal.SIGTERM, lambda: len(read_metrics(folder / "metrics.jsonl")) >= 4)
    assert process.returncode == 143 and "stopped by SIGTERM after step 4" in output
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-4"]
    again = start(folder, **{**options, "sample_steps": 2})
    assert "resuming at step 4" in finish(again)
    names = {f"step-{step}-{kind}.png" for step in (4, 8) for kind in ("raw", "ema")}
    assert {path.name for path in (folder / "samples").iterdir()} == names


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(tmp_path):
    """torchrun passes SIGTERM on, and exits with a code of its own."""
    options = {"num_steps": 2000, "checkpoint_every": 2000}
    process = start(tmp_path, launcher=TORCHRUN, **options)
    output = send_when(process, signal.SIGTERM, lambda: len(read_metrics(tmp_path / "metrics.jsonl")) >= 10)
    assert process.returncode != 0
    (step,) = (int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert f"stopped by SIGTERM after step {step}" in output
    assert checkpoints.verify(tmp_path / "checkpoints" / f"step-{step}")["world_size"] == 2


@pytest.mark.slow
def test_one_of_two_processes_that_is_asked_stops_both(tmp_path):
    options = {"num_steps": 2000, "checkpoint_every": 2000}
    process = start(tmp_path, launcher=TORCHRUN, **options)
    is_training = lambda: len(read_metrics(tmp_path / "metrics.jsonl")) >= 10  # noqa: E731
    deadline = time.monotonic() + 300
    while not is_training() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if str(SCRIPT) in p.cmdline()]
    second = next(p for p in workers if p.environ().get("RANK") == "1")
    second.terminate()
    output = process.communicate(timeout=120)[0]
    (step,) = (int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert process.returncode != 0 and f"stopped by SIGTERM after step {step}" in output


def test_a_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before(tmp_path):
    """RLIMIT_FSIZE stands for it: from the second checkpoint on, no file may be as long as its weights."""
    finish(start(tmp_path, num_steps=3))
    before = final_hashes(tmp_path, 3)
    script = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.argv = [{str(SCRIPT)!r}, *{arguments(tmp_path, num_steps=6)!r}]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    line = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 1 and "train.py: " in line and "Traceback" not in ended.stderr
    assert str(tmp_path / "checkpoints" / "step-6") in line and "bytes" in line and "untouched" in line
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert final_hashes(tmp_path, 3) == before
    finish(start(tmp_path, num_steps=6))


def test_a_second_stop_before_the_missing_grid_is_drawn_leaves_the_checkpoint_alone(tmp_path, monkeypatch):
    """It is the only copy of its step; writing it again could only lose it."""
    run = build(tmp_path, sample_every=1, num_steps=2)
    run.state.step = 1
    monkeypatch.setattr(run.state, "save", lambda *args: pytest.fail("saved again"))
    log = train_py.RunLog(run.accelerator, tmp_path, first_step=1, num_steps=2, global_batch_size=16)
    with train_py.StopSignals() as signals:
        signals.received = signal.SIGTERM
        with pytest.raises(train_py.Stopped):
            train_py.write_samples(run, log, signals, {}, only_missing=True)
    log.close()
