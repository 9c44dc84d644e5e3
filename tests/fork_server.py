"""Python programs as forks of one process that has imported everything: `Forked` in place of `subprocess.Popen`.

    process = Forked(["training/train.py", "--num_steps", "3"], env=..., stdout=PIPE)    # or ["-c", code, ...]
    done = run(["-m", "ddpm_hf.cli", "sample", ...], capture_output=True, text=True)     # or ["-m", module, ...]

An interpreter that imports torch, diffusers and transformers takes 13 seconds of a core, longer than almost all of
what the tests then do in it. A fork takes 0.1, and is a process as any other: with an environment, working folder and
group of its own, to be signalled, killed and waited for by its number. What it leaves out is the interpreter's start,
the order of the imports, and the launchers; tests of those start a real interpreter, and each command has some.

All workers of pytest share one server, which the first launch starts and which ends when the last of them does. It
has never computed anything, so there are no threads, whose locks a fork would copy without their owners.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLACE = "DDPM_HF_TESTS_FORK_SERVER"  # the server's address, which workers of pytest inherit
IMPORTS = (  # what programs of this repository import, none of which may start a thread
    *("datasets", "matplotlib.figure", "matplotlib.backends.backend_agg", "pandas", "sklearn.datasets", "torch"),
    *("ddpm_hf.cli.commands", "ddpm_hf.cli.draw", "ddpm_hf.evaluation.evaluator", "ddpm_hf.demo.tasks"),
    *("ddpm_hf.codec", "ddpm_hf.convert", "ddpm_hf.hub.publishing", "ddpm_hf.hub.background", "ddpm_hf.runs.report"),
    *(
        "accelerate.utils",
        "diffusers.pipelines.pipeline_loading_utils",
        "diffusers.training_utils",
        "torch.utils.data",
    ),
)

# Environment variables that libraries read when they are imported. The server has imported them with these values,
# found nowhere else, so that a fork can replace them by its own wherever they were copied to.
NOBODYS = {"HF_HOME": f"{os.sep}nobodys-huggingface-home", "HF_ENDPOINT": "https://nobodys-huggingface.invalid"}
DEFAULTS = {"HF_HOME": "~/.cache/huggingface", "HF_ENDPOINT": "https://huggingface.co"}
READERS = ("huggingface_hub", "datasets", "diffusers", "transformers", "accelerate")
IMPORTED_WITH = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # of all forks
CONSTANTS = {"HF_HUB_OFFLINE": lambda text: text == "1", "HF_DATASETS_CACHE": Path}  # by the same name in modules
READ_WHEN_USED = {"HF_TOKEN"}


# ---- the tests' side -----------------------------------------------------------------------------------------------


class Forked(subprocess.Popen):
    """A program in a fork of the server. `words` follow `python`; the options are those of `subprocess.Popen`."""

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        cwd: str | Path = ".",
        env: dict[str, str] | None = None,
        start_new_session: bool = False,
        **streams: Any,
    ):
        environment = dict(os.environ if env is None else env)
        known = {*NOBODYS, *IMPORTED_WITH, *CONSTANTS, *READ_WHEN_USED}
        unknown = {name for name in environment if name.startswith("HF_")} - known
        assert not unknown, f"{unknown} may be read at import: start a real interpreter, or name them in {__file__}"
        # gradio, where a test before this one imported it, has written "True"
        assert all(environment.get(name, "1") in ("1", "True") for name in IMPORTED_WITH)
        environment |= IMPORTED_WITH
        self.program = {
            "words": [str(word) for word in words],
            "folder": str(Path(cwd).absolute()),
            "environment": environment,
            "new_session": start_new_session,
        }
        super().__init__(["python", *self.program["words"]], **streams)

    # The three methods by which subprocess.Popen meets the operating system.

    def _execute_child(self, *arguments: Any) -> None:
        """Ask for the fork, and pass it its ends of the streams, which are −1 where it has those of this process."""
        sys.audit("subprocess.Popen", "a fork of the server", self.args, None, None)
        ends = arguments[10:16]  # of stdin, stdout and stderr: to read from and to write to
        theirs = [mine if mine != -1 else standard for standard, mine in enumerate((ends[0], ends[3], ends[5]))]
        self.connection = connection()
        request = json.dumps(self.program).encode()
        socket.send_fds(self.connection, [len(request).to_bytes(4, "big")], theirs)
        self.connection.sendall(request)
        self.pid = self._answer()
        self._child_created = True
        self._close_pipe_fds(*ends)  # type: ignore[attr-defined]

    def _internal_poll(self, _deadstate: Any = None, **_: Any) -> int | None:
        if self.returncode is None and select.select([self.connection], [], [], 0)[0]:
            self._wait(None)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if timeout is not None and not select.select([self.connection], [], [], max(timeout, 0))[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._answer()
            self.connection.close()
        return self.returncode

    def _answer(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            received = self.connection.recv(1)
            assert received, "the fork server has ended"
            line += received
        return int(line)


def run(
    words: Sequence[str | Path],
    *,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess:
    """As `subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Forked(words, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def pair_variables() -> list[dict[str, str]]:
    """For each of two processes, what torchrun would add to their environment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    return [{**place, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def choose_place() -> None:
    """Once for all workers of pytest, before it starts them."""
    os.environ.setdefault(PLACE, str(Path(tempfile.gettempdir()) / f"forks-{uuid.uuid4().hex[:12]}"))


def connection() -> socket.socket:
    """For one program. The first that a process asks for stays open besides, and keeps the server running."""
    if not _lifelines:
        _lifelines.append(_connect())
    return _connect()


_lifelines: list[socket.socket] = []


def _connect() -> socket.socket:
    address = os.environ[PLACE]
    deadline = time.monotonic() + 300
    started = None
    while time.monotonic() < deadline:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(address)
            return client
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            if started is None or started.poll() is not None:
                started = _start_server(address)
            time.sleep(0.05)
    raise TimeoutError(f"no fork server at {address}")


def _start_server(address: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    one_thread = {
        **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of pyarrow's allocator
        "OMP_WAIT_POLICY": "passive",  # a fork's own threads: those that spin take minutes where others work too
    }
    server = subprocess.Popen(
        [sys.executable, __file__, address],
        env={**kept, **one_thread, **NOBODYS, **IMPORTED_WITH},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    _servers.append(server)
    return server


_servers: list[subprocess.Popen] = []


# ---- the server's side ---------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Listen for clients, from now on, and serve them when everything is imported."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(address)
    except OSError:  # another worker's server was quicker
        return
    server = os.getpid()
    try:
        listener.listen(100)
        own_path = [place for place in sys.path[1:] if place not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        for name in IMPORTS:
            importlib.import_module(name)
        tasks = Path("/proc/self/task")
        assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "an import started a thread"
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the programs, and for pytest
        copies = copies_of_environment()
        gc.collect()
        gc.freeze()  # else a fork would look through, and so copy, all that it shares with this process
        answer_clients(listener, own_path=own_path, copies=copies)
    finally:
        if os.getpid() == server:
            os.unlink(address)


def answer_clients(listener: socket.socket, **of_programs: Any) -> None:
    """Fork for every program that is asked for; answer with its process's number, and with its exit code.

    Returns when there are no clients and no programs any more.
    """
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients = {listener.accept()[0]}
    programs: dict[int, socket.socket] = {}
    while clients or programs:
        ready = select.select([listener, ended, *clients], [], [])[0]
        if ended in ready:
            os.read(ended, 1000)
            report_ended(programs)
        if listener in ready:
            clients.add(listener.accept()[0])
        for client in clients & {*ready}:
            clients.remove(client)
            size, streams, _, _ = socket.recv_fds(client, 4, 3)
            if not size:  # a process of pytest has ended
                client.close()
                continue
            request = client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                os.close(ended)
                os.close(wakes)
                for mine in (listener, client, *clients, *programs.values()):
                    mine.close()
                run_program(**json.loads(request), streams=streams, **of_programs)
            for stream in streams:
                os.close(stream)
            programs[pid] = client
            answer(client, pid)


def answer(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        client.sendall(b"%d\n" % number)


def report_ended(programs: dict[int, socket.socket]) -> None:
    for pid in [*programs]:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            client = programs.pop(pid)
            answer(client, os.waitstatus_to_exitcode(status))
            client.close()


def copies_of_environment() -> list[tuple[types.ModuleType, str, Any]]:
    """(module, name, value) of all that was read from the environment by an import."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in READERS]
    return [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if name in CONSTANTS or isinstance(value, str | Path) and any(text in str(value) for text in NOBODYS.values())
    ]


def use_environment(copies: list[tuple[types.ModuleType, str, Any]]) -> None:
    """What the imports would have read from the environment of this process."""
    from huggingface_hub import hf_api

    texts = {nobodys: os.environ.get(name, DEFAULTS[name]) for name, nobodys in NOBODYS.items()}
    texts = {nobodys: os.path.expanduser(text) for nobodys, text in texts.items()}
    for module, name, value in copies:
        if name in CONSTANTS:
            value = CONSTANTS[name](os.environ[name]) if name in os.environ else value
        if isinstance(value, str | Path):
            text = str(value)
            for nobodys, ours in texts.items():
                text = text.replace(nobodys, ours)
            value = type(value)(text)
        setattr(module, name, value)
    hf_api.api.endpoint = texts[NOBODYS["HF_ENDPOINT"]]


def run_program(
    words: list[str],
    folder: str,
    environment: dict[str, str],
    new_session: bool,
    streams: list[int],
    own_path: list[str],
    copies: list[tuple[types.ModuleType, str, Any]],
) -> None:
    """What an interpreter does from its start to its end, which is that of this process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if new_session:
        os.setsid()
    for standard, stream in enumerate(streams):
        os.dup2(stream, standard)
    for stream in streams:
        os.close(stream)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [folder, *filter(None, path), *own_path]
    code = exit_code(words, copies)
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 255)


INTERRUPTED = -signal.SIGINT


def exit_code(words: list[str], copies: list[tuple[types.ModuleType, str, Any]]) -> int:
    """Run the program; what Python makes of how it ends."""
    try:
        import numpy
        import torch

        use_environment(copies)
        numpy.random.seed()  # or all forks draw the same where nobody gives a seed
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        run_words(*words)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def run_words(first: str, *rest: str) -> None:
    """`python -c CODE ...`, `python -m MODULE ...` or `python SCRIPT ...`."""
    if first == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
