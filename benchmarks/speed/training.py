"""The training step, ours from training/train.py and stock's as its script does it."""

import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ddpm_hf.convert import to_stock
from ddpm_hf.data import Samples, fingerprint, to_model_range
from ddpm_hf.runs import Batch, prefetched

from .networks import CIFAR10, ROOT, SIDE_28, counted, relative_rms, with_working_branches
from .timing import STOCK, Difference, Timed, Work

LEARNING_RATE, EMA_DECAY, DROPOUT = 2e-4, 0.9999, 0.1
LOSS, NORM = 1e-4, 1e-4  # relative
WEIGHTS = (
    1e-3  # relative RMS of the update: Adam's first one is little more than the gradient's sign, also of rounding
)
LOSS_BF16, NORM_BF16 = 0.02, 0.1  # in bfloat16 that sign says nothing: its weights are not compared


@cache
def training_script() -> ModuleType:
    sys.path.insert(0, str(ROOT))
    from training import train

    return train


def synthetic_samples(num: int, side: int = 32, channels: int = 3) -> Samples:
    """uint8 noise: what is in the pixels changes no time."""
    array = np.random.default_rng(0).integers(256, size=(num, channels, side, side), dtype=np.uint8)
    return Samples("synthetic", array, 256, fingerprint(array, 256))


def make_accelerator(precision: str, device: str) -> Accelerator:
    """Accelerate allows one precision in a process; what it has prepared before keeps its own."""
    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(mixed_precision=precision, cpu=device == "cpu")


def build_ours(
    precision: str,
    batch: int,
    device: str,
    config: dict[str, Any],
    samples: Samples,
    *,
    dropout: float = DROPOUT,
    compile: bool = False,
) -> Any:
    """train.py's Run: network, optimizer, averages, data."""
    script = training_script()
    options = script.TrainingOptions(
        dataset_name="digits",  # one must be named; the samples are those given
        block_out_channels=list(config["block_out_channels"]),
        attention_resolutions=list(config["attention_resolutions"]),
        layers_per_block=config.get("layers_per_block", 2),
        norm_num_groups=config.get("norm_num_groups", 32),
        global_batch_size=batch,
        random_flip=True,
        dropout=dropout,
        compile=compile,
        mixed_precision=precision,
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        ema_decay=EMA_DECAY,
    )
    run = script.build_run(options, make_accelerator(precision, device), samples)
    with_working_branches(run.state.unet)
    run.model.train()
    return run


@dataclass
class StockRun:
    """What diffusers' train_unconditional.py sets up, with the paper's numbers for its options.

    Its AdamW without weight decay and with the default betas is Adam; its EMA with a constant decay is the paper's.
    """

    accelerator: Accelerator
    unet: UNet2DModel
    model: nn.Module
    optimizer: Any
    lr_scheduler: Any
    ema: EMAModel
    scheduler: DDPMScheduler

    @classmethod
    def build(cls, unet: UNet2DModel, precision: str, device: str) -> "StockRun":
        accelerator = make_accelerator(precision, device)
        unet.to(accelerator.device)  # type: ignore[arg-type]
        ema = EMAModel(
            unet.parameters(),
            decay=EMA_DECAY,
            min_decay=EMA_DECAY,
            model_cls=UNet2DModel,
            model_config=unet.config,
        )
        optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        lr_scheduler = get_scheduler("constant", optimizer)
        model, optimizer, lr_scheduler = accelerator.prepare(unet.train(), optimizer, lr_scheduler)
        return cls(accelerator, unet, model, optimizer, lr_scheduler, ema, DDPMScheduler())

    def step(self, clean_images: Tensor, noise: Tensor | None = None, t: Tensor | None = None) -> tuple[float, float]:
        """The body of the script's loop. Returns the loss and the gradient's norm."""
        if noise is None or t is None:
            noise = torch.randn(clean_images.shape, dtype=clean_images.dtype, device=clean_images.device)
            t = torch.randint(0, 1000, (len(clean_images),), device=clean_images.device)
        noisy_images = self.scheduler.add_noise(clean_images, noise, t)  # type: ignore[arg-type]
        with self.accelerator.accumulate(self.model):
            model_output = self.model(noisy_images, t).sample
            loss = F.mse_loss(model_output.float(), noise.float())
            self.accelerator.backward(loss)
            norm: Any = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.lr_scheduler.step()
            self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return loss.detach().item(), float(norm)


