"""Proof of the detector: faults planted in real small runs, and clean runs, as a JSON line a case and one of all.

    JAX_PLATFORMS=cpu python tools/bench/spikes.py [--steps=1200] [--seeds=2] [--clean=12] [--quick]

A fault is planted twice: in a run that does nothing about it, whose curves say what it does to the validation loss,
which series crosses its limit first and what another rule would have done; and in a guarded one, which skips steps and
goes back to a checkpoint as the trainer does (after which the fault is gone: its data are deferred).

Beside it the rule of OLMo-core's SkipStepOptimizer, which MaxText's skip_step_on_spikes takes over as it is: no update
where loss or gradient norm > mean + 6 standard deviations of the 128 steps before, outliers and NaN among them, once
there are 64. It acts on single steps only. An alarm of a clean run is a false one; the number of clean steps is printed
with it, and no rate for more steps than were run.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
from spikes_lanes import SERIES, Lane, Lanes, faults  # noqa: E402

from k2jax import config as configuration  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.stability.detect import HISTORY, LAG, Row, limits_of  # noqa: E402

EVERY = 100  # steps between checkpoints
HARM = 0.01  # of the validation loss: more than this above that of the run without a fault
AFTER = 200  # steps after the fault in which a series may cross its limit
QUICK = ("NaN in a step", "bit 30 flipped in params/embed_VD", "an exploding step: learning rate x1000")


def mean_and_sigma(curves: np.ndarray, window: int = 128, factor: float = 6.0) -> np.ndarray:
    """bool (n,): the steps that the rule of OLMo-core and MaxText would skip, of (n, 2) losses and gradient norms."""
    skipped = np.zeros(len(curves), bool)
    with np.errstate(all="ignore"):  # of a NaN in the window both are NaN, and no step is within the bound
        for n in range(window // 2 - 1, len(curves)):
            before = curves[max(n - window, 0) : n].astype(np.float32)
            bound = factor * before.std(axis=0, ddof=1)
            skipped[n] = not np.all(curves[n] - before.mean(axis=0) <= bound)
    return skipped


def first_crossings(curves: np.ndarray, begin: int, rules: dict[str, Any]) -> dict[str, int]:
    """{series: steps from `begin` to the first above its limit, by the detector's rule}, of those that get there."""
    found = {}
    for i, name in enumerate(SERIES):
        is_norm = "norm" in name and name != "param_norm"
        rows: list[Row] = []
        for step, value in enumerate(curves[: begin - 1 + AFTER, i], 1):
            known = rows[-HISTORY : len(rows) + 1 - LAG]
            limit = limits_of(known, rules)[is_norm] if step >= begin else math.inf
            if not value <= limit and step >= begin:
                found[name] = step - begin
                break
            rows.append(Row(step, value, value, True, False))
    return found


def result(guarded: Lane, alone: Lane, clean: Lane, begin: int, rules: dict[str, Any]) -> dict[str, Any]:
    """The line of a planted fault."""
    harm = {when: alone.validation[when] / clean.validation[when] - 1 for when in alone.validation}
    worst = max((math.inf if math.isnan(x) else x for x in harm.values()), default=0.0)
    curves = np.array(alone.curves)
    crossings = first_crossings(curves, begin, rules)
    other = mean_and_sigma(curves[:, :2])
    marks = [*guarded.outliers, *(spike.step for spike in guarded.spikes), *guarded.not_finite]
    alarms = [step for step in marks if step >= begin]
    return {
        "fault": alone.fault.name,
        "seed": alone.seed,
        "harm": {when: round(x, 4) if math.isfinite(x) else str(x) for when, x in harm.items()},
        "harms": worst > HARM,
        "found_after": min(alarms) - begin if alarms else None,
        "spikes": [f"{s.kind} +{s.crossing - begin} seen +{s.step - begin}" for s in guarded.spikes],
        "steps_skipped": guarded.skipped,
        "steps_rolled_back": guarded.rolled_back,
        "ended_with_65": guarded.ended,
        "guarded_harm": round(guarded.validation["end"] / clean.validation["end"] - 1, 4),
        "crossings": crossings,
        "lead_over_loss": {name: crossings["loss"] - n for name, n in crossings.items()}
        if "loss" in crossings
        else {},
        "mean_sigma": {
            "found_after": int(np.argmax(other[begin - 1 :])) if other[begin - 1 :].any() else None,
            "steps_skipped": int(other[begin - 1 :].sum()),
        },
    }


def planted(steps: int, seeds: int, names: Sequence[str] | None) -> tuple[list[dict[str, Any]], list[Lane]]:
    """(a line for each fault and seed, the guarded lanes)."""
    begin, rules = 2 * steps // 3, configuration.base().stability.to_dict()
    chosen = [fault for fault in faults() if names is None or fault.name in names]

    def lanes(guarded: bool) -> list[Lane]:
        return [Lane(seed, fault, guarded) for seed in range(seeds) for fault in (None, *chosen)]

    pair = lanes(False), lanes(True)
    for group in pair:
        Lanes(group, steps, begin, EVERY if steps > 4 * EVERY else EVERY // 5).run()
    clean = {lane.seed: lane for lane in pair[0] if lane.fault is None}
    lines = [result(g, a, clean[a.seed], begin, rules) for a, g in zip(*pair, strict=True) if a.fault]
    return lines, pair[1]


def of_clean(lanes: Sequence[Lane], begin: int | None = None) -> dict[str, Any]:
    """What both rules say of steps in which nothing is wrong: those before `begin`, or all."""
    ends = [len(lane.curves) if begin is None or lane.fault is None else begin - 1 for lane in lanes]
    other = [
        mean_and_sigma(np.array(lane.curves)[:end, :2]).sum() for lane, end in zip(lanes, ends, strict=True)
    ]
    pairs = list(zip(lanes, ends, strict=True))
    return {
        "clean_runs": len(lanes),
        "clean_steps": sum(ends),
        "outliers": sum(step <= end for lane, end in pairs for step in lane.outliers),
        "spikes": sum(spike.step <= end for lane, end in pairs for spike in lane.spikes),
        "mean_sigma_outliers": int(sum(other)),
    }


def clean_runs(steps: int, number: int, first_seed: int) -> tuple[dict[str, Any], list[Lane]]:
    """Runs without a fault, at a third of the stage's learning rate, at it, and at three times as much."""
    lanes = [Lane(first_seed + i, lr=(1.0, 0.3, 3.0)[i % 3]) for i in range(number)]
    Lanes(lanes, steps, steps, EVERY).run()
    alarms = [(lane.seed, lane.lr, step) for lane in lanes for step in lane.outliers]
    spikes = [(lane.seed, lane.lr, spike) for lane in lanes for spike in lane.spikes]
    return {"steps": steps, **of_clean(lanes), "alarms": alarms[:20], "spikes_seen": spikes[:5]}, lanes


def summary(lines: list[dict[str, Any]], clean: dict[str, int]) -> dict[str, Any]:
    """Recall, precision, false alarms, lead by series and steps lost."""
    harmful = [line for line in lines if line["harms"]]
    found = [line for line in lines if line["found_after"] is not None]
    other = [line for line in lines if line["mean_sigma"]["found_after"] is not None]
    wrong = clean["outliers"] + clean["spikes"]
    first = [min(line["crossings"], key=line["crossings"].get) for line in lines if line["crossings"]]
    return {
        "planted": len(lines),
        "harmful": len(harmful),
        "recall_of_harmful": round(sum(line in found for line in harmful) / max(len(harmful), 1), 3),
        "recall": round(len(found) / len(lines), 3),
        "precision": round(len(found) / max(len(found) + wrong, 1), 3),
        "still_harmed": [f"{x['fault']} ({x['seed']})" for x in lines if not x["guarded_harm"] <= HARM],
        "steps_skipped": sum(line["steps_skipped"] for line in lines),
        "most_rolled_back": max(line["steps_rolled_back"] for line in lines),
        "first_to_cross": {
            name: first.count(name) for name in sorted(set(first), key=first.count, reverse=True)
        },
        "mean_sigma_recall_of_harmful": round(
            sum(line in other for line in harmful) / max(len(harmful), 1), 3
        ),
        "mean_sigma_recall": round(len(other) / len(lines), 3),
        "mean_sigma_precision": round(len(other) / max(len(other) + clean["mean_sigma_outliers"], 1), 3),
        "mean_sigma_steps_skipped": sum(line["mean_sigma"]["steps_skipped"] for line in lines),
        **clean,
    }


def show(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=1200, help="of a run in which a fault is planted, at two thirds"
    )
    parser.add_argument("--seeds", type=int, default=2, help="runs of each fault")
    parser.add_argument("--clean", type=int, default=12, help="clean runs of each of three lengths")
    parser.add_argument("--quick", action="store_true", help="some faults, few steps, no clean runs")
    args = parser.parse_args()
    started = time.perf_counter()
    names, steps, seeds, number = (
        (QUICK, 150, 1, 0) if args.quick else (None, args.steps, args.seeds, args.clean)
    )
    show({"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "cores": os.cpu_count()})
    lines, guarded = planted(steps, seeds, names)
    for line in lines:
        show(line)
    totals = of_clean(guarded, 2 * steps // 3)
    for i, length in enumerate((1000, 2500, 5000) if number else ()):
        line, _ = clean_runs(length, number, first_seed=1000 * (i + 1))
        show(line)
        totals = {key: totals[key] + line[key] for key in totals}
    show({"summary": summary(lines, totals), "seconds": round(time.perf_counter() - started)})


if __name__ == "__main__":
    run_main(main)
