"""Flash attention for NVIDIA GPUs, in Pallas through Triton: softmax(q k') v and its gradients.

What it computes is `reference.attention`, with the arguments and results of flash_attention_tpu.py. How:

- One program takes a block of queries past all keys that it sees, block by block from HBM; the longest rows of a head
  start first. Blocks masked whole are not taken; only those on the diagonal pay for its mask.
- Softmax by powers of two, its factor multiplied into q.
- Two backward kernels: dk and dv by blocks of keys, summed over the query heads that share them, and dq by blocks of
  queries. Seven products where one kernel needs five, for that one adds dq up by atomic additions, in another order
  each time: a step that is run again would not give the same bits.
- Arrays are read and written as the model has them, positions before heads: the transpositions here and those of the
  caller cancel out in XLA. (As separate passes they would cost half as much as a forward kernel at length 2048.)
- Scores of dk and dv are transposed, keys by queries, so that weights are a left operand as they are.

JAX 0.11 and 0.12 have Pallas's Triton backend with a warning that a later version drops it for Mosaic GPU. Not known
without a GPU: speed, and the numerics of the compiled kernels (tools/bench/gpu_suite.py tells both).

Flash attention: Dao et al. 2022 (arXiv:2205.14135); Dao 2023 (arXiv:2307.08691).

Axes: B batch, N query heads, K key and value heads, G = N/K, T queries, S keys, H head dim; Q, J block of queries, of
keys.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from k2jax.kernels.flash_attention_tpu import LOG2_E, MASKED, Documents
from k2jax.kernels.triton_block_sizes import SMALLEST, BlockSizes, Cut


def _product(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Products with float32 sums; of float32 numbers in full, where the matrix units would round them to tf32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _exp2(x: jax.Array, interpret: bool) -> jax.Array:
    """One instruction, where jnp.exp2 becomes four: they see to numbers below 2^-126, which weights may lose."""
    if interpret:
        return jnp.exp2(x)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    asm = {"asm": "ex2.approx.ftz.f32 $0, $1;", "constraints": "=f,f", "pack": 1}
    return plgpu.elementwise_inline_asm(args=[x], result_shape_dtypes=[shape], **asm)[0]


def visible_blocks(documents: Documents, shape: tuple[int, int, int], cut: Cut) -> tuple[jax.Array, jax.Array]:
    """(first block of keys of each block of queries, last block of queries + 1 of each block of keys), int32.

    By ranges of document numbers: where those grow along a row, as they do, no block is taken that is masked whole.
    """
    B, T, S = shape
    num_I, num_J = T // cut.queries, S // cut.keys
    if documents is None:
        return jnp.zeros((B, num_I), jnp.int32), jnp.full((B, num_J), num_I, jnp.int32)
    q_BIQ, k_BJJ = documents[0].reshape(B, num_I, -1), documents[1].reshape(B, num_J, -1)
    meet_BIJ = (k_BJJ.max(-1)[:, None] >= q_BIQ.min(-1)[..., None]) & (
        k_BJJ.min(-1)[:, None] <= q_BIQ.max(-1)[..., None]
    )
    first_BI = jnp.where(meet_BIJ.any(2), jnp.argmax(meet_BIJ, axis=2), num_J)
    last_BJ = jnp.where(meet_BIJ.any(1), num_I - jnp.argmax(meet_BIJ[:, ::-1], axis=1), 0)
    return first_BI.astype(jnp.int32), last_BJ.astype(jnp.int32)


def _masked(score: jax.Array, own: tuple | None, first: tuple | None, query_axis: int) -> jax.Array:
    """Scores where a query sees a key, MASKED elsewhere. `own`: document numbers along both axes, None for one.
    `first`: positions at which the axes begin, None where causality masks none of them."""
    if own is not None:
        score = jnp.where(own[0][:, None] == own[1][None, :], score, MASKED)
    if first is not None:
        at = [first[axis] + lax.broadcasted_iota(jnp.int32, score.shape, axis) for axis in (0, 1)]
        score = jnp.where(at[1 - query_axis] <= at[query_axis], score, MASKED)
    return score


def _past_keys(
    take: Callable, state: tuple, first: jax.Array, i: jax.Array, cut: Cut, num_keys: int, causal: bool
) -> tuple:
    """`take(j, state, diagonal)` of each block of keys that the i-th block of queries sees, from the `first` on."""
    if not causal:
        return lax.fori_loop(first, num_keys // cut.keys, partial(take, diagonal=False), state)
    whole = lax.div(i * cut.queries, cut.keys)
    some = lax.div((i + 1) * cut.queries + cut.keys - 1, cut.keys)
    state = lax.fori_loop(first, whole, partial(take, diagonal=False), state)
    return lax.fori_loop(jnp.maximum(first, whole), some, partial(take, diagonal=True), state)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward_kernel(first_ref, q_ref, k_ref, v_ref, *refs, cut: Cut, causal: bool, exp2: Callable):
    """One block of queries past the keys that it sees. `first_ref` (queries' blocks): the first block of keys."""
    *documents, out_ref, lse_ref = refs
    q_document_ref, k_document_ref = documents or (None, None)
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    q_QH = q_ref[...]
    document_Q = q_document_ref[...] if documents else None

    def take(j: jax.Array, state: tuple, diagonal: bool) -> tuple:
        before_Q, sum_Q, acc_QH = state
        keys = pl.ds(j * cut.keys, cut.keys)
        score_QJ = _product(q_QH, k_ref[keys, :], (1, 1))
        own = (document_Q, k_document_ref[keys]) if documents else None
        score_QJ = _masked(score_QJ, own, (i * cut.queries, j * cut.keys) if diagonal else None, query_axis=0)
        most_Q = jnp.maximum(before_Q, score_QJ.max(axis=1))
        fade_Q = exp2(before_Q - most_Q)
        weight_QJ = exp2(score_QJ - most_Q[:, None])
        out_QH = _product(weight_QJ.astype(v_ref.dtype), v_ref[keys, :], (1, 0))
        return most_Q, sum_Q * fade_Q + weight_QJ.sum(axis=1), acc_QH * fade_Q[:, None] + out_QH

    state = jnp.full((cut.queries,), MASKED, jnp.float32), jnp.zeros((cut.queries,), jnp.float32)
    state = *state, jnp.zeros(q_QH.shape, jnp.float32)
    most_Q, sum_Q, acc_QH = _past_keys(take, state, first_ref[i], i, cut, k_ref.shape[0], causal)
    some_Q = most_Q > MASKED / 2  # a row that sees no key has weights of 1, or no block was taken
    share_Q = jnp.where(some_Q, 1.0 / jnp.where(some_Q, sum_Q, 1.0), 0.0)
    out_ref[...] = (acc_QH * share_Q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(some_Q, most_Q + jnp.log2(jnp.where(some_Q, sum_Q, 1.0)), MASKED)


def forward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    *, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out_BNTH, lse_BN1T float32) of q times log2(e) / sqrt(H).

    lse is the log to base 2 of softmax's denominator, MASKED where a query sees no key (its out is 0). T and S are
    multiples of the blocks; `causal` takes them as the same positions.
    """
    cut, (B, N, T, head_dim) = sizes.forward, q_BNTH.shape
    q_BTNH, k_BSKH, v_BSKH = (_positions_first(x) for x in (q_BNTH, k_BKSH, v_BKSH))
    grid, first_BI, (first, queries, row, keys, ids) = _by_queries(q_BTNH, k_BSKH, documents, cut)
    out_BTNH, lse_BN1T = pl.pallas_call(
        partial(_forward_kernel, cut=cut, causal=causal, exp2=partial(_exp2, interpret=interpret)),
        grid=grid,
        in_specs=[first, queries, keys, keys, *ids],
        out_specs=[queries, row],
        out_shape=[
            jax.ShapeDtypeStruct(q_BTNH.shape, out_dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        name="flash_attention_forward",
        interpret=interpret,
    )(first_BI, q_BTNH, k_BSKH, v_BSKH, *(documents or ()))
    return _heads_first(out_BTNH, head_dim), lse_BN1T


def _by_queries(q_BTNH: jax.Array, k_BSKH: jax.Array, documents: Documents, cut: Cut) -> tuple:
    """Of a kernel by blocks of queries: (grid, first blocks of keys, specs of those, queries, row, keys, documents)."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G, last = N // K, T // cut.queries - 1  # the last block comes first: it sees the most keys
    first_BI, _ = visible_blocks(documents, (B, T, S), cut)
    first = pl.BlockSpec((None, last + 1), lambda i, n, b: (b, 0))
    queries = pl.BlockSpec((None, cut.queries, None, H), lambda i, n, b: (b, last - i, n, 0))
    row = pl.BlockSpec((None, None, None, cut.queries), lambda i, n, b: (b, n, 0, last - i))
    keys = pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, lax.div(n, G), 0))
    ids = [
        pl.BlockSpec((None, cut.queries), lambda i, n, b: (b, last - i)),
        pl.BlockSpec((None, S), lambda i, n, b: (b, 0)),
    ]
    return (last + 1, N, B), first_BI, (first, queries, row, keys, ids if documents else [])


