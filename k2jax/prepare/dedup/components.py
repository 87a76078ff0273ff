"""From edges between documents to clusters: all that edges connect, found by many tasks that each hold a part.

Large-star and small-star in turn (Kiveris et al., "Connected Components in MapReduce and Beyond", SoCC 2014), each a
stage whose tasks look at some nodes with all of their neighbours:

  large  a node's larger neighbours are joined to the least of all its neighbours and itself
  small  a node and its smaller neighbours are joined to the least of them

Neither connects what was not, nor parts what was. Where both change nothing every cluster is a star around its least
node; the number of rounds grows as the logarithm of the nodes of the longest path, or little more.
"""

import functools
import itertools
import shutil
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from k2jax.errors import StorageError
from k2jax.files import write_bytes
from k2jax.prepare.dedup import streams
from k2jax.prepare.dedup.streams import chunks, mixed, partition_of
from k2jax.prepare.engine.engine import Stage
from k2jax.prepare.shuffle import Shuffle, Writer

EDGE = np.dtype([("node", "<u8"), ("other", "<u8")])  # in the partition of `node`
LABEL = np.dtype([("index", "<u4"), ("component", "<u8")])  # in the partition of a document's task


def add_edges(out: Writer, edges: Shuffle, one: np.ndarray, other: np.ndarray, *, twice: bool = True) -> None:
    """Appends edges, each in the partitions of both of its ends, or of `one`."""
    records = np.empty(len(one), EDGE)
    records["node"], records["other"] = one, other
    out.add_records(partition_of(mixed(records["node"]), edges.partitions), records)
    if twice:
        add_edges(out, edges, other, one, twice=False)


def rounds(edges: Shuffle, folder: Path) -> Generator[Stage, None, Shuffle]:
    """The stages, each of which may only be asked for when that before is complete; returns the edges of stars.

    Where there is one partition it is one stage, so that a round is no job of its own on a cluster.
    """
    found = _rounds(edges, folder)
    if edges.partitions > 1:
        return (yield from found)
    yield Stage("clusters", 1, functools.partial(_all_rounds, edges=edges, folder=folder))
    while True:
        try:
            next(found)
        except StopIteration as end:
            return end.value


def _all_rounds(_: int, *, edges: Shuffle, folder: Path) -> None:
    for stage in _rounds(edges, folder):
        stage.function(0)


def _rounds(edges: Shuffle, folder: Path) -> Generator[Stage, None, Shuffle]:
    """Files of a round are removed once nothing reads them any more; `edges` is not."""
    found = edges
    for number in itertools.count():
        at, name, parts = folder / f"{number:02d}", f"clusters-{number:02d}", edges.partitions
        large, small = Shuffle(at / "large", parts, parts), Shuffle(at / "small", parts, parts)
        options = {"edges": found, "out": large, "unfinished": at / "unfinished"}
        yield Stage(f"{name}-large", parts, functools.partial(large_star, **options))
        if not any((at / "unfinished").glob("*")):
            shutil.rmtree(large.folder, ignore_errors=True)
            return found
        yield from large.stages(f"{name}-large")
        yield Stage(f"{name}-small", parts, functools.partial(small_star, edges=large, out=small))
        yield from small.stages(f"{name}-small")
        for done in (large, found):
            if done != edges:
                shutil.rmtree(done.folder, ignore_errors=True)
        found = small


