"""One training step as a pure function: (state, batch) -> (state, metrics). Its jit and shardings: program.py.

Axes: A microbatches, R rows of a microbatch, the rest as in decoder.py.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from k2jax.model.attention_logits import attention_logits
from k2jax.model.decoder import Params, parameter_table
from k2jax.model.preferences import REWARDS
from k2jax.model.weights import Arrays, apart, cast_once, together, with_masters
from k2jax.parallel import replicas, sharding
from k2jax.run.state import TrainState
from k2jax.training.losses import RowLosses, pair_losses, row_losses
from k2jax.training.optimizer import averaged, direction, learning_rate
from k2jax.training.remedies import adagc, qk_clip, rows_without_repeats, update_scales

Metrics = dict[str, Any]  # of arrays; "layers" is one of them, too
NO_LIMITS = np.full(2, np.inf, np.float32)
TINY = 1e-30  # in the place of a norm of 0 that is divided by


class Batch(NamedTuple):
    """A global batch: rows are cut into microbatches, each spread over the data axes."""

    tokens: jax.Array  # int32 (A, R, T+1), or (A, R, T) with label_shift "inside"
    subset: jax.Array  # int32 (A, R): index into the manifest's sorted subsets
    digest: jax.Array  # uint32 (A, R, 8): of each row, see data/loader.py
    limits: jax.Array = NO_LIMITS  # float32 (2,): of loss and gradient norm; above one the step is an outlier
    marks: jax.Array | None = None  # int32, as tokens: of an sft or dpo stage, see data/conversations.py
    pairs: jax.Array | None = None  # int32 (A, R, P): of a dpo stage, see there; -1 where a row has no more
    reference: jax.Array | None = None  # float32 (A, R, P, 2): what their reference says, see model/preferences.py


class Sums(NamedTuple):
    """What a microbatch adds up, over its targets, which are tokens, or pairs: float32."""

    loss: jax.Array  # cross-entropy, nats; of pairs their loss
    targets: jax.Array  # how many
    log_z: jax.Array  # log of softmax's denominator
    logit: jax.Array  # the largest magnitude, of which microbatches have the maximum
    subset_loss: jax.Array  # (subsets,)
    subset_targets: jax.Array  # (subsets,)
    masked_rows: jax.Array | None = None  # where data.mask_repeats is on
    preferences: jax.Array | None = None  # (5,), of pairs: model/preferences.py's REWARDS

    def plus(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)._replace(logit=jnp.maximum(self.logit, other.logit))

    def total(self) -> "Sums":
        """Of arrays that have one more dimension, the first."""
        return jax.tree.map(lambda x: x.sum(axis=0), self)._replace(logit=self.logit.max(axis=0))


class Squares(NamedTuple):
    """Sums of squares, float32: {layer group: of all its arrays}, and (L,) of what it has in each layer."""

    groups: dict[str, jax.Array]
    layers: dict[str, jax.Array]


def loss_sums(
    params: Params | Arrays,
    tokens: jax.Array,
    subset: jax.Array,
    marks: jax.Array | None = None,
    pairs: jax.Array | None = None,
    reference: jax.Array | None = None,
    *,
    config: ConfigDict,
    stage: ConfigDict,
    eos_id: int,
    num_subsets: int,
    compute_dtype: jnp.dtype,
) -> tuple[jax.Array, Sums]:
    """The loss summed over the targets of (R, T+1) tokens, and its parts; nothing is divided yet."""
    subset_BX = jax.nn.one_hot(subset, num_subsets, dtype=jnp.float32)
    some = {"config": config, "stage": stage, "compute_dtype": compute_dtype}
    if pairs is not None:
        loss, rows = pair_losses(params, tokens, marks, pairs, reference, **some)
        return loss, _sums(rows, subset_BX)._replace(preferences=rows.preferences.sum(axis=0))
    times = config.data.mask_repeats
    # Padding repeats nothing: each position has a number of its own there.
    looked_at = tokens if marks is None else jnp.where(marks > 0, tokens, -1 - jnp.arange(tokens.shape[1]))
    kept_B = rows_without_repeats(looked_at, times) if times else None
    loss, rows = row_losses(params, tokens, kept_B, marks, eos_id=eos_id, **some)
    return loss, _sums(rows, subset_BX)._replace(masked_rows=None if kept_B is None else (1.0 - kept_B).sum())


def _sums(rows: RowLosses, subset_BX: jax.Array) -> Sums:
    # Sums of products, not a product of matrices, which TPUs round to bfloat16 unless told.
    by_subset = [(value_B[:, None] * subset_BX).sum(axis=0) for value_B in (rows.nats, rows.targets)]
    return Sums(rows.nats.sum(), rows.targets.sum(), rows.log_z.sum(), rows.logit.max(), *by_subset)


def mean_gradients(
    params: Params, batch: Batch, *, config: ConfigDict, moment_specs: replicas.Specs | None = None, **loss_arguments
) -> tuple[Params, Sums]:
    """Gradient of the mean loss over all targets of all microbatches, accumulated in float32.

    Sums are divided once, at the end, by the targets of the whole batch: microbatches with unequal numbers of targets
    then weigh as they do in one big batch. Replicas are summed once, after their microbatches (replicas.py), and each
    has the part of the gradients that it has of the moments. `moment_specs`: the moments' partitions; None: as those of
    the parameters.
    """
    add_up = partial(summed_gradients, config=config, **loss_arguments)
    of_kind = batch.marks, batch.pairs, batch.reference
    rows = (batch.tokens, batch.subset, *(array for array in of_kind if array is not None))
    if not replicas.axes_in_use():
        grads, sums = add_up(params, *rows)
    else:
        specs = {name: sharding.spec(p.axes) for name, p in parameter_table(config.model).items()}
        grads, sums = replicas.summed(add_up, params, rows, specs, moment_specs or specs)
        sums = sums.total()
    return jax.tree.map(lambda g: g / jnp.maximum(sums.targets, 1.0), grads), sums


def summed_gradients(
    params: Params, *batch: jax.Array, config: ConfigDict, **loss_arguments
) -> tuple[Params, Sums]:
    """Gradient of the loss summed over all targets of (A, R, T+1) tokens, (A, R) subsets and what else a batch of
    this stage has by rows; and the sums."""
    arrays = apart(config.model, params)
    casts = cast_once(config.model, arrays, loss_arguments["compute_dtype"])

    def loss(masters: Arrays, *rows: jax.Array) -> tuple[jax.Array, Sums]:
        return loss_sums(with_masters(casts, masters), *rows, config=config, **loss_arguments)

    def gradient(total: Arrays, *rows: jax.Array) -> tuple[Arrays, Sums]:
        # The sum so far stands for a matrix that is cast: it is there, and a master's numbers are not read.
        return jax.grad(loss, has_aux=True)(arrays | {name: total[name] for name in casts}, *rows)

    def add(total: tuple[Arrays, Sums], rows: tuple[jax.Array, ...]) -> tuple[tuple[Arrays, Sums], None]:
        grads, sums = gradient(total[0], *rows)
        return (jax.tree.map(jnp.add, total[0], grads), total[1].plus(sums)), None

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)

    first = [array[0] for array in batch]
    if batch[0].shape[0] == 1:
        grads, sums = gradient(zeros(arrays), *first)
    else:
        _, sums = jax.eval_shape(loss, arrays, *first)
        grads, sums = jax.lax.scan(add, (zeros(arrays), zeros(sums)), batch)[0]
    return together(grads), sums


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    config: ConfigDict,
    stage: ConfigDict,
    first_step: int,
    num_steps: int,
    moment_shardings: Params | None = None,
    **loss_arguments,
) -> tuple[TrainState, Metrics]:
    """One update. A non-finite loss or gradient leaves parameters and moments as they were, and is counted.

    So does an outlier, above `batch.limits`, where `stability.skip` is on.
    `moment_shardings` pins the gradients to where the moments live, so that data-parallel devices each update a part.
    """
    moment_specs = moment_shardings and {name: place.spec for name, place in moment_shardings.items()}
    grads, sums = mean_gradients(
        state.params, batch, config=config, stage=stage, moment_specs=moment_specs, **loss_arguments
    )
    if moment_shardings is not None:
        grads = jax.lax.with_sharding_constraint(grads, moment_shardings)
    loss = sums.loss / jnp.maximum(sums.targets, 1.0)
    if config.data.mask_repeats or batch.marks is not None:
        loss = jnp.where(sums.targets > 0, loss, jnp.nan)  # of nothing: no update
    grad_squares = squares(config, grads)
    grad_norm = jnp.sqrt(sum(grad_squares.groups.values()))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    outlier = finite & ((loss > batch.limits[0]) | (grad_norm > batch.limits[1]))
    applied = finite & ~outlier if config.stability.skip else finite

    lr = learning_rate(stage, state.step + 1 - first_step + 1, num_steps)
    new, update, counts = updated(state, grads, grad_norm, lr, applied, config)
    if config.optimizer.qk_clip:
        some = {name: loss_arguments[name] for name in ("eos_id", "compute_dtype")}
        some |= {"marks": batch.marks, "reset_positions": stage.reset_positions}
        logits_LN = attention_logits(config, state.params, batch.tokens, rope_base=stage.rope_base, **some)
        params, counts["clipped_heads"] = qk_clip(config, new.params, jnp.where(applied, logits_LN, 0.0))
        new = new._replace(params=params)
    ema = averaged(config, state.ema, new, applied)
    new = new._replace(ema=ema, skips_in_a_row=jnp.where(finite, 0, state.skips_in_a_row + 1))
    metrics = {
        "loss": loss,
        "finite": finite,
        "outlier": outlier,
        "applied": applied,
        "loss_limit": batch.limits[0],
        "grad_norm_limit": batch.limits[1],
        "skips_in_a_row": new.skips_in_a_row,
        "lr": lr,
        **counts,
        **of_batch(batch, sums, stage),
        **norms(grad_squares, squares(config, new.params), squares(config, update)),
    }
    return new, metrics


def of_batch(batch: Batch, sums: Sums, stage: ConfigDict) -> Metrics:
    """What a step tells of its batch, and of what it added up."""
    more = {} if sums.masked_rows is None else {"masked_rows": sums.masked_rows}
    if batch.marks is not None:
        more["padding"] = jnp.sum(batch.marks[..., : stage.sequence_length] == 0)
    if sums.preferences is not None:
        mean = sums.preferences / jnp.maximum(sums.targets, 1.0)
        more |= {f"pairs/{name}": mean[i] for i, name in enumerate(REWARDS)} | {"learned": sums.preferences[-1]}
    return {
        "targets": sums.targets,
        "log_z": sums.log_z / jnp.maximum(sums.targets, 1.0),
        "logit": sums.logit,
        "subset_loss": sums.subset_loss / jnp.maximum(sums.subset_targets, 1.0),
        "subset_targets": sums.subset_targets,
        "batch_digest": batch.digest.reshape(-1, batch.digest.shape[-1]).sum(axis=0, dtype=jnp.uint32),
        **more,
    }


def updated(
    state: TrainState, grads: Params, grad_norm: jax.Array, lr: jax.Array, applied: jax.Array, config: ConfigDict
) -> tuple[TrainState, Params, Metrics]:
    """(the next state, what was added to its parameters, what remedies did), counted whether `applied` or not."""
    clips, counts = state.clips, {"clipped": applied & (grad_norm > config.optimizer.clip_norm)}
    if config.optimizer.adagc.ratio:
        grads, clips, counts["clipped_tensors"] = adagc(config, clips, grads, grad_norm)
        counts["clipped"] = applied & (counts["clipped_tensors"] > 0)
    else:
        clip = jnp.minimum(1.0, config.optimizer.clip_norm / jnp.maximum(grad_norm, 1e-12))
        grads = jax.tree.map(lambda g: g * clip, grads)
    toward, mu, nu = direction(config, state, grads)
    if config.optimizer.update_clip:
        scales, counts["clipped_updates"] = update_scales(config, state.updates + 1, grads, nu)
        toward = {name: d * scales[name] for name, d in toward.items()}
    update = jax.tree.map(lambda d: jnp.where(applied, -lr * d, 0.0), toward)

    def keep(new: Params, old: Params) -> Params:
        return jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)

    new = state._replace(
        step=state.step + 1,
        updates=state.updates + applied,
        params=keep(jax.tree.map(jnp.add, state.params, update), state.params),
        mu=keep(mu, state.mu),
        nu=keep(nu, state.nu),
        clips=keep(clips, state.clips),
    )
    return new, update, counts


def squares(config: ConfigDict, tree: Params) -> Squares:
    """Each array is gone through once: groups are sums of what layers have."""
    found = Squares({}, {})
    for name, p in parameter_table(config.model).items():
        stacked = p.axes[0] == "layers"
        square = jnp.sum(jnp.square(tree[name]), axis=range(1, len(p.shape)) if stacked else None)
        if stacked:
            found.layers[p.group] = found.layers.get(p.group, 0.0) + square
        found.groups[p.group] = found.groups.get(p.group, 0.0) + square.sum()
    return found


def norms(grads: Squares, params: Squares, update: Squares) -> Metrics:
    """{"grad_norm": of everything, "grad_norm/q": of a layer group, ...}; "layers": {"grad_norm/q": (L,), ...}.

    "update_ratio" is the update's norm over the parameters'.
    """
    found: Metrics = {}
    for kind, of in {"grad_norm": grads, "param_norm": params, "update_norm": update}.items():
        found[kind] = jnp.sqrt(sum(of.groups.values()))
        found |= {f"{kind}/{group}": jnp.sqrt(square) for group, square in of.groups.items()}
    for key in ("", *(f"/{group}" for group in params.groups)):
        found[f"update_ratio{key}"] = found[f"update_norm{key}"] / jnp.maximum(found[f"param_norm{key}"], TINY)
    layers = {f"grad_norm/{group}": jnp.sqrt(square_L) for group, square_L in grads.layers.items()}
    for group, square_L in update.layers.items():
        layers[f"update_ratio/{group}"] = jnp.sqrt(square_L) / jnp.maximum(jnp.sqrt(params.layers[group]), TINY)
    return {**found, "layers": layers}
