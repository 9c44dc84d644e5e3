"""The flow on held-out digits: its likelihood beside the bound, how exact it is, and what data are encoded to.

    python benchmarks/flow.py --output benchmarks/results/flow.json        # what the file lacks; some minutes
    python benchmarks/flow.py --output FILE --only statistics              # this again
    python benchmarks/flow.py --table benchmarks/results/flow.json         # print the tables, renew docs/flow.md
    python benchmarks/flow.py --picture docs/pictures/flow.png             # digits, their latents, and back

Every measurement is kept in the file as soon as it is there. ± is a standard error over images. Needs the extras
`train` and `flow`.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from speed import documents, report
from speed.flow_tables import CHOSEN_STEPS
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.data import load_samples, to_model_range
from ddpm_hf.flow import decode, encode, flow_bits_per_dim
from ddpm_hf.likelihood import bits_per_dim
from ddpm_hf.oracle import GaussianMixture, OracleNetwork
from ddpm_hf.pictures import as_pictures, labelled_grid
from ddpm_hf.randomness import normal
from ddpm_hf.short_chains import shortened

CHECKPOINT = report.ROOT / "model_cards" / "ddpm-digits"
LEVELS = 17
NUM_BOUND, NUM_FITTED_ON, NUM_STUDIED, NUM_EXACT, NUM_TRIPS = 64, 48, 16, 4, 32
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)
STEPS = {1: (10, 50, 250, 1000), 2: (5, 25, 125, 500)}  # of as many evaluations
SOLVER_TOLERANCES = (1e-2, 1e-3, 1e-4)
STATISTICS_TOLERANCE = 1e-2
RIDGE = 0.05**2  # variance added to the Gaussian that the oracle knows, of which some pixels have none


@cache
def pipeline() -> DDPMPaperPipeline:
    return DDPMPaperPipeline.from_pretrained(CHECKPOINT)


def model() -> tuple[Any, Any]:
    return pipeline().unet, pipeline().scheduler


def digits(split: str, num: int | None = None) -> Tensor:
    """The first of a split, float64 [N, 1, 8, 8] in [−1, 1]."""
    samples = load_samples("digits", split=split)
    return to_model_range(samples.batch(range(num or len(samples))), LEVELS).double()


def mean_of(values: Tensor) -> dict[str, float]:
    return {"value": values.mean().item(), "error": (values.std() / math.sqrt(len(values))).item()}


# ---- measurements --------------------------------------------------------------------------------------------------


def bounds() -> dict[str, Any]:
    """The flow's bound beside the paper's of 1000 steps and that of a chosen chain, of the same digits."""
    x, found = digits("test", NUM_BOUND), {}
    clip = pipeline().scheduler.clip_denoised()
    options: Any = {"seed": 0, "num_levels": LEVELS, "clip_denoised": clip}
    terms = bits_per_dim(*model(), digits("train", NUM_FITTED_ON), **options)
    chain = shortened(model()[1], terms.x_start_mse_bt.mean(dim=0).numpy(), num_steps=CHOSEN_STEPS, num_levels=LEVELS)
    flow = flow_bits_per_dim(*model(), x, seed=0, num_levels=LEVELS, num_dequantizations=2)
    found["flow"] = flow.total_b
    found["bound"] = bits_per_dim(*model(), x, **options).total_b
    found["chosen"] = bits_per_dim(model()[0], chain, x, **options).total_b
    rows = {name: mean_of(values) for name, values in found.items()}
    rows["flow less bound"] = mean_of(found["flow"] - found["bound"])
    rows["flow less chosen"] = mean_of(found["flow"] - found["chosen"])
    rows["parts"] = {"prior_bpd": flow.prior_b.mean().item(), "contraction_bpd": flow.contraction_b.mean().item()}
    rows["own error of an image"] = {"value": flow.error_b.square().mean().sqrt().item()}
    return rows | {"num_evaluations": flow.num_evaluations_b.mean().item() / 2}


def tolerances() -> dict[str, Any]:
    """The flow's bound of the same noise and probes by tolerance, in float32 and with the network in float64."""
    x, totals, found = digits("test", NUM_STUDIED), {}, {}
    for dtype in (torch.float32, torch.float64):
        unet = copy.deepcopy(model()[0]).to(dtype)
        for tolerance in TOLERANCES:
            began, key = time.process_time(), f"{tolerance:.0e} {str(dtype).removeprefix('torch.')}"
            bits = flow_bits_per_dim(unet, model()[1], x, seed=0, num_levels=LEVELS, tolerance=tolerance)
            found[key] = {"num_evaluations": bits.num_evaluations_b.mean().item(), "bpd": bits.total_b.mean().item()}
            found[key]["cpu_s"] = time.process_time() - began
            totals[key] = bits.total_b
    reference = f"{TOLERANCES[-1]:.0e} float64"
    for key, row in found.items():
        row["rms_difference"] = (totals[key] - totals[reference]).square().mean().sqrt().item()
    return found


