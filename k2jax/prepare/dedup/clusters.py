"""From pairs of duplicates to clusters, and the document of each that stays: one task, in about 60 bytes a document.

A cluster is all that pairs connect, exact or near. Only documents that have a duplicate are held.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from k2jax.errors import StorageError
from k2jax.files import whole_file, write_json
from k2jax.prepare.dedup.index import PAIR, Clean, Dumps, open_records, read_index, task_bounds

MEMBERS = pa.schema(
    [("task", pa.uint32()), ("index", pa.uint32()), ("survivor_task", pa.uint32()), ("survivor_index", pa.uint32())]
    + [("exact", pa.bool_())]
)
ROWS = 1 << 18  # pairs read, and rows written, at a time


def find_clusters(_: int, *, clean: Clean, exact: list[Path], near: list[Path], folder: Path) -> None:
    """Writes members.parquet (MEMBERS): every document with a duplicate, its survivor, and whether it is an exact copy
    that was removed as such; and summary.json. `exact` and `near` are files of pairs.
    """
    nodes = _nodes([*exact, *near])
    labels = _components(nodes, [*exact, *near])
    is_exact = np.zeros(len(nodes), bool)
    for pairs in _blocks(exact):
        is_exact[np.searchsorted(nodes, _node(pairs, ""))] = True
    survivors = _survivors(nodes, labels, clean)
    with whole_file(folder / "members.parquet") as file, pq.ParquetWriter(file, MEMBERS, compression="zstd") as out:
        for start in range(0, len(nodes), ROWS):
            part = slice(start, start + ROWS)
            ends = [*_split(nodes[part]), *_split(nodes[survivors[part]])]
            out.write_table(pa.table([*ends, is_exact[part]], schema=MEMBERS))
    write_json(folder / "summary.json", _summary(nodes, survivors, is_exact, clean))


def _split(nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (nodes >> 32).astype(np.uint32), nodes.astype(np.uint32)


def _node(pairs: np.ndarray, end: str) -> np.ndarray:
    """Task and index in one number, of a pair's end ("" or "other_")."""
    return pairs[f"{end}task"].astype(np.uint64) << 32 | pairs[f"{end}index"]


def _blocks(paths: list[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        for start in range(0, len(open_records(path, PAIR)), ROWS):
            yield np.array(open_records(path, PAIR)[start : start + ROWS])


def _nodes(paths: list[Path]) -> np.ndarray:
    """All ends of all pairs, sorted."""
    nodes, recent, waiting = np.empty(0, np.uint64), [], 0
    for pairs in _blocks(paths):
        ends = _distinct([_node(pairs, ""), _node(pairs, "other_")])
        recent.append(ends)
        waiting += len(ends)
        if waiting > len(nodes) // 2:  # so that joining them takes time in proportion to the pairs
            nodes, recent, waiting = _distinct([nodes, *recent]), [], 0
    return _distinct([nodes, *recent])


def _distinct(parts: list[np.ndarray]) -> np.ndarray:
    values = np.concatenate(parts)
    values.sort()
    return values[np.r_[True, values[1:] != values[:-1]][: len(values)]]


def _components(nodes: np.ndarray, paths: list[Path]) -> np.ndarray:
    """Of each node the first of its component: roots are joined to smaller roots until the ends of all pairs agree."""
    labels = np.arange(len(nodes), dtype=np.uint32 if len(nodes) < 1 << 32 else np.uint64)
    for pairs in _blocks(paths):
        one = np.searchsorted(nodes, _node(pairs, "")).astype(labels.dtype)
        other = np.searchsorted(nodes, _node(pairs, "other_")).astype(labels.dtype)
        while True:
            one, other = labels[one], labels[other]
            differ = one != other
            if not differ.any():
                break
            one, other = one[differ], other[differ]
            np.minimum.at(labels, np.maximum(one, other), np.minimum(one, other))
            while not np.array_equal(labels, shorter := labels[labels]):
                labels = shorter
    return labels


def _survivors(nodes: np.ndarray, labels: np.ndarray, clean: Clean) -> np.ndarray:
    """Of each node the one of its cluster that stays."""
    dumps, numbers = Dumps(), np.empty(len(nodes), np.int32)
    tasks = (nodes >> 32).astype(np.uint32)
    for task, where in task_bounds(tasks, len(clean.subsets)):
        names, indices = read_index(clean, task, ["dump"])["dump"], nodes[where].astype(np.uint32)
        if indices[-1] >= len(names):
            raise StorageError(
                f"a duplicate is document {indices[-1]} of task {task} of the clean documents, which has {len(names)}: "
                "remove the stages of deduplication and prepare again"
            )
        numbers[where] = dumps.number(names)[indices]
    if len(nodes) and tasks[-1] >= len(clean.subsets):
        raise StorageError(f"a duplicate is of task {tasks[-1]} of {len(clean.subsets)}: remove the stages of pairs")
    newest = dumps.newest_first()
    _, place = np.unique(clean.priorities, return_inverse=True)
    order = place.astype(np.int32)[tasks]
    order *= len(newest)
    order += newest[numbers]
    del tasks, numbers  # with many duplicates these arrays are all the memory there is
    best = np.full(len(nodes), np.iinfo(np.int32).max, np.int32)
    np.minimum.at(best, labels, order)
    chosen = np.flatnonzero(order == best[labels]).astype(labels.dtype)
    del order, best
    first = np.full(len(nodes), len(nodes), labels.dtype)
    np.minimum.at(first, labels[chosen], chosen)
    return first[labels]


def _summary(nodes: np.ndarray, survivors: np.ndarray, is_exact: np.ndarray, clean: Clean) -> dict:
    """{"removed": {subset: {"exact": n, "near": n}}, "pairs": {"removed's -> survivor's": n}, "cluster_sizes":
    {size: clusters}}.
    """
    names, subsets = np.unique(clean.subsets, return_inverse=True)
    counts = np.zeros((len(names), len(names), 2), np.int64)
    for start in range(0, len(nodes), ROWS):
        block = np.arange(start, min(start + ROWS, len(nodes)))
        gone = block[survivors[block] != block]
        own, other = (subsets[_split(nodes[which])[0]] for which in (gone, survivors[gone]))
        np.add.at(counts, (own, other, is_exact[gone].astype(np.int64)), 1)
    removed: dict[str, dict[str, int]] = {name: {"exact": 0, "near": 0} for name in names.tolist()}
    pairs: Counter[str] = Counter()
    for own, other, exact in np.argwhere(counts).tolist():
        removed[names[own]]["exact" if exact else "near"] += int(counts[own, other, exact])
        pairs[f"{names[own]} -> {names[other]}"] += int(counts[own, other, exact])
    sizes = np.bincount(np.bincount(survivors))
    histogram = {str(size): int(sizes[size]) for size in np.flatnonzero(sizes[1:]) + 1}
    return {"removed": removed, "pairs": dict(pairs), "cluster_sizes": histogram}
