"""AdamW with K2's settings, its first state, and the learning rate as a function of the step."""

from collections.abc import Callable

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


def _decayed(progress: jax.Array, share: float) -> jax.Array:
    """From 0 to 1 over the last `share` of the steps."""
    return jnp.clip((progress - (1.0 - share)) / share, 0.0, 1.0)


# How much of the way from lr_final up to lr_peak is left, by the share of the steps after the warm-up that are done,
# and the share of them that decay. "wsd": warm-up, stable, decay (MiniCPM, arXiv:2404.06395), in a line; "wsd_sqrt" by
# 1 less the root, which Haegele et al. (arXiv:2405.18392) found better.
SCHEDULES: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "cosine": lambda progress, _: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
    "linear": lambda progress, _: 1.0 - progress,
    "constant": lambda progress, _: jnp.ones_like(progress),
    "wsd": lambda progress, share: 1.0 - _decayed(progress, share),
    "wsd_sqrt": lambda progress, share: 1.0 - jnp.sqrt(_decayed(progress, share)),
}


def learning_rate(stage: ConfigDict, step_in_stage: jax.Array, num_steps: int) -> jax.Array:
    """Linear from `lr_start` to `lr_peak` in the warm-up, then `stage.schedule` to `lr_final` at the stage's last step.

    `num_steps` are those that the stage has: where the journal skips some, fewer than its chunks would give.
    `step_in_stage` counts from 1, so the first of 2000 warm-up steps already has 1/2000 of the peak (Megatron's rule).
    """
    step = step_in_stage.astype(jnp.float32)
    warm = stage.lr_start + (stage.lr_peak - stage.lr_start) * step / max(stage.warmup_steps, 1)
    progress = jnp.clip((step - stage.warmup_steps) / max(num_steps - stage.warmup_steps, 1), 0.0, 1.0)
    above = SCHEDULES[stage.schedule](progress, stage.decay_share)
    return jnp.where(step < stage.warmup_steps, warm, stage.lr_final + (stage.lr_peak - stage.lr_final) * above)


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
