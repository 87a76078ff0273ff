"""Flash attention for Hopper GPUs, in Pallas through Mosaic GPU: softmax(q k') v and its gradients on wgmma.

What it computes is `reference.attention`, with the arguments and results of flash_attention_triton.py and its plan: two
backward kernels, powers of two, arrays as the model has them, blocks masked whole not taken. What is Hopper's own:

- A program is one warpgroup that loads and one or two that compute, 64 rows each. The first brings blocks from HBM by
  TMA into rings of slots; barriers tell the others that a slot is full, and it that a slot is free again.
- Products are wgmma: the block that stays is their left operand, from shared memory; weights go in from registers.
- Forward, the two computing warpgroups take turns: one has the matrix units while the other does its softmax. They take
  the same blocks, so that both come to every turn. Backward, the softmax runs beside the product that does not need it.
- With Cut.ahead the softmax of a block also runs beside the last product of the block before it, forward and in dq.
  So it stands in the compiled program; no GPU has run it, and the table is without.
- Heads wider than 128 leave a warpgroup no registers for dk and dv: one sums dv, the other dk, of the same keys, and
  both compute the weights.

Compiled for an H100 and interpreted on a CPU (tests/test_flash_attention_mosaic.py): the traced program itself, with
its barriers and copies in many orders. What only a GPU tells (speed, and what Mosaic makes of the program: layouts of
registers, swizzles, memory fences, products in flight) tools/bench/gpu_suite.py measures: on an H200 the numbers were
right, and speed 0.82 to 0.93 of cuDNN's forward, 0.87 to 0.93 with the backward pass (2026-11-28; without Cut.ahead).

Flash attention: Dao et al. 2022 (arXiv:2205.14135); Shah et al. 2024 (arXiv:2407.08608), whose turns these are.

Axes: B batch, N query heads, K key and value heads, G = N/K, T queries, S keys, H head dim; Q, J block of queries, of
keys, or a warpgroup's rows of it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from k2jax.kernels.flash_attention_mosaic_dkv import dkv
from k2jax.kernels.flash_attention_mosaic_dq import dq
from k2jax.kernels.flash_attention_tpu import LOG2_E, MASKED, Documents
from k2jax.kernels.flash_attention_triton import visible_blocks
from k2jax.kernels.mosaic_block_sizes import ROWS, BlockSizes, Cut
from k2jax.kernels.mosaic_blocks import Held, Ring
from k2jax.kernels.mosaic_past_keys import Place, load_past_keys, past_keys, place_of, rings_by_keys

from k2jax.kernels import mosaic_blocks as mosaic

# ---- forward ---------------------------------------------------------------------------------------------------------


class Softmax(NamedTuple):
    """Of a warpgroup's queries over the blocks of keys up to now."""

    most_Q: jax.Array  # the largest score
    sum_Q: jax.Array  # of the weights
    acc_QH: jax.Array  # of the weighted values


