"""What does each scheduler of diffusers draw from a network that is exactly right?

    python benchmarks/schedulers.py --output benchmarks/results/schedulers.json     # ten minutes on one core
    python benchmarks/schedulers.py --only DDIMScheduler PNDMScheduler              # some of it
    python benchmarks/schedulers.py --table benchmarks/results/schedulers.json      # print the tables, renew the docs

Every class of the installed diffusers that has a `step`, found by looking, is built from our configuration and draws
through `DDPMPaperPipeline` with the oracle's ε*, or v made of it: data N(0.3, 0.2²) and a mixture of two Gaussians,
for processes of 4, 100 and 1000 timesteps, in 1 to T steps, with each spacing. What it is refused for is kept too. x_T
are the quantiles of N(0, I), so that samplers without noise have no error of chance.
"""

import argparse
import inspect
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from speed import documents, report
from speed.scheduler_tables import table
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.oracle import GaussianMixture, OracleNetwork
from ddpm_hf.scheduler import alphas_cumprod_at

NUM_SAMPLES = 4000  # of the Gaussian, and of the mixture
NUM_TIMESTEPS = (4, 100, 1000)
STEPS = (1, 2, 10, 20, 50)
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction")
SHORT = (0.3, 0.6, 0.9, 0.99)  # β of 4 timesteps: ᾱ_T is 3e-4
SPLIT = 0.05  # between the components of the mixture, which overlap little
TRUTH = GaussianMixture(  # two data sets in one network, by their labels
    torch.tensor([0.4, 0.42, 0.18], dtype=torch.float64),
    torch.tensor([[0.3], [-0.5], [0.6]], dtype=torch.float64),
    torch.tensor([[[0.04]], [[0.04]], [[0.09]]], dtype=torch.float64),
    labels=torch.tensor([0, 1, 1]),
)


