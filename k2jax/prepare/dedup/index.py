"""What deduplication knows of the clean documents: their index, the rule of which of two stays, and files of pairs.

Of a cluster the document stays whose subset has the lowest `priority`; among those the one of the newest dump (as a
string; none is oldest), among those the first by task and index. TxT360 keeps curated sources, then newer dumps.
"""

import bisect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from k2jax.errors import StorageError
from k2jax.prepare import recipe

# A duplicate and one that it is a duplicate of, each by its task of the clean documents and its index there: four
# little-endian uint32. The same as datatrove's .dups files.
PAIR = np.dtype([("task", "<u4"), ("index", "<u4"), ("other_task", "<u4"), ("other_index", "<u4")])


class Clean(NamedTuple):
    """The clean documents, as tasks on other machines are told of them."""

    folder: Path
    subsets: tuple[str, ...]  # of each task, by rank
    priorities: tuple[int, ...]  # likewise


def clean_documents(config: ConfigDict, folder: Path) -> Clean:
    """Those of a recipe."""
    names = tuple(task.subset for task in recipe.tasks(config))
    return Clean(folder, names, tuple(config.subsets[name].priority for name in names))


def read_index(clean: Clean, task: int, columns: list[str]) -> pa.Table:
    """Columns of the index of one task's documents; StorageError if it is missing or damaged."""
    path = clean.folder / "index" / f"{task:05d}.parquet"
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        message = str(error).partition("\n")[0]
        raise StorageError(f"{path} cannot be read ({message}): remove its stage and prepare again") from error


def task_bounds(tasks: np.ndarray, num_tasks: int) -> Iterator[tuple[int, slice]]:
    """(task, where it stands) of each task that is in a sorted array."""
    bounds = np.searchsorted(tasks, np.arange(num_tasks + 1)).tolist()
    for task, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start < end:
            yield task, slice(start, end)


class Dumps:
    """Numbers the names of dumps, in the order they come in."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, names: pa.ChunkedArray) -> np.ndarray:
        """Of each name; none is the empty one."""
        encoded = names.combine_chunks().cast(pa.string()).fill_null("").dictionary_encode()
        numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in encoded.dictionary.to_pylist()]
        return np.array(numbers, np.int32)[encoded.indices.to_numpy()]

    def newest_first(self) -> np.ndarray:
        """Of each number, how many dumps are newer."""
        places = {name: place for place, name in enumerate(sorted(self._numbers, reverse=True))}
        return np.array([places[name] for name in self._numbers], np.int32)


def repeated(values: np.ndarray) -> np.ndarray:
    """Where the values stand that are there more than once, equal ones beside each other and in their order."""
    order = np.argsort(values, kind="stable")
    same = values[order[1:]] == values[order[:-1]]
    return order[np.r_[same, False] | np.r_[False, same]] if len(values) else order


def open_records(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file of records, on the disk until they are read; StorageError if it is missing or ends within one."""
    try:
        if (size := path.stat().st_size) % dtype.itemsize:
            raise ValueError(f"{size:,} bytes are no multiple of {dtype.itemsize}")
        return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)  # an empty file cannot be mapped
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}): remove its stage and prepare again") from error


def within(path: Path, records: np.ndarray, key: Callable, low: int, high: int | None) -> np.ndarray:
    """Of a file's records, sorted by their key, those with low <= key < high; None for no end.

    Reads these and a few others. Raises StorageError where they are not sorted.
    """
    start, end = (
        bisect.bisect_left(range(len(records)), bound, key=lambda at: int(key(records[at]))) if bound else default
        for bound, default in ((low, 0), (high, len(records)))
    )
    found = np.array(records[start:end])
    keys = key(found)
    inside = not len(keys) or (low <= keys[0] and (high is None or keys[-1] < high))
    if start > end or not inside or not np.all(keys[1:] >= keys[:-1]):
        raise StorageError(f"{path} is damaged, it is not sorted: remove its stage and prepare again")
    return found
