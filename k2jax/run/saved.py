"""A saved step as its readers see it: what it is, and its parameters, on any mesh or as numpy slices.

Generation, evaluation and conversion need a run directory and nothing else: not the experiment file, not the mesh that
trained, not the optimizer's state. Arrays are read through TensorStore from where Orbax put them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tensorstore as ts
from jax.sharding import Mesh
from ml_collections import ConfigDict

from k2jax import config as configuration
from k2jax import paths
from k2jax.bucket import BucketPath, at
from k2jax.data.epochs import Epoch, has_epochs, imported
from k2jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError, StorageError
from k2jax.model.decoder import Params, parameter_table
from k2jax.parallel import sharding
from k2jax.run import digest, storage
from k2jax.run.bucket_steps import committed_steps
from k2jax.run.identity import epochs_of
from k2jax.run.reading import one_line


class SavedStep(NamedTuple):
    """One checkpoint of a run."""

    workdir: Path | BucketPath
    step: int
    meta: dict[str, Any]  # as checkpoint.py wrote it: digests, lineage, versions, eos_id, ...
    config: ConfigDict  # the experiment as it was at this step
    stage: ConfigDict  # the row of config.stages that the step belongs to: rope base and sequence length
    epochs: list[Epoch]  # of the run, up to that of this step
    weights: str = "params"  # which of its weights readers take: those, or "ema"

    @property
    def digest(self) -> str:
        """Of the whole checkpoint (SHA-256, hex): its identity in evaluations, exports and lineage."""
        return self.meta["digest"]

    @property
    def imported(self) -> dict[str, Any] | None:
        """See epochs.imported."""
        return imported(self.epochs)

    @property
    def context(self) -> int:
        """The length that the model is for: that of the stage's rows; of an imported one its own, unless it was trained
        on longer rows."""
        lengths = [row.sequence_length for row in self.config.stages[: self.meta["stage"] + 1]]
        if self.imported is None:
            return lengths[-1]
        own = self.imported.get("context") or self.epochs[0].config["stages"][0]["sequence_length"]
        return max(own, *lengths)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: the run's EOS, then what an imported folder lists beside it, then those by which
        the answers end that it learned."""
        imported, found = self.imported or {"config": {}}, [self.meta["eos_id"]]
        generation = json.loads(imported.get("side_files", {}).get("generation_config.json", "{}"))
        for ids in (imported["config"].get("eos_token_id"), generation.get("eos_token_id")):
            found += ids if isinstance(ids, list) else [ids]
        if learned := self.meta.get("chat", {}).get("ends"):
            found += map(load_tokenizer(self.tokenizer).token_to_id, learned)
        size = self.config.model.vocab_size
        return tuple(dict.fromkeys(id for id in found if type(id) is int and 0 <= id < size))

    @property
    def begin_ids(self) -> list[int]:
        """What goes before a prompt: of an imported model what its tokenizer.json puts there; else nothing, as in
        training."""
        return load_tokenizer(self.tokenizer).begin_ids if self.imported else []

    @property
    def tokenizer(self) -> Path | BucketPath:
        return self.workdir / "tokenizer.json"


def saved_steps(workdir: str | Path | BucketPath) -> list[int]:
    """The steps with a complete checkpoint, oldest first. ConfigError when the folder is no run."""
    workdir = at(workdir)
    if isinstance(workdir, BucketPath):
        if not (steps := committed_steps(workdir)) and not has_epochs(workdir):
            raise ConfigError(f"--workdir={workdir}: no run, there is no epochs/0001.json in it")
        return steps
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise ConfigError(f"--workdir={workdir}: no run, there is no checkpoints folder in it")
    # Orbax writes a step under another name and renames it when it is complete.
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "meta" / "meta.json").exists())


def steps_so_far(workdir: Path | BucketPath) -> list[int]:
    """As `saved_steps`; of a run that has saved nothing yet none."""
    if isinstance(workdir, BucketPath):
        return committed_steps(workdir)
    return saved_steps(workdir) if (workdir / "checkpoints").is_dir() else []


