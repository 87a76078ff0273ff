"""Outliers and spikes, as pure functions of a run's ledger rows.

The limits of a step come from the rows up to two steps before it, which every process has read when it starts the step:
so the device decides before the update, all processes decide alike, and a resumed run decides as the first time.
Median and MAD of accepted rows only: no outlier and no NaN gets into the window that the next one is measured by.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, takewhile
from typing import Any, NamedTuple

import numpy as np

HISTORY = 2_100  # newest rows that are looked at: more change no answer
LAG = 2  # steps between a row and the first limits that it has a part in
FEWEST = 64  # accepted rows before there are limits
RECENT, BEFORE = 50, (200, 2_000)  # accepted rows whose medians tell a drift
FEWEST_BEFORE = 500  # that are enough of the longer one
DRIFT_EVERY = 10  # steps between two looks for it
TINY = 1e-30  # instead of a loss or gradient of zero
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
    crossing: int  # its first step: above a limit, not finite, or where the loss left its level
    step: int  # at which it was seen
    why: str  # a line, with numbers


def limits_of(rows: Sequence[Row], rules: Mapping[str, Any]) -> Limits:
    """Limits from the newest `rules["window"]` accepted of the rows, none while there are fewer than FEWEST of them.

    One-sided: the median times the larger of `deviations` standard deviations of its logarithm, as the MAD gives them,
    and 1 + a floor. By ratios, since noise is a share of the series: gradient norms have long tails upwards (of 3,000
    clean steps that vary by a fifth, one or two are 6 deviations above the median when those are added).
    """
    accepted = _accepted(rows, rules["window"])
    if len(accepted) < min(FEWEST, rules["window"]):
        return Limits()

    def limit(values: list[float], floor: float) -> float:
        array = np.maximum(values, TINY)
        median = np.median(array)
        ratio = np.median(
            np.maximum(array / median, median / array)
        )  # exp of the MAD of the logarithms, exactly
        with np.errstate(over="ignore"):  # infinite: no limit
            return float(median * np.maximum(ratio ** (rules["deviations"] * TO_SIGMA), 1 + floor))

    return Limits(
        limit([row.loss for row in accepted], rules["loss_floor"]),
        limit([row.grad_norm for row in accepted], rules["grad_norm_floor"]),
    )


def spike_of(rows: Sequence[Row], rules: Mapping[str, Any], nonfinite_in_a_row: int) -> Spike | None:
    """What the newest row ends, where skipping single steps is no answer to it; None while all is well.

    K2's benign spikes, a large gradient and hardly an update, are outliers: they end by themselves, and are no spike
    here. What persists is: the malignant kind, whether its steps make updates (`stability.skip` off) or not.

    `nonfinite_in_a_row`: steps whose loss or gradient was not finite that are a spike of their own.
    """
    if not rows:
        return None
    rows = rows[-HISTORY:]
    newest, recent = rows[-1].step, rows[-rules["window"] :]
    broken = _in_a_row(rows, lambda row: not _finite(row))
    if broken >= nonfinite_in_a_row:
        why = f"loss or gradient not finite in {broken} steps in a row"
        return Spike("not finite", rows[-broken].step, newest, why)
    without = [row.step for row in recent if not row.applied]
    if len(without) >= rules["max_skips"] and without[-1] == newest:
        crossing = _first_of_the_last_group(without, 2 * rules["window"] // rules["max_skips"])
        why = f"{len(without)} of the last {len(recent)} steps made no update"
        return Spike("skips", crossing, newest, why)
    above = _in_a_row(rows, lambda row: row.outlier or not _finite(row))
    if above >= rules["persistence"]:
        return Spike("persistent", rows[-above].step, newest, f"{above} steps in a row above their limits")
    return _drift(rows, rules) if newest % DRIFT_EVERY == 0 else None


def _drift(rows: Sequence[Row], rules: Mapping[str, Any]) -> Spike | None:
    """A loss that rises too little, or too slowly, for its limit: the median of RECENT against those of BEFORE.

    By more than the share `drift`, and than `deviations` standard errors of the median of RECENT. Marin's fatal one
    was 0.06 nat of 1.96, with no step that an outlier's limit would have seen. The short time is for a loss that has
    been falling, so that it is still below what it was long before; the long one for what creeps.
    """
    accepted = _accepted(rows, RECENT + max(BEFORE))
    enough = [before for before in BEFORE if len(accepted) >= RECENT + min(before, FEWEST_BEFORE)]
    found = (_rise(accepted[: RECENT + before], rows[-1].step, rules) for before in enough)
    return next((spike for spike in found if spike), None)


def _rise(accepted: Sequence[Row], newest: int, rules: Mapping[str, Any]) -> Spike | None:
    """Of RECENT of them over the others."""
    losses = np.array([row.loss for row in accepted])  # newest first
    level = float(np.median(losses[RECENT:]))
    deviation = TO_SIGMA * float(np.median(np.abs(losses[RECENT:] - level)))
    error = deviation * math.sqrt(math.pi / 2 / RECENT)  # of a median
    margin = max(rules["drift"] * abs(level), rules["deviations"] * error)
    rise = float(np.median(losses[:RECENT])) - level
    if rise <= margin:
        return None
    # Where a level ends and one higher by `margin` begins is most likely where this sum is largest.
    crossing = accepted[int(np.argmax(np.cumsum(losses - (level + margin / 2))))].step
    why = f"loss {level + rise:.4g}, median of {RECENT} steps, over {level:.4g} of the {len(losses) - RECENT} before"
    return Spike("drift", crossing, newest, why)


def _finite(row: Row) -> bool:
    return math.isfinite(row.loss) and math.isfinite(row.grad_norm)


def _accepted(rows: Sequence[Row], most: int) -> list[Row]:
    """The newest `most` that made an update and were above no limit, the newest first."""
    good = (row for row in reversed(rows[-HISTORY:]) if row.applied and not row.outlier and _finite(row))
    return list(islice(good, most))


def _in_a_row(rows: Sequence[Row], condition: Callable[[Row], bool]) -> int:
    """How many of the newest rows, up to the first that is otherwise."""
    return sum(1 for _ in takewhile(condition, reversed(rows)))


def _first_of_the_last_group(steps: Sequence[int], gap: int) -> int:
    """The last steps that are at most `gap` apart from each other: the first of them. An older one is of no account."""
    first = steps[-1]
    for step in reversed(steps):
        if first - step > gap:
            break
        first = step
    return first
