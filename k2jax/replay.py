"""Runs steps of a run again and compares them with its ledger: same batch, same bits of loss and gradient norm.

    python -m k2jax.replay --workdir=runs/k2 --step=150561 --steps=5

From the checkpoint before, or from the seed where there is none, with the configuration, data order and journal that
held then. Reads the run and writes nothing. On other devices sums are added in another order: then it
says how far apart the numbers are.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax import paths
from k2jax.data.epochs import Epoch, order_of, read_epochs
from k2jax.data.journal import read_journal
from k2jax.data.loader import batch_digest
from k2jax.data.provenance import open_run
from k2jax.errors import ConfigError, NumericsError, run_main
from k2jax.parallel import cluster, compile_cache
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.identity import epochs_of
from k2jax.run.ledger import Ledger, StepLog, bits_float, float_bits
from k2jax.run.saved import saved_steps
from k2jax.run.storage import is_thinned, read_meta
from k2jax.training.launch import Launch
from k2jax.training.optimizer import first_state
from k2jax.training.placement import make_state, mesh_of, place_state
from k2jax.training.program import feed_steps

CLOSE = 1e-3  # relative: beyond it another order of sums is no explanation

EPILOG = """\
Exit codes: 0 every step is what the ledger says (on other devices: within their rounding), 65 one is not, 78 asked for
what is not there, 74 a checkpoint or the storage is damaged.
"""


class Replayed(NamedTuple):
    """A step as it was run again, beside what the ledger has of it."""

    step: int
    batch: bool  # the same rows were read
    loss: float  # of the replay
    recorded_loss: float
    bits: bool  # loss and gradient norm are the same float32 numbers
    apart: float  # the larger relative difference of the two
    differing: dict[str, float]  # {norm: relative difference} of the layer groups whose norms differ


def replay(workdir: Path, first: int, count: int, stores: str | None = None, say: Any = print) -> list[Replayed]:
    """Steps `first` to `first + count - 1` of a run, compared. ConfigError for steps that it has not made."""
    rows = _recorded(workdir, first, first + count - 1)
    epochs = [epoch for epoch in read_epochs(workdir) if epoch.after_step < first]
    journal = read_journal(workdir / "journal.jsonl")
    journal = [entry for entry in journal if "positions" in entry and entry["at_step"] < first]
    order = order_of(epochs, journal)
    start = _start(workdir, first)
    config = _configuration(workdir, epochs[-1], first)
    data = open_run(workdir, stores).of_step(first)
    mesh = mesh_here(config)
    with jax.set_mesh(mesh):
        compile_cache.use(say)
        shapes = jax.eval_shape(lambda: first_state(config))
        shardings = place_state(config, shapes, mesh)
        if start is None:
            say("from the seed")
            state = make_state(config, shardings)
        else:
            say(f"from checkpoint {start}")
            state = Checkpoints(workdir, log=say).restore(start, shardings, shapes)
        work = feed_steps(
            config, order, data.stores, data.manifest, mesh, shapes, shardings,
            first_step=int(state.step) + 1, say=say, launch=Launch(),
        )  # fmt: skip
        found = []
        with closing(work):
            for step, _, run_step, batch, _ in work:
                state, metrics = run_step(state, batch)
                if step >= first:
                    found.append(_compare(step, jax.device_get(metrics), *rows[step]))
                    say(describe(found[-1]))
                if step == first + count - 1:
                    break
    return found


def mesh_here(config: ConfigDict) -> jax.sharding.Mesh:
    """The mesh that the run had, or, where it does not fit the devices here, one of fsdp alone."""
    try:
        return mesh_of(config)
    except ConfigError:
        config.unlock()
        config.mesh.update({"replica": 1, "stage": 1, "fsdp": -1, "context": 1, "tensor": 1})
        config.model.rings = ()
        return mesh_of(config)


def _recorded(workdir: Path, first: int, last: int) -> dict[int, tuple[dict, dict]]:
    """{step: (row of the ledger, row of the metrics)}."""
    logs = [Ledger(workdir / "ledger", None).steps, StepLog(workdir / "metrics", None)]
    ledger, metrics = ({row["step"]: row for row in log.rows(first, last)} for log in logs)
    missing = [step for step in range(first, last + 1) if step not in ledger]
    if missing or first < 1 or last < first:
        raise ConfigError(
            f"--step={first} --steps={last - first + 1}: the ledger of {workdir} has no step "
            f"{missing[0] if missing else first}: name steps that the run has made"
        )
    return {step: (ledger[step], metrics.get(step, {})) for step in range(first, last + 1)}


def _start(workdir: Path, first: int) -> int | None:
    """The newest checkpoint before a step from which training can go on; None: from the seed."""
    folder = workdir / "checkpoints"
    steps = [step for step in saved_steps(workdir) if step < first and not is_thinned(folder / str(step))]
    return max(steps, default=None)


def _configuration(workdir: Path, epoch: Epoch, first: int) -> ConfigDict:
    """As the launch had it that made the step: the next checkpoint has the free keys, too, such as the mesh."""
    for step in saved_steps(workdir):
        if step >= first:
            meta = read_meta(workdir / "checkpoints" / str(step))
            if epochs_of(workdir, meta)[-1].number == epoch.number:
                return configuration.from_dict(meta["config"])
            break
    return configuration.from_dict(epoch.config)


def _compare(step: int, values: dict[str, Any], ledger: dict[str, Any], metrics: dict[str, Any]) -> Replayed:
    pairs = [(float(values[key]), bits_float(ledger[key])) for key in ("loss", "grad_norm")]
    norms = {key: float(value) for key, value in values.items() if "_norm/" in key}
    known = {key: metrics[key] for key in norms if metrics.get(key) is not None}
    return Replayed(
        step=step,
        batch=batch_digest(values["batch_digest"][None]) == ledger["batch"],
        loss=pairs[0][0],
        recorded_loss=pairs[0][1],
        bits=all(float_bits(a) == float_bits(b) for a, b in pairs),
        apart=max(_relative(a, b) for a, b in pairs),
        differing={key: _relative(norms[key], known[key]) for key in known if norms[key] != known[key]},
    )


def _relative(a: float, b: float) -> float:
    if a == b or (a != a and b != b):
        return 0.0
    apart = abs(a - b) / max(abs(a), abs(b))
    return apart if apart == apart else float("inf")


def describe(found: Replayed) -> str:
    """One line."""
    line = f"step {found.step}: loss {found.loss:.6f}, recorded {found.recorded_loss:.6f}: "
    if not found.batch:
        return line + "another batch was read"
    if found.bits:
        return line + "the same bits"
    norms = sorted(found.differing, key=found.differing.get, reverse=True)[:3]
    where = f"; most in {', '.join(f'{key} ({found.differing[key]:.1e})' for key in norms)}" if norms else ""
    return line + f"{found.apart:.1e} apart{where}"


def same_devices(workdir: Path, step: int) -> bool:
    """Whether the run had devices of this kind and number at a step, as far as its checkpoints say."""
    later = [saved for saved in saved_steps(workdir) if saved >= step]
    devices = read_meta(workdir / "checkpoints" / str(later[0])).get("devices") if later else None
    here = jax.devices()
    return devices is None or (devices["kind"], devices["count"]) == (here[0].device_kind, len(here))


def verdict(workdir: Path, found: list[Replayed]) -> str:
    """The last line; NumericsError when a step is not what the ledger says."""
    first, last, step = found[0].step, found[-1].step, next((f for f in found if not f.bits or not f.batch), None)
    what = f"steps {first} to {last}" if last > first else f"step {first}"
    if step is None:
        return f"{what}: equal to the ledger, in every bit"
    same = same_devices(workdir, first)
    widest = max(f.apart for f in found)
    if all(f.batch for f in found) and not same and widest < CLOSE:
        return f"{what}: the same batches, on other devices; at most {widest:.1e} apart"
    why = "the devices are of the same kind and number" if same else f"other devices explain less than {CLOSE:.0e}"
    raise NumericsError(f"{what}: the first that differs is {describe(step)}; {why}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.replay",
        description="Runs steps of a run again and compares them with its ledger.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    paths.add(parser, "--workdir", buckets=True, required=True, metavar="DIR", help="run directory; it is only read")
    parser.add_argument("--step", type=int, required=True, metavar="N", help="the first step to run again")
    parser.add_argument("--steps", type=int, default=1, metavar="K", help="how many (default: 1)")
    paths.add(parser, "--stores", urls=True, metavar="DIR", help="where the stores are, by name, if they have moved")
    parser.add_argument("--json", action="store_true", help="print what was found as a line of JSON a step")
    args = parser.parse_args()
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
