"""What benchmarks/hard_inputs.py takes for right, and that all its inputs are."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import hard_inputs  # type: ignore  # noqa: E402
from hard import KINDS, Answer, Member  # type: ignore  # noqa: E402

PIXELS = np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3) + 50


def result(pixels: Any = PIXELS, said: tuple[str, ...] = (), error: str | None = None, message: str = "") -> dict:
    refusal = {"is_refusal": error == "ValueError"}
    return {"pixels": None if error else pixels, "said": list(said), "error": error, "message": message, **refusal}


@pytest.mark.parametrize(
    ("answer", "found", "right"),
    [
        (Answer(PIXELS), result(), True),
        (Answer(PIXELS + 0.9), result(), True),
        (Answer(PIXELS + 1.1), result(), False),
        (Answer(PIXELS.astype(float) - 51), result(PIXELS - 50), True),
        (Answer(PIXELS[:1]), result(), False),
        (Answer(PIXELS), result(PIXELS.repeat(3, 1)), False),
        (Answer(PIXELS[::-1]), result(), False),
        (Answer(PIXELS[::-1], in_order=False), result(), True),
        (Answer(PIXELS), result(error="ValueError", message="a.png: bad; save it"), False),
        (Answer(refused="a.png.*; save"), result(error="ValueError", message="a.png: bad; save it"), True),
        (Answer(refused="a.png.*; save"), result(error="TypeError", message="a.png: bad; save it"), False),
        (Answer(refused="a.png.*; save"), result(error="ValueError", message="a.png: bad"), False),
        (Answer(refused="(?s)a.png.*; save"), result(error="ValueError", message="a.png:\n; save"), False),
        (Answer(refused="a.png"), result(), False),
        (Answer(PIXELS, said="189"), result(said=("the largest is 189",)), True),
        (Answer(PIXELS, said="189"), result(), False),
        (Answer(PIXELS, said="189"), result(said=("189", "189")), False),
        (Answer(said="189"), result(said=("189",)), True),
        (Answer(said="189"), result(said=("189",), error="ValueError"), False),
        (Answer(PIXELS, silent=True), result(said=("anything",)), False),
        (Answer(PIXELS, documented="the page"), result(), True),
        (Answer(PIXELS, documented="another page"), result(), False),
    ],
)
def test_what_is_right(answer, found, right):
    member = Member("one", Path(), (Answer(refused="never"), answer))
    assert hard_inputs.judged(member, found, "what the page says")[0] is right


def test_an_input_that_is_wrong_fails_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hard_inputs.report, "surroundings", dict)  # it asks git
    monkeypatch.setattr(hard_inputs, "loaded", lambda tree, members, place: [result() for _ in members])
    assert hard_inputs.main(["--only", "png-grey-4bit-trns", "--output", str(tmp_path / "a.json")]) == 1
    assert "| 21 | 0 | wrong 22 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("names", [["png-grey-4bit-trns", "zip-of-images"]])
def test_some_kinds_are_right(names, capsys):
    assert hard_inputs.main(["--wrong", "--only", *names]) == 0, capsys.readouterr().err


@pytest.mark.long
def test_all_kinds_are_right(capsys):
    assert hard_inputs.main(["--wrong", "--only", *KINDS]) == 0, capsys.readouterr().err
