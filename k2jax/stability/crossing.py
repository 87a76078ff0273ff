"""Which series left their ordinary range first, and how long before a step: pure functions of a run's metrics rows.

Each series is judged by the median and MAD of its own last ordinary values, so that what has begun to grow does not
raise the limit that it is measured by.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from k2jax.stability.detect import TO_SIGMA

LOOK_BACK = 200  # steps before the step in question in which a series may have left its range
FEWEST = 8  # ordinary values before there is a limit: a doctor may be asked early, and says from how many
RECENT = 32  # ordinary values that the limit comes from, at most: early in a run older ones are of another level
GAPS = 2  # ordinary values in a row that do not end a stretch
# Of a row, what says nothing of the numbers: counts, clocks, the machine, and what is given.
OTHERS = r"step|lr|.*_tokens|tokens_seen|targets\b.*|.*_s|.*bytes.*|.*_per_s.*|mfu.*|.*_limit|skips_.*|clipped.*"
OTHERS += r"|masked.*"
OWN_FLOOR = r"loss\b.*|param_norm\b.*|held_out\b.*|log_z\b.*"  # that move little: as the loss


class Ordinary(NamedTuple):
    """The range of a series."""

    median: float
    limit: float  # inf where there are too few values
    values: int  # that they come from


class Crossing(NamedTuple):
    """A series that was above its limit at the step or just before it, and since when."""

    series: str
    step: int  # the first of the stretch
    lead: int  # steps before the step in question
    last: int  # the last of the stretch, which may have ended by now
    value: float  # there; inf: not finite
    median: float
    limit: float
    values: int  # that they come from


def limit_of(values: Sequence[float], deviations: float, floor: float) -> tuple[float, float]:
    """(median, limit) of values: above the limit is no ordinary one. One-sided, with a floor relative to the median."""
    ordered = sorted(values)
    median = _median(ordered)
    deviation = TO_SIGMA * _median(sorted(abs(value - median) for value in ordered))
    return median, median + max(deviations * deviation, floor * abs(median))


def series_of(row: Mapping[str, Any]) -> dict[str, float]:
    """{series: value} of a metrics row; what is not finite is inf. Ratios of update to weights, where it has none."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if re.fullmatch(OTHERS, key) or isinstance(value, (bool, str)) or key.startswith("update_norm"):
            continue
        if isinstance(value, (int, float)):
            found[key] = float(value) if math.isfinite(value) else math.inf
        elif value is None and re.match(r"(loss|grad_norm|param_norm)\b", key) and row.get(f"targets{key[4:]}", 1):
            found[key] = math.inf  # JSON has no NaN
    for key in [key for key in row if key.startswith("update_norm")]:
        ratio, weights, update = key.replace("norm", "ratio", 1), row.get(key.replace("update", "param", 1)), row[key]
        if not row.get("applied", True):
            found.pop(ratio, None)  # no update is no small one
        elif ratio not in found and weights and update is not None and math.isfinite(update):
            found[ratio] = update / weights
    return found


def crossings(rows: Sequence[Mapping[str, Any]], step: int, rules: Mapping[str, Any]) -> list[Crossing]:
    """The series above their limits at `step`, or up to just before it: that which left first, and furthest, first.

    Args:
        rows: of metrics up to `step`, in order, those of its stage; more than LOOK_BACK + rules["window"] are not read.
        rules: config.stability.
    """
    walked = [_walk(name, values, step, rules)[0] for name, values in _series(rows, step, rules).items()]
    return sorted((one for one in walked if one), key=lambda one: (one.step, -_beyond(one), one.series))


def _beyond(one: Crossing) -> float:
    """How far beyond its limit, in lengths from median to limit."""
    return (one.value - one.median) / ((one.limit - one.median) or 1e-30) if math.isfinite(one.limit) else math.inf


def ordinary(rows: Sequence[Mapping[str, Any]], step: int, rules: Mapping[str, Any]) -> dict[str, Ordinary]:
    """{series: its range at `step`}, of loss and gradient norm."""
    series = _series(rows, step, rules)
    return {name: _walk(name, series[name], step, rules)[1] for name in ("loss", "grad_norm") if name in series}


class Layer(NamedTuple):
    """A layer's number in a step, beside that of the last ordinary step that has it."""

    series: str
    layer: int  # from 0
    value: float
    before: float
    step: int  # of `before`


def layers(rows: Sequence[Mapping[str, Any]], step: int, most: int = 5) -> list[Layer]:
    """Those whose gradients or updates have grown most by `step`; [] where its row has no layers."""
    here = [row for row in rows if row["step"] == step and row.get("layers")]
    known = [row for row in rows if row["step"] < step and row.get("layers") and not row.get("outlier")]
    if not here or not known:
        return []
    found = []
    for series, values in here[0]["layers"].items():
        earlier = known[-1]["layers"].get(series, [])
        for layer, (value, before) in enumerate(zip(values, earlier, strict=False)):
            if value is not None and before and value > before:
                found.append(Layer(series, layer, value, before, known[-1]["step"]))
    return sorted(found, key=lambda one: -one.value / one.before)[:most]


def _series(
    rows: Sequence[Mapping[str, Any]], step: int, rules: Mapping[str, Any]
) -> dict[str, list[tuple[int, float]]]:
    """{series: [(step, value)]}."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in [row for row in rows if row["step"] <= step][-(LOOK_BACK + rules["window"] + 1) :]:
        for name, value in series_of(row).items():
            series.setdefault(name, []).append((row["step"], value))
    return series


def _walk(
    name: str, values: Sequence[tuple[int, float]], step: int, rules: Mapping[str, Any]
) -> tuple[Crossing | None, Ordinary]:
    floor = rules["loss_floor"] if re.fullmatch(OWN_FLOOR, name) else rules["grad_norm_floor"]
    known: list[float] = []  # ordinary values
    stretch, under, range_ = None, 0, Ordinary(math.nan, math.inf, 0)
    every = values[-1][0] - values[-2][0] if len(values) > 1 else 1  # of a series that not every step has
    for at, value in values:
        last = known[-min(RECENT, rules["window"]) :]
        if len(last) >= FEWEST:
            range_ = Ordinary(*limit_of(_as_of_now(last), rules["deviations"], floor), len(last))
        if value > range_.limit or value == math.inf:
            stretch = (stretch or Crossing(name, at, step - at, at, value, *range_))._replace(last=at)
            under = 0
            continue
        known.append(value)
        under += 1
        stretch = None if under > GAPS else stretch
    reaches = stretch is not None and values[-1][0] > step - every and step - stretch.step <= LOOK_BACK
    return (stretch if reaches else None), range_


def _as_of_now(values: Sequence[float]) -> Sequence[float]:
    """Values of a series that falls, brought to where it is by now; as they are where it does not."""
    if min(values) <= 0:
        return values
    logs, half = [math.log(value) for value in values], len(values) // 2
    fall = (_median(sorted(logs[-half:])) - _median(sorted(logs[:half]))) / (len(logs) - half)
    return [math.exp(value + fall * (len(logs) - i)) for i, value in enumerate(logs)] if fall < 0 else values


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
