"""Flash attention: causal attention of whole rows with a gradient, by kernels that see a part of a row at a time.

What it computes is `reference.attention`. Rows longer than a kernel holds are taken in pairs of parts, each with its
log of softmax's denominator, by which the parts' results are put together: as ring attention does between devices.

The kernels are those of flash_attention_tpu.py, flash_attention_triton.py or flash_attention_mosaic.py, whose functions
have the same arguments: the type of the block sizes says which.

Axes: B batch, N query heads, K key and value heads, T positions, H head dim.
"""

from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from k2jax.kernels.flash_attention_tpu import LOG2_E, Documents, Interpret

from k2jax.kernels import flash_attention_tpu as tpu
from k2jax.kernels import flash_attention_triton as triton
from k2jax.kernels import mosaic_block_sizes, triton_block_sizes

BlockSizes = tpu.BlockSizes | triton_block_sizes.BlockSizes | mosaic_block_sizes.BlockSizes


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    document_BT: jax.Array | None = None,
    *,
    sizes: BlockSizes | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """Causal attention (B, T, N, H) in the type of `q`; sums and softmax are float32. Differentiable.

    Args:
        q_BTNH: bfloat16 or float32 (Mosaic's kernels: bfloat16 or float16), as k and v; N is a multiple of K. T is any
            length, H at most 256.
        document_BT: int32; keeps each position within its own document. None: the row is one.
        sizes: of the kernels to take; None takes `default_sizes`.
        interpret: without a TPU or GPU.
    """
    T = q_BTNH.shape[1]
    if sizes is None:
        sizes = default_sizes(T, q_BTNH.shape[3], q_BTNH.dtype)
    padding = -T % (sizes.resident if T > sizes.resident else sizes.unit)
    heads_first = [
        jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH)
    ]
    if document_BT is not None:
        document_BT = jnp.pad(document_BT, ((0, 0), (0, padding)), mode="edge")
    out_BNTH = _attend(*heads_first, document_BT, Options(sizes, interpret))
    return out_BNTH.transpose(0, 2, 1, 3)[:, :T]


def default_sizes(length: int, head_dim: int, dtype: jnp.dtype) -> BlockSizes:
    """Of the table of the devices in use, which may not be here; where they are unknown, such as fit on all."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    itemsize = jnp.dtype(dtype).itemsize
    if kind.startswith("NVIDIA"):
        return triton_block_sizes.block_sizes(kind, head_dim, itemsize)
    return tpu.block_sizes(tpu.GENERATION_OF_KIND.get(kind, "v4"), length, head_dim * itemsize)


def _kernels(sizes: BlockSizes) -> Any:
    if isinstance(sizes, mosaic_block_sizes.BlockSizes):
        from k2jax.kernels import flash_attention_mosaic  # only where asked for: it imports Mosaic GPU

        return flash_attention_mosaic
    return tpu if isinstance(sizes, tpu.BlockSizes) else triton


def forward(*arrays: Any, sizes: BlockSizes, **options: Any) -> tuple[jax.Array, jax.Array]:
    """(out_BNTH, lse_BN1T), as in flash_attention_tpu.py, by the kernel that `sizes` are of."""
    return _kernels(sizes).forward(*arrays, sizes=sizes, **options)


def backward(*arrays: Any, sizes: BlockSizes, **options: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BNTH, dk_BKSH, dv_BKSH), likewise."""
    return _kernels(sizes).backward(*arrays, sizes=sizes, **options)


class Options(NamedTuple):
    """Of the kernels."""

    sizes: BlockSizes
    interpret: Interpret = False


def options_of_chunks(
    length: int, head_dim: int, dtype: jnp.dtype, sizes: BlockSizes | None = None
) -> Options:
    """For chunks of `length` positions, a multiple of LANES, which are not filled up: blocks that divide them."""
    sizes = sizes or default_sizes(length, head_dim, dtype)
    if not isinstance(sizes, tpu.BlockSizes):
        return Options(sizes)  # blocks of the GPUs' tables divide LANES
    blocks = gcd(sizes.forward, length), gcd(sizes.backward, length)
    strips = min(sizes.forward_strip, blocks[0]), min(sizes.backward_strip, blocks[1])
    return Options(tpu.BlockSizes(blocks[0], strips[0], blocks[1], strips[1], sizes.resident))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BNTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, document_BT: jax.Array | None, options: Options
) -> jax.Array:
    return _attend_forward(q_BNTH, k_BKTH, v_BKTH, document_BT, options)[0]


def scaled(q_BNTH: jax.Array) -> jax.Array:
    """So that softmax is one of powers of two of q . k."""
    return (q_BNTH.astype(jnp.float32) * (LOG2_E * q_BNTH.shape[-1] ** -0.5)).astype(q_BNTH.dtype)


