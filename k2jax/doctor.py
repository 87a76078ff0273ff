"""Says what a step was, with the evidence: the data, the state, the learning rate, the hardware, a change, or nothing.

    python -m k2jax.doctor --workdir=runs/k2 --step=150561

Runs the step again, twice; its batch from earlier states, and other batches from its state; looks at each row of the
batch, at which series left its range first, and at what changed before. Reads the run and writes nothing but --out.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k2jax import config as configuration
from k2jax import files, paths
from k2jax.bucket import BucketPath
from k2jax.data.epochs import Epoch, order_of, read_epochs
from k2jax.data.journal import in_force, read_journal
from k2jax.data.launches import read_launches
from k2jax.data.order import Order
from k2jax.errors import ConfigError, DamagedError, RunError, run_main
from k2jax.parallel import cluster
from k2jax.rerun import Rerun, checkpoints_before, ledger_rows, metrics_rows
from k2jax.run import branches
from k2jax.run.directory import ENVIRONMENT, environment
from k2jax.run.ledger import Ledger, bits_float
from k2jax.run.reading import one_line
from k2jax.run.saved import steps_so_far
from k2jax.run.storage import is_thinned
from k2jax.stability import changes as nearby
from k2jax.stability import telling
from k2jax.stability.crossing import FEWEST, LOOK_BACK, crossings, layers, ordinary
from k2jax.stability.verdict import JUDGED, verdicts
from k2jax.training.optimizer import learning_rate
from k2jax.trials import Trials

FORMAT = 1
PROGRAM = ("jax", "jaxlib", "libtpu")  # versions that decide bits
EPILOG = """\
Without --step it is the newest spike: that of the last roll-back, else the newest step without an update or above a
limit. Exit codes: 0 it has been said what the step was, 78 asked for what is not there, 74 the storage failed.
"""

AnyFolder = Path | BucketPath
Diagnosis = dict[str, Any]


def diagnose(
    workdir: AnyFolder, step: int, stores: str | None = None, *, again: bool = True, say: Any = print
) -> Diagnosis:
    """What step `step` was; values of JSON. `again` False: nothing is run again, only what is recorded is looked at.

    The devices must have room for a state of training. All processes of a run call it alike. A part for which something
    is missing or damaged is {"not_possible": why}.

    Raises ConfigError for a step that the run has not made, StorageError where its records cannot be read.
    """
    epochs = read_epochs(workdir)
    _check_made(workdir, step)
    epochs = [epoch for epoch in epochs if epoch.after_step < step]
    journal = read_journal(workdir / "journal.jsonl")
    order = order_of(epochs, in_force(journal, step))
    rules = configuration.from_dict(epochs[-1].config).stability
    rows = recorded(workdir, step, LOOK_BACK + nearby.NEAR + rules.window)
    changed = nearby.changes(
        step, rows=rows, epochs=epochs, journal=journal, order=order, launches=read_launches(workdir),
        scheduled=partial(scheduled, order),
    )  # fmt: skip
    stage = order.stage_of_step(step)
    own = [row for row in rows if row["step"] >= stage.first_step]
    rows = own if len(own) > FEWEST else rows  # a new stage has no range of its own yet
    found = examine(rows, step, rules, [change._asdict() for change in changed])
    places = checkpoints_before(workdir, found["at"])
    found |= {
        "workdir": str(workdir),
        "stage": stage.name,
        "checkpoint_before": places[0].step if places else None,
        "thinned": _thinned(workdir, found["at"]),
    }
    if again:
        found |= _again(workdir, found, stores, say, places, rows, changed)
    return _sealed(found)


def examine(
    rows: Sequence[Mapping[str, Any]], step: int, rules: Mapping[str, Any], changed: Sequence[dict[str, Any]] = ()
) -> Diagnosis:
    """The part of a diagnosis that costs nothing: of metrics rows up to the step, and what changed near it.

    `at` is the first of the steps in which loss or gradient norm were above their limits: what came before it is why.
    """
    [row] = [row for row in rows if row["step"] == step]
    crossed = crossings(rows, step, rules)
    at = min((one.step for one in crossed if one.series in JUDGED and one.last == step), default=step)
    finite = all(row.get(key) is not None and math.isfinite(row[key]) for key in JUDGED)
    found = {
        "format": FORMAT,
        "step": step,
        "at": at,
        "row": {
            "loss": row.get("loss"),
            "grad_norm": row.get("grad_norm"),
            "lr": row.get("lr"),
            "applied": row.get("applied", True),
            "outlier": row.get("outlier", False),
            "finite": finite,
        },
        "ranges": {name: one._asdict() for name, one in ordinary(rows, step, rules).items()},
        "crossings": [one._asdict() for one in crossed],
        "layers": [one._asdict() for one in layers(rows, at)],
        "changes": list(changed),
    }
    return _sealed(found)


def _sealed(found: Diagnosis) -> Diagnosis:
    """With the verdicts on it."""
    causes = [one._asdict() for one in verdicts(found)]
    return {**found, "verdict": causes[0], "verdicts": causes}


# ---- what is run again -----------------------------------------------------------------------------------------------


def _again(
    workdir: AnyFolder,
    found: Diagnosis,
    stores: str | None,
    say: Any,
    places: list,
    rows: Sequence[Mapping[str, Any]],
    changed: Sequence[nearby.Change],
) -> Diagnosis:
    at = found["at"]
    try:
        rerun = Rerun(workdir, at, stores, say)
        same, launched = same_program(workdir, at), _launched(changed, places)
        return Trials(rerun, at, places, ordinary(rows, at - 1, rerun.config.stability), same, launched).run()
    except (RunError, OSError, jax.errors.JaxRuntimeError) as error:  # the last: the devices have no room for it
        if not is_of_all(error):
            raise
        why = {"not_possible": str(error) if isinstance(error, RunError) else one_line(error)}
        say(f"not possible: {why['not_possible']}")
        return {"replay": why, "checkpoint": why, "state": why, "data": why}


def is_of_all(error: Exception) -> bool:
    """Whether every process has met it: else others may wait for this one, and must learn that it is gone."""
    return cluster.count() == 1 or isinstance(error, (ConfigError, DamagedError, jax.errors.JaxRuntimeError))


def same_program(workdir: AnyFolder, step: int) -> bool:
    """Whether devices, versions and flags here are those of the launch that made a step, as far as it is known."""
    launches = [launch for launch in read_launches(workdir) if nearby.first_step(launch) <= step]
    if not launches:
        return True
    then, now = launches[-1], environment(launches[-1].get("devices", {}).get("mesh", {}))
    versions = all(then.get("versions", {}).get(name) == now["versions"].get(name) for name in PROGRAM)
    flags = all(then.get("flags", {}).get(name) == now["flags"].get(name) for name in ENVIRONMENT)
    alike = all(then.get(key) == now[key] for key in ("devices", "commit"))
    return versions and flags and alike


def _launched(changed: Sequence[nearby.Change], places: list) -> bool:
    kinds = {change.kind for change in changed if places and change.step == places[0].step + 1}
    return "launch" in kinds and not kinds & {"configuration", "stage"}


# ---- what a run has written down -------------------------------------------------------------------------------------


def recorded(workdir: AnyFolder, step: int, before: int) -> list[dict[str, Any]]:
    """The rows of a step and of those before it: of the metrics, with the ledger's exact loss and gradient norm."""
    first = max(1, step - before)
    ledger, metrics = ledger_rows(workdir, first, step), metrics_rows(workdir, first, step)
    rows = []
    for number, row in ledger.items():
        exact = {key: bits_float(row[key]) for key in ("loss", "grad_norm")}
        rows.append({**metrics.get(number, {}), **row, **exact})
    return rows


