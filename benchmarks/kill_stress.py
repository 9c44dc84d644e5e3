"""Kill training with -9 again and again, and see that nothing is lost.

    python benchmarks/kill_stress.py [--kills 200] [--seed 0]    # two minutes on two cores; 1000: five times that
    python benchmarks/kill_stress.py --kills 20 --launch         # `python` and `torchrun` themselves; ten minutes

Trains a tiny network on the digits, two runs of three with one process and the third with two (gloo). At seeded random
moments, at least a third of them while a checkpoint is being written or pruned, the processes are killed: of two both,
or only one, and then the other must end by itself, with an error, within 60 s. Then the same command runs again. After
about ten kills (with few in all, fewer, so that there is a run of either kind) the run may end, and is compared by
sha256 with one that was left alone. A moment inside a save lies within the time that saves took in that one, and such
moments are chosen until they are half of the kills: what is too fast to be hit is aimed at more often. Counted are

    lost        kills after which the newest good checkpoint is older than before, is damaged, or is more than one
                interval behind the steps that were logged
    crashed     starts that ended by themselves with an error, did not go on from the newest checkpoint, or hung
    identical   finished runs whose model, EMA, optimizer, counters and logged steps are those of the undisturbed run

Exits with 1 unless nothing was lost, nothing crashed, all were identical, runs of one and of two processes were killed
and, of twenty kills or more, a third fell into a save: of fewer, a busy machine can miss every one.

A process that has imported everything forks the training processes, which takes a tenth of a second instead of five.
What they do is real: main() of training/train.py from its command line to the interpreter's end, the process group,
the files, the signals. What they leave out is curves.png, which takes longer than all the rest, and what forking
passes over: the interpreter's start, the imports, another hash seed for each process, and the launchers; that is what
--launch is for.
"""

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ddpm_hf.runs import checkpoints, read_metrics, watching  # noqa: E402

SCRIPT = ROOT / "training" / "train.py"
PATIENCE_S = 60  # for the survivors of a kill
HUNG_S = 300
KILLS_PER_RUN = 10
ENOUGH_KILLS = 20  # to demand a share of them
EVERY = 2  # steps between checkpoints
OPTIONS: dict[str, Any] = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "attention_resolutions": [4],
    "norm_num_groups": 4,
    "dropout": 0.1,
    "random_flip": True,
    "global_batch_size": 8,
    "num_train_timesteps": 20,
    "beta_end": 0.5,
    "num_steps": 40,
    "warmup_steps": 2,
    "ema_decay": 0.5,
    "checkpoint_every": EVERY,
    "log_every": 1,
    "sample_every": 0,
    "num_samples": 4,
    "cpu_threads": 1,
}


def arguments(folder: Path, **options: Any) -> list[str]:
    """The command line of a tiny run in `folder`."""
    words = []
    for name, value in {"output_dir": folder, **OPTIONS, **options}.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return words


# ---- the fork server -----------------------------------------------------------------------------------------------


def load_script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parents[1]))
    from training import train

    return train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(script: ModuleType, phase: str, step: int) -> None:
    """Make this process kill itself with -9 in a phase: start-up, data, step, save or sampling.

    In a step, a save or sampling that is at or after `step`; a process that saves nothing dies while the other does.
    """

    def before(owner: Any, name: str, is_due: Callable[..., bool] = lambda *args: True) -> None:
        function = getattr(owner, name)

        def deadly(*args: Any, **kwargs: Any) -> Any:
            if is_due(*args):
                die()
            return function(*args, **kwargs)

        setattr(owner, name, deadly)

    if phase == "start-up":
        before(script, "make_accelerator")
    elif phase == "data":
        before(script, "load_data")
    elif phase == "step":  # a part of it is done: the other process waits for this one's gradients
        before(script, "losses_of", lambda run, *batch: run.state.step >= step)
    elif phase == "between steps":
        before(script, "training_step", lambda run, stream: run.state.step >= step)
    elif phase == "save":
        if os.environ.get("RANK", "0") == "0":
            before(checkpoints, "_write_json", lambda path, content: content.get("step", -1) >= step)
        else:
            before(script.RunLog, "write_overview")
    elif phase == "sampling":
        before(watching, "write_grids", lambda log, state, *others: state.step >= step)
    else:
        raise ValueError(f"phase={phase!r} is none of start-up, data, step, between steps, save, sampling")