class TwoOracles(OracleNetwork):
    """ε* or v of the Gaussian for the first half of a batch, and of the mixture for the second."""

    def __init__(self, scheduler: DDPMPaperScheduler):
        super().__init__(TRUTH, scheduler.diffusion)
        self.predicts_v = scheduler.config["prediction_type"] == "v_prediction"
        self.config = FrozenDict(in_channels=1, out_channels=1)  # which of them a sample is of is no class to choose

    def forward(self, sample: Tensor, timestep: Any) -> UNet2DOutput:  # type: ignore[override]
        labels = torch.arange(2).repeat_interleave(len(sample) // 2)
        eps = super().forward(sample, timestep, labels).sample
        if not self.predicts_v:
            return UNet2DOutput(sample=eps)
        alphas_cumprod = alphas_cumprod_at(self.diffusion, timestep).expand(len(sample))[:, None]
        # v = √ᾱ ε − √(1−ᾱ) x_0, with x_0 of Eq. 4
        return UNet2DOutput(sample=(eps - (1 - alphas_cumprod).sqrt() * sample.double()) / alphas_cumprod.sqrt())


def process(num_timesteps: int, prediction_type: str, spacing: str) -> DDPMPaperScheduler:
    """The paper's β for so many timesteps; unclipped, since mixtures do not end at ±1."""
    options: dict[str, Any] = {"prediction_type": prediction_type, "timestep_spacing": spacing, "clip_sample": False}
    if num_timesteps == len(SHORT):
        return DDPMPaperScheduler(trained_betas=list(SHORT), **options)
    return DDPMPaperScheduler(num_timesteps, 0.1 / num_timesteps, 20 / num_timesteps, **options)


def scheduler_classes() -> dict[str, type]:
    """By name: ours, and every scheduler of the installed diffusers that has a `step`."""
    found: dict[str, type] = {"DDPMPaperScheduler": DDPMPaperScheduler}
    for name in sorted(dir(diffusers)):
        member = getattr(diffusers, name, None)  # with onnxruntime it lists pipelines that it lacks
        if inspect.isclass(member) and issubclass(member, diffusers.SchedulerMixin) and hasattr(member, "step"):
            found[name] = member
    return found


def truth() -> dict[str, dict[str, float]]:
    """What `drawn` should find."""
    both = [TRUTH.given(label) for label in range(2)]
    gaussian, mixture = ({"mean": float(one.mean), "std": float(one.covariance.sqrt())} for one in both)
    below = torch.special.ndtr((SPLIT - both[1].means[:, 0]) / both[1].covariances[:, 0, 0].sqrt())
    return {"gaussian": gaussian, "mixture": {**mixture, "left": float(both[1].weights @ below)}}


def quantiles(num: int) -> Tensor:
    """x_T of both halves of a batch, float32 [2 num, 1]."""
    middle = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return (math.sqrt(2) * torch.erfinv(2 * middle - 1)).repeat(2)[:, None].float()


def moments(x: Tensor) -> dict[str, float]:
    """Of x [N]."""
    return {"mean": float(x.mean()), "std": float(x.std())}


def drawn(scheduler_class: type, ours: DDPMPaperScheduler, num_steps: int, num_samples: int) -> dict[str, Any]:
    """Moments of both data sets as drawn; or `refused`, in the words of whoever refuses; ValueError or TypeError."""
    own = inspect.signature(scheduler_class.__init__).parameters
    seed = {"noise_sampler_seed": 0} if "noise_sampler_seed" in own else {}  # it draws without the generator
    try:
        pipe = DDPMPaperPipeline(TwoOracles(ours), scheduler_class.from_config(ours.config, **seed))  # type: ignore
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_inference_steps": num_steps, "output_type": "latent"}
        x = pipe(latents=quantiles(num_samples), generator=generator, **options).images  # type: ignore[union-attr]
    except (ArithmeticError, TypeError, ValueError) as error:
        return {"refused": f"{error}".splitlines()[0][:200]}
    gaussian, mixture = x.double().flatten().chunk(2)  # type: ignore[union-attr]
    left = float((mixture < SPLIT).double().mean())  # the weight of the component on this side
    return {"gaussian": moments(gaussian), "mixture": {**moments(mixture), "left": left}}


def cases(num_timesteps: Sequence[int] = NUM_TIMESTEPS) -> Iterator[dict[str, Any]]:
    """All of them; of T = 1000 steps one spacing of ε is enough: the grids are the same there.

    And 600 of 1000, which do not divide them: steps are of two lengths there.
    """
    for total in num_timesteps:
        for predicts in PREDICTIONS:
            for spacing in SPACINGS:
                for steps in dict.fromkeys((*STEPS, total)):
                    if steps <= total and (steps < 1000 or (predicts, spacing) == ("epsilon", "leading")):
                        yield {"T": total, "predicts": predicts, "spacing": spacing, "steps": steps}
    if 1000 in num_timesteps:
        yield {"T": 1000, "predicts": "epsilon", "spacing": "trailing", "steps": 600}


def row_of(name: str, scheduler_class: type, case: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """Of one case; where all T steps are refused for repeating one, of T − 1."""
    ours = process(case["T"], case["predicts"], case["spacing"])
    found = drawn(scheduler_class, ours, case["steps"], num_samples)
    if case["steps"] == case["T"] > 4 and "visits timesteps twice" in found.get("refused", ""):
        case = {**case, "steps": case["T"] - 1}
        found = drawn(scheduler_class, ours, case["steps"], num_samples)
    return {"scheduler": name, **case, **found}


def measure(names: Sequence[str] | None, num_samples: int) -> list[dict[str, Any]]:
    """A row for each case of each scheduler; a single one of those that are refused in every case."""
    rows = []
    for name, scheduler_class in scheduler_classes().items():
        if names and name not in names:
            continue
        own = [row_of(name, scheduler_class, case, num_samples) for case in cases()]
        drew = [row for row in own if "refused" not in row]
        rows += own if drew else own[-1:]
        print(f"{name}: {len(drew)} of {len(own)} drawn", flush=True)
    return rows


def rounded(value: Any) -> Any:
    """Numbers to four digits, which is more than chance leaves."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(path: Path, results: dict[str, Any]) -> None:
    """As JSON with a line for each row."""
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in results["rows"])
    head = json.dumps({**results, "rows": []}, indent=1, ensure_ascii=False)
    path.write_text(head.replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="CLASS", help="these schedulers; default: all")
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of results, and renew the docs")
    args = parser.parse_args(argv)
    if args.table:
        return documents.show(args.table)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()  # of keys that a scheduler does not know
    logging.getLogger("ddpm_hf").setLevel(logging.ERROR)  # of chains that begin late, which are some of the cases
    results = {"kind": "schedulers", "num_samples": args.num_samples, "truth": truth(), **report.surroundings()}
    results["rows"] = [rounded(row) for row in measure(args.only, args.num_samples)]
    if args.output:
        write(args.output, results)
    print("\n" + table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
