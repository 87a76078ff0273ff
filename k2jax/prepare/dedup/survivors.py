"""The clean documents that duplicate no other, as deduplication has left them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from k2jax.errors import StorageError
from k2jax.prepare.dedup.index import Clean, index_of
from k2jax.prepare.documents import read_documents
from k2jax.prepare.made import remedy
from k2jax.prepare.tally import Tally


def survivors(stages: Path, rank: int, tally: Tally) -> Iterator[tuple[int, Document]]:
    """The documents of a task without the duplicates, by their index; those that had some know how many, and where.

    Raises StorageError if a file of them is missing or damaged.
    """
    name, found = f"{rank:05d}", _rows(stages, rank)
    for index, document in enumerate(read_documents(stages / "clean" / "documents" / f"{name}.jsonl.zst")):
        num_bytes = len(document.text.encode())
        tally.saw("duplicates", num_bytes)
        row = found.get(index)
        if row and row["reason"]:
            tally.removed("duplicates", row["reason"], num_bytes)
            continue
        if row:
            where = {entry["name"]: entry["count"] for entry in row["by"]}
            document.metadata["duplicates"] = {"copies": row["copies"], "by": where, "sources": row["sources"]}
        yield index, document


def surviving_ids(stages: Path, clean: Clean, rank: int) -> Iterator[tuple[int, bytes]]:
    """The same documents by their ids, without their texts. Raises StorageError likewise."""
    gone = {index for index, row in _rows(stages, rank).items() if row["reason"]}
    ids = (id for batch in index_of(clean, rank, ["id"]) for id in batch["id"].to_pylist())
    yield from ((index, id) for index, id in enumerate(ids) if index not in gone)


def _rows(stages: Path, rank: int) -> dict[int, dict[str, Any]]:
    path = stages / "duplicates" / f"{rank:05d}.parquet"  # there for every task: without it no document would go
    try:
        return {row.pop("index"): row for row in pq.read_table(path).to_pylist()}
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{path} cannot be read ({reason}): {remedy(path)}") from error