def without_dropout(*networks: nn.Module) -> Callable[[], None]:
    """Switch dropout off, whose masks would differ; what is returned puts it back."""
    layers = [module for network in networks for module in network.modules() if isinstance(module, nn.Dropout)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0

    def put_back() -> None:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p

    return put_back


def same_steps(name: str, run: Any, stock: StockRun, batches: Sequence[Batch], *, bf16: bool) -> list[Difference]:
    """Steps of both from the same weights on the same draws: losses, gradient norms, then weights and averages.

    Two at least: Adam's first update does not depend on the gradient's size, and so not on its clipping.
    Without the biases of the keys: the softmax does not see them, so their gradient is nothing but rounding.
    """
    put_back = without_dropout(run.state.unet, stock.unet)
    before = {key: value.clone() for key, value in weights_of(stock.unet).items()}
    worst = {"loss": 0.0, "gradient norm": 0.0}
    for batch in batches:
        ours = training_script().training_step(run, iter([batch]))
        on_device = batch.to(stock.accelerator.device)
        theirs = stock.step(to_model_range(on_device.x_start, 256), on_device.noise, on_device.t)
        for what, own, other in zip(worst, ours, theirs, strict=True):
            worst[what] = float(np.maximum(worst[what], abs(float(own) / other - 1)))  # a NaN stays one
    put_back()
    allowed = (LOSS_BF16, NORM_BF16) if bf16 else (LOSS, NORM)
    found = [
        Difference(f"{name}: {what}, relative", error, least)
        for (what, error), least in zip(worst.items(), allowed, strict=True)
    ]
    # of the averages after two updates it makes too little of a difference
    decays = [side.ema.decay for side in (run.state, stock)]
    found.append(Difference(f"{name}: decay of the averages", abs(decays[0] - decays[1]), 0.0))
    if bf16:
        return found
    for what, ours, theirs in (
        ("weights", weights_of(run.state.unet), weights_of(stock.unet)),
        ("averages", weights_of(run.state.unet, run.state.ema), weights_of(stock.unet, stock.ema)),
    ):
        names = [key for key in before if not key.endswith("to_k.bias")]
        updates = (torch.cat([(side[key] - before[key]).flatten() for key in names]) for side in (ours, theirs))
        error = relative_rms(*updates)
        found.append(Difference(f"{name}: update of the {what}, relative RMS", error, WEIGHTS))
    return found


def weights_of(unet: nn.Module, ema: EMAModel | None = None) -> dict[str, Tensor]:
    """The network's weights by name, or their averages."""
    named = dict(unet.named_parameters())
    values = named.values() if ema is None else ema.shadow_params
    return {name: value.detach() for name, value in zip(named, values, strict=True)}


def endless(run: Any, batch: int) -> Iterator[Batch]:
    wanted = ((step, range(batch)) for step in itertools.count(run.state.step))
    return prefetched(run.batches, wanted, pin_memory=run.accelerator.device.type == "cuda")


def build_training(
    quick: bool,
    *,
    batch: tuple[int, int],
    contestants: Sequence[str] = ("ours", "ours, bf16"),
    stock_precision: str = "no",
    device: str = "cpu",
    config: dict[str, Any] = CIFAR10,
    steps: int = 1,
) -> Work:
    """A step of ours has its data too: uint8 by index, flipped, scaled, with the noise. Stock's gets scaled images.

    `steps` of them are timed together: on a GPU Python launches one while another is computed.
    """
    size = batch[1 if quick else 0]
    samples = synthetic_samples(4 * size, config["sample_size"], config.get("in_channels", 3))
    runs = {}
    for name in contestants:
        precision, compile = "bf16" if "bf16" in name else "no", "compiled" in name
        # a compiled network would be compiled once more when dropout is switched off for the comparison
        dropout = 0.0 if device == "cuda" else DROPOUT
        runs[name] = build_ours(precision, size, device, config, samples, dropout=dropout, compile=compile)
    first = next(iter(runs.values()))
    stock = StockRun.build(to_stock(first.state.unet), stock_precision, device)
    script = training_script()

    def differences() -> list[Difference]:
        found = []
        for name, run in runs.items():
            other = StockRun.build(copy.deepcopy(stock.unet), stock_precision, device)
            bf16 = "bf16" in (stock_precision, run.options.mixed_precision)
            batches = [run.batches.rows(step, range(size)) for step in range(2)]
            found += same_steps(name, run, other, batches, bf16=bf16)
        for call in calls.values():  # on a GPU a step is recorded after the first ones
            repeated(call, 1 if device == "cpu" else 3)()
        return found

    streams = {name: endless(run, size) for name, run in runs.items()}
    images = to_model_range(samples.batch(range(size)), 256).to(stock.accelerator.device)
    calls: dict[str, Callable[[], object]] = {STOCK: partial(stock.step, images)}
    for name, run in runs.items():
        calls[name] = partial(script.training_step, run, streams[name])

    def close() -> None:
        for stream in streams.values():
            stream.close()  # type: ignore[attr-defined]

    timed = {name: repeated(call, steps) for name, call in calls.items()}
    return Work(timed, differences, units=size * steps, unit="image", flop=3 * counted(config)[1], close=close)


def repeated(work: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            work()

    return run


def two_steps(contestant: str, batch: int, stock_config: Path) -> None:
    """What a process does whose peak memory is measured; `stock_config`: the folder of a UNet2DModel."""
    samples = synthetic_samples(4 * batch)
    if contestant == STOCK:
        unet: Any = UNet2DModel.from_config(UNet2DModel.load_config(stock_config))  # type: ignore[arg-type]
        stock = StockRun.build(unet, "no", "cpu")
        for _ in range(2):
            stock.step(to_model_range(samples.batch(range(batch)), 256))
    else:
        run = build_ours("bf16" if "bf16" in contestant else "no", batch, "cpu", CIFAR10, samples)
        stream = endless(run, batch)
        for _ in range(2):
            training_script().training_step(run, stream)


TRAINING: list[Timed] = [
    Timed(
        "training",
        "CIFAR-10 UNet, float32 stock",
        partial(build_training, batch=(8, 4)),
        {"ours": (1.2, 1.4)},
        rounds=(11, 3),
        all_cores=True,
        targets_amx={"ours, bf16": (3.0, 3.8)},
    ),
    Timed(
        "training",
        "28×28 UNet, batch 128 (quick: 16), float32 stock",
        partial(build_training, batch=(128, 16), config=SIDE_28),
        {"ours": (1.2, 1.4)},
        rounds=(7, 3),
        targets_amx={"ours, bf16": (3.0, 3.8)},
    ),
]


def _on_gpu(stock_precision: str, target: tuple[float, float]) -> Timed:
    build = partial(
        build_training,
        batch=(128, 128),
        contestants=("ours, bf16", "ours, bf16, compiled"),
        stock_precision=stock_precision,
        device="cuda",
        steps=5,
    )
    name = f"CIFAR-10 UNet, batch 128, {'bf16' if stock_precision == 'bf16' else 'default precision'} stock"
    targets = dict.fromkeys(("ours, bf16", "ours, bf16, compiled"), target)
    return Timed("training", name, build, targets, rounds=(15, 5), device="cuda")


GPU_TRAINING = [_on_gpu("bf16", (1.5, 1.5)), _on_gpu("no", (2.5, 2.5))]
