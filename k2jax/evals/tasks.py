"""Tasks of the lm-evaluation-harness as evaluations of ours: found, loaded, run, their results put in order."""

import contextlib
import difflib
import importlib.metadata
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager

from k2jax.chat.template import ChatTemplate
from k2jax.errors import ConfigError
from k2jax.evals import folder
from k2jax.evals.chat import PLAIN, Chat, Rendering
from k2jax.evals.harness import CheckpointLM
from k2jax.evals.identity import configs_digest, documents_digest, requests_digest
from k2jax.evals.results import Outcome
from k2jax.evals.subject import Subject
from k2jax.run.saved import SavedStep

VERSION = importlib.metadata.version("lm_eval")
BOOTSTRAPS = 1000  # draws for the standard error of metrics that are no mean

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class PassAt(NamedTuple):
    """Sampled solutions of each problem, and how many of them are drawn for the metric."""

    k: int
    samples: int
    temperature: float
    top_p: float


class HarnessTask:
    """A task, group or tag of the harness under one setting."""

    def __init__(
        self,
        manager: TaskManager,
        name: str,
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        pass_at: PassAt | None = None,
        allow_code: bool = False,
        seed: int = 1234,
        choices: dict[str, Any] | None = None,
        chat: Chat = PLAIN,
    ):
        """Nothing is loaded or downloaded yet.

        Args:
            num_fewshot: None leaves the task's own.
            seed: of few-shot examples.
            choices: what a result says of where its settings are from.
            chat: how its requests are put.
        """
        self.name, self._manager = name, manager
        self._num_fewshot, self._limit, self._pass_at, self._allow_code = num_fewshot, limit, pass_at, allow_code
        self._seed, self._choices, self._chat = seed, choices, chat
        self._known: dict[str, dict[str, str]] = {}
        self._configs = task_configs(manager, name)
        own = manager.task_index[name].cfg or {}
        self.version = (own.get("metadata") or {}).get("version")

    @property
    def unsafe(self) -> bool:
        """Whether it runs the code that the model writes."""
        return any(own.get("unsafe_code") for own in self._configs.values())

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        """Its tasks with their data, once for all checkpoints. Raises ConfigError where the data cannot be had."""
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for our results
            loaded = self._load()
        return {**loaded, "tasks": dict(sorted(loaded["tasks"].items()))}  # those of a tag come in any order

    def _data(self, saved: SavedStep, template: ChatTemplate | None) -> dict[str, str]:
        """Digests of what is asked, and of the documents; the requests themselves are not kept."""
        key = json.dumps(template and template._asdict(), sort_keys=True)  # checkpoints of one run may have others
        if key in self._known:
            return self._known[key]
        loaded, chat = self._loaded["tasks"], self._chat
        options: dict[str, Any] = {"system_instruction": chat.system, "fewshot_as_multiturn": chat.multiturn}
        self._begin()
        with contextlib.redirect_stdout(sys.stderr), _rendering(template, saved) as rendering:
            options |= {"apply_chat_template": bool(template), "chat_template": rendering}
            for task in loaded.values():
                self._trying(task.build_all_requests, limit=get_sample_size(task, self._limit), **options)
        found = {"requests_sha256": requests_digest(loaded), "documents_sha256": documents_digest(loaded)}
        self._forget()
        self._known[key] = found
        return found

    def settings(self, saved: SavedStep) -> dict[str, Any]:
        """What is asked, and how an answer is measured: a version is not always raised when they change."""
        template = self._chat.template_of(saved)
        return {
            "num_fewshot": self._num_fewshot,
            "limit": self._limit,
            "pass_at": self._pass_at and self._pass_at._asdict(),
            "configs_sha256": self._configs_digest(),
            **self._data(saved, template),
            "harness": VERSION,
            **self._chat.settings(template),
        }

    def evaluate(self, subject: Subject) -> Outcome:
        # For bootstrapped errors the harness forks a pool, and a fork of a process with JAX's threads may hang.
        os.environ["DISABLE_MULTIPROC"] = "1"
        if self._allow_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        template = self._chat.template_of(subject.saved)
        loaded, expected = self._loaded, self._data(subject.saved, template)["requests_sha256"]
        self._begin()
        with contextlib.redirect_stdout(sys.stderr), _rendering(template, subject.saved) as rendering:
            lm = CheckpointLM(subject, rendering)
            found = evaluate(
                lm,
                loaded,
                limit=self._limit,
                bootstrap_iters=BOOTSTRAPS,
                confirm_run_unsafe_code=self._allow_code,
                system_instruction=self._chat.system,
                apply_chat_template=bool(template),
                fewshot_as_multiturn=self._chat.multiturn,
            )
        if requests_digest(loaded["tasks"]) != expected:
            raise ConfigError(
                f"task {self.name} asks something else each time that it is rendered, so that no result of it can be "
                f"told from another: draw in its functions with a seed, or leave it out"
            )
        self._forget()
        samples = [{"task": task, **sample} for task, rows in found["samples"].items() for sample in rows]
        kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
        details = {"harness": {"version": VERSION, **{key: found[key] for key in kept if key in found}}}
        details |= {"tokenized_apart": lm.num_apart, "choices": self._choices}
        if rendering:
            about = {"template": template.text, "source": template.source, "notes": rendering.notes}
            details["chat"] = {**about, "without_system": rendering.num_without_system}
        metrics = found["results"].get(self.name) or found["results"]
        return Outcome(headline(metrics), metrics, samples, details)

    def _begin(self) -> None:
        """Puts back what the harness draws from, so that a task renders the same each time."""
        random.seed(0)  # as the harness's command line
        np.random.seed(self._seed)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=self._seed)

    def _forget(self) -> None:
        """A suite's requests would be gigabytes together."""
        for task in self._loaded["tasks"].values():
            task._instances = None

    def _load(self) -> dict[str, Any]:
        if not sys.stderr.isatty():
            import datasets

            datasets.disable_progress_bars()
        spec = pass_at_spec(self.name, self._configs[self.name], self._pass_at) if self._pass_at else self.name
        random.seed(0)
        np.random.seed(self._seed)
        loaded = self._trying(self._manager.load, [spec])
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            # As the harness does: a task that says 0 is never given examples.
            if self._num_fewshot is not None and own != 0:
                task.set_config("num_fewshot", self._num_fewshot)
            elif own is None:
                task.set_config("num_fewshot", 0)
        return loaded

    def _trying(self, load: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        try:
            return load(*arguments, **keywords)
        except ConfigError as error:
            raise ConfigError(f"task {self.name}: {error}") from error
        except Exception as error:  # datasets and the harness raise of every kind: no network, no file, a bad YAML
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ConfigError(f"task {self.name}: cannot be loaded: {type(error).__name__}: {reason[:300]}") from error

    def _configs_digest(self) -> str:
        index = self._manager.task_index
        groups = {name: index[name].cfg for name in groups_of(self._manager, self.name)}
        entries = [index[name] for name in (*self._configs, *groups) if name in index]
        folders = [entry.yaml_path.parent for entry in entries if entry.yaml_path]
        return configs_digest({"tasks": self._configs, "groups": groups}, folders)


def _rendering(template: ChatTemplate | None, saved: SavedStep) -> contextlib.AbstractContextManager[Rendering | None]:
    return Rendering(template, saved) if template else contextlib.nullcontext()


def open_manager(names: list[str], task_dir: str | Path | None) -> TaskManager:
    """The tasks that there are: those of `task_dir` and the harness's own.

    Raises ConfigError for a name that is none of them, with the closest, and for what has no end (folder.py).
    """
    if task_dir is not None and not Path(task_dir).is_dir():
        raise ConfigError(f"--task-dir={task_dir}: no such folder")
    if task_dir is not None:
        folder.check(Path(task_dir))
    include = task_dir and str(Path(task_dir).resolve())
    # The harness's own are listed only where they are needed: that takes five seconds.
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include) if include else _own_tasks()
    check_names(names, manager, task_dir)
    for name in names:
        folder.check_group(manager.task_index, name)
    return manager


