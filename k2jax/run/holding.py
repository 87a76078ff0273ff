"""Holding a run directory: that one trainer at a time writes it, and that all its processes see the same one.

On a disk that is a lock (locks.py). In a bucket it is a lease, and all but the checkpoints is written by way of a
mirror on this machine (mirror.py).
"""

import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from k2jax import files, locks
from k2jax.bucket import BucketPath
from k2jax.errors import ConfigError, RunError, StorageError
from k2jax.lease import Lease
from k2jax.parallel import cluster
from k2jax.run.bucket_steps import BucketSteps
from k2jax.run.mirror import Mirror

SEEN_S = 60  # by when every process sees what process 0 wrote


class OnDisk:
    """A folder. `place` is where the run is, `path` the folder of this machine where its small files are written."""

    mirror: Mirror | None = None

    def __init__(self, place: Path):
        self.place = self.path = place
        self._lock = None

    def take(self) -> str:
        """Of process 0: who holds it now. ConfigError when another does, StorageError when it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o750)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            holder = f"host {socket.gethostname()}, pid {os.getpid()}, since {now}"
            self._lock = locks.hold(self.path / "lock", holder)
        except OSError as error:
            raise StorageError(
                f"--workdir={self.path}: cannot be made or written: {error.strerror}; "
                f"name a folder that you may write"
            ) from error
        except locks.Held as holds:
            raise ConfigError(
                f"--workdir={self.path} is in use by another run ({holds}): wait for it, or use another workdir"
            ) from None
        return holder

    def check(self, holder: str) -> None:
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

    def put(self) -> None:
        """What was written is where the run is, for the other processes, too."""

    def put_away(self, step: int, target: Path) -> None:
        """Moves a checkpoint out of the listing, whole."""
        files.move(self.place / "checkpoints" / str(step), target)

    def leave(self, error: BaseException | None) -> None:
        """Lets go of it; `error` is what ends the run."""
        if self._lock:
            self._lock.release()


class InBucket:
    """A URL."""

    def __init__(self, place: BucketPath, say: Callable[[str], None]):
        self.place, self._say = place, say
        self._lease = Lease(place / "lock", f"--workdir={place}")
        self.mirror = Mirror(place, self._lease.check, say)
        self.path = self.mirror.local

    def take(self) -> str:
        """As on a disk; waits for a holder that gives no sign."""
        self._lease.take(self._say)
        self.mirror.fetch()
        return self._lease.holder["token"]

    def check(self, holder: str) -> None:
        """As on a disk."""
        if f'"{holder}"' not in (self.place / "lock").read_text():
            raise ConfigError(
                f"--workdir={self.place}: on {socket.gethostname()} its lock is not the one that process 0 wrote: give "
                f"all processes the same endpoint and credentials"
            )

    def put(self) -> None:
        """Process 0 puts what it wrote, and from now on what changes; the others fetch it."""

        def act() -> None:
            self.mirror.put()
            self.mirror.keep_putting()

        cluster.decide("puts the run", act)
        cluster.together("fetches the run", lambda: None if cluster.is_main() else self.mirror.fetch())

    def put_away(self, step: int, target: BucketPath) -> None:
        """Moves a checkpoint out of the listing, whole: the store copies it."""
        BucketSteps(self.place, self.mirror, self._say).move(step, target)

    def leave(self, error: BaseException | None) -> None:
        """With the last rows put; where a run ends with an error, that is the one told, whatever becomes of them."""
        try:
            self.mirror.close(put=cluster.is_main())
        except RunError as failed:
            if error is None:
                raise
            self._say(f"not in {self.place}: {failed}")
        finally:
            self._lease.release()