def between() -> dict[str, Any]:
    """The flow where the network is asked at real t, and where its outputs at the neighbouring integers are mixed."""
    unet, scheduler = model()
    x = digits("test", NUM_STUDIED)

    def mixed(x_t: Tensor, t: Tensor) -> Tensor:
        share = (t - t.floor()).view(-1, 1, 1, 1)
        return (1 - share) * unet(x_t, t.floor()).sample + share * unet(x_t, t.ceil()).sample

    with torch.no_grad():
        rows = {}
        for t in (0, 10, 100, 500, 900):
            x_t = scheduler.diffusion.q_sample(
                x, t, normal(0, "between", t, range(len(x)), (1, 8, 8)).double()
            ).float()
            first, middle, last = (unet(x_t, torch.full((len(x),), t + part)).sample for part in (0.0, 0.5, 1.0))
            off, apart = middle - (first + last) / 2, last - first
            rows[str(t)] = {"off": off.square().mean().sqrt().item(), "apart": apart.square().mean().sqrt().item()}
    unet.eval()
    asked, of_neighbours = (
        flow_bits_per_dim(network, scheduler, x, seed=0, num_levels=LEVELS, tolerance=1e-3).total_b
        for network in (unet, mixed)
    )
    return {"outputs": rows, "difference": mean_of(asked - of_neighbours)}


def divergences() -> dict[str, Any]:
    """The exact divergence, 64 backward passes, beside two and sixteen probes."""
    x, found = digits("test", NUM_EXACT), {}
    for probes in (0, 2, 16):
        bits = flow_bits_per_dim(*model(), x, seed=0, num_levels=LEVELS, tolerance=1e-3, num_probes=probes)
        found[str(probes)] = bits.contraction_b
    exact = found.pop("0")
    return {probes: (values - exact).square().mean().sqrt().item() for probes, values in found.items()}


def trips() -> dict[str, Any]:
    """Root mean square of decode(encode(x)) − x, and of the latents, by method and number of evaluations."""
    x, found = digits("test", NUM_TRIPS), {}
    ways: dict[str, dict[str, Any]] = {
        f"{'DDIM' if order == 1 else 'Heun'}, {steps} steps": {"num_steps": steps, "order": order}
        for order in (1, 2)
        for steps in STEPS[order]
    }
    ways |= {f"solver, {tolerance:g}": {"tolerance": tolerance} for tolerance in SOLVER_TOLERANCES}
    for name, options in ways.items():
        asked = [0]

        def unet(x_t: Tensor, t: Tensor, asked: list[int] = asked) -> Tensor:
            asked[0] += 1
            return model()[0](x_t, t).sample

        model()[0].eval()
        latents = encode(unet, model()[1], x, **options)
        num_evaluations = asked[0]
        back = decode(unet, model()[1], latents, **options)
        found[name] = {
            "num_evaluations": num_evaluations,
            "error": (back - x).square().mean().sqrt().item(),
            "latents": latents.square().mean().sqrt().item(),
        }
    return found