_own_tasks = cache(TaskManager)


def check_names(names: Iterable[str], manager: TaskManager, task_dir: str | Path | None) -> None:
    """Raises ConfigError for a name that the manager does not have, with the closest of those it has."""
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "validation", "memorization", "k2"], n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(
                f"--tasks: no task {name!r} in lm_eval {VERSION}{f' or {task_dir}' if task_dir else ''}{hint}"
            )


def task_configs(manager: TaskManager, name: str) -> dict[str, dict[str, Any]]:
    """{name: configuration} of a task, or of every task of a group or tag, as written; nothing of it is run."""
    entry = manager.task_index[name]
    written = entry.cfg or {"task": sorted(entry.tags)}  # a tag has no file of its own
    members = written.get("task")
    if not isinstance(members, list):
        return {name: written}
    found = {}
    for member in members:
        child = member if isinstance(member, str) else member.get("task", member.get("group"))
        inside = task_configs(manager, child) if child in manager.task_index else {str(child): {}}
        own = {} if isinstance(member, str) else {key: member[key] for key in member if key not in ("task", "group")}
        found.update({task: {**config, **own} for task, config in inside.items()})
    return found


def groups_of(manager: TaskManager, name: str) -> list[str]:
    """The groups of a name, itself and those inside: how tasks make one number is written there."""
    entry = manager.task_index.get(name)
    members = (entry.cfg or {}).get("task") if entry else None
    if not isinstance(members, list):
        return []
    inside = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
    return [name, *(group for child in inside if isinstance(child, str) for group in groups_of(manager, child))]


def headline(metrics: dict[str, Any]) -> str:
    """A task's numbers in a line, or how many tasks a tag has."""
    numbers = {key: value for key, value in metrics.items() if "," in key and isinstance(value, float)}
    if not numbers:
        return f"{len(metrics)} tasks"
    shown = [
        f"{key.removesuffix(',none')} {value:.4f}" for key, value in numbers.items() if "_stderr" not in key
    ]
    return " ".join(shown)


def pass_at_spec(name: str, config: dict[str, Any], p: PassAt) -> dict[str, Any]:
    """The harness's task of code, with pass@k over sampled solutions in the place of its own metric."""

    def pass_at(references: list[str], predictions: list[list[str]]) -> dict[str, float]:
        return _code_eval().compute(references=references, predictions=predictions, k=[p.k])[0]

    sampling = {"do_sample": True, "temperature": p.temperature, "top_p": p.top_p}
    changed = {
        "repeats": p.samples,
        "metric_list": [{"metric": pass_at, "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {**config["generation_kwargs"], **sampling},
    }
    if "filter_list" not in config:  # the harness would keep the first solution alone
        changed["filter_list"] = [{"name": "all", "filter": [{"function": "take_first_k", "k": p.samples}]}]
    return {"group": f"{name}_pass_at_{p.k}", "task": [{"task": name, **changed}]}


@cache
def _code_eval() -> Any:
    """Hugging Face's metric that runs solutions against their tests; it asks for HF_ALLOW_CODE_EVAL itself."""
    from evaluate import load

    return load("code_eval")
