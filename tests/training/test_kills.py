"""A process that ends anywhere, by -9 or by an error, loses no checkpoint and leaves no other process waiting.

A save, with its pruning and publishing, runs in a child under ptrace, which stops it before every system call that
changes a file: there it is killed, or the call fails. Nothing is simulated, and nothing escapes, not even the writes
that safetensors makes itself.
"""

import ctypes
import errno
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from diffusers.training_utils import EMAModel

from ddpm_hf import DDPMPaperPipeline
from ddpm_hf.runs import TrainingState, checkpoints

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import kill_stress  # noqa: E402  # pyright: ignore[reportMissingImports]

MANIFEST = {"world_size": 1, "options": {}, "dataset": {"fingerprint": ""}}


# Of what is tried at each of a save's calls: integration tests take some of them, the slow tests all.
EVERY_TENTH = pytest.param(10, id="some", marks=pytest.mark.integration)
ALL = pytest.param(1, id="all", marks=pytest.mark.slow)


# ---- before every system call that changes a file ------------------------------------------------------------------

# x86-64; what else could change a file (open without creating, mmap, fallocate) a save does not use
WRITES = {1: "write", 18: "pwrite64", 20: "writev", 40: "sendfile", 76: "truncate", 77: "ftruncate", 257: "openat"}
WRITES |= {83: "mkdir", 258: "mkdirat", 326: "copy_file_range"}
FLUSHES = {74: "fsync", 75: "fdatasync"}
RENAMES = {82: "rename", 264: "renameat", 316: "renameat2"}
DELETIONS = {84: "rmdir", 87: "unlink", 263: "unlinkat"}
CHANGES = WRITES | FLUSHES | RENAMES | DELETIONS
TRACEME, CONTINUE_TO_SYSCALL, SET_OPTIONS, SYSCALL_INFO, PEEK_USER, POKE_USER = 0, 24, 0x4200, 0x420E, 3, 6
SYSCALLS_MARKED, KILLED_WITH_PARENT = 1, 0x100000
RAX, ORIG_RAX = 8 * 10, 8 * 15  # where in the child's registers


class SyscallInfo(ctypes.Structure):
    _fields_ = [
        ("op", ctypes.c_uint8),  # 1: about to enter a call; 2: leaving it
        ("arch", ctypes.c_uint32),
        ("pointers", ctypes.c_uint64 * 2),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    ]


class Ended(NamedTuple):
    code: int  # negative: by this signal
    calls: list[str]  # the names of those that change a file, in order


