"""Time and memory of `load_samples` over a folder of JPEGs, of this tree and of an earlier one, with equal pixels.

    git worktree add /tmp/before f8006bc
    python benchmarks/decoding.py --before /tmp/before [--files 10000] [--sides 32 64 128 256 500 32-500]

The pictures are sums of waves with noise, in colour, quality 90, 4:2:0; `--sides 32-500` draws both sides of each
evenly from that range. Every load is a process of its own with one thread each: it lists the folder, decodes, crops,
resizes to `--resolution` and writes the cache into an empty folder. Trees take turns, and who begins alternates. Shown
are medians with quartiles of the wall time without imports, the CPU time with that of the workers, and the memory of
the largest process. The fingerprints of both trees must be equal; the exit code is 1 where they are not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LOAD = """
import json, resource, sys, time
from ddpm_hf.data import load_samples
folder, cache, resolution, num_workers = sys.argv[1:]
import torch.utils.data, diffusers
own, theirs = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
cpu = lambda: sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (own, theirs)))
cpu_before, before = cpu(), time.perf_counter()
samples = load_samples(train_data_dir=folder, resolution=int(resolution) or None, num_workers=int(num_workers),
                       max_memory_bytes=0, cache_dir=cache)
after = time.perf_counter()
memory = max(resource.getrusage(who).ru_maxrss for who in (own, theirs))
print(json.dumps({"wall_s": after - before, "cpu_s": cpu() - cpu_before, "memory_mib": memory / 1024,
                  "fingerprint": samples.fingerprint}))
"""


def write_photos(folder: Path, count: int, sides: str) -> None:
    low, _, high = sides.partition("-")
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = rng.integers(int(low), int(high or low) + 1, 2)
        y, x = np.mgrid[:height, :width] / max(height, width)
        waves = [np.sin(9 * x + phase) * np.cos(7 * y - phase) for phase in rng.uniform(0, 6, 3)]
        picture = 127 + 60 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=90)


def load(tree: Path, folder: Path, resolution: int, num_workers: int) -> dict:
    """One load by the package in `tree`, in a new process with one thread."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as cache:
        words = [sys.executable, "-c", LOAD, str(folder), cache, str(resolution), str(num_workers)]
        done = subprocess.run(words, env=environment, cwd=cache, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quartiles(values: list[float], digits: int) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def compare(before: Path, folder: Path, sides: str, args: argparse.Namespace, num_workers: int) -> None:
    """Prints one row of the table."""
    trees = {"before": before, "now": ROOT}
    rounds: dict[str, list[dict]] = {name: [] for name in trees}
    for i in range(args.rounds):
        for name in list(trees)[:: 1 if i % 2 == 0 else -1]:
            rounds[name].append(load(trees[name], folder, args.resolution, num_workers))
    if len({each["fingerprint"] for loads in rounds.values() for each in loads}) > 1:
        sys.exit(f"sides {sides}, {num_workers} workers: the pixels differ")
    columns = [sides, str(num_workers)]
    for measure, digits in (("wall_s", 2), ("cpu_s", 2), ("memory_mib", 0)):
        old, new = ([each[measure] for each in rounds[name]] for name in trees)
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        columns += [quartiles(old, digits), quartiles(new, digits), quartiles(ratios, 2)]
    print(f"| {' | '.join(columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the earlier commit")
    parser.add_argument("--files", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--sides", nargs="+", default=["32", "64", "128", "256", "500", "32-500"], help="in pixels")
    parser.add_argument("--resolution", type=int, default=64, help="0 for none; default: %(default)s")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 2], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2; default: %(default)s")
    args = parser.parse_args()
    if not (args.before / "ddpm_hf").is_dir():
        parser.error(f"--before {args.before}: no checkout of this repository")
    if args.rounds < 2 or args.files < 1:
        parser.error(f"--rounds {args.rounds} must be at least 2, and --files {args.files} at least 1")
    measures = [f"{what}, {when}" for what in ("wall s", "CPU s", "MiB") for when in ("before", "now", "ratio")]
    print(f"{args.files} files, resolution {args.resolution}, {args.rounds} rounds; median (quartiles)\n")
    print(f"| sides | workers | {' | '.join(measures)} |\n{'|---' * (len(measures) + 2)}|")
    for sides in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), args.files, sides)
            for num_workers in args.num_workers:
                compare(args.before.resolve(), Path(folder), sides, args, num_workers)


if __name__ == "__main__":
    main()
