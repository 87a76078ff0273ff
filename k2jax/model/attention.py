"""Attention: the one place that picks how it is computed.

Axes: B batch, T query positions, S key positions, N query heads, K key and value heads, G = N/K, H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name as kept
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from k2jax.errors import ConfigError
from k2jax.keys import ATTENTION_SUMS
from k2jax.parallel import context, sharding

MASKED = -1e30  # finite, so that a row with every key masked gives numbers and not NaN
MAX_BLOCKS, LEAST_QUERIES = 8, 64  # blocks of queries, each of at least this many where there are more than one

_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_causally(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    document_BT: jax.Array | None = None,
    implementation: str = "jnp",
) -> jax.Array:
    """Causal softmax attention of whole rows, softmax in float32; returns (B, T, N, H) in the type of `q`.

    Where devices share rows (mesh axis context), positions are in the order of `context.in_order`, and it is ring
    attention by the same implementation.

    Args:
        document_BT: int32; keeps each position within its own document. None lets it see the whole row.
        implementation: "jnp" anywhere; "flash", our kernels, on TPUs and NVIDIA GPUs since Ampere; "cudnn", NVIDIA's,
            on the same GPUs for bfloat16 without documents; "mosaic", our kernels for Hopper GPUs, in 16-bit numbers.
            "auto": flash on TPUs; on GPUs the fastest that can, as one H200 had it: cudnn, then on Hopper and for whole
            rows mosaic (documents), then flash (tools/bench/gpu_suite.py measures them); jnp elsewhere.
    Raises ConfigError for one that cannot run here or not do this.
    """
    platform = sharding.kernel_platform()
    refused = _cudnn_refuses(platform, q_BTNH, document_BT)
    if implementation == "auto":
        implementation = {"tpu": "flash", "gpu": _best_on_gpu(q_BTNH, refused)}.get(platform, "jnp")
    if implementation == "flash" and platform not in ("tpu", "gpu"):
        raise ConfigError(
            f"model.attention.implementation='flash' runs on TPUs and NVIDIA GPUs since Ampere, this is {platform}: "
            f"take 'jnp'"
        )
    if implementation == "flash" and q_BTNH.shape[3] > 256:
        raise ConfigError("model.attention.implementation='flash' takes a model.head_dim of 256 at most: take 'jnp'")
    if implementation == "cudnn" and refused:
        raise ConfigError(f"model.attention.implementation='cudnn' {refused}")
    if implementation == "mosaic" and (refused := _mosaic_refuses(q_BTNH)):
        raise ConfigError(f"model.attention.implementation='mosaic' {refused}")
    if context.size() > 1:
        ring = _ring(implementation, q_BTNH)
        return _on_each_device(ring, q_BTNH, k_BTKH, v_BTKH, document_BT, jnp.arange(context.size()))
    if implementation == "jnp":
        return _attend_by_blocks(q_BTNH, k_BTKH, v_BTKH, document_BT)
    if implementation == "cudnn":
        attend = _attend_by_cudnn
    else:
        from k2jax.kernels.flash_attention import flash_attention as attend  # Pallas takes a second to import
    if implementation == "mosaic":
        attend = partial(attend, sizes=_mosaic_sizes(q_BTNH))
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q_BTNH, k_BTKH, v_BTKH, document_BT)
    return _on_each_device(attend, q_BTNH, k_BTKH, v_BTKH, document_BT)


def turns_heads(m: ConfigDict, length: int, dtype: jnp.dtype) -> bool:
    """Whether rows of the model section `m` go through `attend_turned`: on TPUs, heads of whole lanes and no norm of
    each, rows that one device has to itself and its kernel's memory holds."""
    implementation = m.attention.implementation
    if sharding.kernel_platform() != "tpu" or implementation not in ("auto", "flash") or context.size() > 1:
        return False
    if m.qk_norm and not m.qk_norm_whole:
        return False
    from k2jax.kernels import flash_attention, flash_attention_turned

    sizes = flash_attention.default_sizes(length, m.head_dim, dtype)
    return flash_attention_turned.takes(m.head_dim, length, sizes)


