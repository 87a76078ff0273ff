"""The order: which window of which store stands at each position, and which positions each step reads.

`Order(manifest, journal)` is a function with a small table, not an index: any position of any stage is
looked up in microseconds, on any host, in any order. A position is a row number from 0 over all stages in
the order of the manifest alone; steps count from 1. Without a journal, step n of the first stage reads
positions [(n - 1) * rows_per_step, n * rows_per_step).

How a stage is laid out:
1. Every chunk holds every subset in its share (`chunk_counts`).
2. A subset's rows k = 0, 1, 2, ... run through the chunks. k // windows is the epoch, and k % windows goes
   through one keyed permutation of the windows. All epochs share it, so a window comes again exactly one
   epoch later: of a subset with 3 repeats, a third of the stage apart.
3. Rows are shuffled inside a *segment* by another keyed permutation. A segment is a chunk, or a piece of one
   where an epoch of some subset ends in it. So no segment holds two epochs of a subset, and every window of
   an epoch is read before any is repeated.
The journal then takes ranges of whole steps out of a stage (skip) or puts them at its end (defer).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from k2jax.data.manifest import manifest_digest, sha256_json
from k2jax.data.permutation import derive_key, permute, splitmix, unpermute
from k2jax.errors import ConfigError

Interval = tuple[int, int]  # positions [first, stop)


class Row(NamedTuple):
    """One row: stage index, subset index in sorted(manifest["stores"]), epoch from 0, window of the store."""

    stage: int
    subset: int
    epoch: int
    window: int


class Rows(NamedTuple):
    """Many rows: as `Row`, each field an int64 array (rows,)."""

    stage: np.ndarray
    subset: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


@dataclass(frozen=True)
class StagePlan:
    """One stage: its positions [first_position, stop_position) and the steps that the journal left of it."""

    name: str
    index: int
    sequence_length: int
    rows_per_step: int
    steps_per_chunk: int
    chunks: int
    first_position: int
    stop_position: int
    first_step: int
    last_step: int  # read by this stage, too; first_step - 1 if the journal skips all of it


class Order:
    """The data order of a run, fixed when made. Cheap to make, small, picklable.

    Args:
        manifest: of manifest.py.
        journal: entries of journal.py. Only "skip" and "defer" matter here; ConfigError if one of them is
            not a range of whole steps of one stage, or takes what an earlier entry has skipped.
    """

    def __init__(self, manifest: dict[str, Any], journal: Iterable[dict[str, Any]] = ()):
        seed, stages = manifest["seed"], manifest["stages"]
        subset_index = {name: i for i, name in enumerate(sorted(manifest["stores"]))}
        self._layouts = [_Layout(stage, i, seed, subset_index) for i, stage in enumerate(stages)]
        sizes = [s["chunks"] * s["steps_per_chunk"] * s["rows_per_step"] for s in stages]
        self._first_positions = [sum(sizes[:i]) for i in range(len(sizes))]
        self.num_positions = sum(sizes)

        intervals = [[(a, a + n)] for a, n in zip(self._first_positions, sizes, strict=True)]
        for entry in journal:
            if entry["kind"] in ("skip", "defer"):
                self._apply(entry, stages, intervals)

        self.stages: list[StagePlan] = []
        self._intervals: list[Interval] = []  # of all stages, in the order in which they are read
        self._interval_steps: list[int] = []  # the first step of each
        step = 1
        for i, stage in enumerate(stages):
            first_step = step
            for a, b in intervals[i]:
                self._intervals.append((a, b))
                self._interval_steps.append(step)
                step += (b - a) // stage["rows_per_step"]
            fields = ("name", "sequence_length", "rows_per_step", "steps_per_chunk", "chunks")
            self.stages.append(
                StagePlan(
                    **{field: stage[field] for field in fields},
                    index=i,
                    first_position=self._first_positions[i],
                    stop_position=self._first_positions[i] + sizes[i],
                    first_step=first_step,
                    last_step=step - 1,
                )
            )
        self.num_steps = step - 1
        self._digest = sha256_json({"manifest": manifest_digest(manifest), "intervals": intervals})

    def _apply(self, entry: dict[str, Any], stages: list[dict], intervals: list[list[Interval]]) -> None:
        a, b = entry["positions"]
        where = f"journal: {entry['kind']} of positions {a}:{b}"
        if not 0 <= a < b <= self.num_positions:
            raise ConfigError(f"{where}: expected a range inside 0:{self.num_positions}")
        i = bisect_right(self._first_positions, a) - 1
        first, rows_per_step = self._first_positions[i], stages[i]["rows_per_step"]
        stop = self._first_positions[i + 1] if i + 1 < len(stages) else self.num_positions
        if b > stop:
            raise ConfigError(f"{where}: stage {stages[i]['name']!r} ends at {stop}: split the range there")
        if (a - first) % rows_per_step or (b - first) % rows_per_step:
            raise ConfigError(f"{where}: expected whole steps, {first} plus multiples of {rows_per_step}")
        kept = _without(intervals[i], a, b)
        if _size(kept) != _size(intervals[i]) - (b - a):
            raise ConfigError(f"{where}: some are skipped already: name only positions still to be read")
        intervals[i] = _join(kept + [(a, b)] if entry["kind"] == "defer" else kept)

    def digest(self) -> str:
        """SHA-256 (hex) of all that decides which rows each step reads."""
        return self._digest

    def stage_of_step(self, step: int) -> StagePlan:
        """The stage that step `step` (from 1) belongs to; ConfigError past the last step."""
        if not 1 <= step <= self.num_steps:
            raise ConfigError(f"step {step}: the run's steps are 1 to {self.num_steps}")
        return self.stages[bisect_left(self.stages, step, key=lambda stage: stage.last_step)]

    def positions(self, step: int) -> np.ndarray:
        """The positions that step `step` reads, int64 (rows_per_step,)."""
        rows_per_step = self.stage_of_step(step).rows_per_step
        i = bisect_right(self._interval_steps, step) - 1
        first = self._intervals[i][0] + (step - self._interval_steps[i]) * rows_per_step
        return np.arange(first, first + rows_per_step)

    def step_of_position(self, position: int) -> int | None:
        """The step that reads a position, None if the journal skips it."""
        stage = self.stages[self._stage_of_position(position)]
        for (a, b), step in zip(self._intervals, self._interval_steps, strict=True):
            if a <= position < b:
                return step + (position - a) // stage.rows_per_step
        return None

    def row(self, position: int) -> Row:
        """The row at one position."""
        i = self._stage_of_position(position)
        return Row(i, *self._layouts[i].row(int(position) - self._first_positions[i]))

    def rows(self, positions: np.ndarray) -> Rows:
        """The rows at many positions, int64 (rows,) each; the same answers as `row`."""
        positions = np.asarray(positions, np.int64)
        if positions.size:
            self._stage_of_position(int(positions.min()))
            self._stage_of_position(int(positions.max()))
        stage = np.searchsorted(self._first_positions, positions, side="right") - 1
        result = Rows(stage, *np.empty((3, len(positions)), np.int64))
        for i in np.unique(stage):
            here = stage == i
            found = self._layouts[i].rows(positions[here] - self._first_positions[i])
            result.subset[here], result.epoch[here], result.window[here] = found
        return result

    def find(self, stage: int, subset: int, window: int) -> list[int]:
        """All positions of a stage at which a window of a subset stands: one for each epoch that reads it."""
        first = self._first_positions[stage]
        return [first + offset for offset in self._layouts[stage].find(subset, int(window))]

    def _stage_of_position(self, position: int) -> int:
        if not 0 <= position < self.num_positions:
            raise ConfigError(f"position {position}: the run's positions are 0 to {self.num_positions - 1}")
        return bisect_right(self._first_positions, position) - 1


class _Layout:
    """What stands at each position of one stage, by offset from its first position.

    Before the shuffle the rows of a segment stand one subset after the other, each subset's in a *run*.
    """

    def __init__(self, stage: dict[str, Any], index: int, seed: int, subset_index: dict[str, int]):
        subsets = stage["subsets"]
        self.subset = np.array([subset_index[s["name"]] for s in subsets])
        self.windows = np.array([s["windows"] for s in subsets])
        self.keys = np.array([derive_key(seed, "windows", index, s["name"]) for s in subsets], np.uint64)
        self.shuffle_key = derive_key(seed, "rows", index)
        rows = np.array([s["rows"] for s in subsets])
        # k[g, s]: rows of subset s before segment g; its last line is the totals. segment[g]: rows of all.
        self.k = segment_table(chunk_counts(rows, stage["chunks"]), self.windows)
        self.segment = self.k.sum(axis=1)
        counts = np.diff(self.k, axis=0)
        # run[g * subsets + s]: the offset at which subset s begins in segment g
        self.run = (self.segment[:-1, None] + np.cumsum(counts, axis=1) - counts).ravel()

    def row(self, offset: int) -> tuple[int, int, int]:
        g = int(self.segment.searchsorted(offset, side="right")) - 1
        start, stop = self.segment[g : g + 2].tolist()
        place = start + permute(offset - start, stop - start, splitmix(self.shuffle_key, g))
        run = int(self.run.searchsorted(place, side="right")) - 1
        column = run % len(self.subset)
        windows = int(self.windows[column])
        epoch, index = divmod(int(self.k[g, column]) + place - int(self.run[run]), windows)
        return int(self.subset[column]), epoch, permute(index, windows, int(self.keys[column]))

    def rows(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        g = self.segment.searchsorted(offsets, side="right") - 1
        start, size = self.segment[g], self.segment[g + 1] - self.segment[g]
        place = start + permute(offsets - start, size, splitmix(self.shuffle_key, g.astype(np.uint64)))
        run = self.run.searchsorted(place, side="right") - 1
        column = run % len(self.subset)
        windows = self.windows[column]
        epoch, index = np.divmod(self.k[g, column] + place - self.run[run], windows)
        return self.subset[column], epoch, permute(index, windows, self.keys[column])

    def find(self, subset: int, window: int) -> list[int]:
        if subset not in self.subset:
            return []
        column = self.subset.tolist().index(subset)
        windows = int(self.windows[column])
        if not 0 <= window < windows:
            return []
        first = unpermute(window, windows, int(self.keys[column]))
        k = np.arange(first, self.k[-1, column], windows)
        g = self.k[:, column].searchsorted(k, side="right") - 1
        place = self.run[g * len(self.subset) + column] + k - self.k[g, column]
        start, size = self.segment[g], self.segment[g + 1] - self.segment[g]
        offsets = start + unpermute(place - start, size, splitmix(self.shuffle_key, g.astype(np.uint64)))
        return offsets.tolist()


def chunk_counts(rows: np.ndarray, chunks: int) -> np.ndarray:
    """Rows of each subset (columns) in each chunk: int64 (chunks, subsets).

    Every chunk holds the same total, every column sums to `rows` (int64, together a multiple of `chunks`),
    and every count is rows/chunks rounded down or up.
    """
    low, extra = np.divmod(rows, chunks)
    # The extras of all subsets, laid end to end, are dealt to the chunks in turn: each chunk gets equally
    # many, and no subset meets a chunk twice (its extras are fewer than the chunks). The turns run through
    # the chunks by the golden ratio, which spreads each subset's extras evenly over the stage.
    first = np.cumsum(extra) - extra
    golden = np.arange(chunks, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    turn = np.argsort(np.argsort(golden))
    return low + ((turn[:, None] - first) % chunks < extra)


def segment_table(counts: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Where segments begin: rows of each subset (columns) before each, int64 (segments + 1, subsets).

    Segments begin at every chunk (rows of `counts`) and wherever an epoch of a subset ends inside a chunk. If
    that is after m of its n rows there, every other subset t is cut after m * counts[t] // n of its own.
    """
    k_chunk = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])
    tables = [k_chunk]
    for column, size in enumerate(windows):
        k = np.arange(size, k_chunk[-1, column], size)
        chunk = k_chunk[:, column].searchsorted(k, side="right") - 1
        m = k - k_chunk[chunk, column]
        tables.append(k_chunk[chunk] + m[:, None] * counts[chunk] // counts[chunk, column, None])
    table = np.concatenate(tables)
    # A later cut has more of some subset and less of none, so sums tell cuts apart and put them in order.
    return table[np.unique(table.sum(axis=1), return_index=True)[1]]


def _without(intervals: list[Interval], a: int, b: int) -> list[Interval]:
    """The intervals, in their order, less what lies in [a, b)."""
    pieces = [piece for x, y in intervals for piece in ((x, min(y, a)), (max(x, b), y))]
    return [(x, y) for x, y in pieces if x < y]


def _join(intervals: list[Interval]) -> list[Interval]:
    """The same sequence with neighbours that continue each other made one: a digest sees only the order."""
    joined = intervals[:1]
    for a, b in intervals[1:]:
        if a == joined[-1][1]:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return joined


def _size(intervals: list[Interval]) -> int:
    return sum(b - a for a, b in intervals)
