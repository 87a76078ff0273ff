"""SIGTERM, SIGINT and SIGHUP to a training: it stops at the next step and saves; with nothing to save it ends at once.

    stopping.watch()            first thing: what a signal means is decided here from then on
    stopping.at_once("...")     nothing is lost: a signal ends this process now, with 75 and one line that ends so
    stopping.at_a_step(ask)     a signal calls `ask`, and the loop stops at the step that all processes agree on

A thread does it, woken by Python's C handler: the main thread may be inside a compiler, a collective or a slow disk for
minutes. A second Ctrl-C ends the program wherever it is.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

RESTART, INTERRUPTED = 75, 130  # exit codes
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_KEY_S = 1.0  # a terminal and a wrapper may both hand on one Ctrl-C

_ask: Callable[[], None] | None = None
_saved = "before the first step"
_leave: Callable[[int, str], None] | None = None  # tells the other processes, and ends this one
_first: tuple[str, float] | None = None  # the signal that came, and when
_wake: int | None = None


def watch() -> None:
    """Takes the signals, but those that this program was started to ignore (nohup, a shell's background job)."""
    global _wake
    if _wake is None:
        read, _wake = os.pipe()
        os.set_blocking(_wake, False)
        threading.Thread(target=_follow, args=(read,), name="k2jax-signals", daemon=True).start()
    signal.set_wakeup_fd(_wake, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _nothing)


def at_once(saved: str) -> None:
    """From here on a signal ends the program; `saved` says what a restart goes on from."""
    global _ask, _saved
    _ask, _saved = None, saved
    if _first and _wake is not None:
        _end(RESTART, reason())


def at_a_step(ask: Callable[[], None]) -> None:
    """From here on a signal asks all processes to stop at a step."""
    global _ask
    _ask = ask
    if _first:
        ask()


def leave_by(leave: Callable[[int, str], None]) -> None:
    """How a process ends that is one of several."""
    global _leave
    _leave = leave


def name() -> str:
    """Of the signal that this process got."""
    return _first[0] if _first else "a signal to another process"


def reason() -> str:
    """For people."""
    return f"stopped by {name()}; {_saved}: run the same command to go on"


def _nothing(*_: object) -> None:
    """Python's own part; `_follow` does the rest, whatever the main thread is at."""


def _follow(read: int) -> None:
    while numbers := os.read(read, 64):
        for number in numbers:
            if number in SIGNALS:
                _handle(number)


def _handle(number: int) -> None:
    global _first
    now = time.monotonic()
    if _first is None:
        _first = signal.Signals(number).name, now
        if _ask is None:
            _end(RESTART, reason())
        _ask()
    elif number == signal.SIGINT and now - _first[1] > SAME_KEY_S:
        _end(INTERRUPTED, "ended by a second Ctrl-C: what was not saved is lost")


def _end(code: int, line: str) -> NoReturn:
    try:
        os.write(2, f"error: {line}\n".encode())  # past Python's stream, whose lock the main thread may hold
        if _leave:
            _leave(code, line)
    finally:
        os._exit(code)
