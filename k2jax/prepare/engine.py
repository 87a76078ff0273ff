"""Runs the stages of a preparation on datatrove's executors: processes of this machine, Ray, or Slurm.

datatrove deals out the ranks, marks those that are complete and leaves them out when it runs again. What it lacks is
here: an error of a task reaches the user as it was raised, and a stage is over only when every rank is complete.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats
from tqdm import tqdm

import k2jax
from k2jax import errors
from k2jax.errors import ConfigError, RunError
from k2jax.files import write_json, write_text
from k2jax.prepare import said
from k2jax.text import without_secrets

EXECUTORS = ("local", "ray", "slurm")
SLURM_POLL_SECONDS = 10


class Stage(NamedTuple):
    """A part of a preparation: `function(rank)` for every rank from 0 to `tasks`, in any order, on any machine.

    A task writes files of its own, whole or not at all, and the same bytes whenever it runs; it may be killed and run
    again. `function` is a module's function, or a partial of one, so that it can be sent to another process.
    """

    name: str
    tasks: int
    function: Callable[[int], None]


class Engine(NamedTuple):
    """Where and how stages run: `folder` holds their marks of completion and logs, by stage.

    `slurm` is the recipe's section of that name; `workers` is how many tasks run at once.
    """

    folder: Path
    executor: str
    workers: int
    slurm: dict[str, Any]

    def run(self, stage: Stage) -> None:
        """Runs what is not complete of a stage.

        Raises what a task raised, if it was a RunError, or a RunError that names the task and the error.
        """
        if not stage.tasks:
            return
        folder = self.folder / stage.name
        for name in ("errors", "said"):
            shutil.rmtree(folder / name, ignore_errors=True)
        logger.disable("datatrove")  # it tells of every step; errors come from here
        executor = self._executor(stage, folder)
        if executor.get_incomplete_ranks(skip_completed=True):
            try:
                with _progress(stage, folder):
                    executor.run()
            finally:
                if line := said.summary(folder / "said"):
                    print(f"stage {stage.name}: {line}", file=sys.stderr, flush=True)
        _raise_failures(stage, folder)
        if missing := executor.get_incomplete_ranks(skip_completed=True):
            raise RunError(
                f"stage {stage.name}: {len(missing)} of {stage.tasks} tasks did not end, the first is {missing[0]}: "
                f"see the logs in {folder}, then run the same command again"
            )

    def _executor(self, stage: Stage, folder: Path) -> Any:
        options: dict[str, Any] = {
            "pipeline": [stage.function],
            "tasks": stage.tasks,
            "workers": min(self.workers, stage.tasks),
            "logging_dir": str(folder),
        }
        if self.executor == "local":
            return _Local(**options)
        if self.executor == "ray":
            return _Ray(**options, mem_per_cpu_gb=1)
        return _Slurm(
            **options,
            partition=self.slurm["partition"],
            time=self.slurm["time"],
            mem_per_cpu_gb=self.slurm["gib_per_cpu"],
            env_command=self.slurm["environment"] or None,
            job_name=f"k2jax-{stage.name}",
            qos=None,
        )


class _Ranks:
    """One rank of a stage, for all three executors: the error is on record if it fails, and what libraries print."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        logger.disable("datatrove")
        errors.keep_files_ours()  # on a machine of Ray's or Slurm's
        stats = PipelineStats()
        if self.is_rank_completed(rank):
            return stats
        [function] = self.pipeline
        before = time.process_time()
        try:
            with said.kept(Path(self.logging_dir.resolve_paths(f"said/{rank:05d}.json"))):
                function(rank)
        except Exception as error:
            kind = "StorageError" if isinstance(error, OSError) else type(error).__name__
            failure = {"type": kind, "message": without_secrets(str(error))}
            with contextlib.suppress(OSError):  # a full disk: the error itself goes on
                write_json(self.logging_dir.resolve_paths(f"errors/{rank:05d}.json"), failure)
            raise
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process: with one worker, so far
        usage = {"cpu_seconds": time.process_time() - before, "peak_bytes": peak_kib * 1024}
        write_json(self.logging_dir.resolve_paths(f"usage/{rank:05d}.json"), usage)
        with self.logging_dir.open(f"stats/{rank:05d}.json", "w") as file:
            stats.save_to_disk(file)
        self.mark_rank_as_completed(rank)
        return stats


