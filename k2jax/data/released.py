"""The rows of a run as a release has them: what its steps read, in data/chunk_*.parquet, where no stores are.

Nothing in a release is believed: who reads rows here compares their batch's digest with the ledger's, as always.
"""

import json
import re
import threading
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from k2jax.data.storage import storage_errors
from k2jax.errors import ConfigError, DamagedError

MAX_BYTES = 1 << 26  # of chunks.json


class Chunk(NamedTuple):
    """Steps `first` to `last`, in one file."""

    first: int
    last: int
    path: Path


class ReleasedRows:
    """The released rows of a run, by step. Threads may share it."""

    def __init__(self, folder: Path):
        """Of the folder `data` of a release. ConfigError where its chunks.json is none."""
        path = folder / "chunks.json"
        try:
            with path.open("rb") as file:
                entries = json.loads(file.read(MAX_BYTES))["chunks"]
            found = [Chunk(e["first_step"], e["last_step"], folder / _plain(e["file"])) for e in entries]
            self._chunks = sorted(found)
            self._firsts = [int(chunk.first) for chunk in self._chunks]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path}: no list of a release's chunks ({error!r}): restore it from a copy") from error
        self._lock = threading.Lock()
        self._file = lru_cache(maxsize=2)(_ChunkFile)

    def read(
        self, step: int, rows: np.ndarray, rows_per_step: int, length: int, name: str = "token_ids"
    ) -> np.ndarray:
        """Token ids uint32 (rows, length) of some rows of a step; or their "marks", of conversations.

        Raises ConfigError for a step that is not released, DamagedError for a file that is not what it should be.
        """
        column = self._column(step, rows_per_step, name)
        ids = column.flatten().to_numpy(zero_copy_only=False)
        if ids.dtype.kind != "u" or ids.size != rows_per_step * length:
            raise DamagedError(f"{self._of(step).path}: step {step} has not {rows_per_step} rows of {length:,} ids")
        return ids.reshape(rows_per_step, length)[rows].astype(np.uint32)

    def documents(self, step: int, row: int, rows_per_step: int) -> list[dict[str, Any]]:
        """The parts of documents in a row: id, source, start_in_document, start, stop."""
        return self._column(step, rows_per_step, "documents")[row].as_py()

    def _column(self, step: int, rows_per_step: int, name: str) -> pa.ListArray:
        chunk = self._of(step)
        with self._lock, storage_errors(f"{chunk.path}: cannot be read"):
            return self._file(chunk.path).column((step - chunk.first) * rows_per_step, rows_per_step, name)

    def _of(self, step: int) -> Chunk:
        i = bisect_right(self._firsts, step) - 1
        if i < 0 or step > self._chunks[i].last:
            raise ConfigError(f"step {step}: its rows are not released; name the run's stores: --stores=DIR")
        return self._chunks[i]


class _ChunkFile:
    """A chunk, of which row groups are read as they are needed."""

    def __init__(self, path: Path):
        self._parquet = pq.ParquetFile(path)
        about = self._parquet.metadata
        self._ends = np.cumsum([about.row_group(i).num_rows for i in range(about.num_row_groups)])
        self._group = lru_cache(maxsize=2)(self._parquet.read_row_group)

    def column(self, first: int, count: int, name: str) -> pa.ListArray:
        pieces, stop = [], first + count
        for g in range(int(np.searchsorted(self._ends, first, side="right")), len(self._ends)):
            begin = int(self._ends[g - 1]) if g else 0
            if begin >= stop:
                break
            table = self._group(g)
            pieces.append(table.slice(max(0, first - begin), stop - max(first, begin)))
        return pa.concat_tables(pieces)[name].combine_chunks()


def _plain(name: str) -> str:
    if not re.fullmatch(r"chunk_\d+\.parquet", name):
        raise ValueError(f"file {name!r}")
    return name


def released_rows(workdir: Any) -> ReleasedRows | None:
    """Those of the release that a run directory is the part run/ of; None where it is none, or has digests only."""
    if not isinstance(workdir, Path):  # a bucket's
        return None
    root = workdir.absolute().parent
    is_one = workdir.absolute().name == "run" and (root / "release.json").is_file()
    return ReleasedRows(root / "data") if is_one and (root / "data" / "chunks.json").is_file() else None
