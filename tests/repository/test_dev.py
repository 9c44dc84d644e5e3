"""dev.py: without a network, and without installing anything. Each test runs a copy of it in a folder of its own."""

import http.server
import importlib.util
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.integration

DEV_PY = Path(__file__).parents[2] / "dev.py"


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of dev.py as a module, beside a small pyproject.toml and constraints.txt. Its .venv is yet to be made."""
    tree = tmp_path.resolve()
    shutil.copy(DEV_PY, tree)
    (tree / "pyproject.toml").write_text("[project]\n")
    (tree / "constraints.txt").write_text("numpy==1.0\ntorch==1.2.3\n")
    spec = importlib.util.spec_from_file_location("dev_copy", tree / "dev.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "wants_cpu_torch", lambda: False)
    return module


def add_program(dev: ModuleType, name: str, body: str = "") -> None:
    """Put a shell script into .venv/bin. It appends its name and arguments to the file `calls`, then runs `body`."""
    dev.BIN.mkdir(parents=True, exist_ok=True)
    script = dev.BIN / name
    script.write_text(f'#!/bin/sh\necho "{name} $*" >> "{dev.ROOT}/calls"\n{body}\n')
    script.chmod(0o755)


def add_venv(dev: ModuleType, python_body: str = "") -> None:
    """A venv of shell scripts that dev.py takes for a working one."""
    add_program(dev, "python", python_body)
    add_program(dev, "pip", f'echo "pip 99 from {dev.VENV}/lib/site-packages/pip (python {dev.PYTHON})"')


def calls(dev: ModuleType) -> list[str]:
    """What the programs of add_program were called with, but for `pip --version` and the compilation."""
    log = dev.ROOT / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if line not in ("pip --version", COMPILATION)]


INSTALLATION = "python -m pip install --no-compile -c constraints.txt -e .[dev]"
COMPILATION = "python -m compileall -qq -j 0 .venv/lib"
FOR_THE_DEMO = INSTALLATION.replace("dev", "digits")


# ---- The environment ----


def test_installs_once_and_again_when_a_file_changes(dev):
    add_venv(dev)
    dev.prepare_environment("dev")
    dev.prepare_environment("dev")
    assert calls(dev) == [INSTALLATION]

    for name in ("pyproject.toml", "constraints.txt"):
        with (dev.ROOT / name).open("a") as file:
            file.write("# changed\n")
        before = len(calls(dev))
        dev.prepare_environment("dev")
        dev.prepare_environment("dev")
        assert calls(dev)[before:] == [INSTALLATION], name


def test_the_demo_installs_less_and_the_others_add_the_rest(dev):
    add_venv(dev)
    add_program(dev, "accelerate")
    add_program(dev, "ddpm-hf")
    for name in ("demo", "demo", "test", "demo", "install"):
        dev.main([name])
    installed = [call for call in calls(dev) if " install " in call]
    assert installed == [FOR_THE_DEMO, INSTALLATION]


@pytest.mark.parametrize(("extra", "times"), [("digits", 0), ("dev", 1)])
def test_only_the_whole_environment_is_compiled(dev, extra, times):
    add_venv(dev, 'case "$*" in *compileall*) exit 1;; esac')  # as for a template of some package
    dev.prepare_environment(extra)
    assert (dev.ROOT / "calls").read_text().count(COMPILATION) == times
    assert dev.STAMP.exists()


def test_a_change_after_the_demo_installs_what_the_demo_needs(dev):
    add_venv(dev)
    dev.prepare_environment("dev")
    dev.CONSTRAINTS.write_text("torch==1.2.4\n")
    dev.prepare_environment("digits")
    dev.prepare_environment("dev")
    assert calls(dev) == [INSTALLATION, FOR_THE_DEMO, INSTALLATION]


def test_the_extra_of_the_demo_is_part_of_the_rest(dev):
    """Else "dev" in the stamp would promise more than there is."""
    extras = tomllib.loads((DEV_PY.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for line in extras[extra]:
            inner = re.fullmatch(r"ddpm_hf\[(.+)\]", line)
            found |= set().union(*map(packages, inner[1].split(","))) if inner else {line}
        return found

    assert packages(dev.DEMO) < packages(dev.EVERYTHING)


def test_fingerprint_depends_on_python_and_place(dev, monkeypatch):
    first = dev.fingerprint()
    monkeypatch.setattr(dev, "PYTHON", "3.99")
    second = dev.fingerprint()
    monkeypatch.setattr(dev, "VENV", dev.ROOT / "elsewhere")
    assert len({first, second, dev.fingerprint()}) == 3


def test_failed_pip_passes_its_code_on_and_is_repeated(dev, capfd):
    add_venv(dev, "echo the reason >&2; exit 7")
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            dev.prepare_environment("dev")
        assert stopped.value.code == 7
        assert not dev.STAMP.exists()
    assert calls(dev) == [INSTALLATION] * 2
    error = capfd.readouterr().err
    assert "the reason" in error and "HTTPS_PROXY" in error


def test_interrupted_reinstallation_is_repeated(dev):
    """A stamp of an earlier installation must not vouch for one that was broken off."""
    add_venv(dev)
    dev.prepare_environment("dev")
    constraints = dev.CONSTRAINTS.read_text()
    dev.CONSTRAINTS.write_text(constraints + "new==1\n")
    add_venv(dev, "exit 1")
    with pytest.raises(SystemExit):
        dev.prepare_environment("dev")
    dev.CONSTRAINTS.write_text(constraints)
    add_venv(dev)
    dev.prepare_environment("dev")
    assert calls(dev) == [INSTALLATION] * 3


@pytest.mark.parametrize(
    ("location", "python", "works"),
    [("{venv}/lib", "{python}", True), ("/moved/.venv/lib", "{python}", False), ("{venv}/lib", "3.99", False)],
)
def test_venv_works_only_in_its_place_and_with_this_python(dev, location, python, works):
    location, python = location.format(venv=dev.VENV), python.format(python=dev.PYTHON)
    add_program(dev, "pip", f'echo "pip 99 from {location}/site-packages/pip (python {python})"')
    assert dev.venv_works() is works


def test_half_made_venv_is_made_anew(dev, monkeypatch):
    add_program(dev, "python")  # and no pip
    made = []
    monkeypatch.setattr(dev, "make_venv", lambda: (made.append(True), add_venv(dev)))
    dev.prepare_environment("dev")
    assert made == [True] and calls(dev) == [INSTALLATION]


def test_venv_that_cannot_be_made_is_removed(dev, monkeypatch):
    """Debian's venv module without its package fails after it has made half of .venv."""

    def half_make(command: list, **_) -> subprocess.CompletedProcess:
        add_program(dev, "python")
        return subprocess.CompletedProcess(command, 1, stdout="ensurepip is not available", stderr="")

    monkeypatch.setattr(dev.subprocess, "run", half_make)
    with pytest.raises(SystemExit, match="ensurepip is not available") as stopped:
        dev.make_venv()
    assert dev.missing_venv_message() in stopped.value.code
    assert not dev.VENV.exists()


