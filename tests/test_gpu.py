"""What only a GPU can show; everywhere else these are skipped.

    DDPM_HF_GPU=1 python3 dev.py test -m slow tests/test_gpu.py        # two minutes on an H100

The other tests run on the CPU, also where there is a GPU: see conftest.py.
"""

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import HeunDiscreteScheduler
from PIL import Image
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.cli import main as ddpm_hf
from ddpm_hf.data import load_samples
from ddpm_hf.inference import GraphedUNet, speed_up
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.machine import Recorded
from ddpm_hf.machine.cuda_graphs import NUM_WARM_UP
from ddpm_hf.randomness import normal
from ddpm_hf.runs import checkpoints, parse_options, read_metrics, share_of
from training import train as train_py

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "model_cards" / "ddpm-digits"
LABELLED = ROOT / "model_cards" / "ddpm-digits-labels"
TINY = ["--block_out_channels", "16", "32", "--norm_num_groups", "4", "--global_batch_size", "16"]
TINY += ["--num_train_timesteps", "20", "--beta_end", "0.5", "--warmup_steps", "4", "--ema_decay", "0.5"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and DDPM_HF_GPU=1"),
]


@pytest.fixture(autouse=True)
def _same_kernels_every_time(monkeypatch) -> None:
    """Else cuDNN may take convolutions whose sums come out in another order every time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="module")
def digits() -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline.from_pretrained(DIGITS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def on_gpu(pipe: DDPMPaperPipeline) -> DDPMPaperPipeline:
    moved = DDPMPaperPipeline(copy.deepcopy(pipe.unet).to("cuda"), pipe.scheduler)
    moved.set_progress_bar_config(disable=True)
    return moved


# ---- recording -----------------------------------------------------------------------------------------------------


def test_recorded_work_is_that_of_the_function():
    """Random numbers too, which the global generator decides, and what is changed in place."""
    total = torch.zeros(3, device="cuda")

    def work(x: Tensor) -> Tensor:
        total.add_(x)
        return x * torch.rand(3, device="cuda")

    results = {}
    for name, function in (("plain", work), ("recorded", Recorded(work, torch.device("cuda")))):
        total.zero_()
        outputs = []
        for i in range(NUM_WARM_UP + 4):
            torch.manual_seed(i // 2)
            outputs.append(function(torch.full((3,), float(i), device="cuda")))
        results[name] = [*outputs, total.clone()]
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
    with pytest.raises(ValueError, match=r"recorded for tensors of shapes \[\(3,\)\], and is given \[\(4,\)\]"):
        recorded = Recorded(work, torch.device("cuda"))
        recorded(torch.zeros(3, device="cuda"))
        recorded(torch.zeros(4, device="cuda"))


def build(folder: Path, *options: str) -> Any:
    AcceleratorState._reset_state(True)
    argv = ["--output_dir", str(folder), *TINY, *options]
    parsed = parse_options(train_py.TrainingOptions, argv, default_config=train_py.CONFIGS / "digits.yaml")
    return train_py.build_run(parsed, train_py.make_accelerator(parsed), train_py.load_data(parsed))


def stream_of(run: Any) -> Iterator[Any]:
    options = run.options
    for step in itertools.count(run.state.step):
        for part in range(options.gradient_accumulation_steps):
            rows = share_of(options.global_batch_size, options.gradient_accumulation_steps, part, 0, 1)
            yield run.batches.rows(step, rows).pin_memory()


def trained(folder: Path, *options: str, steps: int = 12) -> tuple[Any, list[float]]:
    run = build(folder, *options)
    stream = stream_of(run)
    return run, [float(train_py.training_step(run, stream)[0]) for _ in range(steps)]


def everything(run: Any) -> list[Tensor]:
    slots = run.state.optimizer.state_dict()["state"]
    moments = [own[name] for own in slots.values() for name in ("exp_avg", "exp_avg_sq")]
    return [*(p.detach() for p in run.state.unet.parameters()), *run.state.ema.shadow_params, *moments]


BOUND = ("--objective", "vlb", "--variance_type", "learned", "--prediction_type", "sample")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--mixed_precision", "bf16"),
        ("--gradient_accumulation_steps", "2", "--random_flip"),
        BOUND,
        ("--objective", "vlb", "--timestep_sampling", "loss_history", "--num_train_timesteps", "3"),
        ("--config", str(train_py.CONFIGS / "points.yaml"), "--hidden_size", "16"),
        ("--label_column", "label"),
    ],
    ids=["float32", "bf16", "two parts", "bound", "importance", "points", "labels"],
)
def test_recorded_training_steps_are_the_same_bits(tmp_path, options):
    """Weights, averages, both of Adam's moments and losses, with dropout, while the learning rate rises."""
    dropout = ("--dropout", "0.3")
    plain, plain_losses = trained(tmp_path, *options, *dropout, "--no_cuda_graphs")
    recorded, losses = trained(tmp_path, *options, *dropout)
    assert not plain.updates.recorded
    assert all(work._graph is not None for work in recorded.updates.recorded.values())
    assert len(recorded.updates.recorded) == 3 and losses == plain_losses and len(set(losses)) == len(losses)
    assert all(torch.equal(a, b) for a, b in zip(everything(recorded), everything(plain), strict=True))
    for run in (recorded, plain):
        assert (run.state.step, run.state.num_updates, run.state.ema.optimization_step) == (12, 12, 12)


