"""Flash attention for Hopper GPUs, in Pallas through Mosaic GPU: softmax(q k') v and its gradients on wgmma.

What it computes is `reference.attention`, with the arguments and results of flash_attention_triton.py and its plan: two
backward kernels, powers of two, arrays as the model has them, blocks masked whole not taken. What is Hopper's own:

- A program is one warpgroup that loads and one or two that compute, 64 rows each. The first brings blocks from HBM by
  TMA into rings of slots; barriers tell the others that a slot is full, and it that a slot is free again.
- Products are wgmma: the block that stays is their left operand, from shared memory; weights go in from registers.
- Forward, the two computing warpgroups take turns: one has the matrix units while the other does its softmax. They take
  the same blocks, so that both come to every turn. Backward, the softmax runs beside the product that does not need it.
- With Cut.ahead the softmax of a block also runs beside the last product of the block before it, forward and in dq.
  What is compiled shows it, waits and all; no GPU has yet, and the table is without.
- Heads wider than 128 leave a warpgroup no registers for dk and dv: one sums dv, the other dk, of the same keys, and
  both compute the weights.

Compiled for an H100 and interpreted on a CPU (tests/test_flash_attention_mosaic.py): the traced program itself, with
its barriers and copies in many orders. Not known without a GPU: speed, and what Mosaic and the GPU make of the program
(layouts of registers, swizzles, memory fences, products in flight). tools/bench/gpu_suite.py tells.

Flash attention: Dao et al. 2022 (arXiv:2205.14135); Shah et al. 2024 (arXiv:2407.08608), whose turns these are.

Axes: B batch, N query heads, K key and value heads, G = N/K, T queries, S keys, H head dim; Q, J block of queries, of
keys, or a warpgroup's rows of it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from k2jax.kernels.flash_attention_mosaic_dkv import dkv
from k2jax.kernels.flash_attention_tpu import LOG2_E, MASKED, Documents
from k2jax.kernels.flash_attention_triton import visible_blocks
from k2jax.kernels.mosaic_block_sizes import ROWS, BlockSizes, Cut
from k2jax.kernels.mosaic_blocks import Held, Ring

from k2jax.kernels import mosaic_blocks as mosaic

# ---- kernels by blocks of queries: forward and dq --------------------------------------------------------------------


class Place(NamedTuple):
    """Of a program by blocks of queries: row, head, block of queries, first block of keys, the last one + 1."""

    b: jax.Array
    n: jax.Array
    i: jax.Array
    first: jax.Array
    end: jax.Array | int


def _place(first_ref: Any, num_keys: int, cut: Cut, causal: bool) -> Place:
    b, n, i = (lax.axis_index(axis) for axis in ("b", "n", "i"))
    i = first_ref.shape[1] - 1 - i  # the last block comes first: it sees the most keys
    end = lax.div((i + 1) * cut.queries + cut.keys - 1, cut.keys) if causal else num_keys // cut.keys
    first = first_ref[b, i]
    return Place(b, n, i, jnp.minimum(first, end - 1) if cut.ahead else first, end)  # the first block is always taken


def _load_past_keys(
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


def _past_keys(take: Callable, state: Any, place: Place, cut: Cut, causal: bool) -> Any:
    """`take(j, state, diagonal)` of each block of keys that the block of queries sees."""
    if not causal:
        return lax.fori_loop(place.first, place.end, partial(take, diagonal=False), state)
    whole = lax.div(place.i * cut.queries, cut.keys)
    state = lax.fori_loop(place.first, whole, partial(take, diagonal=False), state)
    return lax.fori_loop(jnp.maximum(place.first, whole), place.end, partial(take, diagonal=True), state)


def _forward_kernel(
    first_ref, q_ref, k_ref, v_ref, *refs, cut: Cut, causal: bool, held: Held, k_ring: Ring, v_ring: Ring, turn: Any
):
    """`first_ref` (B, queries' blocks): the first block of keys. `turn`: a barrier of the computing warpgroups."""
    *documents, out_ref, lse_ref = refs
    place, w = _place(first_ref, k_ref.shape[1], cut, causal), lax.axis_index("warpgroup")
    (b, n, i, first, _), warpgroups = place, cut.queries // ROWS
    q_smem, (k_smem, *k_document), (v_smem,) = held.blocks[0].at[w], k_ring.blocks, v_ring.blocks
    origin = i * cut.queries + w * ROWS
    mine, swap_turns = pl.ds(origin, ROWS), partial(mosaic.swap_turns, turn, warpgroups)

    def keys_of(j: jax.Array) -> tuple:
        """(the slot of the block, what makes its weights of its scores)."""
        slot = mosaic.receive(k_ring, j - first)

        def weigh(score_QJ: jax.Array, before_Q: jax.Array, sum_Q: jax.Array, diagonal: bool, document_Q: Any) -> tuple:
            own = (document_Q, mosaic.of_columns(k_document[0], slot)) if documents else None
            plgpu.barrier_arrive(k_ring.free.at[slot])
            score_QJ = mosaic.masked(score_QJ, own, (origin, j * cut.keys) if diagonal else None, query_axis=0)
            most_Q = jnp.maximum(before_Q, score_QJ.max(axis=1))
            fade_Q = jnp.exp2(before_Q - most_Q)
            weight_QJ = jnp.exp2(score_QJ - mosaic.along(most_Q, score_QJ.shape, 0))
            sum_Q = sum_Q * fade_Q + weight_QJ.sum(axis=1)
            return most_Q, sum_Q, fade_Q, weight_QJ

        return mosaic.turned(k_smem.at[slot]), weigh

    def add_values(j: jax.Array, acc_QH: jax.Array, weight_QJ: jax.Array) -> jax.Array:
        slot = mosaic.receive(v_ring, j - first)
        acc_QH = mosaic.added(acc_QH, weight_QJ, v_smem.at[slot])
        plgpu.barrier_arrive(v_ring.free.at[slot])
        return acc_QH

    def take(j: jax.Array, state: tuple, diagonal: bool, document_Q: jax.Array | None) -> tuple:
        most_Q, sum_Q, acc_QH = state
        keys, weigh = keys_of(j)
        score_QJ = mosaic.product(q_smem, keys, swap_turns)
        most_Q, sum_Q, fade_Q, weight_QJ = weigh(score_QJ, most_Q, sum_Q, diagonal, document_Q)
        acc_QH = acc_QH * mosaic.along(fade_Q, acc_QH.shape, 0)
        weight_QJ = weight_QJ.astype(v_smem.dtype)
        swap_turns()
        return most_Q, sum_Q, add_values(j, acc_QH, weight_QJ)

    def take_ahead(j: jax.Array, state: tuple, diagonal: bool, document_Q: jax.Array | None) -> tuple:
        """With the weights of the block before, whose values come now."""
        most_Q, sum_Q, acc_QH, weight_QJ = state
        keys, weigh = keys_of(j)
        slot = mosaic.receive(v_ring, j - 1 - first)
        acc_QH, (most_Q, sum_Q, fade_Q, weight_QJ) = mosaic.beside_product(
            [(q_smem, keys)],
            (weight_QJ, v_smem.at[slot]),
            acc_QH,
            lambda score_QJ: weigh(score_QJ(), most_Q, sum_Q, diagonal, document_Q),
            (most_Q, sum_Q, sum_Q, mosaic.zeros(*weight_QJ.shape)),
            swap_turns,
        )
        weight_QJ = weight_QJ.astype(v_smem.dtype)  # not sooner: into the registers of those that the product took
        plgpu.barrier_arrive(v_ring.free.at[slot])
        acc_QH = acc_QH * mosaic.along(fade_Q, acc_QH.shape, 0)
        return most_Q, sum_Q, acc_QH, weight_QJ

    def past_all_keys(document_Q: jax.Array | None) -> tuple:
        """(softmax's maximum and sum, the weighted sum of the values) of the queries."""
        most_Q, sum_Q = (plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), mosaic.BY_ROW) for x in (MASKED, 0.0))
        acc_QH = mosaic.zeros(ROWS, q_ref.shape[3])
        if not cut.ahead:
            return _past_keys(partial(take, document_Q=document_Q), (most_Q, sum_Q, acc_QH), place, cut, causal)
        keys, weigh = keys_of(first)
        score_QJ = mosaic.product(q_smem, keys, swap_turns)
        most_Q, sum_Q, _, weight_QJ = weigh(score_QJ, most_Q, sum_Q, causal, document_Q)
        swap_turns()
        state = most_Q, sum_Q, acc_QH, weight_QJ.astype(v_smem.dtype)
        others = place._replace(first=first + 1)
        most_Q, sum_Q, *last = _past_keys(partial(take_ahead, document_Q=document_Q), state, others, cut, causal)
        return most_Q, sum_Q, add_values(place.end - 1, *last)

    @pl.when(w < warpgroups)
    def _compute() -> None:
        mosaic.take_registers(False, warpgroups)
        document_Q = mosaic.of_rows(documents[0], (b, mine)) if documents else None
        plgpu.barrier_wait(held.full.at[w])
        pl.when(w == 1)(swap_turns)
        most_Q, sum_Q, acc_QH = past_all_keys(document_Q)
        pl.when(w == 0)(swap_turns)
        some_Q = most_Q > MASKED / 2  # a row that sees no key has weights of 1, or no block was taken
        sum_Q = jnp.where(some_Q, sum_Q, 1.0)
        share_Q = jnp.where(some_Q, 1.0 / sum_Q, 0.0)
        out_ref[b, mine, n] = (acc_QH * mosaic.along(share_Q, acc_QH.shape, 0)).astype(out_ref.dtype)
        lse_ref[b, n, 0, mine] = jnp.where(some_Q, most_Q + jnp.log(sum_Q) * LOG2_E, MASKED)

    arrays = (q_ref,), (k_ref, *documents[1:]), (v_ref,)
    pl.when(w == warpgroups)(partial(_load_past_keys, place, cut, *arrays, held, k_ring, v_ring))