class Queries(NamedTuple):
    """A computing warpgroup of the forward kernel: its rows of the block of queries, and the keys that come past."""

    q_smem: Any
    document_Q: jax.Array | None
    origin: jax.Array  # position of the first
    place: Place
    cut: Cut
    k_ring: Ring
    v_ring: Ring
    turn: Any  # barrier of the computing warpgroups

    def swap_turns(self) -> None:
        mosaic.swap_turns(self.turn, self.cut.queries // ROWS)

    def keys_of(self, j: jax.Array, diagonal: bool) -> tuple:
        """(the block's keys, turned; what makes of its scores the new maximum and sum, how older sums fade, weights)"""
        (k_smem, *k_document), slot = self.k_ring.blocks, mosaic.receive(self.k_ring, j - self.place.first)

        def weigh(score_QJ: jax.Array, before_Q: jax.Array, sum_Q: jax.Array) -> tuple:
            own = (self.document_Q, mosaic.of_columns(k_document[0], slot)) if k_document else None
            plgpu.barrier_arrive(self.k_ring.free.at[slot])
            first = (self.origin, j * self.cut.keys) if diagonal else None
            score_QJ = mosaic.masked(score_QJ, own, first, query_axis=0)
            most_Q = jnp.maximum(before_Q, score_QJ.max(axis=1))
            fade_Q = jnp.exp2(before_Q - most_Q)
            weight_QJ = jnp.exp2(score_QJ - mosaic.along(most_Q, score_QJ.shape, 0))
            sum_Q = sum_Q * fade_Q + weight_QJ.sum(axis=1)
            return most_Q, sum_Q, fade_Q, weight_QJ

        return mosaic.turned(k_smem.at[slot]), weigh

    def add_values(self, j: jax.Array, acc_QH: jax.Array, weight_QJ: jax.Array) -> jax.Array:
        [v_smem], slot = self.v_ring.blocks, mosaic.receive(self.v_ring, j - self.place.first)
        acc_QH = mosaic.added(acc_QH, weight_QJ, v_smem.at[slot])
        plgpu.barrier_arrive(self.v_ring.free.at[slot])
        return acc_QH

    def weights_of(self, j: jax.Array, softmax: Softmax, diagonal: bool) -> tuple[Softmax, jax.Array]:
        """With the block's maximum and sum, but not its values yet; and its weights."""
        keys, weigh = self.keys_of(j, diagonal)
        score_QJ = mosaic.product(self.q_smem, keys, self.swap_turns)
        most_Q, sum_Q, fade_Q, weight_QJ = weigh(score_QJ, softmax.most_Q, softmax.sum_Q)
        acc_QH = softmax.acc_QH * mosaic.along(fade_Q, softmax.acc_QH.shape, 0)
        weight_QJ = weight_QJ.astype(self.q_smem.dtype)
        self.swap_turns()
        return Softmax(most_Q, sum_Q, acc_QH), weight_QJ

    def take(self, j: jax.Array, softmax: Softmax, diagonal: bool) -> Softmax:
        softmax, weight_QJ = self.weights_of(j, softmax, diagonal)
        return softmax._replace(acc_QH=self.add_values(j, softmax.acc_QH, weight_QJ))

    def take_ahead(self, j: jax.Array, state: tuple[Softmax, jax.Array], diagonal: bool) -> tuple[Softmax, jax.Array]:
        """With the weights of the block before, whose values come now."""
        (most_Q, sum_Q, acc_QH), weight_QJ = state
        keys, weigh = self.keys_of(j, diagonal)
        [v_smem], slot = self.v_ring.blocks, mosaic.receive(self.v_ring, j - 1 - self.place.first)
        acc_QH, (most_Q, sum_Q, fade_Q, weight_QJ) = mosaic.beside_product(
            [(self.q_smem, keys)],
            (weight_QJ, v_smem.at[slot]),
            acc_QH,
            lambda score_QJ: weigh(score_QJ(), most_Q, sum_Q),
            (most_Q, sum_Q, sum_Q, mosaic.zeros(*weight_QJ.shape)),
            self.swap_turns,
        )
        weight_QJ = weight_QJ.astype(v_smem.dtype)  # not sooner: into the registers of those that the product took
        plgpu.barrier_arrive(self.v_ring.free.at[slot])
        acc_QH = acc_QH * mosaic.along(fade_Q, acc_QH.shape, 0)
        return Softmax(most_Q, sum_Q, acc_QH), weight_QJ

    def past_all_keys(self, softmax: Softmax, causal: bool) -> Softmax:
        if not self.cut.ahead:
            return past_keys(self.take, softmax, self.place, self.cut, causal)
        state = self.weights_of(self.place.first, softmax, diagonal=causal)
        others = self.place._replace(first=self.place.first + 1)
        softmax, weight_QJ = past_keys(self.take_ahead, state, others, self.cut, causal)
        return softmax._replace(acc_QH=self.add_values(self.place.end - 1, softmax.acc_QH, weight_QJ))


def _forward_kernel(
    first_ref, q_ref, k_ref, v_ref, *refs, cut: Cut, causal: bool, held: Held, k_ring: Ring, v_ring: Ring, turn: Any
):
    """`first_ref` (B, queries' blocks): the first block of keys. `turn`: a barrier of the computing warpgroups."""
    *documents, out_ref, lse_ref = refs
    place, w = place_of(first_ref, k_ref.shape[1], cut, causal), lax.axis_index("warpgroup")
    (b, n, i, _, _), warpgroups = place, cut.queries // ROWS
    origin = i * cut.queries + w * ROWS
    mine = pl.ds(origin, ROWS)

    @pl.when(w < warpgroups)
    def _compute() -> None:
        mosaic.take_registers(False, warpgroups)
        document_Q = mosaic.of_rows(documents[0], (b, mine)) if documents else None
        queries = Queries(held.blocks[0].at[w], document_Q, origin, place, cut, k_ring, v_ring, turn)
        plgpu.barrier_wait(held.full.at[w])
        pl.when(w == 1)(queries.swap_turns)
        begin = [plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), mosaic.BY_ROW) for x in (MASKED, 0.0)]
        softmax = Softmax(*begin, mosaic.zeros(ROWS, q_ref.shape[3]))
        most_Q, sum_Q, acc_QH = queries.past_all_keys(softmax, causal)
        pl.when(w == 0)(queries.swap_turns)
        some_Q = most_Q > MASKED / 2  # a row that sees no key has weights of 1, or no block was taken
        sum_Q = jnp.where(some_Q, sum_Q, 1.0)
        share_Q = jnp.where(some_Q, 1.0 / sum_Q, 0.0)
        out_ref[b, mine, n] = (acc_QH * mosaic.along(share_Q, acc_QH.shape, 0)).astype(out_ref.dtype)
        lse_ref[b, n, 0, mine] = jnp.where(some_Q, most_Q + jnp.log(sum_Q) * LOG2_E, MASKED)

    arrays = (q_ref,), (k_ref, *documents[1:]), (v_ref,)
    pl.when(w == warpgroups)(partial(load_past_keys, place, cut, *arrays, held, k_ring, v_ring))


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
    scratch = rings_by_keys(cut, 1, sizes.head_dim, q_BNTH.dtype, documents)
    scratch["turn"] = plgpu.Barrier(num_arrivals=warpgroups)
    kernel = partial(_forward_kernel, cut=cut, causal=causal)
    grid = {"b": B, "n": N, "i": T // cut.queries}
    run = mosaic.program(kernel, "forward", grid, warpgroups, out, scratch, interpret)
    out_BTNH, lse_BN1T = run(first_BI, q_BTNH, k_BSKH, v_BSKH, *(documents or ()))
    return _heads_first(out_BTNH, head_dim), lse_BN1T


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


def backward(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    lse_BN1T: jax.Array, delta_BN1T: jax.Array, dout_BNTH: jax.Array,
    *, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(dq_BNTH by q without its factor, dk_BKSH, dv_BKSH); arguments as in `forward`, delta is dout . out."""
    head_dim = q_BNTH.shape[3]
    lse_BN1T = jnp.where(lse_BN1T > MASKED / 2, lse_BN1T, -MASKED)  # so that weights are 0 where no key is seen
    dout_BNTH = dout_BNTH.astype(q_BNTH.dtype)
    q_BTNH, dout_BTNH, k_BSKH, v_BSKH = (_positions_first(x, sizes) for x in (q_BNTH, dout_BNTH, k_BKSH, v_BKSH))
    arrays = q_BTNH, dout_BTNH, lse_BN1T, delta_BN1T, k_BSKH, v_BSKH
    options = documents, sizes, causal, out_dtype, interpret
    dq_BTNH, (dk_BSKH, dv_BSKH) = dq(arrays, *options, scale=head_dim**-0.5), dkv(arrays, *options)
    return tuple(_heads_first(x, head_dim) for x in (dq_BTNH, dk_BSKH, dv_BSKH))
