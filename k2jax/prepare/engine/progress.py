"""How far a stage is, for a person: a bar on a terminal; in a file a line now and then, with the rate and time left."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

PAUSE_S = 0.5  # between two looks at the marks of completion, where a look takes no time
SHARE = 0.02  # of the time at most that looks take: a folder of 100,000 marks takes a network's file system seconds
FIRST_LINE_S, GROWTH, LONGEST_S = 30.0, 1.3, 1800.0  # of the time between two lines


@contextlib.contextmanager
def shown(name: str, num_tasks: int, marks: Path) -> Iterator[None]:
    """Tells of the files that appear in `marks` during this block; nothing of what is over before the first line."""
    over = threading.Event()
    show = _bar if sys.stderr.isatty() else _lines
    before = count(marks)  # of an earlier attempt: they say nothing of the rate
    # To what is stderr now: a task of this very process has what libraries print go elsewhere (said.py).
    arguments = (name, num_tasks, marks, before, over, sys.stderr)
    thread = threading.Thread(target=show, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _bar(name: str, num_tasks: int, marks: Path, before: int, over: threading.Event, out: TextIO) -> None:
    with tqdm(desc=name, total=num_tasks, initial=before, unit="task", leave=False, file=out) as bar:
        pause = PAUSE_S
        while not over.wait(pause):
            began = time.monotonic()
            bar.update(count(marks) - bar.n)
            pause = pause_after(time.monotonic() - began)


def _lines(name: str, num_tasks: int, marks: Path, before: int, over: threading.Event, out: TextIO) -> None:
    began, pause = time.monotonic(), FIRST_LINE_S
    while not over.wait(pause):
        looked = time.monotonic()
        done = count(marks)
        print(line_of(name, done, num_tasks, done - before, looked - began), file=out, flush=True)
        pause = max(min(LONGEST_S, pause * GROWTH), pause_after(time.monotonic() - looked))


def count(marks: Path) -> int:
    """How many files a folder has; 0 where there is none."""
    try:
        with os.scandir(marks) as entries:
            return sum(1 for _ in entries)
    except FileNotFoundError:
        return 0


def pause_after(look_s: float) -> float:
    """Seconds to the next look, after one that took so long."""
    return max(PAUSE_S, look_s / SHARE)


def line_of(name: str, done: int, num_tasks: int, since: int, elapsed_s: float) -> str:
    """Of `num_tasks` so many are done, `since` of them in the time that has elapsed."""
    text = f"stage {name}: {done:,} of {num_tasks:,} tasks"
    if not since:
        return f"{text}, none of them in the last {duration(elapsed_s)}"
    rate = since / elapsed_s
    units = (("a second", 1), ("a minute", 60))
    unit, times = next(((unit, s) for unit, s in units if rate * s >= 1), ("an hour", 3600))
    return f"{text}, {rate * times:.3g} {unit}, about {duration((num_tasks - done) / rate)} left"


def duration(seconds: float) -> str:
    """As people say it, to two units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