def forward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    *, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out_BNTH, lse_BN1T float32) of q times log2(e) / sqrt(H), as in flash_attention_triton.py.

    q, k and v are bfloat16 or float16, heads no wider than `sizes.head_dim`. ValueError for others.
    """
    (B, N, T, head_dim), cut = q_BNTH.shape, sizes.forward
    q_BTNH, k_BSKH, v_BSKH = (_positions_first(x, sizes) for x in (q_BNTH, k_BKSH, v_BKSH))
    first_BI, _ = visible_blocks(documents, (B, T, k_BSKH.shape[1]), cut)
    out = [jax.ShapeDtypeStruct(q_BTNH.shape, out_dtype), jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)]
    warpgroups = cut.queries // ROWS
    scratch = _rings_by_keys(cut, 1, sizes.head_dim, q_BNTH.dtype, documents)
    scratch["turn"] = plgpu.Barrier(num_arrivals=warpgroups)
    kernel = partial(_forward_kernel, cut=cut, causal=causal)
    grid = {"b": B, "n": N, "i": T // cut.queries}
    run = mosaic.program(kernel, "forward", grid, warpgroups, out, scratch, interpret)
    out_BTNH, lse_BN1T = run(first_BI, q_BTNH, k_BSKH, v_BSKH, *(documents or ()))
    return _heads_first(out_BTNH, head_dim), lse_BN1T


def _rings_by_keys(cut: Cut, held: int, head_dim: int, dtype: jnp.dtype, documents: Documents) -> dict[str, Any]:
    warpgroups, matrix = cut.queries // ROWS, (cut.keys, head_dim)
    ids = [jnp.int32] if documents else []
    return {
        "held": mosaic.held_type(warpgroups, held, head_dim, dtype),
        "k_ring": mosaic.ring_type(cut.stages, warpgroups, matrix, dtype, *ids),
        "v_ring": mosaic.ring_type(cut.stages, warpgroups, matrix, dtype),
        "turn": plgpu.Barrier(num_arrivals=warpgroups),
    }


def _positions_first(x_BNTH: jax.Array, sizes: BlockSizes) -> jax.Array:
    """(B, T, N, H), with zeros after each head's numbers up to what the kernels are cut for."""
    padding = sizes.head_dim - x_BNTH.shape[3]
    if padding < 0 or x_BNTH.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"these kernels are for heads up to {sizes.head_dim} wide of bfloat16 or float16, not {x_BNTH.shape[3]} of "
            f"{x_BNTH.dtype}: take flash_attention_triton.py's block sizes"
        )
    return jnp.pad(x_BNTH.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, 0), (0, padding)))


