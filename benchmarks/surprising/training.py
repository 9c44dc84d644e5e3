"""What surprises about training: chaos that does not matter, clipping, averaging, memorising, dealing out parts."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from speed.training import training_script
from torch import Tensor, nn

from ddpm_hf import DDPMPaperPipeline, GaussianDiffusion
from ddpm_hf.data import Samples, to_model_range
from ddpm_hf.likelihood import prior_bpd
from ddpm_hf.objectives import simple_loss
from ddpm_hf.pipeline_ddpm_paper import seeded_generators
from ddpm_hf.runs import batches_of, build_network, make_accelerator

from .bound import losses_at
from .lab import FIRST, Answers, Lab, ask, bound_terms, end_of, estimate, train

SEEDS = (0, 1, 2)
NUM_STEPS, WARMUP_STEPS = 300, 100  # of short runs; the warm-up is the recipe's
MARKS = (25, 50, 75, 100, 125, 150, 200, 250, 300)  # where weights are kept
DECAYS = (0.98, 0.995, 0.9999)
YOUNG_STEPS = 100  # after which a network is drawn with that is trained too little
NUM_DRAWS = 20  # of t and ε for each held-out image


def flat(parameters: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def short_run(lab: Lab, label: str, options: Mapping[str, Any], samples: Samples | None = None) -> dict[str, Any]:
    """Weights at some steps, gradient norms, averages of several decays, and averages of a run of few steps."""
    return lab.kept(f"run-{label}.safetensors", lambda: _trained(samples or lab.splits["train"], options))


def _trained(samples: Samples, changes: Mapping[str, Any]) -> dict[str, Any]:
    script = training_script()
    options = script.parse([f"--{name}={value}" for name, value in {"cpu_threads": 1, **changes}.items()])
    run = script.build_run(options, make_accelerator(options), samples)
    parameters = list(run.state.unet.parameters())
    averages = {decay: EMAModel(parameters, decay=decay, min_decay=decay, foreach=True) for decay in DECAYS}
    found: dict[str, Any] = {"start": flat(parameters), "weights": {}, "norms": []}
    stream = batches_of(run.batches, run.accelerator, range(options.num_steps), num_parts=run.updates.num_parts)
    run.model.train()
    for step in range(1, options.num_steps + 1):
        _, norm = script.training_step(run, stream)
        found["norms"].append(float(norm))
        for average in averages.values():
            average.step(parameters)
        if step in MARKS or step == options.num_steps:
            found["weights"][str(step)] = flat(parameters).clone()
    return found | {"averages": {str(decay): flat(own.shadow_params).clone() for decay, own in averages.items()}}


def network_with(weights: Tensor) -> nn.Module:
    """The digits' network with these weights, as `flat` lays them out."""
    script = training_script()
    unet: Any = build_network(script.parse([]), (1, 8, 8))
    nn.utils.vector_to_parameters(weights, unet.parameters())
    return unet.eval()


def held_out_losses(lab: Lab, weights: Tensor) -> np.ndarray:
    """L_simple of each held-out image, over 20 draws of t and ε that are the same for every network: [N]."""
    unet, diffusion, x_start = network_with(weights), lab.diffusion(), lab.images("test").float()
    generator, losses = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for draw in range(NUM_DRAWS):
            part = diffusion.num_timesteps // NUM_DRAWS
            t = draw * part + torch.randint(part, (len(x_start),), generator=generator)
            noise = torch.randn(x_start.shape, generator=generator)
            x_t = diffusion.q_sample(x_start, t, noise)
            losses.append(simple_loss(diffusion, unet(x_t, t).sample, x_start, x_t, t, noise).double())
    return torch.stack(losses).mean(dim=0).numpy()


def baseline(lab: Lab, seed: int) -> dict[str, Any]:
    return short_run(lab, f"seed{seed}", {"seed": seed, "num_steps": NUM_STEPS})


# ---- chaos ---------------------------------------------------------------------------------------------------------