def _positions_first(x_BNTH: jax.Array) -> jax.Array:
    """(B, T, N, H), with zeros after each head's numbers up to a power of two: the only shapes that Triton has."""
    H = x_BNTH.shape[3]
    padding = max(pl.next_power_of_2(H), SMALLEST) - H
    return jnp.pad(x_BNTH.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 0), (0, padding)))


def _heads_first(x_BTNH: jax.Array, head_dim: int) -> jax.Array:
    return x_BTNH[..., :head_dim].transpose(0, 2, 1, 3)


# ---- backward --------------------------------------------------------------------------------------------------------


def _dkv_kernel(
    last_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *refs, cut: Cut, causal: bool, exp2: Callable
):
    """One block of keys past the queries that see it, of all heads that share it. `last_ref` (keys' blocks): the last
    block of queries + 1."""
    *documents, dk_ref, dv_ref = refs
    q_document_ref, k_document_ref = documents or (None, None)
    j = pl.program_id(0)
    k_JH, v_JH = k_ref[...], v_ref[...]
    document_J = k_document_ref[...] if documents else None

    def take(i: jax.Array, state: tuple, g: jax.Array, diagonal: bool) -> tuple:
        dk_JH, dv_JH = state
        queries = pl.ds(i * cut.queries, cut.queries)
        q_QH, dout_QH = q_ref[queries, g, :], dout_ref[queries, g, :]
        score_JQ = _product(k_JH, q_QH, (1, 1))
        own = (document_J, q_document_ref[queries]) if documents else None
        score_JQ = _masked(score_JQ, own, (j * cut.keys, i * cut.queries) if diagonal else None, query_axis=1)
        weight_JQ = exp2(score_JQ - lse_ref[g, queries][None, :])
        dv_JH += _product(weight_JQ.astype(dout_QH.dtype), dout_QH, (1, 0))
        dweight_JQ = _product(v_JH, dout_QH, (1, 1))
        dscore_JQ = weight_JQ * (dweight_JQ - delta_ref[g, queries][None, :])
        dk_JH += _product(dscore_JQ.astype(q_QH.dtype), q_QH, (1, 0))
        return dk_JH, dv_JH

    def of_head(g: jax.Array, state: tuple) -> tuple:
        whole = 0
        if causal:
            whole = lax.div((j + 1) * cut.keys + cut.queries - 2, cut.queries)  # its first query sees the last key
            some = lax.div(j * cut.keys, cut.queries)
            end = jnp.minimum(whole, last_ref[j])
            state = lax.fori_loop(some, end, partial(take, g=g, diagonal=True), state)
        return lax.fori_loop(whole, last_ref[j], partial(take, g=g, diagonal=False), state)

    dk_JH, dv_JH = lax.fori_loop(0, q_ref.shape[1], of_head, (jnp.zeros(k_JH.shape, jnp.float32),) * 2)
    dk_ref[...] = (dk_JH / LOG2_E).astype(dk_ref.dtype)  # q holds scale * log2(e)
    dv_ref[...] = dv_JH.astype(dv_ref.dtype)


