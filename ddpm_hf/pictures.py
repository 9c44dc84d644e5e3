"""Pictures: grids and animations of images, densities of points, and plots of numbers that were computed elsewhere.

Where a plot counts time it counts diffusion steps, t + 1, which is the paper's t. Plots need matplotlib, of the extra
`train`.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

if TYPE_CHECKING:
    from .figures import PointProcess
    from .likelihood import RateDistortion

CAPTION_HEIGHT = 28  # in pixels, of a line of text


def as_pictures(images: Tensor) -> list[Image.Image]:
    """One Pillow image, mode L or RGB, for each of `images` [..., C, H, W] in [0, 1], in reading order.

    Raises ValueError unless C is 1 or 3.
    """
    if images.shape[-3] not in (1, 3):
        raise ValueError(f"images have shape {tuple(images.shape)}; a picture needs 1 or 3 channels")
    flat = images.reshape(-1, *images.shape[-3:])
    return DiffusionPipeline.numpy_to_pil(flat.permute(0, 2, 3, 1).cpu().float().numpy())


def _text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str) -> None:
    draw.text(place, text, fill="black", font=ImageFont.load_default(15), anchor=anchor)


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    corner: str = "",
    min_side: int = 64,
) -> Image.Image:
    """Images of one size in rows × columns, with labels to the left and above, and one in the corner; mode RGB.

    Each is enlarged and framed as by `image_grid`. Labels are ASCII (other letters are not in Pillow's own font), and
    a column has room for about eight letters. Raises ValueError for rows of different lengths, and for other numbers
    of labels than rows and columns.
    """
    columns = len(rows[0]) if rows else 0
    if not columns or any(len(row) != columns for row in rows):
        raise ValueError(f"a grid needs rows of one length; got {[len(row) for row in rows]} images")
    for name, labels, size in (("row_labels", row_labels, len(rows)), ("column_labels", column_labels, columns)):
        if len(labels) != size:
            raise ValueError(f"{name}: got {len(labels)} for {size}")
    cells = [image_grid([image], min_side=min_side).convert("RGB") for row in rows for image in row]
    grid = make_image_grid(cells, rows=len(rows), cols=columns)
    font: Any = ImageFont.load_default(15)
    left = math.ceil(max(font.getlength(label) for label in (corner, *row_labels))) + 16
    top = CAPTION_HEIGHT
    picture = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    picture.paste(grid, (left, top))
    draw = ImageDraw.Draw(picture)
    width, height = cells[0].size
    _text(draw, (left - 8, top / 2), corner, "rm")
    for i, label in enumerate(row_labels):
        _text(draw, (left - 8, top + (i + 0.5) * height), label, "rm")
    for i, label in enumerate(column_labels):
        _text(draw, (left + (i + 0.5) * width, top / 2), label, "mm")
    return picture


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture under a line of text, ASCII, black on white; mode RGB."""
    whole = Image.new("RGB", (picture.width, CAPTION_HEIGHT + picture.height), "white")
    whole.paste(picture, (0, CAPTION_HEIGHT))
    _text(ImageDraw.Draw(whole), (picture.width / 2, CAPTION_HEIGHT / 2), caption, "mm")
    return whole


def save_animation(path: str | os.PathLike[str], frames: Sequence[Image.Image]) -> None:
    """Write frames of one size as a GIF that repeats without end and shows the last frame for two seconds.

    All but the last have 16 levels per channel, which halves the file where they show noise. Raises ValueError for no
    frames.
    """
    if not frames:
        raise ValueError("an animation needs at least one frame")
    durations = [80] * (len(frames) - 1) + [2000]  # in milliseconds
    levels = [level // 16 * 17 for level in range(256)]  # white stays white
    coarse = [frame.point(levels * len(frame.getbands())) for frame in frames[:-1]]
    first, *others = [*coarse, frames[-1]]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def image_grid(images: Sequence[Image.Image], *, min_side: int = 64, columns: int | None = None) -> Image.Image:
    """All images, of one size and mode, in so many columns, by default as many as rows, the first at the top left.

    Images smaller than `min_side` pixels are enlarged by a whole factor without smoothing, and framed in grey, so that
    8×8 digits can be told apart; missing places in the last row are black. Raises ValueError for no images.
    """
    if not images:
        raise ValueError("an image grid needs at least one image")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    factor = max(1, -(-min_side // max(images[0].size)))
    size = (images[0].width * factor, images[0].height * factor)
    enlarged = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    if factor > 1:
        enlarged = [ImageOps.expand(image, border=max(1, factor // 4), fill="#404040") for image in enlarged]
    enlarged += [Image.new(images[0].mode, enlarged[0].size)] * (rows * columns - len(images))
    return make_image_grid(enlarged, rows=rows, cols=columns)


def side_by_side(pictures: Sequence[Image.Image], *, side: int = 256) -> Image.Image:
    """The pictures from left to right, each scaled to fit into side × side, on grey. Raises ValueError for none."""
    if not pictures:
        raise ValueError("there are no pictures to put side by side")
    gap = side // 32
    row = Image.new("RGB", (len(pictures) * (side + gap) - gap, side), "#404040")
    for i, picture in enumerate(pictures):
        row.paste(ImageOps.contain(picture.convert("RGB"), (side, side)), (i * (side + gap), 0))
    return row


def point_density(points: np.ndarray, *, extent: float = 1.5, side: int = 256) -> Image.Image:
    """Points [N, d] drawn by their first two coordinates over [−extent, extent]², darker where there are more.

    Points outside are left out. Raises ValueError for d < 2.
    """
    if points.ndim != 2 or points.shape[1] < 2:
        raise ValueError(f"points have shape {points.shape}; expected [N, d] with d >= 2")
    bins = np.linspace(-extent, extent, side // 2 + 1)
    counts, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=(bins, bins))
    black = np.percentile(counts[counts > 0], 90) if counts.any() else 1.0  # points of a black bin
    shade = 255 * (1 - np.minimum(counts / black, 1))
    picture = Image.fromarray(shade.round().astype(np.uint8))
    return picture.resize((side, side), Image.Resampling.NEAREST)


def training_curves(
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    lowest: int | None = None,
) -> Image.Image:
    """Loss and gradient norm (before clipping) over steps, both on logarithmic axes; `metrics` as in metrics.jsonl.

    Those of its lines that are about held-out samples are left out; given as `evaluations` they make two panels more,
    L_simple and the bound of held-out samples beside those of training samples. `lowest` is the step where the bound
    of held-out samples is lowest, which is marked. Needs matplotlib, of the extra `train`. Raises ValueError for no
    metrics.
    """
    if not metrics:
        raise ValueError("there are no metrics to draw")
    from matplotlib.figure import Figure  # the object interface: no window system, no global state

    lines = [line for line in metrics if "loss" in line]
    keys = ["loss", "grad_norm"] if lines else []
    measures = {"l_simple": "L_simple", "bpd": "bound (bits/dim)"} if evaluations else {}
    count = len(keys) + len(measures)
    figure = Figure(figsize=(8, 3 * count), layout="constrained")
    every = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(every, keys, strict=False):
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], linewidth=1)
        axes.set_yscale("log")
        axes.set_ylabel(key)
    for axes, (key, label) in zip(every[len(keys) :], measures.items(), strict=True):
        _draw_held_out(axes, evaluations, key, lowest)
        axes.set_ylabel(label)
    for axes in every:
        axes.grid(alpha=0.3)
    every[-1].set_xlabel("step")
    return drawn(figure)


def _draw_held_out(axes: Any, evaluations: Sequence[Mapping[str, Any]], key: str, lowest: int | None) -> None:
    """A measure of held-out and of training samples over steps, with the step of the lowest held-out bound."""
    from matplotlib.ticker import LogFormatter

    steps = [line["step"] for line in evaluations]
    kinds = (("held_out", "held-out samples", "tab:red"), ("train", "training samples", "tab:blue"))
    for name, label, colour in kinds:
        values = [line[f"{name}_{key}"] for line in evaluations]
        axes.plot(steps, values, linewidth=1.5, marker=".", markersize=4, color=colour, label=label)
    if all(line[f"{name}_{key}"] > 0 for line in evaluations for name in ("held_out", "train")):
        axes.set_yscale("log")  # the first steps are far above what matters later; a density may be below 0
        axes.yaxis.set_major_formatter("{x:g}")  # 10, not 10¹
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    if lowest is not None:
        label = f"lowest held-out bound: step {lowest:,}"
        axes.axvline(lowest, color="black", linestyle="--", linewidth=1, label=label)
    axes.legend()


def rate_distortion_plot(curve: RateDistortion) -> Image.Image:
    """Distortion and rate over reverse steps, and distortion over rate, as in the paper's Figure 5.

    Needs matplotlib, of the extra `train`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    steps, rate, distortion = "reverse steps", "rate (bits/dim)", "distortion (RMSE on [0, 255])"
    lines = (
        (curve.num_reverse_steps, curve.rmse, steps, distortion),
        (curve.num_reverse_steps, curve.rate_bpd, steps, rate),
        (curve.rate_bpd, curve.rmse, rate, distortion),
    )
    for axes, (x, y, x_label, y_label) in zip(figure.subplots(1, 3), lines, strict=True):
        axes.plot(x, y, linewidth=1.5)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        if y_label == rate:
            axes.set_yscale("log")  # half of the steps cost less than a hundredth of the bits
    return drawn(figure)


def point_process_plot(process: PointProcess) -> Image.Image:
    """Three rows of panels, one column per timestep: forward process, reverse process, learned score.

    Arrows longer than the median of their panel are drawn at its length: the score grows with the distance from the
    data, and those in its midst would be dots. Needs matplotlib, of the extra `train`.
    """
    from matplotlib.figure import Figure

    columns = len(process.timesteps)
    figure = Figure(figsize=(2.6 * columns + 0.4, 8), layout="constrained")
    grid = figure.subplots(3, columns, squeeze=False)
    for i, t in enumerate(process.timesteps):
        forward, reverse, score = grid[:, i]
        forward.set_title("data" if t < 0 else f"{t + 1} steps" if t else "1 step")
        forward.scatter(*process.forward[i].T, s=1, color="tab:blue")
        reverse.scatter(*process.reverse[i].T, s=1, color="tab:orange")
        limits = tuple(process.positions[i, [0, -1], 0].tolist())
        for axes in grid[:, i]:
            axes.set(xlim=limits, ylim=limits, aspect="equal")
        if t < 0:
            score.set_axis_off()
            continue
        lengths = process.scores[i].norm(dim=1, keepdim=True)
        arrows = process.scores[i] / lengths.clamp(min=lengths.median())
        score.scatter(*process.forward[i].T, s=1, color="tab:blue", alpha=0.3)
        score.quiver(*process.positions[i].T, *arrows.T, angles="xy", scale=20, width=0.005)
    grid[0, 0].set_ylabel("forward process →")
    grid[1, 0].set_ylabel("← reverse process")
    grid[2, next((i for i, t in enumerate(process.timesteps) if t >= 0), 0)].set_ylabel("learned score")
    return drawn(figure)


def drawn(figure: Any) -> Image.Image:
    """A matplotlib figure as a picture of 100 pixels per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)