def _heads_first(x_BTNH: jax.Array, head_dim: int) -> jax.Array:
    return x_BTNH[..., :head_dim].transpose(0, 2, 1, 3)


# ---- backward --------------------------------------------------------------------------------------------------------


def _dq_kernel(
    first_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *refs,
    cut: Cut, causal: bool, scale: float, held: Held, k_ring: Ring, v_ring: Ring, turn: Any,
):  # fmt: skip
    """One block of queries past the keys that it sees, as in `_forward_kernel`; turns are only taken with Cut.ahead."""
    *documents, dq_ref = refs
    place, w = _place(first_ref, k_ref.shape[1], cut, causal), lax.axis_index("warpgroup")
    (b, n, i, first, _), warpgroups = place, cut.queries // ROWS
    (q_smem, dout_smem), (k_smem, *k_document), (v_smem,) = held.blocks, k_ring.blocks, v_ring.blocks
    origin = i * cut.queries + w * ROWS
    mine, swap_turns = pl.ds(origin, ROWS), partial(mosaic.swap_turns, turn, warpgroups)

    def keys_of(j: jax.Array, diagonal: bool, lse_Q: Any, document_Q: Any) -> tuple:
        """(the slot, the scores' factors, their gradients', what makes weights of scores)."""
        slot = mosaic.receive(k_ring, j - first)
        own = (document_Q, mosaic.of_columns(k_document[0], slot)) if documents else None
        mosaic.receive(v_ring, j - first)

        def weigh(score_QJ: jax.Array) -> jax.Array:
            score_QJ = mosaic.masked(score_QJ, own, (origin, j * cut.keys) if diagonal else None, query_axis=0)
            return jnp.exp2(score_QJ - mosaic.along(lse_Q, score_QJ.shape, 0))

        scores = q_smem.at[w], mosaic.turned(k_smem.at[slot])
        return slot, scores, (dout_smem.at[w], mosaic.turned(v_smem.at[slot])), weigh

    def dscore_of(j: jax.Array, diagonal: bool, lse_Q: Any, delta_Q: Any, document_Q: Any) -> tuple:
        """(the slot, the scores' gradient); the values are done with."""
        slot, scores, dweights, weigh = keys_of(j, diagonal, lse_Q, document_Q)
        weight_QJ, dweight_QJ = mosaic.weights_and_product(scores, dweights, weigh)
        plgpu.barrier_arrive(v_ring.free.at[slot])
        dscore_QJ = weight_QJ * (dweight_QJ - mosaic.along(delta_Q, weight_QJ.shape, 0))
        return slot, dscore_QJ.astype(k_smem.dtype)

    def add_keys(slot: jax.Array, dq_QH: jax.Array, dscore_QJ: jax.Array) -> jax.Array:
        dq_QH = mosaic.added(dq_QH, dscore_QJ, k_smem.at[slot])
        plgpu.barrier_arrive(k_ring.free.at[slot])
        return dq_QH

    def take(j: jax.Array, dq_QH: jax.Array, diagonal: bool, **own: Any) -> jax.Array:
        slot, dscore_QJ = dscore_of(j, diagonal, **own)
        return add_keys(slot, dq_QH, dscore_QJ)

    def take_ahead(j: jax.Array, state: tuple, diagonal: bool, lse_Q: Any, delta_Q: Any, document_Q: Any) -> tuple:
        """With the scores' gradient of the block before, whose keys are still there."""
        dq_QH, dscore_QJ = state
        slot, scores, dweights, weigh = keys_of(j, diagonal, lse_Q, document_Q)
        before = lax.rem(j - 1 - first, cut.stages)

        def dscore(score_QJ: Callable, dweight_QJ: Callable) -> tuple:
            weight_QJ = weigh(score_QJ())
            return (weight_QJ * (dweight_QJ() - mosaic.along(delta_Q, weight_QJ.shape, 0)),)

        of_keys, like = (dscore_QJ, k_smem.at[before]), (mosaic.zeros(*dscore_QJ.shape),)
        dq_QH, (dscore_QJ,) = mosaic.beside_product([scores, dweights], of_keys, dq_QH, dscore, like, swap_turns)
        dscore_QJ = dscore_QJ.astype(k_smem.dtype)
        plgpu.barrier_arrive(v_ring.free.at[slot])
        plgpu.barrier_arrive(k_ring.free.at[before])
        return dq_QH, dscore_QJ

    @pl.when(w < warpgroups)
    def _compute() -> None:
        mosaic.take_registers(False, warpgroups)
        lse_Q, delta_Q = (mosaic.of_rows(x, (b, n, 0, mine)) for x in (lse_ref, delta_ref))
        own = {"lse_Q": lse_Q, "delta_Q": delta_Q, "document_Q": None}
        if documents:
            own["document_Q"] = mosaic.of_rows(documents[0], (b, mine))
        plgpu.barrier_wait(held.full.at[w])
        dq_QH = mosaic.zeros(ROWS, q_ref.shape[3])
        if cut.ahead:
            _, dscore_QJ = dscore_of(first, causal, **own)
            pl.when(w == 1)(swap_turns)
            others = place._replace(first=first + 1)
            dq_QH, dscore_QJ = _past_keys(partial(take_ahead, **own), (dq_QH, dscore_QJ), others, cut, causal)
            pl.when(w == 0)(swap_turns)
            dq_QH = add_keys(lax.rem(place.end - 1 - first, cut.stages), dq_QH, dscore_QJ)
        else:
            dq_QH = _past_keys(partial(take, **own), dq_QH, place, cut, causal)
        dq_ref[b, mine, n] = (dq_QH * scale).astype(dq_ref.dtype)

    arrays = (q_ref, dout_ref), (k_ref, *documents[1:]), (v_ref,)
    pl.when(w == warpgroups)(partial(_load_past_keys, place, cut, *arrays, held, k_ring, v_ring))


