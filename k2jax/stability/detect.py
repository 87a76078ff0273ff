"""Outliers and spikes, as pure functions of a run's ledger rows.

The limits of a step come from the rows up to two steps before it, which every process has read when it starts the step:
so the device decides before the update, all processes decide alike, and a resumed run decides as the first time.
Median and MAD of accepted rows only: no outlier and no NaN gets into the window that the next one is measured by.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

HISTORY = 2_100  # newest rows that are enough to answer as all rows would
LAG = 2  # steps between a row and the first limits that it has a part in
FEWEST = 64  # accepted rows before there are limits
TO_SIGMA = 1.4826  # times the MAD: the standard deviation, of a normal distribution


class Row(NamedTuple):
    """Of a step, what is judged; as the ledger has it."""

    step: int
    loss: float
    grad_norm: float
    applied: bool  # an update was made
    outlier: bool  # above a limit


class Limits(NamedTuple):
    """Above either a step is an outlier."""

    loss: float = float("inf")
    grad_norm: float = float("inf")


class Spike(NamedTuple):
    """What is no single outlier."""

    kind: str  # "not finite", "skips", "persistent", "drift"
    crossing: int  # the first step that was above a limit
    step: int  # at which it was seen
    why: str  # a line, with numbers


def limits_of(rows: Sequence[Row], rules: Mapping[str, Any]) -> Limits:
    """Limits from the newest `rules["window"]` accepted of the rows, none while there are fewer than FEWEST of them.

    One-sided: median + the larger of `deviations` standard deviations, as the MAD gives them, and a floor relative to
    the median (anchors: OLMo-core's mean + 6 sigma of 128 keeps the outlier in its window; this does not).
    """
    accepted = [row for row in rows if row.applied and not row.outlier][-rules["window"] :]
    if len(accepted) < min(FEWEST, rules["window"]):
        return Limits()

    def limit(values: list[float], floor: float) -> float:
        median = float(np.median(values))
        deviation = TO_SIGMA * float(np.median(np.abs(np.array(values) - median)))
        return median + max(rules["deviations"] * deviation, floor * abs(median))

    return Limits(
        limit([row.loss for row in accepted], rules["loss_floor"]),
        limit([row.grad_norm for row in accepted], rules["grad_norm_floor"]),
    )


def spike_of(rows: Sequence[Row], rules: Mapping[str, Any], nonfinite_in_a_row: int) -> Spike | None:
    """What the newest rows are, where skipping single steps is no answer to it; None while all is well.

    `nonfinite_in_a_row`: steps whose loss or gradient was not finite that are a spike of their own.
    """
    if not rows:
        return None
    newest, recent = rows[-1].step, rows[-rules["window"] :]
    without = [row.step for row in recent if not row.applied]
    if len(without) >= rules["max_skips"]:
        why = f"{len(without)} of the last {len(recent)} steps made no update"
        return Spike("skips", without[0], newest, why)
    last = rows[-nonfinite_in_a_row:]
    if len(last) == nonfinite_in_a_row and not any(row.applied or row.outlier for row in last):
        why = f"loss or gradient not finite in {len(last)} steps in a row"
        return Spike("not finite", last[0].step, newest, why)
    above = 0
    for row in reversed(rows):
        if not row.outlier:
            break
        above += 1
    if above >= rules["persistence"]:
        return Spike("persistent", newest - above + 1, newest, f"{above} steps in a row above their limits")
    return None
