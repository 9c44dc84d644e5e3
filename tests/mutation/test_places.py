"""The faults that mutate.py puts in: each changes its own place alone, and is found again in a file that has moved."""

import ast
import difflib
import random
from pathlib import Path

import pytest
from places import KINDS, Place, equivalent_places, in_random_order, mutated_source, places

SOURCE = (Path(__file__).parents[2] / "ddpm_hf" / "objectives.py").read_text(encoding="utf-8")
EXAMPLE = '''
def f(x, least=0):
    """At least 1 < 2."""
    if x < least and x != 1.0:
        raise ValueError(f"{x + 1} < " + str(2))
    note(x)
    return g(x, -x) * np.sqrt(x) + x.sum()
'''


def of_example(kind: str) -> set[tuple[str, str]]:
    return {(place.original, place.mutated) for place in places(EXAMPLE) if place.kind == kind}


def test_each_kind_of_fault_is_found_but_in_messages():
    assert of_example("constant") == {("1.0", "1.01")}
    assert of_example("dropped call") == {("note(x)", "None"), ("np.sqrt(x)", "x"), ("x.sum()", "x")}
    assert of_example("swapped arguments") == {("g(x, -x)", "g(-x, x)")}
    assert {("x < least", "x <= least"), ("x != 1.0", "x == 1.0")} < of_example("operator")
    assert ("g(x, -x) * np.sqrt(x) + x.sum()", "g(x, -x) * np.sqrt(x) - x.sum()") in of_example("operator")
    assert len(of_example("operator")) == 5  # these, `and` and `*`


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_changes_one_expression_and_nothing_else(kind: str):
    for place in [place for place in places(SOURCE) if place.kind == kind][:6]:
        mutant, line = mutated_source(SOURCE, place) or ("", 0)
        assert ast.dump(ast.parse(mutant)) != ast.dump(ast.parse(SOURCE)), place
        before, after = ast.unparse(ast.parse(SOURCE)).splitlines(), ast.unparse(ast.parse(mutant)).splitlines()
        changed = [text for text in difflib.ndiff(before, after) if text.startswith("- ")]
        assert len(changed) == 1 and place.original.splitlines()[0][:20] in changed[0], place
        assert SOURCE.splitlines()[line - 1] not in mutant.splitlines()[line - 1 : line] or "\n" in place.original


def test_a_place_is_found_again_in_a_reformatted_file():
    moved = "import os\n\n\n" + ast.unparse(ast.parse(SOURCE))
    assert places(moved) == places(SOURCE)


def test_a_place_that_is_gone_is_none():
    assert mutated_source(EXAMPLE, Place("f", "constant", "2.0", "2.02", 0)) is None


def test_the_order_is_the_seeds_and_kinds_take_turns():
    found = places(SOURCE)
    first = in_random_order(found, random.Random("0 a"))
    assert first == in_random_order(found, random.Random("0 a")) != in_random_order(found, random.Random("1 a"))
    assert sorted(first) == sorted(found)
    assert [place.kind for place in first[:8]] == [*KINDS, *KINDS]


def test_faults_that_nothing_can_notice_are_known_by_their_form():
    source = "def f(x, y):\n    x.to(y, non_blocking=True, copy=True)\n    return min(x, y), min(x, y, 1), pow(x, y)\n"
    found = {(place.original, place.mutated): reason for place, reason in equivalent_places(source).items()}
    assert found == {
        ("min(x, y)", "min(y, x)"): "min of two is the same in either order",
        ("True", "False"): "non_blocking says only how fast it goes",
    }
    others = [place for place in places(source) if place not in equivalent_places(source)]
    assert {place.original for place in others} >= {"min(x, y, 1)", "pow(x, y)", "True"}  # this is copy=True
