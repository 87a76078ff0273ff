"""Flash attention for TPU of heads that lie side by side, with RoPE within: as the products around it write and read.

The kernels of flash_attention_tpu.py take (B, N, T, H): XLA transposes q, k, v and their gradients for them, turns q
and k in three passes over memory, and on v6e reads the output projection's input at half the matrix unit's rate. Here a
block of a head is cut out of (B, T, N H) by the kernel's own transfers, which a head dim of whole lanes allows; q and k
are turned in VMEM, once a row, and their gradients turned back; delta is computed there as well. The arithmetic between
is that file's.

Axes: B batch, N query heads, K key and value heads, T positions, H head dim, E = N H or K H; Q block of queries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from k2jax.kernels.flash_attention_tpu import LANES, LOG2_E, MASKED, BlockSizes, Interpret

from k2jax.kernels import flash_attention_tpu as tpu

ROWS = 256  # turned at a time: a loop's turn and not the whole row's instructions


class Options(NamedTuple):
    head_dim: int
    sizes: BlockSizes
    interpret: Interpret = False


def takes(head_dim: int, length: int, sizes: BlockSizes) -> bool:
    """Whole lanes, and rows that are in VMEM at once: half as long as plain kernels hold, for angles and what is turned
    lie beside what it was."""
    return head_dim % LANES == 0 and length <= sizes.resident // 2


def turned_attention(
    q_BTE: jax.Array,
    k_BTE: jax.Array,
    v_BTE: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    document_BT: jax.Array | None = None,
    *,
    head_dim: int,
    sizes: BlockSizes,
    interpret: Interpret = False,
) -> jax.Array:
    """Causal attention of turned q and k, (B, T, N H) in the type of `q`; sums, softmax and turns are float32.

    Differentiable in q, k and v.

    Args:
        q_BTE: bfloat16 or float32, not turned, as k and v, whose heads' number divides that of q's. T is any length
            that `takes` allows.
        rope: (cos, sin), float32 (T, H/2), or (B, T, H/2) where rows have positions of their own. Pairs are
            (i, i + H/2).
        document_BT: int32; keeps each position within its own document. None: the row is one.
        interpret: without a TPU.
    """
    T = q_BTE.shape[1]
    padding = -T % sizes.unit
    q_BTE, k_BTE, v_BTE = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) for x in (q_BTE, k_BTE, v_BTE))
    if document_BT is not None:
        document_BT = jnp.pad(document_BT, ((0, 0), (0, padding)), mode="edge")
    cos, sin = (x if x.ndim == 3 else x[None] for x in rope)
    turns = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    turns = tuple(jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding), (0, 0))) for x in turns)
    return _attend(q_BTE, k_BTE, v_BTE, turns, document_BT, Options(head_dim, sizes, interpret))[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q_BTE: jax.Array, k_BTE: jax.Array, v_BTE: jax.Array, turns: tuple, document_BT: jax.Array | None, options: Options
) -> jax.Array:
    return _attend_forward(q_BTE, k_BTE, v_BTE, turns, document_BT, options)[0]


def _attend_forward(
    q_BTE: jax.Array, k_BTE: jax.Array, v_BTE: jax.Array, turns: tuple, document_BT: jax.Array | None, options: Options
) -> tuple[jax.Array, tuple]:
    out_BTE, lse_BN1T = forward(q_BTE, k_BTE, v_BTE, turns, document_BT, options)
    out_BTE, lse_BN1T = checkpoint_name(out_BTE, "attention"), checkpoint_name(lse_BN1T, "attention_sums")
    return out_BTE, (q_BTE, k_BTE, v_BTE, turns, document_BT, out_BTE, lse_BN1T)


def _attend_backward(options: Options, saved: tuple, dout_BTE: jax.Array) -> tuple:
    return *backward(*saved, dout_BTE, options), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _turn(x_QH: jax.Array, cos_QH: jax.Array, sin_QH: jax.Array) -> jax.Array:
    """float32. Turned back by -sin."""
    x_QH = x_QH.astype(jnp.float32)
    return x_QH * cos_QH + pltpu.roll(x_QH, x_QH.shape[1] // 2, 1) * sin_QH


def turns(length: int) -> int:
    """In how many parts a row is turned."""
    return length // (ROWS if length % ROWS == 0 else LANES)


def _by_rows(length: int, take: Callable[[Any], None]) -> None:
    """`take(rows)` of each of a row's parts."""
    step = length // turns(length)
    lax.fori_loop(0, turns(length), lambda r, _: take(pl.ds(pl.multiple_of(r * step, step), step)), None)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward_kernel(
    first_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, *refs, block: int, **options
):
    *refs, q_turned_ref, k_turned_ref = refs
    i, factor = pl.program_id(2), LOG2_E * q_ref.shape[1] ** -0.5

    @pl.when(i == 0)
    def _():
        def take(rows: Any) -> None:
            k_turned_ref[rows, :] = _turn(k_ref[rows, :], cos_ref[rows, :], sin_ref[rows, :]).astype(k_ref.dtype)

        _by_rows(k_ref.shape[0], take)

    rows = pl.ds(pl.multiple_of(i * block, block), block)
    q_turned_ref[...] = (_turn(q_ref[...], cos_ref[rows, :], sin_ref[rows, :]) * factor).astype(q_ref.dtype)
    tpu._forward_kernel(first_ref, q_turned_ref, k_turned_ref, v_ref, *refs, block=block, causal=True, **options)


