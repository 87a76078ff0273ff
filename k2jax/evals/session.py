"""One call of `python -m k2jax.evaluate`: which steps, which tasks, what is missing, what is told at the end."""

import importlib.util
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from k2jax.bucket import BucketPath
from k2jax.data.chunks import checkpoint_steps
from k2jax.data.epochs import has_epochs, order_of, read_epochs
from k2jax.data.journal import read_journal
from k2jax.data.order import Order
from k2jax.errors import ConfigError, StorageError
from k2jax.evals import suites
from k2jax.evals.held_out import Validation
from k2jax.evals.memorization import Memorization
from k2jax.evals.results import Identity, Outcome, Results, plain
from k2jax.evals.subject import Subject
from k2jax.model.decoder import compute_dtype
from k2jax.parallel import cluster
from k2jax.run.saved import SavedStep, check_tokenizer, open_step, saved_steps, steps_so_far
from k2jax.training.placement import mesh_for


class Evaluation(Protocol):
    """One task under one setting."""

    name: str
    version: Any
    unsafe: bool  # runs code that the model writes

    def settings(self, saved: SavedStep) -> dict[str, Any]:
        """All that changes its numbers, besides the checkpoint and the seed."""

    def evaluate(self, subject: Subject) -> Outcome: ...


class Wanted(NamedTuple):
    """What the command line asks for."""

    workdir: Path | BucketPath
    steps: str  # newest, all, every:N, or steps with commas between them
    tasks: tuple[str, ...]
    task_dir: str | Path | None
    num_fewshot: int | None
    limit: int | None
    windows: int | None  # None for all
    memorization_steps: tuple[int, ...] | None
    memorization_rows: int
    allow_code: bool
    batch_tokens: int
    seed: int
    stores: str | Path | None = None  # folder that they have moved to
    again: bool = False  # also what is stored
    weights: str = "params"  # or "ema"