@pytest.mark.parametrize("options", [("--mixed_precision", "fp16"), ("--gradient_checkpointing",)])
def test_what_cannot_be_recorded_trains_without(tmp_path, options):
    run, losses = trained(tmp_path, *options, "--learning_rate", "2e-3", steps=60)
    assert not run.updates.recorded and np.mean(losses[-20:]) < np.mean(losses[:20])
    assert run.state.num_updates == 60 if "fp16" not in options else run.state.num_updates > 50


def test_a_recorded_step_that_is_not_finite_touches_nothing(tmp_path):
    run = build(tmp_path)
    stream = stream_of(run)
    for _ in range(6):
        train_py.training_step(run, stream)
    before = [x.clone() for x in everything(run)]
    batch = run.batches.rows(6, range(16))
    batch.noise[3] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"loss is not finite at step 6, .*samples \[{batch.indices[3]}\]"):
        train_py.training_step(run, iter([batch]))
    assert all(torch.equal(a, b) for a, b in zip(everything(run), before, strict=True)) and run.state.step == 6


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, precision):
    """One that was recorded anew after its first steps, against one that was recorded once."""
    common = [*TINY, "--checkpoint_every", "7", "--sample_every", "7", "--num_samples", "2", "--dropout", "0.2"]
    common += ["--mixed_precision", precision, "--log_every", "1"]
    for name, counts in (("whole", ["14"]), ("resumed", ["7", "14"])):
        for count in counts:
            AcceleratorState._reset_state(True)
            train_py.main(["--output_dir", str(tmp_path / name), "--num_steps", count, *common])
    losses = {}
    for name in ("whole", "resumed"):
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert losses["whole"] == losses["resumed"] and len(losses["whole"]) == 14
    for group in ("model", "ema", "optimizer"):
        found, expected = (checkpoints.read(tmp_path / n / "checkpoints" / "step-14", group) for n in losses)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_the_script_trains_on_the_gpu_as_it_is_launched(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "bf16", "training/train.py"]
    options = ["--output_dir", str(tmp_path), "--num_steps", "150", "--checkpoint_every", "100", "--log_every", "10"]
    ended = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "on cuda, precision bf16" in ended.stderr + ended.stdout
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.6 * losses[0]
    images = DDPMPaperPipeline.from_pretrained(tmp_path)(seeds=[0, 1], num_inference_steps=20, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()


# ---- sampling ------------------------------------------------------------------------------------------------------


def draw(pipe: DDPMPaperPipeline, seeds: Any, **options: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(seeds=seeds, output_type="pt", **options).images.float().cpu()


def test_a_seed_is_one_image_in_any_batch_and_on_any_device(digits):
    """Up to rounding, to 10 bits where cuDNN computes in TF32, carried through 1000 steps of a trained network."""
    gpu = on_gpu(digits)
    together = draw(gpu, range(6))
    for chosen in ([4], [5, 0, 2]):
        torch.testing.assert_close(draw(gpu, chosen), together[chosen], rtol=0, atol=0.02)
    torch.testing.assert_close(together, draw(digits, range(6)), rtol=0, atol=0.02)


def test_speed_up_records_the_network_for_each_batch_size(digits):
    """Batches of three sizes in turn; a scheduler that asks twice a step.

    To rounding: for images of one channel, whose layout is ambiguous, cuDNN may take other kernels.
    """
    gpu = on_gpu(digits)
    fast = speed_up(gpu)
    close = {"rtol": 0, "atol": 1e-3}
    for seeds in (range(5), range(2), range(3), range(5), range(1, 3)):
        torch.testing.assert_close(*(draw(pipe, seeds, num_inference_steps=50) for pipe in (fast, gpu)), **close)
    unet: Any = fast.unet
    assert isinstance(unet, GraphedUNet) and {size for size, _ in unet._recorded} == {5, 2, 3}
    for pipe in (fast, gpu):
        pipe.scheduler = HeunDiscreteScheduler.from_config(digits.scheduler.config)
    torch.testing.assert_close(*(draw(pipe, [1, 2], num_inference_steps=10) for pipe in (fast, gpu)), **close)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_speed_up_with_labels(scale):
    """The recorded network is given the labels of each batch; guided, both halves."""
    labelled = DDPMPaperPipeline.from_pretrained(LABELLED)
    gpu = on_gpu(labelled)
    fast = speed_up(gpu)
    for labels in ([3, 3, 3], [0, None, 9], [7, 1, 2]):
        options = {"class_labels": labels, "guidance_scale": scale, "num_inference_steps": 50}
        drawn = [draw(pipe, range(3), **options) for pipe in (fast, gpu, labelled)]
        torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-3)
        torch.testing.assert_close(drawn[1], drawn[2], rtol=0, atol=0.02)


@pytest.mark.parametrize("compile", [False, True])
def test_speed_up_in_bfloat16(digits, compile):
    """One evaluation of the network: 8 bits of every activation, 0.4 % each; relative RMS."""
    gpu = on_gpu(digits)
    fast: Any = speed_up(gpu, torch.bfloat16, compile=compile).unet
    for t in (999, 500, 3, 999, 500):
        x = normal(0, "x", t, range(4), (1, 8, 8)).cuda()
        expected = gpu.unet(x, t).sample.detach()
        found = fast(x, t).sample
        assert found.dtype == torch.float32
        assert float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()) < 0.02
    with pytest.raises(ValueError, match="sped up for cuda:0, and sample is on cpu"):
        fast(x.cpu(), 3)


