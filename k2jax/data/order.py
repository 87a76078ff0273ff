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

A run whose data change after a step has an order for each of its manifests, each the `past` of the next. What was read
stays what it was, under the positions that it had; the new manifest's have numbers of their own, after them. The stage
in which the change falls goes on for the steps that it still has by the new manifest, with the new mix, and with the
rows of each subset that it has not read: none is read twice or lost, unless the subset's store is another one.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from k2jax.data.journal import ranges_of
from k2jax.data.layout import Layout, Stream
from k2jax.data.manifest import is_packed, manifest_digest, sha256_json
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
    """One stage: its positions [first_position, stop_position) and the steps that the journal left of it.

    Of a stage in which the data changed there are two, in the orders before and after the change.
    """

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
    done: int = 0  # steps of the stage before `first_step`, under other data

    @property
    def num_steps(self) -> int:
        """Of the whole stage, in which its learning rate goes from start to end."""
        return self.done + self.last_step - self.first_step + 1


class Order:
    """The data order of a run, fixed when made. Cheap to make, small, picklable.

    Args:
        manifest: of manifest.py.
        journal: entries of journal.py on these positions. Only those with ranges matter; ConfigError where one is
            no range of whole steps of one stage, or takes what an earlier entry has skipped.
        past: the order before the manifest changed; `manifest` and `stages` are of what comes after.
        after_step: the last step of the past.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        journal: Iterable[dict[str, Any]] = (),
        past: "Order | None" = None,
        after_step: int = 0,
    ):
        self.manifest, self.past, self.after_step = manifest, past, after_step
        seed, stages = manifest["seed"], manifest["stages"]
        # Stages before the one in which the run stands have no part in this order.
        at, done = past.stands_in(manifest, after_step) if past else (0, 0)
        streams = past.streams(after_step) if past else {}
        subset_index = {name: i for i, name in enumerate(sorted(manifest["stores"]))}
        self._layouts = [
            Layout(
                stage,
                i,
                seed,
                subset_index,
                done=done if i == at else stage["chunks"] * stage["steps_per_chunk"] if i < at else 0,
                streams={s["name"]: streams[key] for s in stage["subsets"] if (key := _key(manifest, i, s)) in streams},
                salt=(after_step,) if past else (),
            )
            for i, stage in enumerate(stages)
        ]
        base = past.num_positions if past else 0
        sizes = [layout.steps * stage["rows_per_step"] for layout, stage in zip(self._layouts, stages, strict=True)]
        self._first_positions = [base + sum(sizes[:i]) for i in range(len(sizes))]
        self.num_positions = base + sum(sizes)

        intervals = [[(a, a + n)] if n else [] for a, n in zip(self._first_positions, sizes, strict=True)]
        for entry in journal:
            for a, b in ranges_of(entry):
                self._apply(a, b, entry.get("how", entry["kind"]), stages, intervals)

        self.stages: list[StagePlan] = []
        self._intervals: list[Interval] = []  # of all stages, in the order in which they are read
        self._interval_steps: list[int] = []  # the first step of each
        step = after_step + 1
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
                    done=done if i == at else 0,
                )
            )
        self.num_steps = step - 1
        content = {"manifest": manifest_digest(manifest), "intervals": intervals}
        self._digest = sha256_json({**content, "past": past.digest(), "after_step": after_step} if past else content)

    def _apply(self, a: int, b: int, how: str, stages: list[dict], intervals: list[list[Interval]]) -> None:
        where = f"journal: {how} of positions {a}:{b}"
        if not self._first_positions[0] <= a < b <= self.num_positions:
            raise ConfigError(f"{where}: expected a range inside {self._first_positions[0]}:{self.num_positions}")
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
        intervals[i] = _join(kept + [(a, b)] if how == "defer" else kept)

    def digest(self) -> str:
        """SHA-256 (hex) of all that decides which rows each step reads."""
        return self._digest

    def of_step(self, step: int) -> "Order":
        """The order that has the step: this one, or one of its past."""
        return self if self.past is None or step > self.after_step else self.past.of_step(step)

    def of_position(self, position: int) -> "Order":
        """The same of a position."""
        return self if self.past is None or position >= self.past.num_positions else self.past.of_position(position)

    def stage_of_step(self, step: int) -> StagePlan:
        """The stage that step `step` (from 1) belongs to; ConfigError past the last step."""
        if not 1 <= step <= self.num_steps:
            raise ConfigError(f"step {step}: the run's steps are 1 to {self.num_steps}")
        stages = self.of_step(step).stages
        return stages[bisect_left(stages, step, key=lambda stage: stage.last_step)]

    def positions(self, step: int) -> np.ndarray:
        """The positions that step `step` reads, int64 (rows_per_step,)."""
        rows_per_step, order = self.stage_of_step(step).rows_per_step, self.of_step(step)
        i = bisect_right(order._interval_steps, step) - 1
        first = order._intervals[i][0] + (step - order._interval_steps[i]) * rows_per_step
        return np.arange(first, first + rows_per_step)

    def step_of_position(self, position: int) -> int | None:
        """The step that reads a position, None if the journal skips it or the data had changed before."""
        if self.past and position < self.past.num_positions:
            step = self.past.step_of_position(position)
            return step if step and step <= self.after_step else None
        stage = self.stages[self._stage_of_position(position)]
        for (a, b), step in zip(self._intervals, self._interval_steps, strict=True):
            if a <= position < b:
                return step + (position - a) // stage.rows_per_step
        return None

    def row(self, position: int) -> Row:
        """The row at one position, by the manifest of `of_position`."""
        order = self.of_position(position)
        i = order._stage_of_position(position)
        return Row(i, *order._layouts[i].row(int(position) - order._first_positions[i]))

    def rows(self, positions: np.ndarray) -> Rows:
        """The rows at many positions of one manifest, int64 (rows,) each; the same answers as `row`."""
        positions = np.asarray(positions, np.int64)
        if self.past and positions.size and positions.min() < self.past.num_positions:
            assert positions.max() < self.past.num_positions, "positions of two manifests at once"
            return self.past.rows(positions)
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
        """All positions of a stage of this manifest at which a window of a subset stands: one for each epoch."""
        first = self._first_positions[stage]
        return [first + offset for offset in self._layouts[stage].find(subset, int(window))]

    def _stage_of_position(self, position: int) -> int:
        if not self._first_positions[0] <= position < self.num_positions:
            raise ConfigError(f"position {position}: the run's positions are 0 to {self.num_positions - 1}")
        return bisect_right(self._first_positions, position) - 1

    # ---- where another manifest takes over ------------------------------------------------------------------------

    def reads(self, last_step: int) -> list[tuple[str, list[Interval]]]:
        """(digest of the manifest, positions in their order) of steps 1 to `last_step`: what nothing may change."""
        before = self.past.reads(min(last_step, self.after_step)) if self.past else []
        own = _join([piece for pieces in self._split(last_step)[0] for piece in pieces])
        return [*before, (manifest_digest(self.manifest), own)] if own else before

    def stands_in(self, manifest: dict[str, Any], step: int) -> tuple[int, int]:
        """(index of the stage in a new manifest, its steps that are done) of the step that was made last."""
        plan = self.stage_of_step(step)
        names = [stage["name"] for stage in manifest["stages"]]
        if plan.name not in names:
            raise ConfigError(
                f"the run stands in stage {plan.name!r}, after step {step}, and the new stages are {', '.join(names)}: "
                f"keep that stage's name, whatever of it changes"
            )
        return names.index(plan.name), plan.done + step - plan.first_step + 1

    def streams(self, step: int) -> dict[tuple, Stream]:
        """After a step: what is left of each subset of each stage that was begun, under any manifest so far."""
        found = self.past.streams(self.after_step) if self.past else {}
        read, left = self._split(step)
        for plan, layout, done, still in zip(self.stages, self._layouts, read, left, strict=True):
            first, size = plan.first_position, plan.stop_position - plan.first_position
            skipped = [(first, plan.stop_position)] if size else []
            for a, b in [*done, *still]:
                skipped = _without(skipped, a, b)
            reached = max((b - first for _, b in [*done, *skipped]), default=0)
            if reached:
                unread = [(a - first, b - first) for a, b in still]
                streams = layout.streams_after(unread, reached)
                stage = self.manifest["stages"][plan.index]
                found |= {_key(self.manifest, plan.index, s): streams[s["name"]] for s in stage["subsets"]}
        return found

    def _split(self, last_step: int) -> tuple[list[list[Interval]], list[list[Interval]]]:
        """By stage: the positions that its steps to `last_step` read, and those of its later ones."""
        read: list[list[Interval]] = [[] for _ in self.stages]
        left: list[list[Interval]] = [[] for _ in self.stages]
        for (a, b), first_step in zip(self._intervals, self._interval_steps, strict=True):
            i = self._stage_of_position(a)
            middle = min(b, max(a, a + (last_step + 1 - first_step) * self.stages[i].rows_per_step))
            read[i] += [(a, middle)] if a < middle else []
            left[i] += [(middle, b)] if middle < b else []
        return read, left


def _key(manifest: dict[str, Any], stage: int, subset: dict[str, Any]) -> tuple:
    """Under which a subset's stream goes on in a later manifest: the same tokens, cut and permuted in the same way."""
    content = manifest["stores"][subset["name"]]["root_digest"]
    length = manifest["stages"][stage]["sequence_length"]
    stands = manifest["seed"], stage, subset["name"], content, subset["windows"], length, manifest["label_shift"]
    how = manifest["stages"][stage]
    return (*stands, how["kind"], how["too_long"]) if is_packed(how) else stands


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
