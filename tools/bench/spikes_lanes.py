"""Small real runs side by side, for spikes.py: lanes of one vmapped training step, with faults planted in some.

A lane is a run of its own: state, data, detector, checkpoints. The step is training/step.py's; data are a Markov text.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax.run.state import TrainState
from k2jax.stability.detect import HISTORY, LAG, Limits, Row, Spike, limits_of, spike_of
from k2jax.training.optimizer import init_state
from k2jax.training.step import Batch, train_step

VOCABULARY, WIDTH, ROWS, TOPICS, CHOICES = 256, 33, 8, 16, 6
SERIES = (
    "loss",
    "grad_norm",
    "logit",
    "update_norm",
    "grad_norm/q",
    "grad_norm/embed",
    "grad_norm/head",
    "param_norm",
)
QUERIES_KEYS = ("layers.wq_LDNH", "layers.wk_LDKH")


class Plant(NamedTuple):
    """What is wrong with a step, (lanes,) each."""

    lr: Any = 1.0  # times the learning rate
    qk: Any = 1.0  # times wq and wk, which stay so
    nan: Any = False  # parameters are NaN, in this step only


@dataclass(frozen=True)
class Fault:
    """By the number of steps since it began; None from each of them: nothing is wrong."""

    name: str
    steps: int = 1  # that it lasts
    plant: Plant = Plant()
    tokens: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = (
        None  # of the batch's (ROWS, WIDTH)
    )
    flip: tuple[str, str, int] | None = None  # (field of the state, parameter, bit)


@dataclass
class Lane:
    """A run; `guarded`: its detector acts, by skipping steps and going back to a checkpoint."""

    seed: int
    fault: Fault | None = None
    begin: int = 0  # the first step in which something is wrong
    guarded: bool = True
    lr: float = 1.0  # times the stage's
    step: int = 0
    rows: list[Row] = field(default_factory=list)
    curves: list[tuple[float, ...]] = field(default_factory=list)  # of SERIES
    spikes: list[Spike] = field(default_factory=list)
    outliers: list[int] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    skipped: int = 0
    rolled_back: int = 0
    gone: bool = False  # the fault, since the lane went back: its data are deferred, its hardware is another
    held: dict[int, TrainState] = field(default_factory=dict)
    ended: bool = False  # by a spike that going back did not help
    validation: dict[str, float] = field(default_factory=dict)


@cache
def text(seed: int, rows: int) -> np.ndarray:
    """int32 (rows, WIDTH): each row a walk on one of TOPICS chains, whose tokens have CHOICES unequal successors."""
    chains = np.random.default_rng(1).integers(1, VOCABULARY, (TOPICS, VOCABULARY, CHOICES))
    draw = np.random.default_rng((2, seed))
    weights = 0.5 ** np.arange(CHOICES)
    topics = draw.integers(0, TOPICS, rows)
    tokens = np.empty((rows, WIDTH), np.int32)
    tokens[:, 0] = draw.integers(1, VOCABULARY, rows)
    for i in range(1, WIDTH):
        tokens[:, i] = chains[topics, tokens[:, i - 1], draw.choice(CHOICES, rows, p=weights / weights.sum())]
    return tokens


def get_config(steps: int) -> ConfigDict:
    """Some 40,000 parameters, 256 tokens a step."""
    c = configuration.base()
    c.model.vocab_size, c.model.dim, c.model.num_layers, c.model.unroll = VOCABULARY, 32, 2, 2
    c.model.num_heads = c.model.num_kv_heads = 4
    c.model.head_dim, c.model.ffn_dim = 8, 96
    c.precision.compute = "float32"
    shape = {"sequence_length": WIDTH - 1, "rows_per_step": ROWS, "steps_per_chunk": steps, "chunks": 1}
    rates = {"lr_peak": 3e-3, "lr_final": 3e-4, "warmup_steps": min(100, steps // 4)}
    c.stages = (configuration.stage(mix={"text": 1}, **shape, **rates),)
    return c


@cache
def make_step(steps: int) -> Callable[[TrainState, Batch, Plant], tuple[TrainState, jax.Array]]:
    """The training step of all lanes at once, with what is planted: (states, (lanes, len(SERIES) + 2) of metrics)."""
    c = get_config(steps)
    step = partial(
        train_step,
        config=c,
        first_step=1,
        num_steps=steps,
        eos_id=0,
        num_subsets=1,
        compute_dtype=jnp.float32,
    )

    def planted(state: TrainState, batch: Batch, plant: Plant) -> tuple[TrainState, jax.Array]:
        stage = SimpleNamespace(**c.stages[0].to_dict())
        stage.lr_peak, stage.lr_final = plant.lr * stage.lr_peak, plant.lr * stage.lr_final
        params = {n: p * plant.qk if n in QUERIES_KEYS else p for n, p in state.params.items()}
        broken = {name: jnp.where(plant.nan, jnp.nan, value) for name, value in params.items()}
        new, metrics = step(state._replace(params=broken), batch, stage=stage)
        restored = jax.tree.map(lambda old, new: jnp.where(plant.nan, old, new), params, new.params)
        told = [metrics[name] for name in (*SERIES, "applied", "outlier")]
        return new._replace(params=restored), jnp.stack([jnp.float32(value) for value in told])

    return jax.jit(jax.vmap(planted))


class Lanes:
    """Runs lanes to `steps`, each at its own step, with a checkpoint of each `every` so many of them."""

    def __init__(self, lanes: Sequence[Lane], steps: int, every: int):
        self.lanes, self.steps, self.every = lanes, steps, every
        self.rules = configuration.base().stability.to_dict()
        self.before, self.most = (self.rules["rollback"][key] for key in ("before", "most"))
        self.in_a_row = configuration.base().optimizer.max_skips_in_a_row
        self.run_step = make_step(steps)
        m = get_config(steps).model
        seeds = np.array([lane.seed for lane in lanes])
        self.state = jax.jit(jax.vmap(partial(init_state, m)))(seeds)

    def run(self) -> None:
        at = {max(lane.begin for lane in self.lanes) + 60: "soon", self.steps: "end"}
        while any(lane.step < self.steps for lane in self.lanes):
            self._turn()
            first = min(lane.step for lane in self.lanes)
            if first in at:
                self._validate(at.pop(first))

    def _turn(self) -> None:
        batches, plants = [], []
        for i, lane in enumerate(self.lanes):
            fault = self._fault(lane)
            if fault and fault.flip and lane.step + 1 == lane.begin:
                self._flip(i, *fault.flip)
            batches.append(self._batch(lane, fault))
            plant = fault.plant if fault else Plant()
            plants.append(plant._replace(lr=plant.lr * lane.lr))
        plant = Plant(*(np.array(column) for column in zip(*plants, strict=True)))
        batch = jax.tree.map(lambda *column: np.stack(column), *batches)
        self.state, told = self.run_step(self.state, batch, plant)  # compiled once for as many lanes
        for i, values in enumerate(np.asarray(told)):
            if self.lanes[i].step < self.steps:
                self._judge(i, values)

    def _fault(self, lane: Lane) -> Fault | None:
        """What is wrong with the lane's next step."""
        on = lane.fault and not lane.gone and 0 <= lane.step + 1 - lane.begin < lane.fault.steps
        return lane.fault if on else None

    def _batch(self, lane: Lane, fault: Fault | None) -> Batch:
        limits = Limits()
        if lane.guarded:
            known = lane.rows[-HISTORY - LAG : len(lane.rows) + 1 - LAG]
            limits = limits_of(known, self.rules)
        if lane.step >= self.steps:
            limits = Limits(-1.0, -1.0)  # no update: it waits for the others
        start = min(lane.step, self.steps - 1) * ROWS
        tokens = text(lane.seed, self.steps * ROWS)[start : start + ROWS]
        if fault and fault.tokens:
            tokens = fault.tokens(tokens, np.random.default_rng((lane.seed, lane.step)))
        zeros = np.zeros((1, ROWS), np.int32)
        return Batch(tokens[None], zeros, np.zeros((1, ROWS, 8), np.uint32), np.array(limits, np.float32))

    def _flip(self, i: int, part: str, name: str, bit: int) -> None:
        """One bit of one number in the middle of a lane's array, of a token that the text has."""
        state = self._on_host()
        mine = getattr(state, part)[name][i].reshape(-1)
        mine.view(np.uint32)[len(mine) // 2 + 17] ^= np.uint32(1 << bit)
        self.state = state

    def _judge(self, i: int, values: np.ndarray) -> None:
        """Notes a lane's step; what its detector says of it is done."""
        lane = self.lanes[i]
        lane.step += 1
        lane.curves.append(tuple(map(float, values)))
        applied, outlier = values[-2:] == 1
        lane.rows.append(Row(lane.step, float(values[0]), float(values[1]), bool(applied), bool(outlier)))
        if not lane.guarded:
            return
        lane.skipped += not applied
        lane.outliers += [lane.step] * bool(outlier)
        lane.not_finite += [lane.step] * bool(not applied and not outlier)
        if lane.step % self.every == 0:
            lane.held[lane.step] = jax.tree.map(lambda x: np.array(np.asarray(x)[i]), self.state)
        if spike := spike_of(lane.rows[-HISTORY:], self.rules, self.in_a_row):
            lane.spikes.append(spike)
            self._go_back(i, spike)

    def _go_back(self, i: int, spike: Spike) -> None:
        """As stability/ladder.py: before the crossing, and at each further try twice as far before it."""
        lane = self.lanes[i]
        attempt = len(lane.spikes)
        margin = self.before * 2 ** (attempt - 1) if attempt > 1 else 0
        usable = [step for step in lane.held if step < spike.crossing]
        if not usable or attempt > self.most:
            lane.ended = True  # with exit code 65
            lane.step = self.steps
            return
        at_step = max((step for step in usable if step < spike.crossing - margin), default=min(usable))
        lane.rolled_back += lane.step - at_step
        lane.rows, lane.curves, lane.step, lane.gone = (
            lane.rows[:at_step],
            lane.curves[:at_step],
            at_step,
            True,
        )
        lane.held = {step: held for step, held in lane.held.items() if step <= at_step}
        state = self._on_host()
        jax.tree.map(lambda lanes, one: operator.setitem(lanes, i, one), state, lane.held[at_step])
        self.state = state

    def _on_host(self) -> TrainState:
        """A copy that can be written to."""
        return jax.tree.map(np.array, self.state)

    def _validate(self, when: str) -> None:
        """Loss of the lanes' parameters on text of no lane."""
        losses = []
        for tokens in np.split(text(-1 % 2**32, 16 * ROWS), 16):
            batch = Batch(tokens[None], np.zeros((1, ROWS), np.int32), np.zeros((1, ROWS, 8), np.uint32))
            many = jax.tree.map(lambda x: np.broadcast_to(x, (len(self.lanes), *x.shape)), batch)
            plant = jax.tree.map(lambda x: np.full(len(self.lanes), x), Plant())
            losses.append(np.asarray(self.run_step(self.state, many, plant)[1])[:, 0])
        for lane, loss in zip(self.lanes, np.mean(losses, axis=0), strict=True):
            lane.validation[when] = float(loss)


# ---- what is planted ------------------------------------------------------------------------------------------------


def repeated_ngrams(share: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """A share of the rows is one n-gram of 1 to 13 tokens, again and again (OLMo's filter drops 32 of them)."""

    def change(tokens: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        tokens = tokens.copy()
        for row in tokens[: math.ceil(share * len(tokens))]:
            gram = draw.integers(1, VOCABULARY, draw.integers(1, 14))
            row[:] = np.resize(gram, WIDTH)
        return tokens

    return change


def shuffled(share: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """The tokens of a share of the rows are in a random order."""

    def change(tokens: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        bad = math.ceil(share * len(tokens))
        return np.concatenate([draw.permuted(tokens[:bad], axis=1), tokens[bad:]])

    return change


def faults() -> Iterator[Fault]:
    """All that spikes.py plants."""
    for share, steps in ((0.1, 1), (0.5, 1), (1, 1), (1, 30)):
        yield Fault(
            f"repeated n-grams, {share:.0%} of rows, {steps} step(s)", steps, tokens=repeated_ngrams(share)
        )
        yield Fault(f"shuffled tokens, {share:.0%} of rows, {steps} step(s)", steps, tokens=shuffled(share))
    for factor in (10, 100):
        yield Fault(f"learning rate x{factor} from here on", 10**9, Plant(lr=float(factor)))
    for factor in (1.01, 1.05):
        yield Fault(f"q and k grow by {factor - 1:.0%} a step for 200 steps", 200, Plant(qk=factor))
    yield Fault("an exploding step: learning rate x1000", 1, Plant(lr=1000.0))
    yield Fault("NaN in a step", 1, Plant(nan=True))
    arrays = [("params", name) for name in ("layers.wq_LDNH", "embed_VD", "head_DV")]
    for part, name in (*arrays, ("mu", "head_DV"), ("nu", "head_DV")):
        for bit in (30, 26):
            yield Fault(f"bit {bit} flipped in {part}/{name}", flip=(part, name, bit))
