"""What no source may import or be called. Who may import whom, import-linter holds: `python3 dev.py check`."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "ddpm_hf").rglob("*.py"))
SOURCES = [*PACKAGE, *(path for name in ("training", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))]
SOURCES += [ROOT / "dev.py"]


def roots_imported(path: Path) -> set[str]:
    """The first parts of all absolute names that the file at `path` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_imports_are_seen():
    assert {"ast", "pathlib"} <= roots_imported(Path(__file__))


def test_the_library_imports_nothing_of_the_repository():
    for path in PACKAGE:
        assert not roots_imported(path) & {"training", "tests", "benchmarks", "dev"}, path


def test_torchvision_is_used_nowhere():
    for path in SOURCES:
        if "torchvision" in path.read_text(encoding="utf-8"):
            assert "torchvision" not in roots_imported(path), path


def test_no_module_is_a_drawer_for_odds_and_ends():
    assert not {path.name for path in SOURCES} & {"utils.py", "helpers.py", "common.py", "misc.py"}
