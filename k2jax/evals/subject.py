"""A checkpoint under evaluation: its parts are read when an evaluation first asks for them, and shared by all."""

from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from k2jax.data.provenance import Run, open_run
from k2jax.errors import ConfigError
from k2jax.evals.scoring import Scorer
from k2jax.model.decoder import Params, compute_dtype
from k2jax.model.generation import Generator
from k2jax.parallel import cluster
from k2jax.run.directory import git_commit
from k2jax.run.saved import SavedStep, restore_copy, restore_params


class Subject:
    """One saved step on a mesh."""

    def __init__(self, saved: SavedStep, mesh: Mesh, *, batch_tokens: int, seed: int, stores: str | Path | None = None):
        """
        Args:
            batch_tokens: of one call of the model, padding included.
            seed: of sampling and of few-shot examples.
            stores: where the run's stores are, by name, if they have moved.
        """
        self._stores = stores
        self.saved, self.mesh, self.batch_tokens, self.seed = saved, mesh, batch_tokens, seed
        self.eos_id: int = saved.meta["eos_id"]
        self.compute_dtype: jnp.dtype = compute_dtype(saved.config)

    @cached_property
    def params(self) -> Params:
        """Verified; of the type that is computed in, where that is not float32. StorageError when they are damaged."""
        if self.compute_dtype == jnp.float32:
            return restore_params(self.saved, self.mesh)
        return restore_copy(self.saved, self.mesh, self.compute_dtype)

    @cached_property
    def run(self) -> Run:
        """The run's data, of the epoch that made the step. ConfigError where it has none."""
        if "manifest_digest" not in self.saved.meta:
            raise ConfigError(
                f"{self.saved.workdir} at step {self.saved.step} is an imported model that has not trained: it has no "
                f"data to be evaluated on; name harness tasks"
            )
        return open_run(self.saved.workdir, self._stores).of_step(max(1, self.saved.step))

    @cached_property
    def scorer(self) -> Scorer:
        m, rope_base = self.saved.config.model, self.saved.stage.rope_base
        parts = (m, rope_base, self.params, self.mesh, self.compute_dtype)
        return Scorer(*parts, eos_id=self.eos_id, batch_tokens=self.batch_tokens)

    @cached_property
    def generator(self) -> Generator:
        m, rope_base = self.saved.config.model, self.saved.stage.rope_base
        ids = {"eos_id": self.eos_id, "stop_ids": self.saved.stop_ids}
        return Generator(m, rope_base, self.params, self.mesh, self.compute_dtype, **ids)

    @cached_property
    def whole(self) -> "Subject":
        """The same where EOS ends no document: a conversation is one, whatever its template writes between turns."""
        if not self.saved.config.model.mask_documents:
            return self
        config = self.saved.config.copy_and_resolve_references()
        with config.unlocked():
            config.model.mask_documents = False
        options = {"batch_tokens": self.batch_tokens, "seed": self.seed, "stores": self._stores}
        other = Subject(self.saved._replace(config=config), self.mesh, **options)
        other.__dict__["params"] = self.params  # read once
        return other

    def about(self) -> dict[str, Any]:
        """What a result says of how it was made."""
        device = self.mesh.devices.flat[0]
        return {
            "versions": self._versions(),
            "devices": {"kind": device.device_kind, "count": self.mesh.devices.size, "mesh": dict(self.mesh.shape)},
            "processes": cluster.count(),
            "compute": str(self.compute_dtype),
        }

    @staticmethod
    def _versions() -> dict[str, Any]:
        import k2jax

        return {"k2jax": k2jax.__version__, "commit": git_commit(), "jax": jax.__version__}
