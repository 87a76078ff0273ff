"""Series thinned as they are read, so that extremes stay: memory and page do not grow with the run.

Steps are gathered in buckets of one width. Of each series a bucket keeps the mean, the least and the greatest value,
and at which steps these two were. When there are too many buckets, each two become one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

LATE = np.iinfo(np.int64).max


class Thinned:
    """Any number of steps of some series in at most `most` buckets. Steps that are not finite count as missing."""

    def __init__(self, most: int, most_series: int = 400):
        assert most % 2 == 0, most
        self.most, self.most_series = most, most_series
        self.base: int | None = None  # the first step
        self.width, self.last = 1, 0
        self.left_out = 0  # series beyond `most_series`
        self._columns: dict[str, int] = {}
        self._low = self._high = self._sum = np.zeros((most, 0))
        self._count = self._low_at = self._high_at = np.zeros((most, 0), np.int64)

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    @property
    def buckets(self) -> int:
        return 0 if self.base is None else (self.last - self.base) // self.width + 1

    @property
    def first_steps(self) -> np.ndarray:
        """Of each bucket."""
        return (self.base or 0) + np.arange(self.buckets) * self.width

    @property
    def last_steps(self) -> np.ndarray:
        return np.minimum(self.first_steps + self.width - 1, self.last)

    def add(self, steps: Sequence[int], columns: dict[str, np.ndarray]) -> None:
        """Values of some steps, none before the first that was ever added: {series: one of each step, NaN for none}."""
        at = np.asarray(steps, np.int64)
        if not len(at):
            return
        order = np.argsort(at, kind="stable")
        at = at[order]
        if self.base is None:
            self.base = int(at[0])
        at, order = at[at >= self.base], order[at >= self.base]
        self.last = max(self.last, int(at[-1])) if len(at) else self.last
        while self.buckets > self.most:
            self._halve()
        self._know(columns)
        known = [name for name in columns if name in self._columns]
        if not known or not len(at):
            return
        values = np.stack([np.asarray(columns[name], float)[order] for name in known], axis=1)
        values[~np.isfinite(values)] = np.nan
        self._gather(at, values, np.array([self._columns[name] for name in known]))

    def _gather(self, at: np.ndarray, values: np.ndarray, columns: np.ndarray) -> None:
        """Rows of ascending steps [n] and values [n, series] into their buckets."""
        bucket = (at - self.base) // self.width
        begins = np.flatnonzero(np.diff(bucket, prepend=-1))
        of_row = np.repeat(np.arange(len(begins)), np.diff([*begins, len(at)]))
        low, high = np.fmin.reduceat(values, begins), np.fmax.reduceat(values, begins)
        steps = at[:, None]
        low_at = np.minimum.reduceat(np.where(values == low[of_row], steps, LATE), begins)
        high_at = np.minimum.reduceat(np.where(values == high[of_row], steps, LATE), begins)
        total = np.add.reduceat(np.nan_to_num(values), begins)
        count = np.add.reduceat(np.isfinite(values).astype(np.int64), begins)
        place = np.ix_(bucket[begins], columns)
        below = _less(low, self._low[place])
        above = _less(-high, -self._high[place])
        self._low[place], self._low_at[place] = _pick(below, low, low_at, self._low[place], self._low_at[place])
        self._high[place], self._high_at[place] = _pick(above, high, high_at, self._high[place], self._high_at[place])
        self._sum[place] += total
        self._count[place] += count

    def _halve(self) -> None:
        """Two neighbours become one bucket."""
        self.width *= 2
        below = _less(self._low[1::2], self._low[0::2])
        above = _less(-self._high[1::2], -self._high[0::2])
        low = _pick(below, self._low[1::2], self._low_at[1::2], self._low[0::2], self._low_at[0::2])
        high = _pick(above, self._high[1::2], self._high_at[1::2], self._high[0::2], self._high_at[0::2])
        empty = np.full_like(low[0], np.nan), np.zeros_like(low[1])
        (self._low, self._low_at), (self._high, self._high_at) = (
            [np.concatenate(pair) for pair in zip(kept, empty, strict=True)] for kept in (low, high)
        )
        self._sum, self._count = (
            np.concatenate([a[0::2] + a[1::2], np.zeros_like(a[0::2])]) for a in (self._sum, self._count)
        )

    def _know(self, names: Iterable[str]) -> None:
        """Makes room for series that are new."""
        new = [name for name in names if name not in self._columns]
        room = new[: self.most_series - len(self._columns)]
        self.left_out += len(new) - len(room)
        if not room:
            return
        self._columns |= {name: len(self._columns) + i for i, name in enumerate(room)}
        missing, zeros = np.full((self.most, len(room)), np.nan), np.zeros((self.most, len(room)), np.int64)
        self._low, self._high = np.hstack([self._low, missing]), np.hstack([self._high, missing])
        self._sum = np.hstack([self._sum, zeros])
        self._count, self._low_at, self._high_at = (
            np.hstack([a, zeros]) for a in (self._count, self._low_at, self._high_at)
        )

    # ---- what is there -------------------------------------------------------------------------------------------

    def mean(self, name: str) -> np.ndarray:
        """Of each bucket, NaN where it has none."""
        column, n = self._columns[name], self.buckets
        count = self._count[:n, column]
        return np.where(count, self._sum[:n, column] / np.maximum(count, 1), np.nan)

    def high(self, name: str) -> np.ndarray:
        return self._high[: self.buckets, self._columns[name]]

    def total(self, name: str) -> float:
        """Of all values."""
        return float(self._sum[:, self._columns[name]].sum()) if name in self._columns else 0.0

    def count(self, name: str) -> int:
        """Of values that are there."""
        return int(self._count[:, self._columns[name]].sum()) if name in self._columns else 0

    def as_json(self, name: str, digits: int = 5) -> dict[str, Any]:
        """{"mean"}; and, where buckets are wider than a step, {"low", "high"} with the offsets of their steps."""
        column, n = self._columns[name], self.buckets
        found: dict[str, Any] = {"mean": short(self.mean(name), digits)}
        if self.width > 1:
            first = self.first_steps
            for end, values, at in (("low", self._low, self._low_at), ("high", self._high, self._high_at)):
                found[end] = short(values[:n, column], digits)
                there = np.isfinite(values[:n, column])
                found[f"{end}_at"] = np.where(there, at[:n, column] - first, 0).tolist()
        return found


def short(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Rounded, for JSON: None for what is not finite."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in np.asarray(values, float).tolist()]


def _less(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Where the new one takes the place of the old one."""
    return (new < old) | (np.isnan(old) & ~np.isnan(new))


def _pick(use: np.ndarray, a: np.ndarray, a_at: np.ndarray, b: np.ndarray, b_at: np.ndarray) -> tuple:
    return np.where(use, a, b), np.where(use, a_at, b_at)
