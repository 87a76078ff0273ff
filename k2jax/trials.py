"""What is run again to find out what a step was: twice from a checkpoint, from earlier states, with other batches.

PaLM's experiment, and a finer one: with other rows in the place of the suspect ones.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from k2jax.data.provenance import which_docs
from k2jax.model.decoder import Params, compute_dtype, parameter_table
from k2jax.parallel import compile_cache
from k2jax.rerun import CLOSE, Place, Replayed, Rerun, compare, ledger_rows, metrics_rows
from k2jax.run.ledger import float_bits
from k2jax.run.state import TrainState
from k2jax.stability.crossing import Ordinary, limit_of
from k2jax.stability.repeats import repeats
from k2jax.stability.verdict import SOON, is_unusual
from k2jax.training.losses import row_losses
from k2jax.training.optimizer import Table, kept_moments

OTHERS = 6  # steps around the one in question, whose batches stand for ordinary ones
EARLIER = 2  # checkpoints before it from whose states its batch is run
FEWEST_ROWS = 8  # of a subset, for a median of its own
MOST_ROWS = 8  # that are named with their documents
ALIKE = 0.4  # of the trainer's floors: batches differ less from one state than from step to step
EXCERPT = 160  # characters of a document
FLOOR = 0.05  # of a row's loss, above its subset's median

Rows = dict[str, np.ndarray]


class Trials:
    """Of one step.

    Args:
        places: checkpoints before it, the newest first.
        ranges: of loss and gradient norm before it, {} where there are too few steps.
        same_program: devices, versions and flags are those that the run had then.
        launched: the run was launched from the newest of the checkpoints, with nothing changed.
    """

    def __init__(
        self,
        rerun: Rerun,
        step: int,
        places: list[Place],
        ranges: dict[str, Ordinary],
        same_program: bool,
        launched: bool,
    ):
        self.rerun, self.step, self.places, self.ranges = rerun, step, places, ranges
        self.same_program, self.launched, self.rules = same_program, launched, rerun.config.stability
        stage = rerun.order.stage_of_step(step)
        near = sorted(range(stage.first_step, stage.last_step + 1), key=lambda other: (abs(other - step), -other))
        self.others = [other for other in near if other != step][:OTHERS]

    def run(self) -> dict[str, Any]:
        """{"replay", "checkpoint", "state", "data"}: as verdict.py takes them."""
        with jax.set_mesh(self.rerun.mesh):
            compile_cache.use(self.rerun.say)
            self.own: Rows = self.rerun.rows(self.step)
            self.other: list[Rows] = [self.rerun.rows(step) for step in self.others]
            earlier = [self._from_checkpoint(place) for place in self.places[1:EARLIER]]
            first, state, data, checkpoint = self._replay_and_look()
            again = list(self._replay())
            checkpoint["through"] = self._through()
            states = [one for one in (state, checkpoint.pop("reading"), *(one for one, _ in earlier)) if one]
            checkpoint["moments"] = _beside(checkpoint["moments"], earlier[0][1] if earlier else {})
            return {
                "replay": self._compared(first, again),
                "checkpoint": checkpoint,
                "state": states,
                "data": data,
            }

    # ---- the step again ----------------------------------------------------------------------------------------------

    def _replay(self) -> Iterator[Replayed]:
        state = self.rerun.state(self.places[0] if self.places else None)
        yield from self._compare_to(state, self.step)

    def _compare_to(self, state: TrainState, last: int) -> Iterator[Replayed]:
        for done in self.rerun.steps(state, last):
            yield self._compare(done.step, jax.device_get(done.metrics))

    def _compare(self, step: int, values: dict[str, Any]) -> Replayed:
        ledger, metrics = (read(self.rerun.workdir, step, step) for read in (ledger_rows, metrics_rows))
        return compare(step, values, ledger[step], metrics.get(step, {}))

    def _compared(self, first: list[Replayed], again: list[Replayed]) -> dict[str, Any]:
        bits = [[(float_bits(one.loss), one.bits, one.apart) for one in run] for run in (first, again)]
        different = next((one for one in first if not one.bits or not one.batch), None)
        return {
            "from": self.places[0].step if self.places else 0,
            "steps": len(first),
            "again": bits[0] == bits[1],
            "loss": [run[-1].loss for run in (first, again)],
            "recorded_loss": first[-1].recorded_loss,
            "same_program": self.same_program,
            "close": CLOSE,
            "apart": max(one.apart for one in first),
            "first_difference": different and different._asdict(),
            "first_norm": next((_widest(one) for one in first if _widest(one)), None),
        }

    def _replay_and_look(self) -> tuple[list[Replayed], dict, dict, dict]:
        """The first replay, and on the way what the checkpoint's state and that before the step make of the batches."""
        place = self.places[0] if self.places else None
        state = self.rerun.state(place)
        checkpoint = {"step": place.step if place else 0, "params": [], "moments": {}, "through": None, "reading": None}
        if place:
            checkpoint["params"] = self._params_beside_metrics(place, state)
            checkpoint["moments"] = _moment_norms(self.rerun, state)
        if checkpoint["step"] < self.step - 1:
            state, checkpoint["reading"] = self._read(state, checkpoint["step"])
        found = []
        for done in self.rerun.steps(state, self.step - 1):
            state = done.state
            found.append(self._compare(done.step, jax.device_get(done.metrics)))
        state, reading = self._read(state, self.step - 1)
        state, data = self._look_at_rows(state, reading)
        return [*found, *self._compare_to(state, self.step)], reading, data, checkpoint

    def _params_beside_metrics(self, place: Place, state: TrainState) -> list[dict[str, Any]]:
        """The norms by layer group, as restored and as the step recorded what it left."""
        row = metrics_rows(self.rerun.workdir, place.step, place.step).get(place.step, {})
        found = _norms(self.rerun, parameter_table(self.rerun.config.model), state.params)
        pairs = {group: (value, row.get(f"param_norm/{group}")) for group, value in found.items()}
        return [
            {"group": group, "found": value, "recorded": known, "apart": abs(value / known - 1) if known else 0.0}
            for group, (value, known) in pairs.items()
            if known is not None
        ]

    def _through(self) -> dict[str, Any] | None:
        """Past the checkpoint, from the one before: whether what it gave back is what its step had left.

        Only where the run was launched from it and went wrong soon after: it may be a chunk's steps.
        """
        if len(self.places) < 2 or not self.launched or self.step - self.places[0].step > SOON:
            return None
        place, before = self.places[:2]
        last = min(place.step + 2, self.step)  # Adam's moments are in the second step's loss
        found = list(self._compare_to(self.rerun.state(before), last))
        different = next((one for one in found if not one.bits and (self.same_program or one.apart > CLOSE)), None)
        step, apart = (different.step, different.apart) if different else (None, 0.0)
        return {"from": before.step, "first_difference": step, "apart": apart}

    # ---- the same batch from other states, other batches from the same -----------------------------------------------

    def _from_checkpoint(self, place: Place) -> tuple[dict[str, Any], dict[str, float]]:
        state = self.rerun.state(place)
        moments = _moment_norms(self.rerun, state)
        return self._read(state, place.step)[1], moments

    def _read(self, state: TrainState, after: int) -> tuple[TrainState, dict[str, Any]]:
        """The state, and what it makes of the batches: that after step `after`."""
        found = []
        for rows in (self.own, *self.other):
            state, values = self._probe(state, rows)
            found.append(values)
        own, others = found[0], found[1:]
        before = after == self.step - 1  # the limits are of that time: a younger state is above them for its age
        return state, {
            "state": after,
            "own": {**own, "unusual": self._unusual(own, others), "finite": _finite(own)},
            "others": {
                "steps": self.others,
                **{key: [one[key] for one in others] for key in ("loss", "grad_norm")},
                "unusual": any(self._above(key, [one[key] for one in others], before) for key in ("loss", "grad_norm")),
                "finite": not others or any(map(_finite, others)),
            },
        }

    def _probe(self, state: TrainState, rows: Rows) -> tuple[TrainState, dict[str, float]]:
        state, metrics = self.rerun.probe(self.step, state, self.rerun.batch(self.step, rows))
        return state, {key: float(metrics[key]) for key in ("loss", "grad_norm")}

    def _unusual(self, own: dict[str, float], others: list[dict[str, float]]) -> bool:
        floors = {"loss": ALIKE * self.rules.loss_floor, "grad_norm": ALIKE * self.rules.grad_norm_floor}
        return any(
            is_unusual(own[key], [one[key] for one in others], self._limit(key), self.rules.deviations, floor)
            for key, floor in floors.items()
        )

    def _limit(self, key: str) -> float:
        return self.ranges[key].limit if key in self.ranges else math.inf

    def _above(self, key: str, values: list[float], limited: bool) -> bool:
        """Whether most of them are not finite, or above the run's limit."""
        above = [not math.isfinite(value) or (limited and value > self._limit(key)) for value in values]
        return sum(above) > len(values) / 2

    # ---- the rows of the batch ---------------------------------------------------------------------------------------

    def _look_at_rows(self, state: TrainState, reading: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        losses = self._row_losses(state, self.own)
        known = [self._row_losses(state, rows) for rows in self.other]
        subsets = np.concatenate([rows["subset"] for rows in self.other]) if self.other else np.zeros(0, np.int32)
        baselines = _baselines(subsets, np.concatenate(known) if known else np.zeros(0), self.rules.deviations)
        repeated = {one.row: one for one in repeats(_without_padding(self.own))}
        names = self.rerun.data.subset_names

        def told(row: int) -> dict[str, Any]:
            subset = int(self.own["subset"][row])
            median, limit = baselines.get(subset, baselines.get(-1, (math.nan, math.inf)))
            repeat = repeated[row]._asdict() if row in repeated else None
            said = {"loss": float(losses[row]), "median": median, "limit": limit, "repeat": repeat}
            return {"row": row, "subset": names[subset], **said}

        rows = [one for one in map(told, range(len(losses))) if not one["loss"] <= one["limit"] or one["repeat"]]
        rows.sort(key=lambda one: (not math.isnan(one["loss"]), one["median"] - one["loss"]))
        swapped = None
        if reading["own"]["unusual"] and self.other and not reading["others"]["unusual"]:
            pairs = zip(reading["others"]["loss"], reading["others"]["grad_norm"], strict=True)
            others = [{"loss": loss, "grad_norm": norm} for loss, norm in pairs]
            state, swapped = self._swap(state, [one["row"] for one in rows], others)
            rows = [*map(told, swapped["rows"]), *rows] if swapped and swapped["searched"] else rows
        shown = [{**one, "documents": self._documents(one)} for one in rows[:MOST_ROWS]]
        return state, {
            "rows": shown,
            "rows_out_of_range": len(rows),
            "of": len(losses),
            "baselines": {names[s] if s >= 0 else "all": {"median": m, "limit": x} for s, (m, x) in baselines.items()},
            "swapped": swapped,
        }

    def _swap(
        self, state: TrainState, suspects: list[int], others: list[dict[str, float]]
    ) -> tuple[TrainState, dict[str, Any] | None]:
        """The batch with another step's rows in the place of the suspects; where that cures nothing, of one, by halves.

        Of no more than a quarter of them: what is left must be the batch that it was.
        """
        num_rows = len(self.own["subset"])

        def tried(rows: list[int], searched: bool) -> dict[str, Any]:
            nonlocal state
            here = np.isin(np.arange(num_rows), rows)
            pairs = {key: (self.other[0][key], own) for key, own in self.own.items()}
            mixed = {key: np.where(here[(...,) + (None,) * (b.ndim - 1)], a, b) for key, (a, b) in pairs.items()}
            state, values = self._probe(state, mixed)
            return {"rows": rows, **values, "ordinary": not self._unusual(values, others), "searched": searched}

        worst = suspects[: max(1, num_rows // 4)]
        found = tried(worst, False) if worst else None
        if found and found["ordinary"]:
            return state, found
        rows = list(range(num_rows))
        while len(rows) > 1:
            half = rows[: len(rows) // 2]
            rows = half if tried(half, True)["ordinary"] else rows[len(half) :]
        one = tried(rows, True)
        return state, one if one["ordinary"] else found

    def _row_losses(self, state: TrainState, rows: Rows) -> np.ndarray:
        """Nats per target of each row, float64 (rows,)."""
        batch = self.rerun.batch(self.step, rows)
        nats, targets = jax.device_get(self._losses_of(state.params, batch.tokens, batch.marks))
        return nats.reshape(-1).astype(np.float64) / np.maximum(targets.reshape(-1), 1)

    @cached_property
    def _losses_of(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """(parameters, tokens and marks (A, R, T+1)) to (losses, targets), (A, R) each."""
        config, plan = self.rerun.config, self.rerun.order.stage_of_step(self.step)
        eos_id, stage = self.rerun.data.manifest["eos_id"], config.stages[plan.index]
        one = partial(row_losses, config=config, stage=stage, eos_id=eos_id, compute_dtype=compute_dtype(config))

        def losses(params: Params, tokens: jax.Array, marks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            def told(some: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
                return (rows := one(params, some[0], None, some[1])[1]).nats, rows.targets

            return jax.lax.map(told, (tokens, marks))

        return jax.jit(losses, out_shardings=NamedSharding(self.rerun.mesh, PartitionSpec()))

    def _documents(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Of a row, the longest part first; of a repeated n-gram only those that hold it."""
        [origin] = which_docs(self.rerun.data, self.step, row["row"], text=True)
        parts, repeat = origin.documents, row["repeat"]
        if repeat:
            stop = repeat["first"] + repeat["period"] * repeat["times"]
            parts = [part for part in parts if part.in_row[0] < stop and part.in_row[1] > repeat["first"]]
        parts = sorted(parts, key=lambda part: part.in_row[0] - part.in_row[1])
        return [
            {"id": part.id, "source": part.source, "in_document": list(part.in_document), "in_row": list(part.in_row),
             "text": part.text[:EXCERPT]}
            for part in parts[:3]
        ]  # fmt: skip


def _without_padding(rows: Rows) -> np.ndarray:
    """Tokens (rows, T+1), of conversations with other numbers in the place of padding, which else repeats itself."""
    tokens = rows["tokens"]
    return np.where(rows["marks"] > 0, tokens, -1 - np.arange(tokens.shape[1])) if "marks" in rows else tokens


def _baselines(subsets: np.ndarray, losses: np.ndarray, deviations: float) -> dict[int, tuple[float, float]]:
    """{subset: (median, limit)} of rows' losses, where there are enough of them; -1: of all."""
    found = {}
    for subset in (-1, *np.unique(subsets).tolist()):
        values = losses[np.isfinite(losses) & ((subsets == subset) | (subset < 0))]
        if len(values) >= FEWEST_ROWS:
            found[subset] = limit_of(values.tolist(), deviations, FLOOR)
    return found


def _widest(one: Replayed) -> dict[str, Any] | None:
    """Of a replayed step the norm that is furthest from the recorded one; None where all are equal."""
    if not one.differing:
        return None
    norm = max(one.differing, key=one.differing.get)
    return {"step": one.step, "norm": norm, "apart": one.differing[norm]}


def _finite(values: dict[str, float]) -> bool:
    return math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])


def _norms(rerun: Rerun, table: Table, arrays: dict[str, jax.Array]) -> dict[str, float]:
    """{layer group: norm}."""

    def squares(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}
        for name, p in table.items():
            found[p.group] = found.get(p.group, 0.0) + jnp.square(arrays[name]).sum()
        return found

    found = jax.jit(squares, out_shardings=NamedSharding(rerun.mesh, PartitionSpec()))(arrays)
    return {group: float(value) ** 0.5 for group, value in found.items()}


def _moment_norms(rerun: Rerun, state: TrainState) -> dict[str, float]:
    """Of those that the optimizer has; of factored ones it is their factors'."""
    first, second = kept_moments(rerun.config)
    norms = {"first moment": _norms(rerun, first, state.mu), "second moment": _norms(rerun, second, state.nu)}
    return {f"{name} of {group}": value for name, found in norms.items() for group, value in found.items()}


def _beside(found: dict[str, float], before: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {"group": group, "found": value, "before": before[group]} for group, value in found.items() if group in before
    ]