def statistics_of(latents: Tensor) -> dict[str, float]:
    """What standard Gaussian noise would have: radius² / d of 1 ± √(2/d), variances of 1, no correlations."""
    flat = latents.flatten(1)
    num, dim = flat.shape
    radii = flat.square().mean(dim=1)
    variances = flat.var(dim=0)
    moving = flat[:, variances > 1e-12]
    correlations = torch.corrcoef(moving.T)[~torch.eye(moving.shape[1], dtype=torch.bool)]
    return {
        "num": num,
        "radius2": radii.mean().item(),
        "radius2_deviation": radii.std().item(),
        "lowest_variance": variances.min().item(),
        "median_variance": variances.median().item(),
        "highest_variance": variances.max().item(),
        "rms_correlation": correlations.square().mean().sqrt().item(),
        "kurtosis": (((flat - flat.mean(dim=0)) / variances.sqrt().clamp(min=1e-6)) ** 4).mean().item(),
    }


def fitted_gaussian() -> GaussianMixture:
    """One Gaussian with the mean and covariance of the training digits, and a ridge."""
    x = digits("train").flatten(1)
    covariance = x.T.cov() + RIDGE * torch.eye(64, dtype=torch.float64)
    return GaussianMixture(torch.ones(1), x.mean(dim=0)[None], covariance[None])


def statistics() -> dict[str, Any]:
    """Of the latents of all held-out digits as they are, with the noise of t = 0, with that of their bins; of
    drawn N(0, I); and of a Gaussian's samples by its ε*."""
    x, found = digits("test"), {}
    diffusion = model()[1].diffusion
    uniform = (torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) / 8
    noise = normal(0, "statistics", 0, range(len(x)), (1, 8, 8)).double()
    starts = {
        "as they are": x,
        "noise of t = 0": diffusion.q_sample(x, 0, noise),
        "uniform in their bins": x + uniform,
    }
    for name, start in starts.items():
        latents = encode(*model(), start, tolerance=STATISTICS_TOLERANCE)
        found[name] = statistics_of(latents)
        if start is x:
            flat = digits("train").flatten(1).std(dim=0) < 0.05
            by_pixel = latents.flatten(1).var(dim=0)
            variances = {"variance": by_pixel[flat].mean().item(), "others": by_pixel[~flat].mean().item()}
    scheduler, truth = DDPMPaperScheduler(), fitted_gaussian()
    drawn = truth.sample(len(x), torch.Generator().manual_seed(0))
    found["oracle of a Gaussian"] = statistics_of(
        encode(
            OracleNetwork(truth, scheduler.diffusion), scheduler, drawn, tolerance=STATISTICS_TOLERANCE, batch_size=512
        )
    )
    found["drawn from N(0, I)"] = statistics_of(noise)
    return found | {"flat": {"num": int(flat.sum()), **variances}}


MEASUREMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "statistics": statistics,
    "bounds": bounds,
    "trips": trips,
    "tolerances": tolerances,
    "between": between,
    "divergences": divergences,
}


def picture(path: Path) -> None:
    """Six held-out digits, their latents, what these are decoded to, and the same through ten steps of DDIM."""
    x = digits("test", 6)
    latents = encode(*model(), x)
    coarse = encode(*model(), x, num_steps=10, order=1)
    back = decode(*model(), latents), decode(*model(), coarse, num_steps=10, order=1)
    columns = [x, latents / 3, back[0], coarse / 3, back[1]]
    rows = [as_pictures((row.clamp(-1, 1).float() + 1) / 2) for row in torch.stack(columns, dim=1)]
    names = ["digit", "latent", "decoded", "10 steps", "decoded"]
    labelled_grid(rows, row_labels=[f"no. {i}" for i in range(len(x))], column_labels=names).save(path)


# ---- the script ----------------------------------------------------------------------------------------------------


def measure(path: Path, only: list[str] | None) -> None:
    results = report.read_json(path) if path.exists() else {"kind": "flow", "measured": {}}
    for name, function in MEASUREMENTS.items():
        if name in only if only else name not in results["measured"]:
            began = time.process_time()
            found = function()
            seconds = round(time.process_time() - began, 1)
            results["measured"][name] = {"found": found, "cpu_s": seconds, **report.surroundings()}
            report.write_json(path, results)
            print(f"{name}: {seconds} s of CPU time", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the measurements there, as JSON")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of results, and renew the docs")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw digits, their latents, and what these give")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.output:
        measure(args.output, args.only)
    if args.picture:
        picture(args.picture)
    if args.table:
        return documents.show(args.table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
