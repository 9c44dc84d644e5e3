"""docs/errata.md: its snippets print what it says, tell wrong from right, and the functions it names exist."""

import contextlib
import importlib
import io
import re
from functools import reduce
from pathlib import Path

import pytest

import ddpm_hf
from ddpm_hf import oracle

pytestmark = pytest.mark.docs

DOCUMENT = Path(__file__).parents[2] / "docs" / "errata.md"
INTRODUCTION, *SECTIONS = re.split(r"^## \d+\. ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"```text\n(.*?)```", re.DOTALL)
NUMBER = r"-?\d+(?:\.\d+)?"
COMPARED = re.compile(rf"truth ({NUMBER}), right ({NUMBER}), wrong ({NUMBER}): off by ({NUMBER})")
BOUNDED = re.compile(rf"log₂ p ({NUMBER}): at least ({NUMBER}), and not ({NUMBER}): off by ({NUMBER})")
NUM_COMPARISONS = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 1, 7: 1, 8: 2, 9: 3, 10: 6}  # lines, by section
NUM_COMPARISONS |= {section: 1 for section in range(11, 23)} | {23: 2, 24: 1, 25: 1, 26: 4}
LAST_PLACE = 1e-5  # of the page's comparisons


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """What each section's snippet prints, all of them run in the page's order in one namespace, as a reader would."""
    namespace: dict = {}
    outputs = []
    for part in (INTRODUCTION, *SECTIONS):
        (code,) = SNIPPET.findall(part)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, str(DOCUMENT), "exec"), namespace)
        outputs.append(output.getvalue())
    assert outputs[0] == ""
    return outputs[1:]


def test_the_page_has_its_slips_in_one_form():
    assert len(SECTIONS) == len(NUM_COMPARISONS) == 26 and set(NUM_COMPARISONS) == set(range(1, 27))
    for section in SECTIONS:
        assert re.findall(r"^- \*\*(.*?):\*\*", section, re.MULTILINE) == ["Wrong", "Right", "Why it slips in"]
        assert len(OUTPUT.findall(section)) == 1


@pytest.mark.parametrize("number", NUM_COMPARISONS)
def test_the_page_prints_what_it_says(printed, number):
    """Word for word, its numbers within one unit in their last place: kernels may round otherwise elsewhere."""
    actual, (expected,) = printed[number - 1], OUTPUT.findall(SECTIONS[number - 1])
    assert re.sub(NUMBER, "#", actual) == re.sub(NUMBER, "#", expected)
    for ours, theirs in zip(re.findall(NUMBER, actual), re.findall(NUMBER, expected), strict=True):
        unit = 10.0 ** -len(theirs.partition(".")[2])
        assert float(ours) == pytest.approx(float(theirs), abs=1.01 * unit)


@pytest.mark.parametrize("number", NUM_COMPARISONS)
def test_the_check_tells_wrong_from_right(printed, number):
    """`right` is a hundred times nearer to the truth than `wrong`; a bound holds, and with its sign turned does not.

    The bound of 9 has a gap of its own, so there the factor is ten.
    """
    compared = [[float(x) for x in line] for line in COMPARED.findall(printed[number - 1])]
    bounded = [[float(x) for x in line] for line in BOUNDED.findall(printed[number - 1])]
    assert len(compared) + len(bounded) == NUM_COMPARISONS[number]
    for truth, right, wrong, off in compared:
        assert off == pytest.approx(abs(wrong - truth), abs=2 * LAST_PLACE) and off > 100 * LAST_PLACE
        assert abs(right - truth) <= max(off / 100, LAST_PLACE)
    for truth, right, wrong, off in bounded:
        assert right <= truth < wrong and off > 10 * (truth - right)


def test_a_posterior_variance_and_its_reciprocal(printed):
    assert "right × wrong 1.00000\n" in printed[1]


def test_a_posterior_mean_by_bayes_rule_is_the_package_s(printed):
    truth, *_ = COMPARED.findall(printed[16])[0]
    assert printed[16].endswith(f"q_posterior_mean_variance {truth}\n")


def test_the_functions_it_names_exist():
    text = SNIPPET.sub("", DOCUMENT.read_text(encoding="utf-8"))
    names = set(re.findall(r"`((?:GaussianDiffusion|GaussianMixture|DDPMPaper\w+|ddpm_hf)\.[\w.]+)`", text))
    assert len(names) == 17
    for name in names:
        first, *rest = name.split(".")
        if first == "ddpm_hf":
            first, rest = f"ddpm_hf.{rest[0]}", rest[1:]
            owner = importlib.import_module(first)
        else:
            owner = getattr(oracle if first == "GaussianMixture" else ddpm_hf, first)
            if owner is ddpm_hf.GaussianDiffusion:
                owner = owner([0.5])  # whose tables are made with it
        fields = getattr(owner, "__dataclass_fields__", {})
        assert rest[0] in fields or reduce(getattr, rest, owner) is not None, name
