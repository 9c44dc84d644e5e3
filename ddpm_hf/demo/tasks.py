"""What the demo page computes: checkpoints, images that were dropped, and what is drawn of them.

Nothing here knows of the page. t is the paper's, from 1 to T, and t = 0 is x_0, unless a docstring says otherwise.
After each evaluation of the network, `report` is called with the fraction of the work that is done; what it raises
ends the work.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from .. import figures, pictures
from ..data import FORMATS, decode_image, to_model_range
from ..likelihood import bits_per_dim, subset_edges
from ..pipeline_ddpm_paper import seeded_generators
from ..pipeline_loading import DDPMPaperPipeline
from ..sampling import reverse_process
from ..scheduler import whole_process
from .models import Model

MAX_FILE_BYTES = 20 * 2**20
NUM_FRAMES = 25  # of the denoising, without its end
SHOWN_SEEDS = 16  # how many of the seeds a frame shows
WEIGHTS = [i / 8 for i in range(9)]
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}

Report = Callable[[float], None]


# ---- what the page computes ----------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """One moment of the denoising: t, and a grid each of x_t and x̂_0(x_t, t)."""

    t: int
    x_t: Image.Image
    x_start: Image.Image


class Samples(NamedTuple):
    """A grid of one image per seed, and the way there, of the first seeds, t descending to 0."""

    grid: Image.Image
    frames: list[Frame]


class Reconstruction(NamedTuple):
    """x_0 and x_t of one seed's noise, and x_0 ∼ p_θ(x_0 | x_t) by seed, all enlarged; t as it was taken."""

    t: int
    original: Image.Image
    x_t: list[Image.Image]
    denoised: list[Image.Image]


class Bound(NamedTuple):
    """The bound of one image in bits/dim, each term an estimate from one draw of the noise.

    terms: by t from 1 to T, [T]; the paper's L_{t−1}. NaN where t was not drawn.
    """

    total: float
    prior: float
    kl: float
    decoder: float
    terms: np.ndarray


def _counted(report: Report, total: int) -> Callable[..., None]:
    """Reports 1/total, 2/total, … of the work, each time that it is called."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        report(min(done / total, 1.0))

    return count


def sample(
    model: Model,
    *,
    seeds: Sequence[int],
    steps: int,
    scheduler: str | None,
    report: Report,
    scheduler_options: Mapping[str, Any] | None = None,
    label: str | None = None,
    guidance: float = 1.0,
) -> Samples:
    """Algorithm 2, or another sampler of the same process: `scheduler` is a class of diffusers, None the model's own.

    `scheduler_options` are of `DDPMPaperPipeline.own_scheduler`, such as DDIM's `use_clipped_model_output`.
    `label` is one of `model.classes`, None where it has none; without a label nothing is guided. Raises ValueError for
    what the pipeline refuses.
    """
    own = model.pipe.scheduler
    chosen = getattr(diffusers, scheduler).from_config(own.config) if scheduler else own
    number = model.classes[label] if label is not None else None
    guided: Any = {"class_labels": number, "guidance_scale": 1.0 if number is None else guidance}
    pipe = DDPMPaperPipeline(model.pipe.unet, chosen)
    pipe.set_progress_bar_config(disable=True)
    chain = pipe.own_scheduler(steps, **(scheduler_options or {}))
    noise, generators = figures.initial_noise(pipe, seeds)
    diffusion, total = model.process.diffusion, len(chain.timesteps)
    shown = {i * total // NUM_FRAMES for i in range(NUM_FRAMES)}
    frames, x = [], noise * chain.init_noise_sigma
    for i, step in enumerate(pipe.reverse_process(x, generator=generators, scheduler=chain, **guided)):
        if i in shown:
            t = min(max(round(float(step.t)), 0), diffusion.num_timesteps - 1)  # some samplers' are fractions
            x_t = step.x_t[:SHOWN_SEEDS]
            x_start = diffusion.predict_x_start(step.model_output[:SHOWN_SEEDS], x_t, t)
            frames.append(Frame(t + 1, *(_grid(figures.unit_range(image).cpu()) for image in (x_t, x_start))))
        x = step.x
        report((i + 1) / total)
    images = figures.unit_range(x).cpu()
    end = _grid(images[:SHOWN_SEEDS])
    return Samples(_grid(images, min_side=96, side=384), [*frames, Frame(0, end, end)])


def interpolate(
    model: Model, *, ends: tuple[int, int], t: int, steps: int, noise_seed: int, report: Report
) -> tuple[int, list[Image.Image], list[Image.Image]]:
    """Samples of two seeds, and `figures.interpolation` between them at nine weights (Fig. 8).

    Returns t as it was taken, the nearest of the chain; the two samples; the nine images. Raises ValueError.
    """
    timestep, remaining = nearest_timestep(model, t, steps)
    count = _counted(report, steps + remaining)
    x_start: Any = model.pipe(
        seeds=ends,
        num_inference_steps=steps,
        output_type="latent",
        return_dict=False,
        callback_on_step_end=lambda pipe, i, t, tensors: count() or tensors,
    )[0]
    between = figures.interpolation(
        model.pipe,
        *x_start.clamp(-1, 1),
        t=timestep,
        weights=WEIGHTS,
        seeds=[noise_seed],
        num_inference_steps=steps,
        on_step=count,
    )
    return timestep + 1, enlarged(figures.unit_range(x_start)), enlarged(between[0])


def noise_and_back(
    model: Model, levels: Tensor, *, t: int, steps: int, seeds: Sequence[int], report: Report
) -> Reconstruction:
    """An image, as `fitted` returns it, diffused to t (Eq. 4) and denoised from there, with the noise of each seed."""
    x_start = to_model_range(levels, model.num_levels)
    timestep, remaining = nearest_timestep(model, t, steps)
    generators = seeded_generators(seeds)
    x = x_start.expand(len(seeds), *x_start.shape)
    noise = randn_tensor(tuple(x.shape), generator=generators, dtype=torch.float32)
    x_t = x = model.process.diffusion.q_sample(x, timestep, noise)
    count = _counted(report, remaining)
    for step in reverse_process(
        model.pipe, x_t, generators=generators, from_timestep=timestep, num_inference_steps=steps
    ):
        x = step.x
        count()
    original, noisy, denoised = (enlarged(figures.unit_range(part)) for part in (x_start[None], x_t, x))
    return Reconstruction(timestep + 1, original[0], noisy, denoised)


def nearest_timestep(model: Model, t: int, steps: int) -> tuple[int, int]:
    """The 0-based timestep of the chain of `steps` nearest to the paper's t, and the reverse steps from there.

    t = 0 is −1, x_0 itself. Raises ValueError.
    """
    (timestep,) = figures.chain_timesteps(model.pipe, (t / model.num_timesteps,), num_inference_steps=steps)
    return timestep, int((model.process.chain(steps).timesteps <= timestep).sum())


def bound(model: Model, levels: Tensor, *, one_in: int, seed: int, report: Report) -> Bound:
    """The bound on −log₂ p(x_0) / dim of an image (Eq. 5), from L_0 and one in `one_in` of the other terms.

    The image is as `fitted` returns it. Raises ValueError.
    """
    scheduler = whole_process(model.pipe)
    total = scheduler.chain().num_timesteps
    count = min(total, 1 + max(1, total // one_in))
    batch_size = max(1, min(64, count // 20))  # small enough for the work to be watched
    terms = bits_per_dim(
        model.pipe.unet,
        scheduler,
        to_model_range(levels, model.num_levels)[None],
        seed=seed,
        clip_denoised=scheduler.clip_denoised(),
        num_levels=model.num_levels,
        num_timesteps_subset=count,
        batch_size=batch_size,
        on_progress=_counted(report, -(-count // batch_size)),
    )
    drawn = terms.terms_bt[0].numpy()
    prior, kl, decoder = float(terms.prior_b[0]), float(drawn[1:].sum()), float(drawn[0])
    weights = np.diff(edges := subset_edges(total, count)).repeat(np.diff(edges))  # of a drawn term
    shown = np.where(drawn == 0, np.nan, drawn / weights)
    return Bound(prior + kl + decoder, prior, kl, decoder, shown)


def _grid(images: Tensor, *, min_side: int = 64, side: int = 256) -> Image.Image:
    """Each image enlarged to `min_side` pixels, few of them to more, so that the grid comes to `side`."""
    columns = math.ceil(math.sqrt(len(images)))
    return pictures.image_grid(pictures.as_pictures(images), min_side=max(min_side, side // columns))


def enlarged(images: Tensor) -> list[Image.Image]:
    """Each image by itself, enlarged to at least 128 pixels."""
    return [pictures.image_grid([picture], min_side=128) for picture in pictures.as_pictures(images)]


# ---- what visitors type and drop -----------------------------------------------------------------------------------


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A number from the page. Raises ValueError unless it is whole and in [least, most]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value != value // 1
        or not least <= value <= most
    ):
        raise ValueError(f"{name}: give a whole number from {least} to {most}")
    return int(value)


def number(name: str, value: Any, least: float, most: float) -> float:
    """A number from the page. Raises ValueError unless it is in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name}: give a number from {least} to {most}")
    return float(value)