def attend_turned(
    q_BTE: jax.Array,
    k_BTE: jax.Array,
    v_BTE: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    document_BT: jax.Array | None,
    head_dim: int,
    interpret: bool = False,
) -> jax.Array:
    """`attend_causally` of q and k turned by `rope`, rows of decoder.rope_table; heads lie side by side, E = N H.

    Where `turns_heads` says so; `interpret`: without a TPU.
    """
    from k2jax.kernels import flash_attention
    from k2jax.kernels.flash_attention_turned import turned_attention

    sizes = flash_attention.default_sizes(q_BTE.shape[1], head_dim, q_BTE.dtype)

    def attend(q_BTE: jax.Array, k_BTE: jax.Array, v_BTE: jax.Array, document_BT: jax.Array, *rope: Any) -> jax.Array:
        options = {"head_dim": head_dim, "sizes": sizes, "interpret": interpret}
        return turned_attention(q_BTE, k_BTE, v_BTE, rope, document_BT, **options)

    if jax.sharding.get_abstract_mesh().empty:
        return attend(q_BTE, k_BTE, v_BTE, document_BT, *rope)
    heads, tokens = (sharding.spec(sharding.ACTIVATIONS[name]) for name in ("q_BTE", "tokens_BT"))
    specs = heads, heads, heads, tokens, *[tokens if rope[0].ndim == 3 else PartitionSpec()] * 2
    mapped = jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(q_BTE, k_BTE, v_BTE, document_BT, *rope)


def _best_on_gpu(q_BTNH: jax.Array, cudnn_refuses: str | None) -> str:
    if not cudnn_refuses:
        return "cudnn"
    # Ring attention by mosaic was not measured.
    return "flash" if context.size() > 1 or _mosaic_refuses(q_BTNH) else "mosaic"


def _attend_by_cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: None) -> jax.Array:
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")


def _cudnn_refuses(platform: str, q_BTNH: jax.Array, document_BT: jax.Array | None) -> str | None:
    """What cuDNN's attention, as JAX 0.10 to 0.12 has it, cannot do of this and what to take instead; None: it can."""
    if platform != "gpu":
        return f"runs on NVIDIA GPUs, this is {platform}: take 'auto'"
    if context.size() > 1:
        return f"takes whole rows, which mesh.context={context.size()} splits: take 'flash'"
    if document_BT is not None:
        return "masks no documents (model.mask_documents=True): take 'auto'"
    if q_BTNH.dtype != jnp.bfloat16:
        return f"computes in bfloat16, this is {q_BTNH.dtype} (precision.compute): take 'flash'"
    from k2jax.kernels.triton_block_sizes import HOPPER

    largest = 256 if any(name in sharding.device_kind() for name in HOPPER) else 128
    if q_BTNH.shape[3] % 8 or q_BTNH.shape[3] > largest:
        return f"takes a model.head_dim that is a multiple of 8, here {largest} at most: take 'flash'"
    return None


def _mosaic_refuses(q_BTNH: jax.Array) -> str | None:
    """What our kernels for Hopper cannot do of this and what to take instead; None: they can."""
    from k2jax.kernels.mosaic_block_sizes import WIDEST
    from k2jax.kernels.triton_block_sizes import HOPPER

    if not any(name in sharding.device_kind() for name in HOPPER):
        return f"runs on Hopper GPUs ({', '.join(HOPPER)}), this is {sharding.device_kind()}: take 'auto'"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in 16 bits, this is {q_BTNH.dtype} (precision.compute): take 'flash'"
    if q_BTNH.shape[3] > WIDEST:
        return f"takes a model.head_dim of {WIDEST} at most: take 'jnp'"
    return None


def _mosaic_sizes(q_BTNH: jax.Array) -> Any:
    """By which flash attention knows that these kernels are meant."""
    from k2jax.kernels.mosaic_block_sizes import block_sizes

    return block_sizes(q_BTNH.shape[3])


