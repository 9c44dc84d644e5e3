"""Work on ddpm_hf. Needs Python >= 3.11 on Linux or macOS (on Windows: inside WSL), and nothing else.

    python3 dev.py demo             train on the digits (once), then draw runs/digits/samples.png
    python3 dev.py test [TIER] [ARGS...]
                                    run the quick tests, or those of one tier: unit, integration, slow, docs, long.
                                    ARGS go to pytest: -k scheduler, -x
    python3 dev.py check            lint with ruff, check types with pyright and who imports whom with import-linter
    python3 dev.py install          only make or update the environment
    python3 dev.py versions lowest|newest [ARGS...]
                                    run the unit tests with the lowest versions that pyproject.toml allows, or the
                                    newest, in an environment made anew: .venv-lowest, .venv-newest

Each command but the last first brings .venv, beside this file, up to date with pyproject.toml and constraints.txt;
`demo` installs what it needs, a third of the packages, and the others add the rest.
Nothing is installed outside of them; deleting .venv and .venv-* undoes everything.
"""

import hashlib
import http.client
import importlib.util
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

# The imports above and the syntax of the whole file suit an old Python 3 too, so that it gets as far as this message.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"dev.py needs Python 3.11 or newer, and {sys.executable} is {platform.python_version()}. "
        "Install a newer Python and name it: python3.12 dev.py ..."
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
STAMP = VENV / "dev-installed"  # holds fingerprint() of what .venv was last completely installed from, and the extra
DEMO, EVERYTHING = "digits", "dev"  # extras of pyproject.toml, of which the second contains the first
CONSTRAINTS = ROOT / "constraints.txt"
# pip compiles on one core. For the demo Python compiles what it imports; the rest is compiled at once, on all cores.
PIP_INSTALL = (BIN / "python", "-m", "pip", "install", "--no-compile")
DIGITS = "runs/digits"
TIERS = {  # by pytest's markers; pyproject.toml says what they mean
    "quick": "not slow and not docs and not long",
    "unit": "not integration and not slow and not docs and not long",
    "integration": "integration and not slow and not docs and not long",
    "slow": "slow and not docs and not long",
    "docs": "docs and not long",
    "long": "long",
}
ON_ALL_CORES = ("-n", "auto", "--dist", "worksteal")
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

NEXT_COMMANDS = f"""
{DIGITS}/samples.png shows 64 digits that no one wrote. What to try next:

  source .venv/bin/activate
  ddpm-hf sample {DIGITS} --seeds 64-79 -o {DIGITS}/more.png
  ddpm-hf sample {DIGITS} --seeds 0-63 --scheduler ddim --steps 50 -o {DIGITS}/fast.png
  accelerate launch training/train.py --config training/configs/points.yaml
  accelerate launch training/train.py --config training/configs/folder64.yaml --train_data_dir YOUR_FOLDER
"""


# ---- Commands: each returns an exit code ----


