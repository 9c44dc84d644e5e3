"""The scripts of findings/ keep their form. What they say of other libraries is shown by running them, outside CI."""

import re
from pathlib import Path

import pytest

FINDINGS = Path(__file__).parents[2] / "findings"
SCRIPTS = sorted(path for path in FINDINGS.glob("*.sh") if path.name != "common.sh")
HEAD = ("Expected", "Seen", "Matters", "Instead", "Versions")


def ids(path: Path) -> str:
    return path.stem


def head_of(text: str) -> list[str]:
    """The comment lines between the first line and the first command."""
    lines = text.splitlines()[1:]
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def test_the_table_lists_exactly_the_scripts() -> None:
    table = (FINDINGS / "README.md").read_text()
    rows = re.findall(r"^\| \[([\w-]+)\]\(([\w-]+\.sh)\) \|[^|]+\|[^|]+\|$", table, re.MULTILINE)
    assert sorted(rows) == [(path.stem, path.name) for path in SCRIPTS]


@pytest.mark.parametrize("path", SCRIPTS, ids=ids)
def test_a_script_starts_strict_and_says_what_it_shows(path: Path) -> None:
    text = path.read_text()
    assert path.stat().st_mode & 0o111, "it is executable"
    assert text.startswith("#!/usr/bin/env bash\n# ")
    head = head_of(text)
    parts = head[head.index("#") :]
    assert [line.split(":")[0][2:] for line in parts if re.match(r"# [A-Z]\w+:", line)] == list(HEAD)
    assert text.splitlines()[len(head) + 1] == "set -euo pipefail"


@pytest.mark.parametrize("path", SCRIPTS, ids=ids)
def test_a_script_pins_its_packages_and_does_without_ours(path: Path) -> None:
    text = path.read_text()
    (packages,) = re.findall(r"^environment ([^=].*)$", text, re.MULTILINE)
    for package in packages.split():
        assert re.fullmatch(r"[\w-]+==\d[\w.]*", package), f"{package} has no exact version"
    assert "ddpm_hf" not in text and "ddpm-hf" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=ids)
def test_a_script_compares_what_it_sees(path: Path) -> None:
    seen = re.search(r"^expect <<'SEEN'\n(.*)^SEEN\n\Z", path.read_text(), re.MULTILINE | re.DOTALL)
    assert seen and seen.group(1).strip(), "the script ends with what was seen"
    assert "observe <<'PYTHON'\n" in path.read_text()
