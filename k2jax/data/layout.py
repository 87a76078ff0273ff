"""How one stage is laid out: which window of which subset stands at each of its positions. order.py says how, in words.

A stage that goes on after its data have changed goes on with what it has not read of each subset: a `Stream`.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from k2jax.data.manifest import share_out
from k2jax.data.permutation import derive_key, permute, splitmix, unpermute
from k2jax.errors import ConfigError

MAX_SEGMENTS = 10_000_000  # of a stage: its table has two int64 a subset for each
MAX_LEFT = 50_000_000  # rows that a stage may have left behind when its data change: kept in memory


class Stream(NamedTuple):
    """The rows k of a subset that a stage has still to read: those left behind, then `next` and all after it."""

    left: np.ndarray
    next: int


class Layout:
    """What stands at each position of one stage, by offset from its first position.

    Before the shuffle the rows of a segment stand one subset after the other, each subset's in a *run*. A subset's rows
    here are j = 0, 1, 2, ...; the rows k of its stream that they are differ from them where it goes on.

    Args:
        done: steps of the stage that were made before, under other data.
        streams: by subset, where it goes on; a subset that is not there begins.
        salt: in the key of the shuffle, so that a stage that goes on is not shuffled as it was.
    """

    def __init__(
        self,
        stage: dict[str, Any],
        index: int,
        seed: int,
        subset_index: dict[str, int],
        *,
        done: int = 0,
        streams: dict[str, Stream] | None = None,
        salt: tuple[int, ...] = (),
    ):
        subsets = stage["subsets"]
        self.names = [s["name"] for s in subsets]
        self.subset = np.array([subset_index[name] for name in self.names])
        self.windows = np.array([s["windows"] for s in subsets])
        self.keys = np.array([derive_key(seed, "windows", index, name) for name in self.names], np.uint64)
        self.shuffle_key = derive_key(seed, "rows", index, *salt)
        begin = Stream(np.empty(0, np.int64), 0)
        self.streams = [(streams or {}).get(name, begin) for name in self.names]
        self.steps = max(0, stage["chunks"] * stage["steps_per_chunk"] - done)
        if self.steps > MAX_SEGMENTS * stage["steps_per_chunk"]:
            raise ConfigError(f"stage {stage['name']!r}: more than {MAX_SEGMENTS:,} chunks: make them longer")
        counts = _rows_by_chunk(stage, self.steps)
        epochs = int((counts.sum(axis=0) // self.windows).sum())
        if len(counts) + epochs > MAX_SEGMENTS:
            raise ConfigError(
                f"stage {stage['name']!r}: {len(counts):,} chunks and {epochs:,} epochs of its subsets, more than the "
                f"{MAX_SEGMENTS:,} that can be laid out: fewer chunks, or a smaller share for the smallest subset"
            )
        # k[g, s]: rows of subset s before segment g; its last line is the totals. segment[g]: rows of all.
        ends = [
            _epoch_ends(stream, int(windows), int(total))
            for stream, windows, total in zip(self.streams, self.windows, counts.sum(axis=0), strict=True)
        ]
        self.k = segment_table(counts, ends)
        self.segment = self.k.sum(axis=1)
        counts = np.diff(self.k, axis=0)
        # run[g * subsets + s]: the offset at which subset s begins in segment g
        self.run = (self.segment[:-1, None] + np.cumsum(counts, axis=1) - counts).ravel()

    def row(self, offset: int) -> tuple[int, int, int]:
        """(subset, epoch, window) at one offset."""
        g = int(self.segment.searchsorted(offset, side="right")) - 1
        start, stop = self.segment[g : g + 2].tolist()
        place = start + permute(offset - start, stop - start, splitmix(self.shuffle_key, g))
        run = int(self.run.searchsorted(place, side="right")) - 1
        column = run % len(self.subset)
        windows, j = int(self.windows[column]), int(self.k[g, column]) + place - int(self.run[run])
        left, following = self.streams[column]
        k = int(left[j]) if j < len(left) else following + j - len(left)
        epoch, index = divmod(k, windows)
        return int(self.subset[column]), epoch, permute(index, windows, int(self.keys[column]))

    def rows(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same at many offsets."""
        column, k = self._stream_rows(offsets)
        windows = self.windows[column]
        epoch, index = np.divmod(k, windows)
        return self.subset[column], epoch, permute(index, windows, self.keys[column])

    def find(self, subset: int, window: int) -> list[int]:
        """The offsets at which a window of a subset stands."""
        if subset not in self.subset:
            return []
        column = self.subset.tolist().index(subset)
        windows = int(self.windows[column])
        if not 0 <= window < windows:
            return []
        first = unpermute(window, windows, int(self.keys[column]))
        (left, following), total = self.streams[column], int(self.k[-1, column])
        behind = np.flatnonzero(left % windows == first)
        ahead = np.arange(first + max(0, -(-(following - first) // windows)) * windows, following + total, windows)
        j = np.concatenate([behind, ahead - following + len(left)])
        j = j[j < total]
        g = self.k[:, column].searchsorted(j, side="right") - 1
        place = self.run[g * len(self.subset) + column] + j - self.k[g, column]
        start, size = self.segment[g], self.segment[g + 1] - self.segment[g]
        offsets = start + unpermute(place - start, size, splitmix(self.shuffle_key, g.astype(np.uint64)))
        return offsets.tolist()

    def streams_after(self, unread: list[tuple[int, int]], reached: int) -> dict[str, Stream]:
        """What is left of each subset, by name, once all offsets below `reached` are read or skipped but the `unread`.

        `unread` are intervals of offsets, also above: what they hold below the end of `reached`'s segment is left
        behind, the rest comes in its turn. ConfigError where that is too much to be kept.
        """
        g = int(self.segment.searchsorted(reached))
        end = int(self.segment[g])
        intervals = [(a, min(b, end)) for a, b in unread if a < end]
        count = sum(b - a for a, b in intervals)
        if count > MAX_LEFT:
            raise ConfigError(
                f"a change of data would leave {count:,} rows behind that were put off, more than {MAX_LEFT:,}: read "
                f"them first, or skip them in the journal"
            )
        offsets = np.concatenate([np.empty(0, np.int64), *(np.arange(a, b) for a, b in intervals)])
        column, k = self._stream_rows(offsets)
        found = {}
        for c, name in enumerate(self.names):
            (left, following), j = self.streams[c], int(self.k[g, c])
            behind = np.sort(np.concatenate([k[column == c], left[j:]]))
            found[name] = Stream(behind, following + max(0, j - len(left)))
        return found

    def _stream_rows(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(column, k) of the rows at some offsets."""
        g = self.segment.searchsorted(offsets, side="right") - 1
        start, size = self.segment[g], self.segment[g + 1] - self.segment[g]
        place = start + permute(offsets - start, size, splitmix(self.shuffle_key, g.astype(np.uint64)))
        run = self.run.searchsorted(place, side="right") - 1
        column = run % len(self.subset)
        j = self.k[g, column] + place - self.run[run]
        k = j.copy()
        for c, (left, following) in enumerate(self.streams):
            if len(left) or following:
                here = column == c
                behind = np.minimum(j[here], len(left) - 1)
                ahead = following + j[here] - len(left)
                k[here] = np.where(j[here] < len(left), left[behind], ahead) if len(left) else ahead
        return column, k


def _rows_by_chunk(stage: dict[str, Any], steps: int) -> np.ndarray:
    """Rows of each subset in each chunk of the last `steps` steps of a stage; its last chunk may be short."""
    subsets, (chunks, short) = stage["subsets"], divmod(steps, stage["steps_per_chunk"])
    if steps == stage["chunks"] * stage["steps_per_chunk"]:
        rows = {s["name"]: s["rows"] for s in subsets}
    else:
        weights = {s["name"]: s["windows"] * Fraction(str(s["repeats"])) for s in subsets}
        rows = share_out(steps * stage["rows_per_step"], weights)
    last = {name: 0 for name in rows}
    if short:
        last = share_out(short * stage["rows_per_step"], {name: Fraction(n) for name, n in rows.items()})
    before = np.array([rows[s["name"]] - last[s["name"]] for s in subsets])
    counts = chunk_counts(before, chunks) if chunks else np.empty((0, len(subsets)), np.int64)
    return np.concatenate([counts, [[last[s["name"]] for s in subsets]]]) if short else counts


def _epoch_ends(stream: Stream, windows: int, total: int) -> np.ndarray:
    """The j in (0, total) at which an epoch begins."""
    last = stream.next + total
    multiples = np.arange(windows, last, windows)
    behind = stream.left.searchsorted(multiples[multiples <= stream.next])
    ends = np.concatenate([behind, len(stream.left) + multiples[multiples > stream.next] - stream.next])
    return np.unique(ends[(ends > 0) & (ends < total)])


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


def segment_table(counts: np.ndarray, ends: list[np.ndarray]) -> np.ndarray:
    """Where segments begin: rows of each subset (columns) before each, int64 (segments + 1, subsets).

    Segments begin at every chunk (rows of `counts`) and wherever an epoch of a subset ends inside a chunk, before its
    row `ends[subset]`. If that is after m of its n rows there, every other subset t is cut after m * counts[t] // n of
    its own.
    """
    k_chunk = np.concatenate([np.zeros((1, len(ends)), np.int64), np.cumsum(counts, axis=0)])
    tables = [k_chunk]
    for column, k in enumerate(ends):
        chunk = k_chunk[:, column].searchsorted(k, side="right") - 1
        m = k - k_chunk[chunk, column]
        tables.append(k_chunk[chunk] + m[:, None] * counts[chunk] // counts[chunk, column, None])
    table = np.concatenate(tables)
    # A later cut has more of some subset and less of none, so sums tell cuts apart and put them in order.
    return table[np.unique(table.sum(axis=1), return_index=True)[1]]
