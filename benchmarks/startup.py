"""CPU time until `ddpm-hf` and training/train.py have shown help or refused a mistake, as a share of importing torch.

    python benchmarks/startup.py [--rounds 7] [--most 0.15]

Measures user and system time of whole processes, which other load hardly changes, in interleaved rounds: each round
runs every case once, and divides it by that round's `import torch, diffusers`. Prints medians with their quartiles,
and exits with 1 where a median share is above `--most`.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "import torch, diffusers"
CLI = [sys.executable, "-m", "ddpm_hf.cli"]
TRAIN = [sys.executable, "training/train.py"]
CASES = {
    REFERENCE: [sys.executable, "-c", REFERENCE],
    "ddpm-hf --help": [*CLI, "--help"],
    "ddpm-hf sample --help": [*CLI, "sample", "--help"],
    "ddpm-hf draw --help": [*CLI, "draw", "--help"],
    "ddpm-hf sample x --sede 3": [*CLI, "sample", "x", "--sede", "3"],
    "ddpm-hf sample x --steps ten": [*CLI, "sample", "x", "--steps", "ten"],
    "ddpm-hf train --help": [*CLI, "train", "--help"],
    "train.py --help": [*TRAIN, "--help"],
    "train.py --num_stesp 3": [*TRAIN, "--num_stesp", "3"],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of the process and of what it waited for."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="at least 2; default: %(default)s")
    parser.add_argument("--most", type=float, default=0.15, help="share that a median may reach; default: %(default)s")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds} must be at least 2")
    for command in CASES.values():
        cpu_seconds(command)  # byte code is written, files are read into memory
    rounds = [{name: cpu_seconds(command) for name, command in CASES.items()} for _ in range(args.rounds)]
    print(f"{args.rounds} rounds; median (quartiles)\n\n| | CPU time in s | share of `{REFERENCE}` |\n|---|---|---|")
    missed = []
    for name in CASES:
        low, median, high = statistics.quantiles([times[name] for times in rounds], n=4)
        shares = statistics.quantiles([times[name] / times[REFERENCE] for times in rounds], n=4)
        shown = "{1:.1%} ({0:.1%}–{2:.1%})".format(*shares)
        print(f"| `{name}` | {median:.3f} ({low:.3f}–{high:.3f}) | {shown} |")
        if name != REFERENCE and shares[1] > args.most:
            missed.append(name)
    if missed:
        sys.exit(f"above {args.most:.0%}: {', '.join(missed)}")


if __name__ == "__main__":
    main()
