"""The run directory: its lock, what it says of itself, and the refusal to resume it as something else.

epochs/  environment.json  journal.jsonl  tokenizer.json  metrics/  ledger/  held_out/  checkpoints/  branches/
compiled/  reference/  abandoned/
"""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import k2jax
from k2jax import config as configuration
from k2jax import errors, files, paths
from k2jax.bucket import BucketPath, at
from k2jax.data.epochs import Epoch, epoch_path, has_epochs, new_epoch, read_epochs, write_epoch
from k2jax.data.journal import read_journal
from k2jax.data.launches import read_launches, write_launches
from k2jax.errors import ConfigError, StorageError
from k2jax.model.decoder import parameter_table
from k2jax.parallel import cluster
from k2jax.run import branches, drift
from k2jax.run.commit import git_commit
from k2jax.run.fork import fork, new_name, read_fork
from k2jax.run.holding import InBucket, OnDisk
from k2jax.run.identity import epochs_of
from k2jax.run.saved import open_step, steps_so_far
from k2jax.text import without_secrets

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
ENVIRONMENT = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
)
# That the trainer alone writes anew; a plan or an evaluation may be writing its own beside them.
OWN_FILES = ("environment.json", "tokenizer.json", "validation.json", "goodput.jsonl")


class RunDirectory:
    """One trainer at a time may hold it: `with RunDirectory(path) as run`.

    `place` is where it is, `path` the folder of this machine where its small files are written: another one only for a
    run in a bucket, which has a `mirror`.
    """

    def __init__(self, path: str | Path | BucketPath, say: Callable[[str], None] = print):
        place = paths.absolute(at(path))
        self._held = InBucket(place, say) if isinstance(place, BucketPath) else OnDisk(place)
        self._say = say
        self.place, self.path, self.mirror = place, self._held.path, self._held.mirror

    def __enter__(self) -> "RunDirectory":
        errors.keep_files_ours()
        holder = cluster.decide("takes the workdir", self._held.take)
        cluster.together("looks into the workdir", lambda: self._held.check(holder))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._held.leave(error)

    def fork(self, source: Path, step: int) -> None:
        """Makes this a fork of another run at a step, unless it is that already."""
        if self.mirror:
            raise ConfigError(f"--workdir={self.place}: a fork is made on a disk: fork there, and copy what it makes")
        cluster.decide("forks a run", lambda: fork(source, step, self.path))

    def check(
        self, config: ConfigDict, manifest: dict[str, Any], mesh_shape: dict[str, int], launched: bool = True
    ) -> None:
        """Refuses early, before anything large is read, what `begin` would refuse; and notes the launch.

        Before that it completes a roll-back, after which a run begins again without having been `launched` again.

        Raises ConfigError with a key-by-key difference when configuration, tokenizer, stores or order have changed and
        `allow_drift` does not name the keys; and when launch after launch has made no new checkpoint.
        """
        step = cluster.decide("looks at the run", lambda: self._check(config, manifest))
        if launched:
            cluster.decide("notes its launch", lambda: self._note_launch(config, manifest, mesh_shape, step))

    def _check(self, config: ConfigDict, manifest: dict[str, Any]) -> int | None:
        for name in OWN_FILES:
            files.remove_leftovers(self.path, name, alone=True)
        branches.complete(self.path, self.place, steps_so_far(self.place), self._held.put_away)
        step = max(steps_so_far(self.place), default=None)
        if step is not None:
            with suppress(StorageError):  # of a damaged meta, which is not the one that will be restored
                saved = open_step(self.place, step)
                self._next(saved.epochs, config, manifest, step)
        return step

    def begin(
        self, config: ConfigDict, manifest: dict[str, Any], restored: dict[str, Any] | None
    ) -> tuple[list[Epoch], list[dict[str, Any]]]:
        """(epochs, journal) of the run, the last epoch that of this launch.

        It counts from the first checkpoint that names it: of one that none does, as of a launch that made no step, and
        of those after the checkpoint that was restored, nothing is left.

        Args:
            restored: the meta of the checkpoint that the run goes on from; None at its start.

        Raises ConfigError as `check` does, and when the checkpoint is not one of this run.
        """
        epochs, journal = cluster.decide("begins the run", lambda: self._begin(config, manifest, restored))
        self.put()
        if restored:
            self._say_other_versions(restored)
        return [Epoch(*epoch) for epoch in epochs], journal

    def put(self) -> None:
        """What was written is where the run is, and every process sees it."""
        self._held.put()

    def _say_other_versions(self, restored: dict[str, Any]) -> None:
        """Of what computes and stores, where they are not those of the checkpoint: bits may differ from here on."""
        was, now = restored.get("versions", {}), versions()
        changed = [f"{name} {was[name]}, now {now.get(name, 'none')}" for name in was if was[name] != now.get(name)]
        if changed and cluster.is_main():
            self._say(
                f"checkpoint {restored['step']} was saved with other versions: {'; '.join(changed)}: what follows may "
                f"have other bits than with those"
            )

    def _begin(
        self, config: ConfigDict, manifest: dict[str, Any], restored: dict[str, Any] | None
    ) -> tuple[list[Epoch], list[dict[str, Any]]]:
        if restored is None:
            self._check_begins()
        kept = epochs_of(self.place, restored) if restored else []
        epoch = self._next(kept, config, manifest, restored["step"] if restored else 0)
        there = read_epochs(self.path) if has_epochs(self.path) else []
        if epoch and len(there) == len(kept) + 1 and there[-1].is_as(epoch):
            epoch = there[-1]  # that of an earlier launch, which made no checkpoint
        else:
            for old in reversed(there[len(kept) :]):
                self._put_away(old)
        if not _is_same_file(config.data.tokenizer, self.path / "tokenizer.json"):
            files.write_bytes(self.path / "tokenizer.json", Path(config.data.tokenizer).read_bytes())
        if epoch and epoch not in there:
            write_epoch(self.path, epoch)
        return [*kept, epoch] if epoch else kept, read_journal(self.path / "journal.jsonl")

    def _check_begins(self) -> None:
        """Raises StorageError where there must have been a checkpoint: a run never starts from scratch in silence."""
        first = read_epochs(self.path)[0] if has_epochs(self.path) else None
        imported, records = first is not None and first.manifest is None, self.path / "ledger" / "records.jsonl"
        if imported or read_fork(self.path) or (records.exists() and records.stat().st_size):
            was = "an import" if imported else "a run that had checkpoints"
            raise StorageError(
                f"--workdir={self.path} holds {was}, and none is there: restore checkpoints/ from a copy, or use a new "
                f"workdir"
            )

    def _put_away(self, epoch: Epoch) -> None:
        place = self.path / "abandoned" / f"epoch-{epoch.number:04d}-{epoch.digest[:12]}.json"
        files.move(epoch_path(self.path, epoch.number), place)

    def _next(
        self, before: list[Epoch], config: ConfigDict, manifest: dict[str, Any], step: int
    ) -> Epoch | None:
        """The epoch that follows those before it from `step` on; None where nothing has changed that makes one."""
        new, fork = configuration.to_dict(config), read_fork(self.path)
        if not before:
            return new_epoch([], run=new_name(), after_step=0, config=new, manifest=manifest)
        last = before[-1]
        what = f"--workdir={self.place} holds another run"
        if last.manifest is None:
            differences = _difference_from_import(last, new, manifest)
            what = f"--workdir={self.place} holds weights imported from another model"
        else:
            differences = drift.differences(last.config, new)
            differences |= drift.differences(_identity(last.manifest), _identity(manifest))
        _refuse(differences, config.allow_drift, what)
        _check_same_arrays(last.config, new)
        begins = last.manifest is None or (fork is not None and last.run != fork["run"])
        if not differences and not begins:
            return None
        origin = {"run": fork["run"], "origin": fork["origin"]} if fork and last.run != fork["run"] else {}
        changes = {key: list(pair) for key, pair in differences.items()}
        if last.manifest is None and last.config["stages"][0]["rope_base"] != new["stages"][0]["rope_base"]:
            # It may differ, as stages of one run do; the epoch says so.
            changes["stages.0.rope_base"] = [c["stages"][0]["rope_base"] for c in (last.config, new)]
        return new_epoch(before, after_step=step, config=new, manifest=manifest, changes=changes, **origin)

    def _note_launch(
        self, config: ConfigDict, manifest: dict[str, Any], mesh_shape: dict[str, int], step: int | None
    ) -> None:
        """One entry a launch: a run may move between machines, and restarts must not go on for ever without a step."""
        launches = read_launches(self.path)
        most, same = config.checkpoint.max_launches, 0
        for launch in reversed(launches):
            if launch.get("newest_step") != step or launch.get("done"):
                break
            same += 1
        if most and same >= most:
            raise ConfigError(
                f"--workdir={self.place}: {same} launches since {launches[-same]['time']} have made no new checkpoint "
                f"{'after step ' + str(step) if step is not None else 'at all'}: find out why from their logs; to go "
                f"on trying: --config.checkpoint.max_launches={2 * most}, 0 for no limit"
            )
        stores = {store["root_digest"]: store["path"] for store in manifest["stores"].values()}
        launch = {**environment(mesh_shape), "newest_step": step, "stores": stores}
        write_launches(self.path, [*launches, launch])

    def note_launch(self, values: dict[str, Any]) -> None:
        """Adds what is known now to this launch's entry in environment.json; process 0 alone does that."""
        *earlier, launch = read_launches(self.path)
        write_launches(self.path, [*earlier, {**launch, **values}])

    def end(self) -> None:
        """Notes that this launch came to the end of the run."""
        cluster.decide("ends the run", lambda: self.note_launch({"done": True}))


