"""Loss on held-out windows by subset, beside what the unigram distribution would score on them.

Held-out are a store's tokens from `num_train_tokens` on: the order has no window there, so no step reads one. Of
conversations the rows are packed as those of training, and the loss is that of their learned targets.
"""

import json
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from k2jax.config import from_dict, to_dict
from k2jax.data.conversations import is_target, num_held_out_rows, read_held_out
from k2jax.data.loader import row_length, validation_starts
from k2jax.data.store import Store
from k2jax.model.decoder import Params
from k2jax.parallel import sharding
from k2jax.training.losses import row_losses

UNIGRAM_TOKENS = 4_000_000  # training tokens of a subset that its unigram distribution is counted on, at most


class Validation(NamedTuple):
    """Nats per token over the held-out windows of one subset."""

    loss: float
    unigram_loss: float  # cross-entropy under the training tokens' unigram distribution, add-one smoothed
    tokens: int


class HeldOutBatch(NamedTuple):
    """Some held-out windows of a subset and their losses."""

    subset: str
    starts: np.ndarray  # (rows,): first token of each in the store; of conversations the row's number
    rows: np.ndarray  # int32 (rows, T + 1), or (rows, T) with label_shift "inside"
    marks: np.ndarray | None  # of conversations, as rows: data/conversations.py
    losses: np.ndarray  # (rows,): nats, summed over a window's targets
    targets: np.ndarray  # (rows,): how many


def validate(
    config: ConfigDict,
    stage: ConfigDict,
    params: Params,
    mesh: Mesh,
    stores: dict[str, Store],
    compute_dtype: jnp.dtype,
    eos_id: int,
    *,
    max_windows: int | None,
    on_batch: Callable[[HeldOutBatch], None] | None = None,
) -> dict[str, Validation]:
    """Validation of every subset of the stage's mix, at its sequence length; without those that hold out no window.

    Args:
        max_windows: of each subset, evenly spaced; None for all.
        on_batch: is given every batch as it is done.
    """
    losses_of = _losses_of(config, stage, compute_dtype, eos_id, mesh)
    found = {}
    for name in stage.mix:
        store = stores[name]
        starts = held_out_starts(config, stage, store, max_windows)
        if not len(starts):
            continue
        unigram = unigram_losses(store, config.model.vocab_size)
        loss = unigram_loss = targets = predicted = 0
        for first in range(0, len(starts), rows_per_batch(stage, mesh)):
            some = starts[first : first + rows_per_batch(stage, mesh)]
            rows, marks = read_rows(config, stage, store, some)
            batch = HeldOutBatch(name, some, rows, marks, *_run(losses_of, params, rows, marks, stage, mesh))
            loss, targets = loss + batch.losses.sum(), targets + batch.targets.sum()
            asked = rows[:, 1:] if marks is None else rows[:, 1:][is_target(marks, stage.kind == "dpo")]
            unigram_loss, predicted = unigram_loss + unigram[asked].sum(), predicted + asked.size
            if on_batch:
                on_batch(batch)
        found[name] = Validation(float(loss / targets), float(unigram_loss / predicted), int(targets))
    return found


def few_losses(
    config: ConfigDict,
    stage: ConfigDict,
    params: Params,
    mesh: Mesh,
    stores: dict[str, Store],
    compute_dtype: jnp.dtype,
    eos_id: int,
    max_windows: int,
) -> dict[str, tuple[float, int]]:
    """{subset of the stage's mix: (nats per token, targets)} on at most so many windows of each.

    Windows of all subsets share batches: a few of each fill one.
    """
    losses_of = _losses_of(config, stage, compute_dtype, eos_id, mesh)
    starts = {name: held_out_starts(config, stage, stores[name], max_windows) for name in stage.mix}
    starts = {name: found for name, found in starts.items() if len(found)}
    if not starts:
        return {}
    read = [read_rows(config, stage, stores[name], found) for name, found in starts.items()]
    rows, size = np.concatenate([rows for rows, _ in read]), rows_per_batch(stage, mesh)
    marks = None if stage.kind == "pretrain" else np.concatenate([marks for _, marks in read])
    parts = [
        _run(losses_of, params, rows[i : i + size], marks if marks is None else marks[i : i + size], stage, mesh)
        for i in range(0, len(rows), size)
    ]
    losses, targets = (np.concatenate(part) for part in zip(*parts, strict=True))
    ends = np.cumsum([len(found) for found in starts.values()])[:-1]
    sums = zip(starts, np.split(losses, ends), np.split(targets, ends), strict=True)
    return {name: (float(loss.sum() / max(of.sum(), 1)), int(of.sum())) for name, loss, of in sums}