def serve() -> None:
    """Fork a training process for each line of standard input that has arguments, wait for one for each other line."""
    import sklearn.datasets
    import torch

    torch.set_num_threads(1)  # a child cannot use threads that only its parent has
    script = load_script()
    script.RunLog.write_overview = lambda log: None
    sklearn.datasets.load_digits()
    gc.collect()
    gc.freeze()  # at its end a child would else look through, and so copy, all that it shares with this process
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "arguments" not in request:
            answer = wait_for_child(request["pid"], request["timeout_s"])
        elif not (answer := os.fork()):
            return train_in_child(script, **request)
        print(json.dumps(answer), flush=True)


def wait_for_child(pid: int, timeout_s: float) -> int | None:
    """Its exit code, negative for a signal; None while it runs."""
    deadline = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def train_in_child(
    script: ModuleType, arguments: list[str], environment: dict[str, str], log: str, death: tuple[str, int] | None
) -> None:
    """What `python training/train.py ...` would do from here on, up to the interpreter's end."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(environment)
    faulthandler.enable()  # where one hangs is told by SIGABRT
    if death is not None:
        arrange_death(script, *death)
    try:
        script.main(arguments)
    except Exception:  # as Python would, but without the lines of this file
        traceback.print_exc()
        sys.exit(1)


class ForkedProcess:
    """As subprocess.Popen's, as far as it is needed here."""

    def __init__(self, server: "ForkServer", pid: int):
        self.server, self.pid, self.returncode = server, pid, None

    def wait(self, timeout: float) -> int | None:
        """The exit code, or None where the time runs out."""
        if self.returncode is None:
            self.returncode = self.server.ask({"pid": self.pid, "timeout_s": timeout})
        return self.returncode

    def poll(self) -> int | None:
        return self.wait(0)


class ForkServer:
    """with ForkServer() as server: server.start(arguments(folder), ...)"""

    def __enter__(self) -> "ForkServer":
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it is ready
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        arguments: list[str],
        log: Path,
        *,
        num_processes: int = 1,
        environment: dict[str, str] | None = None,
        deaths: dict[int, tuple[str, int]] | None = None,
    ) -> list[ForkedProcess]:
        """One training process, or several as a launcher starts them; `deaths` maps ranks to a phase and a step."""
        port = str(free_port())
        started = []
        for rank in range(num_processes):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            joined = {name: str(value) for name, value in own.items()} if num_processes > 1 else {}
            request = {"arguments": arguments, "log": str(log), "environment": {**(environment or {}), **joined}}
            started.append(ForkedProcess(self, self.ask({**request, "death": (deaths or {}).get(rank)})))
        return started


