"""AdamW with K2's settings, its first state, and the learning rate as a function of the step."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from k2jax.model.decoder import Params, init_params, parameter_table
from k2jax.run.state import TrainState
from k2jax.training.remedies import first_clips


def first_state(config: ConfigDict) -> TrainState:
    """That of an experiment, with what its optimizer keeps besides the moments."""
    return init_state(config.model, config.seed)._replace(clips=first_clips(config))


def init_state(m: ConfigDict, seed: int) -> TrainState:
    """Parameters drawn, moments of AdamW zero, and no remedies."""
    params = init_params(m, seed)

    def zeros() -> Params:
        return {name: jnp.zeros_like(value) for name, value in params.items()}

    count = jnp.zeros((), jnp.int32)
    return TrainState(count, count, count, params, zeros(), zeros())


def learning_rate(stage: ConfigDict, step_in_stage: jax.Array, num_steps: int) -> jax.Array:
    """Linear from `lr_start` to `lr_peak` over the warm-up, then a cosine to `lr_final` at the stage's last step.

    `num_steps` are those that the stage has: where the journal skips some, fewer than its chunks would give.
    `step_in_stage` counts from 1, so the first of 2000 warm-up steps already has 1/2000 of the peak (Megatron's rule).
    """
    step = step_in_stage.astype(jnp.float32)
    warm = stage.lr_start + (stage.lr_peak - stage.lr_start) * step / max(stage.warmup_steps, 1)
    progress = jnp.clip((step - stage.warmup_steps) / max(num_steps - stage.warmup_steps, 1), 0.0, 1.0)
    cosine = stage.lr_final + (stage.lr_peak - stage.lr_final) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < stage.warmup_steps, warm, cosine)


def adamw(config: ConfigDict, state: TrainState, grads: Params) -> tuple[Params, Params, Params]:
    """(direction, mu, nu): AdamW's step before the learning rate, decay on matrices and, unless spared, the embedding.

    K2's fused Adam is decoupled too: p <- p - lr (m / (sqrt(v) + eps) + decay p).
    """
    o = config.optimizer
    spared = () if o.decay_embeddings else ("embed_VD",)
    decayed = {n: p.is_matrix and n not in spared for n, p in parameter_table(config.model).items()}
    chain = optax.chain(
        optax.scale_by_adam(o.b1, o.b2, o.eps), optax.add_decayed_weights(o.weight_decay, decayed)
    )
    before = (
        optax.ScaleByAdamState(state.updates, state.mu, state.nu),
        optax.MaskedState(optax.EmptyState()),
    )
    direction, (adam, _) = chain.update(grads, before, state.params)
    return direction, adam.mu, adam.nu
