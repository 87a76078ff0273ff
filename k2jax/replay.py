"""Runs steps of a run again and compares them with its ledger: same batch, same bits of loss and gradient norm.

Where a step has a checkpoint, every array of the state after it is compared with that, too.

    python -m k2jax.replay --workdir=runs/k2 --step=150561 --steps=5

From the checkpoint before, or from the seed where there is none, with the configuration, data order and journal that
held at each step. Reads the run and writes nothing; of a run in a release (RELEASE/run) it reads the rows that are
released, and needs no stores. On other devices sums are added in another order: then it says how far apart the numbers
are.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax

from k2jax import paths
from k2jax.data.epochs import read_epochs
from k2jax.data.journal import in_force, ranges_of, read_journal
from k2jax.errors import ConfigError, NumericsError, run_main
from k2jax.parallel import cluster, compile_cache
from k2jax.rerun import (
    CLOSE,
    Replayed,
    Rerun,
    array_digests,
    checkpoints_before,
    compare,
    ledger_rows,
    metrics_rows,
    recorded_arrays,
    same_devices,
)
from k2jax.run import branches

EPILOG = """\
Exit codes: 0 every step is what the ledger says (on other devices: within their rounding), 65 one is not, 78 asked for
what is not there, 74 a checkpoint or the storage is damaged.
"""


def replay(workdir: Path, first: int, count: int, stores: str | None = None, say: Any = print) -> list[Replayed]:
    """Steps `first` to `first + count - 1` of a run, compared. ConfigError for steps that it has not made."""
    last = first + count - 1
    rows, arrays = _recorded(workdir, first, last), recorded_arrays(workdir, first, last)
    places = checkpoints_before(workdir, first)
    state, found = None, []
    for begin, end in _regimes(workdir, places[0].step + 1 if places else 1, last):
        rerun = Rerun(workdir, begin, stores, say)
        with jax.set_mesh(rerun.mesh):
            compile_cache.use(say)
            goes_on = jax.device_put(state, rerun.shardings) if state else None
            before = goes_on or rerun.state(places[0] if places else None)
            for step, state, metrics in rerun.steps(before, end):
                if step >= first:
                    one = compare(step, jax.device_get(metrics), *rows[step])
                    found.append(one._replace(arrays=array_digests(state) == arrays[step]) if step in arrays else one)
                    say(describe(found[-1]))
    return found


def _regimes(workdir: Path, first: int, last: int) -> list[tuple[int, int]]:
    """The steps `first` to `last`, cut where configuration, data or the journal changed: [(first, last), ...]."""
    decisions = in_force(read_journal(workdir / "journal.jsonl"), last)
    changes = {entry["at_step"] for entry in decisions if ranges_of(entry)}
    changes |= {epoch.after_step for epoch in read_epochs(workdir)}
    ends = [*sorted(step for step in changes if first <= step < last), last]
    return list(zip([first, *(end + 1 for end in ends)], ends, strict=False))


def _recorded(workdir: Path, first: int, last: int) -> dict[int, tuple[dict, dict]]:
    """{step: (row of the ledger, row of the metrics)}."""
    ledger, metrics = ledger_rows(workdir, first, last), metrics_rows(workdir, first, last)
    missing = [step for step in range(first, last + 1) if step not in ledger]
    if missing or first < 1 or last < first:
        raise ConfigError(
            f"--step={first} --steps={last - first + 1}: the ledger of {workdir} has no step "
            f"{missing[0] if missing else first}: name steps that the run has made"
        )
    return {step: (ledger[step], metrics.get(step, {})) for step in range(first, last + 1)}


def describe(found: Replayed) -> str:
    """One line."""
    line = f"step {found.step}: loss {found.loss:.6f}, recorded {found.recorded_loss:.6f}: "
    if not found.batch:
        return line + "another batch was read"
    if found.bits:
        state = {None: "", True: ", and so has its checkpoint", False: ", and other arrays than its checkpoint"}
        return f"{line}the same bits{state[found.arrays]}"
    norms = sorted(found.differing, key=found.differing.get, reverse=True)[:3]
    where = f"; most in {', '.join(f'{key} ({found.differing[key]:.1e})' for key in norms)}" if norms else ""
    return line + f"{found.apart:.1e} apart{where}"


def _same(found: Replayed) -> bool:
    return found.batch and found.bits and found.arrays is not False


def verdict(workdir: Path, found: list[Replayed]) -> str:
    """The last line; NumericsError when a step is not what the ledger says."""
    first, last, step = found[0].step, found[-1].step, next((f for f in found if not _same(f)), None)
    what = f"steps {first} to {last}" if last > first else f"step {first}"
    if step is None:
        return f"{what}: equal to the ledger, in every bit"
    same = same_devices(workdir, first)
    widest = max(f.apart for f in found)
    if all(f.batch for f in found) and not same and widest < CLOSE:
        return f"{what}: the same batches, on other devices; at most {widest:.1e} apart"
    as_it_was = "the devices are of the same kind and number, in as many processes"
    why = as_it_was if same else f"other devices explain less than {CLOSE:.0e}"
    raise NumericsError(f"{what}: the first that differs is {describe(step)}; {why}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.replay",
        description="Runs steps of a run again and compares them with its ledger.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    branches.add_options(parser, "run directory; it is only read")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the first step to run again")
    parser.add_argument("--steps", type=int, default=1, metavar="K", help="how many (default: 1)")
    paths.add(parser, "--stores", urls=True, metavar="DIR", help="where the stores are, by name, if they have moved")
    parser.add_argument("--json", action="store_true", help="print what was found as a line of JSON a step")
    args = parser.parse_args()
    args.workdir = branches.chosen(args)
    cluster.initialize()

    def say(line: str) -> None:
        if not args.json:
            print(line, flush=True)

    found = replay(args.workdir, args.step, args.steps, args.stores, say)
    if args.json:
        for step in found:
            print(json.dumps(step._asdict()))
    say(verdict(args.workdir, found))


if __name__ == "__main__":
    run_main(main)
