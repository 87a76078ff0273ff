"""Of each cluster the document that stays, and what it knows of the others: their number, where they are, their names.

Members of a cluster are dealt out from the tasks of the clean documents to where the cluster is looked at, and what
becomes of them back to those tasks. What is held is in proportion to a partition's clusters, not to their members.
"""

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k2jax.errors import StorageError
from k2jax.files import write_json
from k2jax.prepare.dedup.components import LABEL
from k2jax.prepare.dedup.exact import REMOVED
from k2jax.prepare.dedup.index import TOGETHER, Clean, Order, index_of, nodes_of, num_documents, read_part
from k2jax.prepare.dedup.streams import add_blocks, chunks, mixed, partition_of, read_blocks
from k2jax.prepare.shuffle import FAN, Shuffle

MEMBER = np.dtype(
    [("component", "<u8"), ("node", "<u8"), ("order", "<u4"), ("exact", "u1"), ("length", "<u4")]
)  # with its source; in the partition of `component`
ROW = np.dtype(
    [("index", "<u4"), ("reason", "u1"), ("survivor", "<u8"), ("length", "<u4")]
)  # with its details (JSON) if it stays; in the partition of its task
REASONS = (None, "exact", "near")
EXACT, NEAR = 1, 2
REMEDY = "prepare again with --redo=deduplicate"


def write_members(
    group: int, *, clean: Clean, order: Path, labels: Shuffle, removed: Shuffle | None, members: Shuffle
) -> None:
    """A task: of TOGETHER tasks of the clean documents, those that are in a cluster (MEMBER), with their sources."""
    known = Order.read(order)
    with members.writer(group) as out:
        for rank in clean.ranks(group, TOGETHER):
            for records, sources in _members(rank, clean=clean, known=known, labels=labels, removed=removed):
                add_blocks(out, partition_of(mixed(records["component"]), members.partitions), records, sources)


def _members(
    rank: int, *, clean: Clean, known: Order, labels: Shuffle, removed: Shuffle | None
) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    documents, end = num_documents(clean, rank), 0
    component, is_member = np.zeros(documents, np.uint64), np.zeros(documents, bool)
    for chunk in chunks(labels, rank, LABEL):
        where = _inside(chunk["index"], documents, rank, labels)
        component[where], is_member[where] = chunk["component"], True
    is_removed = np.zeros(documents, bool)
    for chunk in chunks(removed, rank, REMOVED) if removed else ():
        is_removed[_inside(chunk, documents, rank, removed)] = True
    if np.any(is_removed & ~is_member):
        raise StorageError(f"{labels.folder}: an exact copy of task {rank} is in no cluster: {REMEDY}")
    for batch in index_of(clean, rank, ["source", "dump"]) if np.any(is_member) else ():
        start, end = end, end + len(batch)
        where = np.flatnonzero(is_member[start:end])
        rows = batch.take(pa.array(where))
        records = np.empty(len(where), MEMBER)
        records["component"], records["node"] = component[start:end][where], nodes_of(rank, where + start)
        records["order"], records["exact"] = known.of(clean, rank, rows["dump"]), is_removed[start:end][where]
        yield records, [source.encode() for source in pc.fill_null(rows["source"], "").to_pylist()]


def _inside(indices: np.ndarray, documents: int, rank: int, shuffle: Shuffle) -> np.ndarray:
    if len(indices) and indices.max() >= documents:
        raise StorageError(
            f"{shuffle.folder}: a duplicate is document {indices.max()} of task {rank} of the clean documents, which "
            f"has {documents}: {REMEDY}"
        )
    return indices


class _Cluster:
    """What is known of one, so far."""

    __slots__ = ("best", "copies", "names", "sources")

    def __init__(self) -> None:
        self.best = (1 << 32, 0)  # order and node; of all, the least
        self.copies = 0
        self.names: dict[int, int] = {}  # documents of each subset and dump
        self.sources: list[tuple[bytes, int]] = []  # with nodes

    def add(self, order: int, node: int, name: int, source: bytes, sources_kept: int) -> None:
        if (order, node) < self.best:
            self.best = order, node
        self.copies += 1
        self.names[name] = self.names.get(name, 0) + 1
        self.sources.append((source, node))
        if len(self.sources) > 2 * sources_kept + 16:  # one more than is kept: the one that stays does not count
            self.sources = heapq.nsmallest(sources_kept + 1, self.sources)

    def details(self, name_of: Callable[[int], str], sources_kept: int) -> bytes:
        """JSON, in the partition of the document that stays."""
        others = sorted(source for source, node in self.sources if node != self.best[1])
        by = sorted((name_of(name), count) for name, count in self.names.items())
        sources = [source.decode() for source in others[:sources_kept]]
        return json.dumps({"copies": self.copies, "by": by, "sources": sources}, ensure_ascii=False).encode()


