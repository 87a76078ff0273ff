"""The held-out loss by subset at each checkpoint, on a few windows: rows in `held_out/`, cut on resume like metrics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from k2jax.data.order import StagePlan
from k2jax.data.store import Store
from k2jax.model.decoder import Params, compute_dtype
from k2jax.parallel import cluster
from k2jax.run.ledger import StepLog
from k2jax.training.validation import few_losses


class HeldOut:
    """Writes rows after `step`, from which the launch goes on."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        chunk_of_step: Any,
        step: int,
        mesh: jax.sharding.Mesh,
        stores: dict[str, Store],
        eos_id: int,
        say: Callable[[str], None],
    ):
        self.config, self.mesh, self.stores, self.eos_id, self.say = config, mesh, stores, eos_id, say
        self.rows = StepLog(workdir / "held_out", chunk_of_step)
        if cluster.is_main() and (config.eval.at_checkpoints or self.rows.directory.exists()):
            self.rows.truncate(step)

    def record(self, step: int, plan: StagePlan, params: Params) -> None:
        """Of the parameters after a step: a row, and a line for people; nothing with `eval.at_checkpoints` 0."""
        windows, stage = self.config.eval.at_checkpoints, self.config.stages[plan.index]
        if not windows:
            return
        dtype = compute_dtype(self.config)
        found = few_losses(self.config, stage, params, self.mesh, self.stores, dtype, self.eos_id, windows)
        if not found:
            return
        if cluster.is_main():
            losses = {f"loss/{name}": loss for name, (loss, _) in found.items()}
            targets = {f"targets/{name}": targets for name, (_, targets) in found.items()}
            self.rows.append({"step": step, "stage": plan.name, **losses, **targets})
            self.rows.sync()
            self.rows.close()
        self.say("held out: " + "  ".join(f"{name} {loss:.4f}" for name, (loss, _) in found.items()))
