"""SIGTERM and SIGINT as a request to stop at a good moment."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

CAUGHT = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """Leaves the program with the exit code that a shell gives to a process ended by that signal: 143 or 130."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name


def end_at_once_on_signals() -> None:
    """From now on SIGTERM and SIGINT end the process in one line: for the seconds in which it only imports.

    Not by an exception, which the code that is being imported may catch, or print a traceback of.
    """
    for number in CAUGHT:
        signal.signal(number, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":  # one line of all the processes of a run
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT wait, for the start of processes: there an exception is lost in somebody's callback.

    The processes inherit that, and call `hear_again`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_again() -> None:
    """In a process that was started while signals were `postponed`: from now on they come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)


class StopSignals:
    """Inside `with`, SIGTERM and SIGINT are kept in `received` until somebody asks; a second SIGINT does not wait.

    What may be cut off at any point, such as reading data or drawing samples, runs inside `interruptible`: there they
    raise `Stopped` at once. In another thread than the main one, which alone receives signals, nothing happens.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._interruptible, self._pid = False, os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in CAUGHT}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that helps, to which a terminal sends it too: it has nothing to save
            os._exit(0)  # by another code torch would take it for a failure, and say so
        insisted = number == signal.SIGINT and self.received == signal.SIGINT
        self.received = number
        if self._interruptible or insisted:
            raise Stopped(number)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped`; one that came before does so on entering."""
        if self.received is not None:
            raise Stopped(self.received)
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
