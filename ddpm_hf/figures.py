"""What the paper draws, as tensors; `pictures` makes pictures of them.

Images are [..., C, H, W] in [0, 1] unless a docstring says otherwise; what comes out is on the CPU. Time is 0-based:
t = 0 is the paper's t = 1, and t = −1 stands for x_0 itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .data import Samples, to_model_range
from .pipeline_ddpm_paper import ReverseStep, seeded_generators
from .pipeline_loading import DDPMPaperPipeline
from .sampling import reverse_process
from .scheduler import whole_process
from .unet import evaluation_mode

CHUNK_VALUES = 2**24  # of the training images that are compared at once: 64 MiB in float32


def unit_range(x: Tensor) -> Tensor:
    """Images from about [−1, 1] to [0, 1], clamped: x / 2 + 1/2, as the pipeline returns them."""
    return (x / 2 + 0.5).clamp(0, 1)


def chain_timesteps(
    pipe: DDPMPaperPipeline, fractions: Sequence[float], *, num_inference_steps: int | None = None
) -> list[int]:
    """The chain's timesteps nearest to `fractions` of T, without repeats: of T = 1000, (1, 0.5, 0) are 999, 499, −1.

    `num_inference_steps` names the chain, by default the scheduler's own. Raises ValueError for fractions outside
    [0, 1].
    """
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions={list(fractions)} must lie in [0, 1]")
    scheduler = whole_process(pipe)
    chain = scheduler.chain(num_inference_steps).timesteps.tolist()
    wanted = [fraction * scheduler.diffusion.num_timesteps - 1 for fraction in fractions]
    nearest = [min(chain, key=lambda t, at=at: abs(t - at)) if at > -1 else -1 for at in wanted]
    return list(dict.fromkeys(nearest))


def progressive_x_start(
    pipe: DDPMPaperPipeline,
    *,
    seeds: Sequence[int],
    after_steps: Sequence[int],
    num_inference_steps: int | None = None,
) -> Tensor:
    """x̂_0(x_t, t) along Algorithm 2, after so many reverse steps (Figs. 6, 14): [F, B, C, H, W].

    One frame per entry of `after_steps`, ascending numbers from 1 to the chain's length; the frame after all steps is
    the pipeline's image of the same seeds. Raises ValueError for other numbers.
    """
    _require_images(pipe)
    total = whole_process(pipe).chain(num_inference_steps).num_timesteps
    wanted = list(after_steps)
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 1 or wanted[-1] > total:
        raise ValueError(f"after_steps={wanted} must be ascending numbers of steps in [1, {total}]")
    x_t, generators = initial_noise(pipe, seeds)
    steps = reverse_process(pipe, x_t, generators=generators, num_inference_steps=num_inference_steps)
    frames = []
    for number, step in enumerate(steps, start=1):
        if number in wanted:
            frames.append(unit_range(step.x_start).cpu())
        if number == wanted[-1]:
            break
    return torch.stack(frames)


def by_class(
    pipe: DDPMPaperPipeline,
    class_labels: Sequence[str | int],
    *,
    seeds: Sequence[int],
    guidance_scale: float = 1.0,
    num_inference_steps: int | None = None,
) -> Tensor:
    """Samples of each class from the same seeds, so that columns share their noise: [Y, B, C, H, W]."""
    _require_images(pipe)
    if not len(class_labels):
        raise ValueError("class_labels names no class")
    rows = []
    for label in class_labels:
        options: Any = {"class_labels": label, "guidance_scale": guidance_scale, "seeds": seeds}
        rows += pipe(num_inference_steps=num_inference_steps, output_type="pt", return_dict=False, **options)
    return torch.stack(rows).cpu()


def process_by_class(
    pipe: DDPMPaperPipeline,
    class_labels: Sequence[str | int],
    *,
    seeds: Sequence[int],
    num_frames: int,
    guidance_scale: float = 1.0,
    num_inference_steps: int | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """x_t on its way from noise to the samples of `by_class`: after n reverse steps, n and [Y, B, C, H, W], clamped.

    n goes in even steps from 0, the noise, to the length of the chain, in at most `num_frames` frames.
    """
    _require_images(pipe)
    total = whole_process(pipe).chain(num_inference_steps).num_timesteps
    wanted = {round(total * i / (num_frames - 1)) for i in range(num_frames)}
    x_t, generators = initial_noise(pipe, [*seeds] * len(class_labels))
    steps = reverse_process(
        pipe,
        x_t,
        generators=generators,
        num_inference_steps=num_inference_steps,
        class_labels=[label for label in class_labels for _ in seeds],
        guidance_scale=guidance_scale,
    )
    yield 0, unit_range(x_t).cpu().unflatten(0, (len(class_labels), len(seeds)))
    for number, step in enumerate(steps, start=1):
        if number in wanted:
            yield number, unit_range(step.x).cpu().unflatten(0, (len(class_labels), len(seeds)))


class SharedLatents(NamedTuple):
    """x_t at R timesteps of one chain, clamped for display, [R, C, H, W], and B samples from each, [R, B, C, H, W]."""

    x_t: Tensor
    samples: Tensor


def shared_latents(
    pipe: DDPMPaperPipeline,
    *,
    seed: int,
    seeds: Sequence[int],
    timesteps: Sequence[int],
    num_inference_steps: int | None = None,
) -> SharedLatents:
    """Samples x_0 ∼ p_θ(x_0 | x_t) that share x_t, for several t (Fig. 7).

    Every x_t is taken from one chain, that of the image of `seed`; from there each of `seeds` continues with noise of
    its own, the same at every t. `timesteps` are 0-based and in the chain. Raises ValueError, also for a seed that is
    the chain's: it would draw again the noise that made x_T.
    """
    _require_images(pipe)
    if not len(seeds) or seed in seeds:
        raise ValueError(f"seeds={list(seeds)} must be one or more, and not {seed}, which draws the chain they share")
    chain = whole_process(pipe).chain(num_inference_steps).timesteps.tolist()
    _require_timesteps(timesteps, chain)
    x, generators = initial_noise(pipe, [seed])
    shared = {}
    for step in reverse_process(pipe, x, generators=generators, num_inference_steps=num_inference_steps):
        if step.t in timesteps:
            shared[step.t] = step.x_t
        if step.t == min(timesteps):
            break
    samples = [
        _denoised(pipe, shared[t].expand(len(seeds), *x.shape[1:]), t, seeded_generators(seeds), num_inference_steps)
        for t in timesteps
    ]
    return SharedLatents(unit_range(torch.cat([shared[t] for t in timesteps])).cpu(), torch.stack(samples))


def interpolation(
    pipe: DDPMPaperPipeline,
    x_start: Tensor,
    x_start_other: Tensor,
    *,
    t: int,
    weights: Sequence[float],
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    on_step: Callable[[ReverseStep], Any] | None = None,
) -> Tensor:
    """x_0 ∼ p_θ(x_0 | x̄_t) with x̄_t = (1 − λ) x_t + λ x_t', for every λ in `weights` (Fig. 8): [S, L, C, H, W].

    Both sources, [C, H, W] in [−1, 1], are diffused with the same ε, so that x̄_t = √ᾱ_t x̄_0 + √(1 − ᾱ_t) ε, of the
    blend x̄_0 of the pixels, has the noise level of t at every λ; λ = 0 and 1 are the reconstructions of the sources.
    (The paper draws two ε and keeps them fixed over λ: at λ = ½ its x̄_t has half the variance of noise that the
    network expects.) ε and the noise of the reverse process depend on the seed alone, not on λ: one row per seed. As
    t → T nothing is left of the sources, so that all λ give one image.

    `t`, 0-based, is one of the chain's timesteps, or −1: the blend of the sources' pixels. `on_step` is called with
    each reverse step. Raises ValueError.
    """
    if x_start.shape != x_start_other.shape or x_start.ndim != 3:
        raise ValueError(
            f"sources have shapes {tuple(x_start.shape)} and {tuple(x_start_other.shape)}; expected one [C, H, W]"
        )
    if not len(seeds) or not len(weights):
        raise ValueError(f"seeds={list(seeds)}, weights={list(weights)}: pass at least one of each")
    rows, columns = len(seeds), len(weights)
    repeated = [seed for seed in seeds for _ in weights]
    shape = (rows * columns, 1, 1, 1)
    weight = torch.tensor(weights, dtype=torch.float32).repeat(rows).view(shape)
    x, other = (source.cpu().expand(rows * columns, *source.shape) for source in (x_start, x_start_other))
    if t == -1:
        blend = unit_range((1 - weight) * x + weight * other)
    else:
        generators = seeded_generators(repeated)
        noise = randn_tensor(tuple(x.shape), generator=generators, dtype=torch.float32)
        diffusion = whole_process(pipe).diffusion
        x_t, other_t = diffusion.q_sample(x, t, noise), diffusion.q_sample(other, t, noise)
        x_t = (1 - weight) * x_t + weight * other_t
        blend = _denoised(pipe, x_t, t, generators, num_inference_steps, on_step)
    return blend.view(rows, columns, *x_start.shape)


def coarse_to_fine(
    pipe: DDPMPaperPipeline,
    x_start: Tensor,
    x_start_other: Tensor,
    *,
    timesteps: Sequence[int],
    weights: Sequence[float],
    seed: int,
    num_inference_steps: int | None = None,
) -> Tensor:
    """`interpolation` at several t, one row each (Fig. 9): [R, L, C, H, W].

    The higher t, the coarser what the images keep of their sources; t = −1 is the blend of the pixels.
    """
    rows = [
        interpolation(
            pipe,
            x_start,
            x_start_other,
            t=t,
            weights=weights,
            seeds=[seed],
            num_inference_steps=num_inference_steps,
        )
        for t in timesteps
    ]
    return torch.cat(rows)


def initial_noise(pipe: DDPMPaperPipeline, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
    """x_T as the pipeline draws it from these seeds, and their generators, which have drawn it."""
    if not len(seeds):
        raise ValueError("seeds: got none; pass at least one")
    generators = seeded_generators(seeds)
    shape = (len(generators), *pipe.sample_shape)
    return randn_tensor(shape, generator=generators, device=pipe._execution_device, dtype=torch.float32), generators


def _denoised(
    pipe: DDPMPaperPipeline,
    x_t: Tensor,
    t: int,
    generators: list[torch.Generator],
    num_inference_steps: int | None,
    on_step: Callable[[ReverseStep], Any] | None = None,
) -> Tensor:
    """x_0 in [0, 1] at the end of the reverse process from x_t."""
    x = x_t
    for step in reverse_process(
        pipe, x_t, generators=generators, from_timestep=t, num_inference_steps=num_inference_steps
    ):
        x = step.x
        if on_step is not None:
            on_step(step)
    return unit_range(x).cpu()


def _require_images(pipe: DDPMPaperPipeline) -> None:
    if len(pipe.sample_shape) != 3:
        raise ValueError(f"samples of shape {pipe.sample_shape} are not images; for points there is point_process")


def _require_timesteps(timesteps: Sequence[int], allowed: Sequence[int]) -> None:
    if not len(timesteps) or not set(timesteps) <= set(allowed):
        raise ValueError(
            f"timesteps={list(timesteps)} must be one or more of this chain's {len(allowed)}, "
            f"{min(allowed)} to {max(allowed)}"
        )


class Neighbours(NamedTuple):
    """The k nearest of a data set, nearest first: int64 indices [B, k], and float32 distances [B, k]."""

    indices: Tensor
    distances: Tensor


def nearest_images(images: Tensor, samples: Samples, *, k: int) -> Neighbours:
    """The k images of `samples` nearest to each of `images` [B, C, H, W] by ‖x − y‖₂ over all pixels, in [0, 1].

    The paper's check against copying. Distances are sums of squared differences, not expanded products, so that an
    image of the set is at distance 0 from itself, exactly; of images equally near the first comes first. The set is
    gone through in pieces of at most 64 MiB. Raises ValueError for points, other shapes, and k outside [1, N].
    """
    if samples.is_points or tuple(images.shape[1:]) != samples.sample_shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; {samples.name} holds {'x'.join(map(str, samples.sample_shape))}"
            + (", which are points" if samples.is_points else "")
        )
    if not 1 <= k <= len(samples):
        raise ValueError(f"k={k} must lie in [1, {len(samples)}], the images of {samples.name}")
    queries = images.flatten(1).cpu().float()
    chunk = max(1, CHUNK_VALUES // queries.shape[1])
    distances = torch.empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(samples), chunk):
        rows = torch.arange(first, min(first + chunk, len(samples)))
        others = unit_range(to_model_range(samples.batch(rows), samples.num_levels)).flatten(1)
        found = torch.cdist(queries, others, compute_mode="donot_use_mm_for_euclid_dist")
        candidates = torch.cat([distances, found], dim=1), torch.cat([indices, rows.expand(len(queries), -1)], dim=1)
        distances, order = candidates[0].sort(dim=1, stable=True)
        distances, indices = distances[:, :k], candidates[1].gather(1, order)[:, :k]
    return Neighbours(indices, distances)


class PointProcess(NamedTuple):
    """Points in the plane at P timesteps, and the score there.

    timesteps: ascending, 0-based; −1 is the data.
    forward: x_t ∼ q(x_t | x_0): [P, N, 2].
    reverse: x_t of Algorithm 2: [P, N, 2].
    positions: where the score was asked for, a square around the points of `forward`: [P, G, 2].
    scores: −ε_θ(x, t) / √(1 − ᾱ_t): [P, G, 2]; 0 at t = −1, for which there is no network.
    """

    timesteps: tuple[int, ...]
    forward: Tensor
    reverse: Tensor
    positions: Tensor
    scores: Tensor


def point_process(
    pipe: DDPMPaperPipeline,
    points: Tensor,
    *,
    seeds: Sequence[int],
    timesteps: Sequence[int],
    num_inference_steps: int | None = None,
) -> PointProcess:
    """Both processes and the learned score of a model of points in the plane, at the same `timesteps`.

    `points` [N, 2] are data, `seeds` one per point: its ε in the forward process is x_T of the reverse process, which
    so begins where the other ends. `timesteps` are 0-based and in the chain, or −1 for x_0. Raises ValueError.
    """
    if pipe.sample_shape != (2,) or tuple(points.shape) != (len(seeds), 2):
        raise ValueError(
            f"points have shape {tuple(points.shape)}, for {len(seeds)} seeds and a model of {pipe.sample_shape}; "
            "expected points in the plane, one seed each"
        )
    scheduler = whole_process(pipe)
    chain = scheduler.chain(num_inference_steps).timesteps.tolist()
    _require_timesteps(timesteps, [-1, *chain])
    wanted = sorted(set(timesteps))
    x, generators = initial_noise(pipe, seeds)
    x_start = points.to(x)
    forward = [x_start if t == -1 else scheduler.diffusion.q_sample(x_start, t, x) for t in wanted]
    reverse = {}
    for step in reverse_process(pipe, x, generators=generators, num_inference_steps=num_inference_steps):
        if step.t in wanted:
            reverse[step.t] = step.x_t
        reverse[-1] = step.x
    positions = [_square_around(x_t) for x_t in forward]
    scores = [
        learned_score(pipe, xs, t) if t >= 0 else torch.zeros_like(xs) for t, xs in zip(wanted, positions, strict=True)
    ]
    parts = (forward, [reverse[t] for t in wanted], positions, scores)
    return PointProcess(tuple(wanted), *(torch.stack(part).cpu() for part in parts))


def _square_around(points: Tensor, side: int = 17) -> Tensor:
    """side × side positions that fill a square, centred on 0, with 99 % of all coordinates in it: [side², 2]."""
    extent = float(points.abs().flatten().quantile(0.99)) * 1.15
    axis = torch.linspace(-extent, extent, side, device=points.device)
    return torch.cartesian_prod(axis, axis)


@torch.no_grad()
def learned_score(pipe: DDPMPaperPipeline, x_t: Tensor, t: int) -> Tensor:
    """∇ log p(x_t) ≈ −ε_θ(x_t, t) / √(1 − ᾱ_t) (Section 3.2), in float32 and x_t's shape; t 0-based.

    For networks that predict something else than ε, that of their x̂_0, unclipped. The network is in eval mode.
    """
    diffusion = whole_process(pipe).diffusion
    with evaluation_mode(pipe.unet):
        output = pipe.unet(x_t.to(pipe.unet.dtype), torch.full((len(x_t),), t, device=x_t.device)).sample.float()
    x_start = diffusion.predict_x_start(output, x_t.float(), t)
    return diffusion.score(diffusion.predict_eps(x_start, x_t.float(), t), t)
