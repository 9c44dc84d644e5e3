"""Stock diffusers' training of an unconditional model, with the options of its example script, for so many minutes.

    python benchmarks/fashion/stock_loop.py runs/stock --seed 0 --minutes 5 10 15

Written after examples/unconditional_image_generation of diffusers, whose script cannot run here: it imports
torchvision, of which there is no CPU build. Its transforms are made by Pillow instead, image by image as there. Kept
are AdamW (betas 0.95 and 0.999, weight decay 1e-6), 500 warm-up steps and the cosine over 100 epochs, gradients
clipped at 1, the EMA that warms up with power 3/4 to 0.9999, float32, batch 16, and UNet2DModel with its own defaults,
at the size of training/configs/fashion28.yaml. No flips, which that script has as an option.

The clock starts with the first step; after each of the minutes the averaged model is saved as MINUTES/.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional as F

from ddpm_hf.data import load_samples

RESOLUTION, EPOCHS, WARMUP = 28, 100, 500


class Pictures(torch.utils.data.Dataset):
    """The training images as Pillow opens them, resized, cropped and scaled one by one."""

    def __init__(self) -> None:
        self.images = [Image.fromarray(image) for image in load_samples("fashion_mnist").array[:, 0]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.images[index].resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image, np.float32)[None] / 255).sub_(0.5).div_(0.5)


def network() -> UNet2DModel:
    """3.9 M parameters."""
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def train(output_dir: Path, *, seed: int, minutes: list[float], batch: int, learning_rate: float) -> dict[str, Any]:
    """Trains until the last of the minutes. Returns how many steps there were at each."""
    set_seed(seed)
    accelerator = Accelerator()
    model, schedule = network(), DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.95, 0.999), weight_decay=1e-6)
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=batch, shuffle=True)
    total = len(loader) * EPOCHS
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=total)
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    step, reached, left = 0, {}, sorted(minutes)
    began = time.monotonic()
    while left:
        for images in loader:
            noise = torch.randn_like(images)
            t = torch.randint(0, 1000, (len(images),))
            loss = F.mse_loss(model(schedule.add_noise(images, noise, t), t).sample, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            step += 1
            if time.monotonic() - began >= 60 * left[0]:
                pause, mark = time.monotonic(), left.pop(0)
                reached[f"{mark:g}"] = step
                save(output_dir / f"{mark:g}", model, ema, schedule)
                began += time.monotonic() - pause
                if not left:
                    break
    return {"steps": reached, "batch": batch, "learning_rate": learning_rate, "seed": seed}


def save(folder: Path, model: UNet2DModel, ema: EMAModel, schedule: DDPMScheduler) -> None:
    """The averaged model as stock's pipeline."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    DDPMPipeline(model, schedule).save_pretrained(folder)
    ema.restore(model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 10.0, 15.0])
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s, that script's")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="default: %(default)s, that script's")
    args = parser.parse_args()
    found = train(
        args.output_dir, seed=args.seed, minutes=args.minutes, batch=args.batch, learning_rate=args.learning_rate
    )
    (args.output_dir / "done.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
