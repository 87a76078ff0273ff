"""What a run may take against loss spikes, each by a key of its own, and off by default.

Axes: B rows, T tokens, L layers, N query heads. A tensor is a parameter, and of stacked
ones (L, ...) a layer's part.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from k2jax.model.decoder import Params, parameter_table

PERIODS = range(1, 14)  # tokens: OLMo's
# In the metrics of a step, where they are on.
COUNTS = ("masked_rows", "clipped_tensors", "clipped_updates", "clipped_heads")

# ---- rows with repeated n-grams ------------------------------------------------------------------------------------


def rows_without_repeats(tokens_BT: jax.Array, times: int) -> jax.Array:
    """float32 (B,): 0 for rows in which 1 to 13 tokens come `times` times in a row, else 1.

    OLMo's filter of instances (OLMo 2, arXiv:2501.00656, section 3.1: 32 times or more); the last time must be whole.
    """
    repeated_B = jnp.zeros(tokens_BT.shape[0], bool)
    for period in PERIODS:
        wanted = (times - 1) * period  # equal pairs one after the other
        if tokens_BT.shape[1] - period >= wanted:
            equal_BT = tokens_BT[:, period:] == tokens_BT[:, :-period]
            repeated_B |= _all_of(equal_BT, wanted).any(axis=1)
    return 1.0 - repeated_B.astype(jnp.float32)


def _all_of(x_BT: jax.Array, length: int) -> jax.Array:
    """Whether the `length` elements from each position on are all true: (B, T - length + 1)."""
    done = 1
    while done < length:
        further = min(done, length - done)
        x_BT = x_BT[:, :-further] & x_BT[:, further:]
        done += further
    return x_BT


# ---- by tensor -----------------------------------------------------------------------------------------------------


def first_clips(config: ConfigDict) -> Params:
    """AdaGC's state before the first step: zeros; {} where it is off."""
    if not config.optimizer.adagc.ratio:
        return {}
    table = parameter_table(config.model)
    zeros = {name: jnp.zeros(p.shape[:1] if _is_stacked(name) else (), jnp.float32) for name, p in table.items()}
    return {"updates": jnp.zeros((), jnp.int32), **zeros}


def adagc(config: ConfigDict, clips: Params, grads: Params, grad_norm: jax.Array) -> tuple[Params, Params, jax.Array]:
    """(clipped gradients, the next `clips`, number of tensors that were clipped): AdaGC, arXiv:2502.11034.

    For `warmup_updates` the whole gradient is clipped to `clip_norm`, and each tensor notes the smallest norm that it
    had then; afterwards each is clipped to `ratio` times the moving average of its own clipped norm, and the whole is
    not. A norm of 0 says nothing and is left out: it would clip a tensor to 0 for ever.
    """
    o = config.optimizer
    warm = clips["updates"] < o.adagc.warmup_updates
    whole = jnp.minimum(1.0, o.clip_norm / jnp.maximum(grad_norm, 1e-12))
    clipped, new, count = {}, {"updates": clips["updates"] + 1}, jnp.int32(0)
    for name, g in grads.items():
        norm, seen = jnp.sqrt(_sums(name, jnp.square(g))), clips[name]
        own = jnp.where(seen > 0, jnp.minimum(1.0, o.adagc.ratio * seen / jnp.maximum(norm, 1e-30)), 1.0)
        scale = jnp.where(warm, whole, own)
        norm = norm * scale
        average = jnp.where(warm, jnp.minimum(seen, norm), o.adagc.beta * seen + (1.0 - o.adagc.beta) * norm)
        new[name] = jnp.where(norm > 0, jnp.where(seen > 0, average, norm), seen)
        clipped[name] = g * _spread(scale, g)
        count += jnp.sum(jnp.broadcast_to(scale, norm.shape) < 1.0, dtype=jnp.int32)
    return clipped, new, count


def update_scales(
    config: ConfigDict, updates: jax.Array, grads: Params, nu: Params
) -> tuple[dict[str, jax.Array], jax.Array]:
    """{name: what to multiply its step by}, and how many tensors have it below 1.

    StableAdamW's update clipping (Wortsman et al., arXiv:2304.13013, algorithm 2; Adafactor's, section 5): the learning
    rate of a tensor is divided by max(1, RMS(g / sqrt(v)) / `update_clip`). `updates` and `nu` count this step in.
    """
    o, count, scales = config.optimizer, jnp.int32(0), {}
    unbiased = 1.0 - o.b2 ** updates.astype(jnp.float32)
    for name, g in grads.items():
        ratios = jnp.square(g) / jnp.maximum(nu[name] / unbiased, o.eps**2)
        rms = jnp.sqrt(_sums(name, ratios) / (g.size // (g.shape[0] if _is_stacked(name) else 1)))
        scale = 1.0 / jnp.maximum(1.0, rms / o.update_clip)
        scales[name] = _spread(scale, g)
        count += jnp.sum(scale < 1.0, dtype=jnp.int32)
    return scales, count


# ---- by head -------------------------------------------------------------------------------------------------------


def qk_clip(config: ConfigDict, params: Params, logits_LN: jax.Array) -> tuple[Params, jax.Array]:
    """The parameters, in which heads whose largest logit is above `qk_clip` get smaller wq and wk, and biases; how many
    heads.

    QK-Clip of MuonClip (Kimi K2, arXiv:2507.20534, algorithm 1): the logit is multiplied by limit / logit, half of it
    by each of the two. Keys that several heads share stay as they are, and wq has it all, as that paper does with the
    part of its keys that is shared. There the logits are of all rows, here of some (model/attention_logits.py).
    """
    scale_LN = jnp.minimum(1.0, config.optimizer.qk_clip / jnp.maximum(logits_LN, 1e-30))
    shared = config.model.num_kv_heads < config.model.num_heads
    scale_L1N1 = (scale_LN if shared else jnp.sqrt(scale_LN))[:, None, :, None]
    scale_LN1 = scale_L1N1[:, 0]
    scales = {"layers.wq_LDNH": scale_L1N1, "layers.bq_LNH": scale_LN1}
    if not shared:
        scales |= {"layers.wk_LDKH": scale_L1N1, "layers.bk_LKH": scale_LN1}
    new = params | {name: params[name] * scale for name, scale in scales.items() if name in params}
    return new, jnp.sum(scale_LN < 1.0, dtype=jnp.int32)


def _is_stacked(name: str) -> bool:
    return name.startswith("layers.")


def _sums(name: str, x: jax.Array) -> jax.Array:
    """Over each tensor: (L,), or a scalar."""
    return x.sum(axis=tuple(range(1, x.ndim)) if _is_stacked(name) else None)


def _spread(scale: jax.Array, x: jax.Array) -> jax.Array:
    """(L,) or a scalar, so that it multiplies `x`."""
    return scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))
