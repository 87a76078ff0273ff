"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290), on rows of pairs of conversations.

Of each pair a reference, the model that the stage began with, has said beforehand how likely the answers of both are. A
pair's loss is -log sigmoid(beta * ((chosen - its reference) - (rejected - its reference))), of log-probabilities
summed over the answers' tokens. An optimizer minimises its mean over the pairs of a global batch.

Axes: B batch, T positions, P pairs of a row, at most; a last one of 2 is chosen, rejected.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

REWARDS = ("right", "chosen_reward", "rejected_reward", "chosen_nats", "tokens")  # what is told, summed over pairs


class Preferences(NamedTuple):
    """Of rows of pairs: float32."""

    loss: jax.Array  # (B,) summed over pairs
    pairs: jax.Array  # (B,) how many
    slope_BT: jax.Array  # of the loss by each learned token's cross-entropy; 0 elsewhere
    told: jax.Array  # (B, 5): REWARDS


def log_probabilities(nats_BT: jax.Array, weights_BT: jax.Array, document_BT: jax.Array, P: int) -> jax.Array:
    """float32 (B, P, 2): of the learned tokens of each conversation, summed; 0 where a row has no such pair.

    Conversation 2 p + 1 of a row is the chosen one of pair p, and 2 p + 2 the rejected one. The sums have one order.
    """
    is_of_BTX = document_BT[:, :, None] == 1 + jnp.arange(2 * P)
    return -jnp.where(is_of_BTX, (nats_BT * weights_BT)[:, :, None], 0.0).sum(axis=1).reshape(-1, P, 2)


def preferences(
    nats_BT: jax.Array,
    weights_BT: jax.Array,
    document_BT: jax.Array,
    there_BP: jax.Array,
    reference_BP2: jax.Array,
    beta: float,
) -> Preferences:
    """`weights_BT` is 1 where a token is learned; `there_BP` is true of pairs that a row has."""
    P = reference_BP2.shape[1]
    found_BP2 = log_probabilities(nats_BT, weights_BT, document_BT, P)
    reward_BP2 = beta * jnp.where(there_BP[..., None], found_BP2 - reference_BP2, 0.0)
    margin_BP = reward_BP2[..., 0] - reward_BP2[..., 1]
    slope_BP = beta * jax.nn.sigmoid(-margin_BP) * there_BP  # the chosen one's; of the rejected one less that
    slope_BX = jnp.stack([slope_BP, -slope_BP], axis=-1).reshape(-1, 2 * P)
    is_of_BTX = document_BT[:, :, None] == 1 + jnp.arange(2 * P)
    slope_BT = weights_BT * jnp.where(is_of_BTX, slope_BX[:, None, :], 0.0).sum(axis=2)
    right_BP = (margin_BP > 0) & there_BP
    told = right_BP, reward_BP2[..., 0], reward_BP2[..., 1], -found_BP2[..., 0], weights_BT
    told_B5 = jnp.stack([x_BX.astype(jnp.float32).sum(axis=1) for x_BX in told], axis=1)
    loss_B = jnp.where(there_BP, jax.nn.softplus(-margin_BP), 0.0).sum(axis=1)
    return Preferences(loss_B, there_BP.sum(axis=1, dtype=jnp.float32), slope_BT, told_B5)