def test_missing_ensurepip_is_explained(dev):
    (dev.ROOT / "sitecustomize.py").write_text("import sys\nsys.modules['ensurepip'] = None\n")
    environment = os.environ | {"PYTHONPATH": str(dev.ROOT)}
    done = subprocess.run(
        [sys.executable, "dev.py", "install"], cwd=dev.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ensurepip" in done.stderr and "Traceback" not in done.stderr
    assert not dev.VENV.exists()


@pytest.mark.parametrize(
    ("system", "remedy"),
    [
        ({"ID": "debian"}, "sudo apt install python{python}-venv"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "sudo apt install python{python}-venv"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "sudo dnf install"),
        ({"ID": "other"}, "python.org"),
        (None, "python.org"),
    ],
)
def test_missing_ensurepip_names_the_package(dev, monkeypatch, system, remedy):
    def os_release() -> dict[str, str]:
        if system is None:
            raise OSError("no os-release")
        return system

    monkeypatch.setattr(platform, "freedesktop_os_release", os_release)
    assert remedy.format(python=dev.PYTHON) in dev.missing_venv_message()


# ---- Which torch ----


@pytest.mark.parametrize(
    ("system", "nvidia_smi", "expected"),
    [("Linux", None, True), ("Linux", "/usr/bin/nvidia-smi", False), ("Darwin", None, False)],
)
def test_cpu_torch_is_for_linux_without_gpu(dev, monkeypatch, system, nvidia_smi, expected):
    monkeypatch.undo()  # the fixture's wants_cpu_torch
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(shutil, "which", lambda name: {"nvidia-smi": nvidia_smi}[name])
    monkeypatch.setattr(Path, "exists", lambda path: False)  # /proc/driver/nvidia
    assert dev.wants_cpu_torch() is expected


def test_nvidia_driver_without_tools_is_a_gpu(dev, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "exists", lambda path: path == Path("/proc/driver/nvidia"))
    assert dev.wants_cpu_torch() is False


def test_unreachable_cpu_index_falls_through_in_one_line(dev, monkeypatch, capfd):
    monkeypatch.setattr(dev, "wants_cpu_torch", lambda: True)
    monkeypatch.setattr(dev, "CPU_WHEELS", "http://127.0.0.1:1")  # no one listens there
    add_venv(dev)
    dev.install_cpu_torch()
    assert calls(dev) == []
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1

    dev.prepare_environment("dev")
    assert calls(dev) == [INSTALLATION] and dev.STAMP.exists()


@pytest.mark.parametrize("python_body", ["", "echo noise >&2; exit 1"])
def test_reachable_cpu_index_is_tried_first(dev, monkeypatch, capfd, python_body):
    """When pip then fails all the same, it is quiet, and the ordinary installation follows."""
    monkeypatch.setattr(dev, "wants_cpu_torch", lambda: True)
    monkeypatch.setattr(dev, "reachable", lambda url: url == f"{dev.CPU_WHEELS}/torch/")
    add_venv(dev, f'case "$*" in *--index-url*) {python_body or ":"};; esac')
    dev.prepare_environment("dev")
    first, second = calls(dev)
    assert first.startswith("python -m pip install") and first.endswith("torch==1.2.3")
    assert "--no-deps" in first and f"--index-url {dev.CPU_WHEELS}" in first
    assert second == INSTALLATION
    assert "noise" not in capfd.readouterr().err


def test_installed_torch_is_kept(dev, monkeypatch):
    monkeypatch.setattr(dev, "wants_cpu_torch", lambda: True)
    monkeypatch.setattr(dev, "reachable", lambda url: pytest.fail("asked the network for what is installed"))
    (dev.VENV / f"lib/python{dev.PYTHON}/site-packages/torch-1.2.3+cpu.dist-info").mkdir(parents=True)
    add_venv(dev)
    dev.install_cpu_torch()
    assert calls(dev) == []


def test_reachable_means_that_a_server_answers(dev, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        monkeypatch.setattr(server.RequestHandlerClass, "log_message", lambda *_: None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert dev.reachable(url)
        assert dev.reachable(f"{url}/refused")  # a server that turns this client away may let pip in
        server.shutdown()
    assert not dev.reachable(url)


def test_constraints_pin_torch_without_a_local_tag():
    lines = (DEV_PY.parent / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("torch==")] == ["torch==2.13.0"]


# ---- Commands ----


@pytest.fixture
def ready(dev: ModuleType) -> ModuleType:
    """`dev` with an environment that is up to date."""
    add_venv(dev)
    dev.STAMP.write_text(f"{dev.fingerprint()} dev")
    return dev


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(dev, capsys, arguments):
    assert dev.main(arguments) == 0
    help_text = capsys.readouterr().out
    assert all(f"dev.py {command} " in help_text for command in ("demo", "test", "check", "install", "versions"))
    assert not dev.VENV.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tset"], "'tset'"),
        (["demo", "--fast"], "--fast"),
        (["versions"], "lowest, or newest"),
        (["versions", "oldest"], "lowest, or newest"),
    ],
)
def test_what_is_not_understood_is_named(dev, capsys, arguments, named):
    assert dev.main(arguments) == 2
    assert named in capsys.readouterr().err
    assert not dev.VENV.exists()


ON_ALL_CORES = "python -m pytest -n auto --dist worksteal -m "


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "not slow and not docs and not long"),
        (["unit"], "not integration and not slow and not docs and not long"),
        (["slow", "-x"], "slow and not docs and not long -x"),
        (["docs"], "docs and not long"),
    ],
)
def test_a_tier_runs_on_all_cores(ready, words, expected):
    assert ready.main(["test", *words]) == 0
    assert calls(ready) == [ON_ALL_CORES + expected]


