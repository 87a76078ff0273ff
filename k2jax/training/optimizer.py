"""The optimizers, each a row of a table; the first state; and the learning rate as a function of the step.

Axes: L layers, I what a matrix takes in, O what it gives, D the model's width, E the other of the two. K2's is AdamW.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from k2jax.config import group_factors
from k2jax.model.decoder import Parameter, Params, init_params, narrower, parameter_table
from k2jax.model.weights import LAYERS
from k2jax.parallel.sharding import optimizer_spec
from k2jax.parallel.whole import on_whole
from k2jax.run.state import TrainState
from k2jax.training.remedies import first_clips

Table = dict[str, Parameter]
Step = tuple[Params, Params, Params]  # direction, mu, nu


def first_state(config: ConfigDict) -> TrainState:
    """That of an experiment, with what its optimizer keeps besides the moments."""
    mu, nu = ({name: jnp.zeros(p.shape) for name, p in of.items()} for of in kept_moments(config))
    state = init_state(config.model, config.seed)._replace(mu=mu, nu=nu, clips=first_clips(config))
    return state._replace(ema=dict(state.params)) if config.optimizer.ema_decay else state


def init_state(m: ConfigDict, seed: int) -> TrainState:
    """Parameters drawn, moments of AdamW zero, and no remedies."""
    params = init_params(m, seed)

    def zeros() -> Params:
        return {name: jnp.zeros_like(value) for name, value in params.items()}

    count = jnp.zeros((), jnp.int32)
    return TrainState(count, count, count, params, zeros(), zeros())


def _decayed(progress: jax.Array, share: float) -> jax.Array:
    """From 0 to 1 over the last `share` of the steps."""
    return jnp.clip((progress - (1.0 - share)) / share, 0.0, 1.0)


# How much of the way from lr_final up to lr_peak is left, by the share of the steps after the warm-up that are done,
# and the share of them that decay. "wsd": warm-up, stable, decay (MiniCPM, arXiv:2404.06395), in a line; "wsd_sqrt" by
# 1 less the root, which Haegele et al. (arXiv:2405.18392) found better.
SCHEDULES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "cosine": lambda progress, _: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress, _: 1.0 - progress,
    "constant": lambda progress, _: jnp.ones_like(progress),
    "wsd": lambda progress, share: 1.0 - _decayed(progress, share),
    "wsd_sqrt": lambda progress, share: 1.0 - jnp.sqrt(_decayed(progress, share)),
}


def learning_rate(stage: ConfigDict, step_in_stage: jax.Array, num_steps: int) -> jax.Array:
    """Linear from `lr_start` to `lr_peak` in the warm-up, then `stage.schedule` to `lr_final` at the stage's last step.

    `num_steps` are those that the stage has: where the journal skips some, fewer than its chunks would give.
    `step_in_stage` counts from 1, so the first of 2000 warm-up steps already has 1/2000 of the peak (Megatron's rule).
    """
    step = step_in_stage.astype(jnp.float32)
    warm = stage.lr_start + (stage.lr_peak - stage.lr_start) * step / max(stage.warmup_steps, 1)
    progress = jnp.clip((step - stage.warmup_steps) / max(num_steps - stage.warmup_steps, 1), 0.0, 1.0)
    above = SCHEDULES[stage.schedule](progress, stage.decay_share)
    return jnp.where(step < stage.warmup_steps, warm, stage.lr_final + (stage.lr_peak - stage.lr_final) * above)


# ---- the optimizers --------------------------------------------------------------------------------------------------


def direction(config: ConfigDict, state: TrainState, grads: Params) -> Step:
    """(direction, mu, nu): a step before the stage's learning rate, with decay and each parameter's own factor.

    The decay is decoupled, as in K2's fused Adam: p <- p - lr factor (what the optimizer says + decay p).
    """
    found, mu, nu = OPTIMIZERS[config.optimizer.name].step(config, state, grads)
    decay, rate = decays(config), rates(config)
    found = {name: d + decay[name] * state.params[name] if decay[name] else d for name, d in found.items()}
    found = {name: d if rate[name] == 1.0 else rate[name] * d for name, d in found.items()}
    return found, mu, nu


def rates(config: ConfigDict) -> dict[str, float]:
    """{name: what its learning rate is multiplied by}: its group's factor, and muP's.

    muP's is one over how much wider the model is, for all matrices but the embedding: an element of theirs steps by
    the rate itself, and as many of them as the model is wide add up. Muon's steps, matched in size as they are, add up
    to the root of that.
    """
    factors, muons = group_factors(config.optimizer.groups), config.optimizer.name == "muon"

    def of_width(name: str, p: Parameter) -> float:
        if not p.is_matrix or name == "embed_VD":
            return 1.0
        return narrower(config.model) ** (0.5 if muons and _is_muons(name, p) else 1.0)

    table = parameter_table(config.model)
    return {name: factors.get((p.group, "lr"), 1.0) * of_width(name, p) for name, p in table.items()}


def decays(config: ConfigDict) -> dict[str, float]:
    """{name: its weight decay}: that of matrices and, unless spared, embeddings; a group's own factor goes first."""
    o = config.optimizer
    factors, spared = group_factors(o.groups), () if o.decay_embeddings else ("embed_VD",)

    def factor(name: str, p: Parameter) -> float:
        return factors.get((p.group, "decay"), float(p.is_matrix and name not in spared))

    return {name: factor(name, p) * o.weight_decay for name, p in parameter_table(config.model).items()}


def adamw(config: ConfigDict, state: TrainState, grads: Params) -> Step:
    """K2's: gradients' moving mean over the root of that of their squares, both unbiased."""
    o = config.optimizer
    before = optax.ScaleByAdamState(state.updates, state.mu, state.nu)
    found, after = optax.scale_by_adam(o.b1, o.b2, o.eps).update(grads, before)
    return found, after.mu, after.nu


def lion(config: ConfigDict, state: TrainState, grads: Params) -> Step:
    """Chen et al., arXiv:2302.06675: the sign of a mean of gradients. It wants a rate of a third to a tenth of AdamW's.

    Their b1 and b2 for language models: 0.95 and 0.98.
    """
    before = optax.ScaleByLionState(state.updates, state.mu)
    found, after = optax.scale_by_lion(config.optimizer.b1, config.optimizer.b2).update(grads, before)
    return found, after.mu, {}


def muon(config: ConfigDict, state: TrainState, grads: Params) -> Step:
    """Jordan et al.: the matrices of layers, one by one, step along an orthogonal matrix; AdamW has the rest.

    As optax.contrib.muon, whose two halves are apart here: between them matrices move to where they are whole
    (whole.py), those of one shape together. Matched in size to AdamW's steps, 0.2 (Moonlight, arXiv:2502.16982), so
    that one learning rate and decay serve both.
    """
    table, beta = parameter_table(config.model), config.optimizer.momentum
    ours = [name for name in grads if _is_muons(name, table[name])]
    rest = {name: g for name, g in grads.items() if name not in ours}
    among = state._replace(mu={name: state.mu[name] for name in rest})
    found, mu, nu = adamw(config, among, rest)
    count, stacks = state.updates + 1, {}
    for name in ours:
        g, p = grads[name], table[name]
        mu[name] = beta * state.mu[name] + (1.0 - beta) * g
        ahead = beta * mu[name] / (1.0 - beta ** (count + 1)) + (1.0 - beta) * g / (1.0 - beta**count)  # Nesterov's
        stacks.setdefault((_width_first(ahead, p).shape, _spec(p)), {})[name] = _width_first(ahead, p)
    for (shape, spec), arrays in stacks.items():
        for name, x_LDE in zip(arrays, on_whole(orthogonal, list(arrays.values()), spec), strict=True):
            p = table[name]
            x = jnp.swapaxes(x_LDE, 1, 2) if _is_into_width(p) else x_LDE
            found[name] = MUON_RMS * math.sqrt(max(shape[1:])) * x.reshape(p.shape)
    return found, mu, nu


def _is_into_width(p: Parameter) -> bool:
    """Whether a matrix of layers gives the model's width, as wo_LNHD, instead of taking it."""
    return p.axes[-1] == "embed"


def _width_first(x: jax.Array, p: Parameter) -> jax.Array:
    """(L, D, E), whatever the matrix takes and gives: the orthogonal one of a transpose is the transpose of it."""
    L, D = p.shape[0], p.shape[p.axes.index("embed")]
    return jnp.swapaxes(x.reshape(L, -1, D), 1, 2) if _is_into_width(p) else x.reshape(L, D, -1)


def _spec(p: Parameter) -> PartitionSpec:
    """Of its `_width_first`, where its moments lie."""
    mesh = jax.sharding.get_abstract_mesh()
    D = p.shape[p.axes.index("embed")]
    shape = p.shape[0], D, math.prod(p.shape[1:]) // D
    other = next(axis for axis in p.axes[1:] if axis not in ("embed", "head_dim"))
    return PartitionSpec() if mesh.empty else optimizer_spec(shape, ("layers", "embed", other), mesh)


MUON_RMS = 0.2  # of a step's elements: AdamW's are 0.2 to 0.4
NEWTON_SCHULZ = 5, (3.4445, -4.7750, 2.0315)  # steps, and a polynomial whose slope at 0 is steep: Jordan's


def orthogonal(x_LIO: jax.Array) -> jax.Array:
    """Each matrix with singular values of about 1 (0.7 to 1.2) in the place of its own, by Newton and Schulz's steps.

    A step is 4 m^2 n + 2 m^3 operations of an m x n matrix, m the smaller: five of a square one are those of 5 m tokens
    in training. In float32, whose products TPUs round to bfloat16 as Muon does.
    """
    steps, (a, b, c) = NEWTON_SCHULZ
    turned = x_LIO.shape[1] > x_LIO.shape[2]
    x = jnp.swapaxes(x_LIO, 1, 2) if turned else x_LIO
    x = x / (jnp.sqrt(jnp.square(x).sum(axis=(1, 2), keepdims=True)) + 1e-8)

    def step(_: int, x: jax.Array) -> jax.Array:
        gram = x @ jnp.swapaxes(x, 1, 2)
        return a * x + (b * gram + c * (gram @ gram)) @ x

    x = jax.lax.fori_loop(0, steps, step, x)  # a loop: five times the products would be as long to compile
    return jnp.swapaxes(x, 1, 2) if turned else x


def adafactor(config: ConfigDict, state: TrainState, grads: Params) -> Step:
    """Shazeer and Stern, arXiv:1804.04235: of a matrix's second moments the means of rows and columns, and no first.

    As optax.scale_by_factored_rms on each layer's matrix, clipped as there to an RMS of 1; without steps in proportion
    to a parameter's size, so that learning rates are of AdamW's kind.
    """
    table = parameter_table(config.model)
    decay = 1.0 - (state.updates + 1.0) ** -0.8
    found, nu = {}, {}
    for name, g in grads.items():
        given, taken = ins_and_outs(table[name])
        squares = jnp.square(g) + 1e-30
        if given:
            for key, over in ((f"{name}{IN}", taken), (f"{name}{OUT}", given)):
                nu[key] = decay * state.nu[key] + (1.0 - decay) * squares.mean(axis=over)
            of_rows, of_columns = jnp.expand_dims(nu[name + IN], taken), jnp.expand_dims(nu[name + OUT], given)
            d = g * jax.lax.rsqrt(of_rows / of_rows.mean(axis=given, keepdims=True)) * jax.lax.rsqrt(of_columns)
        else:
            nu[name] = decay * state.nu[name] + (1.0 - decay) * squares
            d = g * jax.lax.rsqrt(nu[name])
        each = tuple(range(name.startswith(LAYERS), g.ndim))
        rms = jnp.sqrt(jnp.square(d).mean(axis=each, keepdims=True))
        found[name] = d / jnp.maximum(1.0, rms)
    return found, {}, nu


IN, OUT = ".in", ".out"  # of a factored matrix: what is by its inputs, and by its outputs


def ins_and_outs(p: Parameter) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions of a matrix's inputs and of its outputs, of which one are the model's width; ((), ()) of others.

    wq_LDNH: (1,), (2, 3); wo_LNHD: (1, 2), (3,). An embedding's inputs are the vocabulary.
    """
    if not p.is_matrix:
        return (), ()
    dims = range(p.axes[0] == "layers", len(p.axes))
    given = 1 if p.axes[dims[0]] == "embed" else len(dims) - 1
    return tuple(dims[:given]), tuple(dims[given:])


def _is_muons(name: str, p: Parameter) -> bool:
    return p.is_matrix and name.startswith(LAYERS)


def _factored(table: Table) -> Table:
    """What Adafactor has of each parameter's second moments."""
    found = {}
    for name, p in table.items():
        given, taken = ins_and_outs(p)
        for key, left_out in ((name + IN, taken), (name + OUT, given)) if given else ((name, ()),):
            kept = [i for i in range(len(p.shape)) if i not in left_out]
            found[key] = p._replace(shape=tuple(p.shape[i] for i in kept), axes=tuple(p.axes[i] for i in kept))
    return found


# ---- the average -----------------------------------------------------------------------------------------------------


def averaged(config: ConfigDict, ema: Params, new: TrainState, applied: jax.Array) -> Params:
    """The moving average of the weights after an update: over fewer steps at first, so that it forgets where it began.

    (1 + t) / (10 + t) then, up to `ema_decay`: of the last tenth or so of what was done. {} where it is off.
    """
    if not config.optimizer.ema_decay:
        return {}
    t = new.updates.astype(jnp.float32)
    decay = jnp.minimum(config.optimizer.ema_decay, (1.0 + t) / (10.0 + t))
    means = {name: decay * ema[name] + (1.0 - decay) * p for name, p in new.params.items()}
    return {name: jnp.where(applied, mean, ema[name]) for name, mean in means.items()}


# ---- the table -------------------------------------------------------------------------------------------------------


class Optimizer(NamedTuple):
    """A row of the table."""

    step: Callable[[ConfigDict, TrainState, Params], Step]  # without decay
    keeps: Callable[[Table], tuple[Table, Table]]  # of each parameter: mu and nu


OPTIMIZERS = {
    "adamw": Optimizer(adamw, lambda table: (table, table)),
    "muon": Optimizer(muon, lambda table: (table, {n: p for n, p in table.items() if not _is_muons(n, p)})),
    "lion": Optimizer(lion, lambda table: (table, {})),
    "adafactor": Optimizer(adafactor, lambda table: ({}, _factored(table))),
}


def kept_moments(config: ConfigDict) -> tuple[Table, Table]:
    """(mu, nu): name, shape and axes of every array that the optimizer keeps."""
    return OPTIMIZERS[config.optimizer.name].keeps(parameter_table(config.model))
