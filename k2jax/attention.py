"""Attention: the one place that picks how it is computed.

Axes: B batch, T query positions, S key positions, N query heads, K key and value heads, G = N/K, H head dim.
"""

from functools import partial

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row with every key masked gives numbers and not NaN
MAX_BLOCKS, LEAST_QUERIES = 8, 64  # blocks of queries, each of at least this many where there are more than one


def attend_causally(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, document_BT: jax.Array | None = None
) -> jax.Array:
    """Causal softmax attention of whole rows, softmax in float32; returns (B, T, N, H) in the type of `q`.

    `document_BT` (int32) keeps each position within its own document; None lets it see the whole row.

    Computed by blocks of queries, so that keys behind a block are not touched, and with a backward pass that computes
    the weights again instead of keeping them (flash attention's trade, Dao et al. 2022): on two CPU cores, at length
    512, forward and backward take 0.12 s where one block with its weights kept takes 0.18 s.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # Heads before positions: XLA's CPU backend then runs plain batched products, twice as fast as with heads inside.
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    blocks = max(1, min(MAX_BLOCKS, T // LEAST_QUERIES))
    outs = []
    for first, stop in ((T * i // blocks, T * (i + 1) // blocks) for i in range(blocks)):
        document = document_BT if document_BT is None else document_BT[:, :stop]
        outs.append(_block(q_BKGTH[:, :, :, first:stop], k_BKSH[:, :, :stop], v_BKSH[:, :, :stop], document))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _block(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, document_BS: jax.Array | None
) -> jax.Array:
    """Attention of the last T of S positions; `q` is scaled already."""
    return _block_forward(q_BKGTH, k_BKSH, v_BKSH, document_BS)[0]


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array, document_BS: jax.Array | None) -> jax.Array:
    T, S = q_BKGTH.shape[3], k_BKSH.shape[2]
    att_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    allowed = jnp.tril(jnp.ones((1, 1, 1, T, S), bool), S - T)
    if document_BS is not None:
        own_BT = document_BS[:, S - T :]
        allowed = allowed & (own_BT[:, None, None, :, None] == document_BS[:, None, None, None, :])
    return jnp.where(allowed, att_BKGTS, MASKED)


def _block_forward(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, document_BS: jax.Array | None
) -> tuple[jax.Array, tuple]:
    att_BKGTS = _scores(q_BKGTH, k_BKSH, document_BS)
    most_BKGT1 = att_BKGTS.max(axis=-1, keepdims=True)
    weight_BKGTS = jnp.exp(att_BKGTS - most_BKGT1)
    sum_BKGT1 = weight_BKGTS.sum(axis=-1, keepdims=True)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    out_BKGTH = product("BKGTS,BKSH->BKGTH", weight_BKGTS.astype(v_BKSH.dtype), v_BKSH) / sum_BKGT1
    out_BKGTH = out_BKGTH.astype(q_BKGTH.dtype)
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, document_BS, most_BKGT1 + jnp.log(sum_BKGT1), out_BKGTH)


def _block_backward(saved: tuple, dout_BKGTH: jax.Array) -> tuple:
    q_BKGTH, k_BKSH, v_BKSH, document_BS, lse_BKGT1, out_BKGTH = saved
    dtype, product = q_BKGTH.dtype, partial(jnp.einsum, preferred_element_type=jnp.float32)
    weight_BKGTS = jnp.exp(_scores(q_BKGTH, k_BKSH, document_BS) - lse_BKGT1)
    dv_BKSH = product("BKGTS,BKGTH->BKSH", weight_BKGTS.astype(dtype), dout_BKGTH)
    dweight_BKGTS = product("BKGTH,BKSH->BKGTS", dout_BKGTH, v_BKSH)
    # A softmax's gradient is w (dw - sum(w dw)), and sum(w dw) over the keys is dout . out
    inner_BKGT1 = (dout_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    datt_BKGTS = (weight_BKGTS * (dweight_BKGTS - inner_BKGT1)).astype(dtype)
    dq_BKGTH = product("BKGTS,BKSH->BKGTH", datt_BKGTS, k_BKSH)
    dk_BKSH = product("BKGTS,BKGTH->BKSH", datt_BKGTS, q_BKGTH)
    return dq_BKGTH.astype(dtype), dk_BKSH.astype(dtype), dv_BKSH.astype(dtype), None


_block.defvjp(_block_forward, _block_backward)


def attend_where(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, allowed_BTS: jax.Array
) -> jax.Array:
    """The same where `allowed` (bool) says so, over keys and values as a cache holds them; for generation."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    G, product = N // K, partial(jnp.einsum, preferred_element_type=jnp.float32)
    # Q is G and T in one: with two dimensions, XLA's CPU backend transposes the keys at every token.
    q_BKQH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    att_BKGTS = product("BKQH,BKSH->BKQS", q_BKQH, k_BKSH).reshape(B, K, G, T, S)
    att_BKGTS = jnp.where(allowed_BTS[:, None, None], att_BKGTS, MASKED)
    weight_BKGTS = jnp.exp(att_BKGTS - att_BKGTS.max(axis=-1, keepdims=True))
    weight_BKQS = weight_BKGTS.astype(v_BKSH.dtype).reshape(B, K, G * T, S)
    out_BKGTH = product("BKQS,BKSH->BKQH", weight_BKQS, v_BKSH).reshape(B, K, G, T, H)
    out_BKGTH = (out_BKGTH / weight_BKGTS.sum(axis=-1, keepdims=True)).astype(q_BTNH.dtype)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
