"""To which run, and to which of its epochs, a checkpoint belongs: compared wherever one is read."""

from pathlib import Path
from typing import Any

from k2jax import config as configuration
from k2jax.data.epochs import Epoch, has_epochs, read_epochs
from k2jax.data.manifest import manifest_digest, sha256_json
from k2jax.errors import ConfigError, StorageError
from k2jax.run import drift
from k2jax.run.ledger import read_records


def epochs_of(workdir: Path, meta: dict[str, Any]) -> list[Epoch]:
    """The run's epochs up to that of a checkpoint, whose meta this is.

    Raises ConfigError when the checkpoint is not one of this run, as of a folder that was copied here; StorageError
    when it is not the one that the run's ledger records.
    """
    step, named = meta["step"], meta.get("epoch")
    if named is None:
        made_by = meta.get("versions", {}).get("k2jax", "unknown")
        raise ConfigError(
            f"checkpoint {step} in {workdir} names no epoch: it was written by an older k2jax ({made_by}), use that one"
        )
    epochs = read_epochs(workdir) if has_epochs(workdir) else []
    found = epochs[named["number"] - 1] if 0 < named["number"] <= len(epochs) else None
    if found is None or found.name != named:
        here = f"that of run {found.run[:12]} here has {found.digest[:12]}" if found else "there is no such epoch"
        raise ConfigError(
            f"checkpoint {step} in {workdir} is of another run: it names epoch {named['number']} of run "
            f"{named['run'][:12]} with digest {named['digest'][:12]}, {here}: to go on from another run's checkpoint: "
            f"--fork=RUN@STEP, in a new workdir"
        )
    # A launch of a later k2jax has keys that the epoch has not: by their defaults, else there would be another epoch.
    configs = (found.config, configuration.to_dict(configuration.from_dict(found.config)))
    expected = {"config_digest": [drift.config_digest(config) for config in configs]}
    if found.manifest is not None:
        expected["manifest_digest"] = [manifest_digest(found.manifest)]
    for key, values in expected.items():
        if meta.get(key) not in values:
            raise ConfigError(
                f"checkpoint {step} in {workdir}: its {key} is {str(meta.get(key))[:12]}, that of its epoch "
                f"{values[0][:12]}: restore the checkpoint or epochs/ from a copy"
            )
    _check_ledger(workdir, meta)
    return epochs[: found.number]


def _check_ledger(workdir: Path, meta: dict[str, Any]) -> None:
    """That the ledger records this checkpoint, unless a kill came before that, and the one that it goes on from."""
    path, parent = workdir / "ledger" / "records.jsonl", meta["parent"] or {"step": 0}
    recorded: dict[int, str] = {}
    for record in read_records(path):
        if record["last_step"] in (meta["step"], parent["step"]):
            if sha256_json({k: v for k, v in record.items() if k != "record"}) != record.get("record"):
                raise StorageError(
                    f"{path}: the record of step {record['last_step']} is damaged: restore the file from a copy"
                )
            recorded[record["last_step"]] = record["checkpoint"]
    for step, digest, needed in ((meta["step"], meta["digest"], False), (parent["step"], parent.get("digest"), True)):
        if step and recorded.get(step, None if needed else digest) != digest:
            raise StorageError(
                f"{path}: of step {step} it records checkpoint {str(recorded.get(step))[:12]}, the one there, or that "
                f"the next names, is {digest[:12]}: of another run, or replaced; put the run's own files back"
            )
