"""Licences of the documents that a run read, by subset: as their stores record them, and nobody has checked them."""

import json
from collections import Counter
from typing import Any

import pyarrow.parquet as pq

from k2jax.data.provenance import Run, open_run
from k2jax.data.storage import storage_errors
from k2jax.data.store import Store
from k2jax.release.record import Record
from k2jax.text import for_markdown

MOST = 30  # named of a subset; some sources have one a document
Found = dict[str, dict[str | None, int]]  # by subset: documents by licence; None where none is recorded


def read_licences(record: Record, stores: Any) -> Found:
    """Of every subset that a stage names. ConfigError or StorageError where a store is not there."""
    found: Found = {}
    for part in open_run(record.workdir, stores).epochs():
        for name in _read_by(part):
            found.setdefault(name, dict(_of_store(part.stores[name]).most_common()))
    return found


def _read_by(part: Run) -> list[str]:
    return sorted({entry["name"] for stage in part.manifest["stages"] for entry in stage["subsets"]})


def _of_store(store: Store) -> Counter[str | None]:
    found: Counter[str | None] = Counter()
    with storage_errors(f"store {store.path}: cannot read documents.parquet"):
        for batch in pq.ParquetFile(store.open_documents()).iter_batches(columns=["metadata"]):
            found.update(map(_licence, batch["metadata"].to_pylist()))
    return found


def _licence(metadata: str | None) -> str | None:
    try:
        value = json.loads(metadata or "{}").get("licence")
    except (ValueError, RecursionError, AttributeError):
        return None
    return value if isinstance(value, str) and value.strip() else None


def licences_text(name: str, found: Found | None) -> str:
    """LICENSES.md; `found` is None where the stores were not at hand."""
    lines = [
        f"# Licences of {for_markdown(name)}",
        "",
        "What is said here of documents is what their sources or the recipe of their stores recorded. Nobody has "
        "checked it, and it is no legal advice.",
        "",
        "- **Code** (`source/`): Apache-2.0.",
        "- **Weights** (`run/checkpoints/`, `exports/`), **records** (`run/`, cards): not recorded by the run: whoever "
        "publishes this states it here.",
        "- **Data** (`data/`): of each document the licence of its source:",
        "",
        "| subset | licence | documents |",
        "|---|---|---|",
    ]
    if found is None:
        lines.append("| all | not recorded here: the stores were not at hand when the release was made | |")
    for subset, licences in sorted((found or {}).items()):
        listed = list(licences.items())
        for licence, count in listed[:MOST]:
            shown = "not recorded" if licence is None else for_markdown(licence[:200])
            lines.append(f"| {for_markdown(subset)} | {shown} | {count:,} |")
        if listed[MOST:]:
            rest = sum(count for _, count in listed[MOST:])
            lines.append(f"| {for_markdown(subset)} | {len(listed) - MOST:,} others | {rest:,} |")
    return "\n".join(lines) + "\n"