class Traced:
    """Runs a function in a forked child; `at` counts from 0 the calls that change a file."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self.libc.ptrace.restype = ctypes.c_long

    def ptrace(self, request: int, pid: int, address: int | None = None, data: int | None = None) -> int:
        result = self.libc.ptrace(request, pid, address, data)
        if result < 0 and request != PEEK_USER:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    def child(self, function: Callable[[], None], told: int) -> None:
        """Exits with 1 after an OSError, whose message goes to the file `told`; with 2 after any other error."""
        code = 0
        try:
            self.ptrace(TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            function()
        except OSError as error:
            code = 1
            os.write(told, f"{error}".encode())
        except BaseException:
            code = 2
            os.write(told, traceback.format_exc().encode())
        os._exit(code)

    def __call__(
        self, function: Callable[[], None], told: Path, *, kill_at: int | None = None, fail_at: int | None = None
    ) -> Ended:
        file = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        pid = os.fork()
        if pid == 0:
            self.child(function, file)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            pytest.skip("this machine does not let a process trace its child")
        self.ptrace(SET_OPTIONS, pid, None, SYSCALLS_MARKED | KILLED_WITH_PARENT)
        calls: list[str] = []
        failing = False
        while True:
            self.ptrace(CONTINUE_TO_SYSCALL, pid)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSTOPPED(status):
                os.close(file)
                return Ended(os.waitstatus_to_exitcode(status), calls)
            info = SyscallInfo()
            self.ptrace(SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info))
            if failing:
                self.ptrace(POKE_USER, pid, RAX, ctypes.c_uint64(-errno.ENOSPC).value)
                failing = False
            elif info.op == 1 and self.is_change(info, file):
                if len(calls) == kill_at:
                    os.kill(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                    os.close(file)
                    return Ended(os.waitstatus_to_exitcode(status), calls)
                if len(calls) == fail_at:  # no such call, instead of this one; and on its return:
                    self.ptrace(POKE_USER, pid, ORIG_RAX, ctypes.c_uint64(-1).value)
                    failing = True
                calls.append(CHANGES[info.number])

    def is_change(self, info: SyscallInfo, file: int) -> bool:
        name = CHANGES.get(info.number)
        if name == "openat":
            return bool(info.arguments[2] & (os.O_CREAT | os.O_TRUNC))
        return name is not None and not (name == "write" and info.arguments[0] in (1, 2, file))


@pytest.fixture(scope="module")
def traced() -> Traced:
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        pytest.skip("registers and numbers of system calls are those of Linux on x86-64")
    return Traced()


class Saves:
    """`folder` with step-1 and step-2, published; and the saving of step-3, after which step-1 is pruned."""

    def __init__(self, model: Any, scheduler: Any, root: Path):
        self.model, self.scheduler, self.root = model, scheduler, root
        self.state = self.fresh()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.tensors = {}
        for step in (1, 2):
            self.advance(step)
            self.save(root / "before")
        self.advance(3)
        self.save_and_forget(root / "ended")

    def fresh(self) -> TrainingState:
        ema = EMAModel(self.model.parameters(), decay=0.9, min_decay=0.9, foreach=True)
        return TrainingState(self.model, ema, torch.optim.Adam(self.model.parameters(), lr=1e-2))

    def advance(self, step: int) -> None:
        self.state.optimizer.step()
        self.state.ema.step(self.model.parameters())
        self.state.step = step
        self.tensors[step] = self.current()

    def current(self) -> list[torch.Tensor]:
        slots = self.state.optimizer.state_dict()["state"]
        own = [value for index in sorted(slots) for _, value in sorted(slots[index].items())]
        return [x.detach().clone() for x in [*self.model.parameters(), *self.state.ema.shadow_params, *own]]

    def save(self, run: Path) -> None:
        path = self.state.save(run / "checkpoints", self.scheduler, MANIFEST)
        checkpoints.prune(run / "checkpoints", keep=2)
        checkpoints.export_pipeline(path, run)

    def save_and_forget(self, run: Path) -> None:
        shutil.copytree(self.root / "before", run)
        self.save(run)

    def begin(self, name: str) -> Path:
        run = self.root / name
        shutil.copytree(self.root / "before", run)
        self.state.restore(self.root / "ended" / "checkpoints" / "step-3")
        return run

    def check(self, run: Path) -> int:
        """The step of the newest good checkpoint, after checking all that must hold wherever a save was broken off."""
        folder = run / "checkpoints"
        found = checkpoints.newest_good(folder)
        assert found is not None
        path, step = found[0], found[1]["step"]
        assert step in (2, 3) and path.name == f"step-{step}"
        for _, older in checkpoints.found_in(folder):  # nothing that is half there has the name of a checkpoint
            checkpoints.verify(older)
        self.state.restore(path)
        assert all(torch.equal(x, y) for x, y in zip(self.current(), self.tensors[step], strict=True))
        self.check_published(run)
        self.state.step = 4
        self.save(run)
        assert sorted(p.name for p in folder.iterdir()) == [f"step-{step}", "step-4"]
        assert not list(run.rglob(f"{checkpoints.TEMPORARY}*"))
        shutil.rmtree(run)
        return step

    def check_published(self, run: Path) -> None:
        """Each of its files is whole, of the one step or of the other."""
        sources = [self.root / "before" / "checkpoints" / "step-2", self.root / "ended" / "checkpoints" / "step-3"]
        for path in run.rglob("*"):
            name = path.relative_to(run)
            if path.is_file() and name.parts[0] != "checkpoints" and checkpoints.TEMPORARY not in path.name:
                assert path.read_bytes() in [(source / name).read_bytes() for source in sources]


@pytest.fixture(scope="module")
def saves(tiny_mlp, tiny_scheduler, tmp_path_factory) -> Saves:
    return Saves(tiny_mlp(), tiny_scheduler(), tmp_path_factory.mktemp("kills"))


@pytest.fixture(scope="module")
def calls(traced, saves) -> list[str]:
    """The calls of a whole save that change a file."""
    run = saves.begin("whole")
    ended = traced(lambda: saves.save(run), saves.root / "told")
    assert ended.code == 0 and saves.check(run) == 3
    return ended.calls


@pytest.mark.integration
def test_what_a_save_does_to_files(calls):
    """So many places there are: if a save came to do less, or in ways that are not counted, this would show it."""
    counts = Counter(calls)
    num = lambda kind: sum(counts[name] for name in kind.values())  # noqa: E731
    print(f"{len(calls)} calls that change a file: {dict(counts)}")
    assert num(WRITES) >= 70 and num(FLUSHES) >= 20 and num(RENAMES) >= 12 and num(DELETIONS) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("every", [EVERY_TENTH, ALL])
def test_a_kill_before_a_call_of_a_save_loses_nothing(traced, saves, calls, every):
    steps = []
    places = range(0, len(calls), every)
    for at in places:
        run = saves.begin(f"kill-{at}")
        ended = traced(lambda run=run: saves.save(run), saves.root / "told", kill_at=at)
        assert ended.code == -signal.SIGKILL and ended.calls == calls[:at]
        steps.append(saves.check(run))
    assert len(steps) == len(places) and set(steps) == {2, 3}
    assert steps == sorted(steps)  # once the new one is there, it stays


@pytest.mark.slow
@pytest.mark.parametrize("every", [EVERY_TENTH, ALL])
def test_an_error_of_a_call_of_a_save_loses_nothing(traced, saves, calls, every):
    """ENOSPC for each, once: an OSError. Its message has a path, or the new checkpoint was there already."""
    untold = []
    for at in range(0, len(calls), every):
        run, told = saves.begin(f"fail-{at}"), saves.root / "told"
        ended = traced(lambda run=run: saves.save(run), told, fail_at=at)
        message = told.read_text()
        assert ended.code in (0, 1), f"{calls[at]}, call {at}: {message}"
        if ended.code == 0:
            untold.append(calls[at])
        else:
            assert os.strerror(errno.ENOSPC) in message and str(run) in message
            if (run / "checkpoints" / "step-2").exists() and not (run / "checkpoints" / "step-3").exists():
                assert "cannot be written" in message and "untouched" in message and "bytes" in message
        assert saves.check(run) == 3 or ended.code == 1
    # folders that were there already, and what is pruned, of which a warning tells
    assert set(untold) <= {"mkdir", "rename", *DELETIONS.values()} and untold.count("rename") <= 1


# ---- the whole training process ------------------------------------------------------------------------------------


def stress(*options: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_stress.py"), *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        pytest.param([], 40, marks=pytest.mark.slow),
        pytest.param(["--launch"], 2, marks=pytest.mark.slow),
        pytest.param([], 200, marks=pytest.mark.long),
        pytest.param(["--launch"], 20, marks=pytest.mark.long),
    ],
)
def test_kills_of_the_training_process_lose_nothing(options, kills):
    """`--launch`: of processes that a launcher started."""
    assert f"{kills} kills" in stress("--kills", str(kills), *options)


# ---- one of two processes ------------------------------------------------------------------------------------------

PHASES = ["start-up", "data", "step", "between steps", "save", "sampling"]
DEATHS = [(phase, rank) for rank in (0, 1) for phase in PHASES]


def deaths(slow: set[tuple[str, int]]) -> list[Any]:
    """All twelve, for parametrize: those of CI, and the rest for the tier `long`."""
    return [pytest.param(*death, marks=pytest.mark.slow if death in slow else pytest.mark.long) for death in DEATHS]


OPTIONS = {"num_steps": 12, "sample_every": 4}
DEATH_AT = 3  # after the checkpoint of step 2


def assert_newest_loads(run: Path, phase: str) -> None:
    found = checkpoints.newest_good(run / "checkpoints")
    if phase in ("start-up", "data"):
        assert found is None
    else:
        assert found is not None and found[1]["step"] >= 2
        DDPMPaperPipeline.from_pretrained(found[0])


@pytest.fixture(scope="module")
def server() -> Iterator[kill_stress.ForkServer]:
    with kill_stress.ForkServer() as running:
        yield running


@pytest.mark.parametrize(("phase", "rank"), deaths(slow={(phase, number % 2) for number, phase in enumerate(PHASES)}))
def test_when_one_of_two_processes_dies_the_other_ends(tmp_path, server, phase, rank):
    """Without a launcher, which would end it: in a minute at most, with an error."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = kill_stress.arguments(run, **OPTIONS)
    processes = server.start(command, log, num_processes=2, deaths={rank: (phase, DEATH_AT)})
    assert processes[rank].wait(60) == -signal.SIGKILL
    code = processes[1 - rank].wait(60)
    if code is None:
        os.kill(processes[1 - rank].pid, signal.SIGABRT)  # tells where it hangs
        processes[1 - rank].wait(60)
    assert code == 1, log.read_text()
    if phase == "start-up":
        assert f"process {1 - rank}: not all of the 2 processes came to 127.0.0.1:" in log.read_text()
    assert_newest_loads(run, phase)
    again = server.start(command, log, num_processes=2)
    assert [process.wait(120) for process in again] == [0, 0], log.read_text()
    assert kill_stress.newest_step(run) == 12


