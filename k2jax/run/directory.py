"""The run directory: its lock, what it says of itself, and the refusal to resume it as something else.

config.json  environment.json  manifest.json  journal.jsonl  tokenizer.json
metrics/  ledger/  checkpoints/  tensorboard/  abandoned/
"""

import fcntl
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import k2jax
from k2jax import config as configuration
from k2jax import files
from k2jax.data.journal import append_entry, read_journal
from k2jax.data.manifest import load_manifest, manifest_digest, save_manifest
from k2jax.data.order import Order
from k2jax.errors import ConfigError, StorageError
from k2jax.model.decoder import parameter_table
from k2jax.parallel import cluster
from k2jax.run import drift
from k2jax.run.checkpoint import read_meta
from k2jax.run.saved import saved_steps

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")
ENVIRONMENT = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
)
SEEN_S = 60  # by when every process sees what process 0 wrote
# That the trainer alone writes anew; a plan or an evaluation may be writing its own beside them.
OWN_FILES = ("config.json", "environment.json", "manifest.json", "tokenizer.json", "validation.json")


class RunDirectory:
    """One trainer at a time may hold it: `with RunDirectory(path) as run`."""

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        self._lock = None

    def __enter__(self) -> "RunDirectory":
        holder = cluster.decide("takes the workdir", self._take_lock)
        cluster.together("looks into the workdir", lambda: self._check_shared(holder))
        return self

    def _take_lock(self) -> str:
        """Who holds it now. The kernel drops the lock with the process, so a killed run leaves none behind."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise StorageError(
                f"--workdir={self.path}: cannot be made or written: {error.strerror}; "
                f"name a folder that you may write"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            raise ConfigError(
                f"--workdir={self.path} is in use by another run ({holder}): wait for it, or use "
                f"another workdir"
            ) from None
        self._lock.truncate(0)
        holder = f"host {socket.gethostname()}, pid {os.getpid()}, since {_now()}"
        self._lock.write(holder)
        self._lock.flush()
        return holder

    def _check_shared(self, holder: str) -> None:
        """That this process sees what process 0 wrote; a network file system may take a while to show it."""
        deadline = time.monotonic() + SEEN_S
        while True:
            found = (self.path / "lock").read_text() if (self.path / "lock").exists() else "nothing"
            if found == holder:
                return
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--workdir={self.path}: on {socket.gethostname()} its lock holds {found!r}, process 0 wrote "
                    f"{holder!r}: it is not one folder; name one on storage that all processes share"
                )
            time.sleep(0.5)

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    def begin(
        self, config: ConfigDict, manifest: dict[str, Any], mesh_shape: dict[str, int]
    ) -> list[dict[str, Any]]:
        """Writes what the run is, or checks that it is what the directory holds; returns the journal.

        Raises ConfigError with a key-by-key difference when configuration, tokenizer, stores or order have changed and
        `allow_drift` does not name the keys; what it names is written to the journal.
        """
        return cluster.decide("begins the run", lambda: self._begin(config, manifest, mesh_shape))

    def _begin(
        self, config: ConfigDict, manifest: dict[str, Any], mesh_shape: dict[str, int]
    ) -> list[dict[str, Any]]:
        new = configuration.to_dict(config)
        allowed = self._allowed_drift(new, manifest, config.allow_drift)
        for name in OWN_FILES:
            files.remove_leftovers(self.path, name, alone=True)
        if allowed:
            append_entry(self.path / "journal.jsonl", allowed)
        if not _is_same_file(config.data.tokenizer, self.path / "tokenizer.json"):
            files.write_bytes(self.path / "tokenizer.json", Path(config.data.tokenizer).read_bytes())
        save_manifest(manifest, self.path / "manifest.json")
        values = {"digest": drift.config_digest(config), "config": new}
        files.write_json(self.path / "config.json", values, sort_keys=True, end="")
        self._add_environment(mesh_shape)
        return read_journal(self.path / "journal.jsonl")

    def _allowed_drift(self, new: dict, manifest: dict, allowed: tuple[str, ...]) -> dict[str, Any] | None:
        """The entry that the journal lacks of what has changed and may; ConfigError for what may not."""
        if not (self.path / "config.json").exists():
            return None
        old_config = files.read_json(self.path / "config.json")["config"]
        if is_import(old_config):
            return self._difference_from_import(old_config, new, manifest, allowed)
        old_manifest = load_manifest(self.path / "manifest.json")
        old_identity, new_identity = _identity(old_manifest), _identity(manifest)
        differences = drift.differences(old_config, new) | drift.differences(old_identity, new_identity)
        self._refuse(differences, allowed, "holds another run")
        _check_same_arrays(old_config, new)
        journal = read_journal(self.path / "journal.jsonl")
        entry = {
            "by": "k2jax.train",
            "why": "allow_drift",
            "kind": "allow_drift",
            "at_step": _newest_step(self.path),
            "changes": {key: list(pair) for key, pair in differences.items()},
            "manifest_before": manifest_digest(old_manifest),
            "manifest_after": manifest_digest(manifest),
        }
        # A kill after the entry and before the files that it tells of: it is there already.
        if not differences or (journal and entry.items() <= journal[-1].items()):
            return None
        before, after = Order(old_manifest, journal).digest(), Order(manifest, journal).digest()
        return {"time": _now(), **entry, "order_before": before, "order_after": after}

    def check_restored(self, meta: dict[str, Any], config: ConfigDict) -> None:
        """Raises ConfigError when the checkpoint was trained with another configuration than what may have changed.

        It is compared itself, because it may have come here from another run.
        """
        if not is_import(meta["config"]):
            differences = drift.differences(meta["config"], configuration.to_dict(config))
            self._refuse(differences, config.allow_drift, f"holds checkpoint {meta['step']} of another run")

    def _difference_from_import(
        self, old: dict, new: dict, manifest: dict[str, Any], allowed: tuple[str, ...]
    ) -> dict[str, Any] | None:
        """The same for the start of a run on imported weights: only the model and its tokens must be theirs.

        The rope base may differ, as stages of one run do; the journal says so.
        """
        meta = read_import(self.path)
        differences = drift.differences({"model": old["model"]}, {"model": new["model"]})
        for key in ("eos_id", "tokenizer_sha256"):
            if meta[key] != manifest[key]:
                differences[f"manifest.{key}"] = meta[key], manifest[key]
        self._refuse(differences, allowed, "holds weights imported from another model")
        _check_same_arrays(old, new)
        bases = old["stages"][0]["rope_base"], new["stages"][0]["rope_base"]
        if bases[0] != bases[1]:
            differences["stages.0.rope_base"] = bases
        changes = {key: list(pair) for key, pair in differences.items()}
        entry = {"by": "k2jax.train", "why": "not as imported", "kind": "import", "at_step": 0, "changes": changes}
        journal = read_journal(self.path / "journal.jsonl")
        # A kill after the entry and before the files that end this state: it is there already.
        if not changes or (journal and entry.items() <= journal[-1].items()):
            return None
        return {"time": _now(), **entry}

    def _refuse(self, differences: dict[str, tuple], allowed: tuple[str, ...], what: str) -> None:
        """ConfigError for keys that differ and may not."""
        refused = drift.not_allowed(differences, allowed)
        if refused:
            shown = "; ".join(f"{key}: {differences[key][0]!r} -> {differences[key][1]!r}" for key in refused[:20])
            raise ConfigError(
                f"--workdir={self.path} {what}, {len(refused)} key(s) differ: {shown}. Use "
                f"another workdir, undo the change, or allow it: --config.allow_drift='{tuple(refused)!r}'"
            )

    def _add_environment(self, mesh_shape: dict[str, int]) -> None:
        """One entry a launch: a run may move between machines."""
        path = self.path / "environment.json"
        launches = files.read_json(path)["launches"] if path.exists() else []
        files.write_json(path, {"launches": [*launches, environment(mesh_shape)]}, sort_keys=True, end="")

    def note_launch(self, values: dict[str, Any]) -> None:
        """Adds what is known now to this launch's entry in environment.json; process 0 alone does that."""
        path = self.path / "environment.json"
        launches = files.read_json(path)["launches"]
        launches[-1] |= values
        files.write_json(path, {"launches": launches}, sort_keys=True, end="")


def is_import(config: dict[str, Any]) -> bool:
    """Whether a saved configuration is of imported weights, before a run on them: its one stage has no data."""
    return not any(stage["mix"] for stage in config["stages"])


def read_import(path: Path) -> dict[str, Any]:
    """The meta of the imported checkpoint; StorageError when it is missing or damaged."""
    try:
        return read_meta(path / "checkpoints" / "0" / "meta")
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"--workdir={path} holds an import, but its checkpoint 0 cannot be read ({error}): import again"
        ) from error


def _newest_step(path: Path) -> int:
    """Of the checkpoints that are there; 0 without any."""
    return max(saved_steps(path), default=0) if (path / "checkpoints").is_dir() else 0


def _is_same_file(a: str, b: Path) -> bool:
    return b.exists() and Path(a).samefile(b)


def environment(mesh_shape: dict[str, int]) -> dict[str, Any]:
    """Hardware, versions, flags and commit of this process: an allow-list, never the whole environment."""
    devices = jax.devices()
    return {
        "time": _now(),
        "host": socket.gethostname(),
        "command": sys.argv,
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


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, "+" when it has uncommitted changes; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


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
