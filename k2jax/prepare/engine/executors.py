"""datatrove's executors as we need them: the errors of tasks are on record, and what libraries print.

Slurm's is in slurm.py.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

from k2jax import errors, locks
from k2jax.errors import RunError
from k2jax.files import is_running, make_folder, write_json
from k2jax.prepare.engine import said
from k2jax.text import without_secrets

AHEAD = 8  # ranks that wait for each worker
# Of the command's environment, for Ray's processes, which the cluster started: how storage is reached, and threads.
PASSED_ON = re.compile(
    r"(AWS|GOOGLE|GCS|AZURE|HF|FSSPEC|OMP|RAYON|TOKENIZERS|SSL_CERT)_\w+|STORAGE_EMULATOR_HOST|\w+_CA_BUNDLE"
    r"|(https?|all|no)_proxy",
    re.IGNORECASE,
)


class Ranks:
    """One rank of a stage, for all three executors: the error is on record if it fails, and what libraries print.

    completions/<rank> marks that it is complete, and holds what it took; there is no other file of a rank that passes.
    """

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        logger.disable("datatrove")
        errors.keep_files_ours()  # on a machine of Ray's or Slurm's
        folder, stats = self._folder, PipelineStats()
        mark = folder / "completions" / f"{rank:05d}"
        if mark.exists():
            return stats
        [function] = self.pipeline
        before = time.process_time()
        try:
            with said.kept(folder / "said" / f"{rank:05d}.json"):
                function(rank)
        except Exception as error:
            kind = "StorageError" if isinstance(error, OSError) else type(error).__name__
            failure = {"type": kind, "message": without_secrets(str(error))}
            with contextlib.suppress(OSError):  # a full disk: the error itself goes on
                write_json(folder / "errors" / f"{rank:05d}.json", failure)
            raise
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process: with one worker, so far
        usage = {"cpu_seconds": time.process_time() - before, "peak_bytes": peak_kib * 1024}
        make_folder(mark.parent)
        # That it is there says all: what the task wrote is on the disk, and a mark that is not costs a second run.
        with open(mark, "w", encoding="utf-8") as file:
            file.write(json.dumps(usage))
        return stats

    def get_incomplete_ranks(self, ranks: Any = None, skip_completed: bool | None = None) -> list[int]:
        """As datatrove's, by one listing of the folder."""
        marks = self._folder / "completions"
        done = set(os.listdir(marks)) if marks.is_dir() else set()
        return [rank for rank in (range(self.world_size) if ranks is None else ranks) if f"{rank:05d}" not in done]

    @property
    def _folder(self) -> Path:
        return Path(self.logging_dir.path)


class Local(Ranks, LocalPipelineExecutor):
    """As datatrove's, on the standard library's pool: multiprocess's waits for ever for a worker that was killed.

    Workers get the executor once, then ranks alone, of which few wait at a time: a stage may have 100,000.
    """

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if min(self.workers, len(ranks)) == 1:
            for rank in ranks:
                self._run_for_rank(rank)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["k2jax.prepare.build"])  # what every worker of every stage needs
        with ProcessPoolExecutor(self.workers, context, _begin, (self, *_command())) as pool:
            try:
                left = iter(ranks)
                waiting = {pool.submit(_run, rank) for rank in itertools.islice(left, AHEAD * self.workers)}
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for task in done:
                        task.result()
                    waiting |= {pool.submit(_run, rank) for rank in itertools.islice(left, len(done))}
            except BrokenProcessPool as error:
                raise RunError(
                    "a worker process was killed, perhaps for want of memory: run the same command again, with fewer "
                    "--workers"
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


_executor: Local | None = None  # of a worker's process


def _command() -> tuple[int, str | None]:
    """This process: its number, and when it began where that can be told, for numbers are used again."""
    return os.getpid(), locks.started(os.getpid())


def _begin(executor: Local, command: int, started: str | None) -> None:
    """A worker begins."""
    global _executor  # noqa: PLW0603
    _executor = executor
    _end_with(command, started)


def _run(rank: int) -> None:
    """In a worker: a rank, whose counts stay in its mark."""
    _executor._run_for_rank(rank)


def _end_with(command: int, started: str | None) -> None:
    """A worker ends when the command (its process id) does, however that ended, lest it writes beside the next one.

    One that was killed, and that nobody has waited for, has its number still; only /proc says that it is dead.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all of them: the command speaks

    def watch() -> None:
        while is_running(command) and locks.started(command) == started:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Ray(Ranks, RayPipelineExecutor):
    """Its processes take the command's environment from what they unpickle: Ray keeps it in no log."""

    def run(self) -> None:
        """As datatrove's, which sums up in the end what ranks of ours do not write."""
        try:
            super().run()
        except FileNotFoundError as error:
            if Path(error.filename or "").parent != self._folder / "stats":
                raise

    def __getstate__(self) -> dict[str, Any]:
        """With what is to be passed on of the environment here."""
        passed_on = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        return {**self.__dict__, "environment": passed_on}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes it on, in the process of a task."""
        os.environ.update(state.pop("environment"))
        self.__dict__.update(state)