def _on_each_device(
    attend: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    document_BT: jax.Array | None,
    *by_device: jax.Array,
) -> jax.Array:
    """A kernel is no product that the partitioner could cut: each device takes its own rows, positions and heads.

    Arrays `by_device` have an element for each device that shares a row.
    """
    names = ["q_BTNH", "k_BTKH", "k_BTKH", "tokens_BT"]
    specs = *(sharding.spec(sharding.ACTIVATIONS[name]) for name in names), *[PartitionSpec("context")] * len(by_device)
    mapped = jax.shard_map(attend, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, document_BT, *by_device)


def _ring(implementation: str, q_BTNH: jax.Array) -> Callable[..., jax.Array]:
    """Ring attention by `implementation`; for devices that share rows."""
    from k2jax.kernels import flash_attention, reference, ring_attention
    from k2jax.kernels.flash_attention_tpu import LANES

    forward, backward = reference.forward, reference.backward
    if implementation in ("flash", "mosaic"):
        length = q_BTNH.shape[1]
        chunk = length // len(context.chunks(context.size()))
        if chunk % LANES:
            raise ConfigError(
                f"rows of {length} positions on mesh.context={context.size()} are chunks of {chunk}: flash attention "
                f"takes multiples of {LANES} there: change the mesh or the stage's sequence_length"
            )
        sizes = _mosaic_sizes(q_BTNH) if implementation == "mosaic" else None
        options = flash_attention.options_of_chunks(chunk, q_BTNH.shape[3], q_BTNH.dtype, sizes)
        forward = partial(flash_attention.forward_by_parts, options=options)
        backward = partial(flash_attention.backward_by_parts, options=options)
    return partial(ring_attention.ring_attention, parts=ring_attention.Parts(forward, backward))


