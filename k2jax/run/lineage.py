"""Which checkpoints of a run there are and stay: listing, keeping, thinning, and moving bad ones away.

One policy decides what stays. Weights of a chunk's end stay for ever: the checkpoint says of itself that it is one,
because the order may have other chunks by now. Of those in between the newest few stay. Moments of chunks' ends stay of
every n-th and of the newest two. What goes is moved to the trash, whole, and deleted from there by a thread of
process 0, so that no kill leaves a checkpoint half deleted and nobody waits.
"""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from k2jax import files
from k2jax.data.journal import append_entry
from k2jax.errors import StorageError
from k2jax.parallel import cluster
from k2jax.run import storage
from k2jax.run.reading import one_line

FULL = 2  # newest checkpoints of chunks' ends whose moments stay: one may turn out to be damaged


class Policy(NamedTuple):
    """What of a run's checkpoints stays."""

    keep_steps: (
        frozenset[int] | None
    )  # the chunks' ends as the order has them now; None: nothing is taken away
    keep_between: int = 2  # of the others
    moments_every: int = 1  # chunks
    pinned: frozenset[int] = frozenset()  # stay as they are: a roll-back went back to them, or may

    def describe(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself for good: whether it is kept, and which chunk's it is (0: an import's)."""
        assert self.keep_steps is not None, "a reader of a run saves nothing"
        kept = step in self.keep_steps
        return {"kept": kept, "chunk": sum(0 < s <= step for s in self.keep_steps) if kept else None}


class Known(NamedTuple):
    """Of a checkpoint on disk, what the policy asks for."""

    kept: bool
    chunk: int | None
    moments: bool  # on disk
    thinned: bool  # so they should not be


class Lineage:
    """The folder `checkpoints` of a run, as its trainer alone changes it: process 0 does, the others wait or do not."""

    def __init__(self, directory: epath.Path, journal: Path, policy: Policy, log: Callable[[str], None]):
        self.directory, self.journal, self.policy, self.log = directory, journal, policy, log
        self.abandoned, self.trash = directory.parent / "abandoned", directory / "trash"
        self._known: dict[int, Known] = {}
        self._thread: threading.Thread | None = None
        self._bugs: list[Exception] = []
        self._told: set[str] = set()

    def folder(self, step: int) -> epath.Path:
        return self.directory / str(step)

    def abandon(self, step: int, why: str) -> None:
        """Moves a step out of the way, keeping it, journalled."""

        def move() -> str:
            target = self.abandoned / f"{step}-{time.strftime('%Y%m%dT%H%M%S')}"
            now = datetime.now(UTC).isoformat(timespec="seconds")
            entry = {"time": now, "by": "k2jax.train", "why": why, "kind": "abandon", "at_step": step}
            append_entry(self.journal, entry)
            self.put_away(step, target, why)
            return str(target)

        self.log(f"moved checkpoint {step} to {cluster.decide(f'abandons checkpoint {step}', move)}")

    def tidy(self, steps: list[int]) -> None:
        """Takes away what the policy does not keep of `steps`, all that there are, and empties the trash; in a thread.

        A storage that fails costs room and no more: it is said, and done the next time.
        """
        if cluster.is_main() and self.policy.keep_steps is not None:
            self._raise_bugs()
            self._thread = threading.Thread(target=self._tidy, args=(steps, self._thread), daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Waits until all is done."""
        if self._thread:
            self._thread.join()
        self._raise_bugs()

    def _raise_bugs(self) -> None:
        if self._bugs:
            raise self._bugs[0]

    # ---- of process 0, in the thread ---------------------------------------------------------------------------------

    def _tidy(self, steps: list[int], before: threading.Thread | None) -> None:
        if before:
            before.join()
        for job in (self._take_away, self._empty_trash):
            try:
                job(steps)
            except (OSError, StorageError) as error:
                if job.__name__ not in self._told:  # NFS keeps what somebody has open: once is enough
                    self.log(f"old checkpoints stay for now: {one_line(error)}")
                self._told.add(job.__name__)
            except Exception as error:
                self._bugs.append(error)

    def _take_away(self, steps: list[int]) -> None:
        for step in self._unwanted(steps):
            self._discard(self.folder(step), str(step))
        for step in self._to_thin(steps):
            self._thin(step)

    def _unwanted(self, steps: list[int]) -> list[int]:
        """The newest stays whatever it is: the run goes on from it."""
        there = [step for step in sorted(steps)[:-1] if step not in self.policy.pinned and self._is_there(step)]
        between = [step for step in there if not self._look(step).kept]
        return between[: max(len(between) - self.policy.keep_between, 0)]

    def _to_thin(self, steps: list[int]) -> list[int]:
        chunks = {step: self._look(step) for step in sorted(steps) if self._is_there(step)}
        full = [step for step, known in chunks.items() if known.chunk and known.moments]
        every = self.policy.moments_every
        wanted = [step for step in full[:-FULL] if chunks[step].chunk % every and step not in self.policy.pinned]
        return sorted({*wanted, *(step for step in full if chunks[step].thinned)})

    def _look(self, step: int) -> Known:
        """What there is of a step; one that cannot be read is kept as it is."""
        if step not in self._known:
            folder = self.folder(step)
            try:
                meta = storage.read_meta(folder)
            except StorageError:
                return Known(True, None, False, False)
            kept = meta["kept"] or step in self.policy.keep_steps
            moments = self._has_moments(folder)
            self._known[step] = Known(kept, meta.get("chunk"), moments, storage.is_thinned(folder))
        return self._known[step]

    def _thin(self, step: int) -> None:
        """Weights alone stay. The mark comes first: a kill after it leaves what the next start ends."""
        folder = self.folder(step)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        why = f"checkpoint.moments_every={self.policy.moments_every}"
        files.write_json(folder / storage.THINNED, {"time": now, "by": "k2jax.train", "why": why})
        del self._known[step]
        self._discard(folder / "moments", f"{step}-moments")
        self.log(f"checkpoint {step}: its moments are no longer kept, its weights are")

    # ---- what a bucket does otherwise (bucket_steps.py) --------------------------------------------------------------

    def _is_there(self, step: int) -> bool:
        return self.folder(step).exists()

    def _has_moments(self, folder: epath.Path) -> bool:
        return (folder / "moments").exists()

    def put_away(self, step: int, target: epath.Path, why: str) -> None:
        """Another place for a checkpoint, whole, out of the listing."""
        _move(self.folder(step), target)

    def _discard(self, path: epath.Path, name: str) -> None:
        _move(path, self.trash / f"{name}-{time.time_ns()}")

    def _empty_trash(self, _: list[int]) -> None:
        failed = None
        for path in self.trash.iterdir() if self.trash.exists() else ():
            try:
                path.rmtree()
            except OSError as error:  # as of a file that another host has open; the others may go
                failed = error
        if failed:
            raise failed


def _move(path: epath.Path, target: epath.Path) -> None:
    """The one place where checkpoints change their names. Undone by a power cut, it is decided again."""
    files.make_folder(target.parent)
    path.rename(target)