def _check_made(workdir: AnyFolder, step: int) -> None:
    if step < 1 or step not in ledger_rows(workdir, step, step):
        raise ConfigError(f"--step={step}: the ledger of {workdir} has no such step: name one that the run has made")


def newest_spike(workdir: AnyFolder, branch: int | None = None) -> tuple[AnyFolder, int] | None:
    """(folder, step) of the last roll-back, or of a branch's; else of the newest step that was no ordinary one."""
    done = branches.rollbacks(read_journal(workdir / "journal.jsonl"))
    done = [entry for entry in done if branch in (None, entry["branch"])]
    if done:
        folder = branches.branch_folder(workdir, done[-1]["branch"])
        return (folder if (folder / branches.DONE).exists() else workdir), done[-1]["crossing"]
    newest = None
    for row in Ledger(workdir / "ledger", None).steps.rows():
        if row.get("outlier") or not row.get("applied", True):
            newest = row["step"]
    return (workdir, newest) if newest else None


def scheduled(order: Order, epoch: Epoch, step: int) -> float | None:
    """The learning rate that an epoch's configuration has for a step; None where it has no such stage."""
    plan = order.stage_of_step(step)
    stage = next((stage for stage in epoch.config["stages"] if stage["name"] == plan.name), None)
    if stage is None:
        return None
    in_stage = step - (plan.first_step - plan.done) + 1
    return float(learning_rate(configuration.stage(**stage), np.asarray(in_stage), plan.num_steps))


def _thinned(workdir: AnyFolder, step: int) -> list[int]:
    """Checkpoints before a step whose moments were taken away, newer than the one that training can go on from."""
    usable = max((place.step for place in checkpoints_before(workdir, step)), default=0)
    saved = [saved for saved in steps_so_far(workdir) if usable < saved < step]
    return [saved for saved in saved if is_thinned(workdir / "checkpoints" / str(saved))]


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.doctor",
        description="Says what a step of a run was: the data, the state, the learning rate, the hardware, or nothing.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    branches.add_options(parser, "run directory; it is only read")
    parser.add_argument("--step", type=int, metavar="N", help="the step (default: the newest spike)")
    paths.add(parser, "--stores", urls=True, metavar="DIR", help="where the stores are, by name, if they have moved")
    parser.add_argument("--recorded", action="store_true", help="run nothing again: look at what is recorded only")
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    paths.add(parser, "--out", metavar="FILE", help="write it, too: .json, .html (a part of a page), else text")
    args = parser.parse_args()
    cluster.initialize()

    def say(line: str) -> None:
        if not args.json and cluster.is_main():
            print(line, flush=True)

    folder, step = branches.chosen(args), args.step
    if step is None:
        newest = newest_spike(args.workdir, args.branch)
        if newest is None:
            say("no spike: no roll-back, and no step without an update or above a limit; name a step: --step=N")
            if args.json:
                print(json.dumps(None))
            return
        folder, step = newest
    found = diagnose(folder, step, args.stores, again=not args.recorded, say=say)
    if cluster.is_main():
        text = "\n".join(telling.text(found))
        print(telling.as_json(found) if args.json else text, flush=True)
        if args.out:
            kinds = {".json": telling.as_json, ".html": telling.html}
            kind = kinds.get(args.out.suffix.lower())
            files.write_text(args.out, (kind(found) if kind else text) + "\n")


if __name__ == "__main__":
    run_main(main)
