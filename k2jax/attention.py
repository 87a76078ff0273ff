"""Attention: the one place that picks how it is computed.

Axes: B batch, T query positions, S key positions, N query heads, K key and value heads, G = N/K, H head dim.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with every key masked gives numbers and not NaN


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, document_BT: jax.Array | None
) -> jax.Array:
    """Causal softmax attention, softmax in float32; returns (B, T, N, H) in the type of `q`.

    `document_BT` (int32) keeps each position within its own document; None lets it see the whole row.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Heads before positions: XLA's CPU backend then runs plain batched products, twice as fast as with heads inside.
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    att_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    allowed = jnp.tril(jnp.ones((1, 1, 1, T, T), bool))
    if document_BT is not None:
        allowed = allowed & (document_BT[:, None, None, :, None] == document_BT[:, None, None, None, :])
    att_BKGTS = jnp.where(allowed, att_BKGTS, MASKED)
    weight_BKGTS = jnp.exp(att_BKGTS - jax.lax.stop_gradient(att_BKGTS.max(axis=-1, keepdims=True)))
    weight_BKGTS = (weight_BKGTS / weight_BKGTS.sum(axis=-1, keepdims=True)).astype(v_BSKH.dtype)
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weight_BKGTS, v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
