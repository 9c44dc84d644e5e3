"""Pictures: grids of images, densities of points, curves of a training run."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps


def image_grid(images: Sequence[Image.Image], *, min_side: int = 64) -> Image.Image:
    """All images, of one size and mode, in a grid about as wide as high, the first at the top left.

    Images smaller than `min_side` pixels are enlarged by a whole factor without smoothing, and framed in grey, so that
    8×8 digits can be told apart; missing places in the last row are black. Raises ValueError for no images.
    """
    if not images:
        raise ValueError("an image grid needs at least one image")
    columns = math.ceil(math.sqrt(len(images)))
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
    black = np.percentile(counts[counts > 0], 90) if counts.any() else 1.0  # from so many points per bin on
    shade = 255 * (1 - np.minimum(counts / black, 1))
    picture = Image.fromarray(shade.round().astype(np.uint8))
    return picture.resize((side, side), Image.Resampling.NEAREST)


def training_curves(metrics: Sequence[Mapping[str, float]]) -> Image.Image:
    """Loss and gradient norm (before clipping) over steps, both on logarithmic axes; `metrics` as in metrics.jsonl.

    Needs matplotlib, of the extra `train`. Raises ValueError for no metrics.
    """
    if not metrics:
        raise ValueError("there are no metrics to draw")
    from matplotlib.figure import Figure  # the object interface: no window system, no global state

    figure = Figure(figsize=(8, 6), layout="constrained")
    steps = [line["step"] for line in metrics]
    for axes, key in zip(figure.subplots(2, 1, sharex=True), ("loss", "grad_norm"), strict=True):
        axes.plot(steps, [line[key] for line in metrics], linewidth=1)
        axes.set_yscale("log")
        axes.set_ylabel(key)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer)
