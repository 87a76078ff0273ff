"""The largest attention logit of each layer, every so many steps: a forward pass over a few rows, beside the step.

Inside attention no kernel tells it. Queries and keys that grow show here long before the loss does.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from k2jax.data.order import StagePlan
from k2jax.model.attention_logits import attention_logits
from k2jax.model.decoder import Params, compute_dtype
from k2jax.training.step import Batch, Metrics


class Probe:
    """Compiled when it is first due in a stage."""

    def __init__(self, config: ConfigDict, mesh: Mesh, eos_id: int):
        self.config, self.mesh, self.eos_id = config, mesh, eos_id
        self._programs: dict[int, Callable] = {}

    def added(self, metrics: Metrics, step: int, plan: StagePlan, params: Params, batch: Batch) -> Metrics:
        """`metrics`, and where the step is due "attention_logit", also by layer."""
        every = self.config.stability.attention_every
        if not every or step % every:
            return metrics
        logit, logit_L = self._program(plan.index)(params, batch.tokens, batch.marks)
        return {**metrics, "attention_logit": logit, "layers": {**metrics["layers"], "attention_logit": logit_L}}

    def _program(self, index: int) -> Callable:
        if index not in self._programs:
            run = partial(
                attention_logits,
                self.config,
                rope_base=self.config.stages[index].rope_base,
                reset_positions=self.config.stages[index].reset_positions,
                eos_id=self.eos_id,
                compute_dtype=compute_dtype(self.config),
            )

            def both(params: Params, tokens: jax.Array, marks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
                logit_LN = run(params, tokens, marks=marks)
                return logit_LN.max(), logit_LN.max(axis=1)

            self._programs[index] = jax.jit(both, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        return self._programs[index]
