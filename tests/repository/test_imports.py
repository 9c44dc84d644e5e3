"""Who may import whom (one way only), and what the files that travel in checkpoints may lean on."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ddpm_hf"
UNET = PACKAGE / "unet" / "unet_ddpm_paper.py"
SCHEDULER = PACKAGE / "scheduler" / "scheduling_ddpm_paper.py"
PIPELINE = PACKAGE / "pipeline_ddpm_paper.py"
SHIPPED = [UNET, SCHEDULER, PIPELINE]
SOURCES = [
    path for name in ("ddpm_hf", "training", "tests", "benchmarks") for path in sorted((ROOT / name).rglob("*.py"))
] + [ROOT / "dev.py"]


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that the file at `path` imports, anywhere in it."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def within(names: set[str], *modules: str) -> set[str]:
    """Those of `names` that are one of `modules` or lie inside it."""
    return {name for name in names if any(name == module or name.startswith(module + ".") for module in modules)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_relative_imports_are_resolved():
    assert "ddpm_hf.unet.unet_ddpm_paper.DDPMPaperUNet" in imported(PIPELINE)
    assert "ddpm_hf.pictures.image_grid" in imported(PACKAGE / "cli.py")


@pytest.mark.parametrize("path", [UNET, SCHEDULER], ids=name_of)
def test_unet_and_scheduler_know_nothing_of_the_package(path):
    assert not within(imported(path), "ddpm_hf")


def test_the_pipeline_knows_only_the_two():
    allowed = {"ddpm_hf.unet.unet_ddpm_paper", "ddpm_hf.scheduler.scheduling_ddpm_paper"}
    ours = within(imported(PIPELINE), "ddpm_hf")
    assert ours and ours == within(ours, *allowed)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name_of)
def test_the_library_imports_neither_the_command_line_nor_training(path):
    assert not within(imported(path), "ddpm_hf.cli", "training", "tests", "benchmarks", "dev")


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_shipped_files_need_only_torch_numpy_and_diffusers(path):
    roots = {name.split(".")[0] for name in imported(path)} - {"ddpm_hf"}  # the pipeline's two, relative
    assert roots <= {"torch", "numpy", "diffusers", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_shipped_files_hold_no_line_that_diffusers_takes_for_an_import(path):
    """diffusers looks for imports by regular expression, in docstrings too, and demands that they be installed."""
    lines = path.read_text(encoding="utf-8")
    found = set(re.findall(r"^\s*(?:from|import)\s+(\w+)", lines, flags=re.MULTILINE))
    statements = {name.split(".")[0] for name in imported(path)}
    assert found and found <= statements - {"ddpm_hf"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_torchvision_is_used_nowhere(path):
    assert not within(imported(path), "torchvision")


def test_no_module_is_a_drawer_for_odds_and_ends():
    assert not {path.name for path in SOURCES} & {"utils.py", "helpers.py", "common.py", "misc.py"}