class _Neighbours(NamedTuple):
    """Of each node of a partition, sorted, its least and its greatest neighbour."""

    nodes: np.ndarray
    least: np.ndarray
    greatest: np.ndarray

    @classmethod
    def find(cls, edges: Iterable[np.ndarray]) -> "_Neighbours":
        """Holds three numbers for each node, and not its edges."""
        found = cls(*(np.empty(0, np.uint64) for _ in cls._fields))
        for chunk in edges:
            starts = _starts(chunk["node"])
            ends = np.r_[starts[1:], len(chunk)] - 1
            new = cls(chunk["node"][starts], chunk["other"][starts], chunk["other"][ends])
            found = found._joined(new) if len(found.nodes) else new
        return found

    def _joined(self, other: "_Neighbours") -> "_Neighbours":
        nodes, least, greatest = (np.concatenate(pair) for pair in zip(self, other, strict=True))
        order = np.argsort(nodes, kind="stable")
        nodes, least, greatest = nodes[order], least[order], greatest[order]
        starts = _starts(nodes)
        return _Neighbours(nodes[starts], np.minimum.reduceat(least, starts), np.maximum.reduceat(greatest, starts))

    def root_of(self, nodes: np.ndarray) -> np.ndarray:
        """The least of each node's neighbours and itself."""
        at = np.searchsorted(self.nodes, nodes)
        return np.minimum(self.least[at], nodes)


def _starts(values: np.ndarray) -> np.ndarray:
    """Where another value begins, in a sorted array that is not empty."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1]])


class _Distinct:
    """The edges of a partition in chunks, each sorted and without the same edge twice; to be read more than once."""

    def __init__(self, edges: Shuffle, partition: int):
        self._edges, self._partition = edges, partition
        self._held: list[np.ndarray] | None = None  # all, once they are known to be few: they nearly always are

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._held is not None:
            yield from self._held
            return
        held, size = [], 0
        for chunk in chunks(self._edges, self._partition, EDGE):
            chunk = chunk[np.lexsort((chunk["other"], chunk["node"]))]
            new = (chunk["node"][1:] != chunk["node"][:-1]) | (chunk["other"][1:] != chunk["other"][:-1])
            chunk = chunk[np.r_[True, new]]
            yield chunk
            size += chunk.nbytes
            held = [*held, chunk] if size <= streams.CHUNK_BYTES else []
        self._held = held if size <= streams.CHUNK_BYTES else None


def large_star(partition: int, *, edges: Shuffle, out: Shuffle, unfinished: Path) -> None:
    """A task. Each edge of `edges` is there from both ends, each of `out` from the larger.

    Leaves a file in `unfinished` unless all edges that it sees are stars' around their least node.
    """
    distinct = _Distinct(edges, partition)
    found = _Neighbours.find(distinct)
    with out.writer(partition) as writer:
        for chunk in distinct:
            larger = chunk[chunk["other"] > chunk["node"]]
            add_edges(writer, out, larger["other"], found.root_of(larger["node"]), twice=False)
    mark = unfinished / f"{partition:05d}"
    mark.unlink(missing_ok=True)
    if np.any((found.least < found.nodes) & (found.least != found.greatest)):
        write_bytes(mark, b"")


def small_star(partition: int, *, edges: Shuffle, out: Shuffle) -> None:
    """A task. Each edge of `edges` is there from its larger end, each of `out` from both."""
    distinct = _Distinct(edges, partition)
    found = _Neighbours.find(distinct)
    with out.writer(partition) as writer:
        add_edges(writer, out, found.nodes, found.least)
        for chunk in distinct:
            roots = found.root_of(chunk["node"])
            others = chunk["other"] != roots
            add_edges(writer, out, chunk["other"][others], roots[others])


def write_labels(partition: int, *, stars: Shuffle, labels: Shuffle) -> None:
    """A task: each document of a cluster with the cluster's least node (LABEL)."""
    found = _Neighbours.find(_Distinct(stars, partition))
    tasks = found.nodes >> 32
    if np.any(tasks >= labels.partitions):
        raise StorageError(
            f"{stars.folder}: a duplicate is of task {tasks.max()} of {labels.partitions} of the clean documents: "
            "prepare again with --redo=deduplicate"
        )
    records = np.empty(len(tasks), LABEL)
    records["index"], records["component"] = found.nodes.astype(np.uint32), found.root_of(found.nodes)
    with labels.writer(partition) as out:
        out.add_records(tasks, records)