def _difference_from_import(last: Epoch, new: dict[str, Any], manifest: dict[str, Any]) -> dict[str, tuple]:
    """Only the model and its tokens must be those of imported weights: {key: (before, now)} of what is not."""
    differences = drift.differences({"model": last.config["model"]}, {"model": new["model"]})
    for key in ("eos_id", "tokenizer_sha256"):
        if last.origin[key] != manifest[key]:
            differences[f"manifest.{key}"] = last.origin[key], manifest[key]
    return differences


def _refuse(differences: dict[str, tuple], allowed: tuple[str, ...], what: str) -> None:
    """ConfigError for keys that differ and may not."""
    refused = drift.not_allowed(differences, allowed)
    if refused:
        shown = "; ".join(f"{key}: {differences[key][0]!r} -> {differences[key][1]!r}" for key in refused[:20])
        raise ConfigError(
            f"{what}, {len(refused)} key(s) differ: {shown}. Use another workdir, undo the change, or allow it: "
            f"--config.allow_drift={shlex.quote(json.dumps(refused))}"
        )


def _is_same_file(a: str, b: Path) -> bool:
    return b.exists() and Path(a).samefile(b)


def environment(mesh_shape: dict[str, int]) -> dict[str, Any]:
    """Hardware, versions, flags and commit of this process: an allow-list, never the whole environment."""
    devices = jax.devices()
    return {
        "time": _now(),
        "host": socket.gethostname(),
        "command": [without_secrets(argument) for argument in sys.argv],
        "commit": git_commit(),
        "versions": versions(),
        "devices": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "processes": cluster.count(),
            "mesh": mesh_shape,
        },
        "host_hardware": {
            "cpu": _cpu_name(),
            "cpus": os.cpu_count(),
            "machine": platform.machine(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "flags": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Of what computes and stores; asked for by name: what all of hundreds of packages say takes most of a second."""
    found = {"k2jax": k2jax.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _check_same_arrays(old_config: dict, new_config: dict) -> None:
    """No leave helps a model that cannot hold what the checkpoints hold: refused before anything is written."""
    tables = [parameter_table(configuration.from_dict(config).model) for config in (old_config, new_config)]
    old, new = ({name: p.shape for name, p in table.items()} for table in tables)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ConfigError(
                f"the model's keys have changed: its array {name} was {old.get(name, 'absent')}, is now "
                f"{new.get(name, 'absent')}: allow_drift cannot allow that; undo the change, or use another workdir"
            )


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What of the manifest does not follow from the configuration: tokenizer and stores' contents."""
    stores = {name: store["root_digest"] for name, store in manifest["stores"].items()}
    return {
        "manifest": {
            "stores": stores,
            **{k: manifest[k] for k in ("format", "tokenizer_sha256", "vocab_size", "eos_id")},
        }
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
