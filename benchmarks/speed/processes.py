"""What needs processes of its own: start-up, peak memory, and training with two processes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler
from ddpm_hf.convert import pipeline_to_stock
from ddpm_hf.runs import read_metrics

from .networks import CIFAR10, DIGITS, ROOT, build_unet, largest
from .sampling import FAST, FAST_BF16, PLAIN
from .timing import STOCK, Difference, Read, Timed, Work

NO_KERNELS = {"DDPM_HF_NATIVE": "0"}  # PyTorch's kernels alone
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FIRST_IMAGE_STEPS = 50


def run(*arguments: str, cwd: Path = ROOT, settings: Mapping[str, str] = MappingProxyType({})) -> str:
    """The standard output of this Python with `arguments`, on one thread, and `settings` in its environment.

    Raises RuntimeError where it fails.
    """
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT), **settings}
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{arguments} failed: {result.stderr[-2000:]}")
    return result.stdout


def alone(*arguments: str, settings: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """What `alone.py` reports."""
    reported = run("-m", "speed.alone", *arguments, cwd=ROOT / "benchmarks", settings=settings)
    return json.loads(reported.splitlines()[-1])


# ---- start-up ------------------------------------------------------------------------------------------------------

IMPORTS = {
    STOCK: "from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel",
    "ours": "from ddpm_hf import DDPMPaperPipeline, DDPMPaperScheduler, DDPMPaperUNet",
}
FIRST_IMAGE = """
import sys, numpy, torch
{imports}
torch.set_num_threads(1)
pipe = {pipeline}.from_pretrained(sys.argv[1])
{more}
generator = torch.Generator().manual_seed(0)
image = pipe(batch_size=1, generator=generator, num_inference_steps={steps}, output_type="np").images
numpy.save(sys.argv[2], image)
"""


def build_import(quick: bool) -> Work:
    """There are no numbers to compare; each import must succeed. This process has read the same files already."""
    nothing = Difference("nothing is computed", 0.0, 0.0)
    return Work({name: partial(run, "-c", code) for name, code in IMPORTS.items()}, lambda: [nothing], unit="process")


def build_first_image(quick: bool) -> Work:
    """From the start of Python to an image of the digits network on the disk."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    pipeline_to_stock(DDPMPaperPipeline.from_pretrained(DIGITS)).save_pretrained(root / "stock")

    def call(name: str) -> str:
        side = STOCK if name == STOCK else "ours"
        more = ""
        if name == FAST:
            more = "from ddpm_hf.inference import speed_up\npipe = speed_up(pipe)"
        pipeline = "DDPMPipeline" if name == STOCK else "DDPMPaperPipeline"
        code = FIRST_IMAGE.format(imports=IMPORTS[side], pipeline=pipeline, more=more, steps=FIRST_IMAGE_STEPS)
        return run("-c", code, str(root / "stock" if name == STOCK else DIGITS), str(root / f"{name}.npy"))

    def differences() -> list[Difference]:
        for name in (STOCK, "ours", FAST):
            call(name)
        images = {name: np.load(root / f"{name}.npy", allow_pickle=False) for name in (STOCK, "ours", FAST)}
        return [Difference(f"{name}: image", largest(images[name], images[STOCK]), 1e-4) for name in ("ours", FAST)]

    calls = {name: partial(call, name) for name in (STOCK, "ours", FAST)}
    return Work(calls, differences, unit="process", close=folder.cleanup)


# ---- peak memory ---------------------------------------------------------------------------------------------------


def peak_memory(quick: bool, *, what: str, names: tuple[str, ...], batch: int) -> dict[str, float]:
    ours = DDPMPaperPipeline(build_unet(**CIFAR10), DDPMPaperScheduler())
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(Path(folder, "ours"))
        pipeline_to_stock(ours).save_pretrained(Path(folder, "stock"))
        found = {}
        for name in (STOCK, *names):
            contestant, settings = (FAST, NO_KERNELS) if name == FAST_PLAIN_KERNELS else (name, {})
            found[name] = alone(what, contestant, folder, str(batch), settings=settings)["peak_bytes"]
        return found


# ---- two processes -------------------------------------------------------------------------------------------------


@cache
def training_images_per_s(processes: int, steps: int) -> float:
    """Of the digits' configuration, one thread in each process; the median of the lines after the first."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    if processes > 1:
        launcher += ["--master_port", "0", "--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"]
    with tempfile.TemporaryDirectory() as folder:
        options = {"output_dir": folder, "num_steps": steps, "log_every": 10, "checkpoint_every": steps}
        options |= {"sample_every": 0, "cpu_threads": 1, "ema_decay": 0.5}
        run(*launcher, "training/train.py", *(f"--{name}={value}" for name, value in options.items()))
        lines = [line["images_per_s"] for line in read_metrics(Path(folder, "metrics.jsonl"))]
    return float(np.median(lines[1:]))


def two_processes(quick: bool) -> dict[str, float]:
    steps = 60 if quick else 300
    return {"one process": training_images_per_s(1, steps), "two processes": training_images_per_s(2, steps)}


FAST_PLAIN_KERNELS = "sped up, DDPM_HF_NATIVE=0"
NEVER_ABOVE = (1.0, 1.0)
AT_MOST = {  # our float32 kernels keep Winograd's filters, which are four times as large as the weights
    PLAIN: NEVER_ABOVE,
    FAST: (1.4, 1.2),
    FAST_PLAIN_KERNELS: (1.1, 1.0),
    FAST_BF16: (1.1, 1.0),
}
PROCESSES: list[Timed | Read] = [
    Timed("start-up", "import", build_import, rounds=(11, 3)),
    Timed("start-up", f"first image of the digits, {FIRST_IMAGE_STEPS} steps", build_first_image, rounds=(11, 2)),
    *(
        Read(
            "memory",
            f"sampling, CIFAR-10 UNet, batch {batch}",
            partial(peak_memory, what="sampling", names=tuple(AT_MOST), batch=batch),
            "bytes",
            AT_MOST,
            at_most=True,
            in_quick=batch == 1,
        )
        for batch in (1, 16)
    ),
    Read(
        "memory",
        "training, CIFAR-10 UNet, batch 4",
        partial(peak_memory, what="training", names=("ours", "ours, bf16"), batch=4),
        "bytes",
        dict.fromkeys(("ours", "ours, bf16"), NEVER_ABOVE),
        at_most=True,
        in_quick=False,
    ),
    Read("processes", "training the digits", two_processes, "images/s", more_is_better=True),
]
