"""Rows added up by place, as an embedding's gradient is: always in the same order.

A GPU's scatter adds rows of one place in the order in which its threads come, which is another in each launch.
"""

import jax
import jax.numpy as jnp

from k2jax.parallel.sharding import platform

BLOCK = 128  # rows whose sums are one product


def summed_by_place(x_ND: jax.Array, place_N: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """(size, D) in `dtype`: the sum of the rows of `x` that have each place, which is in [0, size)."""
    if platform() != "gpu":  # there, a scatter goes through its rows one after the other
        return jnp.zeros((size, x_ND.shape[-1]), dtype).at[place_N].add(x_ND.astype(dtype))
    order_N = jnp.argsort(place_N, stable=True)
    return _sorted_sums(x_ND[order_N], place_N[order_N], size, dtype)


def _sorted_sums(x_ND: jax.Array, place_N: jax.Array, size: int, dtype: jnp.dtype) -> jax.Array:
    """The same of rows in the order of their places.

    Within a block of C rows, the rows of one place are a segment, and a matrix of zeros and ones sums all C segments.
    A place whose segment is not its block's first has no other but, in blocks after it, first ones. Those are
    as many rows as there are blocks, and are added up in the same way, until there is one block.
    """
    N, D = x_ND.shape
    C = min(BLOCK, N)
    blocks = -(-N // C)
    padding = blocks * C - N
    x_ACD = jnp.pad(x_ND, ((0, padding), (0, 0))).reshape(blocks, C, D)
    place_AC = jnp.pad(place_N, (0, padding), constant_values=size).reshape(blocks, C)  # beyond: dropped
    begins_AC = jnp.diff(place_AC, axis=1, prepend=-1) != 0
    segment_AC = jnp.cumsum(begins_AC, axis=1) - 1
    member_ASC = segment_AC[:, None, :] == jnp.arange(C)[:, None]
    sums_ASD = jnp.einsum(
        "ASC,ACD->ASD", member_ASC.astype(x_ND.dtype), x_ACD, precision="highest", preferred_element_type=dtype
    )
    owner_AS = jnp.where(member_ASC, place_AC[:, None, :], -1).max(axis=2)
    beyond_AS = size + 1 + jnp.arange(blocks * C).reshape(blocks, C)  # each another, of segments that are none: dropped
    owner_AS = jnp.where(owner_AS < 0, beyond_AS, owner_AS)
    if blocks == 1:
        return jnp.zeros((size, D), dtype).at[owner_AS[0]].add(sums_ASD[0], mode="drop", unique_indices=True)
    of_firsts = _sorted_sums(sums_ASD[:, 0], owner_AS[:, 0], size, dtype)
    rest = owner_AS[:, 1:].reshape(-1), sums_ASD[:, 1:].reshape(-1, D)
    return of_firsts.at[rest[0]].add(rest[1], mode="drop", unique_indices=True)