def chosen_class(model: Model, label: Any) -> str | None:
    """A class from the page, None of a model without. Raises ValueError for another model's."""
    if not model.classes:
        return None
    if label not in model.classes:
        raise ValueError("Class: choose one of this checkpoint's")
    return label


def seeds_in(text: str, parse_seeds: Callable[[str], list[int]], at_most: int) -> list[int]:
    """'0-15,20' → [0, 1, …, 15, 20]. Raises ValueError."""
    seeds: list[int] = []
    for part in text.split(","):  # one by one, so that a long text cannot name millions
        try:
            seeds += parse_seeds(part[:100])
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"Seeds: {error}") from None
        if len(seeds) > at_most:
            raise ValueError(f"Seeds: give at most {at_most}")
    return seeds


def fitted(model: Model, path: str | None, background: str) -> Tensor:
    """The dropped image as the model's data are: uint8 levels [C, H, W], the largest centred square, scaled.

    Colour becomes grey by its luma (ITU-R 601-2) where the model draws grey, grey becomes three equal channels where
    it draws colour. Raises ValueError for what is no image, damaged or too large.
    """
    if path is None or not Path(path).is_file():
        raise ValueError("Drop an image first, or choose a file")
    if Path(path).stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"The file is larger than {MAX_FILE_BYTES // 2**20} MB; shrink it")
    channels, height, width = model.pipe.sample_shape
    if height != width:
        raise ValueError(f"This model draws {width} x {height}; only squares are cut out of images here")
    try:
        pixels = decode_image(path, background=BACKGROUNDS[background], resolution=width)
    except ValueError as error:
        raise ValueError(f"The file cannot be used: {error}") from None
    if channels == 1 and len(pixels) == 3:
        pixels = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L"))[None]
    levels = np.round(pixels * ((model.num_levels - 1) / 255)).astype(np.uint8)
    return torch.from_numpy(np.broadcast_to(levels, (channels, height, width)).copy())


def is_animated(path: str) -> bool:
    """Whether an image file has more than one frame."""
    with Image.open(path, formats=tuple(FORMATS)) as image:
        return getattr(image, "is_animated", False)
