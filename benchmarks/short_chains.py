"""Short chains: fitted variances and chosen timesteps against uniform spacing.

    python benchmarks/short_chains.py model_cards/ddpm-digits [--num_images 360] [--json results.json]

For 25 and 50 reverse steps, and for all 1000: the bound in bits/dim on held-out digits, with its decoder's part, and
the Fréchet distance of four ranges of 512 seeds (digits_quality.py), for

- uniform spacing with both fixed variances of the paper;
- uniform spacing with variances fitted to the network;
- timesteps chosen by dynamic programming, with fitted variances.

The fit uses 128 training images. Exits with 1 unless the chosen timesteps have the least bound of their length.
Needs the extra `train`. About four hours on one core, most of it the three chains of 1000 steps.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from digits_quality import FRECHET, NUM_SAMPLES, drawn, over_ranges, quality, real_quality, seed_ranges

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.data import Samples, load_samples, to_model_range
from ddpm_hf.inference import speed_up
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.short_chains import shortened

NUM_FITTED_ON = 128


def chains(scheduler: Any, mse: Any, num_levels: int | None) -> dict[str, tuple[DDPMPaperScheduler, int]]:
    """Schedulers to compare, by name, each with its number of steps."""
    fixed = {
        name: DDPMPaperScheduler.from_config(scheduler.config, variance_type=name)
        for name in ("fixed_small", "fixed_large")
    }
    fitted = shortened(scheduler, mse)
    found: dict[str, tuple[Any, int]] = {}
    for steps in (25, 50):
        found |= {f"{steps} uniform, {name}": (own, steps) for name, own in fixed.items()}
        found[f"{steps} uniform, fitted"] = (fitted, steps)
        found[f"{steps} chosen, fitted"] = (shortened(scheduler, mse, num_steps=steps, num_levels=num_levels), steps)
    found |= {f"1000, {name}": (own, 1000) for name, own in fixed.items()}
    return found | {"1000, fitted": (fitted, 1000)}


def measure(pipe: DDPMPaperPipeline, steps: int, held_out: Samples, num_images: int) -> dict[str, float]:
    x_start = to_model_range(held_out.batch(range(num_images)), held_out.num_levels)
    terms = bits_per_dim(
        pipe.unet, pipe.scheduler, x_start, seed=0, num_levels=held_out.num_levels, num_inference_steps=steps
    )
    distance = over_ranges([quality(drawn(speed_up(pipe), seeds, steps)) for seeds in seed_ranges()])[FRECHET]
    return {
        "bound_bpd": terms.total_b.mean().item(),
        "decoder_bpd": terms.terms_bt[:, 0].mean().item(),
        "frechet_distance": distance.value,
        "frechet_distance_error": distance.error,
        "frechet_distance_real": real_quality(NUM_SAMPLES)[FRECHET].value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--num_images", type=int, default=360, help="held-out digits for the bound; default: all")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    pipe = DDPMPaperPipeline.from_pretrained(args.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda")
    train, held_out = load_samples("digits"), load_samples("digits", split="test")
    x_start = to_model_range(train.batch(range(NUM_FITTED_ON)), train.num_levels)
    terms = bits_per_dim(pipe.unet, pipe.scheduler, x_start, seed=1, num_levels=train.num_levels)
    mse = terms.x_start_mse_bt.mean(dim=0).numpy()

    print(f"{'steps, variance':24} {'bits/dim':>9} {'of it L_0':>9} {'Fréchet':>9}")
    numbers = {}
    for name, (scheduler, steps) in chains(pipe.scheduler, mse, train.num_levels).items():
        pipe.scheduler = scheduler
        numbers[name] = measure(pipe, steps, held_out, args.num_images)
        bound, decoder, distance, error, real = numbers[name].values()
        print(f"{name:24} {bound:9.3f} {decoder:9.3f} {distance:9.1f} ± {error:.1f}", flush=True)
    print(f"{'real against real':24} {'':9} {'':9} {real:9.1f}")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")
    for steps in (25, 50):
        bounds = {name: own["bound_bpd"] for name, own in numbers.items() if name.startswith(f"{steps} ")}
        if min(bounds, key=bounds.__getitem__) != f"{steps} chosen, fitted":
            sys.exit(f"with {steps} steps the chosen timesteps are not the best: {bounds}")


if __name__ == "__main__":
    main()