def _attend_forward(
    q_BNTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, document_BT: jax.Array | None, options: Options
) -> tuple[jax.Array, tuple]:
    documents, dtype = document_BT if document_BT is None else (document_BT, document_BT), q_BNTH.dtype
    arrays = scaled(q_BNTH), k_BKTH, v_BKTH, documents
    out_BNTH, lse_BN1T = forward_by_parts(*arrays, causal=True, options=options, out_dtype=dtype)
    out_BNTH, lse_BN1T = checkpoint_name(out_BNTH, "attention"), checkpoint_name(lse_BN1T, "attention_sums")
    return out_BNTH, (q_BNTH, k_BKTH, v_BKTH, document_BT, out_BNTH, lse_BN1T)


def forward_by_parts(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    *, causal: bool, options: Options, out_dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`forward` of any number of positions that is a multiple of the block."""
    parts, parts_of_keys = _parts(q_BNTH.shape[2], options.sizes), _parts(k_BKSH.shape[2], options.sizes)
    run = partial(forward, sizes=options.sizes, interpret=options.interpret)
    run = partial(run, out_dtype=out_dtype if len(parts_of_keys) == 1 else jnp.float32)
    outs, lses = [], []
    for i, rows in enumerate(parts):
        found = []
        for keys in parts_of_keys[: i + 1] if causal else parts_of_keys:
            own = None if documents is None else (documents[0][:, rows], documents[1][:, keys])
            arrays = q_BNTH[:, :, rows], k_BKSH[:, :, keys], v_BKSH[:, :, keys], own
            found.append(run(*arrays, causal=causal and keys == rows))
        out, lse = found[0] if len(found) == 1 else merge(found)
        outs.append(out.astype(out_dtype))
        lses.append(lse)
    return jnp.concatenate(outs, axis=2), jnp.concatenate(lses, axis=3)


def merge(found: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """(out_BNTH, lse_BN1T) over all keys, of those over some of them each."""
    lses = jnp.stack([lse for _, lse in found])
    lse_BN1T = jnp.log2(jnp.exp2(lses - lses.max(axis=0)).sum(axis=0)) + lses.max(axis=0)
    shares = [jnp.exp2(lse - lse_BN1T).swapaxes(2, 3) for _, lse in found]
    return sum(out * share for (out, _), share in zip(found, shares, strict=True)), lse_BN1T


def _attend_backward(options: Options, saved: tuple, dout_BNTH: jax.Array) -> tuple:
    q_BNTH, k_BKTH, v_BKTH, document_BT, out_BNTH, lse_BN1T = saved
    documents = document_BT if document_BT is None else (document_BT, document_BT)
    delta_BN1T = (dout_BNTH.astype(jnp.float32) * out_BNTH.astype(jnp.float32)).sum(axis=-1)[:, :, None]
    arrays = scaled(q_BNTH), k_BKTH, v_BKTH, documents, lse_BN1T, delta_BN1T, dout_BNTH
    return *backward_by_parts(*arrays, causal=True, options=options, out_dtype=q_BNTH.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def backward_by_parts(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, documents: Documents,
    lse_BN1T: jax.Array, delta_BN1T: jax.Array, dout_BNTH: jax.Array,
    *, causal: bool, options: Options, out_dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`backward` of any number of positions that is a multiple of the block."""
    parts, parts_of_keys = _parts(q_BNTH.shape[2], options.sizes), _parts(k_BKSH.shape[2], options.sizes)
    run = partial(backward, sizes=options.sizes, interpret=options.interpret)
    run = partial(run, out_dtype=out_dtype if len(parts) == len(parts_of_keys) == 1 else jnp.float32)
    dqs, dks, dvs = [0] * len(parts), [0] * len(parts_of_keys), [0] * len(parts_of_keys)
    for i, rows in enumerate(parts):
        for j, keys in enumerate(parts_of_keys[: i + 1] if causal else parts_of_keys):
            own = None if documents is None else (documents[0][:, rows], documents[1][:, keys])
            of_rows = lse_BN1T[..., rows], delta_BN1T[..., rows], dout_BNTH[:, :, rows]
            arrays = q_BNTH[:, :, rows], k_BKSH[:, :, keys], v_BKSH[:, :, keys], own, *of_rows
            dq, dk, dv = run(*arrays, causal=causal and i == j)
            dqs[i], dks[j], dvs[j] = dqs[i] + dq, dks[j] + dk, dvs[j] + dv
    return tuple(jnp.concatenate(d, axis=2).astype(out_dtype) for d in (dqs, dks, dvs))


def _parts(length: int, sizes: BlockSizes) -> list[slice]:
    step = min(length, sizes.resident)
    return [slice(first, first + step) for first in range(0, length, step)]
