"""The largest attention logit of every head: what grows before attention collapses to one position.

Kernels never hold the logits as a whole, so this is a forward pass of its own, without gradients, on rows of its own.

Axes: B batch, T query positions, S key positions, D width, N query heads, K key and value heads, G = N/K, H head dim,
L layers, C query positions at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from k2jax.model.attention import attend_causally
from k2jax.model.decoder import Block, Params, dense, rope_table
from k2jax.parallel.fsdp import lookup
from k2jax.parallel.sharding import shard

QUERIES = 128  # positions whose logits are there at a time


def largest_logits(
    m: ConfigDict,
    params: Params,
    tokens_BT: jax.Array,
    rope_base: float,
    document_BT: jax.Array | None,
    compute_dtype: jnp.dtype,
) -> jax.Array:
    """float32 (L, N): over all rows and the pairs that attention sees, of q . k / sqrt(H).

    For meshes that split neither layers nor positions.
    """
    rope, rings = rope_table(m, rope_base, tokens_BT.shape[1]), tuple(m.rings)
    arrays = {name.removeprefix("layers."): x for name, x in params.items() if name.startswith("layers.")}
    graph, stacked = nnx.split(Block(m, arrays))

    def layer(x_BTD: jax.Array, arrays: nnx.State) -> tuple[jax.Array, jax.Array]:
        found = []

        def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
            found.append(_largest(q_BTNH, k_BTKH, document_BT))
            return attend_causally(q_BTNH, k_BTKH, v_BTKH, document_BT, m.attention.implementation)

        return nnx.merge(graph, arrays)(x_BTD, rope, attend, partial(dense, rings=rings)), found[0]

    x_BTD = shard(lookup(params["embed_VD"], tokens_BT, compute_dtype, rings), "x_BTD")
    return jax.lax.scan(layer, x_BTD, stacked)[1]


def _largest(q_BTNH: jax.Array, k_BSKH: jax.Array, document_BS: jax.Array | None) -> jax.Array:
    """(N,) of one layer."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    C = next(size for size in range(min(QUERIES, T), 0, -1) if T % size == 0)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)

    def block(most_KG: jax.Array, first: jax.Array) -> tuple[jax.Array, None]:
        q_BCKGH = jax.lax.dynamic_slice_in_dim(q_BTKGH, first, C, axis=1)
        scores_BKGCS = jnp.einsum("BCKGH,BSKH->BKGCS", q_BCKGH, k_BSKH, preferred_element_type=jnp.float32)
        allowed_BCS = (jnp.arange(T)[None, :] <= (first + jnp.arange(C))[:, None])[None]
        if document_BS is not None:
            own_BC = jax.lax.dynamic_slice_in_dim(document_BS, first, C, axis=1)
            allowed_BCS = allowed_BCS & (own_BC[:, :, None] == document_BS[:, None, :])
        seen_BKGCS = jnp.where(allowed_BCS[:, None, None], scores_BKGCS, -jnp.inf)
        return jnp.maximum(most_KG, seen_BKGCS.max(axis=(0, 3, 4))), None

    start = jnp.full((K, N // K), -jnp.inf, jnp.float32)
    return jax.lax.scan(block, start, jnp.arange(0, T, C))[0].reshape(N) * H**-0.5
