"""A watchdog: each process says what it is at; where that takes longer than it may, the stacks are printed and it ends.

    with Watchdog(config.watchdog) as watchdog:
        watchdog.at("restore")
        ...
        watchdog.at("step")

A collective whose peer is stuck, a disk that does not answer, a loader that waits for itself: nothing of that raises.
The others are told who it was and at what (cluster.py), and end, too; a restart goes on from the newest checkpoint.
"""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Mapping

from k2jax.errors import RunError, leave_now
from k2jax.parallel import cluster

TICK_S = 1.0  # a longer time between two ticks counts as two: the process was stopped (Ctrl-Z, a frozen machine)


class Watchdog:
    """Ends this process with 70 where it is at one thing for longer than `limits` has seconds for it; 0: no limit."""

    def __init__(self, limits: Mapping[str, float], tell: Callable[[str], None] = lambda what: None):
        """`tell` is told each phase, too."""
        self._limits, self._tell = dict(limits), tell
        self._at, self._spent_s = "start", 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="k2jax-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def at(self, what: str) -> None:
        """From here on this process is at `what`, a key of the limits; its time begins anew."""
        assert what in self._limits, what
        self._at, self._spent_s = what, 0.0
        self._tell(what)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_S):
            now = time.monotonic()
            self._spent_s += min(now - last, 2 * TICK_S)
            last = now
            limit = self._limits[self._at]
            if limit and self._spent_s > limit:
                self._end(self._at, limit)

    def _end(self, what: str, limit: float) -> None:
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        leave_now(
            RunError.exit_code,
            f"process {cluster.index()} was at {what!r} for more than {limit:g} s (watchdog.{what}; above: where each "
            f"thread stood): look at its host and storage; the same command goes on from the newest checkpoint",
        )
