"""The record of evaluations, evals/<step>/ in a run: append-only, plain JSON.

    evals/20/gsm8k-3f9c2a81d04e.json            one task under one setting: what was measured, of what, with what
    evals/20/gsm8k-3f9c2a81d04e.samples.jsonl   the outputs behind it, a line a sample

A result is named by its identity: task, version, settings (digests of data, functions and template among them), seed
and the checkpoint's digest. It is written last and never replaced: what is there is complete, and an evaluation with
the same identity need not be done again. Where it is wanted again, the second record stands beside the first: its
settings have "again": 1, those of a third "again": 2.
"""

import hashlib
import itertools
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from k2jax import files, locks
from k2jax.bucket import BucketPath
from k2jax.data.manifest import sha256_json
from k2jax.errors import StorageError
from k2jax.lease import alone

FORMAT = 1


class Identity(NamedTuple):
    """What makes two evaluations the same one."""

    task: str
    version: Any  # the task's own, of JSON's types
    settings: dict[str, Any]
    seed: int
    checkpoint: str  # its digest

    @property
    def name(self) -> str:
        """Of the result's files, without a suffix."""
        return f"{re.sub(r'[^A-Za-z0-9_-]', '_', self.task)}-{sha256_json(self._asdict())[:12]}"

    def again(self, number: int) -> "Identity":
        """Of a record of the same evaluation that was made after so many others."""
        return self._replace(settings={**self.settings, "again": number}) if number else self


class Outcome(NamedTuple):
    """What an evaluation gives."""

    headline: str  # its main numbers in a line
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]
    details: dict[str, Any]  # what else the result should hold


class Results:
    """The results in a run directory."""

    def __init__(self, workdir: Path | BucketPath):
        self.directory = workdir / "evals"

    def find(self, step: int, identity: Identity) -> dict[str, Any] | None:
        """The stored result of this identity, the last of several. Raises StorageError when it is damaged."""
        there = self._there(step, identity)
        return read_result(self._path(step, identity.again(there - 1))) if there else None

    def add(
        self, step: int, identity: Identity, outcome: Outcome, about: dict[str, Any], *, again: bool = False
    ) -> dict[str, Any]:
        """Stores a result and returns it; where one of this identity has appeared meanwhile, returns that one.

        Args:
            about: how and when it was made: versions, devices, seconds.
            again: store it beside those that are there.
        """
        with self._locked(step):
            there = self._there(step, identity)
            if there and not again:
                return read_result(self._path(step, identity.again(there - 1)))
            identity = identity.again(there)
            path = self._path(step, identity)
            samples = path.with_suffix(".samples.jsonl")
            text = "".join(json.dumps(plain(sample)) + "\n" for sample in outcome.samples).encode()
            files.write_bytes(samples, text)
            result = plain(
                {
                    "format": FORMAT,
                    **identity._asdict(),
                    "step": step,
                    "headline": outcome.headline,
                    "metrics": outcome.metrics,
                    "samples": {
                        "file": samples.name,
                        "count": len(outcome.samples),
                        "sha256": hashlib.sha256(text).hexdigest(),
                    },
                    **about,
                    **outcome.details,
                }
            )
            files.write_bytes(path, json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
        return result

    def all(self) -> list[dict[str, Any]]:
        """Every result of the run, by step and name."""
        paths = [p for p in self.directory.glob("*/*.json") if p.parent.name.isdigit()]
        return [read_result(p) for p in sorted(paths, key=lambda p: (int(p.parent.name), p.name))]

    def _there(self, step: int, identity: Identity) -> int:
        """How many records of an identity there are."""
        return next(n for n in itertools.count() if not self._path(step, identity.again(n)).exists())

    def _path(self, step: int, identity: Identity) -> Path:
        return self.directory / str(step) / f"{identity.name}.json"

    @contextmanager
    def _locked(self, step: int) -> Iterator[None]:
        """One writer at a time: two evaluations of one run, such as --watch and another, may meet."""
        if isinstance(self.directory, BucketPath):
            with alone(self.directory / "lock", f"{self.directory}"):
                yield
            return
        folder = self.directory / str(step)
        folder.mkdir(parents=True, exist_ok=True)
        with locks.wait(self.directory / "lock", f"host {socket.gethostname()}, pid {os.getpid()}"):
            files.remove_leftovers(folder, alone=True)
            yield


def read_result(path: Path | BucketPath) -> dict[str, Any]:
    """One result, as data. Raises StorageError when it is damaged or is not the one that its name says."""
    try:
        result = json.loads(path.read_bytes())
        identity = Identity(*(result[field] for field in Identity._fields))
        good = result["format"] == FORMAT and identity.name == path.stem
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise StorageError(f"{path} is damaged, or of another version: move it away to evaluate anew")
    return result


def plain(value: Any) -> Any:
    """JSON's types: numpy's numbers become Python's, what is not finite None, what JSON cannot hold its text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
