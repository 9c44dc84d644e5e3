"""What surprises about drawing: clipping, widths, what becomes of an error, and encoding by DDIM."""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from digits_quality import classifiers, gaussian_of, seed_ranges
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

from ddpm_hf import DDPMPaperPipeline, GaussianDiffusion
from ddpm_hf.evaluation.frechet import Gaussian, distance_of_gaussians
from ddpm_hf.oracle import GaussianMixture, OracleNetwork
from ddpm_hf.pictures import as_pictures, labelled_grid
from ddpm_hf.pipeline_ddpm_paper import seeded_generators

from .lab import FIRST, SECOND, YOUNG, Lab, bound, end_of, estimate
from .training import YOUNG_STEPS, baseline, network_with

COMPONENTS = (5, 10, 20, 40)
STEPS, MANY_STEPS = (10, 50), 250
ORACLE = "oracle"


@lru_cache
def real_in(num_components: int) -> tuple[PCA, Gaussian]:
    """Principal components of all real digits, and the Gaussian of these digits in them."""
    real = load_digits().data
    pca = PCA(num_components, svd_solver="full").fit(real)
    return pca, gaussian_of(pca.transform(real))


def distances(ranges: Sequence[np.ndarray], num_components: int = 20) -> np.ndarray:
    """The Fréchet distance of each range of samples to all real digits."""
    pca, real = real_in(num_components)
    return np.array([distance_of_gaussians(gaussian_of(pca.transform(images)), real) for images in ranges])


def clipping(lab: Lab) -> dict[str, Any]:
    """With x̂_0 unclipped less with it clipped: the bound, paired by image, and the distance, paired by seeds."""
    diffusion = lab.diffusion(variance_type="fixed_large")
    lab.add(YOUNG, network_with(baseline(lab, 0)["weights"][str(YOUNG_STEPS)]))
    found: dict[str, Any] = {"young_steps": YOUNG_STEPS}
    for name in (FIRST, SECOND, YOUNG):
        own: dict[str, Any] = {}
        if name != YOUNG:
            answers = lab.answers(name, "test")
            own["bound"] = estimate(bound(answers, diffusion, clip=False) - bound(answers, diffusion))
        for steps in (*STEPS, MANY_STEPS) if name == FIRST else STEPS:
            ranges = [lab.samples(name, steps, clip_sample=clip) for clip in (True, False)]
            clipped, free = map(distances, ranges)
            own |= {f"clipped_{steps}": estimate(clipped), f"free_less_clipped_{steps}": estimate(free - clipped)}
            spread = [[spread_of(images) for images in own_ranges] for own_ranges in ranges]
            own |= {
                f"spread_clipped_{steps}": estimate(spread[0]),
                f"spread_free_less_clipped_{steps}": difference(*spread),
            }
            sure = [[classifiers()[0].sure_of(images) for images in own_ranges] for own_ranges in ranges]
            own |= {f"sure_clipped_{steps}": estimate(sure[0]), f"sure_free_less_clipped_{steps}": difference(*sure)}
        found[name] = own
    return found


def spread_of(images: np.ndarray) -> float:
    """The variance of images [N, 64], summed over pixels, over that of all real digits."""
    return float(images.var(axis=0).sum() / load_digits().data.var(axis=0).sum())


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """The second less the first, paired."""
    return estimate(np.subtract(second, first))


def widths(lab: Lab) -> dict[str, Any]:
    """The distance with fixed_small less that with fixed_large, by steps and by the number of components.

    And by groups of components, how much too widely the samples spread: their deviation less that of real digits.
    """
    found: dict[str, Any] = {}
    for steps in STEPS:
        gaps: dict[int, list[float]] = {number: [] for number in COMPONENTS}
        for name in (FIRST, SECOND):
            kinds = {"fixed_small": {"variance_type": "fixed_small"}, "fixed_large": {"clip_sample": True}}
            ranges = {kind: lab.samples(name, steps, **changes) for kind, changes in kinds.items()}
            own: dict[str, Any] = {kind: excess_deviations(images) for kind, images in ranges.items()}
            for number in COMPONENTS:
                gap = distances(ranges["fixed_small"], number) - distances(ranges["fixed_large"], number)
                own[f"small_less_large_{number}"] = estimate(gap)
                gaps[number] += gap.tolist()
            found.setdefault(name, {})[str(steps)] = own
        found.setdefault("both", {})[str(steps)] = {str(number): estimate(gap) for number, gap in gaps.items()}
    return found