def test_the_tiers_are_the_markers_of_pytest(dev):
    """Each test is in one tier: its markers' first of long, docs, slow, integration, or unit."""
    options = tomllib.loads((DEV_PY.parent / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {line.partition(":")[0] for line in options["markers"]}
    assert markers == {"integration", "slow", "docs", "long"}
    assert dev.TIERS["quick"] in options["addopts"]
    tiers = [name for name in dev.TIERS if name != "quick"]
    for chosen in itertools.product([False, True], repeat=len(markers)):
        marked = dict(zip(markers, chosen, strict=True))
        held = {name for name, rule in dev.TIERS.items() if eval(rule, {}, dict(marked))}
        assert len(held & set(tiers)) == 1
        assert ("quick" in held) == bool(held & {"unit", "integration"})


def test_test_passes_arguments_and_exit_code_on(ready):
    add_program(ready, "python", "exit 5")
    assert ready.main(["test", "-m", "slow", "-k", "a b"]) == 5
    assert calls(ready) == ["python -m pytest -m slow -k a b"]


@pytest.mark.parametrize("complains", [None, "ruff", "pyright", "lint-imports"])
def test_check_runs_all_and_fails_when_one_does(ready, complains):
    add_program(ready, "python", f'case "$*" in *{complains}*) exit 3;; esac')
    add_program(ready, "lint-imports", f"exit {3 * (complains == 'lint-imports')}")
    (ready.ROOT / "benchmarks").mkdir()
    assert ready.main(["check"]) == (3 if complains else 0)
    assert calls(ready) == ["python -m ruff check", "python -m pyright", *["lint-imports --no-cache"] * 2]


TRAINING = "accelerate launch training/train.py"
SAMPLING = "ddpm-hf sample runs/digits --seeds 0-63 -o runs/digits/samples.png"


def test_demo_trains_once(ready, capsys):
    add_program(ready, "accelerate", "mkdir -p runs/digits && touch runs/digits/model_index.json")
    add_program(ready, "ddpm-hf")
    assert ready.main(["demo"]) == 0
    assert "try next" in capsys.readouterr().out
    assert ready.main(["demo"]) == 0
    assert "To train again: rm -r runs/digits" in capsys.readouterr().err
    assert calls(ready) == [TRAINING, SAMPLING, SAMPLING]


@pytest.mark.parametrize(("training", "sampling", "ran"), [(3, 0, [TRAINING]), (0, 4, [TRAINING, SAMPLING])])
def test_demo_passes_a_failure_on(ready, capsys, training, sampling, ran):
    add_program(ready, "accelerate", f"exit {training}")
    add_program(ready, "ddpm-hf", f"exit {sampling}")
    assert ready.main(["demo"]) == training + sampling
    assert calls(ready) == ran
    assert "try next" not in capsys.readouterr().out


def test_install_says_how_to_activate(ready, capsys):
    assert ready.main(["install"]) == 0
    assert "source .venv/bin/activate" in capsys.readouterr().err


def test_environment_variables_reach_the_child(ready, monkeypatch):
    """But for the one that would have every start compile all that it imports."""
    monkeypatch.setenv("DDPM_HF_TEST", "seen")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    add_program(ready, "python", 'echo "$DDPM_HF_TEST in $PWD$PYTHONDONTWRITEBYTECODE" >> calls')
    ready.main(["test"])
    assert calls(ready)[-1] == f"seen in {ready.ROOT}"


def test_child_ended_by_a_signal_fails_as_in_a_shell(ready):
    add_program(ready, "python", "kill -9 $$")
    assert ready.main(["test"]) == 128 + 9


@pytest.mark.slow
def test_interrupt_waits_for_the_child_and_shows_no_stack(ready):
    """Ctrl-C reaches dev.py and its child together; a child that saves its work is left the time to."""
    save_on_interrupt = "trap 'sleep 1; echo saved >> calls; exit 0' INT"
    add_program(ready, "python", f"{save_on_interrupt}\nsleep 0.2; echo up\nfor i in $(seq 100); do sleep 0.1; done")
    with (
        (ready.ROOT / "error").open("w") as error,
        subprocess.Popen(
            [sys.executable, "dev.py", "test"],
            cwd=ready.ROOT,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=error,
            # what a script starts in the background ignores it, and so do these tests then, and their children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        assert process.stdout
        while process.stdout.readline() != "up\n":
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert calls(ready)[-1] == "saved"
    printed = (ready.ROOT / "error").read_text()
    assert "Traceback" not in printed and "stopped" in printed


# ---- Other versions ----


BOUNDS = """
[project]
dependencies = ["torch>=2.6,<3", "pyyaml>=6"]
[project.optional-dependencies]
dev = ["ddpm_hf[train]", "build>=1.2.1"]
train = ["datasets>=5,<6"]
"""


@pytest.fixture
def other(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`dev` with bounds, and environments of shell scripts."""

    def make_venv(venv: Path) -> None:
        monkeypatch.setattr(dev, "BIN", venv / "bin")
        add_program(
            dev, "python", f'case "$*" in *pytest*) exit 4;; *" -c "*) cat {venv}/constraints.txt >> calls;; esac'
        )

    (dev.ROOT / "pyproject.toml").write_text(BOUNDS)
    monkeypatch.setattr(dev, "make_venv", make_venv)
    return dev


TESTS = ON_ALL_CORES + "not integration and not slow and not docs and not long"


@pytest.mark.parametrize(
    ("which", "has_index", "torch", "constraints"),
    [
        ("lowest", True, "torch==2.6", ["torch==2.6", "pyyaml==6", "build==1.2.1", "datasets==5"]),
        ("newest", True, "torch", []),
        ("lowest", False, None, ["torch==1.2.3", "pyyaml==6", "build==1.2.1", "datasets==5"]),
        ("newest", False, None, ["torch==1.2.3"]),
    ],
)
def test_other_versions_run_the_unit_tests(other, monkeypatch, capsys, which, has_index, torch, constraints):
    """Without PyTorch's CPU index torch stays as it is pinned, which is said; else its gigabytes would come."""
    monkeypatch.setattr(other, "wants_cpu_torch", lambda: True)
    monkeypatch.setattr(other, "reachable", lambda url: has_index)
    assert other.main(["versions", which, "-x"]) == 4
    index = [f"python -m pip install --no-compile --no-deps --index-url {other.CPU_WHEELS} {torch}"] if torch else []
    install = f"python -m pip install --no-compile -c .venv-{which}/constraints.txt -e .[dev]"
    assert calls(other) == [*index, install, *constraints, "python -m pip list", f"{TESTS} -x"]
    assert ("torch stays at 1.2.3" in capsys.readouterr().err) == (not has_index)
    assert not other.VENV.exists()


def test_other_versions_that_cannot_be_installed_are_not_tested(other):
    add_program(other, "python")
    other.make_venv = lambda venv: (setattr(other, "BIN", venv / "bin"), add_program(other, "python", "exit 7"))
    assert other.main(["versions", "newest"]) == 7
    assert [call for call in calls(other) if "pytest" in call] == []


def test_every_bound_of_the_lowest_versions_is_written_as_one_version():
    """Else `versions lowest` would leave a package at its newest."""
    project = tomllib.loads((DEV_PY.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [line for line in [*project["dependencies"], *itertools.chain(*extras)] if "ddpm_hf[" not in line]
    assert len(lines) > 30
    for line in lines:
        assert re.match(r"[\w.-]+>=\d[\d.]*(,|$)", line), line
