"""The subcommand `ddpm-hf draw`: what the paper draws, one function per kind, in the order of `draw_arguments`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import figures, likelihood, pictures
from ..data import Samples, is_image_folder, real_samples, to_model_range
from ..hub import load_model
from ..pipeline_loading import DDPMPaperPipeline
from ..scheduler import whole_process
from .classes import ALL, chosen_classes, require_unlabelled, shown_classes
from .shared_options import weights_options

WEIGHTS = [i / 10 for i in range(11)]  # λ of the interpolations, as in the paper's Figures 8 and 9
NUM_NEAREST = 8
NUM_FRAMES = 50  # of an animation


def draw(args: argparse.Namespace) -> None:
    """One picture of a checkpoint, or an animation, in a file."""
    output = Path(args.output)
    suffixes = (".png", ".gif") if args.kind in ("progressive", "classes") else (".png",)
    if output.suffix.lower() not in suffixes:
        raise ValueError(f"--output {output}: give a {' or a '.join(suffixes)}")
    pipe = load_model(args.checkpoint, None, **weights_options(args))[0].to(args.device)
    draws, wanted = ("points" if about else "images" for about in (len(pipe.sample_shape) == 1, args.kind == "points"))
    if draws != wanted:
        raise ValueError(f"draw {args.kind} is for {wanted}; {args.checkpoint} draws {draws}")
    if args.kind not in ("classes", "guidance"):
        require_unlabelled(pipe, f"draw {args.kind}", "draw classes shows them")
    try:
        drawn = KINDS[args.kind](args, pipe)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; it comes with the extra `train`") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(drawn, list):
        pictures.save_animation(output, drawn)
    else:
        drawn.save(output)
    print(f"{args.kind} in {output}")


# ---- one function per kind -----------------------------------------------------------------------------------------


def progressive(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image | list[Image.Image]:
    """x̂_0 after more and more reverse steps (Figs. 6, 14), one row per seed; of a .gif the frames."""
    total = whole_process(pipe).chain(args.steps).num_timesteps
    animated = Path(args.output).suffix.lower() == ".gif"
    count = NUM_FRAMES if animated else 10
    numbers = sorted({max(1, total * i // count) for i in range(count + 1)})
    frames = figures.progressive_x_start(pipe, seeds=args.seeds, after_steps=numbers, num_inference_steps=args.steps)
    if not animated:
        return _grid(frames.transpose(0, 1), _seed_labels(args.seeds), [str(n) for n in numbers], "steps")
    grids = [pictures.image_grid(pictures.as_pictures(frame)) for frame in frames]
    return [pictures.captioned(grid, f"{n} of {total} steps") for grid, n in zip(grids, numbers, strict=True)]


def shared(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image:
    """x_t of the first seed's chain at four t, and what each other seed makes of it (Fig. 7); one row per t."""
    timesteps = figures.chain_timesteps(pipe, (1, 0.75, 0.5, 0.25), num_inference_steps=args.steps)
    first, *others = args.seeds
    latents = figures.shared_latents(
        pipe, seed=first, seeds=others, timesteps=timesteps, num_inference_steps=args.steps
    )
    images = torch.cat([latents.x_t[:, None], latents.samples], dim=1)
    return _grid(images, _step_labels(timesteps), ["x_t", *_seed_labels(others)])