def forward(
    q_BTE: jax.Array, k_BTE: jax.Array, v_BTE: jax.Array, turns: tuple[jax.Array, jax.Array],
    document_BT: jax.Array | None, options: Options,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out_BTE, lse_BN1T float32), lse as in flash_attention_tpu.py; T is a multiple of the block.

    `turns`: (cos, cos) and (-sin, sin), float32 (1 or B, T, H).
    """
    B, T, E = q_BTE.shape
    H, sizes, masked = options.head_dim, options.sizes, document_BT is not None
    N, K, block = E // H, k_BTE.shape[2] // H, sizes.forward
    G, documents = N // K, (document_BT, document_BT) if masked else None
    first_BI, _ = tpu._visible(documents, (B, T, T), block)
    queries = pl.BlockSpec((None, block, H), lambda b, n, i, _: (b, i, n))
    keys = pl.BlockSpec((None, T, H), lambda b, n, i, _: (b, 0, lax.div(n, G)))
    ids = [
        pl.BlockSpec((None, 1, block), lambda b, n, i, _: (b, 0, i)),
        pl.BlockSpec((None, 1, T), lambda b, n, i, _: (b, 0, 0)),
    ]
    state = pltpu.VMEM((block, LANES), jnp.float32)
    return pl.pallas_call(
        partial(_forward_kernel, block=block, strip=sizes.forward_strip, masked=masked),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, T // block),
            in_specs=[queries, keys, keys, *_of_turns(turns), *(ids if masked else [])],
            out_specs=[queries, pl.BlockSpec((None, None, 1, block), lambda b, n, i, _: (b, n, 0, i))],
            scratch_shapes=[
                state,
                state,
                pltpu.VMEM((block, H), jnp.float32),
                pltpu.VMEM((block, H), q_BTE.dtype),
                pltpu.VMEM((T, H), k_BTE.dtype),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BTE.shape, q_BTE.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        compiler_params=tpu.COMPILER_PARAMS,
        name="flash_attention_forward_turned",
        interpret=options.interpret,
    )(first_BI, q_BTE, k_BTE, v_BTE, *turns, *([document_BT[:, None]] * 2 if masked else []))


def _of_turns(turns: tuple[jax.Array, jax.Array]) -> list[pl.BlockSpec]:
    own = turns[0].shape[0] > 1
    return [pl.BlockSpec((None, *turns[0].shape[1:]), lambda b, *_: (b if own else 0, 0, 0))] * 2


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward_kernel(
    last_ref, q_ref, out_ref, dout_ref, lse_ref, k_ref, v_ref, cos_ref, sin_ref, *refs, block: int, **options
):
    *refs, dq_ref, dk_ref, dv_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref, delta_ref, q_turned_ref, k_turned_ref = refs
    j, T = pl.program_id(2), q_ref.shape[0]
    factor = LOG2_E * options["scale"]

    @pl.when(j == 0)
    def _():
        def take(rows: Any) -> None:
            q_turned = _turn(q_ref[rows, :], cos_ref[rows, :], sin_ref[rows, :]) * factor
            q_turned_ref[rows, :] = q_turned.astype(q_ref.dtype)
            shares = dout_ref[rows, :].astype(jnp.float32) * out_ref[rows, :].astype(jnp.float32)
            delta_ref[:, rows] = shares.T.sum(axis=0, keepdims=True)

        _by_rows(T, take)

    own = pl.ds(pl.multiple_of(j * block, block), block)
    k_turned_ref[...] = _turn(k_ref[...], cos_ref[own, :], sin_ref[own, :]).astype(k_ref.dtype)
    arrays = q_turned_ref, dout_ref, lse_ref, delta_ref, k_turned_ref, v_ref, *refs
    sums = dq_acc_ref, dk_acc_ref, dv_ref, dq_acc_ref, dk_acc_ref, dv_acc_ref  # dq and dk stay where they are summed
    tpu._backward_kernel(last_ref, *arrays, *sums, block=block, causal=True, **options)
    dk_ref[...] = _turn(dk_acc_ref[...], cos_ref[own, :], -sin_ref[own, :]).astype(dk_ref.dtype)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        def take(rows: Any) -> None:
            dq_ref[rows, :] = _turn(dq_acc_ref[rows, :], cos_ref[rows, :], -sin_ref[rows, :]).astype(dq_ref.dtype)

        _by_rows(T, take)


def backward(
    q_BTE: jax.Array, k_BTE: jax.Array, v_BTE: jax.Array, turns: tuple[jax.Array, jax.Array],
    document_BT: jax.Array | None, out_BTE: jax.Array, lse_BN1T: jax.Array, dout_BTE: jax.Array, options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(dq_BTE, dk_BTE, dv_BTE) by q and k as they were before they were turned; arguments as in `forward`."""
    B, T, E = q_BTE.shape
    H, sizes, masked = options.head_dim, options.sizes, document_BT is not None
    N, K, block = E // H, k_BTE.shape[2] // H, sizes.backward
    G, documents = N // K, (document_BT, document_BT) if masked else None
    _, last_BJ = tpu._visible(documents, (B, T, T), block)
    whole = pl.BlockSpec((None, T, H), lambda b, n, j, _: (b, 0, n))
    keys = pl.BlockSpec((None, block, H), lambda b, n, j, _: (b, j, lax.div(n, G)))
    # A kernel's grid step is of one query head: dk and dv of those that share keys are added up after.
    own_keys = pl.BlockSpec((None, None, block, H), lambda b, n, j, _: (lax.rem(n, G), b, j, lax.div(n, G)))
    dkeys = jax.ShapeDtypeStruct((G, *k_BTE.shape), k_BTE.dtype if G == 1 else jnp.float32)
    ids = [
        pl.BlockSpec((None, 1, T), lambda b, n, j, _: (b, 0, 0)),
        pl.BlockSpec((None, 1, block), lambda b, n, j, _: (b, 0, j)),
    ]
    row = pl.BlockSpec((None, None, 1, T), lambda b, n, j, _: (b, n, 0, 0))
    part = pltpu.VMEM((block, H), jnp.float32)
    lse_BN1T = jnp.where(lse_BN1T > MASKED / 2, lse_BN1T, -MASKED)  # so that weights are 0 where no key is seen
    dq_BTE, dk_GBTE, dv_GBTE = pl.pallas_call(
        partial(_backward_kernel, block=block, strip=sizes.backward_strip, masked=masked, scale=H**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, N, T // block),
            in_specs=[whole, whole, whole, row, keys, keys, *_of_turns(turns), *(ids if masked else [])],
            out_specs=[whole, own_keys, own_keys],
            scratch_shapes=[
                pltpu.VMEM((T, H), jnp.float32),
                part,
                part,
                pltpu.VMEM((1, T), jnp.float32),
                pltpu.VMEM((T, H), q_BTE.dtype),
                pltpu.VMEM((block, H), k_BTE.dtype),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q_BTE.shape, q_BTE.dtype), dkeys, dkeys],
        compiler_params=tpu.COMPILER_PARAMS,
        name="flash_attention_backward_turned",
        interpret=options.interpret,
    )(
        last_BJ, q_BTE, out_BTE, dout_BTE, lse_BN1T, k_BTE, v_BTE, *turns,
        *([document_BT[:, None]] * 2 if masked else []),
    )  # fmt: skip
    return dq_BTE, *(x[0] if G == 1 else x.sum(axis=0).astype(k_BTE.dtype) for x in (dk_GBTE, dv_GBTE))
