"""Grids, animations, plots and densities of points, pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm_hf import DDPMPaperPipeline, pictures
from ddpm_hf.data import load_samples
from ddpm_hf.figures import point_process
from ddpm_hf.likelihood import RateDistortion
from ddpm_hf.pictures import (
    as_pictures,
    image_grid,
    labelled_grid,
    point_density,
    point_process_plot,
    rate_distortion_plot,
    save_animation,
)


@pytest.fixture
def points_pipe(tiny_mlp, tiny_scheduler) -> DDPMPaperPipeline:
    pipe = DDPMPaperPipeline(tiny_mlp(), tiny_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- grids and animations ------------------------------------------------------------------------------------------


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


def test_tensors_become_pictures_in_reading_order():
    images = torch.arange(12).view(2, 6, 1, 1, 1).expand(2, 6, 3, 4, 5) / 11
    drawn = as_pictures(images)
    assert [picture.getpixel((4, 3))[0] for picture in drawn] == [round(255 * i / 11) for i in range(12)]
    assert all(picture.size == (5, 4) and picture.mode == "RGB" for picture in drawn)
    assert as_pictures(torch.ones(1, 4, 4))[0].mode == "L"
    with pytest.raises(ValueError, match="a picture needs 1 or 3 channels"):
        as_pictures(torch.ones(1, 2, 4, 4))


def test_labelled_grid_has_every_cell_in_its_place_and_every_label_beside_it():
    rows = [plain(3, (8, 8)), plain(6, (8, 8))[3:]]
    grid = np.asarray(labelled_grid(rows, row_labels=["one", ""], column_labels=["", "two", ""], corner="c"))
    left, top = grid.shape[1] - 3 * 68, grid.shape[0] - 2 * 68  # a cell is 8 × 8 pixels, and 2 of frame on each side
    for row in range(2):
        for column in range(3):
            cell = grid[top + 68 * row :, left + 68 * column :][:68, :68]
            assert (cell[2:-2, 2:-2] == 10 * (3 * row + column + 1)).all() and (cell[[0, 1, -2, -1]] == 0x40).all()
    has_text = {
        "corner": grid[:top, :left],
        **{f"row {i}": grid[top + 68 * i :, :left][:68] for i in range(2)},
        **{f"column {i}": grid[:top, left + 68 * i :][:, :68] for i in range(3)},
    }
    has_text = {place for place, pixels in has_text.items() if (pixels < 128).any()}
    assert has_text == {"corner", "row 0", "column 1"}
    assert (grid[:2] == 255).all() and (grid[:, :2] == 255).all()


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels", "message"),
    [
        ([], [], [], "rows of one length"),
        ([[]], ["a"], [], "rows of one length"),
        ([1, 2], ["a", "b"], ["a"], r"rows of one length; got \[1, 2\]"),
        ([2, 2], ["a"], ["a", "b"], "row_labels: got 1 for 2"),
        ([2, 2], ["a", "b"], ["a"], "column_labels: got 1 for 2"),
    ],
)
def test_labelled_grid_refuses(rows, row_labels, column_labels, message):
    rows = [plain(count, (8, 8)) if count else [] for count in rows]
    with pytest.raises(ValueError, match=message):
        labelled_grid(rows, row_labels=row_labels, column_labels=column_labels)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_animation_has_its_frames_and_repeats(tmp_path, mode):
    frames = plain(24, (16, 16), mode)[5::6]  # far enough apart to differ in 16 levels
    save_animation(tmp_path / "x.gif", frames)
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.info["loop"] == 0  # for ever
        found = [
            (frame.info["duration"], frame.convert("RGB").tobytes()) for frame in ImageSequence.Iterator(animation)
        ]
    assert [duration for duration, _ in found] == [80, 80, 80, 2000]
    coarse = [frame.point([level // 16 * 17 for level in range(256)] * len(mode)) for frame in frames[:-1]]
    assert [pixels for _, pixels in found] == [frame.convert("RGB").tobytes() for frame in (*coarse, frames[-1])]
    with pytest.raises(ValueError, match="at least one frame"):
        save_animation(tmp_path / "x.gif", [])


# ---- plots ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> list:
    """Figures of matplotlib, as they are when they become pictures."""
    kept, draw = [], pictures.drawn
    monkeypatch.setattr(pictures, "drawn", lambda figure: kept.append(figure) or draw(figure))
    return kept


def test_rate_distortion_plot_shows_the_curve_thrice(drawn):
    curve = RateDistortion(np.arange(1, 5), np.array([0.001, 0.01, 0.1, 1.0]), np.array([80.0, 40.0, 20.0, 10.0]))
    picture = rate_distortion_plot(curve)
    assert picture.format == "PNG" and picture.width > 2 * picture.height
    panels = [(*axes.lines[0].get_data(), axes.get_yscale()) for axes in drawn[0].axes]
    steps, rate, rmse = curve
    for found, expected in zip(
        panels, ((steps, rmse, "linear"), (steps, rate, "log"), (rate, rmse, "linear")), strict=True
    ):
        assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
        assert found[2] == expected[2]


def test_point_process_plot_has_three_rows_of_panels(drawn, points_pipe):
    data = load_samples("moons").batch(range(40))
    process = point_process(points_pipe, data, seeds=range(40), timesteps=[-1, 3, 9])
    assert point_process_plot(process).format == "PNG"
    panels = np.array(drawn[0].axes).reshape(3, 3)
    assert [axes.get_title() for axes in panels[0]] == ["data", "4 steps", "10 steps"]
    for row, points in zip(panels, (process.forward, process.reverse), strict=False):
        for axes, expected in zip(row, points, strict=True):
            assert np.array_equal(axes.collections[0].get_offsets(), expected)
    assert not panels[2, 0].collections  # no score of the data
    for axes, positions, scores in list(zip(panels[2], process.positions, process.scores, strict=True))[1:]:
        arrows = axes.collections[1]
        assert np.array_equal(np.stack([arrows.X, arrows.Y], axis=1), positions)
        angles = np.arctan2(arrows.V, arrows.U) - np.arctan2(*scores.numpy().T[::-1])
        assert np.abs(np.sin(angles / 2)).max() < 1e-5  # in float32
        assert math.isclose(np.hypot(arrows.U, arrows.V).max(), 1, rel_tol=1e-5)
