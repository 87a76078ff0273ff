"""Log-probabilities of given tokens after given inputs, computed where the parameters live.

Only one number a wanted token comes back to the host, never logits; and logits exist for the wanted positions alone, a
block of them at a time. Inputs are padded to a few lengths, so that few shapes compile. Axes as in
model/decoder.py, and C: the wanted positions of a row.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from k2jax.model.decoder import Decoder, Params, document_ids
from k2jax.parallel import sharding

LENGTHS = (64, 2)  # inputs are padded to 64, 128, 256, ... tokens
WANTED = (16, 4)  # wanted positions are padded to 16, 64, 256, ...
LOGIT_POSITIONS = 4096  # whose logits exist at a time: with 32,000 tokens and float32 0.5 GB over all devices

Wanted = list[tuple[int, int]]  # (position in the input, token wanted after it)


class Row(NamedTuple):
    """One input, and the tokens whose probabilities are asked for."""

    tokens: tuple[int, ...]
    wanted: Wanted


class Scores(NamedTuple):
    """For each wanted token of a row: its log-probability, and whether it is the likeliest."""

    logprobs: np.ndarray  # float64
    is_greedy: np.ndarray  # bool


class Batch(NamedTuple):
    indices: list[int]  # of the rows; the arrays may hold more, to fill them up
    tokens_BT: np.ndarray
    positions_BC: np.ndarray
    targets_BC: np.ndarray


class Scorer:
    """Scores rows on a mesh, the batch split over the data axes."""

    def __init__(
        self,
        m: ConfigDict,
        rope_base: float,
        params: Params,
        mesh: Mesh,
        compute_dtype: jnp.dtype,
        *,
        eos_id: int,
        batch_tokens: int,
    ):
        """`batch_tokens`: of one call of the model, at most, padding included."""
        self._params, self._mesh, self._batch_tokens = params, mesh, batch_tokens
        self._score = partial(_score, FrozenConfigDict(m), rope_base, jnp.dtype(compute_dtype), eos_id)

    def __call__(self, rows: list[Row], progress: Callable[[int], None]) -> list[Scores]:
        """The scores of each row, in the order given; `progress` is told how many rows are done."""
        data_parallel = sharding.row_parts(self._mesh)
        found: list[Scores | None] = [None] * len(rows)
        running = None
        for batch in make_batches(rows, self._batch_tokens, data_parallel):
            arrays = [self._placed(x) for x in batch[1:]]
            started = (batch.indices, self._score(self._params, *arrays))
            if running:  # read one batch late, so that the device does not wait for the host
                self._collect(rows, running, found, progress)
            running = started
        if running:
            self._collect(rows, running, found, progress)
        return found

    def _placed(self, x: np.ndarray) -> jax.Array:
        """Of an array that every process has whole, each puts the rows of its own devices there."""
        place = NamedSharding(self._mesh, PartitionSpec(sharding.data_axes(self._mesh)))
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    def _collect(self, rows: list[Row], running: tuple, found: list, progress: Callable[[int], None]) -> None:
        indices, (logprobs_BC, greedy_BC) = running[0], jax.device_get(running[1])
        for i, logprobs, greedy in zip(indices, logprobs_BC, greedy_BC, strict=False):
            count = len(rows[i].wanted)
            found[i] = Scores(logprobs[:count].astype(np.float64), greedy[:count])
        progress(len(indices))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))  # compiled once for all checkpoints of a stage
def _score(
    m: FrozenConfigDict,
    rope_base: float,
    compute_dtype: jnp.dtype,
    eos_id: int,
    params: Params,
    tokens_BT: jax.Array,
    positions_BC: jax.Array,
    targets_BC: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(log-probability float32 (B, C), is it the likeliest (B, C)) of each target after the token at its position."""
    decoder = Decoder(m, params, compute_dtype)
    document_BT = document_ids(tokens_BT, eos_id) if m.mask_documents else None
    hidden_BTD = decoder(sharding.shard(tokens_BT, "tokens_BT"), rope_base, document_BT)
    hidden_BCD = jnp.take_along_axis(hidden_BTD, positions_BC[..., None], axis=1)
    B, C = positions_BC.shape
    block = C
    while block % 2 == 0 and B * block > LOGIT_POSITIONS:
        block //= 2

    def one(hidden_and_target: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BSD, target_BS = hidden_and_target
        logits_BSV = decoder.logits(hidden_BSD).astype(jnp.float32)
        picked_BS = jnp.take_along_axis(logits_BSV, target_BS[..., None], axis=-1)[..., 0]
        logprob_BS = picked_BS - jax.nn.logsumexp(logits_BSV, axis=-1)
        return logprob_BS, jnp.argmax(logits_BSV, axis=-1) == target_BS

    blocks = (hidden_BCD.reshape(B, C // block, block, -1), targets_BC.reshape(B, C // block, block))
    logprobs, greedy = jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), blocks))
    found_BC = (jnp.moveaxis(x, 0, 1).reshape(B, C) for x in (logprobs, greedy))
    return tuple(sharding.replicated(x) for x in found_BC)  # every process reads all of them


def make_batches(rows: list[Row], batch_tokens: int, multiple: int) -> Iterator[Batch]:
    """Batches of rows of about one length, the longest first, each of at most `batch_tokens` padded tokens.

    Their sizes are multiples of `multiple`, and the same for all batches of a length.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[padded(len(row.tokens), *LENGTHS), padded(len(row.wanted), *WANTED)].append(i)
    for (length, wanted), indices in sorted(groups.items(), reverse=True):
        size = max(1, batch_tokens // length // multiple) * multiple
        size = min(size, padded(len(indices), multiple, 2))
        indices.sort(key=lambda i: -len(rows[i].tokens))
        for first in range(0, len(indices), size):
            some = indices[first : first + size]
            tokens = np.zeros((size, length), np.int32)
            places = np.zeros((2, size, wanted), np.int32)
            for at, i in enumerate(some):
                tokens[at, : len(rows[i].tokens)] = rows[i].tokens
                places[:, at, : len(rows[i].wanted)] = np.transpose(rows[i].wanted)
            yield Batch(some, tokens, *places)


def padded(count: int, least: int, factor: int) -> int:
    """The smallest of least, least * factor, least * factor**2, ... that holds `count`."""
    size = least
    while size < count:
        size *= factor
    return size