def _dq_kernel(
    first_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *refs,
    cut: Cut, causal: bool, exp2: Callable, scale: float,
):  # fmt: skip
    """One block of queries past the keys that it sees, as in `_forward_kernel`."""
    *documents, dq_ref = refs
    q_document_ref, k_document_ref = documents or (None, None)
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    q_QH, dout_QH, lse_Q, delta_Q = q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]
    document_Q = q_document_ref[...] if documents else None

    def take(j: jax.Array, dq_QH: jax.Array, diagonal: bool) -> jax.Array:
        keys = pl.ds(j * cut.keys, cut.keys)
        k_JH = k_ref[keys, :]
        score_QJ = _product(q_QH, k_JH, (1, 1))
        own = (document_Q, k_document_ref[keys]) if documents else None
        score_QJ = _masked(score_QJ, own, (i * cut.queries, j * cut.keys) if diagonal else None, query_axis=0)
        weight_QJ = exp2(score_QJ - lse_Q[:, None])
        dweight_QJ = _product(dout_QH, v_ref[keys, :], (1, 1))
        dscore_QJ = weight_QJ * (dweight_QJ - delta_Q[:, None])
        return dq_QH + _product(dscore_QJ.astype(k_JH.dtype), k_JH, (1, 0))

    state = jnp.zeros(q_QH.shape, jnp.float32)
    dq_QH = _past_keys(take, state, first_ref[i], i, cut, k_ref.shape[0], causal)
    dq_ref[...] = (dq_QH * scale).astype(dq_ref.dtype)


