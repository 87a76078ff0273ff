"""The state of a training: one pytree of plain named arrays. A step changes it, a checkpoint holds exactly it."""

from typing import Any, NamedTuple

import jax

from k2jax.model.decoder import Params


class TrainState(NamedTuple):
    """Everything that a step changes. Replicated int32 scalars: step, updates, skips_in_a_row."""

    step: jax.Array  # the last step done; the next is step + 1
    updates: jax.Array  # of the optimizer: steps that were not skipped
    skips_in_a_row: jax.Array  # non-finite steps up to now
    params: Params  # float32
    mu: Params  # first moments, float32; of which parameters, and in what shape: training/optimizer.py
    nu: Params  # second moments, float32
    clips: Params = {}  # AdaGC's: each tensor's norm, float32 () or (L,), and `updates`, int32; {} where it is off
    ema: Params = {}  # moving average of params, float32; {} where it is off


def flat(state: TrainState) -> dict[str, jax.Array]:
    """The layout on disk: {"params/embed_VD": ..., "mu/...": ..., "step": ...}."""
    arrays: dict[str, jax.Array] = {}
    for field, value in state._asdict().items():
        arrays.update(
            {f"{field}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {field: value}
        )
    return arrays


def unflat(arrays: dict[str, jax.Array]) -> TrainState:
    """The inverse of `flat`."""
    fields: dict[str, Any] = {"mu": {}, "nu": {}}  # an optimizer may have none of a kind
    for name, value in arrays.items():
        field, _, key = name.partition("/")
        if key:
            fields.setdefault(field, {})[key] = value
        else:
            fields[field] = value
    return TrainState(**fields)
