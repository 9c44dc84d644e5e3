"""The rule of the unit tier, and what all tests start from; fixtures that files share are in tests/shared_fixtures.py.

The tiers are markers of pyproject.toml. A test without one is a unit test: quick, and in this process alone.
"""

import gc
import os
import sys
from collections.abc import Generator

import hypothesis
import pytest
from fork_server import choose_place

from ddpm_hf.machine.native import library

# What is recorded, and said of tolerances, is the CPU's: without this, training would take a GPU that is there. The
# tests of test_gpu.py ask for it. Processes that the tests start inherit it.
if "DDPM_HF_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
choose_place()

# `--hypothesis-profile many`: five times the examples of the default, where a test takes its number from the profile.
hypothesis.settings.register_profile("many", max_examples=5 * hypothesis.settings.get_profile("default").max_examples)

TIERS_THAT_MAY_START_PROCESSES = ("integration", "slow", "docs", "long")
STARTS_A_PROCESS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
running_unit_test = False


def _refuse_processes(event: str, arguments: tuple) -> None:
    """Fail a unit test that starts a process. An audit hook sees what libraries start as well, and cannot be removed.

    pytest's own exception is no `Exception`, so that code under test does not catch it by accident.
    """
    if running_unit_test and event in STARTS_A_PROCESS:
        pytest.fail(f"a unit test started a process ({event}: {arguments!r:.200}). Mark it: pytest.mark.integration")


sys.addaudithook(_refuse_processes)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Say which tier runs now, fixtures included."""
    global running_unit_test
    running_unit_test = not any(item.get_closest_marker(tier) for tier in TIERS_THAT_MAY_START_PROCESSES)
    try:
        return (yield)
    finally:
        running_unit_test = False


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests to workers does without the fixtures, whose imports take seconds."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
        library()  # compiled before the tests, of which the quick ones start no process


def pytest_collection_finish() -> None:
    """Leave out of garbage collections what was imported: a million objects, again and again."""
    gc.collect()
    gc.freeze()
