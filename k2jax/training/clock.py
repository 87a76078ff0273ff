"""The trainer's goodput clock: it is told phases as the watchdog is, and keeps them in the run's goodput.jsonl.

What was measured is written once a minute by a thread, so that a kill loses no more of it; run/goodput.py adds up.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from k2jax import files
from k2jax.errors import RunError
from k2jax.parallel import cluster
from k2jax.run import energy, goodput
from k2jax.training.launch import Launch

TICK_S = 5.0
FROZEN_S = 30.0  # longer than this without a tick: the process was stopped (Ctrl-Z, a frozen machine)
TELL_S = 3600.0
MOST_MARKS = 1024


class Clock:
    """`at(what)` begins a phase; `with clock` ends the record of this launch. Only process 0 writes and tells."""

    def __init__(self, launch: Launch, tell: Callable[[str], None] = print):
        self._launch, self._tell = launch, tell
        self._began, age_s = time.time(), time.perf_counter() - launch.started
        self._began -= age_s
        self._since = launch.started  # of the phase
        self._ticked, self._told = time.perf_counter(), time.perf_counter()
        self._what, self._step = "start", None
        self._causes: dict[str, float] = {}
        self._beside: dict[str, float] = {}  # seconds of this phase that were something else
        self._compiled_s = 0.0  # up to this phase
        self._recent: dict[int, float] = {}  # seconds of the last two steps
        self._marks: list[list[float]] = []  # step, seconds of steps and of skipped ones up to it
        self._devices, self._joules = jax.device_count(), energy.joules()
        self._path: Path | None = None
        self._others: list[bytes] = []  # records of earlier launches
        self._failed = False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, name="k2jax-goodput", daemon=True)

    def keep(self, path: Path) -> None:
        """From here on it is written to the run directory, which this process holds."""
        if cluster.is_main():
            self._path = path / goodput.NAME
            lines = files.read_bytes(self._path, 1 << 30).splitlines(keepends=True) if self._path.exists() else []
            self._others = [line if line.endswith(b"\n") else line + b"\n" for line in lines]
            self._write(self._record())
            self._thread.start()

    def goes_on_from(self, step: int) -> None:
        """The state is that of `step`: what was made after it is lost."""
        with self._lock:
            self._step = step
            self._mark()

    def at(self, what: str) -> None:
        """The next phase, one of the watchdog's."""
        with self._lock:
            now = time.perf_counter()
            self._tick(now)
            beside, seconds = self._phase(now)
            self._compiled_s, self._beside = self._launch.compile_s(now), {}
            for cause, value in {**beside, self._what: seconds}.items():
                self._add(cause, value)
            if self._what == "step" and self._step is not None:
                self._recent[self._step] = seconds
            if what == "save":
                self._mark()
            self._what, self._since = what, now

    def beside(self, cause: str, seconds: float) -> None:
        """So much of this phase went to something else."""
        with self._lock:
            self._beside[cause] = self._beside.get(cause, 0.0) + seconds

    def stepped(self, step: int, last_row: dict[str, Any]) -> None:
        """In the phase "step": it is that of `step`. `last_row`: of the metrics, of the step before it or none."""
        with self._lock:
            self._step = step
            seconds = self._recent.pop(last_row.get("step"), 0.0)
            if last_row and not last_row["applied"]:
                self._add("step", -seconds)
                self._add("skipped", seconds)
        if time.perf_counter() - self._told > TELL_S:
            self._told = time.perf_counter()
            self._say(self._record())

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        done = "done" if self._what == "evaluate" else "rolled back"
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._path:
            record = self._record(kind.__name__ if kind else done)
            self._write(record)
            self._say(record)

    def _phase(self, now: float) -> tuple[dict[str, float], float]:
        """Of the phase up to now: what in it was something else, and its own seconds."""
        beside, rest = {}, now - self._since
        told = {**self._beside, "compile": self._launch.compile_s(now) - self._compiled_s}
        for cause, value in told.items():
            beside[cause] = min(value, rest)
            rest -= beside[cause]
        return beside, rest

    def _add(self, cause: str, seconds: float) -> None:
        self._causes[cause] = max(0.0, self._causes.get(cause, 0.0) + seconds)

    def _mark(self) -> None:
        if self._step is not None and (not self._marks or self._marks[-1][0] != self._step):
            self._marks.append([self._step, *(round(self._causes.get(c, 0.0), 3) for c in ("step", "skipped"))])
            if len(self._marks) > MOST_MARKS:
                del self._marks[1:-1:2]

    def _tick(self, now: float) -> None:
        if now - self._ticked > FROZEN_S:
            self._beside["unknown"] = self._beside.get("unknown", 0.0) + now - self._ticked - TICK_S
        self._ticked = now

    def _beat(self) -> None:
        written = time.perf_counter()
        while not self._over.wait(TICK_S):
            with self._lock:
                self._tick(time.perf_counter())
            if time.perf_counter() - written > goodput.BEAT_S:
                written = time.perf_counter()
                self._write(self._record())

    def _record(self, ended: str | None = None) -> dict[str, Any]:
        with self._lock:
            now = time.perf_counter()
            self._tick(now)
            beside, seconds = self._phase(now)
            causes = dict(self._causes)
            for cause, value in beside.items():
                causes[cause] = causes.get(cause, 0.0) + value
            return {
                "began": round(self._began, 3),
                "seconds": round(now - self._launch.started, 3),
                "host": socket.gethostname(),
                "processes": cluster.count(),
                "devices": self._devices,
                "joules": self._used(),
                "again": self._launch.again,
                "step": self._step,
                "causes": {cause: round(value, 3) for cause, value in causes.items()},
                "open": [self._what, round(seconds, 3)],
                "marks": [*self._marks],
                "ended": ended,
            }

    def _used(self) -> float | None:
        """Joules of this host's GPUs since this record began; None where nothing counts them."""
        now = energy.joules()
        return None if now is None or self._joules is None else round(now - self._joules, 3)

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        try:
            files.write_bytes(self._path, b"".join([*self._others, line]))
        except (OSError, RunError) as error:  # what needs the disk to train will say so itself
            if not self._failed:
                self._tell(f"the goodput of this launch is not kept: {error}")
            self._failed = True

    def _say(self, record: dict[str, Any]) -> None:
        """What goodput is up to now, of all launches."""
        if self._path:
            earlier = [record for record in map(goodput.parse, self._others) if record]
            try:
                launches = goodput.launch_times(self._path.parent)
            except (OSError, RunError) as error:  # the run ends as it would have
                self._tell(f"goodput without what environment.json has of launches: {error}")
                launches = []
            self._tell(goodput.describe(goodput.add_up([*earlier, record], launches)))
