"""What the kernels compute, in plain jnp: tests compare them with this, in float32 or float64.

Axes: B batch, N query heads, K key and value heads, G = N/K, T queries, S keys, H head dim.
"""

import jax
import jax.numpy as jnp

Documents = tuple[jax.Array, jax.Array] | None  # int32 (B, T) and (B, S)


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, documents: Documents = None, causal: bool = True
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, natural log of softmax's denominator (B, N, T)), in the type of q and at its precision.

    A query sees the keys of its own document and, if `causal`, those up to its own position. One that sees none has an
    output of 0 and a denominator of 0.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    score_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, precision="highest")
    allowed_BTS = jnp.ones((B, T, S), bool)
    if documents is not None:
        allowed_BTS &= documents[0][:, :, None] == documents[1][:, None, :]
    if causal:
        allowed_BTS &= jnp.tril(allowed_BTS)
    score_BKGTS = jnp.where(allowed_BTS[:, None, None], score_BKGTS, -jnp.inf)
    lse_BKGT = jax.nn.logsumexp(score_BKGTS, axis=-1)
    some_BKGT = jnp.isfinite(lse_BKGT)
    weight_BKGTS = jnp.exp(score_BKGTS - jnp.where(some_BKGT, lse_BKGT, 0.0)[..., None])
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH, precision="highest")
    return out_BTKGH.reshape(B, T, N, H), lse_BKGT.reshape(B, N, T)
