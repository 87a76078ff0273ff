"""Flash attention for Hopper GPUs, in Pallas through Mosaic GPU.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from k2jax.kernels.flash_attention_tpu import LOG2_E, MASKED, Documents
from k2jax.kernels.flash_attention_triton import _visible as visible
from k2jax.kernels.mosaic_block_sizes import ROWS, BlockSizes, Cut

TILES = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # of 16-bit numbers in shared memory, for wgmma
MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # a number for each row, or column, of a MATRIX
REGISTERS = {1: (240, 40), 2: (232, 40)}  # of a thread that computes, and that loads, by number of computing warpgroups


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y in float32; y in shared memory, x there or in registers."""
    def run(sums_ref):
        plgpu.wgmma(sums_ref, x, y)
        return sums_ref[...]
    return pl.run_scoped(run, plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32))


def _added(sums, x, y):
    return pl.run_state(lambda sums_ref: plgpu.wgmma(sums_ref, x, y))(plgpu.ACC.init(sums))


def _across(x, shape, axis):
    return lax.broadcast_in_dim(x, shape, [axis])


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _masked(score, own, first, query_axis):
    if own is not None:
        score = jnp.where(_across(own[0], score.shape, 0) == _across(own[1], score.shape, 1), score, MASKED)
    if first is not None:
        at = [
            first[axis] + plgpu.broadcasted_iota(jnp.int32, score.shape, axis, layout=MATRIX) for axis in (0, 1)
        ]
        score = jnp.where(at[1 - query_axis] <= at[query_axis], score, MASKED)
    return score


