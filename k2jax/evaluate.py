"""Validation loss by subset on held-out windows, beside what the unigram distribution would score on them."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from k2jax import sharding
from k2jax.data.loader import validation_rows
from k2jax.data.store import Store
from k2jax.model import Params
from k2jax.step import loss_sums

UNIGRAM_TOKENS = 4_000_000  # training tokens of a subset that its unigram distribution is counted on, at most


class Validation(NamedTuple):
    """Nats per token over the held-out windows of one subset."""

    loss: float
    unigram_loss: float  # cross-entropy under the training tokens' unigram distribution, add-one smoothed
    tokens: int


def validate(
    config: ConfigDict,
    stage: ConfigDict,
    params: Params,
    mesh: Mesh,
    stores: dict[str, Store],
    compute_dtype: jnp.dtype,
    eos_id: int,
) -> dict[str, Validation]:
    """Validation of every subset of the stage's mix at its sequence length; {} for subsets without held-out windows."""
    rows = _rows_per_batch(stage, mesh)
    sums = jax.jit(
        partial(
            loss_sums, config=config, stage=stage, eos_id=eos_id, num_subsets=2, compute_dtype=compute_dtype
        )
    )
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.DATA_AXES))
    found = {}
    for name in stage.mix:
        windows = validation_rows(
            stores[name], stage.sequence_length, config.data.label_shift, config.eval.windows
        )
        if not len(windows):
            continue
        total = np.zeros(2)
        for first in range(0, len(windows), rows):
            batch = windows[first : first + rows]
            padding = np.arange(rows) >= len(
                batch
            )  # rows that fill up the last batch count as another subset
            batch = np.concatenate([batch, np.repeat(batch[:1], padding.sum(), axis=0)])
            tokens = jax.make_array_from_callback(
                batch.shape, placed, lambda index, batch=batch: batch[index]
            )
            _, part = sums(params, tokens, jnp.asarray(padding.astype(np.int32)))
            total += [float(part.subset_loss[0]), float(part.subset_targets[0])]
        unigram = unigram_loss(stores[name], windows, config.model.vocab_size)
        found[name] = Validation(total[0] / total[1], unigram, int(total[1]))
    return found


def _rows_per_batch(stage: ConfigDict, mesh: Mesh) -> int:
    data_parallel = mesh.shape["replica"] * mesh.shape["fsdp"]
    return max(stage.rows_per_step // stage.microbatches, data_parallel)


def unigram_loss(store: Store, windows: np.ndarray, vocab_size: int) -> float:
    """Nats per target token of `windows` under add-one smoothed counts of the store's training tokens."""
    piece = min(65_536, store.num_train_tokens)
    starts = np.arange(0, min(store.num_train_tokens, UNIGRAM_TOKENS) - piece + 1, piece)
    counts = np.bincount(store.read(starts, piece).ravel(), minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[windows[:, 1:]].mean())
