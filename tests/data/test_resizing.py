"""Our Lanczos is Pillow's, level by level."""

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.data import decode_image, resizing


def pillows(image: Image.Image, left: int, top: int, side: int, resolution: int) -> np.ndarray:
    box = (left, top, left + side, top + side)
    resized = np.asarray(image.resize((resolution,) * 2, Image.Resampling.LANCZOS, box=box))
    return resized.reshape(resolution, resolution, -1).transpose(2, 0, 1)


def image_of(kind: str, height: int, width: int, mode: str) -> Image.Image:
    rng = np.random.default_rng(height * width)
    shape = (height, width) if mode == "L" else (height, width, 3)
    pixels = rng.integers(0, 256, shape)
    if kind == "black and white":  # overshoots below 0 and above 255 the most
        pixels = 255 * rng.integers(0, 2, shape)
    elif kind == "even":
        pixels = np.full(shape, 77)
    elif kind == "an edge":
        pixels = np.zeros(shape)
        pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels.astype(np.uint8), mode)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", ["noise", "black and white", "even", "an edge"])
@pytest.mark.parametrize(
    ("height", "width", "resolution"),
    [(128, 128, 64), (250, 250, 64), (251, 337, 64), (333, 301, 32), (97, 131, 7), (64, 64, 1), (700, 900, 256)],
)
def test_squares_are_shrunk_as_pillow_does(height, width, resolution, kind, mode):
    image, side = image_of(kind, height, width, mode), min(height, width)
    square = ((width - side) // 2, (height - side) // 2, side, resolution)
    np.testing.assert_array_equal(resizing.lanczos(image, *square), pillows(image, *square))


def test_any_square_of_any_size_is_resized_as_pillow_does():
    rng = np.random.default_rng(0)
    for _ in range(150):  # also those that grow, and that touch the border
        height, width = rng.integers(1, 90, 2)
        image = image_of("noise", height, width, "RGB")
        side = int(rng.integers(1, min(height, width) + 1))
        left, top = (int(rng.integers(0, size - side + 1)) for size in (width, height))
        square = (left, top, side, int(rng.integers(1, 70)))
        np.testing.assert_array_equal(resizing.lanczos(image, *square), pillows(image, *square), err_msg=str(square))


@pytest.mark.parametrize("side", [16, 31, 32, 33, 100])
def test_a_file_is_the_same_by_either(tmp_path, monkeypatch, side):
    image_of("noise", side, side + 5, "RGB").save(tmp_path / "a.png")
    calls = []
    ours = resizing.lanczos
    monkeypatch.setattr("ddpm_hf.data.decoding.lanczos", lambda *args: calls.append(args) or ours(*args))
    pixels = decode_image(tmp_path / "a.png", resolution=16)
    assert len(calls) == (side >= 32)
    monkeypatch.setattr("ddpm_hf.data.decoding.WORTH_IT", float("inf"))
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", resolution=16), pixels)
    assert pixels.flags.c_contiguous and pixels.dtype == np.uint8
