"""Which documents are the same text, by SHA-256: each task sorts its ids, then each range of ids is looked at alone."""

from operator import itemgetter
from pathlib import Path

import numpy as np

from k2jax.files import whole_file
from k2jax.prepare.dedup.index import (
    PAIR,
    Clean,
    Dumps,
    open_records,
    read_index,
    repeated,
    task_bounds,
    within,
)

# The first 128 bits of SHA-256: 2^64 documents would give an even chance of one collision.
ID = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<u4")])


def ids_path(folder: Path, task: int) -> Path:
    """Of one task's documents."""
    return folder / f"{task:05d}.ids"


def pairs_path(folder: Path, partition: int) -> Path:
    """Of one partition."""
    return folder / f"{partition:05d}.pairs"


def sort_ids(task: int, *, clean: Clean, folder: Path) -> None:
    """Writes the ids (ID) of a task's documents, sorted."""
    found = np.frombuffer(b"".join(read_index(clean, task, ["id"])["id"].to_pylist()), ">u8").reshape(-1, 4)
    ids = np.empty(len(found), ID)
    ids["high"], ids["low"], ids["index"] = found[:, 0], found[:, 1], np.arange(len(found))
    with whole_file(ids_path(folder, task)) as file:
        file.write(ids[np.lexsort((ids["low"], ids["high"]))].tobytes())


def find_exact(partition: int, *, clean: Clean, folder: Path, num_partitions: int) -> None:
    """Writes the pairs (removed, survivor) of the partition's texts, by task and index of the removed document.

    Holds about 50 bytes for each of the partition's documents.
    """
    low, high = (((partition + more) << 64) // num_partitions for more in (0, 1))
    ids, tasks = [], []
    for task in range(len(clean.subsets)):
        path = ids_path(folder, task)
        ids.append(within(path, open_records(path, ID), itemgetter("high"), low, high if high >> 64 == 0 else None))
        tasks.append(np.full(len(ids[-1]), task, np.uint32))
    found, task = np.concatenate(ids), np.concatenate(tasks)
    some = repeated(found["high"])
    pairs = _pairs(found[some], task[some], clean)
    with whole_file(pairs_path(folder, partition)) as file:
        file.write(pairs[np.lexsort((pairs["index"], pairs["task"]))].tobytes())


def _pairs(ids: np.ndarray, task: np.ndarray, clean: Clean) -> np.ndarray:
    """(removed, survivor) for each removed document."""
    order = np.lexsort((ids["index"], task))
    ids, task = ids[order], task[order]
    dumps, dump = Dumps(), np.empty(len(ids), np.int32)
    for each, where in task_bounds(task, len(clean.subsets)):
        dump[where] = dumps.number(read_index(clean, each, ["dump"])["dump"].take(ids["index"][where]))
    priority = np.array(clean.priorities)[task]
    order = np.lexsort((ids["index"], task, dumps.newest_first()[dump], priority, ids["low"], ids["high"]))
    ids, task = ids[order], task[order]
    removed = np.zeros(len(ids), bool)
    removed[1:] = (ids["high"][1:] == ids["high"][:-1]) & (ids["low"][1:] == ids["low"][:-1])
    survivor = np.maximum.accumulate(np.where(removed, 0, np.arange(len(ids))))
    pairs = np.empty(len(ids), PAIR)
    pairs["task"], pairs["index"] = task, ids["index"]
    pairs["other_task"], pairs["other_index"] = task[survivor], ids["index"][survivor]
    return pairs[removed]


def removed_of_task(task: int, *, folder: Path, num_partitions: int) -> np.ndarray:
    """The sorted indices of a task's documents that some partition removed."""
    paths = [pairs_path(folder, partition) for partition in range(num_partitions)]
    found = [within(path, open_records(path, PAIR), itemgetter("task"), task, task + 1)["index"] for path in paths]
    return np.sort(np.concatenate(found))