def backward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    lse_BN1T: jax.Array, delta_BN1T: jax.Array, dout_BNTH: jax.Array,
    *, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(dq_BNTH by q without its factor, dk_BKSH, dv_BKSH); arguments as in `forward`, delta is dout . out."""
    B, N, T, head_dim = q_BNTH.shape
    lse_BN1T = jnp.where(lse_BN1T > MASKED / 2, lse_BN1T, -MASKED)  # so that weights are 0 where no key is seen
    dtype, dout_BNTH = q_BNTH.dtype, dout_BNTH.astype(q_BNTH.dtype)
    q_BTNH, dout_BTNH, k_BSKH, v_BSKH = (_positions_first(x, sizes) for x in (q_BNTH, dout_BNTH, k_BKSH, v_BKSH))
    arrays = q_BTNH, dout_BTNH, lse_BN1T, delta_BN1T, k_BSKH, v_BSKH

    cut, out = sizes.dq, [jax.ShapeDtypeStruct(q_BTNH.shape, out_dtype)]
    first_BI, _ = visible_blocks(documents, (B, T, k_BKSH.shape[2]), cut)
    scratch = _rings_by_keys(cut, 2, sizes.head_dim, dtype, documents)
    kernel = partial(_dq_kernel, cut=cut, causal=causal, scale=head_dim**-0.5)
    grid = {"b": B, "n": N, "i": T // cut.queries}
    run = mosaic.program(kernel, "dq", grid, cut.queries // ROWS, out, scratch, interpret)
    [dq_BTNH] = run(first_BI, *arrays, *(documents or ()))
    dk_BSKH, dv_BSKH = dkv(arrays, documents, sizes, causal, out_dtype, interpret)
    return tuple(_heads_first(x, head_dim) for x in (dq_BTNH, dk_BSKH, dv_BSKH))
