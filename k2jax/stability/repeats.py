"""Repeated n-grams in rows of tokens: 32 times a period of 1 to 13 tokens, as OLMo 2 found them where it had spikes."""

from typing import NamedTuple

import numpy as np

PERIODS = range(1, 14)  # tokens
TIMES = 32


class Repeat(NamedTuple):
    """The longest stretch of a row that is one n-gram over and over."""

    row: int
    period: int  # tokens
    times: int
    first: int  # token of the row; the stretch is [first, first + period * times)


def repeats(rows: np.ndarray, times: int = TIMES) -> list[Repeat]:
    """Of each row (rows, tokens) that repeats an n-gram `times` times or more, its longest stretch."""
    found: dict[int, Repeat] = {}
    for period in PERIODS:
        if rows.shape[1] < period * times:
            break
        same = rows[:, period:] == rows[:, :-period]
        run, last = _longest(same)
        for row in np.flatnonzero(run >= period * (times - 1)):
            one = Repeat(int(row), period, int(run[row]) // period + 1, int(last[row] - run[row] + 1))
            if one.row not in found or one.period * one.times > found[one.row].period * found[one.row].times:
                found[one.row] = one
    return sorted(found.values())


def _longest(same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(length, last index) of the longest run of True in each row."""
    index = np.arange(1, same.shape[1] + 1)
    last_false = np.maximum.accumulate(np.where(same, 0, index), axis=1)
    length = index - last_false
    last = length.argmax(axis=1)
    return length[np.arange(len(same)), last], last
