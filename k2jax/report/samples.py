"""Samples of evaluations, few enough for a page: the same documents of a task at each checkpoint."""

import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2jax.bucket import BucketPath
from k2jax.data.tokenizer import load_tokenizer
from k2jax.report.subject import Subject

DOCUMENTS = 24  # of a task, at most
CHECKPOINTS = 24  # of a task; evenly spaced, the newest among them
MOST_TEXT = 1_200  # characters of a field
MOST_ALL = 1_500_000  # characters of the whole page's samples
MAX_LINE = 1 << 24
TOKENS = ("tokens", "recited")  # of the memorization task: ids


class Samples:
    """`tasks`: [{"task", "documents": [{"name", "fields", "answers": [{"step", "checkpoint", "fields"}]}]}]."""

    def __init__(self, subject: Subject):
        self.subject, self.tasks, self._size, self._full = subject, [], 0, False
        path = subject.workdir / "tokenizer.json"
        self._tokenizer = subject.notes.trying(f"{path}", lambda: load_tokenizer(path), None) if path.exists() else None

    @property
    def said(self) -> str:
        text = (
            f"Up to {DOCUMENTS} documents of each task, the same ones at up to {CHECKPOINTS} checkpoints; texts of "
            f"over {MOST_TEXT:,} characters are cut. All of them are in evals/."
        )
        return text + (" What did not fit on this page is left out." if self._full else "")

    def add(self, task: str, results: list[dict[str, Any]]) -> None:
        """Of one task under one setting: its results by step, each with the "path" that it was read from."""
        documents: dict[str, dict[str, Any]] = {}
        for result in _evenly(results, CHECKPOINTS):
            what = f"samples of {task} at step {result['step']}"
            file = result["path"].with_suffix(".samples.jsonl")
            lines = self.subject.notes.trying(what, lambda f=file: _chosen(f), [])
            for name, sample in lines:
                asked, answered = self._fields(sample)
                document = documents.setdefault(name, {"name": name, "fields": asked, "answers": []})
                answer = {"step": result["step"], "checkpoint": str(result["checkpoint"])[:12], "fields": answered}
                size = len(json.dumps(answer)) + (len(json.dumps(asked)) if not document["answers"] else 0)
                if self._size + size > MOST_ALL:
                    self._full = True
                    continue
                self._size += size
                document["answers"].append(answer)
        kept = [document for document in documents.values() if document["answers"]]
        if kept:
            self.tasks.append({"task": task, "documents": kept})

    def _fields(self, sample: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
        """What was asked, which is of the document, and what the checkpoint answered: [[name, text]]."""
        answered = {"resps", "filtered_resps", "recited", "score", "loss"}
        metrics = sample.get("metrics")
        answered |= set(metrics) if isinstance(metrics, list) and all(isinstance(m, str) for m in metrics) else set()
        hidden = {"task", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash", "doc_id"}
        asked, said = [], []
        for key, value in sample.items():
            if key in TOKENS and self._tokenizer is not None and _are_ids(value):
                value = self._tokenizer.decode(value)
            if key not in hidden and value is not None:
                (said if key in answered else asked).append([str(key)[:80], _text(value)])
        return asked, said


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 31 for item in value)


def _text(value: Any) -> str:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float):
        return f"{value:.5g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} ... ({len(text):,} characters)"


def _evenly(values: list, most: int) -> list:
    """The last one among them."""
    if len(values) <= most:
        return values
    return [values[-1 - round(i * (len(values) - 1) / (most - 1))] for i in reversed(range(most))]


def _chosen(path: Path | BucketPath) -> list[tuple[str, dict[str, Any]]]:
    """The DOCUMENTS samples whose names have the least digests: the same ones at all checkpoints."""
    best: list[tuple[int, int, str, dict[str, Any]]] = []
    for number, sample in enumerate(_lines(path)):
        name = _name(sample)
        rank = -int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        item = (rank, -number, name, sample)
        if len(best) < DOCUMENTS:
            heapq.heappush(best, item)
        else:
            heapq.heappushpop(best, item)
    return [(name, sample) for _, _, name, sample in sorted(best, key=lambda item: -item[1])]


def _lines(path: Path | BucketPath) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().splitlines() if isinstance(path, BucketPath) else _stream(path)
    for line in lines:
        sample = json.loads(line)
        if isinstance(sample, dict):
            yield sample


def _stream(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            yield line


def _name(sample: dict[str, Any]) -> str:
    """Of the document, the same at every checkpoint."""
    task, number, filters = sample.get("task"), sample.get("doc_id"), sample.get("filter")
    if number is not None:
        return f"{task} {number}" + (f" ({filters})" if filters not in (None, "none") else "")
    step = sample.get("step")
    where = f", step {step}, row {sample.get('row')}" if step is not None else ""
    return f"{sample.get('subset', 'sample')}, token {sample.get('start', '?')}{where}"
