"""The gradients of keys and values of flash_attention_mosaic.py: the kernel by blocks of keys.

Scores are transposed, keys by queries, so that weights are a left operand as they are. dk and dv are summed over the
query heads that share them, in the order of heads and positions: a step that is run again gives the same bits.

Axes: B batch, K key and value heads, G query heads of each, T queries, S keys, H head dim; Q block of queries, J a
warpgroup's rows of the block of keys.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from k2jax.kernels.flash_attention_tpu import LOG2_E, Documents
from k2jax.kernels.flash_attention_triton import visible_blocks
from k2jax.kernels.mosaic_block_sizes import ROWS, BlockSizes, Cut
from k2jax.kernels.mosaic_blocks import Held, Ring

from k2jax.kernels import mosaic_blocks as mosaic


def dkv(
    arrays: tuple, documents: Documents, sizes: BlockSizes, causal: bool, out_dtype: jnp.dtype, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """(dk_BSKH, dv_BSKH) of `arrays`: q_BTNH, dout_BTNH, lse_BN1T, delta_BN1T, k_BSKH and v_BSKH."""
    q_BTNH, k_BSKH, cut = arrays[0], arrays[4], sizes.dkv
    (B, S, K, H), dtype = k_BSKH.shape, q_BTNH.dtype
    _, last_BJ = visible_blocks(documents, (B, q_BTNH.shape[1], S), cut)
    parts, ids = cut.keys // ROWS, [jnp.int32] if documents else []
    warpgroups = 2 if sizes.apart else parts
    ring = partial(mosaic.ring_type, cut.stages, warpgroups, (cut.queries, H), dtype, jnp.float32)
    scratch = {"held": mosaic.held_type(parts, 2, H, dtype), "q_ring": ring(*ids), "dout_ring": ring()}
    kernel, grid = partial(_dkv_kernel, cut=cut, causal=causal, apart=sizes.apart), {"b": B, "k": K, "j": S // cut.keys}
    out = [jax.ShapeDtypeStruct(k_BSKH.shape, out_dtype)] * 2
    run = mosaic.program(kernel, "dkv", grid, warpgroups, out, scratch, interpret)
    return tuple(run(last_BJ, *arrays, *(documents[::-1] if documents else ())))


class Place(NamedTuple):
    """Of a program: row, head, block of keys; blocks of queries: the first that sees it, the last + 1, the first that
    sees all of it."""

    b: jax.Array
    kv: jax.Array
    j: jax.Array
    first: jax.Array | int
    end: jax.Array
    whole: jax.Array | int


def _dkv_kernel(
    last_ref, q_ref, dout_ref, lse_ref, delta_ref, k_ref, v_ref, *refs,
    cut: Cut, causal: bool, apart: bool, held: Held, q_ring: Ring, dout_ring: Ring,
):  # fmt: skip
    """One block of keys past the queries that see it, of all heads that share it.

    `last_ref` (B, keys' blocks): the last block of queries + 1. `documents`: the keys', the queries'. `apart`: two
    warpgroups have the same keys, the first sums dv, the second dk.
    """
    *documents, dk_ref, dv_ref = refs
    b, kv, j, w = (lax.axis_index(axis) for axis in ("b", "k", "j", "warpgroup"))
    first = lax.div(j * cut.keys, cut.queries) if causal else 0
    whole = lax.div((j + 1) * cut.keys + cut.queries - 2, cut.queries) if causal else 0
    place = Place(b, kv, j, first, jnp.maximum(last_ref[b, j], first), whole)
    warpgroups, part = (2, 0) if apart else (cut.keys // ROWS, w)  # `part` of the block of keys
    origin = j * cut.keys + part * ROWS
    mine, G = pl.ds(origin, ROWS), q_ref.shape[2] // k_ref.shape[2]

    def compute(*names: str) -> None:
        mosaic.take_registers(False, warpgroups)
        document_J = mosaic.of_rows(documents[0], (b, mine)) if documents else None
        plgpu.barrier_wait(held.full.at[part])
        blocks = [block.at[part] for block in held.blocks]
        take = partial(_dkv_of_block, place, cut, origin, document_J, blocks, q_ring, dout_ring)

        def of_head(g: jax.Array, sums: dict) -> dict:
            start = place.first
            if causal:
                start = jnp.minimum(whole, place.end)
                sums = lax.fori_loop(place.first, start, partial(take, g=g, diagonal=True), sums)
            return lax.fori_loop(start, place.end, partial(take, g=g, diagonal=False), sums)

        sums = lax.fori_loop(0, G, of_head, {name: mosaic.zeros(ROWS, k_ref.shape[3]) for name in names})
        if "dk" in sums:
            dk_ref[b, mine, kv] = (sums["dk"] * (1 / LOG2_E)).astype(dk_ref.dtype)  # q holds scale * log2(e)
        if "dv" in sums:
            dv_ref[b, mine, kv] = sums["dv"].astype(dv_ref.dtype)

    if apart:
        pl.when(w == 0)(partial(compute, "dv"))
        pl.when(w == 1)(partial(compute, "dk"))
    else:
        pl.when(w < warpgroups)(partial(compute, "dk", "dv"))
    queries = (q_ref, lse_ref, *documents[1:]), (dout_ref, delta_ref)
    pl.when(w == warpgroups)(
        partial(_load_past_queries, place, cut, G, warpgroups, *queries, (k_ref, v_ref), held, q_ring, dout_ring)
    )


def _load_past_queries(
    place: Place, cut: Cut, G: int, warpgroups: int, queries: tuple, douts: tuple, own: tuple,
    held: Held, q_ring: Ring, dout_ring: Ring,
) -> None:  # fmt: skip
    """The loading warpgroup: keys and values (`own`), then what is by queries, head by head."""
    mosaic.take_registers(True, warpgroups)
    b, kv, j, first, end, _ = place
    for part in range(cut.keys // ROWS):
        rows = pl.ds(j * cut.keys + part * ROWS, ROWS)
        mosaic.hold(held, part, *(x.at[b, rows, kv] for x in own))

    @pl.loop(0, G)
    def _send_head(g: jax.Array) -> None:
        n = kv * G + g

        @pl.loop(first, end)
        def _send_block(i: jax.Array) -> None:
            rows, step = pl.ds(i * cut.queries, cut.queries), g * (end - first) + i - first
            q_ref, lse_ref, *document_ref = queries
            ids = [x.at[b, rows] for x in document_ref]
            mosaic.send(q_ring, step, q_ref.at[b, rows, n], lse_ref.at[b, n, 0, rows], *ids)
            mosaic.send(dout_ring, step, douts[0].at[b, rows, n], douts[1].at[b, n, 0, rows])


def _dkv_of_block(
    place: Place, cut: Cut, origin: jax.Array, document_J: jax.Array | None, own: list, q_ring: Ring, dout_ring: Ring,
    i: jax.Array, sums: dict, *, g: jax.Array, diagonal: bool,
) -> dict:  # fmt: skip
    """`sums`, of dk or dv or both, and what the i-th block of queries of the g-th head adds to them."""
    (k_smem, v_smem), (q_smem, lse_smem, *q_document), (dout_smem, delta_smem) = own, q_ring.blocks, dout_ring.blocks
    step, sums = g * (place.end - place.first) + i - place.first, dict(sums)
    slot = mosaic.receive(q_ring, step)
    mosaic.receive(dout_ring, step)

    def weigh(score_JQ: jax.Array) -> jax.Array:
        documents = None if document_J is None else (document_J, mosaic.of_columns(q_document[0], slot))
        score_JQ = mosaic.masked(score_JQ, documents, (origin, i * cut.queries) if diagonal else None, query_axis=1)
        return jnp.exp2(score_JQ - mosaic.along(mosaic.of_columns(lse_smem, slot), score_JQ.shape, 1))

    scores = k_smem, mosaic.turned(q_smem.at[slot])
    if "dk" in sums:
        weight_JQ, dweight_JQ = mosaic.weights_and_product(scores, (v_smem, mosaic.turned(dout_smem.at[slot])), weigh)
    else:
        weight_JQ = weigh(mosaic.product(*scores))
    of_dv = weight_JQ.astype(dout_smem.dtype), dout_smem.at[slot]
    if "dv" in sums and not cut.ahead:
        sums["dv"] = mosaic.added(sums["dv"], *of_dv)
    if "dk" in sums:
        dscore_JQ = weight_JQ * (dweight_JQ - mosaic.along(mosaic.of_columns(delta_smem, slot), weight_JQ.shape, 1))
    if cut.ahead:
        of_dk = dscore_JQ.astype(q_smem.dtype), q_smem.at[slot]
        sums["dv"], sums["dk"] = mosaic.all_added((sums["dv"], *of_dv), (sums["dk"], *of_dk))
    plgpu.barrier_arrive(dout_ring.free.at[slot])
    if "dk" in sums and not cut.ahead:
        sums["dk"] = mosaic.added(sums["dk"], dscore_JQ.astype(q_smem.dtype), q_smem.at[slot])
    plgpu.barrier_arrive(q_ring.free.at[slot])
    return sums
