"""What the kernels compute, in plain jnp: tests compare them with this, in float32 or float64.

Axes: B batch, N query heads, K key and value heads, G = N/K, T queries, S keys, H head dim.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

Documents = tuple[jax.Array, jax.Array] | None  # int32 (B, T) and (B, S)
MASKED = -1e30  # lse of a query that sees no key: finite, as the kernels have it

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


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


# ---- the kernels' own calls: some queries, some keys -----------------------------------------------------------------


def forward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents, *, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """As flash_attention_tpu.forward: (out_BNTH, lse_BN1T) in float32, of q times log2(e) / sqrt(H)."""
    score_BKGTS = _scores(q_BNTH, k_BKSH, documents, causal)
    most_BKGT1 = jnp.maximum(score_BKGTS.max(axis=-1, keepdims=True), MASKED)
    weight_BKGTS = jnp.exp2(score_BKGTS - most_BKGT1)
    sum_BKGT1 = weight_BKGTS.sum(axis=-1, keepdims=True)
    out_BKGTH = _product("BKGTS,BKSH->BKGTH", weight_BKGTS.astype(v_BKSH.dtype), v_BKSH)
    out_BKGTH /= jnp.where(sum_BKGT1 > 0, sum_BKGT1, 1.0)
    lse_BKGT1 = jnp.where(sum_BKGT1 > 0, most_BKGT1 + jnp.log2(sum_BKGT1), MASKED)
    B, N, T, H = q_BNTH.shape
    return out_BKGTH.reshape(B, N, T, H), lse_BKGT1.reshape(B, N, 1, T)


def backward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    lse_BN1T: jax.Array, delta_BN1T: jax.Array, dout_BNTH: jax.Array, *, causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """As flash_attention_tpu.backward: (dq_BNTH by q without its factor, dk_BKSH, dv_BKSH) in float32.

    lse and delta may be those over more keys than are here.
    """
    B, K = k_BKSH.shape[:2]
    _, N, T, H = q_BNTH.shape
    q_BKGTH, dout_BKGTH = (x.reshape(B, K, N // K, T, H) for x in (q_BNTH, dout_BNTH))
    lse_BKGT1, delta_BKGT1 = (x.reshape(B, K, N // K, T, 1) for x in (lse_BN1T, delta_BN1T))
    weight_BKGTS = jnp.exp2(_scores(q_BNTH, k_BKSH, documents, causal) - lse_BKGT1)
    dv_BKSH = _product("BKGTS,BKGTH->BKSH", weight_BKGTS.astype(dout_BNTH.dtype), dout_BKGTH)
    dweight_BKGTS = _product("BKGTH,BKSH->BKGTS", dout_BKGTH, v_BKSH)
    dscore_BKGTS = (weight_BKGTS * (dweight_BKGTS - delta_BKGT1)).astype(q_BNTH.dtype)
    dq_BNTH = _product("BKGTS,BKSH->BKGTH", dscore_BKGTS, k_BKSH).reshape(B, N, T, H) * H**-0.5
    return dq_BNTH, _product("BKGTS,BKGTH->BKSH", dscore_BKGTS, q_BKGTH) / math.log2(math.e), dv_BKSH


def _scores(q_BNTH: jax.Array, k_BKSH: jax.Array, documents: Documents, causal: bool) -> jax.Array:
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    score_BKGTS = _product("BKGTH,BKSH->BKGTS", q_BNTH.reshape(B, K, N // K, T, H), k_BKSH)
    allowed_BTS = jnp.ones((1, T, S), bool)
    if documents is not None:
        allowed_BTS = documents[0][:, :, None] == documents[1][:, None, :]
    if causal:
        allowed_BTS = allowed_BTS & jnp.tril(jnp.ones((1, T, S), bool))
    return jnp.where(allowed_BTS[:, None, None], score_BKGTS, -jnp.inf)
