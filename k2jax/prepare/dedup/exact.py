"""Which documents are the same text, by SHA-256: ids are dealt out by range, and each range is looked at alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from k2jax.prepare.dedup.components import add_edges
from k2jax.prepare.dedup.index import TOGETHER, Clean, Order, index_of, nodes_of
from k2jax.prepare.dedup.streams import partition_of, repeats
from k2jax.prepare.shuffle import Shuffle

# The first 128 bits of SHA-256: 2^64 documents would give an even chance of one collision.
ID = np.dtype([("high", "<u8"), ("low", "<u8"), ("node", "<u8"), ("order", "<u4")])
REMOVED = np.dtype("<u4")  # index of a document that is no more, in the partition of its task


def write_ids(group: int, *, clean: Clean, order: Path, ids: Shuffle) -> None:
    """A task: the ids (ID) of TOGETHER tasks of the clean documents."""
    known = Order.read(order)
    with ids.writer(group) as out:
        for task in clean.ranks(group, TOGETHER):
            start = 0
            for batch in index_of(clean, task, ["id", "dump"]):
                records = np.empty(len(batch), ID)
                records["high"], records["low"] = _halves(batch["id"])
                records["node"] = nodes_of(task, np.arange(start, start + len(batch)))
                records["order"] = known.of(clean, task, batch["dump"])
                out.add_records(partition_of(records["high"], ids.partitions), records)
                start += len(batch)


def _halves(ids: pa.FixedSizeBinaryArray) -> np.ndarray:
    """The first 128 bits of 256, as two numbers."""
    return np.frombuffer(ids.buffers()[1], ">u8").reshape(-1, 4)[ids.offset : ids.offset + len(ids), :2].T


def find_exact(partition: int, *, ids: Shuffle, removed: Shuffle, edges: Shuffle) -> None:
    """A task: of the partition's texts, which documents are removed (REMOVED), and with which they are one (EDGE)."""
    with removed.writer(partition) as gone, edges.writer(partition) as out:
        for later, first in repeats(ids, partition, ID, by=["order", "node"]):
            gone.add_records(later["node"] >> 32, later["node"].astype(REMOVED))
            add_edges(out, edges, later["node"], first["node"])
