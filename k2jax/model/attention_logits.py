"""The largest attention logit of every head: what grows before attention collapses to one position.

Kernels never hold the logits as a whole, so this is a forward pass of its own, without gradients, on a few rows.
Axes as in decoder.py; G = N/K; C and S positions of a block of queries and of keys.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from k2jax.model import conversations
from k2jax.model.attention import MASKED, attend_causally
from k2jax.model.decoder import Block, Decoder, Params, dense, document_ids, rope_of
from k2jax.parallel import context, fsdp, sharding
from k2jax.parallel.sharding import num_stages, shard

BLOCK = 512  # queries, and keys, whose logits a device holds at a time


def attention_logits(
    config: ConfigDict,
    params: Params,
    tokens: jax.Array,
    *,
    rope_base: float,
    eos_id: int,
    compute_dtype: jnp.dtype,
    marks: jax.Array | None = None,
    reset_positions: bool = False,
) -> jax.Array:
    """(L, N) float32: the maximum over positions of the scaled product of a query and a key that it sees.

    Of one row of the first microbatch of `tokens` (A, R, T+1) on each device that has rows of its own. Padding of
    conversations, which have `marks`, does not count.
    """
    mesh, m = jax.sharding.get_abstract_mesh(), config.model
    parts = 1 if mesh.empty else sharding.row_parts(mesh) * num_stages()
    end = -1 if config.data.label_shift == "next" else None

    def inputs(x: jax.Array) -> jax.Array:
        return x[0].reshape(parts, -1, x.shape[-1])[:, 0][:, :end]

    inputs_BT, position_BT = inputs(tokens), None
    masked = m.mask_documents or marks is not None
    if marks is not None:
        document_BT = conversations.documents(inputs(marks))
        position_BT = conversations.positions(document_BT) if reset_positions else None
    else:
        document_BT = document_ids(inputs_BT, eos_id) if masked else jnp.zeros_like(inputs_BT)
    rows = inputs_BT, document_BT, position_BT
    inputs_BT, document_BT, position_BT = jax.tree.map(lambda x: shard(context.in_order(x, 1), "tokens_BT"), rows)
    place_T = context.in_order(jnp.arange(inputs_BT.shape[1]), 0)
    rope = rope_of(m, rope_base, inputs_BT.shape[1], position_BT)
    decoder, rings = Decoder(m, params, compute_dtype), tuple(m.rings)
    x_BTD = shard(fsdp.lookup(decoder.embed_VD[...], inputs_BT, compute_dtype, rings), "x_BTD")
    product = partial(dense, rings=rings, products=config.precision.products)

    def layers(x_BTD: jax.Array, stacked: Params, rope: tuple, document_BT: jax.Array, place_T: jax.Array) -> tuple:
        length = inputs_BT.shape[1]
        counted_BT = jnp.where(document_BT > length, -1, document_BT)  # padding, as conversations.documents numbers it
        def layer(x_BTD: jax.Array, arrays: Params) -> tuple[jax.Array, jax.Array]:
            found = []

            def attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
                found.append(largest(q_BTNH, k_BTKH, counted_BT, place_T))
                own_BT = document_BT if masked else None
                return attend_causally(q_BTNH, k_BTKH, v_BTKH, own_BT, m.attention.implementation)

            return Block(m, arrays)(x_BTD, rope, attend, product), found[0]

        return jax.lax.scan(layer, x_BTD, stacked)

    if num_stages() > 1:
        return _over_stages(layers)(x_BTD, decoder.layers, rope, document_BT, place_T)
    return layers(x_BTD, decoder.layers, rope, document_BT, place_T)[1]


def _over_stages(layers: Callable) -> Callable:
    """All rows at once from stage to stage: in turn t stage t has them, and what the others compute is dropped."""

    def on_stage(x_BTD: jax.Array, *arrays: jax.Array) -> jax.Array:
        stages = jax.lax.axis_size("stage")

        def turn(x_BTD: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
            x_BTD, logit_LN = layers(x_BTD, *arrays)
            ring = [(stage, (stage + 1) % stages) for stage in range(stages)]
            return shard(jax.lax.ppermute(x_BTD, "stage", ring), "x_BTD"), logit_LN

        return jax.lax.scan(turn, x_BTD, jnp.arange(stages))[1][jax.lax.axis_index("stage")]

    all_of_it, own = PartitionSpec(), PartitionSpec("stage")
    specs = all_of_it, own, all_of_it, all_of_it, all_of_it
    return jax.shard_map(on_stage, in_specs=specs, out_specs=own, axis_names={"stage"}, check_vma=False)


def largest(q_BTNH: jax.Array, k_BTKH: jax.Array, document_BT: jax.Array, place_T: jax.Array) -> jax.Array:
    """(N,) float32, over all rows; `place_T` says where in a row a position is. Documents below 0 see nothing."""
    heads = fsdp.rows(fsdp.TENSOR)
    here = partial(_largest, axes=fsdp.reading())
    specs = heads, heads, fsdp.tokens_spec(), PartitionSpec("context")
    return fsdp.on_each_device(here, specs, PartitionSpec(fsdp.TENSOR))(q_BTNH, k_BTKH, document_BT, place_T)


def _largest(
    q_BTNH: jax.Array, k_BTKH: jax.Array, document_BT: jax.Array, place_T: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    keys = k_BTKH, document_BT, place_T
    if context.size() > 1:
        keys = [jax.lax.all_gather(x, "context", axis=x.ndim > 1, tiled=True) for x in keys]
    queries = (q_BTNH * H**-0.5).reshape(B, T, k_BTKH.shape[2], -1, H), document_BT, place_T
    queries, keys = (tuple(_blocks(x, axis=x.ndim > 1) for x in arrays) for arrays in (queries, keys))

    def of_queries(block: tuple) -> jax.Array:
        q_BCKGH, document_BC, place_C = block

        def of_keys(block: tuple) -> jax.Array:
            k_BSKH, document_BS, place_S = block
            att_BKGCS = jnp.einsum("BCKGH,BSKH->BKGCS", q_BCKGH, k_BSKH, preferred_element_type=jnp.float32)
            sees_BCS = (document_BC[:, :, None] == document_BS[:, None]) & (place_C[:, None] >= place_S)
            sees_BCS &= document_BC[:, :, None] >= 0
            return jnp.where(sees_BCS[:, None, None], att_BKGCS, MASKED).max(axis=(0, 3, 4))

        return jax.lax.map(of_keys, keys).max(axis=0)

    return fsdp.largest(jax.lax.map(of_queries, queries).max(axis=0).reshape(N), axes)


def _blocks(x: jax.Array, axis: int) -> jax.Array:
    """Cut along an axis of positions, the blocks first."""
    axis = int(axis)
    size = math.gcd(x.shape[axis], BLOCK)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)
