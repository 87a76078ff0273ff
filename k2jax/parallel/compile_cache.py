"""Compiled programs are kept from one launch to the next: a resumed run has its first step sooner.

JAX has a cache of them, whose key is the program and all that compiled it. Off until a folder is named; here it is on:

    JAX_COMPILATION_CACHE_DIR=DIR|URL   JAX's own cache there, as JAX does it; "off" or "": none
    otherwise                           XDG_CACHE_HOME/k2jax/compiled/<versions>, in files of ours

JAX writes an entry in place: one half written by a kill or a full disk is never replaced, and what was flipped later is
loaded as code. Ours are whole or absent and hold their SHA-256. Whoever may write there may run code as this user, so
that the folder has to be this user's own. Nothing that goes wrong here ends a run: it says so once, and compiles.
"""

import hashlib
import importlib.metadata
import os
import platform
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax._src import compilation_cache as jax_cache  # which object is the cache has no public name
from jax._src.compilation_cache_interface import CacheInterface

import k2jax
from k2jax import files
from k2jax.errors import ConfigError, RunError
from k2jax.parallel import cluster

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
LIMIT_BYTES = 4 << 30  # of all versions together; what was not used for longest goes
WORTH_S = 0.2  # what compiles sooner is not kept
SEEN_S = 5.0  # in which each process must see what process 0 wrote
SUFFIX = ".program"
DIGEST_BYTES = hashlib.sha256().digest_size


class Programs(CacheInterface):
    """A folder of compiled programs, one file each: SHA-256 of key and program, then the program as JAX gives it."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._path, self.say, self.works = folder, say, True

    def get(self, key: str) -> bytes | None:
        """The program; None where there is none, or a damaged one, which is then compiled and written again."""
        path = self._file(key)
        try:
            entry = path.read_bytes()
            if entry[:DIGEST_BYTES] != _digest(key, entry[DIGEST_BYTES:]):
                path.unlink(missing_ok=True)
                return None
            os.utime(path)  # when it was last used
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._give_up(error)
        return entry[DIGEST_BYTES:]

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program: JAX calls this in process 0 alone."""
        try:
            if self.works:
                files.remove_leftovers(self._path)
                files.write_bytes(self._file(key), _digest(key, value) + value)
                make_room(self._path.parent)
        except (OSError, RunError) as error:
            self._give_up(error)

    def _file(self, key: str) -> Path:
        return self._path / f"{key}{SUFFIX}"

    def _give_up(self, error: Exception) -> None:
        if self.works:
            self.say(f"compiled programs are not kept any more: {error}")
        self.works = False


def _digest(key: str, program: bytes) -> bytes:
    """With the key, so that an entry under another's name is none."""
    return hashlib.sha256(key.encode() + b"\0" + program).digest()


def make_room(root: Path, limit_bytes: int = LIMIT_BYTES) -> None:
    """Removes what was not used for longest, of any version, until what is left is within the limit."""
    found = []
    for path in root.glob(f"*/*{SUFFIX}"):
        with suppress(FileNotFoundError):  # another run makes room, too
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    too_many = sum(size for _, size, _ in found) - limit_bytes
    for _, size, path in sorted(found):
        if too_many <= 0:
            return
        path.unlink(missing_ok=True)
        too_many -= size


# ---- which folder ----------------------------------------------------------------------------------------------------


def use(say: Callable[[str], None]) -> None:
    """Turns the cache on, for all processes alike; call it when they have come together, before anything is compiled.

    With several, only process 0 writes, and all read or none: a compiler that tunes with the other processes' help
    would wait for one that has its program already. (On CPUs JAX's key is each process's own: only the first is warm.)
    """
    _count_events()
    backend = jax.default_backend()  # here, as the processes make its client together
    found = cluster.decide("finds the cache of compiled programs", lambda: _wanted(backend)._asdict())
    wanted = Wanted(**found)
    why = wanted.why
    if not why and cluster.count() > 1 and "://" not in wanted.folder:
        why = _not_shared(Path(wanted.folder))
    if why:
        say(f"compiled programs are not kept: {why}")
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_compilation_cache_dir", wanted.folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_S)
    if wanted.ours:
        # XLA's own files of a GPU's tuning: it ends the compilation where it cannot write them.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        jax_cache.reset_cache()
        jax_cache._cache = Programs(Path(wanted.folder), say)


