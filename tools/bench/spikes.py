"""Proof of the detector: faults planted in real small runs, and clean runs, as a JSON line a case and one of all.

    JAX_PLATFORMS=cpu python tools/bench/spikes.py [--steps=1000] [--seeds=2] [--clean=20] [--quick]

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
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
from spikes_lanes import SERIES, Fault, Lane, Lanes, faults  # noqa: E402

from k2jax import config as configuration  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.stability.detect import HISTORY, LAG, Row, limits_of  # noqa: E402

EVERY = 100  # steps between checkpoints
AT_ONCE = 5  # lanes
HARM = 0.002  # of the validation loss: more than this above that of the run without a fault; 0.0004 is noise
AFTER = 200  # steps after the fault in which a series may cross its limit
QUICK = ("NaN in a step", "an exploding step: learning rate x1000")


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


def result(guarded: Lane, alone: Lane, clean: Lane, rules: dict[str, Any]) -> dict[str, Any]:
    """The line of a planted fault."""
    begin = alone.begin
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


def planted(steps: int, seed: int, chosen: Sequence[Fault]) -> list[dict[str, Any]]:
    """A line for each fault."""
    rules = configuration.base().stability.to_dict()
    every = EVERY if steps > 4 * EVERY else EVERY // 5
    begin = 2 * steps // 3 + seed * every // 3
    alone, guarded = (
        [Lane(seed, fault, begin, guards) for fault in (None, *chosen)] for guards in (False, True)
    )
    for lanes in (alone, guarded):
        Lanes(lanes, steps, every).run()
    return [result(g, a, alone[0], rules) for a, g in zip(alone, guarded, strict=True) if a.fault]


def clean_runs(steps: int, number: int, first_seed: int) -> list[dict[str, Any]]:
    """What both rules say of runs without a fault, at the stage's learning rate, a third of it and three times it."""
    lanes = [Lane(first_seed + i, lr=(1.0, 0.3, 3.0)[i % 3]) for i in range(number)]
    Lanes(lanes, steps, EVERY).run()
    line = {
        "clean_runs": number,
        "clean_steps": sum(len(lane.curves) for lane in lanes),
        "outliers": sum(len(lane.outliers) for lane in lanes),
        "spikes": sum(len(lane.spikes) for lane in lanes),
        "mean_sigma_outliers": sum(int(mean_and_sigma(np.array(lane.curves)[:, :2]).sum()) for lane in lanes),
        "alarms": [(lane.seed, lane.lr, step) for lane in lanes for step in lane.outliers][:20],
        "spikes_seen": [(lane.seed, lane.lr, spike) for lane in lanes for spike in lane.spikes][:5],
    }
    return [line]


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Recall, precision, false alarms, lead by series and steps lost."""
    counts = ("clean_runs", "clean_steps", "outliers", "spikes", "mean_sigma_outliers")
    without = [line for line in lines if "fault" not in line]
    clean = {key: sum(line[key] for line in without) for key in counts}
    lines = [line for line in lines if "fault" in line]
    harmful = [line for line in lines if line["harms"]]
    found = [line for line in lines if line["found_after"] is not None]
    other = [line for line in lines if line["mean_sigma"]["found_after"] is not None]
    wrong = clean["outliers"] + clean["spikes"]
    first = [min(line["crossings"], key=line["crossings"].get) for line in lines if line["crossings"]]
    return {
        "planted": len(lines),
        "harmful": len(harmful),
        "recall_of_harmful": round(sum(line in found for line in harmful) / max(len(harmful), 1), 3),
        "recall": round(len(found) / max(len(lines), 1), 3),
        "precision": round(len(found) / max(len(found) + wrong, 1), 3),
        "still_harmed": [f"{x['fault']} ({x['seed']})" for x in lines if not x["guarded_harm"] <= HARM],
        "steps_skipped": sum(line["steps_skipped"] for line in lines),
        "most_rolled_back": max((line["steps_rolled_back"] for line in lines), default=0),
        "first_to_cross": {
            name: first.count(name) for name in sorted(set(first), key=first.count, reverse=True)
        },
        "mean_sigma_recall_of_harmful": round(
            sum(line in other for line in harmful) / max(len(harmful), 1), 3
        ),
        "mean_sigma_recall": round(len(other) / max(len(lines), 1), 3),
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
    parser.add_argument("--steps", type=int, default=1000, help="of a run in which a fault is planted")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each fault")
    parser.add_argument(
        "--clean", type=int, default=20, help="clean runs of this length, and of four times it"
    )
    parser.add_argument("--quick", action="store_true", help="two faults, few steps, no clean runs")
    args = parser.parse_args()
    started = time.perf_counter()
    show({"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "cores": os.cpu_count()})
    if args.quick:
        parts = (planted(110, 0, [fault for fault in faults() if fault.name in QUICK]), clean_runs(110, 3, 1))
    else:
        parts = in_processes(args.steps, args.seeds, args.clean)
    lines = []
    for part in parts:
        lines += part
        for line in part:
            show(line)
    show({"summary": summary(lines), "seconds": round(time.perf_counter() - started)})


def in_processes(steps: int, seeds: int, number: int) -> Iterator[list[dict[str, Any]]]:
    """What `planted` and `clean_runs` return, in as many processes as there are cores."""
    chosen = list(faults())
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        done = []
        for i in range(max(seeds * len(chosen), number)):
            seed, first = divmod(i * (AT_ONCE - 1), len(chosen))
            if seed < seeds:
                names = [fault.name for fault in chosen[first : first + AT_ONCE - 1]]
                done.append(pool.submit(planted_by_name, steps, seed, names))
            if i * AT_ONCE < number:
                for length in (steps, 4 * steps):
                    done.append(pool.submit(clean_runs, length, AT_ONCE, 10 * length + i * AT_ONCE))
        for future in as_completed(done):
            yield future.result()


def planted_by_name(steps: int, seed: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """`planted`, of what goes to another process."""
    return planted(steps, seed, [fault for fault in faults() if fault.name in names])


if __name__ == "__main__":
    run_main(main)
