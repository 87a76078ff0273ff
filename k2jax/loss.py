"""Next-token cross-entropy over the vocabulary.

Axes: B batch, T positions, V vocabulary; see model.py.
"""

import jax
import jax.numpy as jnp


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


@jax.custom_vjp
def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of every position, float32 (B, T).

    The gradient is written by hand (softmax - onehot, one pass over the logits): differentiated by JAX, the gather
    becomes a scatter into an array of the logits' size.
    """
    return _cross_entropy_forward(logits_BTV, targets_BT)[0]


def _cross_entropy_forward(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, tuple]:
    lse_BT = jax.nn.logsumexp(logits_BTV.astype(jnp.float32), axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0].astype(jnp.float32)
    return lse_BT - picked_BT, (logits_BTV, targets_BT, lse_BT)


def _cross_entropy_backward(saved: tuple, gradient_BT: jax.Array) -> tuple[jax.Array, None]:
    logits_BTV, targets_BT, lse_BT = saved
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    softmax_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - lse_BT[..., None])
    delta_BTV = softmax_BTV - (vocabulary == targets_BT[..., None]).astype(jnp.float32)
    return (gradient_BT[..., None] * delta_BTV).astype(logits_BTV.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
