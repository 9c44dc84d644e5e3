"""Kill a training run three times, start it again by the same command, and compare it with a run that was left alone.

    python benchmarks/exact_resume.py [--num_steps 200] [--plot docs/pictures/one_and_two_processes.png]

Trains the digits on the CPU with two processes (torchrun, gloo): once uninterrupted; once killed with -9, launcher and
workers, at three seeded random steps. Prints the sha256 of model, EMA and optimizer of both and exits with 1 unless
they are equal. Then trains with one process and draws both loss curves in one plot. Five minutes on two cores.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
NUM_KILLS = 3


def command(output_dir: Path, num_steps: int, processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    if processes > 1:
        launcher += ["--master_port", "0", "--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"]
    options = {"output_dir": output_dir, "num_steps": num_steps, "log_every": 5, "checkpoint_every": 20}
    options |= {"sample_every": 0, "cpu_threads": 1, "dropout": 0.1, "warmup_steps": 20}
    return [
        *(sys.executable, *launcher, "training/train.py"),
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def train(arguments: list[str], log: Path, kill_at: int | None = None, run: Path | None = None) -> None:
    """Run to the end, or until `run` has logged step `kill_at`, and then kill all its processes with -9."""
    with log.open("a") as output:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=output)
        while process.poll() is None:
            if kill_at is not None and run is not None and any(line["step"] >= kill_at for line in metrics(run)):
                workers = psutil.Process(process.pid).children(recursive=True)
                for victim in (*workers, process):
                    victim.kill()
                process.wait()
                psutil.wait_procs(workers)
                return
            time.sleep(0.02)
    if process.returncode:
        sys.exit(f"training failed:\n{log.read_text()[-3000:]}")


def digests(run: Path, num_steps: int) -> dict[str, str]:
    folder = run / "checkpoints" / f"step-{num_steps}" / "train_state"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=200)
    parser.add_argument("--plot", type=Path, help="write the loss curves of one and two processes there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, killed, single = (Path(folder, name) for name in ("alone", "killed", "single"))
        train(command(alone, args.num_steps, 2), Path(folder, "alone.log"))
        for kill_at in sorted(random.Random(0).sample(range(25, args.num_steps - 10), NUM_KILLS)):
            train(command(killed, args.num_steps, 2), Path(folder, "killed.log"), kill_at, killed)
            print(f"killed at step {kill_at} or just after")
        train(command(killed, args.num_steps, 2), Path(folder, "killed.log"))
        for line in Path(folder, "killed.log").read_text().splitlines():
            if line.startswith("resuming"):
                print(line)
        expected, found = digests(alone, args.num_steps), digests(killed, args.num_steps)
        for name, digest in expected.items():
            print(f"{name:24} {digest[:16]} uninterrupted  {found[name][:16]} killed {NUM_KILLS} times")
        train(command(single, args.num_steps, 1), Path(folder, "single.log"))
        curves = {"1 process": metrics(single), "2 processes": metrics(killed)}
        if args.plot:
            draw(curves, args.plot)
    if expected != found:
        sys.exit("the killed run ended with other weights")
    print("equal")


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, lines), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], style, label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="the digits with dropout 0.1, on one and two processes")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
