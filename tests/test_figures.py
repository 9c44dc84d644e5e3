"""Grids of pictures and densities of points, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.figures import image_grid, point_density


def plain(count: int, size: tuple[int, int], mode: str = "L") -> list[Image.Image]:
    """Pictures of one level each: 10, 20, 30, …"""
    level = (lambda i: 10 * (i + 1)) if mode == "L" else (lambda i: (10 * (i + 1), 0, 255))
    return [Image.new(mode, size, level(i)) for i in range(count)]


GRIDS = [(1, 1, 1), (2, 2, 1), (3, 2, 2), (5, 3, 2), (9, 3, 3), (10, 4, 3)]


@pytest.mark.parametrize(("count", "columns", "rows"), GRIDS)
def test_grid_is_about_as_wide_as_high_in_reading_order(count, columns, rows):
    grid = image_grid(plain(count, (64, 64)))
    assert grid.size == (64 * columns, 64 * rows)
    levels = np.asarray(grid.convert("L")).reshape(rows, 64, columns, 64).transpose(0, 2, 1, 3).reshape(-1, 64 * 64)
    expected = [10 * (i + 1) for i in range(count)] + [0] * (rows * columns - count)  # black where none is left
    assert (levels == np.array(expected)[:, None]).all()


SIDES = [(8, 64, 64 + 4), (28, 64, 84 + 2), (64, 64, 64), (256, 64, 256), (8, 1, 8)]


@pytest.mark.parametrize(("side", "min_side", "drawn"), SIDES)
def test_small_pictures_are_enlarged_by_a_whole_factor(side, min_side, drawn):
    assert image_grid(plain(1, (side, side)), min_side=min_side).size == (drawn, drawn)


def test_enlarging_does_not_smooth():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)  # 4 high, 8 wide
    grid = np.asarray(image_grid([Image.fromarray(pixels)]))
    assert np.array_equal(grid[2:-2, 2:-2], pixels.repeat(8, axis=0).repeat(8, axis=1))
    assert (grid[:2] == 0x40).all() and (grid[:, -2:] == 0x40).all()  # the frame


def test_colours_stay():
    grid = np.asarray(image_grid(plain(2, (64, 64), "RGB")))
    assert grid[0, 0].tolist() == [10, 0, 255] and grid[0, 64].tolist() == [20, 0, 255]


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        image_grid([])


PLACES = [((-0.9, 0.9), 0, 0), ((0.9, 0.9), 0, 6), ((-0.9, -0.9), 6, 0), ((0.1, -0.4), 4, 4)]


@pytest.mark.parametrize(("point", "row", "column"), PLACES)
def test_density_is_dark_where_the_points_are(point, row, column):
    """x to the right, y upwards: over [−1, 1]² in a picture of 8 (4 × 4 bins), a point marks a block of 2 × 2."""
    picture = np.asarray(point_density(np.array([point]), extent=1.0, side=8))
    expected = np.full((8, 8), 255)
    expected[row : row + 2, column : column + 2] = 0
    assert np.array_equal(picture, expected)


def test_density_has_shades_and_leaves_out_what_is_outside():
    corners = [(-0.9, 0.9)] * 4 + [(0.9, 0.9)] * 2 + [(-0.9, -0.9)]
    points = np.array([*corners, (5.0, 0.0), (0.0, -5.0)])
    picture = np.asarray(point_density(points, extent=1.0, side=8)).astype(int)
    four, two, one = picture[0, 0], picture[0, 7], picture[7, 0]
    assert 0 <= four < two < one < 255
    assert np.array_equal(picture, np.asarray(point_density(np.array(corners), extent=1.0, side=8)))


def test_density_of_points_far_away_is_white():
    picture = point_density(np.full((3, 2), 9.0))
    assert picture.size == (256, 256) and picture.mode == "L" and np.asarray(picture).min() == 255


def test_density_draws_the_first_two_coordinates():
    points = np.random.default_rng(0).normal(scale=0.5, size=(500, 3))
    assert point_density(points).tobytes() == point_density(points[:, :2]).tobytes()


@pytest.mark.parametrize("shape", [(5, 1), (5,), (5, 2, 2)])
def test_density_of_anything_else_is_refused(shape):
    with pytest.raises(ValueError, match=r"points have shape \(5.*expected \[N, d\] with d >= 2"):
        point_density(np.zeros(shape))