def chaos(lab: Lab) -> dict[str, Any]:
    """Two runs of one seed that add the same gradients in another order: distance of weights, losses, samples."""
    rows: list[dict[str, float]] = []
    apart: dict[str, list[float]] = {str(mark): [] for mark in MARKS}
    for seed in SEEDS:
        one = baseline(lab, seed)
        options = {"seed": seed, "num_steps": NUM_STEPS, "gradient_accumulation_steps": 2}
        other = short_run(lab, f"seed{seed}-two-parts", options)
        for mark, distance in apart.items():
            a, b = one["weights"][mark], other["weights"][mark]
            distance.append(float((a - b).norm() / a.norm()))
        ends = [run["weights"][str(NUM_STEPS)] for run in (one, other)]
        losses = [held_out_losses(lab, weights).mean() for weights in ends]
        images = [drawn_by(lab, network_with(weights)) for weights in ends]
        rows.append(
            {
                "loss": abs(losses[1] / losses[0] - 1),
                "samples": float((images[1] - images[0]).square().mean().sqrt()),
                "doublings": growth(apart, len(rows)),
            }
        )
    found = {name: estimate([row[name] for row in rows]) for name in ("loss", "samples")}
    found["tenfold_every"] = estimate([row["doublings"] for row in rows])
    return found | {"weights": {mark: estimate(own) for mark, own in apart.items()}}


def growth(apart: Mapping[str, list[float]], run: int) -> float:
    """In how many steps the distance grows tenfold: the line through its logarithm from step 50 to 200."""
    marks = [mark for mark in MARKS if 50 <= mark <= 200]
    slope = np.polyfit(marks, [np.log10(apart[str(mark)][run]) for mark in marks], 1)[0]
    return float(1 / slope)


def drawn_by(lab: Lab, unet: Any, count: int = 64) -> Tensor:
    pipe = DDPMPaperPipeline(unet, lab.scheduler())
    pipe.set_progress_bar_config(disable=True)
    shape = pipe.sample_shape
    x_T = torch.stack([torch.randn(shape, generator=own) for own in seeded_generators(range(count))])
    return end_of(pipe, x_T, pipe.own_scheduler(50))


# ---- clipping and averaging ----------------------------------------------------------------------------------------


def gradient_clipping(lab: Lab) -> dict[str, Any]:
    """Held-out L_simple with the gradient clipped to other norms than 1, over that with 1; and how often 1 clips."""
    found: dict[str, Any] = {}
    plain = [held_out_losses(lab, baseline(lab, seed)["averages"]["0.98"]).mean() for seed in SEEDS]
    for limit in (1e-3, 1e-6):
        ratios = []
        for seed, reference in zip(SEEDS, plain, strict=True):
            options = {"seed": seed, "num_steps": NUM_STEPS, "max_grad_norm": limit}
            run = short_run(lab, f"seed{seed}-clip{limit:g}", options)
            ratios.append(held_out_losses(lab, run["averages"]["0.98"]).mean() / reference)
        found[f"ratio_{limit:g}"] = estimate(ratios)
    norms = np.array([baseline(lab, seed)["norms"] for seed in SEEDS])
    lab.pipes  # noqa: B018  the second training, whose log is read below
    lines = (lab.work / "second" / "metrics.jsonl").read_text().splitlines()
    whole = np.array([line["grad_norm"] for line in map(json.loads, lines) if "grad_norm" in line])
    found["steps_of_whole_run"] = len(whole)
    found["clipped_in_warmup"] = int((whole[:WARMUP_STEPS] > 1).sum())
    found["clipped_after"] = int((whole[WARMUP_STEPS:] > 1).sum())
    found["largest_after"] = float(whole[WARMUP_STEPS:].max())
    found["median_after"] = float(np.median(whole[WARMUP_STEPS:]))
    found["short_clipped_after"] = int((norms[:, WARMUP_STEPS:] > 1).sum())
    found["parameters"] = len(baseline(lab, 0)["start"])
    return found


def averaging(lab: Lab) -> dict[str, Any]:
    """Held-out L_simple after 300 steps by averaged weights over that by raw ones, and how far 0.9999 has moved."""
    found: dict[str, Any] = {}
    raw = [held_out_losses(lab, baseline(lab, seed)["weights"][str(NUM_STEPS)]).mean() for seed in SEEDS]
    found["raw"] = estimate(raw)
    for decay in map(str, DECAYS):
        losses = [held_out_losses(lab, baseline(lab, seed)["averages"][decay]).mean() for seed in SEEDS]
        found[f"ratio_{decay}"] = estimate(np.divide(losses, raw))
        found[f"loss_{decay}"] = estimate(losses)
    moved = []
    for seed in SEEDS:
        run = baseline(lab, seed)
        last = run["weights"][str(NUM_STEPS)]
        moved.append(float((run["averages"]["0.9999"] - run["start"]).norm() / (last - run["start"]).norm()))
    return found | {"moved_0.9999": estimate(moved)}