def test_sampling_from_the_command_line(tmp_path):
    for name, more in (("plain", []), ("fast", ["--fast"])):
        options = ["--seeds", "0-4", "--steps", "50", "-o", str(tmp_path / f"{name}.npy"), "--device", "cuda"]
        ddpm_hf(["sample", str(DIGITS), *options, *more])
    plain, fast = (np.load(tmp_path / f"{name}.npy") for name in ("plain", "fast"))
    np.testing.assert_allclose(plain, fast, rtol=0, atol=1e-3)


# ---- likelihood and codec ------------------------------------------------------------------------------------------


def test_bits_per_dim_are_those_of_the_cpu(digits):
    samples = load_samples("digits", split="test")
    x_start = samples.batch(range(4)) / 8.0 - 1
    gpu = on_gpu(digits)
    found, expected = (
        bits_per_dim(pipe.unet, pipe.scheduler, x_start.to(pipe.device), seed=0, num_levels=17)
        for pipe in (gpu, digits)
    )
    torch.testing.assert_close(found.total_b, expected.total_b, rtol=0, atol=2e-3)


def test_images_compressed_on_a_gpu_come_back_on_it_and_on_the_cpu(tmp_path):
    """In float64 with outputs rounded to 2⁻⁸ the devices agree, or it would end in an error."""
    folder, file = tmp_path / "images", tmp_path / "images.ddpm"
    folder.mkdir()
    levels = load_samples("digits", split="test").batch(range(12)).numpy()
    np.save(tmp_path / "levels.npy", levels)
    for i, image in enumerate(levels):
        Image.fromarray((image[0] * 15).astype(np.uint8)).save(folder / f"{i:02}.png")
    ddpm_hf(["compress", str(DIGITS), str(folder), "-o", str(file), "--steps", "5", "--device", "cuda"])
    for device in ("cuda", "cpu"):
        ddpm_hf(["decompress", str(DIGITS), str(file), "-o", str(tmp_path / f"{device}.npy"), "--device", device])
        found = np.load(tmp_path / f"{device}.npy")
        assert np.array_equal(found[:, 0], (levels[:, 0] * 15))
