"""What deduplication knows of the clean documents: their index, and the rule of which of two stays.

Of a cluster the document stays whose subset has the lowest `priority`; among those the one of the newest dump (as a
string; none is oldest), among those the first by task and index. TxT360 keeps curated sources, then newer dumps.

So that nobody has to read the indexes of all tasks to compare two documents, all names of dumps are gathered first, and
each document then goes about with two numbers: its `order`, the place of its priority and of its dump in one (u4), and
its `node`, task and index in one (u8).
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from k2jax.errors import ConfigError, StorageError
from k2jax.files import write_json
from k2jax.prepare import recipe
from k2jax.prepare.made import remedy
from k2jax.prepare.shuffle import FAN

BATCH = 1 << 16  # rows of an index that are held
TOGETHER = 16  # tasks of the clean documents that one task looks after, where it reads no text


class Subset(NamedTuple):
    """Its tasks of the clean documents follow each other."""

    name: str
    first: int  # rank of the first
    tasks: int
    priority: int


class Clean(NamedTuple):
    """The clean documents, as tasks on other machines are told of them."""

    folder: Path
    subsets: tuple[Subset, ...]

    @property
    def num_tasks(self) -> int:
        """Of all subsets."""
        return sum(subset.tasks for subset in self.subsets)

    def groups(self, size: int) -> int:
        """How many of so many tasks each."""
        return -(-self.num_tasks // size)

    def ranks(self, group: int, size: int) -> range:
        """The tasks of a group."""
        return range(group * size, min((group + 1) * size, self.num_tasks))

    def subsets_of(self, tasks: np.ndarray | int) -> np.ndarray:
        """The place among `subsets` of each task's."""
        return np.searchsorted([subset.first for subset in self.subsets], tasks, side="right") - 1


def clean_documents(config: ConfigDict, folder: Path) -> Clean:
    """Those of a recipe."""
    subsets, first = [], 0
    for name, tasks in itertools.groupby(task.subset for task in recipe.tasks(config)):
        subsets.append(Subset(name, first, len(list(tasks)), config.subsets[name].priority))
        first += subsets[-1].tasks
    return Clean(folder, tuple(subsets))


def nodes_of(task: int, indices: np.ndarray) -> np.ndarray:
    """Task and index in one number."""
    return np.uint64(task << 32) | indices.astype(np.uint64)


def index_of(clean: Clean, task: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Columns of the index of one task's documents, some rows at a time; StorageError if it is missing or damaged."""
    path = clean.folder / "index" / f"{task:05d}.parquet"
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def num_documents(clean: Clean, task: int) -> int:
    """Of one task; StorageError if its index is missing or damaged."""
    path = clean.folder / "index" / f"{task:05d}.parquet"
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> StorageError:
    message = str(error).partition("\n")[0]
    return StorageError(f"{path} cannot be read ({message}): {remedy(path)}")


# --- The order of documents -------------------------------------------------------------------------------------------


class Order(NamedTuple):
    """What all clean documents have, together."""

    documents: int
    dumps: list[str]  # newest first; of a document without one, ""

    @classmethod
    def read(cls, path: Path) -> "Order":
        """What `join_dumps` wrote."""
        return cls(**read_part(path))

    def of(self, clean: Clean, task: int, dumps: pa.Array) -> np.ndarray:
        """Of documents of a task, given their dumps: u4, of two the lower one stays."""
        places = sorted({subset.priority for subset in clean.subsets})
        place = places.index(clean.subsets[clean.subsets_of(task)].priority)
        numbers = pc.index_in(_names(dumps), value_set=pa.array(self.dumps, pa.string()))
        if numbers.null_count:
            path = clean.folder / "index" / f"{task:05d}.parquet"
            raise StorageError(f"{path} is not what it was: {remedy(path)}")
        return (place * len(self.dumps) + numbers.to_numpy()).astype(np.uint32)


def _names(dumps: pa.Array) -> pa.Array:
    return dumps.cast(pa.string()).fill_null("")


def find_dumps(group: int, *, clean: Clean, folder: Path) -> None:
    """A task: names of dumps, and number of documents, of FAN tasks of the clean documents."""
    names: set[str] = set()
    documents = 0
    for task in clean.ranks(group, FAN):
        for batch in index_of(clean, task, ["dump"]):
            names.update(pc.unique(_names(batch["dump"])).to_pylist())
            documents += len(batch)
    write_json(_part(folder, group), Order(documents, sorted(names, reverse=True))._asdict())


def join_dumps(_: int, *, clean: Clean, folder: Path, path: Path) -> None:
    """The only task: what all groups found, as an Order."""
    parts = [Order.read(_part(folder, group)) for group in range(clean.groups(FAN))]
    names = sorted({name for part in parts for name in part.dumps}, reverse=True)
    if len(names) * len(clean.subsets) >= 1 << 32:
        raise ConfigError(f"{len(names):,} different values of `dump` are more than can be told apart: it names crawls")
    write_json(path, Order(sum(part.documents for part in parts), names)._asdict())


def _part(folder: Path, group: int) -> Path:
    return folder / f"{group:05d}.json"


def read_part(path: Path) -> dict:
    """JSON that a task wrote; StorageError if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}): {remedy(path)}") from error
