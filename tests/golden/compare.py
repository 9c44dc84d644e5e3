"""The numbers of two trees beside each other: the commit before the modules became packages, and this one.

    python tests/golden/compare.py             commit f8006bc and the working tree
    python tests/golden/compare.py COMMIT      commit f8006bc and another

Both compute on this machine with this interpreter: six small trainings by training/train.py, samples under four
schedulers, the bound's terms, and a compressed file of f8006bc that both decode. Every quantity must be equal bit for
bit, or to 2e-6 of its largest entry: that is what float32 sums lose when they are taken in another order. Exit code 1
where one is not, 2 where nothing could be compared. Seven minutes of CPU time; needs the history of the repository.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
BEFORE = "f8006bc"
TOLERANCE = 2e-6
PROCESSES_AT_ONCE = 2

IMAGES = {
    "dataset_name": "digits",
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "attention_resolutions": [4],
    "norm_num_groups": 4,
    "num_train_timesteps": 20,
    "beta_end": 0.5,
    "global_batch_size": 32,
    "num_steps": 40,
    "learning_rate": 2e-3,
    "warmup_steps": 10,
    "ema_decay": 0.9,
    "log_every": 1,
    "sample_every": 0,
    "cpu_threads": 1,
}
REGULARIZED = {**IMAGES, "dropout": 0.1, "random_flip": True}
TRAININGS: dict[str, dict[str, Any]] = {
    "two processes with accumulation": {**REGULARIZED, "gradient_accumulation_steps": 2},
    "epsilon": REGULARIZED,
    "v": {**REGULARIZED, "prediction_type": "v_prediction", "variance_type": "fixed_small"},
    "learned variance, loss history": {
        **IMAGES,
        "objective": "vlb",
        "variance_type": "learned",
        "timestep_sampling": "loss_history",
    },
    "points": {**IMAGES, "dataset_name": "moons", "hidden_size": 32, "num_layers": 2},
    "bf16": {**REGULARIZED, "mixed_precision": "bf16"},
}
SAMPLINGS = {
    "DDPM (ours)": [],
    "DDIM": ["--scheduler", "ddim", "--steps", "50"],
    "DPM-Solver++": ["--scheduler", "dpmsolver++", "--steps", "20"],
    "UniPC": ["--scheduler", "unipc", "--steps", "20"],
    "speed_up": ["--fast", "--steps", "100"],
}


# ---- inside a tree: what runs with the package of one of the two ---------------------------------------------------


def inside(tree: Path, what: str, *arguments: str) -> None:
    """Run with the package of `tree`, and with no other: an installed one would make all comparisons equal."""
    import ddpm_hf

    if not Path(ddpm_hf.__file__).is_relative_to(tree):
        sys.exit(f"compare.py: this process has imported {ddpm_hf.__file__}, which is not in {tree}")
    if what == "train":
        script = tree / "training" / "train.py"
        sys.argv = [str(script), *arguments]
        runpy.run_path(str(script), run_name="__main__")
    else:
        draw(tree, *map(Path, arguments))


def draw(tree: Path, output: Path, coded: Path) -> None:
    """Samples, the bound's terms and the codec, by the command line and the public functions that both trees have."""
    import torch

    from ddpm_hf import DDPMPaperPipeline, inference
    from ddpm_hf.cli import main
    from ddpm_hf.data import load_samples, to_model_range
    from ddpm_hf.likelihood import bits_per_dim

    torch.set_num_threads(1)
    card = str(tree / "model_cards" / "ddpm-digits")
    sped_up_unless_told = hasattr(inference, "can_speed_up")  # of f8006bc only what --fast asks for
    for name, options in SAMPLINGS.items():
        if sped_up_unless_told and "--fast" not in options:
            options = [*options, "--no-fast"]
        main(["sample", card, "--seeds", "0-7", *options, "-o", str(output / f"{name}.npy")])

    samples = load_samples("digits", split="test")
    x_start = to_model_range(samples.batch(np.arange(2), None), samples.num_levels)
    pipe = DDPMPaperPipeline.from_pretrained(card)
    bound = bits_per_dim(pipe.unet, pipe.scheduler, x_start, seed=0, num_levels=samples.num_levels)
    np.savez(output / "bound.npz", **{name: value.numpy() for name, value in bound._asdict().items()})

    images = output / "images"
    images.mkdir()
    write_images(images, samples.array[:4] * np.uint8(15))
    main(["compress", card, str(images), "--steps", "8", "--fit_images", "2", "-o", str(output / "images.ddpm")])
    main(["decompress", card, str(coded), "-o", str(output / "decoded.npy")])


def write_images(folder: Path, levels: np.ndarray) -> None:
    from PIL import Image

    for i, image in enumerate(levels):
        Image.fromarray(image[0]).save(folder / f"{i}.png")