@pytest.mark.parametrize(("phase", "rank"), deaths(slow={("step", 1)}))
def test_when_one_of_two_processes_dies_torchrun_ends(tmp_path, phase, rank):
    """Its workers run a script that trains, and dies in one of them. The other is asked to end, after 30 s killed."""
    run, died = tmp_path / "run", tmp_path / "died"
    script = tmp_path / "dying.py"
    script.write_text(f"""
import os, pathlib, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import kill_stress
script, kill = kill_stress.load_script(), kill_stress.die
kill_stress.die = lambda: (pathlib.Path({str(died)!r}).touch(), kill())
if os.environ["RANK"] == "{rank}":
    kill_stress.arrange_death(script, {phase!r}, {DEATH_AT})
script.main(sys.argv[1:])
""")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launcher += ["--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*launcher, str(script), *kill_stress.arguments(run, **OPTIONS)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        for left in (process, *psutil.Process(process.pid).children(recursive=True)):
            left.kill()
        pytest.fail(f"still there: {process.communicate()[0]}")
    assert time.time() - died.stat().st_mtime < 60
    assert process.returncode == 1 and re.search(r"exitcode *: -9|Signal 9", output), output
    assert_newest_loads(run, phase)


@pytest.mark.slow
def test_a_failing_publication_ends_in_one_line(tmp_path, server):
    """A folder stands for the full disk: no file can take its place."""
    (tmp_path / "run" / "model_index.json").mkdir(parents=True)
    (process,) = server.start(kill_stress.arguments(tmp_path / "run", num_steps=2), tmp_path / "log")
    assert process.wait(120) == 1
    told = (tmp_path / "log").read_text()
    assert "cannot be copied" in told.splitlines()[-1] and kill_stress.newest_step(tmp_path / "run") == 2
    assert "Traceback" not in told
