"""Every kind of image file, decoded by the package and by a second decoder: equal within a tolerance, or refused.

    python tests/data/format_matrix.py      prints the table of docs/data.md

The rule by which the second decoder's samples become pixels is written here once more, in floats, from docs/data.md.
"""

import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from format_files import Cell, cells  # noqa: E402

from ddpm_hf.data import BadImage, decode_image  # noqa: E402

BACKGROUND = 40  # grey, so that grey with alpha stays grey; neither black nor white


def meaning(cell: Cell) -> np.ndarray:
    """The pixels, 0..255 as floats [C, H, W], that the second decoder's samples mean."""
    assert cell.samples is not None
    levels = np.moveaxis(cell.samples.astype(float), -1, 0) * 255 / cell.full
    alpha = None
    if cell.has_alpha:
        levels, alpha = levels[:-1], levels[-1:] / 255
    if cell.inverted:
        levels = 255 - levels
    if len(levels) == 4:  # CMYK, by Pillow's formula
        levels = (255 - levels[:3]) * (255 - levels[3:]) / 255
    if alpha is not None:
        shown = levels if cell.transparency == "premultiplied alpha" else levels * alpha
        levels = shown + (1 - alpha) * BACKGROUND
    if len(levels) == 3 and cell.format in ("WebP", "GIF", "BMP", "AVIF") and np.ptp(levels, axis=0).max() == 0:
        levels = levels[:1]
    return _upright(levels, cell.orientation)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[C, H, W] turned as EXIF says, in terms of numpy."""
    turned = {
        1: pixels,
        2: pixels[:, :, ::-1],
        3: pixels[:, ::-1, ::-1],
        4: pixels[:, ::-1],
        5: pixels.transpose(0, 2, 1),
        6: np.rot90(pixels, -1, (1, 2)),
        7: pixels[:, ::-1, ::-1].transpose(0, 2, 1),
        8: np.rot90(pixels, 1, (1, 2)),
    }
    return turned[orientation]


def tolerance(cell: Cell) -> float:
    """In levels: 0.5 for rounding; 1 more where Pillow drops a low byte, and where it blends or mixes whole levels;
    0.5 more for JPEG 2000 of 9 to 15 bits, which it shifts by whole bits.
    """
    low_byte_dropped = cell.bits > 8 and cell.kind != "grey"
    shifted = cell.format == "JPEG 2000" and cell.bits > 8
    return 0.5 + low_byte_dropped + 0.5 * shifted + cell.has_alpha + (cell.kind in ("CMYK", "YCbCr")) + 1e-6


def outcome(cell: Cell) -> str:
    """ "read", or the reason of a refusal up to its remedy; "WRONG" and by how much where neither is right."""
    try:
        pixels = decode_image(io.BytesIO(cell.data), background=(BACKGROUND,) * 3)
    except BadImage as error:
        reason, remedy = str(error).partition("; ")[::2]
        return f"refused: {reason}" if remedy else f"WRONG: refused without a remedy: {error}"
    if cell.samples is None:
        return "WRONG: read, and has no certain meaning"
    expected = meaning(cell)
    if pixels.shape != expected.shape:
        return f"WRONG: {pixels.shape} and not {expected.shape}"
    off = np.abs(pixels - expected).max()
    return "read" if off <= tolerance(cell) else f"WRONG: off by {off:.1f}"


def table(results: Iterable[tuple[Cell, str]]) -> str:
    """A Markdown table; cells that differ in depth, layout or orientation alone share a row where they end alike."""
    rows: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell, result in results:
        without_numbers = re.sub(r"(of )?\(?\d+,?\)? (and \d+ )?(bits|bands|components?)", r"\1… \3", result)
        without_numbers = without_numbers.replace("component of", "components of")
        rows[cell.format, cell.kind, cell.transparency, without_numbers].append(cell)
    lines = ["| format | pixels | transparency | bits | layouts | orientations | files | outcome |", "|" + "---|" * 8]
    for (file_format, kind, transparency, result), group in rows.items():
        bits = _ranges({cell.bits for cell in group})
        layouts, orientations = len({cell.layout for cell in group}), _ranges({cell.orientation for cell in group})
        shown = "; ".join(sorted({cell.layout for cell in group})) if layouts <= 2 else str(layouts)
        columns = (file_format, kind, transparency, bits, shown, orientations, str(len(group)), result)
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _ranges(numbers: set[int]) -> str:
    """ "1–4, 8" for {1, 2, 3, 4, 8}."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


if __name__ == "__main__":
    print(table((cell, outcome(cell)) for cell in cells()))