def held_out_starts(config: ConfigDict, stage: ConfigDict, store: Store, most: int | None) -> np.ndarray:
    """Which held-out rows of a stage are read, evenly spaced: the first token of each, or its number (HeldOutBatch)."""
    if stage.kind == "pretrain":
        return validation_starts(store, stage.sequence_length, config.data.label_shift, most)
    available = num_held_out_rows(store, stage.sequence_length, stage.too_long)
    count = available if most is None else min(available, most)
    return np.arange(count) * available // max(1, count)


def read_rows(
    config: ConfigDict, stage: ConfigDict, store: Store, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """(tokens, marks or None), int32, of some of the rows of `held_out_starts`."""
    width = row_length(stage.sequence_length, config.data.label_shift)
    if stage.kind == "pretrain":
        return store.read(starts, width).view(np.int32), None
    rows, marks = read_held_out(store, stage.sequence_length, stage.too_long, starts, width)
    return rows.view(np.int32), marks.view(np.int32)


def _losses_of(
    config: ConfigDict, stage: ConfigDict, compute_dtype: jnp.dtype, eos_id: int, mesh: Mesh
) -> Callable:
    texts = [json.dumps(to_dict(x), sort_keys=True) for x in (config, stage)]
    return _program(*texts, jnp.dtype(compute_dtype), eos_id, mesh)


@lru_cache(maxsize=4)
def _program(config: str, stage: str, compute_dtype: jnp.dtype, eos_id: int, mesh: Mesh) -> Callable:
    """`row_losses` compiled: once for all checkpoints of a stage. `config` and `stage` are JSON."""
    sections = {"config": from_dict(json.loads(config)), "stage": ConfigDict(json.loads(stage))}
    run = partial(row_losses, **sections, eos_id=eos_id, compute_dtype=compute_dtype)
    return jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _run(
    losses_of: Callable, params: Params, rows: np.ndarray, marks: np.ndarray | None, stage: ConfigDict, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and targets of each row, float64; a short batch is filled up so that one shape is compiled."""
    count, full = len(rows), rows_per_batch(stage, mesh)
    place = NamedSharding(mesh, PartitionSpec(sharding.data_axes(mesh)))

    def placed(some: np.ndarray) -> jax.Array:
        filled = np.concatenate([some, np.repeat(some[:1], full - count, axis=0)])
        return jax.make_array_from_callback(filled.shape, place, lambda index: filled[index])

    found = losses_of(params, placed(rows), None, None if marks is None else placed(marks))[1]
    return np.asarray(found.nats, np.float64)[:count], np.asarray(found.targets, np.float64)[:count]


def rows_per_batch(stage: ConfigDict, mesh: Mesh) -> int:
    """Those of a microbatch, which the run has memory for; on another mesh a multiple of what it needs."""
    data_parallel = sharding.row_parts(mesh)
    rows = stage.rows_per_step // stage.microbatches
    return max(rows // data_parallel, 1) * data_parallel


def unigram_losses(store: Store, vocab_size: int) -> np.ndarray:
    """-log probability of each token (V,) under add-one smoothed counts of the store's training tokens; of
    conversations, of those that are learned."""
    piece = min(65_536, store.num_train_tokens)
    starts = np.arange(0, min(store.num_train_tokens, UNIGRAM_TOKENS) - piece + 1, piece)
    learned = store.read_mask(starts, piece).ravel() == 1 if store.masked else None  # of pairs the chosen one's
    counts = np.bincount(store.read(starts, piece).ravel(), learned, minlength=vocab_size) + 1.0
    return -np.log(counts / counts.sum())
