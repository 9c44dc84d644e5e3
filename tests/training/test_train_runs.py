"""Whole runs of training/train.py: what they leave, how they learn, and what they start from."""

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import UNet2DModel
from PIL import Image
from tiny_runs import SCRIPT, arguments, build, column, is_grid_of_four, pixels, refusal, steps_of, stream_of, train

from ddpm_hf import DDPMPaperMLP, DDPMPaperPipeline
from ddpm_hf.runs import checkpoints, parse_options, read_metrics
from ddpm_hf.short_chains import shortened
from training import train as train_py

pytestmark = pytest.mark.integration


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_checkpoints_metrics_and_pictures(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, curves=True, sample_every=4, checkpoint_every=2)
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


def test_options_yaml_reads_back_to_the_options_of_the_run(finished_run):
    read = parse_options(train_py.TrainingOptions, ["--config", str(finished_run / "options.yaml")])
    given = parse_options(
        train_py.TrainingOptions, arguments(finished_run), default_config=train_py.CONFIGS / "digits.yaml"
    )
    assert read == replace(given, mixed_precision="no")  # the precision in force, where none was asked for


def test_points_train(tmp_path):
    train(
        tmp_path,
        num_steps=2,
        config=SCRIPT.parent / "configs" / "points.yaml",
        hidden_size=16,
        sample_every=2,
        num_samples=50,
    )
    pipe = DDPMPaperPipeline.from_pretrained(tmp_path)
    assert isinstance(pipe.unet, DDPMPaperMLP) and not pipe.scheduler.config["clip_sample"]
    assert pixels(tmp_path / "samples" / "step-2-ema.png").shape == (256, 256, 3)


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
        num_steps=2,
        sample_every=2,
        sample_steps=5,
    )
    pipe = DDPMPaperPipeline.from_pretrained(run)
    assert pipe.sample_shape == (3, 16, 16) and pipe.unet.config["dropout"] == 0.1
    assert is_grid_of_four(pixels(run / "samples" / "step-2-raw.png"))


def test_tensorboard_receives_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, report_to="tensorboard", num_steps=2, sample_every=2)
    (events,) = [path for path in tmp_path.rglob("events.out.tfevents*") if path.parent.name == "ddpm_hf"]
    found = EventAccumulator(str(events)).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(column(tmp_path, "loss"))
    (image,) = found.Images("samples/ema")
    assert image.step == 2
    assert (image.height, image.width) == pixels(tmp_path / "samples" / "step-2-ema.png").shape[:2]


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


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sixty_losses(tmp_path_factory) -> list[float]:
    return column(train(tmp_path_factory.mktemp("sixty"), num_steps=60, checkpoint_every=60), "loss")


def test_training_lowers_the_loss(sixty_losses):
    assert np.mean(sixty_losses[-10:]) < 0.9 * np.mean(sixty_losses[:10])


@pytest.mark.slow
def test_bf16_trains_to_the_loss_of_float32(tmp_path, sixty_losses):
    rounded = column(train(tmp_path, mixed_precision="bf16", num_steps=60, checkpoint_every=60), "loss")
    assert sixty_losses != rounded
    assert np.mean(rounded[-20:]) == pytest.approx(np.mean(sixty_losses[-20:]), rel=0.02)  # found: 0.05 %


@pytest.mark.slow
def test_training_on_the_bound_lowers_the_bound(tmp_path):
    options = {"objective": "vlb", "variance_type": "learned", "prediction_type": "sample"}
    losses = column(train(tmp_path, num_steps=60, checkpoint_every=60, **options), "loss")
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_learning_rate_rises_linearly_from_zero_and_stays(tmp_path):
    train(tmp_path, warmup_steps=4, learning_rate="8e-3")
    assert column(tmp_path, "learning_rate") == pytest.approx([0, 2e-3, 4e-3, 6e-3, 8e-3, 8e-3])


def test_without_warm_up_the_first_step_has_the_full_learning_rate(tmp_path):
    train(tmp_path, warmup_steps=0, learning_rate="8e-3", num_steps=2)
    assert column(tmp_path, "learning_rate") == [8e-3, 8e-3]


def test_a_run_that_is_not_finite_saves_nothing_of_it(tmp_path, monkeypatch):
    losses_of = train_py.losses_of
    monkeypatch.setattr(
        train_py, "losses_of", lambda run, *b: losses_of(run, *b) * (1 if run.state.step < 4 else math.nan)
    )
    with pytest.raises(FloatingPointError, match="at step 4"):
        train(tmp_path)
    assert steps_of(tmp_path) == [3] and column(tmp_path, "step") == [1, 2, 3, 4]
    assert not (tmp_path / "model_index.json").exists()


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


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


OTHER = {
    "block_out_channels": [12],
    "num_train_timesteps": 15,
    "beta_schedule": "quad",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_small",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("source"), num_steps=2, dropout=0.3, **OTHER)


def test_init_from_starts_with_these_weights_and_adopts_network_and_process(tmp_path, source):
    pipe = DDPMPaperPipeline.from_pretrained(source)
    run = build(tmp_path / "tuned", init_from=source)
    for loaded in (run.state.unet.parameters(), run.state.ema.shadow_params):
        assert all(torch.equal(x, y) for x, y in zip(loaded, pipe.unet.parameters(), strict=True))
    assert {name: getattr(run.options, name) for name in OTHER} == OTHER
    assert dict(run.scheduler.config) == dict(pipe.scheduler.config)
    assert run.batches.num_timesteps == 15
    # training stays as the options have it
    assert (run.options.learning_rate, run.options.dropout, run.state.unet.config["dropout"]) == (2e-3, 0.0, 0.0)


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """Images of 16×16 in grey, from which those of 8×8 and of 16×32 are cropped."""
    folder = tmp_path_factory.mktemp("larger")
    for number, levels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 16, 16), dtype=np.uint8)):
        Image.fromarray(levels).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("size", "attended"), [(16, [8]), (4, [2]), (8, [4])])
