"""What the rows of a microbatch lose, to be differentiated: each token's cross-entropy, or each pair's preference.

Axes: P pairs of a row, at most; the rest as in decoder.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from k2jax.model import conversations
from k2jax.model.decoder import Decoder, Params, document_ids
from k2jax.model.loss import LossOptions, Positions, head_loss, targets_and_weights
from k2jax.model.preferences import log_probabilities, preferences
from k2jax.model.weights import Arrays
from k2jax.parallel import context
from k2jax.parallel.sharding import shard


class RowLosses(NamedTuple):
    """Of each row, over its targets: float32 (R,)."""

    nats: jax.Array  # cross-entropy, summed; of pairs their losses
    targets: jax.Array  # how many tokens; of pairs how many pairs
    log_z: jax.Array  # log of softmax's denominator, summed; of pairs their number times its mean
    logit: jax.Array  # the largest magnitude
    preferences: jax.Array | None = None  # (R, 5), of pairs: model/preferences.py's REWARDS


class _Answer(NamedTuple):
    """Of a forward pass up to the head, and what is asked of it."""

    hidden_BTD: jax.Array
    head_DV: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array
    document_BT: jax.Array | None
    options: LossOptions


def row_losses(
    params: Params | Arrays,
    tokens: jax.Array,
    kept_B: jax.Array | None = None,
    marks: jax.Array | None = None,
    *,
    config: ConfigDict,
    stage: ConfigDict,
    eos_id: int,
    compute_dtype: jnp.dtype,
) -> tuple[jax.Array, RowLosses]:
    """The loss of (R, T+1) tokens, to be differentiated, and what is told of each row.

    The loss is the sum of the cross-entropies, and of z-loss where that is on; of rows of pairs that of the chosen
    conversations. Rows weigh as `kept_B` (float32) says; None: all the same. Rows of conversations have `marks`
    (R, T+1).
    """
    if marks is None:
        inputs_BT = tokens[:, :-1] if config.data.label_shift == "next" else tokens
        masked = config.model.mask_documents
        inputs_BT, targets_BT, weights_BT = targets_and_weights(
            tokens, config.data.label_shift, inputs_BT == eos_id if masked else None
        )
        document_BT, position_BT = document_ids(inputs_BT, eos_id) if masked else None, None
        asked = inputs_BT, targets_BT, weights_BT, document_BT, position_BT
    else:
        asked = _of_conversations(tokens, marks, config, stage)
        if stage.kind == "dpo":
            asked = (*asked[:2], asked[2] * (asked[3] & 1), *asked[3:])
    found = _forward(params, asked, kept_B, config, stage, compute_dtype)
    weights_BT = found.weights_BT
    loss, told = head_loss(found.hidden_BTD, found.head_DV, found.targets_BT, weights_BT, found.options)
    nats_B, log_z_B = ((x_BT * weights_BT).sum(axis=1) for x_BT in (told.nats, told.log_z))
    return loss, RowLosses(nats_B, weights_BT.sum(axis=1), log_z_B, _logit(told, weights_BT))


def pair_losses(
    params: Params | Arrays,
    tokens: jax.Array,
    marks: jax.Array,
    pairs: jax.Array,
    reference: jax.Array,
    *,
    config: ConfigDict,
    stage: ConfigDict,
    compute_dtype: jnp.dtype,
) -> tuple[jax.Array, RowLosses]:
    """As `row_losses`, of rows of pairs: what is differentiated has the gradient of the sum of the pairs' losses.

    How a pair's tokens weigh in it depends on all of them, so the head is gone through twice: for their probabilities,
    and then as for a weighted cross-entropy, with weights that are given.
    """
    found = _forward(params, _of_conversations(tokens, marks, config, stage), None, config, stage, compute_dtype)
    still = [jax.lax.stop_gradient(x) for x in (found.hidden_BTD, found.head_DV)]
    told = head_loss(*still, found.targets_BT, found.weights_BT, found.options)[1]
    said = preferences(told.nats, found.weights_BT, found.document_BT, pairs >= 0, reference, stage.beta)
    loss, _ = head_loss(found.hidden_BTD, found.head_DV, found.targets_BT, said.slope_BT, found.options)
    log_z_B = (told.log_z * found.weights_BT).sum(axis=1) / jnp.maximum(found.weights_BT.sum(axis=1), 1.0)
    rows = said.loss, said.pairs, log_z_B * said.pairs, _logit(told, found.weights_BT), said.told
    return loss, RowLosses(*rows)


def pair_log_probabilities(
    params: Params, tokens: jax.Array, marks: jax.Array, *, P: int, config: ConfigDict, stage: ConfigDict,
    compute_dtype: jnp.dtype,
) -> jax.Array:  # fmt: skip
    """float32 (R, P, 2): what the model says of the pairs of rows, as model/preferences.py has it of a reference."""
    found = _forward(params, _of_conversations(tokens, marks, config, stage), None, config, stage, compute_dtype)
    _, told = head_loss(found.hidden_BTD, found.head_DV, found.targets_BT, found.weights_BT, found.options)
    return log_probabilities(told.nats, found.weights_BT, found.document_BT, P)


def _of_conversations(tokens: jax.Array, marks: jax.Array, config: ConfigDict, stage: ConfigDict) -> tuple:
    """Inputs, targets, weights, documents and positions, (R, T) each."""
    inputs_BT, targets_BT, weights_BT, marks_BT = conversations.targets_and_weights(
        tokens, marks, config.data.label_shift
    )
    document_BT = conversations.documents(marks_BT)
    position_BT = conversations.positions(document_BT) if stage.reset_positions else None
    return inputs_BT, targets_BT, weights_BT, document_BT, position_BT


def _forward(
    params: Params | Arrays, asked: tuple, kept_B: jax.Array | None, config: ConfigDict, stage: ConfigDict,
    compute_dtype: jnp.dtype,
) -> _Answer:  # fmt: skip
    inputs_BT, targets_BT, weights_BT, document_BT, position_BT = asked
    weights_BT = weights_BT if kept_B is None else weights_BT * kept_B[:, None]
    rows = inputs_BT, targets_BT, weights_BT, document_BT, position_BT
    inputs_BT, targets_BT, weights_BT, document_BT, position_BT = jax.tree.map(
        lambda x_BT: shard(context.in_order(x_BT, 1), "tokens_BT"), rows
    )
    decoder = Decoder(config.model, params, compute_dtype, config.precision.products)
    hidden_BTD = decoder(inputs_BT, stage.rope_base, document_BT, position_BT)
    options = LossOptions(
        config.loss.block, config.loss.z_loss, config.precision.logits, tuple(config.model.rings)
    )
    return _Answer(hidden_BTD, decoder.head_DV[...], targets_BT, weights_BT, document_BT, options)


def _logit(told: Positions, weights_BT: jax.Array) -> jax.Array:
    return jnp.where(weights_BT > 0, told.logit, 0.0).max(axis=1)
