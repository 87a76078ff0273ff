"""Which documents are the same text, by SHA-256: each partition of the hashes is a task of its own."""

from operator import itemgetter
from pathlib import Path

import numpy as np

from k2jax.prepare.documents import whole_file
from k2jax.prepare.index import PAIR, Clean, Dumps, first_at, open_records, read_index, repeated


def pairs_path(folder: Path, partition: int) -> Path:
    """Of one partition."""
    return folder / f"{partition:05d}.pairs"


def find_exact(partition: int, *, clean: Clean, folder: Path, num_partitions: int) -> None:
    """Writes the pairs (removed, survivor) of the partition's texts, by task and index of the removed document.

    Holds about 32 bytes for each of the partition's documents.
    """
    dumps = Dumps()
    found = [
        _ids(clean, task, dumps, partition=partition, num_partitions=num_partitions)
        for task in range(len(clean.subsets))
    ]
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    some = repeated(columns[0])
    high, low, task, index, dump = (column[some] for column in columns)
    priority = np.array(clean.priorities)[task]
    order = np.lexsort((index, task, dumps.newest_first()[dump], priority, low, high))
    high, low, task, index = high[order], low[order], task[order], index[order]
    removed = np.r_[False, (high[1:] == high[:-1]) & (low[1:] == low[:-1])][: len(high)]
    survivor = np.maximum.accumulate(np.where(removed, 0, np.arange(len(high))))
    pairs = np.empty(len(high), PAIR)
    pairs["task"], pairs["index"] = task, index
    pairs["other_task"], pairs["other_index"] = task[survivor], index[survivor]
    pairs = pairs[removed]
    with whole_file(pairs_path(folder, partition)) as file:
        file.write(pairs[np.lexsort((pairs["index"], pairs["task"]))].tobytes())


def _ids(
    clean: Clean, task: int, dumps: Dumps, *, partition: int, num_partitions: int
) -> tuple[np.ndarray, ...]:
    """(first 8 bytes of the id, next 8, task, index, number of the dump) of a task's documents in the partition."""
    table = read_index(clean, task, ["id", "dump"])
    ids = np.frombuffer(b"".join(table["id"].to_pylist()), ">u8").reshape(-1, 4)
    # 128 bits of SHA-256 do for all: 2^64 documents give an even chance of one collision.
    high, low = ids[:, 0].astype(np.uint64), ids[:, 1].astype(np.uint64)
    [here] = np.nonzero((high >> 32) * np.uint64(num_partitions) >> 32 == partition)
    numbers = dumps.number(table["dump"])[here]
    return high[here], low[here], np.full(len(here), task, np.uint32), here.astype(np.uint32), numbers


def removed_of_task(task: int, *, folder: Path, num_partitions: int) -> np.ndarray:
    """The sorted indices of a task's documents that some partition removed."""
    found = []
    for partition in range(num_partitions):
        pairs = open_records(pairs_path(folder, partition), PAIR)
        first, last = (first_at(pairs, itemgetter("task"), bound) for bound in (task, task + 1))
        found.append(pairs["index"][first:last])
    return np.sort(np.concatenate(found))