class Session:
    """The tasks of a call, and what it has found: `results` of every evaluation, done now or stored before.

    Of several processes each asks the model the same; process 0 says which steps, what is stored already, and stores.
    The others have no results.
    """

    def __init__(self, wanted: Wanted, say: Callable[[str], None]):
        """Raises ConfigError for a task that is not there, before any checkpoint is touched."""
        self.wanted, self.say = wanted, say
        self.skipped: list[dict[str, str]] = []
        self.suite: dict[str, Evaluation] = {}  # by the metric's name
        self.evaluations = self._evaluations()
        self.results: list[dict[str, Any]] = []
        self.tables: dict[int, list[suites.Line]] = {}
        self.num_new = 0
        self._store = Results(wanted.workdir)

    def _evaluations(self) -> list[Evaluation]:
        w = self.wanted
        own = {
            "validation": lambda: Validation(w.windows),
            "memorization": lambda: Memorization(w.memorization_steps, w.memorization_rows),
        }
        others = [name for name in w.tasks if name not in own]
        if not others:
            return [own[name]() for name in dict.fromkeys(w.tasks)]
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(f"--tasks: {others[0]} needs lm_eval, which is not installed: pip install 'k2jax[eval]'")
        from k2jax.evals import tasks  # here, as it takes seconds and needs the extra

        suite = suites.SUITE if "k2" in others else ()
        named = [name for name in others if name != "k2"]
        manager = tasks.open_manager([*named, *(m.task for m in suite)], w.task_dir)
        found: list[Evaluation] = [own[name]() for name in dict.fromkeys(w.tasks) if name in own]
        for name in dict.fromkeys(named):
            task = tasks.HarnessTask(
                manager, name, num_fewshot=w.num_fewshot, limit=w.limit, allow_code=w.allow_code, seed=w.seed
            )
            found += self._unless_unsafe(name, task)
        for m in suite:
            pass_at = m.pass_at and tasks.PassAt(**m.pass_at)
            task = tasks.HarnessTask(
                manager,
                m.task,
                num_fewshot=m.num_fewshot,
                limit=w.limit,
                pass_at=pass_at,
                allow_code=w.allow_code,
                seed=w.seed,
                choices=m.choices,
            )
            kept = self._unless_unsafe(m.name, task)
            if kept:
                self.suite[m.name] = task
            found += kept
        return found

    def _unless_unsafe(self, name: str, task: Evaluation) -> list[Evaluation]:
        """Nothing, and an entry of what is skipped, where a task runs code and may not."""
        if not task.unsafe or self.wanted.allow_code:
            return [task]
        reason = "it runs the code that the model writes on this machine: --allow-code-execution allows it"
        self.say(f"skipped {name}: {reason}")
        self.skipped.append({"task": name, "reason": reason})
        return []

    # ---- steps -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Evaluates the steps asked for."""
        for step in cluster.decide("chooses steps", lambda: select_steps(self.wanted.workdir, self.wanted.steps)):
            self.evaluate_step(step)

    def watch(self, poll_s: float) -> None:
        """Evaluates each step as it appears, to the last that the run will have."""
        workdir, done = self.wanted.workdir, set()
        if isinstance(workdir, Path) and not workdir.is_dir():
            raise ConfigError(f"--workdir={workdir}: no such folder")
        while True:
            new, last = cluster.decide("looks for new steps", lambda: self._look(done))
            for step in new:
                self.evaluate_step(step)
                done.add(step)
            if last in done:
                return
            if not new:
                time.sleep(poll_s)

    def _look(self, done: set[int]) -> tuple[list[int], int | None]:
        """The steps that there are now, but those done, and the last that there will be, if it is known."""
        workdir, every = self.wanted.workdir, self.wanted.steps == "all"
        expected = expected_steps(workdir, self.wanted.steps) if has_epochs(workdir) else None
        there = [step for step in steps_so_far(workdir) if step not in done]
        return [step for step in there if every or (expected and step in expected)], expected[-1] if expected else None

    def evaluate_step(self, step: int) -> None:
        """What of one step is not stored yet; nothing for a step whose checkpoint has been deleted meanwhile."""
        try:
            saved = open_step(self.wanted.workdir, step, self.wanted.weights)
            check_tokenizer(saved)
            self._evaluate(saved)
        except (ConfigError, StorageError):
            # A run keeps only the newest of the checkpoints between chunks. Of several processes, those that have read
            # their part would wait for the others: all end.
            if cluster.count() > 1 or step in saved_steps(self.wanted.workdir):
                raise
            self.say(f"step {step}: skipped, its checkpoint has been deleted")

    def _evaluate(self, saved: SavedStep) -> None:
        subject = None
        stored: dict[Evaluation, dict[str, Any]] = {}
        w, dtype = self.wanted, str(compute_dtype(saved.config))
        for task in self.evaluations:
            settings = {**task.settings(saved), "dtype": dtype}
            settings |= {} if saved.weights == "params" else {"weights": saved.weights}
            identity = Identity(task.name, task.version, plain(settings), w.seed, saved.digest)
            cluster.agree(f"evaluation of {task.name}", identity._asdict())
            if not w.again and cluster.decide("looks for a result", partial(self._is_stored, saved.step, identity)):
                result, verb = self._found(saved.step, identity), "already evaluated: "
            else:
                if subject is None:
                    mesh = mesh_for(saved.config)
                    subject = Subject(saved, mesh, batch_tokens=w.batch_tokens, seed=w.seed, stores=w.stores)
                result, verb = self._measure(task, identity, subject), ""
                self.num_new += 1
            if result:
                self.say(f"step {saved.step} {task.name}: {verb}{result['headline']}")
                stored[task] = result
                self.results.append(result)
        if self.suite and stored:
            found = {name: stored[task]["metrics"] for name, task in self.suite.items()}
            self.tables[saved.step] = suites.compare(found)
            for line in suites.as_text(self.tables[saved.step]):
                self.say(line)

    def _is_stored(self, step: int, identity: Identity) -> bool:
        return self._store.find(step, identity) is not None

    def _found(self, step: int, identity: Identity) -> dict[str, Any] | None:
        return self._store.find(step, identity) if cluster.is_main() else None

    def _measure(self, task: Evaluation, identity: Identity, subject: Subject) -> dict[str, Any] | None:
        started = time.time()
        with jax.set_mesh(subject.mesh):
            outcome = task.evaluate(subject)
        if not cluster.is_main():
            return None
        when = datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")
        about = {**subject.about(), "time": when, "seconds": round(time.time() - started, 1)}
        return self._store.add(subject.saved.step, identity, outcome, about, again=self.wanted.again)

    def as_json(self) -> str:
        """Everything found, with what was stored before."""
        return json.dumps(
            {
                "workdir": str(self.wanted.workdir),
                "new": self.num_new,
                "results": self.results,
                "skipped": self.skipped,
                "k2": {step: [line._asdict() for line in lines] for step, lines in self.tables.items()},
            }
        )


def select_steps(workdir: Path, text: str) -> list[int]:
    """The saved steps that --steps names. ConfigError, listing those there are, for others, or where there is none."""
    there = saved_steps(workdir)
    if text == "newest" or not there:
        return [open_step(workdir).step]
    if text == "all":
        return there
    expected = expected_steps(workdir, text)
    if text.startswith("every:"):
        found = [step for step in expected if step in there]
        if not found:
            shown = ", ".join(map(str, expected[:5])) or "none"
            raise ConfigError(
                f"--steps={text}: that is {shown}{', ...' if len(expected) > 5 else ''} of this run, and there are "
                f"checkpoints of steps {', '.join(map(str, there[-5:]))}: name others"
            )
        return found
    return [open_step(workdir, step).step for step in expected]


def expected_steps(workdir: Path, text: str) -> list[int]:
    """The steps that --steps names in a run that has ended; every:N counts the chunks' checkpoints, as K2 did."""
    kind, _, number = text.partition(":")
    parts = text.split(",")
    if kind == "every" and number.isdigit() and int(number) > 0:
        every = int(number)
        return checkpoint_steps(_order(workdir))[every - 1 :: every]
    if text == "all":
        return [_order(workdir).num_steps]
    if all(part.strip().isdigit() for part in parts):
        return sorted({int(part) for part in parts})
    raise ConfigError(f"--steps={text}: expected newest, all, every:N, or steps with commas between them")


def _order(workdir: Path) -> Order:
    return order_of(read_epochs(workdir), read_journal(workdir / "journal.jsonl"))

