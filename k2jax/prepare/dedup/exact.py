"""Which documents are the same text, by SHA-256: ids are dealt out by range, and each range is looked at alone."""

from pathlib import Path

import numpy as np

from k2jax.prepare.dedup.components import add_edges
from k2jax.prepare.dedup.index import Clean, Order, index_of, nodes_of
from k2jax.prepare.dedup.streams import partition_of, repeats
from k2jax.prepare.shuffle import Shuffle

# The first 128 bits of SHA-256: 2^64 documents would give an even chance of one collision.
ID = np.dtype([("high", "<u8"), ("low", "<u8"), ("node", "<u8"), ("order", "<u4")])
REMOVED = np.dtype("<u4")  # index of a document that is no more, in the partition of its task


def write_ids(task: int, *, clean: Clean, order: Path, ids: Shuffle) -> None:
    """A task of the clean documents: their ids (ID)."""
    known, start = Order.read(order), 0
    with ids.writer(task) as out:
        for batch in index_of(clean, task, ["id", "dump"]):
            column = batch["id"]
            found = np.frombuffer(column.buffers()[1], ">u8").reshape(-1, 4)[column.offset : column.offset + len(batch)]
            records = np.empty(len(found), ID)
            records["high"], records["low"] = found[:, 0], found[:, 1]
            records["node"] = nodes_of(task, np.arange(start, start + len(found)))
            records["order"] = known.of(clean, task, batch["dump"])
            out.add_records(partition_of(records["high"], ids.partitions), records)
            start += len(found)


def find_exact(partition: int, *, ids: Shuffle, removed: Shuffle, edges: Shuffle) -> None:
    """A task: of the partition's texts, which documents are removed (REMOVED), and with which they are one (EDGE)."""
    with removed.writer(partition) as gone, edges.writer(partition) as out:
        for later, first in repeats(ids, partition, ID, by=["order", "node"]):
            gone.add_records(later["node"] >> 32, later["node"].astype(REMOVED))
            add_edges(out, edges, later["node"], first["node"])
