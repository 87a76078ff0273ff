"""The clean documents that duplicate no other, as deduplication has left them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from k2jax.errors import StorageError
from k2jax.prepare.documents import read_documents
from k2jax.prepare.made import remedy
from k2jax.prepare.tally import Tally


def survivors(stages: Path, rank: int, tally: Tally) -> Iterator[tuple[int, Document]]:
    """The documents of a task without the duplicates, by their index; those that had some know how many, and where.

    Raises StorageError if a file of them is missing or damaged.
    """
    name = f"{rank:05d}"
    duplicates = stages / "duplicates" / f"{name}.parquet"  # there for every task: without it no document would go
    try:
        found: dict[int, dict[str, Any]] = {row.pop("index"): row for row in pq.read_table(duplicates).to_pylist()}
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{duplicates} cannot be read ({reason}): {remedy(duplicates)}") from error
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