# ---- both trees ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The commit's files, while this lasts."""
    found = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True)
    if found.returncode:
        print(
            f"compare.py: there is no commit {commit} in {ROOT}. It takes a clone with the whole history: "
            "git fetch --unshallow",
            file=sys.stderr,
        )
        sys.exit(2)
    add = ["git", "worktree", "add", "--quiet", "--detach", str(folder), commit]
    subprocess.run(add, cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def run_inside(tree: Path, output: Path, what: str, *arguments: str, num_processes: int = 1) -> None:
    """Start `inside` as a process of its own, or several that train together; where it fails, print why and exit."""
    output.mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [*(launcher if num_processes > 1 else []), __file__, "--inside", str(tree), what, *arguments]
    settings = {"PYTHONPATH": str(tree), "DDPM_HF_CACHE": str(output / "cache"), "OMP_NUM_THREADS": "1"}
    settings |= {"CUDA_VISIBLE_DEVICES": "", "DDPM_HF_NATIVE": "0", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=output,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(f"compare.py: {tree} failed: {' '.join(command)}\n{done.stdout[-4000:]}", file=sys.stderr)
        sys.exit(2)


def train(tree: Path, output: Path, name: str) -> None:
    words = []
    for option, value in {"output_dir": output / "run", **TRAININGS[name]}.items():
        words += [f"--{option}", *map(str, value)] if isinstance(value, list) else [f"--{option}={value}"]
    run_inside(tree, output, "train", *words, num_processes=2 if name.startswith("two processes") else 1)


def compute(trees: dict[str, Path], folder: Path) -> None:
    """Everything for both trees: `folder/<tree>/<what>`."""
    coded = folder / "before" / "draw" / "images.ddpm"

    def draw_with(side: str) -> None:
        if side == "after":
            drawn.result()  # this one decodes the file that the other wrote
        run_inside(trees[side], folder / side / "draw", "draw", str(folder / side / "draw"), str(coded))

    with ThreadPoolExecutor(PROCESSES_AT_ONCE) as pool:
        drawn = pool.submit(draw_with, "before")
        jobs = [pool.submit(train, tree, folder / side / n, n) for n in TRAININGS for side, tree in trees.items()]
        jobs += [drawn, pool.submit(draw_with, "after")]
        done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)  # where one has failed
        for job in done:
            job.result()


# ---- what is compared ----------------------------------------------------------------------------------------------


def quantities(folder: Path) -> dict[str, list[np.ndarray]]:
    """All that one tree computed, by name."""
    found: dict[str, list[np.ndarray]] = {}
    for name in TRAININGS:
        run = folder / name / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for key in ("loss", "grad_norm", "learning_rate"):
            found[f"{name}: {key}"] = [np.array([line[key] for line in lines])]
        state = run / "checkpoints" / f"step-{TRAININGS[name]['num_steps']}" / "train_state"
        for path in sorted(state.glob("*.safetensors")):
            found[f"{name}: {path.stem}"] = [tensor for _, tensor in sorted(load_file(path).items())]
    for name in SAMPLINGS:
        found[f"8 samples, {name}"] = [np.load(folder / "draw" / f"{name}.npy")]
    with np.load(folder / "draw" / "bound.npz") as bound:
        found |= {f"bound of 2 digits: {name}": [bound[name]] for name in bound.files}
    found["compressed file, its bytes"] = [np.frombuffer((folder / "draw" / "images.ddpm").read_bytes(), np.uint8)]
    found[f"images decoded from the file of {BEFORE}"] = [np.load(folder / "draw" / "decoded.npy")]
    return found


def difference(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """max |after − before| / max |before|, of the array where it is largest; inf where shapes or types differ."""
    if [(x.shape, x.dtype) for x in before] != [(x.shape, x.dtype) for x in after] or not before:
        return math.inf
    relative = [0.0]
    for old, new in zip(before, after, strict=True):
        if old.tobytes() != new.tobytes():
            old, new = old.astype(np.float64), new.astype(np.float64)
            error = np.abs(new - old).max() / (np.abs(old).max() or 1.0)
            relative.append(float(error) if np.isfinite(error) else math.inf)
    return max(relative)


def report(before: dict[str, list[np.ndarray]], after: dict[str, list[np.ndarray]]) -> int:
    """Print the table; the exit code."""
    code = 0
    print(f"{'quantity':<46} {'numbers':>8}  {'sha256':<12}  {'of the other':<12}  verdict")
    for name in before | after:
        old, new = before.get(name, []), after.get(name, [])
        relative = difference(old, new)
        verdict = f"differ by {relative:.1e} at most" if sha256(old) != sha256(new) else "equal bit for bit"
        if not relative <= TOLERANCE:
            verdict, code = f"{verdict}: DIFFERENT", 1
        print(f"{name:<46} {sum(x.size for x in old):>8}  {sha256(old)}  {sha256(new)}  {verdict}")
    return code


def sha256(arrays: list[np.ndarray]) -> str:
    """The hash's beginning."""
    return hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest()[:12]


def main() -> int:
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), *sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="compare this one with f8006bc, not the working tree")
    commit = parser.parse_args().commit
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        trees = {"before": stack.enter_context(checked_out(BEFORE, folder / "tree-before")), "after": ROOT}
        if commit:
            trees["after"] = stack.enter_context(checked_out(commit, folder / "tree-after"))
        compute(trees, folder / "computed")
        before, after = (quantities(folder / "computed" / side) for side in trees)
    return report(before, after)


if __name__ == "__main__":
    sys.exit(main())
