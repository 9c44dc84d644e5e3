"""Every kind of file that a format has: decoded as a second decoder does, or refused with a reason and a remedy."""

import io
from pathlib import Path

import format_files
import format_matrix
import numpy as np
import pytest
from format_matrix import cells, outcome, table
from PIL import Image

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
GENERATORS = [
    pytest.param(name, marks=[pytest.mark.slow] if name == "tiff_cells" else [])  # 1,000 files
    for name in vars(format_files)
    if name.endswith("_cells")
]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_file_is_right_or_refused_by_name(name):
    results = [(cell, outcome(cell)) for cell in getattr(format_files, name)()]
    wrong = [
        f"{cell.format} {cell.kind}, {cell.bits} bits, {cell.layout}, {cell.transparency}: {result}"
        for cell, result in results
        if result.startswith("WRONG")
    ]
    assert not wrong, wrong[:10]
    assert any(result == "read" for _, result in results)


@pytest.mark.parametrize("name", ["png_cells", "jpeg2000_cells"])
def test_the_matrix_catches_plain_pillow(name, monkeypatch):
    def plain(file: io.BytesIO, background: tuple[int, int, int]) -> np.ndarray:
        image = Image.open(file)
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return np.asarray(Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")).transpose(2, 0, 1)

    colour = [cell for cell in getattr(format_files, name)() if cell.kind.startswith("RGB") and cell.orientation == 1]
    monkeypatch.setattr(format_matrix, "decode_image", plain)
    assert any(outcome(cell).startswith("WRONG: off by") for cell in colour)


@pytest.mark.docs
def test_the_page_shows_the_matrix():
    """`python tests/data/format_matrix.py` prints what stands there."""
    assert table((cell, outcome(cell)) for cell in cells()) in PAGE.read_text()