def main(arguments: list[str]) -> int:
    """Run one command line (without the program's name) and return its exit code; 2 means it was not understood."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    name, *rest = arguments
    commands = {"demo": demo, "test": test, "check": check, "versions": versions, "install": install}
    if name not in commands:
        say(f"there is no command {name!r}. Choose one of: {', '.join(commands)}.")
        return 2
    if rest and name not in ("test", "versions"):
        say(f"{name!r} takes no arguments, and got: {shlex.join(rest)}. Only 'test' and 'versions' pass arguments on.")
        return 2
    if name == "versions" and (not rest or rest[0] not in ("lowest", "newest")):
        say("say which versions: python3 dev.py versions lowest, or newest.")
        return 2
    if os.name == "nt":
        say("Windows is not supported directly. Use WSL: `wsl --install`, then this command inside it.")
        return 1
    try:
        if name != "versions":
            prepare_environment(DEMO if name == "demo" else EVERYTHING)
        return commands[name](*rest)
    except KeyboardInterrupt:
        say("stopped.")
        return 130


def demo() -> int:
    """Train on the digits unless that is done, then sample from the saved checkpoint in a new process."""
    if (ROOT / DIGITS / "model_index.json").exists():
        say(f"{DIGITS} holds a trained model already, so this only samples. To train again: rm -r {DIGITS}")
    else:
        code = run(BIN / "accelerate", "launch", "training/train.py")
        if code:
            return code
    code = run(BIN / "ddpm-hf", "sample", DIGITS, "--seeds", "0-63", "-o", f"{DIGITS}/samples.png")
    if code == 0:
        print(NEXT_COMMANDS)
    return code


def test(*arguments: str) -> int:
    """Run the unit and integration tests, or the tier that is named, on all cores; else what ARGS say to pytest."""
    if not arguments or arguments[0] in TIERS:
        tier, *rest = arguments or ("quick",)
        arguments = (*ON_ALL_CORES, "-m", TIERS[tier], *rest)
    return run(BIN / "python", "-m", "pytest", *arguments)


def check() -> int:
    """Run all checkers, even when one complains. The modules of benchmarks/ are found from that folder alone."""
    return max(
        run(BIN / "python", "-m", "ruff", "check"),
        run(BIN / "python", "-m", "pyright"),
        run(BIN / "lint-imports", "--no-cache"),
        run(BIN / "lint-imports", "--no-cache", folder="benchmarks"),
    )


def versions(which: str, *arguments: str) -> int:
    """Run the unit tests in an environment made anew, with the "lowest" or the "newest" versions that are allowed.

    What the declared packages need themselves is the newest in both.
    """
    venv = ROOT / f".venv-{which}"
    python, constraints = venv / "bin" / "python", venv / "constraints.txt"
    make_venv(venv)
    chosen = lowest_allowed() if which == "lowest" else {}
    if wants_cpu_torch() and reachable(f"{CPU_WHEELS}/torch/"):
        torch = f"torch=={chosen['torch']}" if chosen else "torch"
        code = run(python, *PIP_INSTALL[1:], "--no-deps", "--index-url", CPU_WHEELS, torch)
        if code:
            return code
    elif wants_cpu_torch():
        chosen["torch"] = pinned_torch()
        say(f"PyTorch's CPU wheels are out of reach, so torch stays at {chosen['torch']}; the rest is the {which}.")
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in chosen.items()))
    code = run(python, *PIP_INSTALL[1:], "-c", str(constraints.relative_to(ROOT)), "-e", f".[{EVERYTHING}]")
    if code == 0:
        run(python, "-m", "pip", "list")
        code = run(python, "-m", "pytest", *ON_ALL_CORES, "-m", TIERS["unit"], *arguments)
    return code


def lowest_allowed() -> dict[str, str]:
    """The lowest version that pyproject.toml allows of each package it names: what follows >=."""
    import tomllib  # not at the head, where an older Python shall get as far as the message

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    matches = [re.match(r"([\w.-]+)>=([\d.]+)", line) for line in lines]
    return {match[1]: match[2] for match in matches if match}


def install() -> int:
    say("the environment is ready. To use it: source .venv/bin/activate")
    return 0


# ---- The environment ----


def prepare_environment(extra: str) -> None:
    """Make .venv and install the package with the packages of `extra`, unless they are there already.

    Raises SystemExit, after a message, when the venv cannot be made (code 1) or pip fails (pip's code).
    """
    wanted = fingerprint()
    enough = {f"{wanted} {extra}", f"{wanted} {EVERYTHING}"}
    if (BIN / "python").exists() and STAMP.is_file() and STAMP.read_text() in enough:
        return
    if not venv_works():
        make_venv()
    STAMP.unlink(missing_ok=True)
    say("installing into .venv. The first time this takes a few minutes.")
    install_cpu_torch()
    code = run(*PIP_INSTALL, "-c", CONSTRAINTS.name, "-e", f".[{extra}]")
    if code:
        say(
            "pip could not install; its last lines say why. Most often it is the network: behind a proxy set "
            "HTTPS_PROXY, with a mirror PIP_INDEX_URL. Then run the same command again."
        )
        sys.exit(code)
    if extra == EVERYTHING:  # its exit code says that some package has a template that is no Python
        run(BIN / "python", "-m", "compileall", "-qq", "-j", "0", ".venv/lib")
    STAMP.write_text(f"{wanted} {extra}")


def fingerprint() -> str:
    """Hash of all that decides what belongs into .venv: the two files, the Python version and the place."""
    place = f"{PYTHON} {VENV}".encode()
    files = (ROOT / "pyproject.toml").read_bytes(), CONSTRAINTS.read_bytes()
    return hashlib.sha256(b"\0".join([place, *files])).hexdigest()


def venv_works() -> bool:
    """Whether .venv has a pip that runs, from this place and with this Python.

    Asking the script itself finds out a venv that is missing, half made, moved here with its folder, or of another
    Python. One that merely lacks packages works: pip completes it.
    """
    try:
        answer = subprocess.run([BIN / "pip", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False
    return f"from {VENV}{os.sep}" in answer and f"(python {PYTHON})" in answer


def make_venv(venv: Path = VENV) -> None:
    """Make it from nothing. Raises SystemExit, leaving none of ours behind, when this Python cannot."""
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        sys.exit(missing_venv_message())
    anew = " anew: the one here is incomplete, moved, or of another Python." if venv == VENV and venv.exists() else "."
    say(f"making {venv.name}{anew}")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", venv], capture_output=True, text=True)
    if made.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        sys.exit(f"{made.stdout}{made.stderr}\n{missing_venv_message()}")


def missing_venv_message() -> str:
    """What to install when this Python cannot make virtual environments, in the words of its distribution."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:  # macOS, or a Linux that does not say what it is
        system = {}
    family = {system.get("ID"), *system.get("ID_LIKE", "").split()}
    if family & {"debian", "ubuntu"}:
        remedy = f"sudo apt install python{PYTHON}-venv     (for the system's own Python also: python3-venv)"
    elif family & {"fedora", "rhel"}:
        remedy = "sudo dnf install python3-libs python3-pip"
    else:
        remedy = "install your system's package with Python's venv and ensurepip modules, or a Python from python.org"
    return (
        f"{sys.executable} cannot make a virtual environment: its module venv or ensurepip is missing or broken."
        f"\n\n    {remedy}\n\nThen run the same command again."
    )


def install_cpu_torch() -> None:
    """Install torch from PyTorch's CPU index where the ordinary index would bring gigabytes of unused CUDA.

    It cannot fail: without that index the ordinary installation, which follows, brings a torch too.
    """
    version = pinned_torch()
    installed = any(VENV.glob(f"lib/python*/site-packages/torch-{version}*.dist-info"))
    if installed or not wants_cpu_torch():
        return
    if not reachable(f"{CPU_WHEELS}/torch/"):
        say("PyTorch's CPU wheels are out of reach, so torch comes from pip's ordinary index.")
        return
    # pip's complaints are hidden: if this matters, the ordinary installation will complain itself.
    index = ("--retries", "1", "--no-deps", "--index-url", CPU_WHEELS)
    run(*PIP_INSTALL, *index, f"torch=={version}", stderr=subprocess.DEVNULL)


def pinned_torch() -> str:
    """The version of torch in constraints.txt."""
    return re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)[1]


def wants_cpu_torch() -> bool:
    """Whether this is a Linux without an NVIDIA GPU. On macOS the ordinary torch has no CUDA to avoid."""
    has_gpu = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()
    return platform.system() == "Linux" and not has_gpu


def reachable(url: str) -> bool:
    """Whether a server answers within seconds, even with a refusal: it may turn urllib away and let pip in."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, http.client.HTTPException):
        return False
    return True


# ---- Processes ----


def say(text: str) -> None:
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


def run(program: Path, *arguments: str, folder: str = ".", stderr: int | None = None) -> int:
    """Print and run a command in a folder of the repository; return its exit code, 128 + n when signal n ended it."""
    place = [] if folder == "." else ["cd", folder, "&&"]
    print("$", *place, shlex.join([str(program.relative_to(ROOT)), *arguments]), flush=True)
    # With this variable each start would compile all that it imports, again and again.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    child = subprocess.Popen([program, *arguments], cwd=ROOT / folder, env=environment, stderr=stderr)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.wait()  # Ctrl-C reached the child as well: let it finish what it is saving
        raise
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