class Wanted(NamedTuple):
    """What this process alone would use."""

    folder: str = ""
    ours: bool = False
    why: str = ""  # there is none


def _wanted(backend: str) -> Wanted:
    if not jax.config.jax_enable_compilation_cache:
        return Wanted(why="JAX_ENABLE_COMPILATION_CACHE is off")
    if VARIABLE in os.environ:
        named = os.environ[VARIABLE]
        return Wanted(named) if named not in ("", "off") else Wanted(why=f"{VARIABLE} is {named or 'empty'}")
    try:
        root = _root()
        folder = root / versions(backend)
        for part in (root.parent, root, folder):
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_own(part)
    except (OSError, RuntimeError, RunError) as error:  # RuntimeError: of a user without a home
        return Wanted(why=f"{error}: {VARIABLE} names another folder, or is off")
    return Wanted(str(folder), ours=True)


def _root() -> Path:
    """By the XDG Base Directory Specification, which ignores a relative path."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "k2jax" / "compiled"


def _check_own(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{folder} belongs to or can be written by others, whose code would be run")


def versions(backend: str) -> str:
    """Of all that decides what a compiled program is; on a CPU also of the CPU, which no other can stand in for."""
    parts = [f"k2jax-{k2jax.__version__}"]
    for name in COMPILERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{name}-{importlib.metadata.version(name)}")
    if backend == "cpu":
        parts.append(f"cpu-{cpu_digest()}")
    return "_".join(parts)


def cpu_digest() -> str:
    """Of model, instructions and number of the cores here: XLA compiles for these, and splits work by the number."""
    info, wanted = Path("/proc/cpuinfo"), ("vendor_id", "model name", "flags", "Features", "CPU part")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    chosen = sorted({line for line in lines if line.startswith(wanted)}) or lines[:1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return hashlib.sha256("\n".join([platform.machine(), str(cores), *chosen]).encode()).hexdigest()[:12]


def _not_shared(folder: Path) -> str:
    """Why not all processes see the folder of process 0; "" where they do."""

    def write() -> str:
        token = f"seen-{secrets.token_hex(8)}"
        try:
            files.write_text(folder / token, "")
        except (OSError, RunError):
            return ""  # it may be read still
        return token

    def check() -> None:
        deadline = time.monotonic() + SEEN_S
        while not (folder / token).exists():
            if time.monotonic() > deadline:
                raise ConfigError(f"not all processes see {folder}: {VARIABLE} names one that they share")
            time.sleep(0.2)

    token, why = cluster.decide("writes into the cache of compiled programs", write), ""
    try:
        cluster.together("looks into the cache of compiled programs", check)
    except ConfigError as error:
        why = str(error)
    if token and cluster.is_main():
        (folder / token).unlink(missing_ok=True)
    return why


# ---- what came out of it ---------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Programs asked for, and those of them that did not have to be compiled."""

    asked: int
    found: int

    def since(self, before: "Counts") -> "Counts":
        """What came after."""
        return Counts(self.asked - before.asked, self.found - before.found)


_events = {"/jax/compilation_cache/compile_requests_use_cache": 0, "/jax/compilation_cache/cache_hits": 0}
_counting: list[bool] = []


def counts() -> Counts:
    """Since the program's start; of nothing where there is no cache."""
    return Counts(*_events.values())


def _count_events() -> None:
    if not _counting:
        jax.monitoring.register_event_listener(_count)
        _counting.append(True)


def _count(event: str, **_: Any) -> None:
    if event in _events:
        _events[event] += 1