def test_init_from_keeps_the_levels_of_attention_at_another_size(size, attended, larger, tmp_path, caplog):
    """Up and down: the same function of the same images, and the same command goes on."""
    two_levels = {"block_out_channels": [8, 8], "attention_resolutions": [4]}
    source = train(tmp_path / "source", num_steps=1, **two_levels)
    data = {"dataset_name": "none", "train_data_dir": larger, "resolution": size}
    run = build(tmp_path / "tuned", init_from=source, **data)
    theirs, ours = DDPMPaperPipeline.from_pretrained(source).unet.eval(), run.state.unet.eval()
    assert ours.config["sample_size"] == size and run.options.attention_resolutions == attended
    x, t = torch.rand(2, 1, size, size), torch.tensor([3, 7])
    assert torch.equal(ours(x, t).sample, theirs(x, t).sample)
    caplog.set_level(logging.INFO)
    tuned = train(tmp_path / "tuned", init_from=source, num_steps=1, **data)
    said = f"from 8×8 to {size}×{size}; attention stays at its levels, now at {attended[0]}"
    assert (said in caplog.text) == (size != 8)
    train(tuned, init_from=source, num_steps=2, **data)
    assert "resuming at step 1" in caplog.text
    assert DDPMPaperPipeline.from_pretrained(tuned).sample_shape == (1, size, size)


def test_init_from_another_kind_is_refused_in_one_line(source, larger, tmp_path):
    colour = tmp_path / "colour"
    colour.mkdir()
    for number, levels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(levels).save(colour / f"{number}.png")
    message = refusal(tmp_path / "a", init_from=source, dataset_name="none", train_data_dir=colour)
    assert f"--init_from {source} is for 1 channel, the data has 3" in message
    levels_twice = train(tmp_path / "source", num_steps=1, block_out_channels=[8, 8])
    message = refusal(tmp_path / "b", init_from=levels_twice, dataset_name="none", train_data_dir=larger, resolution=5)
    assert "sample_size=5 must be a side or (height, width) divisible by 2" in message
    message = refusal(tmp_path / "c", init_from=levels_twice, dataset_name="moons", in_channels=2)
    assert f"--init_from {levels_twice} is for" in message


def test_a_tuned_run_saves_what_it_ran_and_resumes_by_the_same_command(tmp_path, source, caplog):
    tuned = train(tmp_path / "tuned", init_from=source, num_steps=1)  # one update, at learning rate 0
    weights = [list(DDPMPaperPipeline.from_pretrained(run).unet.parameters()) for run in (source, tuned)]
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))
    saved = yaml.safe_load((tuned / "options.yaml").read_text(encoding="utf-8"))
    assert saved.items() >= OTHER.items()
    caplog.set_level(logging.INFO)
    train(tmp_path / "tuned", init_from=source, num_steps=3)
    assert "resuming at step 1" in caplog.text and column(tuned, "step") == [1, 2, 3]


def test_tuning_a_learned_variance_goes_on_with_it(tmp_path):
    source = train(tmp_path / "source", num_steps=1, objective="vlb", variance_type="learned")
    run = build(tmp_path / "tuned", init_from=source, objective="vlb")
    assert run.options.variance_type == "learned" and run.state.unet.config["out_channels"] == 2
    weights = DDPMPaperPipeline.from_pretrained(source).unet.parameters()
    assert all(torch.equal(x, y) for x, y in zip(run.state.unet.parameters(), weights, strict=True))
    assert "--variance_type learned needs --objective vlb" in refusal(tmp_path / "simple", init_from=source)


@pytest.mark.parametrize("num_steps", [None, 4])
def test_tuning_a_shortened_chain_is_refused(tmp_path, source, num_steps):
    """Its variances are of the weights as they are."""
    pipe = DDPMPaperPipeline.from_pretrained(source)
    pipe.scheduler = shortened(pipe.scheduler, np.linspace(0.01, 0.5, 15), num_steps=num_steps, num_levels=17)
    pipe.save_pretrained(tmp_path / "short")
    message = refusal(tmp_path / "tuned", init_from=tmp_path / "short")
    assert (
        f"--init_from {tmp_path / 'short'} has variances fitted to its weights; start from the checkpoint" in message
    )


def test_tuning_on_other_channels_is_refused(tmp_path, tiny_unet, tiny_scheduler):
    DDPMPaperPipeline(tiny_unet(in_channels=3), tiny_scheduler()).save_pretrained(tmp_path / "source")
    message = refusal(tmp_path / "run", init_from=tmp_path / "source")
    assert "/source is for 3 channels, the data has 1" in message


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
    assert message.endswith("of stock's `ddpm-hf convert` makes them")


def test_more_sample_steps_than_the_adopted_process_has_are_refused(tmp_path, source):
    assert "sample_steps" in refusal(tmp_path / "tuned", init_from=source, sample_steps=18, sample_every=3)