# ---- memorising ----------------------------------------------------------------------------------------------------

NUM_MEMORISED, MEMORISING_STEPS, NUM_OTHERS = 16, 2000, 64


def memorising(lab: Lab) -> dict[str, Any]:
    """Networks that were trained on sixteen images: bound and L_simple of these and of held-out ones."""
    diffusion, samples = lab.diffusion(variance_type="fixed_large"), lab.splits["train"]
    weights = bound_weights(diffusion)
    found: dict[str, Any] = {"weight_at_1_over_500": float(weights[1] / weights[500])}
    others = lab.images("test", NUM_OTHERS)
    for first in (0, NUM_MEMORISED):
        few = replace(samples, array=samples.array[first : first + NUM_MEMORISED])
        options = {"seed": 0, "num_steps": MEMORISING_STEPS, "global_batch_size": NUM_MEMORISED}
        run = short_run(lab, f"sixteen-from-{first}", options, few)
        unet = network_with(run["averages"]["0.995"])
        own: dict[str, Any] = {}
        for kind, x_start in (
            ("own", to_model_range(few.batch(range(NUM_MEMORISED)), few.num_levels).double()),
            ("others", others),
        ):
            label = f"answers-sixteen-from-{first}-{kind}.safetensors"
            answers = Answers(x_start, lab.kept(label, lambda x=x_start, u=unet: ask(u, lab.diffusion(), x)))
            own[kind] = both_measures(answers, diffusion)
        found[f"from_{first}"] = own
    usual = lab.answers(FIRST, "test")
    found["usual"] = both_measures(Answers(usual.x_start[:NUM_OTHERS], usual.outputs[:, :NUM_OTHERS]), diffusion)
    return found


def bound_weights(diffusion: GaussianDiffusion) -> np.ndarray:
    """The weight of ‖ε − ε̂‖² in the bound's term at t, which L_simple drops (Eq. 12): [T]; t = 0 has none."""
    error_of_x_start = (1 - diffusion.alphas_cumprod) / diffusion.alphas_cumprod
    return diffusion.posterior_mean_coef1**2 * error_of_x_start / (2 * np.exp(diffusion.model_log_variance))


def both_measures(answers: Answers, diffusion: Any) -> dict[str, Any]:
    total = prior_bpd(diffusion, answers.x_start) + bound_terms(answers, diffusion).sum(dim=1)
    losses = np.mean([losses_at(answers, diffusion, t) for t in range(diffusion.num_timesteps)], axis=0)
    return {"bound": estimate(total), "l_simple": estimate(losses)}


# ---- dealing out ---------------------------------------------------------------------------------------------------

DEALT = {"2 parts": ((1, 2), (2, 1)), "4 parts": ((1, 4), (2, 2), (4, 1))}  # processes, parts of each
DEALT_STEPS = 20


def dealing_out(lab: Lab) -> dict[str, Any]:
    """Weights, averages and Adam's state of runs that deal the parts of a batch out to processes in all ways."""
    found: dict[str, Any] = {"steps": DEALT_STEPS}
    for label, ways in DEALT.items():
        states = [dealt(lab, *way) for way in ways]
        pairs = list(itertools.combinations(range(len(ways)), 2))
        found[label] = {
            "ways": len(ways),
            "different": len({tuple(sorted((name, digest(x)) for name, x in state.items())) for state in states}),
            "tensors": len(states[0]),
            "largest_difference": max(difference(states[i], states[j]) for i, j in pairs),
        }
    return found


def digest(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest difference of a weight."""
    names = [name for name in first if name.startswith("model.")]
    return max(float((first[name] - second[name]).abs().max()) for name in names)


def dealt(lab: Lab, processes: int, parts: int) -> dict[str, Tensor]:
    """Everything that a run of 20 steps ends with, by file and name."""
    output = lab.work / f"dealt-{processes}-{parts}"
    state = output / "checkpoints" / f"step-{DEALT_STEPS}" / "train_state"
    if not state.exists():
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        if processes > 1:
            launcher += ["--master_port", "0", "--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"]
        options = {"output_dir": output, "num_steps": DEALT_STEPS, "gradient_accumulation_steps": parts}
        train([f"--{name}={value}" for name, value in options.items()], lab.work / f"{output.name}.log", launcher)
    files = sorted(Path(state).glob("*.safetensors"))
    return {f"{path.stem}.{name}": tensor for path in files for name, tensor in load_file(path).items()}
