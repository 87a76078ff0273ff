"""Goodput: the share of a run's wall time that went into steps that count, and each loss by its cause.

goodput.jsonl holds a record a launch, or a part of one up to a roll-back: when it began, how long it has lasted by a
clock that is never set, and that time by cause; written by training/clock.py, once a minute and at the end. What lies
between two records is a gap. All causes together are the wall time; what nobody knows is "unknown", never left out.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from k2jax.bucket import BucketPath
from k2jax.data.launches import read_launches
from k2jax.errors import ConfigError
from k2jax.files import read_bytes

NAME = "goodput.jsonl"
BEAT_S = 60.0  # between two signs of life; for so long after the last one nobody knows
CAUSES = {
    "step": "steps that count",
    "skipped": "steps that made no update",
    "run again": "steps made, lost with a launch, and made again",
    "rolled back": "steps left behind by a roll-back",
    "compile": "compiling, or reading what was compiled",
    "start": "from a process's start to the data opened",
    "restore": "reading or making the state",
    "data": "waiting for the next batch",
    "save": "waiting for checkpoints",
    "check": "computing steps again to compare them (stability.rerun_every)",
    "evaluate": "the end of the run: validation, samples",
    "down": "between two launches",
    "unknown": "after a last sign of life, launches without a record, frozen",
}
TIMED = ("step", "skipped", "compile", "start", "restore", "data", "save", "check", "evaluate")  # by a record


class Goodput(NamedTuple):
    """Of a run up to its last sign of life."""

    seconds: dict[str, float]  # by cause, in the order of CAUSES
    wall_s: float  # their sum
    launches: int
    last_step: int
    overlap_s: float  # records that begin before the one before them ends: counted twice; the hosts' clocks differ
    damaged: int  # lines of the file that are none
    ended: str | None  # how; None: it runs, or was killed
    last_sign: float  # Unix time


def read_records(path: Path | BucketPath) -> tuple[list[dict[str, Any]], int]:
    """(records, number of damaged lines) of a goodput.jsonl; none where there is no file."""
    if not path.exists():
        return [], 0
    lines = read_bytes(path, 1 << 30).splitlines()
    found = [parse(line) for line in lines]
    return [record for record in found if record], found.count(None)


def parse(line: bytes) -> dict[str, Any] | None:
    """A record; None for a line that is damaged."""
    try:
        record = json.loads(line)
        causes, (what, open_s) = record["causes"], record["open"]
        numbers = [record["began"], record["seconds"], open_s, *causes.values(), *sum(record["marks"], [])]
        good = (
            what in TIMED
            and causes.keys() <= {*TIMED, "unknown"}
            and all(type(value) in (int, float) and abs(value) < 1e15 for value in numbers)
            and all(len(mark) == 3 for mark in record["marks"])
            and min(record["seconds"], open_s, *causes.values(), 0) >= 0
            and type(record["step"]) in (int, type(None))
            and type(record["again"]) is bool
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return {**record, "ended": record.get("ended")} if good else None


def read_goodput(workdir: Path | BucketPath) -> Goodput:
    """ConfigError where the folder holds no run, or none that has kept time."""
    records, damaged = read_records(workdir / NAME)
    if not records:
        raise ConfigError(
            f"{workdir / NAME}: {'is damaged' if damaged else 'is not there'}: this is no run directory, or its run "
            f"has not begun with this version of k2jax, which keeps time from its next launch on"
        )
    return add_up(records, launch_times(workdir), damaged)


def launch_times(workdir: Path | BucketPath) -> list[float]:
    """Unix times, in whole seconds, of all launches that a run knows of."""
    return [datetime.fromisoformat(launch["time"]).timestamp() for launch in read_launches(workdir)]


def add_up(records: Sequence[dict[str, Any]], launches: Sequence[float] = (), damaged: int = 0) -> Goodput:
    """`records`: in the order of the file, at least one. `launches`: Unix times of all that are known to have begun."""
    seconds, overlap_s = dict.fromkeys(CAUSES, 0.0), 0.0
    earlier = [time for time in launches if time < records[0]["began"]]
    seconds["unknown"] += records[0]["began"] - min(earlier, default=records[0]["began"])
    kept = _Kept()
    for record, following in zip(records, [*records[1:], None], strict=True):
        for cause, value in record["causes"].items():
            seconds[cause] += value
        what, open_s = record["open"]
        lost = "rolled back" if following and following["again"] else "run again"
        # A step that a launch ended in is made anew.
        seconds[lost if following and what == "step" else what] += open_s
        seconds["unknown"] += max(0.0, record["seconds"] - sum(record["causes"].values()) - open_s)
        lost = "rolled back" if record["again"] else "run again"
        for cause, value in kept.follow(record).items():
            seconds[cause] -= value
            seconds[lost] += value
        if following:
            gap_s = following["began"] - record["began"] - record["seconds"]
            overlap_s += max(0.0, -gap_s)
            for cause, value in _gap(record, following, max(0.0, gap_s), launches).items():
                seconds[cause] += value
    last = records[-1]
    return Goodput(
        seconds=seconds,
        wall_s=sum(seconds.values()),
        launches=sum(not record["again"] for record in records),
        last_step=kept.last_step,
        overlap_s=overlap_s,
        damaged=damaged,
        ended=last["ended"],
        last_sign=last["began"] + last["seconds"],
    )


def _gap(
    record: dict[str, Any], following: dict[str, Any], gap_s: float, launches: Sequence[float]
) -> dict[str, float]:
    """Of the time between two records: until the first launch that left no record the run was down, but for a beat."""
    last = record["began"] + record["seconds"]
    # Launches are noted in whole seconds.
    between = [time for time in launches if last + 1 < time < following["began"] - 1]
    known_s = min(between) - last if between else gap_s
    unsure_s = 0.0 if record["ended"] else min(known_s, BEAT_S)
    return {"down": known_s - unsure_s, "unknown": unsure_s + gap_s - known_s}


class _Kept:
    """The steps that count up to now, and the time that they took, as segments between the marks of records."""

    def __init__(self):
        self._segments: list[tuple[int, int, float, float]] = []  # after, up to, seconds of steps, of skipped ones

    @property
    def last_step(self) -> int:
        return self._segments[-1][1] if self._segments else 0

    def follow(self, record: dict[str, Any]) -> dict[str, float]:
        """What of the time of steps, as recorded up to here, has been lost by where this record goes on from."""
        marks = [*record["marks"]]
        if not marks:
            return {}
        lost = self._cut(marks[0][0])
        final = [record["step"], record["causes"].get("step", 0.0), record["causes"].get("skipped", 0.0)]
        for (after, *before), (step, *now) in zip(marks, [*marks[1:], final], strict=True):
            if step > after:
                took, skipped = (b - a for a, b in zip(before, now, strict=True))
                self._segments.append((after, step, took, skipped))
        return lost

    def _cut(self, step: int) -> dict[str, float]:
        """Drops what came after a step. One between two marks shares their time evenly."""
        lost = {"step": 0.0, "skipped": 0.0}
        while self._segments and self._segments[-1][1] > step:
            after, last, took, skipped = self._segments.pop()
            share = min(1.0, (last - step) / (last - after))
            lost["step"] += share * took
            lost["skipped"] += share * skipped
            if share < 1.0:
                self._segments.append((after, step, (1 - share) * took, (1 - share) * skipped))
        return lost


# ---- for people ------------------------------------------------------------------------------------------------------


def describe(found: Goodput) -> str:
    """One line."""
    wall_s = max(found.wall_s, 1e-9)
    losses = sorted(
        ((value, cause) for cause, value in found.seconds.items() if cause not in ("step", "unknown")), reverse=True
    )
    told = [f"{cause} {value / wall_s:.1%}" for value, cause in losses if value / wall_s >= 0.0005]
    told.append(f"unknown {found.seconds['unknown'] / wall_s:.1%}")
    return (
        f"goodput {found.seconds['step'] / wall_s:.1%} of {duration(found.wall_s)} in {found.launches} "
        f"launch{'es' if found.launches != 1 else ''}: {', '.join(told)}"
    )


def table(found: Goodput, now: float) -> str:
    """A line a cause, and what else is to be known. `now`: Unix time."""
    wall_s = max(found.wall_s, 1e-9)
    lines = [
        f"{cause:12}{duration(value):>16}{value / wall_s:>8.1%}   {CAUSES[cause]}"
        for cause, value in found.seconds.items()
    ]
    lines.append(
        f"{'wall time':12}{duration(found.wall_s):>16}{'':>8}   in {found.launches} launch(es), up to step "
        f"{found.last_step}"
    )
    if found.ended:
        lines.append(f"ended: {found.ended}")
    else:
        since_s = max(0.0, now - found.last_sign)
        state = "it runs" if since_s < 3 * BEAT_S else "it was killed, or cannot write; what came since is not counted"
        lines.append(f"last sign of life {duration(since_s)} ago: {state}")
    if found.overlap_s > 1:
        lines.append(f"{duration(found.overlap_s)} count twice: records overlap, hosts' clocks differ or were set")
    if found.damaged:
        lines.append(f"{found.damaged} damaged line(s) of {NAME} are left out; their time is in the gaps")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """2 d 3 h, 3 h 4 min, 4 min 5 s, 5.6 s."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {whole} s"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
