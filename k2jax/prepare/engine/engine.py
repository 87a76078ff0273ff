"""Runs the stages of a preparation on datatrove's executors: processes of this machine, Ray, or Slurm.

datatrove deals out the ranks, marks those that are complete and leaves them out when it runs again. What it lacks is
here: an error of a task reaches the user as it was raised, and a stage is over only when every rank is complete.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.utils.logging import logger

import k2jax
from k2jax import errors
from k2jax.errors import ConfigError, RunError
from k2jax.prepare.engine import progress, said
from k2jax.prepare.engine.cores import cores
from k2jax.prepare.engine.executors import Local, Ray
from k2jax.prepare.engine.slurm import Slurm, check_folder

EXECUTORS = ("local", "ray", "slurm")


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
                with progress.shown(stage.name, stage.tasks, folder / "completions"):
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
            return Local(**options)
        if self.executor == "ray":
            # Before a process unpickles anything it must find the k2jax that this one runs.
            environment = {name: os.environ[name] for name in ("PYTHONPATH", "RAYON_NUM_THREADS") if name in os.environ}
            return Ray(**options, mem_per_cpu_gb=1, ray_remote_kwargs={"runtime_env": {"env_vars": environment}})
        return Slurm(
            **options,
            partition=self.slurm["partition"],
            time=self.slurm["time"],
            mem_per_cpu_gb=self.slurm["gib_per_cpu"],
            env_command=self.slurm["environment"] or None,
            job_name=f"k2jax-{stage.name}",
            qos=None,
        )


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


def check_executor(executor: str, slurm: dict[str, Any], out: Path | None = None) -> None:
    """Raises ConfigError if the executor cannot run here, or not with what is to be made in `out`, before anything is
    done."""
    if executor == "ray":
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ConfigError("--executor=ray: Ray is not installed: pip install 'k2jax[data,ray]'") from error
    if executor == "slurm":
        for program in ("sbatch", "squeue"):
            if shutil.which(program) is None:
                raise ConfigError(f"--executor=slurm: there is no {program} on this machine: run it on a login node")
        if "SLURM_ARRAY_TASK_ID" in os.environ:  # by which a task of ours knows what it is
            raise ConfigError("--executor=slurm: this is a task of a job array: run it on a login node")
        if out is not None:
            check_folder(out)
        if not slurm["partition"]:
            raise ConfigError("--executor=slurm: name the partition in the recipe: config.slurm.partition")


def set_environment(executor: str, workers: int) -> None:
    """What worker processes take from this one: the k2jax that it runs, and their share of the cores (tokenizers).

    A task on Ray or Slurm asks for one core, whatever this machine has.
    """
    here = str(Path(k2jax.__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    threads = max(1, cores() // workers) if executor == "local" else 1
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def usage(folder: Path) -> dict[str, dict[str, float]]:
    """What each stage whose marks are in `folder` took: CPU-seconds of all its tasks, peak memory of the largest."""
    found = {}
    for stage in sorted(folder.iterdir()):
        marks = [path.read_bytes() for path in (stage / "completions").glob("*")]
        tasks = [json.loads(mark) for mark in marks if mark]  # empty: its task was killed as it had ended
        if tasks:
            cpu_seconds = sum(task["cpu_seconds"] for task in tasks)
            found[stage.name] = {"cpu_seconds": cpu_seconds, "peak_bytes": max(task["peak_bytes"] for task in tasks)}
    return found
