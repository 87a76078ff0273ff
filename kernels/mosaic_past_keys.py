"""What the Hopper kernels by blocks of queries, forward and dq, have in common: their place, and the way past the keys.

Axes: B batch, N query heads, Q block of queries, J of keys; i and j count blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from k2jax.kernels.flash_attention_tpu import Documents
from k2jax.kernels.mosaic_block_sizes import ROWS, Cut
from k2jax.kernels.mosaic_blocks import Held, Ring

from k2jax.kernels import mosaic_blocks as mosaic


class Place(NamedTuple):
    """Of a program by blocks of queries: row, head, block of queries, first block of keys, the last one + 1."""

    b: jax.Array
    n: jax.Array
    i: jax.Array
    first: jax.Array
    end: jax.Array | int


def place_of(first_ref: Any, num_keys: int, cut: Cut, causal: bool) -> Place:
    b, n, i = (lax.axis_index(axis) for axis in ("b", "n", "i"))
    i = first_ref.shape[1] - 1 - i  # the last block comes first: it sees the most keys
    end = lax.div((i + 1) * cut.queries + cut.keys - 1, cut.keys) if causal else num_keys // cut.keys
    first = first_ref[b, i]
    return Place(b, n, i, jnp.minimum(first, end - 1) if cut.ahead else first, end)  # the first block is always taken


def load_past_keys(
    place: Place, cut: Cut, own: tuple, keys: tuple, values: tuple, held: Held, k_ring: Ring, v_ring: Ring
) -> None:
    """The loading warpgroup: arrays by queries (`own`), then those by keys, block by block."""
    mosaic.take_registers(True, cut.queries // ROWS)
    b, n, i, first, end = place
    kv = lax.div(n, own[0].shape[2] // keys[0].shape[2])
    for w in range(cut.queries // ROWS):
        mosaic.hold(held, w, *(x.at[b, pl.ds(i * cut.queries + w * ROWS, ROWS), n] for x in own))

    @pl.loop(first, end)
    def _send_block(j: jax.Array) -> None:
        rows = pl.ds(j * cut.keys, cut.keys)
        mosaic.send(k_ring, j - first, keys[0].at[b, rows, kv], *(x.at[b, rows] for x in keys[1:]))
        mosaic.send(v_ring, j - first, *(x.at[b, rows, kv] for x in values))


def past_keys(take: Callable, state: Any, place: Place, cut: Cut, causal: bool) -> Any:
    """`take(j, state, diagonal)` of each block of keys that the block of queries sees."""
    if not causal:
        return lax.fori_loop(place.first, place.end, partial(take, diagonal=False), state)
    whole = lax.div(place.i * cut.queries, cut.keys)
    state = lax.fori_loop(place.first, whole, partial(take, diagonal=False), state)
    return lax.fori_loop(jnp.maximum(place.first, whole), place.end, partial(take, diagonal=True), state)


def rings_by_keys(cut: Cut, held: int, head_dim: int, dtype: jnp.dtype, documents: Documents) -> dict[str, Any]:
    warpgroups, matrix = cut.queries // ROWS, (cut.keys, head_dim)
    ids = [jnp.int32] if documents else []
    return {
        "held": mosaic.held_type(warpgroups, held, head_dim, dtype),
        "k_ring": mosaic.ring_type(cut.stages, warpgroups, matrix, dtype, *ids),
        "v_ring": mosaic.ring_type(cut.stages, warpgroups, matrix, dtype),
    }
