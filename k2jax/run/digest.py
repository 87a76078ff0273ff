"""A digest of every array, computed where the array lives: the same on any mesh, device count or host count.

The bits are read as unsigned integers, widened to uint32, multiplied by an odd weight made from each element's linear
index, and summed modulo 2**32. Integer sums do not depend on their order, so the value does not depend on the sharding;
odd weights make any change of one bit certain to show. It finds corruption; it is no defence against a forger.
"""

import hashlib
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
MULTIPLIER = 0x9E3779B1  # 2**32 / golden ratio, odd: spreads neighbouring indices over all bits


def array_digest(x: jax.Array) -> jax.Array:
    """uint32 scalar; any shape, any type of 1, 2 or 4 bytes."""
    bits = (
        x
        if jnp.issubdtype(x.dtype, jnp.unsignedinteger)
        else jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize])
    )
    index = jnp.zeros(x.shape, jnp.uint32)
    for dim, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    weight = (index * jnp.uint32(MULTIPLIER)) | jnp.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)


def numpy_digest(x: np.ndarray, first_index: int = 0) -> int:
    """The part of an array's digest that comes from `x`, its elements `first_index` on in row-major order.

    The digest of the whole is the sum of its parts modulo 2**32: for arrays that are read piece by piece.
    """
    bits = np.ascontiguousarray(x).reshape(-1).view(np.dtype(f"u{x.dtype.itemsize}"))
    total, piece = 0, 1 << 20  # pieces stay in the cache
    for start in range(0, bits.size, piece):
        part = bits[start : start + piece]
        first = np.uint32((first_index + start) & 0xFFFFFFFF)
        weight = (np.arange(part.size, dtype=np.uint32) + first) * np.uint32(MULTIPLIER) | np.uint32(1)
        total += int((part.astype(np.uint32, copy=False) * weight).sum(dtype=np.uint32))
    return total & 0xFFFFFFFF


def tree_digests(tree: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """{name: uint32 scalar}; to be jitted with replicated outputs."""
    return {name: array_digest(value) for name, value in tree.items()}


def combine(digests: Mapping[str, int]) -> str:
    """SHA-256 over all names and digests: the checkpoint's own digest, used for lineage."""
    return hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()
