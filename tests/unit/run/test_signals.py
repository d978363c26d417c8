from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tunesmith.run.signals import SIGNALS, Signals, Stopped

FIRST = "import os, signal\nfrom tunesmith.run.signals import Signals\nwith Signals() as signals:\n"


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(Stopped, match=number.name), Signals() as signals:
        os.kill(os.getpid(), number)
        pytest.fail("the signal raises at once")
    assert signals.requested == number.name


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_inside_the_loop_it_waits(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []
    with pytest.raises(Stopped, match=number.name), Signals() as signals:
        with signals.deferred():
            seen.append(signals.requested)
            os.kill(os.getpid(), number)
            seen.append(signals.requested)
        pytest.fail("an unhandled signal raises after the block")
    assert seen == [None, number.name]
    assert f"{number.name}: " in capfd.readouterr().err


def test_an_error_from_the_loop_is_not_hidden() -> None:
    with pytest.raises(ValueError, match="mine"), Signals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("mine")


def test_no_library_can_swallow_it() -> None:
    assert not issubclass(Stopped, Exception)


def test_the_handlers_of_before_are_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Signals():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.requested is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_it_is_inert() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with Signals() as signals, signals.deferred():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT), ids=("SIGTERM", "SIGINT"))
@pytest.mark.parametrize("second", ("inside", "while unwinding"))
def test_the_second_signal_ends_the_process(number: signal.Signals, second: str) -> None:
    body = {
        "inside": "  with signals.deferred():\n    kill()\n    kill()\n    print('alive')",
        "while unwinding": "  try:\n    kill()\n  finally:\n    kill()\n    print('alive')",
    }[second]
    code = FIRST + f"  kill = lambda: os.kill(os.getpid(), {int(number)})\n" + body
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + number and "alive" not in done.stdout


def test_a_closed_terminal_does_not_matter() -> None:
    body = "  with signals.deferred():\n    os.close(2)\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('on')"
    done = subprocess.run([sys.executable, "-c", FIRST + body], capture_output=True, text=True, check=False)
    assert done.stdout == "on\n"
