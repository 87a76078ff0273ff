"""datatrove's executor for Slurm, as far as it goes: the job's script and what runs in it. What it does here is ours.

An array of Slurm's holds so many tasks at most (MaxArraySize). More ranks are several arrays, beside each other, that
have the workers between them. The ids of jobs are noted as they are made: a later attempt waits for them first.
"""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dill
from datatrove.executor import SlurmPipelineExecutor

from k2jax.errors import ConfigError, RunError
from k2jax.files import write_bytes, write_text
from k2jax.prepare.engine.executors import Ranks
from k2jax.text import shown

POLL_SECONDS = 10
LONGEST_WAIT = 300  # seconds between two tries of squeue, where it fails
MOST_FAILURES = 30  # of squeue, one after the other: two hours
ARRAY_SIZE = 1001  # Slurm's own, where it does not say


class Array(NamedTuple):
    """An array job: how many ranks, how many at once, and the line of arrays in which one waits for the other."""

    size: int
    at_once: int
    lane: int


def arrays(num_ranks: int, workers: int, largest: int) -> list[Array]:
    """As few arrays as hold the ranks, of one size but for the last; all that run at one time have `workers`."""
    size = math.ceil(num_ranks / math.ceil(num_ranks / largest))
    count = math.ceil(num_ranks / size)
    lanes = min(count, workers)
    found = []
    for i in range(count):
        lane = i % lanes
        at_once = workers // lanes + (lane < workers % lanes)
        found.append(Array(min(size, num_ranks - i * size), at_once, lane))
    return found


class Slurm(Ranks, SlurmPipelineExecutor):
    """Array jobs of one rank a task."""

    def launch_job(self) -> None:
        """Launches jobs and waits for them; first for those that an earlier attempt left in the queue."""
        self._wait()
        while ranks := self.get_incomplete_ranks():
            all_sent = self._submit(ranks)
            self._wait()
            if all_sent or self.get_incomplete_ranks() == ranks:
                return  # what failed is on record

    def launch_merge_stats(self) -> None:
        """There is nothing to merge: counts are in the stages' own files."""

    @property
    def _note(self) -> Path:
        return Path(self.logging_dir.resolve_paths("job"))

    def _submit(self, ranks: list[int]) -> bool:
        """Launches jobs for the ranks; False where Slurm took some and no more."""
        parts, last = arrays(len(ranks), min(self.workers, len(ranks)), largest_array()), {}
        self.max_array_size = parts[0].size  # by which a job multiplies RUN_OFFSET
        folder = self._note.parent
        write_text(folder / "ranks_to_run.json", json.dumps(ranks))
        write_bytes(folder / "executor.pik", dill.dumps(self, fmode=dill.CONTENTS_FMODE))
        for number, part in enumerate(parts):
            script = folder / f"launch_{number}.slurm"
            write_text(script, self._script(part))
            after = [f"--dependency=afterany:{last[part.lane]}"] if part.lane in last else []
            try:
                job = _sbatch([f"--export=ALL,RUN_OFFSET={number}", *after, str(script)])
            except ConfigError as error:
                if not last:
                    raise
                print(f"{error}; it has {number} of {len(parts)} arrays, the rest comes later", file=sys.stderr)
                return False
            last[part.lane] = job
            write_text(self._note, "\n".join([*self._noted(), job]) + "\n")
        return True

    def _script(self, part: Array) -> str:
        workers, self.workers = self.workers, part.at_once
        arguments = self.get_sbatch_args(part.size)
        self.workers = workers
        for key in ("output", "error"):
            arguments[key] = _quoted(arguments[key])
        pickled = self.logging_dir.resolve_paths("executor.pik")
        return self.get_launch_file_contents(arguments, f"srun -l -n 1 launch_pickled_pipeline {shlex.quote(pickled)}")

    def _noted(self) -> list[str]:
        return self._note.read_text().split() if self._note.exists() else []

    def _wait(self) -> None:
        """Until the jobs that are noted have left the queue."""
        for job in self._noted():
            _wait_for(job)
        self._note.unlink(missing_ok=True)


def largest_array() -> int:
    """How many tasks an array may have here."""
    found = re.search(r"^MaxArraySize\s*=\s*([1-9]\d*)\s*$", _run(["scontrol", "show", "config"]).stdout, re.MULTILINE)
    return int(found[1]) if found else ARRAY_SIZE


def check_folder(folder: Path) -> None:
    """Raises ConfigError for one whose name no line of a job's script can hold."""
    if "\\" in str(folder) or not str(folder).isprintable():
        raise ConfigError(
            f"--out={shown(folder)}: --executor=slurm: has a backslash or a character that does not print in its path, "
            "which sbatch does not take: choose another folder"
        )


def _quoted(log: str) -> str:
    """The name of a log's file, which ends in a pattern of Slurm's, for a line of #SBATCH.

    sbatch takes quotes, and a backslash before a character, within them too; % begins a pattern, and %% is one.
    """
    folder, _, pattern = log.rpartition("/")
    folder = re.sub(r'(["#])', r"\\\1", folder.replace("%", "%%"))
    return f'"{folder}/{pattern}"'


def _sbatch(arguments: list[str]) -> str:
    """Submits a script; returns the job's id. Raises ConfigError where Slurm refuses it."""
    ran = _run(["sbatch", "--parsable", *arguments], timeout=None)
    if ran.returncode:
        raise ConfigError(f"sbatch refused a job ({_last_line(ran.stderr)}): correct config.slurm in the recipe")
    found = re.search(r"(\d+)(;\S*)?\s*$", ran.stdout)
    if not found:
        raise RunError(f"sbatch printed {_last_line(ran.stdout)!r}, expected the id of a job: see squeue for what runs")
    return found[1]


def _wait_for(job: str) -> None:
    """Until a job has left the queue: squeue says that it is not in it, or that it does not know it any more."""
    waits = _waits()
    while True:
        ran = _run(["squeue", "--noheader", "--jobs", job])
        if "Invalid job id" in ran.stderr or (ran.returncode == 0 and not ran.stdout.strip()):
            return
        if ran.returncode == 0:
            waits = _waits()
            time.sleep(POLL_SECONDS)
            continue
        why = _last_line(ran.stderr)
        if (wait := next(waits, None)) is None:
            raise RunError(
                f"squeue fails ({why}), and job {job} may still run: when Slurm answers again run the same command "
                "again, it waits for the job first"
            )
        if wait == POLL_SECONDS:
            print(f"squeue fails ({why}): it is asked again", file=sys.stderr, flush=True)
        time.sleep(wait)


def _waits() -> Iterator[float]:
    for i in range(MOST_FAILURES):
        yield min(POLL_SECONDS * 2**i, LONGEST_WAIT)


def _run(command: list[str], timeout: float | None = 120) -> subprocess.CompletedProcess:
    """A program of Slurm's; one that is not there, or does not answer, has failed."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _last_line(text: str) -> str:
    return shown((text.strip().splitlines() or ["it says nothing"])[-1])[:300]


def cancel(folder: Path) -> None:
    """Ends the jobs that are noted in a stage's folder, and waits until they have: the stage is to be done again."""
    note = folder / "job"
    if not note.exists():
        return
    jobs = note.read_text().split()
    if shutil.which("squeue") is None:
        raise ConfigError(
            f"{note}: jobs of Slurm ({', '.join(jobs)}) may still write there, and there is no squeue on this machine: "
            "run the same command on a login node, or remove that file if they are over"
        )
    for job in jobs:
        _run(["scancel", job])
        _wait_for(job)
    note.unlink()
