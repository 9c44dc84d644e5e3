"""docs/course/: every chapter runs, and prints what it shows on the web.

A chapter's cells run in this process. One chapter, and all of them in the tier `long`, also run in Jupyter's kernel,
as docs/course/run.py does.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "course"
CHAPTERS = sorted(path.stem for path in FOLDER.glob("[0-9]*.ipynb"))
SHORTEST = "02_posterior"
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
MAX_BYTES = 700_000  # of a chapter: above a megabyte web pages no longer show it


def cells(chapter: str, kind: str, folder: Path = FOLDER) -> list[dict]:
    notebook = json.loads((folder / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def stored_text(cell: dict) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def num_pictures(cell: dict) -> int:
    return sum("image/png" in output.get("data", ()) for output in cell["outputs"])


def assert_same_text(actual: str, expected: str) -> None:
    """Word for word; numbers within 1 % or two units in their last place: kernels round otherwise elsewhere."""
    assert re.sub(NUMBER, "#", actual) == re.sub(NUMBER, "#", expected)
    for ours, theirs in zip(re.findall(NUMBER, actual), re.findall(NUMBER, expected), strict=True):
        mantissa, _, exponent = theirs.partition("e")
        unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert float(ours) == pytest.approx(float(theirs), rel=0.01, abs=2.01 * unit)


@pytest.fixture
def pictures(monkeypatch) -> list[int]:
    """Where each `plt.show()` adds how many figures it would have shown."""
    shown: list[int] = []

    def show() -> None:
        shown.append(len(plt.get_fignums()))
        plt.close("all")

    monkeypatch.setattr(plt, "show", show)
    matplotlib.use("agg")
    return shown


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_prints_and_draws_what_it_shows(chapter, pictures, monkeypatch):
    monkeypatch.chdir(FOLDER)
    torch.manual_seed(0)  # chapters seed what they draw; this only keeps one from depending on another's luck
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells(chapter, "code")):
        output = io.StringIO()
        pictures.clear()
        with contextlib.redirect_stdout(output):
            exec(compile("".join(cell["source"]), f"{chapter}[{number}]", "exec"), namespace)
        assert_same_text(output.getvalue(), stored_text(cell))
        assert sum(pictures) == num_pictures(cell) and not plt.get_fignums()


@pytest.mark.parametrize(
    "chapter", [pytest.param(c, marks=[] if c == SHORTEST else pytest.mark.long) for c in CHAPTERS]
)
def test_a_chapter_runs_in_jupyter(chapter, tmp_path):
    """As a reader runs it, in a copy of the course's folder, so that the repository stays as it is."""
    copy = tmp_path / "docs" / "course"
    shutil.copytree(FOLDER, copy)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # more would wait for each other where other work is done
    subprocess.run([sys.executable, copy / "run.py", chapter], check=True, env=alone)
    before, after = cells(chapter, "code", FOLDER), cells(chapter, "code", copy)
    for cell, again in zip(before, after, strict=True):
        assert_same_text(stored_text(again), stored_text(cell))
        assert num_pictures(again) == num_pictures(cell)
        assert cell["source"] == again["source"] and cell["execution_count"] == again["execution_count"]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_is_made_for_the_web(chapter):
    """As run.py stores it, small enough to be shown, with a title, and with no picture that nothing is said about."""
    path = FOLDER / f"{chapter}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size <= MAX_BYTES
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{i}" for i in range(len(notebook["cells"]))]
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown" and "".join(first["source"]).startswith("# ")
    for cell in cells(chapter, "code"):
        assert cell["execution_count"] and cell["metadata"] == {}
        assert all(output["output_type"] in ("stream", "display_data") for output in cell["outputs"])
    assert sum(map(num_pictures, cells(chapter, "code"))) >= 2