class _Local(_Ranks, LocalPipelineExecutor):
    """As datatrove's, on the standard library's pool: multiprocess's waits for ever for a worker that was killed."""

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if min(self.workers, len(ranks)) == 1:
            for rank in ranks:
                self._run_for_rank(rank)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["k2jax.prepare.build"])  # what every worker of every stage needs
        with ProcessPoolExecutor(self.workers, context, _end_with, (os.getpid(),)) as pool:
            tasks = [pool.submit(self._run_for_rank, rank) for rank in ranks]
            try:
                for task in as_completed(tasks):
                    task.result()
            except BrokenProcessPool as error:
                raise RunError(
                    "a worker process was killed, perhaps for want of memory: run the same command again, with fewer "
                    "--workers"
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _end_with(command: int) -> None:
    """A worker ends when the command (its process id) does, however that ended, lest it writes beside the next one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all of them: the command speaks

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(command, 0)
                time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Ray(_Ranks, RayPipelineExecutor):
    pass


class _Slurm(_Ranks, SlurmPipelineExecutor):
    def launch_job(self) -> None:
        """Launches a job and waits for it; first for one that an earlier attempt left in the queue."""
        note = Path(self.logging_dir.resolve_paths("job"))
        if note.exists():
            _wait_for(note.read_text())
        super().launch_job()
        if self.job_id != -1:
            write_text(note, str(self.job_id))
            _wait_for(self.job_id)

    def launch_merge_stats(self) -> None:
        """There is nothing to merge: counts are in the stages' own files."""


def _raise_failures(stage: Stage, folder: Path) -> None:
    """Raises the error of the first task that failed. Ray's executor only logs it; a RunError keeps its type."""
    for path in sorted((folder / "errors").glob("*.json")):
        if (folder / "completions" / path.stem).exists():
            continue  # it failed, and passed when the executor tried again
        failure = json.loads(path.read_bytes())
        kind = getattr(errors, failure["type"], None)
        if isinstance(kind, type) and issubclass(kind, RunError):
            raise kind(failure["message"])
        raise RunError(f"stage {stage.name}, task {int(path.stem)}: {failure['type']}: {failure['message']}")


def _wait_for(job: str) -> None:
    """Until a Slurm job has left the queue."""
    command = ["squeue", "--noheader", "--jobs", job]
    while subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
        time.sleep(SLURM_POLL_SECONDS)


@contextlib.contextmanager
def _progress(stage: Stage, folder: Path) -> Iterator[None]:
    """A bar over complete tasks, on a terminal only."""
    with tqdm(desc=stage.name, total=stage.tasks, unit="task", disable=None, leave=False) as bar:
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.5):
                bar.update(len(list((folder / "completions").glob("*"))) - bar.n)

        thread = threading.Thread(target=look, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            over.set()


def check_executor(executor: str, slurm: dict[str, Any]) -> None:
    """Raises ConfigError if the executor cannot run here, before anything is done."""
    if executor == "ray":
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ConfigError("--executor=ray: Ray is not installed: pip install 'k2jax[data,ray]'") from error
    if executor == "slurm":
        if shutil.which("sbatch") is None:
            raise ConfigError("--executor=slurm: there is no sbatch on this machine: run it on a Slurm login node")
        if not slurm["partition"]:
            raise ConfigError("--executor=slurm: name the partition in the recipe: config.slurm.partition")


def set_environment(workers: int) -> None:
    """What worker processes take from this one: the k2jax that it runs, and their share of the cores (tokenizers)."""
    here = str(Path(k2jax.__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    os.environ["RAYON_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))


def usage(folder: Path) -> dict[str, dict[str, float]]:
    """What each stage whose marks are in `folder` took: CPU-seconds of all its tasks, peak memory of the largest."""
    found = {}
    for stage in sorted(folder.iterdir()):
        tasks = [json.loads(path.read_bytes()) for path in (stage / "usage").glob("*.json")]
        if tasks:
            cpu_seconds = sum(task["cpu_seconds"] for task in tasks)
            found[stage.name] = {"cpu_seconds": cpu_seconds, "peak_bytes": max(task["peak_bytes"] for task in tasks)}
    return found
