"""Who may write below a URL: an object that its holder writes anew every few seconds, each time over its own last one.

A bucket has no lock that goes with its process. Whoever finds the object watches it: one that does not change for
LEASE_S is nobody's any more and is taken over, by a conditional write that only one can win. A holder that could not
renew for so long, because its machine stood still, finds that out before its next write, and stops.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from k2jax.bucket import BucketPath
from k2jax.errors import ConfigError, StorageError
from k2jax.files import is_running

LEASE_S, RENEW_S = 60.0, 10.0


class Lease:
    """One holder at a time has the object `path`; `what` is what it stands for, in messages."""

    def __init__(self, path: BucketPath, what: str, lease_s: float | None = None, renew_s: float | None = None):
        self.path, self.what, self.lease_s, self.renew_s = path, what, lease_s or LEASE_S, renew_s or RENEW_S
        self.holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "token": uuid.uuid4().hex,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._generation, self._renewals, self._renewed = b"", 0, 0.0
        self._one_at_a_time, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: ConfigError | None = None

    def take(self, say: Callable[[str], None] = print) -> None:
        """Waits for a holder that gives no sign; ConfigError when there is one that does."""
        while not (generation := self.path.create(self._content())):
            with suppress(FileNotFoundError):  # it has just been let go
                if generation := self._take_over(say):
                    break
        self._generation, self._renewed = generation, _now()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _take_over(self, say: Callable[[str], None]) -> bytes | None:
        data, generation = self.path.read()
        holder = _parse(data)
        here = _machine() is not None and holder.get("machine") == _machine()
        if not here or is_running(holder["pid"]):
            say(
                f"{self.what} was held by {_shown(holder)}: waiting up to {self.lease_s:.0f} s for a sign of it"
            )
            end = _now() + self.lease_s
            while _now() < end:
                time.sleep(self.lease_s / 20)
                if self.path.read()[1] != generation:
                    raise ConfigError(
                        f"{self.what} is in use by another run ({_shown(holder)}): wait for it, or use another"
                    )
        return self.path.replace(self._content(), generation)

    def check(self) -> None:
        """Raises ConfigError when another has taken it, StorageError when that cannot be known."""
        if self._lost is None and _now() - self._renewed > self.lease_s / 2:
            self._renew()
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Lets go of it; the one of another, who has taken it over, stays as it is."""
        self.stop()
        if self._thread is not None:
            with suppress(StorageError):
                self.path.remove(self._generation)

    def stop(self) -> None:
        """Renews it no more, as after a kill: what it stands for is not in order, and the next one sees that."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _keep(self) -> None:
        while not self._stop.wait(self.renew_s) and self._lost is None:
            with suppress(StorageError):  # it is tried again, and `check` tells of it
                self._renew()

    def _renew(self) -> None:
        with self._one_at_a_time:
            self._renewals += 1
            if generation := self.path.replace(self._content(), self._generation):
                self._generation, self._renewed = generation, _now()
                return
            try:
                data, generation = self.path.read()
            except FileNotFoundError:
                found = "nobody: its lock is deleted"
            else:
                if (
                    _parse(data).get("token") == self.holder["token"]
                ):  # an earlier write of ours without an answer
                    self._generation, self._renewed = generation, _now()
                    return
                found = _shown(_parse(data))
            self._lost = ConfigError(
                f"{self.what} has been taken over by {found}, as this process gave no sign for {self.lease_s:.0f} s: "
                f"it stops here and writes nothing more"
            )

    def _content(self) -> bytes:
        return json.dumps({**self.holder, "renewals": self._renewals}).encode()


@contextmanager
def taken(path: BucketPath, what: str) -> Iterator[None]:
    """The block runs with the lease on an object; ConfigError when another has it."""
    lease = Lease(path, what)
    lease.take()
    try:
        yield
    finally:
        lease.release()


@contextmanager
def alone(path: BucketPath, what: str) -> Iterator[None]:
    """The block runs with the lease on an object, for which others wait, in turn."""
    lease = Lease(path, what)
    while True:
        try:
            lease.take(lambda line: None)
            break
        except ConfigError:  # another has it, and works
            time.sleep(lease.renew_s)
    try:
        yield
    finally:
        lease.release()


def _parse(data: bytes) -> dict[str, Any]:
    """What a lock says of its holder; one that makes no sense holds as well."""
    with suppress(ValueError):
        found = json.loads(data)
        if isinstance(found, dict) and isinstance(found.get("pid"), int):
            return found
    return {"host": "unknown", "pid": 0, "since": "unknown"}


def _shown(holder: dict[str, Any]) -> str:
    return "host {host}, pid {pid}, since {since}".format_map(
        {"host": "unknown", "since": "unknown", **holder}
    )


def _machine() -> str | None:
    """That on which a number means one process: the kernel since its start, and the container; None if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _now() -> float:
    """Seconds; also those in which the machine slept, or its clock was set, count."""
    return max(time.time() - _BEGAN[0], time.monotonic() - _BEGAN[1])


_BEGAN = time.time(), time.monotonic()
