"""Steps of a run run again, from its checkpoints, with the configuration, data order and journal that held then.

What replay.py and doctor.py have in common. Reads the run and writes nothing; a branch of a run is named by its folder.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.bucket import BucketPath
from k2jax.data.epochs import Epoch, order_of, read_epochs
from k2jax.data.journal import in_force, read_journal
from k2jax.data.loader import BatchSource, batch_digest, make_loader
from k2jax.data.order import Order, StagePlan
from k2jax.data.provenance import Run, open_run
from k2jax.errors import ConfigError
from k2jax.parallel import cluster
from k2jax.run import digest
from k2jax.run.branches import line
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.identity import epochs_of
from k2jax.run.ledger import Ledger, StepLog, bits_float, float_bits
from k2jax.run.saved import steps_so_far
from k2jax.run.state import TrainState, flat
from k2jax.run.storage import is_thinned, read_meta
from k2jax.run.tuning import Tuning
from k2jax.training.launch import Launch
from k2jax.training.optimizer import first_state
from k2jax.training.placement import make_state, mesh_of, place_batches, place_state
from k2jax.training.program import StepFunction, compile_step
from k2jax.training.reference import References
from k2jax.training.step import Batch, Metrics

CLOSE = 1e-3  # relative: beyond it another order of sums is no explanation
AS_IT_COMES, NEVER = (np.full(2, value, np.float32) for value in (np.inf, -np.inf))  # limits: update, or none
AnyFolder = Path | BucketPath


class Place(NamedTuple):
    """A checkpoint: of which step, in whose folder it lies."""

    step: int
    workdir: AnyFolder


class Done(NamedTuple):
    """A step that was run again; `state` is that after it, and is gone once the next is asked for."""

    step: int
    state: TrainState
    metrics: Metrics


class Replayed(NamedTuple):
    """A step as it was run again, beside what the ledger has of it."""

    step: int
    batch: bool  # the same rows were read
    loss: float  # of the replay
    recorded_loss: float
    bits: bool  # loss and gradient norm are the same float32 numbers
    apart: float  # the larger relative difference of the two
    differing: dict[str, float]  # {norm: relative difference} of the layer groups whose norms differ
    arrays: bool | None = None  # the state after it is the step's checkpoint, in every bit; None where there is none


# ---- what a run has of its steps -------------------------------------------------------------------------------------


def ledger_rows(workdir: AnyFolder, first: int, last: int) -> dict[int, dict[str, Any]]:
    """{step: row of the ledger}."""
    return _rows(workdir, first, last, lambda folder: Ledger(folder / "ledger", None).steps)


def metrics_rows(workdir: AnyFolder, first: int, last: int) -> dict[int, dict[str, Any]]:
    """{step: row of the metrics}."""
    return _rows(workdir, first, last, lambda folder: StepLog(folder / "metrics", None))


def _rows(workdir: AnyFolder, first: int, last: int, log: Any) -> dict[int, dict[str, Any]]:
    found = {}
    for piece in line(workdir):
        begin, end = max(first, piece.first), last if piece.last is None else min(last, piece.last)
        found |= {row["step"]: row for row in log(piece.folder).rows(begin, end)} if begin <= end else {}
    return dict(sorted(found.items()))


def checkpoints_before(workdir: AnyFolder, step: int) -> list[Place]:
    """Those before a step from which training can go on, the newest first."""
    places = []
    for piece in line(workdir):
        end = step - 1 if piece.last is None else min(step - 1, piece.last)
        for saved in steps_so_far(piece.folder):
            if piece.first - 1 <= saved <= end and not is_thinned(piece.folder / "checkpoints" / str(saved)):
                places.append(Place(saved, piece.folder))
    return sorted(set(places), reverse=True, key=lambda place: place.step)


def recorded_arrays(workdir: AnyFolder, first: int, last: int) -> dict[int, dict[str, int]]:
    """{step: digests of the arrays} of the checkpoints of these steps that there are."""
    found = {}
    for piece in line(workdir):
        begin, end = max(first, piece.first), last if piece.last is None else min(last, piece.last)
        for step in steps_so_far(piece.folder) if begin <= end else ():
            if begin <= step <= end:
                found[step] = read_meta(piece.folder / "checkpoints" / str(step))["digests"]
    return found


def array_digests(state: TrainState) -> dict[str, int]:
    """Of a state, as checkpoints record them."""
    return {name: int(value) for name, value in jax.jit(digest.tree_digests)(flat(state)).items()}


def compare(step: int, values: dict[str, Any], ledger: dict[str, Any], metrics: dict[str, Any]) -> Replayed:
    """What a step gave now, beside its rows of ledger and metrics."""
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


def same_devices(workdir: AnyFolder, step: int) -> bool:
    """Whether the run had devices of this kind and number, in as many processes, as far as its checkpoints say.

    What adds up between processes may have another order than what adds up within one: Gloo on CPUs does.
    """
    later = [Place(saved, workdir) for saved in steps_so_far(workdir) if saved >= step]
    nearest = (later or checkpoints_before(workdir, step))[:1]  # a branch may have none of its own
    metas = [read_meta(place.workdir / "checkpoints" / str(place.step)) for place in nearest]
    devices, here = metas[0].get("devices") if metas else None, jax.devices()
    if devices is None:
        return True
    now = here[0].device_kind, len(here), cluster.count()
    return now == (devices["kind"], devices["count"], devices.get("processes", now[2]))


# ---- running them again ----------------------------------------------------------------------------------------------


class Rerun:
    """A run as it was when it made a step, on the devices here. Use within `jax.set_mesh(rerun.mesh)`.

    Raises ConfigError, StorageError where the run, its stores or their data cannot be read or are not each other's.
    """

    def __init__(self, workdir: AnyFolder, step: int, stores: str | None = None, say: Any = print):
        self.workdir, self.say = workdir, say
        epochs = [epoch for epoch in read_epochs(workdir) if epoch.after_step < step]
        self.order: Order = order_of(epochs, in_force(read_journal(workdir / "journal.jsonl"), step))
        self.config = config_of_step(workdir, epochs[-1], step)
        self.data: Run = open_run(workdir, stores).of_step(step)
        self.mesh: Mesh = mesh_here(self.config)
        self.shapes = jax.eval_shape(lambda: first_state(self.config))
        self.shardings = place_state(self.config, self.shapes, self.mesh)
        self._compiled: dict[tuple[int, bool], StepFunction] = {}
        self.references = References(self.config, workdir, self.mesh, self.data.manifest, {}, say=say)

    def state(self, place: Place | None) -> TrainState:
        """That of a checkpoint, every array checked; None: from the seed. Raises DamagedError, StorageError."""
        if place is None:
            self.say("from the seed")
            return make_state(self.config, self.shardings)
        self.say(f"from checkpoint {place.step}")
        return Checkpoints(place.workdir, log=self.say).restore(place.step, self.shardings, self.shapes)

    def steps(self, state: TrainState, last: int) -> Iterator[Done]:
        """The steps after that of `state`, which is used up, to `last`.

        Each makes an update or none as the run decided then, whatever rule it had.
        """
        first = int(state.step) + 1
        decided = ledger_rows(self.workdir, first, last)
        for plan in self.order.stages:
            begin, end = max(first, plan.first_step), min(last, plan.last_step)
            if begin > end:
                continue
            run_step = self.compiled(plan)
            placement = place_batches(self.config.stages[plan.index], self.mesh)
            batches = make_loader(
                self.order, self.data.rows, label_shift=self.config.data.label_shift, first_step=begin,
                last_step=end, local_rows=placement.local_rows, threads=self.config.data.threads,
                prefetch=self.config.data.prefetch,
            )  # fmt: skip
            with closing(batches):
                for step, rows in batches:
                    batch = placement.globalize(rows)._replace(limits=limits_as_decided(decided.get(step, {})))
                    batch = self.references.added(batch, step, plan, state.params)
                    state, metrics = run_step(state, batch)
                    yield Done(step, state, metrics)

    def compiled(self, plan: StagePlan, skips: bool | None = None) -> StepFunction:
        """The compiled step of a stage, once; `skips`: with stability.skip so, whatever the run has."""
        skips = self.config.stability.skip if skips is None else skips
        if (plan.index, skips) not in self._compiled:
            config = self.config
            if config.stability.skip != skips:
                config = configuration.from_dict(configuration.to_dict(config)).unlock()
                config.stability.skip = skips
            args = (config, plan, self.mesh, self.shapes, self.shardings, self.data.manifest, self.say, Launch())
            tuning = Tuning.of_reader(config, self.workdir, self.say)
            self._compiled[plan.index, skips] = compile_step(*args, tuning)
        return self._compiled[plan.index, skips]

    # ---- one batch from any state --------------------------------------------------------------------------------

    def rows(self, step: int) -> dict[str, np.ndarray]:
        """What a step reads, all rows of it on each process, as BatchSource has them."""
        shift = self.config.data.label_shift
        return BatchSource(self.order, self.data.rows, label_shift=shift, first_step=step, last_step=step)[0]

    def batch(self, step: int, rows: dict[str, np.ndarray]) -> Batch:
        """Rows of a step's shape, on the devices."""
        placement = place_batches(self.config.stages[self.order.stage_of_step(step).index], self.mesh)
        return placement.globalize({key: values[placement.local_rows] for key, values in rows.items()})

    def probe(self, step: int, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """A batch as the stage of `step` runs it, from a state: the state, unchanged, in other buffers; the metrics."""
        plan = self.order.stage_of_step(step)
        run_step, batch = self.compiled(plan, skips=True), self.references.added(batch, step, plan, state.params)
        count = (state.step + 0, state.skips_in_a_row + 0)  # what is given is used up
        after, metrics = run_step(state, batch._replace(limits=NEVER))
        return after._replace(step=count[0], skips_in_a_row=count[1]), jax.device_get(metrics)


def limits_as_decided(row: dict[str, Any]) -> np.ndarray:
    """Limits under which a step does what the ledger says it did: float32 (2,)."""
    return NEVER if row.get("outlier") and not row.get("applied", True) else AS_IT_COMES


def mesh_here(config: ConfigDict) -> Mesh:
    """The mesh that the run had, or, where it does not fit the devices here, one of fsdp alone."""
    try:
        return mesh_of(config)
    except ConfigError:
        config.unlock()
        config.mesh.update({"replica": 1, "stage": 1, "fsdp": -1, "context": 1, "tensor": 1})
        config.model.rings = ()
        return mesh_of(config)


def config_of_step(workdir: AnyFolder, epoch: Epoch, step: int) -> ConfigDict:
    """As the launch had it that made the step: the next checkpoint has the free keys, too, such as the mesh."""
    for saved in steps_so_far(workdir):
        if saved >= step:
            meta = read_meta(workdir / "checkpoints" / str(saved))
            if epochs_of(workdir, meta)[-1].number == epoch.number:
                return configuration.from_dict(meta["config"])
            break
    return configuration.from_dict(epoch.config)
