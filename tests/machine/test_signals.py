"""SIGTERM and SIGINT: kept until a good moment, or answered at once where anything may be cut off."""

import os
import signal
import threading

import pytest

from ddpm_hf.machine import Stopped, StopSignals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")]
)
def test_a_signal_waits_until_it_is_asked_for(number, code, name):
    with StopSignals() as signals:
        assert signals.received is None
        send(number)
        assert signals.received == number
        with pytest.raises(Stopped) as stopped, signals.interruptible():
            pytest.fail("what may be cut off does not even begin")
        assert (stopped.value.code, stopped.value.name) == (code, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interruptible_answers_at_once_and_only_inside(number):
    with StopSignals() as signals:
        with signals.interruptible():
            pass
        with pytest.raises(Stopped), signals.interruptible():
            send(number)
            pytest.fail("it goes on")
        signals.received = None
        send(number)
        assert signals.received == number


def test_a_second_interrupt_does_not_wait():
    with StopSignals() as signals:
        send(signal.SIGINT)
        with pytest.raises(Stopped):
            send(signal.SIGINT)
        assert signals.received == signal.SIGINT


def test_a_second_sigterm_waits_too():
    """Launchers repeat it while they wait."""
    with StopSignals() as signals:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_handlers_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_in_another_thread_nothing_happens():
    """Python lets only the main thread set handlers; whoever trains elsewhere is not stopped by this."""
    failures = []

    def work() -> None:
        try:
            with StopSignals() as signals, signals.interruptible():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