def backward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    lse_BN1T: jax.Array, delta_BN1T: jax.Array, dout_BNTH: jax.Array,
    *, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(dq_BNTH by q without its factor, dk_BKSH, dv_BKSH); arguments as in `forward`, delta is dout . out."""
    head_dim = q_BNTH.shape[3]
    lse_BN1T = jnp.where(lse_BN1T > MASKED / 2, lse_BN1T, -MASKED)  # so that weights are 0 where no key is seen
    own = [_positions_first(x) for x in (q_BNTH, dout_BNTH, k_BKSH, v_BKSH)]
    arrays = *own[:2], lse_BN1T, delta_BN1T, *own[2:], *(documents or ())
    options = {"causal": causal, "exp2": partial(_exp2, interpret=interpret)}
    dq_BTNH = _dq(arrays, documents, sizes.dq, out_dtype, interpret, options | {"scale": head_dim**-0.5})
    dk_BSKH, dv_BSKH = _dkv(arrays, documents, sizes.dkv, out_dtype, interpret, options)
    return tuple(_heads_first(x, head_dim) for x in (dq_BTNH, dk_BSKH, dv_BSKH))


def _dq(
    arrays: tuple, documents: Documents, cut: Cut, out_dtype: jnp.dtype, interpret: bool, options: dict
) -> jax.Array:
    grid, first_BI, (first, queries, row, keys, ids) = _by_queries(arrays[0], arrays[4], documents, cut)
    return pl.pallas_call(
        partial(_dq_kernel, cut=cut, **options),
        grid=grid,
        in_specs=[first, queries, queries, row, row, keys, keys, *ids],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        name="flash_attention_dq",
        interpret=interpret,
    )(first_BI, *arrays)


def _dkv(
    arrays: tuple, documents: Documents, cut: Cut, out_dtype: jnp.dtype, interpret: bool, options: dict
) -> tuple[jax.Array, jax.Array]:
    (B, T, N, H), (S, K) = arrays[0].shape, arrays[4].shape[1:3]
    G, num_J = N // K, S // cut.keys
    _, last_BJ = visible_blocks(documents, (B, T, S), cut)
    rows = pl.BlockSpec((None, G, None, T), lambda j, k, b: (b, k, 0, 0))
    queries = pl.BlockSpec((None, T, G, H), lambda j, k, b: (b, 0, k, 0))
    keys = pl.BlockSpec((None, cut.keys, None, H), lambda j, k, b: (b, j, k, 0))
    last = pl.BlockSpec((None, num_J), lambda j, k, b: (b, 0))
    ids = [
        pl.BlockSpec((None, T), lambda j, k, b: (b, 0)),
        pl.BlockSpec((None, cut.keys), lambda j, k, b: (b, j)),
    ]
    return pl.pallas_call(
        partial(_dkv_kernel, cut=cut, **options),
        grid=(num_J, K, B),
        in_specs=[last, queries, queries, rows, rows, keys, keys, *(ids if documents else [])],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(arrays[4].shape, out_dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        name="flash_attention_dkv",
        interpret=interpret,
    )(last_BJ, *arrays)
