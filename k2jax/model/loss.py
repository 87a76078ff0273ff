"""Next-token cross-entropy over the vocabulary, which never holds the logits of all positions.

Axes: B batch, T positions, D model, V vocabulary (see decoder.py); S blocks of C positions of every row.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from k2jax.parallel import fsdp
from k2jax.parallel.fsdp import (
    TENSOR,
    Rings,
    gather,
    largest,
    own_part,
    reading,
    rows,
    scatter,
    tokens_spec,
    total,
    weight_gradient,
)

Axes = tuple[str, ...]  # of the mesh, that split rows and positions


class LossOptions(NamedTuple):
    """How `head_loss` computes."""

    block: int = 256  # positions of a row whose logits a device holds at a time
    z_loss: float = 0.0  # times the squared log of softmax's denominator, added to every position's loss (PaLM: 1e-4)
    logits_dtype: str = "float32"  # of the head's product
    rings: Rings = ()  # see fsdp.py


class Positions(NamedTuple):
    """Of every position, float32 (B, T)."""

    nats: jax.Array  # cross-entropy
    log_z: jax.Array  # log of softmax's denominator
    logit: jax.Array  # the largest magnitude of its logits


def targets_and_weights(
    tokens: jax.Array, label_shift: str, document_ends: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(inputs_BT, targets_BT, weights_BT) of a window.

    label_shift "next": `tokens` is (B, T+1), every position has a target. "inside" (K2's own): `tokens` is (B, T), and
    the last position, which has none, weighs nothing. `document_ends` (B, T bool, inputs that are EOS) drops the
    targets that lie in another document than their input.
    """
    if label_shift == "next":
        inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
        weights_BT = jnp.ones(inputs_BT.shape, jnp.float32)
    else:
        inputs_BT, targets_BT = tokens, jnp.roll(tokens, -1, axis=1)
        weights_BT = jnp.ones(inputs_BT.shape, jnp.float32).at[:, -1].set(0.0)
    if document_ends is not None:
        weights_BT = jnp.where(document_ends, 0.0, weights_BT)
    return inputs_BT, targets_BT, weights_BT


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(-log softmax(logits)[target], log of softmax's denominator) of every position, float32 (B, T).

    Devices that split the vocabulary have a part of the logits each; both results are over all of it.
    """
    lse_BT = jax.nn.logsumexp(logits_BTV.astype(jnp.float32), axis=-1)
    place_BT, own_BT = own_part(targets_BT, logits_BTV.shape[-1])
    picked_BT = jnp.take_along_axis(logits_BTV, place_BT[..., None], axis=-1)[..., 0].astype(jnp.float32)
    if own_BT is not True:
        most_BT = largest(lse_BT, (TENSOR,))
        lse_BT = most_BT + jnp.log(total(jnp.exp(lse_BT - most_BT), (TENSOR,)))
        picked_BT = total(jnp.where(own_BT, picked_BT, 0.0), (TENSOR,))
    return lse_BT - picked_BT, lse_BT


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def head_loss(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, options: LossOptions
) -> tuple[jax.Array, Positions]:
    """The weighted sum of all positions' losses (float32), and what is told of each.

    The gradient is that of the sum with respect to `x_BTD` and `head_DV`; none flows through the second result. It is
    computed with the loss, block by block, while a block's logits are there (as in Liger Kernel, arXiv:2410.10989):
    at K2's vocabulary the logits of a row of 8,192 positions and their gradient would be 2.1 GB. Each device has its
    own rows and positions, and gathers the head once.
    """
    specs = (rows(), fsdp.weight(0), tokens_spec(), tokens_spec())
    out_specs = PartitionSpec(), Positions(*[tokens_spec()] * 3)
    loss = fsdp.on_each_device(partial(_loss, options=options, axes=reading()), specs, out_specs)
    return loss(x_BTD, head_DV, targets_BT, weights_BT)


def _loss(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, options: LossOptions, axes: Axes
) -> tuple[jax.Array, Positions]:
    blocks = _blocks(x_BTD, targets_BT, weights_BT, options)
    head_DV = gather(head_DV, 0, x_BTD.dtype, options.rings)

    def add(loss: jax.Array, block: tuple) -> tuple[jax.Array, Positions]:
        x_BCD, targets_BC, weights_BC = block
        logits_BCV = _logits(x_BCD, head_DV, options)
        nats_BC, lse_BC = cross_entropy(logits_BCV, targets_BC)
        told = Positions(nats_BC, lse_BC, _magnitude(logits_BCV))
        return loss + _weighted(nats_BC, lse_BC, weights_BC, options), told

    loss, told = jax.lax.scan(add, jnp.float32(0), blocks)
    return total(loss, axes), _told(told, targets_BT.shape[1])


def _head_loss_forward(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, options: LossOptions
) -> tuple[tuple[jax.Array, Positions], tuple[jax.Array, jax.Array]]:
    specs = (rows(), fsdp.weight(0), tokens_spec(), tokens_spec())
    with_gradients = fsdp.on_each_device(
        partial(_loss_and_gradients, options=options, axes=reading()),
        specs,
        (PartitionSpec(), Positions(*[tokens_spec()] * 3), rows(), fsdp.weight(0)),
    )
    loss, told, dx_BTD, dhead_DV = with_gradients(x_BTD, head_DV, targets_BT, weights_BT)
    return (loss, told), (dx_BTD, dhead_DV)


def _loss_and_gradients(
    x_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, options: LossOptions, axes: Axes
) -> tuple[jax.Array, Positions, jax.Array, jax.Array]:
    T, D = x_BTD.shape[1:]
    blocks = _blocks(x_BTD, targets_BT, weights_BT, options)
    cast_DV = gather(head_DV, 0, x_BTD.dtype, options.rings)

    def add(carry: tuple[jax.Array, jax.Array], block: tuple) -> tuple[tuple, tuple]:
        loss, dhead_DV = carry
        x_BCD, targets_BC, weights_BC = block
        logits_BCV = _logits(x_BCD, cast_DV, options)
        nats_BC, lse_BC = cross_entropy(logits_BCV, targets_BC)
        softmax_BCV = jnp.exp(logits_BCV.astype(jnp.float32) - lse_BC[..., None])
        place_BC, own_BC = own_part(targets_BC, logits_BCV.shape[-1])
        place_BC = place_BC if own_BC is True else jnp.where(own_BC, place_BC, -1)
        is_target_BCV = jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2) == place_BC[..., None]
        scale_BC = weights_BC * (1.0 + 2.0 * options.z_loss * lse_BC)
        delta_BCV = scale_BC[..., None] * softmax_BCV - jnp.where(is_target_BCV, weights_BC[..., None], 0.0)
        delta_XV = delta_BCV.astype(x_BCD.dtype).reshape(-1, delta_BCV.shape[-1])
        dx_BCD = total(delta_XV @ cast_DV.T, (TENSOR,)).reshape(x_BCD.shape)
        dhead_DV += weight_gradient(x_BCD.reshape(-1, D), delta_XV, head_DV.dtype)
        told = Positions(nats_BC, lse_BC, _magnitude(logits_BCV))
        return (loss + _weighted(nats_BC, lse_BC, weights_BC, options), dhead_DV), (told, dx_BCD)

    start = jnp.float32(0), jnp.zeros(cast_DV.shape, head_DV.dtype)
    (loss, dhead_DV), (told, dx_SBCD) = jax.lax.scan(add, start, blocks)
    return total(loss, axes), _told(told, T), _positions(dx_SBCD, T), scatter(dhead_DV, 0, options.rings, axes)


def _head_loss_backward(options: LossOptions, saved: tuple, gradients: tuple) -> tuple:
    dx_BTD, dhead_DV = saved
    scale = gradients[0]  # of the sum
    return (dx_BTD * scale).astype(dx_BTD.dtype), dhead_DV * scale, None, None


head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def _blocks(x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, options: LossOptions) -> tuple:
    """(x_SBCD, targets_SBC, weights_SBC); positions that fill up the last block weigh nothing."""
    T = x_BTD.shape[1]
    S = -(-T // options.block)
    C = -(-T // S)

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, 0), (0, S * C - T), *((0, 0),) * (array.ndim - 2)))
        return padded.reshape(array.shape[0], S, C, *array.shape[2:]).swapaxes(0, 1)

    return cut(x_BTD), cut(targets_BT), cut(weights_BT)


def _positions(array_SBC: jax.Array, T: int) -> jax.Array:
    S, B, C = array_SBC.shape[:3]
    return array_SBC.swapaxes(0, 1).reshape(B, S * C, *array_SBC.shape[3:])[:, :T]


def _told(told: Positions, T: int) -> Positions:
    """Of blocks (S, B, C), whose logits devices may have a part each of."""
    told = Positions(*(_positions(array_SBC, T) for array_SBC in told))
    return told._replace(logit=largest(told.logit, (TENSOR,)))


def _magnitude(logits_BCV: jax.Array) -> jax.Array:
    return jnp.abs(logits_BCV).max(axis=-1).astype(jnp.float32)


def _logits(x_BCD: jax.Array, head_DV: jax.Array, options: LossOptions) -> jax.Array:
    B, C, D = x_BCD.shape
    dtype = jnp.dtype(options.logits_dtype)
    return jnp.matmul(x_BCD.reshape(B * C, D), head_DV, preferred_element_type=dtype).reshape(B, C, -1)


def _weighted(nats_BC: jax.Array, lse_BC: jax.Array, weights_BC: jax.Array, options: LossOptions) -> jax.Array:
    return ((nats_BC + options.z_loss * lse_BC**2) * weights_BC).sum()
