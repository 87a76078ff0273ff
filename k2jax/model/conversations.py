"""What the marks of a row of conversations (data/conversations.py) say to the model: documents, positions, targets.

Axes: B batch, T positions.
"""

import jax
import jax.numpy as jnp


def documents(marks_BT: jax.Array) -> jax.Array:
    """(B, T) int32: the number of each position's conversation in its row; padding, which is last, has the greatest."""
    return jnp.where(marks_BT > 0, marks_BT >> 1, marks_BT.shape[1] + 1)


def positions(document_BT: jax.Array) -> jax.Array:
    """(B, T) int32: each position's place in its document, from 0."""
    place_T = jnp.arange(document_BT.shape[1], dtype=jnp.int32)
    first_BT = jnp.diff(document_BT, axis=1, prepend=document_BT[:, :1] - 1) != 0
    return place_T - jax.lax.cummax(jnp.where(first_BT, place_T, 0), axis=1)


def targets_and_weights(
    tokens: jax.Array, marks: jax.Array, label_shift: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(inputs_BT, targets_BT, weights_BT, marks_BT) of rows of conversations, as model/loss.py has those of windows.

    The target at a position is the token behind it. It weighs one where that is learned, and of the same conversation.
    """
    if label_shift == "next":
        inputs_BT, targets_BT, marks_BT, behind_BT = tokens[:, :-1], tokens[:, 1:], marks[:, :-1], marks[:, 1:]
    else:
        inputs_BT, targets_BT, marks_BT = tokens, jnp.roll(tokens, -1, axis=1), marks
        behind_BT = jnp.roll(marks, -1, axis=1).at[:, -1].set(0)
    learned_BT = (behind_BT & 1 == 1) & (behind_BT >> 1 == marks_BT >> 1)
    return inputs_BT, targets_BT, learned_BT.astype(jnp.float32), marks_BT
