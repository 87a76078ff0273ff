"""What an evaluation was of, as digests (SHA-256, hex): data by its content, a task's functions by their source.

A result is found again by them, so names of files and folders are no part of it, and what changes a number is.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from k2jax.data.manifest import sha256_json
from k2jax.run.saved import SavedStep


def stores_digest(saved: SavedStep, names: Iterable[str] | None = None) -> str | None:
    """Of the stores that a checkpoint's run reads, by their root digests; None where it has no data.

    Of the subsets named, in the checkpoint's epoch; by default of all in every epoch up to it.
    """
    manifests = [epoch.manifest["stores"] for epoch in saved.epochs if epoch.manifest]
    if not manifests:
        return None
    if names is None:
        return sha256_json([{name: s["root_digest"] for name, s in stores.items()} for stores in manifests])
    return sha256_json({name: manifests[-1][name]["root_digest"] for name in names})


# ---- a task of the harness -------------------------------------------------------------------------------------------


def requests_digest(tasks: Mapping[str, Any]) -> str:
    """Of what the model is asked: every rendered request of the harness's tasks, which must have been built."""
    digest = hashlib.sha256()
    for name, task in sorted(tasks.items()):
        for i in task.instances:
            digest.update(_line([name, i.request_type, i.doc_id, i.idx, i.repeats, i.args]))
    return digest.hexdigest()


def documents_digest(tasks: Mapping[str, Any]) -> str:
    """Of what the answers are compared with: every document that has a request, with all its fields."""
    digest = hashlib.sha256()
    for name, task in sorted(tasks.items()):
        documents = {i.doc_id: i.doc for i in task.instances}
        for number, document in documents.items():
            digest.update(_line([name, number, document]))
    return digest.hexdigest()


def _line(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\n"


def configs_digest(configs: Mapping[str, Any], folders: Iterable[Path]) -> str:
    """Of configurations as written, whatever folder they lie in, with the source of each function that they name."""
    text = json.dumps(_with_sources(configs), sort_keys=True, default=str)
    for folder in sorted({str(folder) for folder in folders}, key=len, reverse=True):
        text = text.replace(folder, "")
    return hashlib.sha256(text.encode()).hexdigest()


def _with_sources(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_sources(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_sources(item) for item in value]
    path = _function(value) if isinstance(value, str) else None
    if path is None:
        return value
    sources = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in {path, *path.parent.glob("*.py")}}
    return {"function": Path(value).name, "sources": sources}  # with the modules beside it, which it may import


def _function(text: str) -> Path | None:
    """The file of a function as the harness notes it, FOLDER/module.function; None for any other text."""
    folder, _, name = text.rpartition("/")
    if not re.fullmatch(r"\w+(\.\w+)+", name) or not folder or not Path(folder).is_dir():
        return None
    module = name.rpartition(".")[0]
    path = Path(folder, f"{module.replace('.', '/')}.py")
    if path.is_file():
        return path
    try:  # the harness, too, then looks among what is installed
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.has_location else None