def open_step(workdir: str | Path | BucketPath, step: int | None = None, weights: str = "params") -> SavedStep:
    """The checkpoint of a step, by default the newest. Nothing of its arrays is read yet.

    Raises ConfigError, listing the steps that there are, when it is missing or of another format, when it is not a
    checkpoint of this run, and when it has no such weights; StorageError when its meta is damaged, or not that of the
    ledger.
    """
    workdir, steps = at(workdir), saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        wanted = "" if step is None else f" of step {step}"
        raise ConfigError(f"--workdir={workdir} has no checkpoint{wanted}: {_listed(steps)}")
    step = steps[-1] if step is None else step
    try:
        meta = storage.read_meta(workdir / "checkpoints" / str(step))
    except (OSError, StorageError) as error:
        raise StorageError(f"checkpoint {step} of {workdir}: its meta is damaged: {error}") from error
    if meta["step"] != step:
        raise StorageError(f"checkpoint {step} of {workdir}: it is that of step {meta['step']}: name its folder so")
    storage.check_format(meta, f"checkpoint {step} of {workdir}")
    if not storage.has(weights, meta["arrays"]):
        raise ConfigError(
            f"--weights={weights}: checkpoint {step} of {workdir} has no average of the weights "
            f"(optimizer.ema_decay was 0): leave it out"
        )
    config = configuration.from_dict(meta["config"])
    return SavedStep(workdir, step, meta, config, config.stages[meta["stage"]], epochs_of(workdir, meta), weights)


def check_tokenizer(saved: SavedStep) -> Tokenizer:
    """The run's tokenizer; ConfigError when it is not the one that the checkpoint was trained with."""
    found, expected = tokenizer_sha256(saved.tokenizer), saved.meta["tokenizer_sha256"]
    if found != expected:
        raise ConfigError(
            f"{saved.tokenizer} has SHA-256 {found[:12]}, checkpoint {saved.step} was trained with {expected[:12]}: "
            f"put the run's own tokenizer.json back"
        )
    return load_tokenizer(saved.tokenizer)


def open_array(saved: SavedStep, name: str) -> ts.TensorStore:
    """One array of the state, such as "params/layers.wq_LDNH": `open_array(...)[l].read().result()` is a layer of it.

    Raises StorageError when it is missing or its shape is not the recorded one.
    """
    try:
        return storage.open_array(_folder(saved), saved.meta, name)
    except StorageError:
        raise
    except Exception as error:  # TensorStore raises ValueError, KeyError, ... for what it finds on disk
        raise StorageError(f"checkpoint {saved.step}: cannot open array {name}: {one_line(error)}") from error


def _folder(saved: SavedStep) -> Path | BucketPath:
    return paths.absolute(saved.workdir) / "checkpoints" / str(saved.step)


def restore_params(saved: SavedStep, mesh: Mesh) -> Params:
    """The weights (float32) on a mesh, each laid out as the table of sharding.py says and checked by its digest.

    Raises StorageError naming an array that is damaged.
    """
    params = _read(saved, mesh, tuple(parameter_table(saved.config.model)))
    check_digests(saved, _digests(params))
    return params


def restore_copy(saved: SavedStep, mesh: Mesh, dtype: jnp.dtype) -> Params:
    """As `restore_params`, with every matrix in the type that products take, which computes the same in half the room.

    Read one array at a time: float32 are at most that array, of which a host has one device's part at a time, and the
    norms, which stay so.
    """
    params = {}
    for name, p in parameter_table(saved.config.model).items():
        found = _read(saved, mesh, (name,), one_by_one=True)
        check_digests(saved, _digests(found))
        params[name] = found[name] if p.std is None else found[name].astype(dtype)
    return params


def _read(saved: SavedStep, mesh: Mesh, names: tuple[str, ...], one_by_one: bool = False) -> Params:
    table = parameter_table(saved.config.model)
    places = {f"{saved.weights}/{name}": sharding.named(mesh, table[name].axes) for name in names}
    try:
        read = storage.read_arrays(_folder(saved), saved.meta, places, one_by_one=one_by_one)
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(f"checkpoint {saved.step}: cannot be read: {one_line(error)}") from error
    return {name: read[f"{saved.weights}/{name}"] for name in names}


def _digests(params: Params) -> dict[str, int]:
    return {name: int(d) for name, d in jax.jit(digest.tree_digests)(params).items()}


def check_digests(saved: SavedStep, found: dict[str, int]) -> None:
    """Compares {parameter: digest} with what the checkpoint recorded; StorageError naming those that differ."""
    recorded = saved.meta["digests"]
    wrong = [name for name, value in found.items() if value != recorded[f"{saved.weights}/{name}"]]
    if wrong:
        raise StorageError(
            f"checkpoint {saved.step}: damaged array(s) {', '.join(wrong[:5])}: digest {found[wrong[0]]:08x}, "
            f"recorded {recorded[f'{saved.weights}/{wrong[0]}']:08x}: use another step, or a copy"
        )


def _listed(steps: list[int]) -> str:
    shown = [str(s) for s in steps] if len(steps) <= 12 else [*map(str, steps[:5]), "...", *map(str, steps[-5:])]
    return f"it has steps {', '.join(shown)}" if steps else "nothing was saved yet"