def find_survivors(
    partition: int, *, clean: Clean, order: Path, members: Shuffle, rows: Shuffle, parts: Path, sources_kept: int
) -> None:
    """A task: what becomes of each member of the clusters of a partition (ROW), and counts of it, in `parts`."""
    dumps = Order.read(order).dumps
    clusters: dict[int, _Cluster] = defaultdict(_Cluster)
    for records, sources in read_blocks(members, partition, MEMBER):
        names = clean.subsets_of(records["node"] >> 32) * len(dumps) + records["order"] % len(dumps)
        columns = (records[name].tolist() for name in ("component", "order", "node"))
        for component, *member in zip(*columns, names.tolist(), sources, strict=True):
            clusters[component].add(*member, sources_kept)

    def name_of(number: int) -> str:
        subset, dump = clean.subsets[number // len(dumps)].name, dumps[number % len(dumps)]
        return f"{subset}/{dump}" if dump else subset

    counts: Removed = Counter()
    with rows.writer(partition) as out:
        for records, _ in read_blocks(members, partition, MEMBER):
            found = [clusters[component] for component in records["component"].tolist()]
            survivors, nodes = np.array([one.best[1] for one in found], np.uint64), records["node"]
            made = np.zeros(len(found), ROW)
            made["index"], made["survivor"] = nodes.astype(np.uint32), survivors
            made["reason"] = np.where(nodes == survivors, 0, np.where(records["exact"], EXACT, NEAR))
            stays = made["reason"] == 0
            pairs = zip(found, stays.tolist(), strict=True)
            details = [one.details(name_of, sources_kept) if here else b"" for one, here in pairs]
            add_blocks(out, nodes >> 32, made, details)
            own, other = (clean.subsets_of(ends[~stays] >> 32).tolist() for ends in (nodes, survivors))
            counts.update(zip(own, other, made["reason"][~stays].tolist(), strict=True))
    write_part(parts, partition, counts, Counter(one.copies for one in clusters.values()))


# --- What is counted of them ------------------------------------------------------------------------------------------

Removed = Counter[tuple[int, int, int]]  # documents by their subset, their survivor's, and the reason
Sizes = Counter[int]  # clusters by the number of their members


def write_part(folder: Path, number: int, removed: Removed, sizes: Sizes) -> None:
    """Of one partition, or of FAN of them."""
    part = {"removed": [[*key, count] for key, count in sorted(removed.items())], "sizes": sorted(sizes.items())}
    write_json(folder / f"{number:05d}.json", part)


def read_parts(folder: Path, numbers: range) -> tuple[Removed, Sizes]:
    """The sum of some of those."""
    removed: Removed = Counter()
    sizes: Sizes = Counter()
    for number in numbers:
        part = read_part(folder / f"{number:05d}.json")
        removed.update({tuple(key): count for *key, count in part["removed"]})
        sizes.update(dict(part["sizes"]))
    return removed, sizes


def join_parts(group: int, *, parts: Path, partitions: int, joined: Path) -> None:
    """A task: FAN parts as one."""
    numbers = range(group * FAN, min((group + 1) * FAN, partitions))
    write_part(joined, group, *read_parts(parts, numbers))


def summarize(_: int, *, clean: Clean, joined: Path, groups: int, path: Path) -> None:
    """The only task: all counts, as {"removed": {subset: {"exact": n, "near": n}}, "pairs":
    {"removed's -> survivor's": n}, "cluster_sizes": {size: clusters}}.
    """
    counts, sizes = read_parts(joined, range(groups))
    removed = {subset.name: {"exact": 0, "near": 0} for subset in clean.subsets}
    pairs: Counter[str] = Counter()
    for (own, other, reason), count in sorted(counts.items()):
        removed[clean.subsets[own].name][REASONS[reason]] += count
        pairs[f"{clean.subsets[own].name} -> {clean.subsets[other].name}"] += count
    histogram = {str(size): count for size, count in sorted(sizes.items())}
    write_json(path, {"removed": removed, "pairs": dict(pairs), "cluster_sizes": histogram})
