"""Time and memory of `load_samples` over a folder of JPEGs, of this tree and of an earlier one, with equal pixels.

    git worktree add /tmp/before f8006bc
    python benchmarks/decoding.py --before /tmp/before [--files 10000] [--sides 32 64 250 500 32-500]
    python benchmarks/decoding.py --before /tmp/before --output benchmarks/results/decoding.json    # half an hour
    python benchmarks/decoding.py --table benchmarks/results/decoding.json      # print the table, renew docs/speed.md

The pictures are sums of waves with noise, in colour, quality 90, 4:2:0; `--sides 32-500` draws both sides of each
evenly from that range. Every load is a process of its own with one thread each: it lists the folder, decodes, crops,
resizes to `--resolution` and writes the cache into an empty folder. Trees take turns, and who begins alternates. Shown
are medians with quartiles of the wall time without imports, the CPU time with that of the workers, and the memory of
the largest process. The fingerprints of both trees must be equal; the exit code is 1 where they are not. `--output`
replaces rows of the same sides and workers in a file that is there, so that large sides can have fewer rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from speed import decoding_tables, report
from speed.documents import show

ROOT = Path(__file__).resolve().parent.parent
LOAD = """
import json, pathlib, resource, sys, time
from ddpm_hf.data import load_samples
folder, cache, resolution, num_workers = sys.argv[1:]
import torch.utils.data, diffusers
own, theirs = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
cpu = lambda: sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (own, theirs)))
cpu_before, before = cpu(), time.perf_counter()
samples = load_samples(train_data_dir=folder, resolution=int(resolution) or None, num_workers=int(num_workers),
                       max_memory_bytes=0, cache_dir=cache)
after = time.perf_counter()
status = pathlib.Path("/proc/self/status").read_text()  # ru_maxrss would begin with what the benchmark itself has
memory = max(int(status.split("VmHWM:")[1].split()[0]), resource.getrusage(theirs).ru_maxrss)
print(json.dumps({"wall_s": after - before, "cpu_s": cpu() - cpu_before, "memory_mib": memory / 1024,
                  "fingerprint": samples.fingerprint}))
"""


def write_photos(folder: Path, count: int, sides: str) -> None:
    low, _, high = sides.partition("-")
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = rng.integers(int(low), int(high or low) + 1, 2)
        y, x = (np.arange(size, dtype=np.float32) / max(height, width) for size in (height, width))
        waves = [np.outer(np.cos(7 * y - phase), np.sin(9 * x + phase)) for phase in rng.uniform(0, 6, 3)]
        noise = rng.standard_normal((height, width, 3), np.float32)
        picture = 127 + 60 * np.stack(waves, -1) + 12 * noise
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


def compare(before: Path, folder: Path, sides: str, args: argparse.Namespace, num_workers: int) -> dict[str, Any]:
    """One row: the quartiles of each measure before and now, and of their ratio within a round."""
    trees = {"before": before, "now": ROOT}
    rounds: dict[str, list[dict]] = {name: [] for name in trees}
    for i in range(args.rounds):
        for name in list(trees)[:: 1 if i % 2 == 0 else -1]:
            rounds[name].append(load(trees[name], folder, args.resolution, num_workers))
    if len({each["fingerprint"] for loads in rounds.values() for each in loads}) > 1:
        sys.exit(f"sides {sides}, {num_workers} workers: the pixels differ")
    row: dict[str, Any] = {"sides": sides, "num_workers": num_workers, "rounds": args.rounds, "files": args.files}
    for measure in decoding_tables.MEASURES:
        old, new = ([each[measure] for each in rounds[name]] for name in trees)
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        for name, values in (("before", old), ("now", new), ("ratio", ratios)):
            row[f"{measure}_{name}"] = [round(value, 4) for value in statistics.quantiles(values, n=4)]
    return row | {"resolution": args.resolution}


def kept(output: Path | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Results with these rows, and in `output` the others that it has; written there."""
    results = {"kind": "decoding", **report.surroundings(), "rows": rows}
    if output is not None:
        new = {(row["sides"], row["num_workers"]) for row in rows}
        before = report.read_json(output)["rows"] if output.exists() else []
        others = [row for row in before if (row["sides"], row["num_workers"]) not in new]
        results["rows"] = sorted(others + rows, key=lambda row: (int(row["sides"].split("-")[-1]), row["num_workers"]))
        report.write_json(output, results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the earlier commit")
    parser.add_argument("--files", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--sides", nargs="+", default=["32", "64", "250", "500", "32-500"], help="in pixels")
    parser.add_argument("--resolution", type=int, default=64, help="0 for none; default: %(default)s")
    parser.add_argument("--num_workers", type=int, nargs="+", default=[0, 2], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2; default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of results, and renew the docs")
    args = parser.parse_args()
    if args.table:
        show(args.table)
        return
    if not args.before or not (args.before / "ddpm_hf").is_dir():
        parser.error(f"--before {args.before}: no checkout of this repository")
    if args.rounds < 2 or args.files < 1:
        parser.error(f"--rounds {args.rounds} must be at least 2, and --files {args.files} at least 1")
    rows: list[dict[str, Any]] = []
    for sides in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            write_photos(Path(folder), args.files, sides)
            for num_workers in args.num_workers:
                rows.append(compare(args.before.resolve(), Path(folder), sides, args, num_workers))
                results = kept(args.output, rows)
                print(decoding_tables.table({**results, "rows": rows[-1:]}).splitlines()[-1], flush=True)
    print(f"\n{decoding_tables.table(results)}")


if __name__ == "__main__":
    main()