def _past_keys(take, state, first, i, cut: Cut, num_keys: int, causal: bool):
    if not causal:
        return lax.fori_loop(first, num_keys // cut.keys, partial(take, diagonal=False), state)
    whole, some = lax.div(i * cut.queries, cut.keys), _seen(i, cut, num_keys, causal)
    state = lax.fori_loop(first, whole, partial(take, diagonal=False), state)
    return lax.fori_loop(jnp.maximum(first, whole), some, partial(take, diagonal=True), state)


def _seen(i, cut, num_keys, causal):
    return lax.div((i + 1) * cut.queries + cut.keys - 1, cut.keys) if causal else num_keys // cut.keys


def _forward_kernel(first_ref, q_ref, k_ref, v_ref, *refs, cut: Cut, causal: bool, num_documents, **scratch):
    documents, (out_ref, lse_ref) = refs[:num_documents], refs[num_documents:]
    b, n, i = lax.axis_index("b"), lax.axis_index("n"), pl.num_programs
    T, S = q_ref.shape[1], k_ref.shape[1]
    i = T // cut.queries - 1 - lax.axis_index("i")
    first = first_ref[b, i]
    group = q_ref.shape[2] // k_ref.shape[2]
    warpgroups = cut.queries // ROWS
    wg = lax.axis_index("warpgroup")
    q_smem, k_smem, v_smem = (scratch[x] for x in ("q_smem", "k_smem", "v_smem"))
    q_full, k_full, v_full, k_free, v_free = (scratch[x] for x in ("q_full", "k_full", "v_full", "k_free", "v_free"))

    @pl.when(wg == warpgroups)
    def _load():
        plgpu.set_max_registers(REGISTERS[warpgroups][1], action="decrease")
        kv = lax.div(n, group)
        for w in range(warpgroups):
            plgpu.copy_gmem_to_smem(q_ref.at[b, pl.ds(i * cut.queries + w * ROWS, ROWS), n], q_smem.at[w], q_full.at[w])

        def fetch(j, _):
            step = j - first
            slot = lax.rem(step, cut.stages)
            rows = pl.ds(j * cut.keys, cut.keys)
            @pl.when(step >= cut.stages)
            def _():
                plgpu.barrier_wait(k_free.at[slot])
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, kv], k_smem.at[slot], k_full.at[slot])
            if documents:
                plgpu.copy_gmem_to_smem(documents[1].at[b, rows], scratch["document_smem"].at[slot], k_full.at[slot])
            @pl.when(step >= cut.stages)
            def _():
                plgpu.barrier_wait(v_free.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, kv], v_smem.at[slot], v_full.at[slot])

        lax.fori_loop(first, _seen(i, cut, S, causal), fetch, None)

    @pl.when(wg < warpgroups)
    def _compute():
        plgpu.set_max_registers(REGISTERS[warpgroups][0], action="increase")
        rows = pl.ds(i * cut.queries + wg * ROWS, ROWS)
        document_Q = None
        if documents:
            document_Q = plgpu.load(documents[0], (b, rows), layout=BY_ROW, optimized=False)
        plgpu.barrier_wait(q_full.at[wg])

        def take(j, state, diagonal):
            before_Q, sum_Q, acc_QH = state
            slot = lax.rem(j - first, cut.stages)
            plgpu.barrier_wait(k_full.at[slot])
            score_QJ = _product(q_smem.at[wg], plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
            own = None
            if documents:
                own = document_Q, plgpu.load(scratch["document_smem"], (slot,), layout=BY_COLUMN, optimized=False)
            plgpu.barrier_arrive(k_free.at[slot])
            at = (i * cut.queries + wg * ROWS, j * cut.keys) if diagonal else None
            score_QJ = _masked(score_QJ, own, at, 0)
            most_Q = jnp.maximum(before_Q, score_QJ.max(axis=1))
            fade_Q = jnp.exp2(before_Q - most_Q)
            weight_QJ = jnp.exp2(score_QJ - _across(most_Q, score_QJ.shape, 0))
            sum_Q = sum_Q * fade_Q + weight_QJ.sum(axis=1)
            acc_QH = acc_QH * _across(fade_Q, acc_QH.shape, 0)
            plgpu.barrier_wait(v_full.at[slot])
            acc_QH = _added(acc_QH, weight_QJ.astype(v_ref.dtype), v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return most_Q, sum_Q, acc_QH

        H = q_ref.shape[3]
        state = _full((ROWS,), MASKED, BY_ROW), _full((ROWS,), 0.0, BY_ROW), _full((ROWS, H), 0.0, MATRIX)
        most_Q, sum_Q, acc_QH = _past_keys(take, state, first, i, cut, S, causal)
        some_Q = most_Q > MASKED / 2
        total_Q = jnp.where(some_Q, sum_Q, 1.0)
        share_Q = jnp.where(some_Q, 1.0 / total_Q, 0.0)
        out_ref[b, rows, n] = (acc_QH * _across(share_Q, acc_QH.shape, 0)).astype(out_ref.dtype)
        lse_ref[b, n, 0, rows] = jnp.where(some_Q, most_Q + jnp.log2(total_Q), MASKED)


def forward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    *, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    cut, (B, N, T, head_dim) = sizes.forward, q_BNTH.shape
    q_BTNH, k_BSKH, v_BSKH = (_positions_first(x, sizes.head_dim) for x in (q_BNTH, k_BKSH, v_BKSH))
    S, H = k_BSKH.shape[1], sizes.head_dim
    first_BI, _ = visible(documents, (B, T, S), cut)
    dtype = q_BNTH.dtype
    wgs = cut.queries // ROWS
    scratch = dict(
        q_smem=plgpu.SMEM((wgs, ROWS, H), dtype, transforms=TILES),
        k_smem=plgpu.SMEM((cut.stages, cut.keys, H), dtype, transforms=TILES),
        v_smem=plgpu.SMEM((cut.stages, cut.keys, H), dtype, transforms=TILES),
        q_full=plgpu.Barrier(num_barriers=wgs),
        k_full=plgpu.Barrier(num_arrivals=2 if documents else 1, num_barriers=cut.stages),
        v_full=plgpu.Barrier(num_barriers=cut.stages),
        k_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=cut.stages),
        v_free=plgpu.Barrier(num_arrivals=wgs, num_barriers=cut.stages),
    )
    if documents:
        scratch["document_smem"] = plgpu.SMEM((cut.stages, cut.keys), jnp.int32)
    kernel = plgpu.kernel(
        partial(_forward_kernel, cut=cut, causal=causal, num_documents=len(documents or ())),
        out_type=[
            jax.ShapeDtypeStruct(q_BTNH.shape, out_dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(B, N, T // cut.queries),
        grid_names=("b", "n", "i"),
        num_threads=wgs + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    out_BTNH, lse_BN1T = kernel(first_BI, q_BTNH, k_BSKH, v_BSKH, *(documents or ()))
    return out_BTNH[..., :head_dim].transpose(0, 2, 1, 3), lse_BN1T


def _positions_first(x_BNTH: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x_BNTH.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 0), (0, width - x_BNTH.shape[3])))