def _attend_by_blocks(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, document_BT: jax.Array | None
) -> jax.Array:
    """By blocks of queries, so that keys behind a block are not touched, with a backward pass that computes the weights
    again instead of keeping them (flash attention's trade, Dao et al. 2022): on two CPU cores, at length 512, forward
    and backward take 0.12 s where one block with its weights kept takes 0.18 s.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    # Heads before positions: XLA's CPU backend then runs plain batched products, twice as fast as with heads inside.
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    out_BKGTH = _attend(q_BKGTH, k_BKTH, v_BKTH, document_BT)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _blocks(length: int) -> list[slice]:
    blocks = max(1, min(MAX_BLOCKS, length // LEAST_QUERIES))
    return [slice(length * i // blocks, length * (i + 1) // blocks) for i in range(blocks)]


@jax.custom_vjp
def _attend(
    q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, document_BT: jax.Array | None
) -> jax.Array:
    """Causal attention; `q` is scaled already."""
    return _attend_forward(q_BKGTH, k_BKTH, v_BKTH, document_BT)[0]


def _scores(q_BKGTH: jax.Array, k_BKSH: jax.Array, document_BS: jax.Array | None) -> jax.Array:
    """Of the last T of S positions."""
    T, S = q_BKGTH.shape[3], k_BKSH.shape[2]
    att_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    allowed = jnp.tril(jnp.ones((1, 1, 1, T, S), bool), S - T)
    if document_BS is not None:
        own_BT = document_BS[:, S - T :]
        allowed = allowed & (own_BT[:, None, None, :, None] == document_BS[:, None, None, None, :])
    return jnp.where(allowed, att_BKGTS, MASKED)


def _attend_forward(
    q_BKGTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, document_BT: jax.Array | None
) -> tuple[jax.Array, tuple]:
    outs, lses = [], []
    for rows in _blocks(q_BKGTH.shape[3]):
        seen = slice(0, rows.stop)
        document_BS = None if document_BT is None else document_BT[:, seen]
        att_BKGTS = _scores(q_BKGTH[:, :, :, rows], k_BKTH[:, :, seen], document_BS)
        most_BKGT1 = att_BKGTS.max(axis=-1, keepdims=True)
        weight_BKGTS = jnp.exp(att_BKGTS - most_BKGT1)
        sum_BKGT1 = weight_BKGTS.sum(axis=-1, keepdims=True)
        v_BKSH = v_BKTH[:, :, seen]
        out_BKGTH = _product("BKGTS,BKSH->BKGTH", weight_BKGTS.astype(v_BKSH.dtype), v_BKSH) / sum_BKGT1
        outs.append(out_BKGTH.astype(q_BKGTH.dtype))
        lses.append(most_BKGT1 + jnp.log(sum_BKGT1))
    out_BKGTH = kept(jnp.concatenate(outs, axis=3), "attention")
    lse_BKGT1 = kept(jnp.concatenate(lses, axis=3), ATTENTION_SUMS)
    return out_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, document_BT, lse_BKGT1, out_BKGTH)


def _attend_backward(saved: tuple, dout_BKGTH: jax.Array) -> tuple:
    q_BKGTH, k_BKTH, v_BKTH, document_BT, lse_BKGT1, out_BKGTH = saved
    dtype, blocks = q_BKGTH.dtype, _blocks(q_BKGTH.shape[3])
    # A softmax's gradient is w (dw - sum(w dw)), and sum(w dw) over the keys is dout . out
    inner_BKGT1 = (dout_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    dqs, dks, dvs = [], [], []
    for rows in blocks:
        seen = slice(0, rows.stop)
        q, dout, lse, inner = (x[:, :, :, rows] for x in (q_BKGTH, dout_BKGTH, lse_BKGT1, inner_BKGT1))
        k_BKSH, v_BKSH = k_BKTH[:, :, seen], v_BKTH[:, :, seen]
        weight_BKGTS = jnp.exp(_scores(q, k_BKSH, None if document_BT is None else document_BT[:, seen]) - lse)
        dvs.append(_product("BKGTS,BKGTH->BKSH", weight_BKGTS.astype(dtype), dout))
        dweight_BKGTS = _product("BKGTH,BKSH->BKGTS", dout, v_BKSH)
        datt_BKGTS = (weight_BKGTS * (dweight_BKGTS - inner)).astype(dtype)
        dqs.append(_product("BKGTS,BKSH->BKGTH", datt_BKGTS, k_BKSH))
        dks.append(_product("BKGTS,BKGTH->BKSH", datt_BKGTS, q))

    def add_up(parts: list[jax.Array]) -> jax.Array:
        """By blocks of keys, each of which the queries from its own block on have seen."""
        sums = [sum(part[:, :, rows] for part in parts[i:]) for i, rows in enumerate(blocks)]
        return jnp.concatenate(sums, axis=2).astype(dtype)

    return jnp.concatenate(dqs, axis=3).astype(dtype), add_up(dks), add_up(dvs), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_where(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, allowed_BTS: jax.Array
) -> jax.Array:
    """The same where `allowed` (bool) says so, over keys and values as a cache holds them; for generation."""
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    G = N // K
    # Q is G and T in one: with two dimensions, XLA's CPU backend transposes the keys at every token.
    q_BKQH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    att_BKGTS = _product("BKQH,BKSH->BKQS", q_BKQH, k_BKSH).reshape(B, K, G, T, S)
    att_BKGTS = jnp.where(allowed_BTS[:, None, None], att_BKGTS, MASKED)
    weight_BKGTS = jnp.exp(att_BKGTS - att_BKGTS.max(axis=-1, keepdims=True))
    weight_BKQS = weight_BKGTS.astype(v_BKSH.dtype).reshape(B, K, G * T, S)
    out_BKGTH = _product("BKQS,BKSH->BKQH", weight_BKQS, v_BKSH).reshape(B, K, G, T, H)
    out_BKGTH = (out_BKGTH / weight_BKGTS.sum(axis=-1, keepdims=True)).astype(q_BTNH.dtype)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
