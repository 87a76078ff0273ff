"""What the model that a dpo stage begins with says of its pairs: made once, kept in reference/ of the run directory.

NAME.npy, by the stage's name, is float32 (documents of the stage's stores in the order of their names, 2): the summed
log-probabilities of the answers of the chosen and the rejected conversation, NaN for what is held out. Its SHA-256 is
in NAME.json and in the meta of the stage's checkpoints. It costs one forward pass over all pairs.
"""

import hashlib
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.data.conversations import ConversationRows, most_pairs, pair_numbers
from k2jax.data.loader import row_length
from k2jax.data.order import Rows, StagePlan
from k2jax.data.store import Store
from k2jax.errors import ConfigError
from k2jax.model.decoder import Params, compute_dtype
from k2jax.parallel import cluster, sharding
from k2jax.training.losses import pair_log_probabilities
from k2jax.training.placement import batch_sharding
from k2jax.training.step import Batch
from k2jax.training.validation import rows_per_batch

FOLDER = "reference"


class References:
    """`added` before each step; nothing in stages of other kinds."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path | BucketPath,
        mesh: Mesh,
        manifest: dict[str, Any],
        stores: dict[str, Store],
        metas: list[dict[str, Any]] | None = None,
        restored: dict[str, Any] | None = None,
        alive: Callable[[], None] = lambda: None,
        *,
        say: Callable[[str], None] = print,
    ):
        """`metas`, by stage, are what the trainer's checkpoints say; None of a replay, which makes no reference.

        `restored` is the meta of the checkpoint that it goes on from. `alive` is called as the pass over the pairs goes
        on.
        """
        self._config, self._folder, self._mesh = config, workdir / FOLDER, mesh
        self._manifest, self._stores = manifest, stores
        self._metas, self._restored, self._alive, self._say = metas, restored or {}, alive, say
        self._tables: dict[int, jax.Array] = {}
        everywhere, rows = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
        self._look_up = jax.jit(_look_up, in_shardings=(everywhere, rows), out_shardings=rows)

    def added(self, batch: Batch, step: int, plan: StagePlan, params: Params) -> Batch:
        """The batch with what the reference says of its pairs. `params` are those before the step.

        ConfigError, naming the file, where it is gone or another than the stage began with.
        """
        if self._config.stages[plan.index].kind != "dpo":
            return batch
        if batch.pairs is None:
            raise ConfigError("a release does not say which pairs a row holds: name the run's stores: --stores=DIR")
        if plan.index not in self._tables:
            begins = self._metas is not None and step == plan.first_step and not plan.done
            table, digest = self._make(plan, params) if begins else self._load(plan)
            if self._metas is not None:
                self._metas[plan.index]["reference"] = digest
            place = NamedSharding(self._mesh, PartitionSpec())
            self._tables[plan.index] = jax.make_array_from_callback(table.shape, place, lambda index: table[index])
        return batch._replace(reference=self._look_up(self._tables[plan.index], batch.pairs))

    def _make(self, plan: StagePlan, params: Params) -> tuple[np.ndarray, str]:
        started = time.perf_counter()
        table = self._said(plan, params)
        about = {"stage": plan.name, "after_step": plan.first_step - 1, "stores": self._stores_of(plan)}
        digest = cluster.decide("writes the reference", lambda: write(self._folder, plan.name, table, about))
        self._say(
            f"the reference of {plan.name}: {np.isfinite(table[:, 0]).sum():,} pairs in "
            f"{time.perf_counter() - started:.1f} s"
        )
        return table, digest

    def _said(self, plan: StagePlan, params: Params) -> np.ndarray:
        """Of every pair of the stage, by a pass over the rows of its first epoch."""
        config, stage = self._config, self._config.stages[plan.index]
        rows_of = ConversationRows(self._manifest, plan.index, self._stores)
        width = row_length(stage.sequence_length, config.data.label_shift)
        size = rows_per_batch(stage, self._mesh)
        place = NamedSharding(self._mesh, PartitionSpec(sharding.data_axes(self._mesh)))
        some = {"config": config, "stage": stage, "compute_dtype": compute_dtype(config)}
        run = jax.jit(
            partial(pair_log_probabilities, P=most_pairs(stage.sequence_length), **some),
            out_shardings=NamedSharding(self._mesh, PartitionSpec()),
        )
        table, names = np.full((rows_of.num_pairs, 2), np.nan, np.float32), sorted(self._manifest["stores"])
        for subset in self._manifest["stages"][plan.index]["subsets"]:
            for first in range(0, subset["windows"], size):
                window = np.arange(first, first + size) % subset["windows"]  # the last are filled up with others again
                of_all = [np.full(size, value) for value in (plan.index, names.index(subset["name"]), 0)]
                read = rows_of.read(Rows(*of_all, window), width)
                inputs = [_placed(read[key].view(np.int32), place) for key in ("tokens", "marks")]
                there = read["pairs"] >= 0
                table[read["pairs"][there]] = np.asarray(run(params, *inputs))[there]
                self._alive()
        return table

    def _load(self, plan: StagePlan) -> tuple[np.ndarray, str]:
        path = self._folder / f"{plan.name}.npy"
        expected = self._restored.get("reference") if self._restored.get("stage") == plan.index else None
        stores, shape = self._stores_of(plan), (pair_numbers(self._manifest, plan.index)[1], 2)
        digest = cluster.decide("reads the reference", lambda: check(self._folder, plan.name, stores, expected))
        table = np.load(io.BytesIO(path.read_bytes())) if cluster.is_main() else np.zeros(shape, np.float32)
        return cluster.array_of_main(table), digest

    def _stores_of(self, plan: StagePlan) -> dict[str, str]:
        """{name: digest} of those of a stage."""
        names = pair_numbers(self._manifest, plan.index)[0]
        return {name: self._manifest["stores"][name]["root_digest"] for name in names}


def _look_up(table: jax.Array, pairs: jax.Array) -> jax.Array:
    return jnp.where(pairs[..., None] >= 0, table[pairs], 0.0)


def _placed(array: np.ndarray, place: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def write(folder: Path, name: str, table: np.ndarray, about: dict[str, Any]) -> str:
    """Keeps a stage's reference; returns its SHA-256."""
    data = io.BytesIO()
    np.save(data, table)
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    folder.mkdir(exist_ok=True)
    files.write_bytes(folder / f"{name}.npy", data.getvalue())
    files.write_json(folder / f"{name}.json", {**about, "sha256": digest})
    return digest


def check(folder: Path | BucketPath, name: str, stores: dict[str, str], expected: str | None) -> str:
    """The SHA-256 of a stage's reference. ConfigError where it is not there, not what was kept or is `expected`, or of
    other `stores`."""
    path, about = folder / f"{name}.npy", folder / f"{name}.json"
    if not path.exists() or not about.exists():
        raise ConfigError(
            f"{path} is not there: what the model said of the pairs when stage {name!r} began: restore it from a copy, "
            f"or go back to before the stage"
        )
    data = path.read_bytes()
    digest, kept = hashlib.sha256(data).hexdigest(), files.read_json(about)
    kept = kept if isinstance(kept, dict) else {}
    for what, should in ((about.name, kept.get("sha256")), ("the checkpoint", expected or digest)):
        if should != digest:
            found = f"its SHA-256 is {digest[:12]}, {what} has {str(should)[:12]}"
            raise ConfigError(f"{path}: {found}: restore it from a copy, or go back to before stage {name!r}")
    if kept.get("stores") != stores:
        raise ConfigError(
            f"{path}: is of other stores than those of stage {name!r}: restore those that it began with, or go back to "
            f"before the stage"
        )
    return digest
