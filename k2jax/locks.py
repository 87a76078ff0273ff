"""One process at a time: by the kernel's lock where the file system has one for all its hosts, else by a file.

    with locks.hold(path, "host a, pid 7"): ...      raises Held, with who holds it

Lustre without `-o flock`, some NFS and FUSE know no flock, or keep it to one host. There PATH.N stands for it, the file
with the highest N: made by exclusive creation, so that of two that want it one gets it, and written anew every BEAT_S
by a thread of its holder. Whoever finds one whose holder is certainly gone (same boot, same process namespace, no such
process), or that has not changed for STALE_S by the finder's own clock, makes N + 1. A holder that was stopped for that
long finds N + 1 when it goes on, and ends at once: so it does if it could not write for half of that time.
"""

import errno
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

from k2jax import errors

UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
OF_ONE_HOST = {"localflock", "nolock", "local_lock=flock", "local_lock=all"}  # mount options
BEAT_S, STALE_S = 15.0, 180.0
MOUNTS = Path("/proc/self/mountinfo")

_told: set[Path] = set()  # folders of which the missing lock was said


class Held(Exception):
    """Another process holds it: `str` says who."""


class Lock:
    """What `hold` gives: released by `release`, at the end of a `with`, or with the process."""

    def __init__(self, release: Callable[[], None]):
        self.release = release

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(path: Path, who: str, log: Callable[[str], None] = print) -> Lock:
    """Takes the lock of that path, and writes `who` into the file. Raises Held, or OSError."""
    file = path.open("a+")
    try:
        if why := _take(file, path):
            if path.parent not in _told:
                _told.add(path.parent)
                log(f"{path}: no lock for all hosts there ({why}): {path.name}.N, kept alive, stands for it")
            kept = _Kept(path, who, log)
            file.close()
            _write(path, who)
            return Lock(kept.release)
    except BaseException:
        file.close()
        raise
    file.truncate(0)
    file.write(who)
    file.flush()
    return Lock(file.close)  # the kernel drops it with the process, so a killed one leaves none behind


def wait(path: Path, who: str, log: Callable[[str], None] = print) -> Lock:
    """As `hold`, once whoever has it lets go."""
    while True:
        try:
            return hold(path, who, log)
        except Held:
            time.sleep(0.2)


def _take(file: IO[str], path: Path) -> str | None:
    """None with the kernel's lock; else why there is none."""
    if options := _mount_options(path) & OF_ONE_HOST:
        return ", ".join(options)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise Held(file.read().strip()) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return f"flock: {error.strerror}"
    return None


def _mount_options(path: Path) -> set[str]:
    """Of the file system that a path is on; none where that cannot be told."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return set()
    real, found = os.path.realpath(path), ("", set())
    for line in lines:
        fields, _, of_file_system = line.partition(" - ")
        words = fields.split(" ")
        if len(words) < 6:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4])
        if os.path.commonpath([real, point]) == point and len(point) >= len(found[0]):
            found = point, {*words[5].split(","), *of_file_system.rpartition(" ")[2].split(",")}
    return found[1]


class _Kept:
    """The file that stands for a lock, and the thread that keeps it alive."""

    def __init__(self, path: Path, who: str, log: Callable[[str], None]):
        self._base, self._log, self._over = path, log, threading.Event()
        number = self._wait_until_free() + 1
        self._path = path.with_name(f"{path.name}.{number:06d}")
        self._state = {"who": who, "beat": 0, "free": False, "process": _this_process()}
        try:
            with open(self._path, "xb", buffering=0) as file:
                file.write(_encoded(self._state))
        except FileExistsError:
            raise Held(_read(self._path).get("who", "a process that takes it just now")) from None
        if not self._is_mine():
            self._path.unlink(missing_ok=True)
            raise Held("a process that took it just now")
        for older in _numbers(path):
            if older < number:
                path.with_name(f"{path.name}.{older:06d}").unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._keep, name="k2jax-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """The number stays, marked as free: whoever saw it before can then not take the same number as another."""
        self._over.set()
        self._thread.join()
        if self._is_mine():
            _write(self._path, _encoded({**self._state, "free": True}).decode())

    def _wait_until_free(self) -> int:
        """The number of the newest file, which nobody holds; 0 without one. Raises Held."""
        seen, since = None, time.monotonic()
        while True:
            number = max(_numbers(self._base), default=0)
            state = _read(self._base.with_name(f"{self._base.name}.{number:06d}")) if number else {"free": True}
            if state.get("free"):
                return number
            who, lives = state.get("who", "a process that takes it just now"), _lives(state.get("process"))
            if lives is False:
                self._log(f"{self._base}: was held by {who}, which is gone")
                return number
            if lives or (seen is not None and seen != (number, state)):
                raise Held(who)
            if seen is None:
                self._log(f"{self._base}: held by {who}: watching for {STALE_S:.0f} s whether that lives")
            seen = number, state
            if time.monotonic() - since > STALE_S:
                self._log(f"{self._base}: was held by {who}, which gave no sign of life for {STALE_S:.0f} s")
                return number
            time.sleep(BEAT_S / 5)

    def _keep(self) -> None:
        written = time.monotonic()
        while not self._over.wait(BEAT_S):
            try:
                if not self._is_mine():
                    return _lost(f"{self._base}: another process took it while this one was stopped, or it was removed")
                self._state["beat"] += 1
                _write(self._path, _encoded(self._state).decode())
                written = time.monotonic()
            except OSError as error:
                if time.monotonic() - written > STALE_S / 2:
                    return _lost(f"{self._path}: cannot be kept alive ({error}): another process may take it")

    def _is_mine(self) -> bool:
        return self._path.exists() and max(_numbers(self._base)) == int(self._path.name.rpartition(".")[2])


def _lost(line: str) -> None:
    errors.leave_now(errors.StorageError.exit_code, line)


def _numbers(path: Path) -> list[int]:
    ends = [p.name[len(path.name) + 1 :] for p in path.parent.glob(f"{path.name}.*")]
    return [int(end) for end in ends if end.isdigit()]


def _write(path: Path, text: str) -> None:
    """In place, and closed, upon which a network file system shows it to others."""
    with open(path, "r+b", buffering=0) as file:
        file.write(text.encode())
        file.truncate()


def _encoded(state: dict[str, Any]) -> bytes:
    return json.dumps(state).encode()


def _read(path: Path) -> dict[str, Any]:
    """{} while it is being written."""
    try:
        state = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _this_process() -> dict[str, Any]:
    return {**_world(), "pid": os.getpid(), "started": started(os.getpid())}


def _world() -> dict[str, Any]:
    """In which a process number means one process: this boot of this host, and this namespace (containers)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = None
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _lives(process: Any) -> bool | None:
    """Whether the process of a lock runs; None where that cannot be told from here."""
    world = _world()
    if not isinstance(process, dict) or world["boot"] is None or any(process.get(k) != v for k, v in world.items()):
        return None
    return started(process["pid"]) == process["started"]


def started(pid: int) -> str | None:
    """When a process began, in ticks since boot: numbers are used again. None without one, or for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return fields[19] if fields[0] not in "ZX" else None
