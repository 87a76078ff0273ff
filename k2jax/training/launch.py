"""What the time from the start of a process to the end of its first step goes to: what a restart costs."""

import os
import time
from pathlib import Path
from typing import Any

from k2jax.parallel import compile_cache

LONGEST_S = 3600  # that a process takes to start: beyond it the clocks are not of one kind


class Launch:
    """`did(part)` gives the time since the last call to a part; after `finish` the parts are those of the launch."""

    def __init__(self, age_s: float = 0.0, again: bool = False):
        """`age_s`: how long ago the launch began; `again`: rolled back, in a launch that is recorded."""
        self.started = self._last = time.perf_counter() - age_s
        self.parts: dict[str, float] = {}  # seconds
        self.programs = {"asked": 0, "found": 0}  # of the compilation cache, up to the first step
        self._compiled_s = 0.0  # in all stages up to now
        self._compiles_since: float | None = None
        self.warm = False  # the step came out of the cache
        self.done = self.again = again
        self._before = compile_cache.counts()

    def did(self, part: str, at: float | None = None) -> None:
        """`at`: when, by time.perf_counter(); by default now. Nothing once the first step is done."""
        if not self.done:
            now = time.perf_counter() if at is None else at
            self.parts[part] = self.parts.get(part, 0.0) + now - self._last
            self._last = now

    def compile_s(self, now: float) -> float:
        """Seconds in which steps were compiled, up to now."""
        since = self._compiles_since  # the goodput clock's thread asks, too
        return self._compiled_s + (now - since if since else 0.0)

    def compiles(self) -> None:
        """A stage's step begins to be compiled."""
        self._compiles_since = time.perf_counter()

    def compiled(self, warm: bool) -> None:
        """A stage's step is; `warm`: it came out of the cache."""
        self._compiled_s, self._compiles_since = self.compile_s(time.perf_counter()), None
        if not self.done:
            self.warm = warm
            self.did("compile")

    def finish(self, step: int, at: float) -> dict[str, Any]:
        """The record of it: `step`, the first of this launch, was done at that time."""
        self.did("first step", at)
        self.done = True
        self.programs = compile_cache.counts().since(self._before)._asdict()
        seconds = {part: round(value, 3) for part, value in self.parts.items()}
        return {
            "step": step,
            "seconds": round(at - self.started, 3),
            "parts": seconds,
            "cache": "warm" if self.warm else "cold" if self.programs["asked"] else "off",
            "programs": self.programs,
        }


def describe(record: dict[str, Any]) -> str:
    """A record of `finish` as a line."""
    parts = dict(record["parts"])
    programs = record["programs"]
    how = "no cache" if record["cache"] == "off" else f"{record['cache']} cache"
    told = ", ".join(f"{part}{f' ({how})' if part == 'compile' else ''} {s:.1f}" for part, s in parts.items())
    kept = f"; {programs['found']} of {programs['asked']} programs out of the cache" if programs["asked"] else ""
    return f"step {record['step']} was done {record['seconds']:.1f} s after the launch: {told}{kept}"


def process_age_s() -> float:
    """How long ago this process started, before its imports; 0 where the system does not say."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
    return age if 0 <= age < LONGEST_S else 0.0
