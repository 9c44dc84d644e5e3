"""Small pictures with known pixels, and the arithmetic of what they become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageColor


def picture(seed: int, channels: int = 3, side: int = 8) -> np.ndarray:
    """uint8 [side, side, channels] of noise, another for each seed; black and white occur."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)
    pixels[0, :2] = [[0], [255]]
    return pixels


def image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def as_batch(*pictures: np.ndarray) -> np.ndarray:
    """[N, C, H, W] of pictures [H, W, C]; grey ones are repeated where others are in colour."""
    channels = max(each.shape[-1] for each in pictures)
    return np.stack([np.broadcast_to(each, (*each.shape[:2], channels)).transpose(2, 0, 1) for each in pictures])


def write_pictures(folder: Path, seeds: range, channels: int = 3, suffix: str = ".png") -> np.ndarray:
    """Files 000.png, … in a folder, and their pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        image(picture(seed, channels)).save(folder / f"{seed:03}{suffix}")
    return as_batch(*(picture(seed, channels) for seed in seeds))


def on_background(colours: np.ndarray, alpha: np.ndarray, background: str) -> np.ndarray:
    """[1, C, H, W]: colours [H, W, 1 or 3] of 0…255 with alpha [H, W, 1] of 0…1 on a colour, mixed in floats."""
    behind = np.array(ImageColor.getrgb(background), float)
    if colours.shape[-1] == 1 and len(set(behind)) == 1:
        behind = behind[:1]
    return as_batch(colours * alpha + behind * (1 - alpha))
