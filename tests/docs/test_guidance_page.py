"""docs/guidance.md: its example runs, and what it prints is what the page says, up to chance."""

import contextlib
import io
import math
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "guidance.md").read_text(encoding="utf-8")
SHARE = re.compile(r"(\d\.\d{3}) ± (\d\.\d{3})")
# Other kernels train other classifiers. Two seeds of training differ by one standard error at most, so that 4 of
# the difference, and a hundredth where the error itself is nearly 0, leave room for more.
NUM_ERRORS, LEAST = 4, 0.01


@pytest.fixture(scope="module")
def printed() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.chdir(ROOT):
        exec(compile(code, "docs/guidance.md", "exec"), {})
    return output.getvalue()


def shares(text: str) -> dict[str, tuple[float, float]]:
    """What each line says: share and standard error by the words before them."""
    found = [(SHARE.search(line), line) for line in text.splitlines()]
    return {line.partition(": ")[0]: (float(share[1]), float(share[2])) for share, line in found if share}


def test_the_page_prints_what_it_says(printed):
    (expected,) = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)
    assert SHARE.sub("#", printed) == SHARE.sub("#", expected)
    ours, theirs = shares(printed), shares(expected)
    assert len(ours) == 10
    for name, (share, error) in ours.items():
        other, other_error = theirs[name]
        assert abs(share - other) <= max(NUM_ERRORS * math.hypot(error, other_error), LEAST), name


def test_guidance_does_what_the_page_says(printed):
    """By chance without it; more with it, and most at s = 3; less by a classifier that knows no noise."""
    (none, error), (one, error_1), (three, error_3) = (shares(printed)[f"s = {s}"] for s in (0, 1, 3))
    assert abs(none - 0.1) <= NUM_ERRORS * error
    assert one - none > 10 * math.hypot(error, error_1)
    assert three - one > NUM_ERRORS * math.hypot(error_1, error_3)
    for s, (share, error) in {1: (one, error_1), 3: (three, error_3)}.items():
        clean, clean_error = shares(printed)[f"s = {s}, by the classifier without noise"]
        assert share - clean > 2 * math.hypot(error, clean_error)  # 3.7 or more, with two seeds
    accuracies = [shares(printed)[f"t = {t:3}"][0] for t in (0, 200, 400, 600)]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] > 0.95
