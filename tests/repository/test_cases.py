"""What benchmarks/cases.py takes for right, what it keeps and shows, and that some of its uses are right."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cases  # type: ignore  # noqa: E402
from speed import case_tables, report  # type: ignore  # noqa: E402
from uses import USES, Seen  # type: ignore  # noqa: E402
from uses.running import Done  # type: ignore  # noqa: E402

REFUSAL = "train.py: a size of 15 must be a multiple of 2; give 16\n"
TRACE = "Traceback (most recent call last):\n  File\n"


@pytest.mark.parametrize(
    ("done", "refused"),
    [
        (Done(1, REFUSAL), True),
        (Done(0, REFUSAL), False),
        (Done(1, REFUSAL + "and more\n"), False),
        (Done(1, TRACE + REFUSAL), False),
        (Done(1, TRACE + "ValueError: 15 is no multiple of 2"), False),
        (Done(1, TRACE + "ValueError: 15 is no multiple of 2", of_function=True), True),
        (Done(1, TRACE + "AttributeError: no multiple of 2", of_function=True), False),
        (Done(1, TRACE + "ValueError: shapes differ", of_function=True), False),
        (Done(-14, ""), False),
    ],
)
def test_what_is_a_refusal(done, refused):
    assert done.refused("multiple of 2") is refused


def test_a_line_that_a_progress_bar_writes_over_is_a_line():
    done = Done(0, " 50%|##\r100%|####\nsaved\n\n")
    assert done.last == "saved" and done.said("^100") == "100%|####" and done.said("lost") is None


def test_what_is_kept_stands_in_the_order_of_the_uses(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "surroundings", dict)  # it asks git
    first, second, third = list(USES)[:3]
    file = tmp_path / "cases.json"
    for rows in ([third, first], [second, first]):
        cases.keep(file, None, [{"name": name, "of": rows[0]} for name in rows])
    assert [(row["name"], row["of"]) for row in report.read_json(file)["rows"]] == [
        *((first, second), (second, second), (third, third))
    ]


def test_a_use_that_is_wrong_now_fails_the_script(tmp_path, monkeypatch, capsys):
    name = next(iter(USES))
    monkeypatch.setattr(cases, "import_libraries", lambda caches: None)
    for right, code in ((True, 0), (False, 1)):
        use = type(USES[name])(
            "about", "does", "expected", lambda runner, right=right: Seen(f"{runner.place} x", right)
        )
        monkeypatch.setitem(USES, name, use)
        assert cases.main(["--only", name]) == code
        assert "now, " + ("right" if right else "WRONG") + ": … x" in capsys.readouterr().err


def test_words_of_other_programs_are_no_markdown():
    assert case_tables.cell("a|b *c* <d> `e`\nf_g") == r"a\|b \*c\* \<d\> \`e\` f\_g"
    assert len(case_tables.cell("x" * 500)) == case_tables.LONGEST


@pytest.mark.slow
def test_some_uses_are_right():
    """In a process of its own: it forks, which this one with its threads should not."""
    names = ["fp16-alone", "two-threads", "one-sample"]
    words = [sys.executable, "benchmarks/cases.py", "--only", *names]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert all(f"{name}, now, right: " in done.stderr for name in names), done.stderr
