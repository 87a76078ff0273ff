"""The small files of a run at a URL: a local folder, in which the trainer works, that is put back whole.

Rows of metrics and ledger grow by a line at a time, which objects cannot. So every file that has changed is put, whole,
before a checkpoint is complete, once a minute, and at the end: a host's loss costs no row of a step that is saved. Each
is put over the generation that this process has seen, and no other: two writers cannot mix.
"""

import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from k2jax.bucket import ABSENT, PARALLEL, BucketPath
from k2jax.errors import RunError, StorageError

PUT_EVERY_S = 60.0
LARGE_BYTES = 1 << 24  # a file that has more is not put every minute
CHECKPOINTS = "checkpoints"
# Folders that the trainer does not read; of them it puts what it writes.
NOT_FETCHED = ("committed", "saving", "abandoned", "tensorboard", "wandb", "evals")
ROWS = ("ledger/chunk-", "metrics/chunk-")  # first: what closes over them must not be there without them


class Mirror:
    """`local` is the folder; `check` is asked before anything is put (a lease's). Only process 0 puts."""

    def __init__(self, workdir: BucketPath, check: Callable[[], None], say: Callable[[str], None] = print):
        self.workdir, self.check, self.say = workdir, check, say
        self._temporary = Path(tempfile.mkdtemp(prefix="k2jax-run-"))
        self.local = self._temporary / (workdir.name or workdir.bucket)
        self.local.mkdir()
        self._generations: dict[str, bytes] = {}
        self._put: dict[str, tuple[int, int]] = {}  # size and time of each file as it was put
        self._one_at_a_time, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self) -> None:
        """Brings what is there; whatever the folder held of it is written over."""
        names = [
            n for n in self.workdir.keys(CHECKPOINTS) if "/" not in n or n.split("/")[0] not in NOT_FETCHED
        ]
        names = [n for n in names if f"/{CHECKPOINTS}/" not in n]  # of branches

        def bring(name: str) -> None:
            data, self._generations[name] = (self.workdir / name).read()
            path = self.local / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)
            self._put[name] = _seen(path)

        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(bring, [name for name in names if name != "lock"]))

    def keep_putting(self, every_s: float = PUT_EVERY_S) -> None:
        """From now on, in a thread, what changes. Once is enough."""
        if self._thread is not None:
            return

        def run() -> None:
            while not self._stop.wait(every_s):
                try:
                    self.put(large=False)
                except RunError as error:  # the next checkpoint does not become complete without it
                    self.say(f"not yet in {self.workdir}: {error}")

        self._thread = threading.Thread(target=run, name="mirror", daemon=True)
        self._thread.start()

    def put(self, large: bool = True) -> None:
        """Puts every file that has changed, and deletes what was deleted; raises StorageError."""
        with self._one_at_a_time:
            found = {str(path.relative_to(self.local)): path for path in self._files()}
            changed = [name for name, path in found.items() if _seen(path) != self._put.get(name)]
            if not large:
                changed = [name for name in changed if found[name].stat().st_size <= LARGE_BYTES]
            gone = [name for name in self._put if name not in found]
            if changed or gone:
                self.check()
            rows = [name for name in changed if name.startswith(ROWS)]
            with ThreadPoolExecutor(PARALLEL) as pool:
                list(pool.map(self._put_one, rows))
            for name in sorted(set(changed) - set(rows), key=lambda name: found[name].stat().st_mtime_ns):
                self._put_one(name)
            for name in gone:
                del self._put[name]
                if not (self.workdir / name).remove(self._generations.pop(name)):
                    raise self._conflict(name)

    def close(self, put: bool = True) -> None:
        """Puts the last, if it shall, and removes the folder."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if put:
                self.put()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _files(self) -> list[Path]:
        return [p for p in sorted(self.local.rglob("*")) if p.is_file() and ".new-" not in p.name]

    def _put_one(self, name: str) -> None:
        path = self.local / name
        with suppress(FileNotFoundError):  # deleted just now
            seen, data = _seen(path), path.read_bytes()
            generation = (self.workdir / name).replace(data, self._generations.get(name, ABSENT))
            if generation is None:
                raise self._conflict(name)
            self._generations[name], self._put[name] = generation, seen

    def _conflict(self, name: str) -> StorageError:
        return StorageError(
            f"{self.workdir / name} was changed by another program while this run had it: run the same command "
            f"again, which reads it anew"
        )


def _seen(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
