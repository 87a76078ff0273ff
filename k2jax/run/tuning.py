"""What a GPU's compiler tuned for a run is part of the run: compiled/<device kind and versions>/ of its directory.

XLA times several programs of each product on the GPU at hand and takes the fastest: in another launch another one, with
other bits. It keeps what it took in a folder that it is given, a file each; here that folder is the run's, so that a
resume and a replay on such a device with such versions compute as the run did. Each file's SHA-256 is in tuned.json.
Of operations that would add up in no fixed order XLA is told to take none (training/program.py).

TPUs and CPUs tune nothing, and add up in one order: there, and with compiler.deterministic=False, nothing is kept.
"""

import hashlib
import importlib.metadata
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.data.manifest import sha256_json
from k2jax.errors import ConfigError
from k2jax.parallel import cluster, sharding

FOLDER, LIST = "compiled", "tuned.json"
CACHE, MODE = "xla_gpu_per_fusion_autotune_cache_dir", "xla_gpu_experimental_autotune_cache_mode"
# That compile, or hold the products and the attention that are chosen from.
PACKAGES = ("jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cublas", "nvidia-cublas-cu12",
            "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # fmt: skip
AnyFolder = Path | BucketPath


class Kept(NamedTuple):
    """`name` is of the folder of each process's machine where the compiler reads and writes: it is part of the key by
    which JAX caches a program, so it is the same on all of them, and at every resume."""

    name: str
    files: dict[str, str]  # bytes by name, as Latin-1, which all bytes are: JSON takes them so


class Tuning:
    """Of one run on the devices here. `options` are the compiler's; `keep` what it has added."""

    def __init__(self, options: dict[str, Any], compiler_has: Path | None = None, run_has: Path | None = None):
        self.options = options
        self._compiler_has, self._run_has = compiler_has, run_has

    @classmethod
    def of_run(cls, config: ConfigDict, workdir: Path) -> "Tuning":
        """The trainer's, on every process. ConfigError where a file is not the one that was kept."""
        if not is_kept(config):
            return cls({})
        folder = workdir / FOLDER / key()
        kept = Kept(*cluster.decide("reads what was tuned", lambda: read(folder)))
        place = cluster.together("writes what was tuned", lambda: write_for_compiler(kept))
        mode = "UPDATE" if cluster.is_main() else "READ"
        return cls(_options(place, mode), place, folder if cluster.is_main() else None)

    @classmethod
    def of_reader(cls, config: ConfigDict, workdir: AnyFolder, say: Callable[[str], None]) -> "Tuning":
        """A replay's: as the run had it, where nothing is kept."""
        if not is_kept(config):
            return cls({})
        kept = read(workdir / FOLDER / key())
        if not kept.files:
            say(f"the run kept nothing that was tuned for {key()}: other bits may come of it")
        return cls(_options(write_for_compiler(kept), "READ"))

    def keep(self) -> None:
        """After a compilation: what the compiler has added is the run's from now on."""
        if self._run_has is None:
            return
        digests = {}
        for path in sorted(self._compiler_has.iterdir()):
            if path.is_file():  # XLA has a folder there for files that are not whole yet
                data = path.read_bytes()
                files.write_bytes(self._run_has / path.name, data)
                digests[path.name] = hashlib.sha256(data).hexdigest()
        files.write_json(self._run_has / LIST, {"name": self._compiler_has.name, "files": digests})


def is_kept(config: ConfigDict) -> bool:
    return config.compiler.deterministic and sharding.platform() == "gpu"


def key() -> str:
    """Of the devices and versions here: what was tuned for others is of no use to them."""
    versions = []
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    kind = re.sub(r"[^A-Za-z0-9]+", "-", sharding.device_kind()).strip("-")
    return f"{kind}_{sha256_json(versions)[:12]}"


def read(folder: AnyFolder) -> Kept:
    """What a run has kept; nothing, under a new name, where it has not. ConfigError for files that have changed."""
    path = folder / LIST
    if not path.exists():
        return Kept(f"k2jax-tuned-{os.getuid()}-{secrets.token_hex(8)}", {})
    listed = files.parse_json(path.read_bytes(), str(path))
    if not _is_list(listed):
        raise ConfigError(f"{path} is damaged: restore it from a copy, or remove {folder}: other bits follow")
    found = {}
    for file, digest in listed["files"].items():
        there = (folder / file).exists()
        data = (folder / file).read_bytes() if there else b""
        if not there or hashlib.sha256(data).hexdigest() != digest:
            raise ConfigError(
                f"{folder / file} is {'not the file that was kept' if there else 'gone'}: restore it from a copy, or "
                f"remove {folder}: the compiler then tunes again, and other bits follow"
            )
        found[file] = data.decode("latin-1")
    return Kept(listed["name"], found)


def _is_list(listed: Any) -> bool:
    """A reader may have it of a stranger: its names lead out of no folder."""
    if not isinstance(listed, dict) or not isinstance(listed.get("files"), dict):
        return False
    is_name = re.fullmatch(r"k2jax-tuned-\d+-[0-9a-f]{16}", str(listed.get("name")))
    return bool(is_name) and all(re.fullmatch(r"\w[\w.-]*", file, re.ASCII) for file in listed["files"])


def write_for_compiler(kept: Kept) -> Path:
    """The folder, of this user alone, where the compiler finds it. Files of a launch that was killed stay: a program
    that was compiled with them may be cached."""
    place = Path(tempfile.gettempdir()) / kept.name
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise ConfigError(f"{place} is another user's: remove it, or set TMPDIR to a folder of your own")
    for file, text in kept.files.items():
        files.write_bytes(place / file, text.encode("latin-1"))
    return place


def _options(place: Path, mode: str) -> dict[str, Any]:
    return {CACHE: str(place), MODE: f"AUTOTUNE_CACHE_MODE_{mode}"}