def free_port() -> int:
    """Below those that the system gives away, so that nobody gets it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


class Launcher:
    """The same with a fresh interpreter for every process, by `python` and by torchrun."""

    def start(self, arguments: list[str], log: Path, *, num_processes: int = 1) -> list[subprocess.Popen]:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--master_port", "0"]
        launcher += ["--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"]
        command = [sys.executable, *(launcher if num_processes > 1 else []), str(SCRIPT), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("a") as output:
            return [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)]


# ---- one run, killed again and again -------------------------------------------------------------------------------


def digests(folder: Path, step: int) -> dict[str, str]:
    """sha256 of everything in a checkpoint that training changes: weights, EMA, optimizer, counters."""
    checkpoint = folder / "checkpoints" / f"step-{step}"
    paths = [p for p in sorted(checkpoint.rglob("*")) if p.suffix == ".safetensors" or p.name == "state.json"]
    return {str(p.relative_to(checkpoint)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def outcome(folder: Path, step: int) -> tuple[dict[str, str], list[tuple[int, float]]]:
    """What a finished run must have in common with one that was left alone."""
    metrics = read_metrics(folder / "metrics.jsonl")
    return digests(folder, step), [(line["step"], line["loss"]) for line in metrics]


def being_written(folder: Path) -> set[tuple[int, int]]:
    """What tells apart the folders of unfinished saves and deletions, those that lie there from those begun anew."""
    found = set()
    for path in (folder / "checkpoints").glob(f"{checkpoints.TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.stat().st_ino, path.stat().st_ctime_ns))
    return found


def newest_step(folder: Path) -> int:
    """Of the newest good checkpoint, 0 without one. Raises CheckpointError where any is damaged."""
    found = checkpoints.found_in(folder / "checkpoints")
    for _, path in found:
        checkpoints.verify(path)
    return found[0][0] if found else 0


class KilledRun:
    """One command, started and killed until it may end."""

    def __init__(self, starter: Any, folder: Path, num_processes: int, rng: random.Random, pace: "Pace"):
        self.starter, self.folder, self.num_processes, self.rng = starter, folder, num_processes, rng
        self.pace, self.log = pace, folder.with_suffix(".log")
        self.counts: Counter[str] = Counter()
        self.longest_s, self.finished = 0.0, False

    def complain(self, what: str, reason: object) -> None:
        self.counts[what] += 1
        print(f"{what}: {self.folder.name}: {reason}; see {self.log}", file=sys.stderr)

    def told(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def start(self) -> list[Any]:
        return self.starter.start(arguments(self.folder), self.log, num_processes=self.num_processes)

    def kill_once(self, *, in_save: bool) -> None:
        """Start, wait for a random moment, kill, and look at what is left."""
        newest, left_over = newest_step(self.folder), being_written(self.folder)
        told_before = len(self.told())
        moment = self.rng.uniform(0, self.pace.save_s if in_save else self.pace.quarter_s)
        num_saves = self.rng.choice([1, 1, 2])
        processes = self.start()
        started, seen = time.monotonic(), set(left_over)
        workers: list[Any] = []
        while all(p.poll() is None for p in processes):
            if len(workers) < self.num_processes:  # before they are to be killed: looking takes as long as a save
                workers = workers_of(processes)
            if in_save and (new := being_written(self.folder) - seen):
                seen |= new
                num_saves -= 1
            if (in_save and num_saves <= 0) or (not in_save and time.monotonic() - started >= moment):
                break
            time.sleep(0.0005)
            if time.monotonic() - started > HUNG_S:
                self.complain("crashed", "hung")
                break
        if in_save:
            time.sleep(moment)
        if all(p.poll() is None for p in processes):
            self.counts["kills"] += 1
            self.kill(processes, workers, have_met="process(es) on cpu" in self.told()[told_before:])
            self.counts["kills inside a save"] += bool(being_written(self.folder) - left_over)
        else:
            self.wait_for_end(processes)
        self.inspect(newest, self.told()[told_before:])

    def kill(self, processes: list[Any], workers: list[Any], *, have_met: bool) -> None:
        """All, or, once they have met, one of two; then the other must end by itself."""
        launchers = [p for p in processes if p not in workers]
        victims = (workers if len(workers) == self.num_processes else workers_of(processes)) + launchers
        chosen = self.rng.choice(["all", "one"]) if self.num_processes > 1 and have_met else "all"
        if chosen == "one":
            victims = [victims[self.rng.randrange(min(2, len(victims)))]]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
        before = time.monotonic()
        codes = [wait(p, PATIENCE_S) for p in processes]
        psutil.wait_procs([victim for victim in victims if isinstance(victim, psutil.Process)], PATIENCE_S)
        if chosen == "one":
            self.longest_s = max(self.longest_s, time.monotonic() - before)
            self.counts["survivors"] += 1
        if None in codes:
            self.complain("crashed", f"not ended {PATIENCE_S} s after {chosen} of {self.num_processes} was killed")
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGABRT)
                wait(process, PATIENCE_S)
        elif 0 in codes and newest_step(self.folder) < OPTIONS["num_steps"]:  # what is done may end as such
            self.complain("crashed", f"exit codes {codes} after {chosen} of {self.num_processes} was killed")

    def wait_for_end(self, processes: list[Any]) -> None:
        codes = [wait(p, HUNG_S) for p in processes]
        self.finished = codes == [0] * len(processes)
        if not self.finished:
            self.complain("crashed", f"exit codes {codes}")

    def inspect(self, newest_before: int, log: str) -> None:
        try:
            newest = newest_step(self.folder)
        except checkpoints.CheckpointError as error:
            return self.complain("lost", error)
        logged = max((line["step"] for line in read_metrics(self.folder / "metrics.jsonl")), default=0)
        if newest < newest_before or logged - newest > EVERY:
            self.complain("lost", f"step {newest} after step {newest_before}, logged {logged}")
        resumed = [line for line in log.splitlines() if line.startswith("resuming at step")]
        if resumed and not resumed[0].startswith(f"resuming at step {newest_before},"):
            self.complain("crashed", f"{resumed[0]} and not {newest_before}")

    def finish(self) -> None:
        if not self.finished:
            self.wait_for_end(self.start())

    def measure(self) -> "Pace":
        """Run undisturbed."""
        started, processes = time.monotonic(), self.start()
        start_s, saves_s, writing_since = 0.0, [], None
        while all(p.poll() is None for p in processes):
            now, writing = time.monotonic(), bool(being_written(self.folder))
            if not start_s and (self.folder / "metrics.jsonl").exists():
                start_s = now - started
            if writing and writing_since is None:
                writing_since = now
            elif not writing and writing_since is not None:
                saves_s.append(now - writing_since)
                writing_since = None
            time.sleep(0.0005)
        took_s = time.monotonic() - started
        self.wait_for_end(processes)
        if not self.finished or not saves_s:
            sys.exit(f"training failed:\n{self.told()[-3000:]}")
        return Pace(save_s=statistics.median(saves_s), quarter_s=start_s + (took_s - start_s) / 4)


class Pace(NamedTuple):
    """Of a run that was left alone: how long a save and its pruning take, and the start and a quarter of the rest."""

    save_s: float
    quarter_s: float


def workers_of(processes: list[Any]) -> list[Any]:
    """The processes that train: those that were started, or what torchrun started of them."""
    if isinstance(processes[0], ForkedProcess) or "torch.distributed.run" not in processes[0].args:
        return list(processes)
    workers = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(processes[0].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if str(SCRIPT) in process.cmdline():
                    workers.append(process)
    return workers


def wait(process: Any, timeout_s: float) -> int | None:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None


# ---- counting ------------------------------------------------------------------------------------------------------


def stress(starter: Any, folder: Path, num_kills: int, seed: int) -> dict[int, Counter[str]]:
    """Counts by number of processes."""
    rng = random.Random(seed)
    counts = {1: Counter(), 2: Counter()}
    truth, pace = {}, {}
    for num_processes in counts:
        alone = KilledRun(starter, folder / f"alone-{num_processes}", num_processes, rng, Pace(0, 0))
        pace[num_processes] = alone.measure()
        truth[num_processes] = outcome(alone.folder, OPTIONS["num_steps"])
    number, kills_per_run = 0, min(KILLS_PER_RUN, max(1, num_kills // 4))
    while (missing := num_kills - sum(c["kills"] for c in counts.values())) > 0:
        last_chance = missing == 1 and not counts[2]["kills"]
        num_processes = 2 if number % 3 == 1 or last_chance else 1  # two take longer
        run = KilledRun(starter, folder / f"run-{number}", num_processes, rng, pace[num_processes])
        while not run.finished and run.counts["kills"] < min(kills_per_run, missing):
            so_far = sum(counts.values(), Counter()) + run.counts
            run.kill_once(in_save=2 * so_far["kills inside a save"] <= so_far["kills"])
            if run.counts["lost"] or run.counts["crashed"]:
                break
        run.finish()
        same = run.finished and outcome(run.folder, OPTIONS["num_steps"]) == truth[num_processes]
        total = counts[num_processes]
        total.update(run.counts)
        total.update({"runs": 1, "identical": int(same)})
        total["longest_ms"] = max(total["longest_ms"], round(1000 * run.longest_s))
        if run.finished and not same:
            print(f"different: {run.folder}; see {run.log}", file=sys.stderr)
        number += 1
    return counts


def table(counts: dict[int, Counter[str]]) -> str:
    names = ["kills", "kills inside a save", "lost", "crashed", "runs", "identical", "survivors", "longest_ms"]
    lines = ["processes  " + "  ".join(names)]
    for num_processes, own in counts.items():
        lines.append(f"{num_processes:9}  " + "  ".join(f"{own[name]:{len(name)}}" for name in names))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at least 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launch", action="store_true", help="a fresh interpreter, or torchrun, for every start")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kills < 2:
        parser.error(f"--kills {args.kills}: with fewer than 2 there is no run of either kind")
    if args.serve:
        return serve()
    logging.disable(logging.WARNING)  # of what the kills left
    before = time.monotonic()
    folder = Path(tempfile.mkdtemp())
    with contextlib.ExitStack() as held:
        starter = Launcher() if args.launch else held.enter_context(ForkServer())
        counts = stress(starter, folder, args.kills, args.seed)
    print(table(counts))
    total = sum(counts.values(), Counter())
    print(f"{total['kills']} kills in {time.monotonic() - before:.0f} s, seed {args.seed}")
    if total["lost"] or total["crashed"] or total["identical"] < total["runs"]:
        sys.exit(f"something was lost; the runs and their logs are in {folder}")
    shutil.rmtree(folder)
    too_few = total["kills"] >= ENOUGH_KILLS and 3 * total["kills inside a save"] < total["kills"]
    if too_few or not all(own["kills"] for own in counts.values()):
        sys.exit("too few kills fell into a save, or none into a run of one or of two processes")
    print("nothing was lost")


if __name__ == "__main__":
    main()
