"""Deduplication: the stages, from the clean documents to what becomes of each that has a duplicate.

  dumps       names of all dumps, which order the documents            one task for FAN of the clean documents
  ids         hashes of the texts                                      one for TOGETHER of the clean documents
  exact       copies of the same text: removed, and edges              one for each part
  signatures  MinHash bands of the documents that exact left           one for each of the clean documents
  near        edges between those that share a band                    one for each part
  clusters    what edges connect: some rounds of two stages each       one for each part
  labels      of each document with a duplicate its cluster            one for each part
  members     what the cluster has to know of it                       one for TOGETHER of the clean documents
  survivors   which document of a cluster stays                        one for each part
  summary     how many: of FAN parts, then of all                      one task
  duplicates  <rank>.parquet of the documents of each task (ROWS)      one for TOGETHER of the clean documents

How many parts there are follows from the number of documents. Between stages that write for all parts or tasks and
those that read are those of shuffle.py, where there are many. A document that is removed as an exact copy is `exact`
also where its survivor is then removed as a near duplicate: both then name the last survivor.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from k2jax.errors import StorageError
from k2jax.files import whole_file
from k2jax.prepare.dedup import components, exact, index, members, near
from k2jax.prepare.dedup.index import TOGETHER, Clean, Order
from k2jax.prepare.dedup.members import REASONS, REMEDY, ROW
from k2jax.prepare.dedup.minhash import MinHash
from k2jax.prepare.dedup.streams import read_blocks
from k2jax.prepare.engine.engine import Stage
from k2jax.prepare.shuffle import FAN, Shuffle, partitions_for

ROWS = pa.schema(
    [
        ("index", pa.uint32()),  # of the document in its task
        ("reason", pa.string()),  # "exact" or "near"; null if it stays
        ("survivor_rank", pa.uint32()),
        ("survivor_index", pa.uint32()),
        ("copies", pa.int64()),  # on survivors: documents of the cluster, itself included; else 1
        ("by", pa.list_(pa.struct([("name", pa.string()), ("count", pa.int64())]))),  # of those: "subset[/dump]"
        ("sources", pa.list_(pa.string())),  # names of the removed ones
    ]
)
RANGE = 1 << 20  # documents of a task whose rows are held; there are seldom more
CLUSTER_BYTES = 256  # of a member with its source, or of what is held of its cluster in Python's objects


class _Files(NamedTuple):
    """What the stages say to each other."""

    out: Path
    clean: Clean
    documents: int
    is_exact: bool
    is_near: bool
    minhash: MinHash

    @property
    def tasks(self) -> int:
        """Of the clean documents."""
        return self.clean.num_tasks

    @property
    def groups(self) -> int:
        """Of those, where they are looked after together."""
        return self.clean.groups(TOGETHER)

    def _shuffle(self, name: str, writers: int, partitions: int) -> Shuffle:
        # Should the number change between two stages, no file is found, where some would be taken for all.
        return Shuffle(self.out / f"{name}-{partitions}", writers, partitions)

    @property
    def ids(self) -> Shuffle:
        return self._shuffle("ids", self.groups, partitions_for(self.documents * exact.ID.itemsize))

    @property
    def removed(self) -> Shuffle | None:
        return self._shuffle("removed", self.ids.partitions, self.tasks) if self.is_exact else None

    @property
    def bands(self) -> Shuffle:
        size = self.documents * self.minhash.bands * near.BAND.itemsize
        # Likewise of other parameters.
        return self._shuffle(f"bands-{'-'.join(map(str, self.minhash))}", self.tasks, partitions_for(size))

    @property
    def edges(self) -> Shuffle:
        writers = self.ids.partitions * self.is_exact + self.bands.partitions * self.is_near
        return self._shuffle("edges", writers, partitions_for(self.documents * 2 * components.EDGE.itemsize))

    @property
    def labels(self) -> Shuffle:
        return self._shuffle("labels", self.edges.partitions, self.tasks)

    @property
    def members(self) -> Shuffle:
        return self._shuffle("members", self.groups, partitions_for(self.documents * CLUSTER_BYTES))

    @property
    def rows(self) -> Shuffle:
        return self._shuffle("rows", self.members.partitions, self.tasks)


def stages(config: ConfigDict, clean: Path, out: Path) -> Iterator[Stage]:
    """The stages that read the clean documents of `clean` and write <rank>.parquet and summary.json to `out`.

    Each may only be asked for when that before is complete: what follows depends on its files, and what nothing
    reads any more is removed. Files between them are in folders of `out`. A stage raises StorageError if a file that
    it needs is missing or damaged.
    """
    documents, dedup, order = index.clean_documents(config, clean), config.dedup, out / "order.json"
    yield _stage("dumps", documents.groups(FAN), index.find_dumps, clean=documents, folder=out / "dumps")
    yield _stage("dumps-join", 1, index.join_dumps, clean=documents, folder=out / "dumps", path=order)
    total = Order.read(order).documents
    files = _Files(out, documents, total, dedup.exact, dedup.near, minhash_of(config))
    if dedup.exact:
        yield from _exact(files, order)
    if dedup.near:
        exempt = frozenset(name for name, chosen in config.subsets.items() if chosen.conversations)
        yield from _near(files, exempt)
    yield from _clusters(files)
    ends = {"clean": documents, "order": order, "members": files.members}
    yield _stage("members", files.groups, members.write_members, **ends, labels=files.labels, removed=files.removed)
    for done in (files.removed, files.labels):
        if done:
            done.remove()
    yield from files.members.stages("members")
    parts, partitions = out / "summaries", files.members.partitions
    given = {"rows": files.rows, "parts": parts, "sources_kept": dedup.sources_kept}
    yield _stage("survivors", partitions, members.find_survivors, **ends, **given)
    files.members.remove()
    yield from files.rows.stages("survivors")
    groups, joined = -(-partitions // FAN), out / "summaries-joined"
    yield _stage("summaries", groups, members.join_parts, parts=parts, partitions=partitions, joined=joined)
    given = {"joined": joined, "groups": groups, "path": out / "summary.json"}
    yield _stage("summary", 1, members.summarize, clean=documents, **given)
    yield _stage("duplicates", files.groups, write_duplicates, clean=documents, rows=files.rows, folder=out)
    files.rows.remove()


def _exact(files: _Files, order: Path) -> Iterator[Stage]:
    yield _stage("ids", files.groups, exact.write_ids, clean=files.clean, order=order, ids=files.ids)
    yield from files.ids.stages("ids")
    given = {"ids": files.ids, "removed": files.removed, "edges": files.edges}
    yield _stage("exact", files.ids.partitions, exact.find_exact, **given)
    files.ids.remove()
    yield from files.removed.stages("exact")


def _near(files: _Files, exempt: frozenset[str]) -> Iterator[Stage]:
    given = {"removed": files.removed, "config": files.minhash, "exempt": exempt}
    yield _stage("signatures", files.tasks, near.sign, clean=files.clean, bands=files.bands, **given)
    yield from files.bands.stages("signatures")
    first = files.ids.partitions * files.is_exact
    yield _stage(
        "near", files.bands.partitions, near.find_near, bands=files.bands, edges=files.edges, first_writer=first
    )
    files.bands.remove()


def _clusters(files: _Files) -> Iterator[Stage]:
    edges, folder = files.edges, files.out / "rounds"
    yield from edges.stages("edges")
    stars = yield from components.rounds(edges, folder)
    yield _stage("labels", edges.partitions, components.write_labels, stars=stars, labels=files.labels)
    for done in (edges, stars):
        done.remove()
    yield from files.labels.stages("labels")


def _stage(name: str, tasks: int, function: Callable, **given: Any) -> Stage:
    return Stage(name, tasks, functools.partial(function, **given))


def minhash_of(config: ConfigDict) -> MinHash:
    """The parameters of a recipe."""
    return MinHash(**{key: config.dedup[key] for key in MinHash._fields})


def write_duplicates(group: int, *, clean: Clean, rows: Shuffle, folder: Path) -> None:
    """A task: <rank>.parquet (ROWS) of the documents that have a duplicate, by their index, of TOGETHER tasks."""
    for rank in clean.ranks(group, TOGETHER):
        documents, path = index.num_documents(clean, rank), folder / f"{rank:05d}.parquet"
        with whole_file(path) as file, pq.ParquetWriter(file, ROWS, compression="zstd") as out:
            for start in range(0, documents, RANGE):
                if len(table := _rows(rank, range(start, start + RANGE), rows)):
                    out.write_table(table)


def _rows(rank: int, indices: range, rows: Shuffle) -> pa.Table:
    """Those of a range of a task's documents."""
    parts, details = [np.empty(0, ROW)], []
    for records, texts in read_blocks(rows, rank, ROW):
        ours = (records["index"] >= indices.start) & (records["index"] < indices.stop)
        parts.append(records[ours])
        details += [texts[i] for i in np.flatnonzero(ours).tolist()]
    found = np.concatenate(parts)
    order = np.argsort(found["index"])
    found = found[order]
    if np.any(found["index"][1:] == found["index"][:-1]):
        raise StorageError(f"{rows.folder}: a document of task {rank} is there twice: {REMEDY}")
    none: dict[str, Any] = {"copies": 1, "by": [], "sources": []}
    known = [json.loads(details[i]) if details[i] else none for i in order.tolist()]
    columns = {
        "index": found["index"],
        "reason": [REASONS[reason] for reason in found["reason"].tolist()],
        "survivor_rank": (found["survivor"] >> 32).astype(np.uint32),
        "survivor_index": found["survivor"].astype(np.uint32),
        "copies": [one["copies"] for one in known],
        "by": [[{"name": name, "count": count} for name, count in one["by"]] for one in known],
        "sources": [one["sources"] for one in known],
    }
    return pa.table(columns, schema=ROWS)