def excess_deviations(ranges: Sequence[np.ndarray]) -> dict[str, dict[str, float]]:
    """By the last component of a group, the mean deviation of samples in its components less that of real digits."""
    pca = real_in(max(COMPONENTS))[0]
    real = pca.transform(load_digits().data).std(axis=0)
    excess = [pca.transform(images).std(axis=0) - real for images in ranges]
    groups = zip((0, *COMPONENTS), COMPONENTS, strict=False)
    return {str(last): estimate([row[first:last].mean() for row in excess]) for first, last in groups}


# ---- what becomes of an error --------------------------------------------------------------------------------------

TIMES = (980, 900, 740, 500, 260, 100, 20)
NUM_CHAINS, NUM_LONG_CHAINS = 96, 24  # in 50 steps, and in more


def gains(pipe: DDPMPaperPipeline, steps: int, x_start: Tensor) -> dict[str, dict[str, float]]:
    """By t, how long the difference in x_0 is that a push of x_t by length 1 in a random direction leaves."""
    found = {}
    diffusion = GaussianDiffusion(pipe.scheduler.betas.double().numpy())
    for t in TIMES:
        generator = torch.Generator().manual_seed(t)
        noise, push = (torch.randn(x_start.shape, generator=generator).double() for _ in range(2))
        push /= push.flatten(1).norm(dim=1).view(-1, *(1,) * (x_start.ndim - 1))
        x_t = diffusion.q_sample(x_start, t, noise)
        ends = [end_of(pipe, x.float(), pipe.own_scheduler(steps), from_timestep=t) for x in (x_t, x_t + push)]
        found[str(t)] = estimate((ends[1] - ends[0]).flatten(1).norm(dim=1))
    return found


@lru_cache
def digits_oracle(scheduler: Any) -> OracleNetwork:
    """The exact ε of ten Gaussians, one fitted to each class of the real digits, widened by the rounding of levels."""
    images, labels = load_digits(return_X_y=True)
    classes = [torch.from_numpy(images[labels == digit] / 8 - 1) for digit in range(10)]
    rounding = torch.eye(64, dtype=torch.float64) / (12 * 8**2)
    mixture = GaussianMixture(
        torch.tensor([len(own) / len(images) for own in classes], dtype=torch.float64),
        torch.stack([own.mean(dim=0) for own in classes]),
        torch.stack([own.T.cov() + rounding for own in classes]),
    )
    return OracleNetwork(mixture, scheduler.diffusion)


def oracle_pipe(lab: Lab) -> DDPMPaperPipeline:
    scheduler = lab.scheduler(clip_sample=False)
    unet: Any = digits_oracle(scheduler)
    pipe = DDPMPaperPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_ddim(pipe: DDPMPaperPipeline) -> DDPMPaperPipeline:
    config = {**pipe.scheduler.config, "clip_sample": False}
    other = DDPMPaperPipeline(pipe.unet, DDIMScheduler.from_config(config))
    other.set_progress_bar_config(disable=True)
    return other


def contraction(lab: Lab) -> dict[str, Any]:
    """Gains by t of ancestral sampling and of DDIM, of both networks and of an exact one."""
    images = lab.images("test", NUM_CHAINS)
    found: dict[str, Any] = {}
    for name, pipe in {**lab.fast, ORACLE: oracle_pipe(lab)}.items():
        x_start = images.flatten(1) if name == ORACLE else images
        ways = {"ancestral_50": (pipe, 50, x_start), "ddim_50": (with_ddim(pipe), 50, x_start)}
        if name == FIRST:
            ways["ancestral_1000"] = pipe, 1000, x_start[:NUM_LONG_CHAINS]
        found[name] = {way: gains(*arguments) for way, arguments in ways.items()}
    return found


def correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of each image of two sets, [N, 64], beyond the mean real digit."""
    mean = load_digits().data.mean(axis=0)
    a, b = (images - mean for images in (first, second))
    return (a * b).sum(axis=1) / np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))


def twins(lab: Lab) -> dict[str, Any]:
    """Correlation of what two networks draw of the same seeds, beside that of different seeds."""
    found: dict[str, Any] = {}
    for steps in STEPS:
        one, other = (np.concatenate(lab.samples(name, steps, clip_sample=True)) for name in (FIRST, SECOND))
        found[f"same_{steps}"] = estimate(correlations(one, other))
        found[f"different_{steps}"] = estimate(correlations(one, np.roll(other, 1, axis=0)))
    generators = seeded_generators(range(256))
    x_T = randn_tensor((256, 1, 8, 8), generator=generators)
    one, other = (
        (end_of(pipe, x_T, pipe.own_scheduler(50)).flatten(1).numpy() + 1) * 8
        for pipe in map(with_ddim, (lab.fast[FIRST], lab.fast[SECOND]))
    )
    found["same_ddim_50"] = estimate(correlations(one, other))
    return found


def twins_picture(lab: Lab, count: int = 12) -> Image.Image:
    """What the three networks draw of the same seeds in 50 steps."""
    rows, names = [], (FIRST, SECOND, YOUNG)
    for name in names:
        images = lab.samples(name, 50, clip_sample=True)[0][:count] / 16
        rows.append(as_pictures(torch.from_numpy(images).float().view(count, 1, 8, 8)))
    seeds = [str(seed) for seed in seed_ranges(1, count)[0]]
    return labelled_grid(rows, row_labels=names, column_labels=seeds)


def rounded_state(lab: Lab) -> dict[str, Any]:
    """How far x_0 is off, root mean square, where x_t is rounded to bfloat16 after every step; by number of steps."""
    found: dict[str, Any] = {}
    for name, steps_tried in ((FIRST, (10, 50, 250, 1000)), (SECOND, (10, 50, 250))):
        pipe = lab.fast[name]
        for steps in steps_tried:
            ends = []
            for keep in (lambda x: x, lambda x: x.bfloat16().float()):
                generators = seeded_generators(range(NUM_LONG_CHAINS))
                x = keep(randn_tensor((NUM_LONG_CHAINS, 1, 8, 8), generator=generators))
                chain = pipe.reverse_process(x, generator=generators, scheduler=pipe.own_scheduler(steps))
                for step in chain:
                    step.x = x = keep(step.x)
                ends.append(x)
            off = (ends[1] - ends[0]).flatten(1).square().mean(dim=1)
            found.setdefault(name, {})[str(steps)] = root_of(estimate(off))
    return found


def root_of(square: dict[str, float]) -> dict[str, float]:
    value = square["value"] ** 0.5
    return {"value": value, "error": square["error"] / (2 * value)}


# ---- encoding ------------------------------------------------------------------------------------------------------

ENCODING_STEPS = (10, 50, 250, 1000)
FLAT = 0.05  # the most that a pixel which hardly changes deviates, on [−1, 1]


def encode(eps_of: Callable[[Tensor, int], Tensor], diffusion: GaussianDiffusion, x: Tensor, steps: int) -> Tensor:
    """DDIM backwards: from x_0 up to the highest t of a chain of so many steps."""
    times = np.arange(steps) * (diffusion.num_timesteps // steps)
    for t, following in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        eps = eps_of(x, t)
        x = diffusion.q_sample(diffusion.predict_x_start(eps, x, t), following, eps)
    return x


def encoding(lab: Lab) -> dict[str, Any]:
    """Root mean square of what 64 held-out digits are encoded to, of all pixels and of flat ones."""
    images, diffusion = lab.images("test", 64), lab.diffusion()
    flat = lab.images("train").std(dim=0).flatten() < FLAT
    found: dict[str, Any] = {"num_flat": int(flat.sum())}
    pipes = {**lab.fast, ORACLE: oracle_pipe(lab)}
    for name, pipe in pipes.items():
        unet: Any = pipe.unet
        x_start = images.flatten(1) if name == ORACLE else images

        def eps_of(x: Tensor, t: int, unet: Any = unet) -> Tensor:
            with torch.no_grad():
                return unet(x.float(), torch.full((len(x),), t)).sample.double()

        for steps in ENCODING_STEPS if name != SECOND else ENCODING_STEPS[:-1]:
            end = encode(eps_of, diffusion, copy.copy(x_start), steps).flatten(1)
            found.setdefault(name, {})[str(steps)] = {
                "all": root_of(estimate(end.square().mean(dim=1))),
                "flat": root_of(estimate(end[:, flat].square().mean(dim=1))),
                "others": root_of(estimate(end[:, ~flat].square().mean(dim=1))),
            }
    return found
