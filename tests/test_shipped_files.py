"""What the three files that travel in every checkpoint may lean on: torch, numpy, diffusers, and each other one way.

Who else may import whom, import-linter holds: `python3 dev.py check`.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNET = ROOT / "ddpm_hf" / "unet" / "unet_ddpm_paper.py"
SCHEDULER = ROOT / "ddpm_hf" / "scheduler" / "scheduling_ddpm_paper.py"
PIPELINE = ROOT / "ddpm_hf" / "pipeline_ddpm_paper.py"
SHIPPED = [UNET, SCHEDULER, PIPELINE]


def imported(path: Path) -> set[str]:
    """Absolute names of all that the file at `path` imports, anywhere in it."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "ddpm_hf"}


@pytest.mark.parametrize("path", [UNET, SCHEDULER], ids=lambda path: path.stem)
def test_unet_and_scheduler_know_nothing_of_the_package(path):
    assert not ours(imported(path))


def test_the_pipeline_knows_only_the_two():
    modules = {name.rpartition(".")[0] for name in ours(imported(PIPELINE))}
    assert modules == {"ddpm_hf.unet.unet_ddpm_paper", "ddpm_hf.scheduler.scheduling_ddpm_paper"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_need_only_torch_numpy_and_diffusers(path):
    roots = {name.split(".")[0] for name in imported(path) - ours(imported(path))}
    assert roots <= {"torch", "numpy", "diffusers", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_no_line_of_them_looks_like_an_import(path):
    """diffusers looks for imports by regular expression, in docstrings too, and demands that they be installed."""
    found = set(re.findall(r"^\s*(?:from|import)\s+(\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE))
    statements = {name.split(".")[0] for name in imported(path)}
    assert found and found <= statements - {"ddpm_hf"}
