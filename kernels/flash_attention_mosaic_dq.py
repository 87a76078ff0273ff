"""The gradient of queries of flash_attention_mosaic.py: the kernel by blocks of queries, past the keys that they see.

Axes: B batch, N query heads, K key and value heads, T queries, S keys, H head dim; Q a warpgroup's rows of the block of
queries, J block of keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from k2jax.kernels.flash_attention_tpu import Documents
from k2jax.kernels.flash_attention_triton import visible_blocks
from k2jax.kernels.mosaic_block_sizes import ROWS, BlockSizes, Cut
from k2jax.kernels.mosaic_blocks import Held, Ring
from k2jax.kernels.mosaic_past_keys import Place, load_past_keys, past_keys, place_of, rings_by_keys

from k2jax.kernels import mosaic_blocks as mosaic


def dq(
    arrays: tuple, documents: Documents, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: bool,
    scale: float,
) -> jax.Array:  # fmt: skip
    """dq_BTNH times `scale` of `arrays`: q_BTNH, dout_BTNH, lse_BN1T, delta_BN1T, k_BSKH and v_BSKH."""
    q_BTNH, k_BSKH, cut = arrays[0], arrays[4], sizes.dq
    B, T, N, H = q_BTNH.shape
    first_BI, _ = visible_blocks(documents, (B, T, k_BSKH.shape[1]), cut)
    scratch, warpgroups = rings_by_keys(cut, 2, H, q_BTNH.dtype, documents), cut.queries // ROWS
    if cut.ahead:
        scratch["turn"] = plgpu.Barrier(num_arrivals=warpgroups)
    kernel = partial(_dq_kernel, cut=cut, causal=causal, scale=scale)
    grid = {"b": B, "n": N, "i": T // cut.queries}
    out = [jax.ShapeDtypeStruct(q_BTNH.shape, out_dtype)]
    run = mosaic.program(kernel, "dq", grid, warpgroups, out, scratch, interpret)
    [dq_BTNH] = run(first_BI, *arrays, *(documents or ()))
    return dq_BTNH


class Queries(NamedTuple):
    """A computing warpgroup: its rows of the block of queries, and the keys that come past."""

    q_smem: Any
    dout_smem: Any
    lse_Q: jax.Array
    delta_Q: jax.Array
    document_Q: jax.Array | None
    origin: jax.Array  # position of the first
    place: Place
    cut: Cut
    k_ring: Ring
    v_ring: Ring
    turn: Any  # barrier of the computing warpgroups; None: they take no turns

    def swap_turns(self) -> None:
        mosaic.swap_turns(self.turn, self.cut.queries // ROWS)

    def keys_of(self, j: jax.Array, diagonal: bool) -> tuple:
        """(slot of the block, the scores' factors, the weights' gradients', what makes weights of scores)."""
        (k_smem, *k_document), [v_smem] = self.k_ring.blocks, self.v_ring.blocks
        slot = mosaic.receive(self.k_ring, j - self.place.first)
        own = (self.document_Q, mosaic.of_columns(k_document[0], slot)) if k_document else None
        mosaic.receive(self.v_ring, j - self.place.first)

        def weigh(score_QJ: jax.Array) -> jax.Array:
            first = (self.origin, j * self.cut.keys) if diagonal else None
            score_QJ = mosaic.masked(score_QJ, own, first, query_axis=0)
            return jnp.exp2(score_QJ - mosaic.along(self.lse_Q, score_QJ.shape, 0))

        scores = self.q_smem, mosaic.turned(k_smem.at[slot])
        return slot, scores, (self.dout_smem, mosaic.turned(v_smem.at[slot])), weigh

    def dscore_of(self, j: jax.Array, diagonal: bool) -> tuple[jax.Array, jax.Array]:
        """(slot of the block, the scores' gradient); its values are done with."""
        slot, scores, dweights, weigh = self.keys_of(j, diagonal)
        weight_QJ, dweight_QJ = mosaic.weights_and_product(scores, dweights, weigh)
        plgpu.barrier_arrive(self.v_ring.free.at[slot])
        dscore_QJ = weight_QJ * (dweight_QJ - mosaic.along(self.delta_Q, weight_QJ.shape, 0))
        return slot, dscore_QJ.astype(self.q_smem.dtype)

    def add_keys(self, slot: jax.Array, dq_QH: jax.Array, dscore_QJ: jax.Array) -> jax.Array:
        dq_QH = mosaic.added(dq_QH, dscore_QJ, self.k_ring.blocks[0].at[slot])
        plgpu.barrier_arrive(self.k_ring.free.at[slot])
        return dq_QH

    def take(self, j: jax.Array, dq_QH: jax.Array, diagonal: bool) -> jax.Array:
        slot, dscore_QJ = self.dscore_of(j, diagonal)
        return self.add_keys(slot, dq_QH, dscore_QJ)

    def take_ahead(self, j: jax.Array, state: tuple[jax.Array, jax.Array], diagonal: bool) -> tuple:
        """With the scores' gradient of the block before, whose keys are still there."""
        dq_QH, dscore_QJ = state
        slot, scores, dweights, weigh = self.keys_of(j, diagonal)
        before = lax.rem(j - 1 - self.place.first, self.cut.stages)

        def dscore(score_QJ: Callable, dweight_QJ: Callable) -> tuple:
            weight_QJ = weigh(score_QJ())
            return (weight_QJ * (dweight_QJ() - mosaic.along(self.delta_Q, weight_QJ.shape, 0)),)

        keys, like = self.k_ring.blocks[0].at[before], (mosaic.zeros(*dscore_QJ.shape),)
        dq_QH, (dscore_QJ,) = mosaic.beside_product(
            [scores, dweights], (dscore_QJ, keys), dq_QH, dscore, like, self.swap_turns
        )
        dscore_QJ = dscore_QJ.astype(self.q_smem.dtype)
        plgpu.barrier_arrive(self.v_ring.free.at[slot])
        plgpu.barrier_arrive(self.k_ring.free.at[before])
        return dq_QH, dscore_QJ

    def past_all_keys(self, w: jax.Array, dq_QH: jax.Array, causal: bool) -> jax.Array:
        if not self.cut.ahead:
            return past_keys(self.take, dq_QH, self.place, self.cut, causal)
        _, dscore_QJ = self.dscore_of(self.place.first, diagonal=causal)
        pl.when(w == 1)(self.swap_turns)
        others = self.place._replace(first=self.place.first + 1)
        dq_QH, dscore_QJ = past_keys(self.take_ahead, (dq_QH, dscore_QJ), others, self.cut, causal)
        pl.when(w == 0)(self.swap_turns)
        return self.add_keys(lax.rem(self.place.end - 1 - self.place.first, self.cut.stages), dq_QH, dscore_QJ)


def _dq_kernel(
    first_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *refs,
    cut: Cut, causal: bool, scale: float, held: Held, k_ring: Ring, v_ring: Ring, turn: Any = None,
):  # fmt: skip
    """`first_ref` (B, queries' blocks): the first block of keys."""
    *documents, dq_ref = refs
    place, w = place_of(first_ref, k_ref.shape[1], cut, causal), lax.axis_index("warpgroup")
    (b, n, i, _, _), warpgroups = place, cut.queries // ROWS
    origin = i * cut.queries + w * ROWS
    mine = pl.ds(origin, ROWS)

    @pl.when(w < warpgroups)
    def _compute() -> None:
        mosaic.take_registers(False, warpgroups)
        of_rows = [mosaic.of_rows(x, (b, n, 0, mine)) for x in (lse_ref, delta_ref)]
        of_rows.append(mosaic.of_rows(documents[0], (b, mine)) if documents else None)
        plgpu.barrier_wait(held.full.at[w])
        own = [block.at[w] for block in held.blocks]
        queries = Queries(*own, *of_rows, origin, place, cut, k_ring, v_ring, turn)
        dq_QH = queries.past_all_keys(w, mosaic.zeros(ROWS, q_ref.shape[3]), causal)
        dq_ref[b, mine, n] = (dq_QH * scale).astype(dq_ref.dtype)

    arrays = (q_ref, dout_ref), (k_ref, *documents[1:]), (v_ref,)
    pl.when(w == warpgroups)(partial(load_past_keys, place, cut, *arrays, held, k_ring, v_ring))
