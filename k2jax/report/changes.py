"""Change points of curves: where a broken line follows a curve so much better that chance is no explanation.

Each curve is fitted by least squares with 1 to MOST straight pieces in (log step, value), at least FEWEST points each,
by dynamic programming; the number of pieces is that with the least n ln(RSS / n) + PENALTY x pieces x ln n.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from k2jax.report.parts import Table

MOST, FEWEST, PENALTY = 4, 6, 6.0
METHOD = (
    f"Change points: the curve in (log step, value) is fitted with one to {MOST} straight pieces of at least {FEWEST} "
    f"points, by least squares; as many as make n ln(RSS/n) + {PENALTY:g} ln n x pieces least."
)


class Change(NamedTuple):
    step: int  # the first of the new piece
    jump: float  # new piece's value there less the old one's
    before: float  # slopes, value a factor e of steps
    after: float


def changes(steps: Sequence[int], values: Sequence[float]) -> list[Change]:
    """Of one curve, in order; none of one that is too short."""
    x, y = np.log(np.maximum(np.asarray(steps, float), 1)), np.asarray(values, float)
    good = np.isfinite(y)
    x, y, at = x[good], y[good], np.asarray(steps)[good]
    n = len(x)
    if n < 2 * FEWEST:
        return []
    ends = _pieces(_costs(x, y), n, max(1e-12, 1e-6 * float(np.var(y))))
    bounds = [0, *ends, n]
    lines = [np.polyfit(x[a:b], y[a:b], 1) for a, b in zip(bounds, bounds[1:], strict=False)]
    found = []
    for cut, before, after in zip(ends, lines, lines[1:], strict=False):
        jump = float(np.polyval(after, x[cut]) - np.polyval(before, x[cut]))
        found.append(Change(int(at[cut]), jump, float(before[0]), float(after[0])))
    return found


def _costs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[a, b]: squares left by a line through points a to b - 1."""
    n = len(x)
    x, y = x - x.mean(), y - y.mean()  # else digits are lost
    sums = [np.concatenate([[0.0], np.cumsum(v)]) for v in (np.ones(n), x, y, x * x, x * y, y * y)]
    one, sx, sy, sxx, sxy, syy = (s[None, :] - s[:, None] for s in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        vx, vy, cov = sxx - sx**2 / one, syy - sy**2 / one, sxy - sx * sy / one
        left = vy - np.where(vx > 1e-12, cov**2 / vx, 0.0)
    return np.where(one >= FEWEST, np.maximum(left, 0.0), np.inf)


def _pieces(cost: np.ndarray, n: int, least: float) -> list[int]:
    """Where the best broken line has its breaks. `least`: squares a point that are rounding."""
    best, back = [cost[0]], []
    for _ in range(1, MOST):
        through = best[-1][:, None] + cost  # [break, end]
        back.append(np.argmin(through, axis=0))
        best.append(np.min(through, axis=0))
    scores = [
        n * np.log(max(best[k][n] / n, least)) + PENALTY * (k + 1) * np.log(n) if np.isfinite(best[k][n]) else np.inf
        for k in range(MOST)
    ]
    ends, end = [], n
    for k in range(int(np.argmin(scores)), 0, -1):
        end = int(back[k - 1][end])
        ends.insert(0, end)
    return ends


def table(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Table:
    """Of all curves that have one."""
    rows = [
        [name, change.step, f"{change.jump:+.4g}", f"{change.before:+.4g}", f"{change.after:+.4g}"]
        for name, (steps, values) in curves.items()
        for change in changes(steps, values)
    ]
    head = ("curve", "from step", "jump", "slope before", "slope after (a factor e of steps)")
    return Table(head, rows or [["none in any curve", "", "", "", ""]], METHOD)
