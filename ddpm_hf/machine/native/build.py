"""kernels.cpp as a library: compiled once by the machine's own compiler, for its own CPU."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = "-std=c++17 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC"
SWITCH = "DDPM_HF_NATIVE"  # 0 in the environment: PyTorch's kernels alone
SECONDS = 120  # a compiler needs a few


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None without a compiler, on other systems than Linux, or where `DDPM_HF_NATIVE` is 0.

    The library lies in the user's cache, by the source, the compiler and the CPU it was made for.
    """
    if os.environ.get(SWITCH) == "0" or platform.system() != "Linux":
        return None
    named = os.environ.get("CXX")
    compiler = shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(Path(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        logger.warning("kernels.cpp was not compiled, so PyTorch's kernels are used (%s)", str(told).strip()[:300])
        return None


def _built(compiler: Path) -> Path:
    status = compiler.stat()
    parts = SOURCE.read_text(encoding="utf-8"), FLAGS, f"{compiler} {status.st_size} {status.st_mtime_ns}", _cpu()
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "ddpm_hf")
    path = folder / f"kernels-{key}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:  # several processes may build at once
            made = Path(temporary, path.name)
            command = [str(compiler), *FLAGS.split(), "-o", str(made), str(SOURCE)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
            made.replace(path)
    return path


def _cpu() -> str:
    """What the compiler may use: a cache can be shared by machines with other CPUs."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    wanted = "model name", "flags", "Features", "CPU part"
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