def classes(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image | list[Image.Image]:
    """Samples of each class, one row each, from the same noise in each column; of a .gif x_t on its way there."""
    labels = chosen_classes(pipe, args.classes or [ALL])
    options = {"seeds": args.seeds, "guidance_scale": args.guidance_scale, "num_inference_steps": args.steps}
    if Path(args.output).suffix.lower() == ".gif":
        total = whole_process(pipe).chain(args.steps).num_timesteps
        frames = figures.process_by_class(pipe, labels, num_frames=NUM_FRAMES, **options)
        return [_frame(x_t, f"{number} of {total} steps") for number, x_t in frames]
    return _grid(figures.by_class(pipe, labels, **options), shown_classes(pipe, labels), _seed_labels(args.seeds))


def _frame(x_t: Tensor, caption: str) -> Image.Image:
    """x_t [Y, B, C, H, W] with a column for each class, as a film is wider than high."""
    by_seed = pictures.as_pictures(x_t.transpose(0, 1).flatten(0, 1))
    return pictures.captioned(pictures.image_grid(by_seed, columns=len(x_t)), caption)


def guidance(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image:
    """A sample of each class, one row each, at each guidance scale, one column each, all from the same noise."""
    labels = chosen_classes(pipe, args.classes or [ALL])
    columns = [
        figures.by_class(pipe, labels, seeds=[args.seed], guidance_scale=scale, num_inference_steps=args.steps)
        for scale in args.scales
    ]
    scales = [f"s = {scale:g}" for scale in args.scales]
    return _grid(torch.cat(columns, dim=1), shown_classes(pipe, labels), scales)


def interpolate(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image:
    """Interpolations of two real images at t (Fig. 8), one row per seed."""
    sources = _sources(args, pipe)
    total = whole_process(pipe).diffusion.num_timesteps
    if args.timestep is not None and not 0 <= args.timestep < total:
        raise ValueError(f"--timestep {args.timestep} must lie in [0, {total})")
    fraction = 0.5 if args.timestep is None else (args.timestep + 1) / total
    (timestep,) = figures.chain_timesteps(pipe, (fraction,), num_inference_steps=args.steps)
    if args.timestep not in (None, timestep):
        steps = whole_process(pipe).chain(args.steps).num_timesteps
        print(f"--timestep {args.timestep} is not one of this chain's {steps}; {timestep}, the nearest, is taken")
    images = figures.interpolation(
        pipe,
        *sources,
        t=timestep,
        weights=WEIGHTS,
        seeds=args.seeds,
        num_inference_steps=args.steps,
    )
    return _between(args, sources, images, _seed_labels(args.seeds))


def coarse_to_fine(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image:
    """Interpolations of two real images at nine t (Fig. 9), one row per t."""
    sources = _sources(args, pipe)
    timesteps = figures.chain_timesteps(pipe, [i / 8 for i in range(8, -1, -1)], num_inference_steps=args.steps)
    images = figures.coarse_to_fine(
        pipe, *sources, timesteps=timesteps, weights=WEIGHTS, seed=args.seed, num_inference_steps=args.steps
    )
    return _between(args, sources, images, _step_labels(timesteps))


def nearest(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image:
    """Samples, each beside the real images that are nearest to it; which those are is printed."""
    samples = _samples(args, pipe, "train")
    drawn: Any = pipe(seeds=args.seeds, num_inference_steps=args.steps, output_type="pt", return_dict=False)[0]
    k = min(NUM_NEAREST, len(samples))
    found = figures.nearest_images(drawn, samples, k=k)
    neighbours = [to_model_range(samples.batch(row.numpy()), samples.num_levels) for row in found.indices]
    for seed, index, distance in zip(args.seeds, found.indices[:, 0], found.distances[:, 0], strict=True):
        print(f"seed {seed}: nearest is image {index} of {samples.name}, at distance {distance:.3f}")
    images = torch.cat([drawn.cpu()[:, None], figures.unit_range(torch.stack(neighbours))], dim=1)
    return _grid(images, _seed_labels(args.seeds), ["sample", *(str(i) for i in range(1, k + 1))])


def rate_distortion(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image:
    """Rate and distortion over reverse steps, on real images (Fig. 5)."""
    if args.num_images < 1:
        raise ValueError(f"--num_images {args.num_images} must be at least 1")
    samples = _samples(args, pipe, "test")
    images = samples.batch(range(min(args.num_images, len(samples))))
    terms = likelihood.bits_per_dim(
        pipe.unet,
        pipe.scheduler,
        to_model_range(images, samples.num_levels),
        seed=args.seed,
        clip_denoised=whole_process(pipe).clip_denoised(),
        num_levels=samples.num_levels,
        num_inference_steps=args.steps,
        progress=True,
    )
    print(f"{len(images)} images of {samples.name}: {float(terms.total_b.mean()):.3f} bits/dim")
    return pictures.rate_distortion_plot(likelihood.rate_distortion(terms))


def points(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Image.Image:
    """Forward process, reverse process and learned score of a model of points, one point per seed."""
    samples = _samples(args, pipe, "test")
    if len(args.seeds) > len(samples):
        raise ValueError(f"--seeds: got {len(args.seeds)}; {samples.name} has {len(samples)} points")
    timesteps = figures.chain_timesteps(pipe, (0, 0.03, 0.15, 1), num_inference_steps=args.steps)
    data = samples.batch(range(len(args.seeds)))
    process = figures.point_process(pipe, data, seeds=args.seeds, timesteps=timesteps, num_inference_steps=args.steps)
    return pictures.point_process_plot(process)


KINDS = {
    kind.__name__: kind
    for kind in (progressive, shared, classes, guidance, interpolate, coarse_to_fine, nearest, rate_distortion, points)
}


# ---- data and labels -----------------------------------------------------------------------------------------------


def _samples(args: argparse.Namespace, pipe: DDPMPaperPipeline, split: str) -> Samples:
    """The data set that --dataset names, else the digits; without --split `split`, or a folder's only one."""
    dataset = args.dataset or ("digits" if pipe.sample_shape == (1, 8, 8) else None)
    if dataset is None:
        raise ValueError(
            f"--dataset is missing: name data of samples {pipe.sample_shape}, as the network was trained on"
        )
    split = args.split or ("train" if is_image_folder(dataset) else split)
    return real_samples(dataset, split, pipe.sample_shape, skip_bad_images=args.skip_bad_images)


def _sources(args: argparse.Namespace, pipe: DDPMPaperPipeline) -> Tensor:
    """The two images to interpolate between, [2, C, H, W] in [−1, 1]."""
    samples = _samples(args, pipe, "test")
    if not all(0 <= i < len(samples) for i in args.images):
        raise ValueError(f"--images {args.images}: {samples.name} has 0 to {len(samples) - 1}")
    return to_model_range(samples.batch(args.images), samples.num_levels)


def _grid(images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str], corner: str = "") -> Image.Image:
    """Images [R, C, ...] in [0, 1] in rows and columns."""
    rows = [pictures.as_pictures(row) for row in images]
    return pictures.labelled_grid(rows, row_labels=row_labels, column_labels=column_labels, corner=corner)


def _between(args: argparse.Namespace, sources: Tensor, images: Tensor, row_labels: Sequence[str]) -> Image.Image:
    """Interpolations [R, L, C, H, W] between their sources."""
    ends = figures.unit_range(sources).expand(len(images), *sources.shape)
    columns = torch.cat([ends[:, :1], images, ends[:, 1:]], dim=1)
    first, last = (f"no. {i}" for i in args.images)
    return _grid(columns, row_labels, [first, *(str(weight) for weight in WEIGHTS), last])


def _seed_labels(seeds: Sequence[int]) -> list[str]:
    return [f"seed {seed}" for seed in seeds]


def _step_labels(timesteps: Sequence[int]) -> list[str]:
    return [f"{t + 1} steps" for t in timesteps]
