"""Saving a checkpoint: ours, whole or absent and with its sums, and what stock's script leaves to accelerate."""

import tempfile
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.convert import to_stock

from .networks import CIFAR10, largest
from .timing import STOCK, Difference, Read, Timed, Work, require_same
from .training import StockRun, build_ours, same_steps, synthetic_samples, weights_of


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Saving:
    """Both runs after a step, and what each saves."""

    def __init__(self, config: dict[str, Any] = CIFAR10):
        samples = synthetic_samples(4, config["sample_size"])
        self.run = build_ours("no", 1, "cpu", config, samples)
        self.stock = StockRun.build(to_stock(self.run.state.unet), "no", "cpu")
        self.stock.accelerator.register_save_state_pre_hook(self._hook)  # type: ignore[arg-type]
        self.differences = same_steps(
            "ours", self.run, self.stock, [self.run.batches.rows(step, range(1)) for step in range(2)], bf16=False
        )
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)

    def _hook(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        """The script's: averages and network each as a model of diffusers, and not as accelerate would."""
        self.stock.ema.save_pretrained(str(Path(output_dir, "unet_ema")))
        for model in models:
            model.save_pretrained(Path(output_dir, "unet"))
            weights.pop()

    def ours(self) -> Path:
        return self.run.state.save(self.root / "ours", self.run.scheduler, {"options": {}})

    def stocks(self) -> Path:
        self.stock.accelerator.save_state(str(self.root / "stock"))
        return self.root / "stock"

    def same_files(self) -> list[Difference]:
        """What is read back is what was saved, averages included."""
        saved = {
            "ours": (DDPMPaperPipeline.from_pretrained(self.ours()).unet, self.run.state),
            "stock": (UNet2DModel.from_pretrained(self.stocks() / "unet_ema"), self.stock),
        }
        found = []
        for name, (network, own) in saved.items():
            read = weights_of(network)  # type: ignore[arg-type]
            worst = max(largest(read[key], value) for key, value in weights_of(own.unet, own.ema).items())
            found.append(Difference(f"{name}: averages", worst, 0.0))
        return found


def build_saving(quick: bool) -> Work:
    saving = Saving()

    def differences() -> list[Difference]:
        return [*saving.differences, *saving.same_files()]

    calls = {STOCK: saving.stocks, "ours": saving.ours}
    return Work(calls, differences, unit="checkpoint", close=saving.folder.cleanup)


def checkpoint_bytes(quick: bool) -> dict[str, float]:
    saving = Saving()
    try:
        require_same("checkpoint", saving.same_files())
        return {STOCK: folder_bytes(saving.root / "stock"), "ours": folder_bytes(saving.root / "ours")}
    finally:
        saving.folder.cleanup()


CHECKPOINT: list[Timed | Read] = [
    Timed("checkpoint", "save, CIFAR-10 UNet", build_saving, rounds=(7, 2)),
    Read("checkpoint", "size, CIFAR-10 UNet", checkpoint_bytes, "bytes"),
]
