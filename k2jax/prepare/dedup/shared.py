"""Lines, or paragraphs, that many documents of a corpus share: they stay in the first few of those, and go from others.

That is what CCNet does with paragraphs of a shard (Wenzek et al. 2019), and Llama 3 with lines that stand more than six
times among 30 million documents (2024, section 3.1.1); here it is over all subsets that ask for it (`drop_shared`),
among the documents that no other duplicates, in the order in which of two of those one stays. Pieces are compared by
128 bits of a hash of what they say (lines.said); short ones and those without a letter or digit are not.

  shared       the pieces of each document that stays, once each   one task for each of the clean documents
  shared-find  those behind the first `most` documents             one for each part
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from ml_collections import ConfigDict

from k2jax.prepare import lines
from k2jax.prepare.dedup.index import Clean, Order, index_of, nodes_of
from k2jax.prepare.dedup.streams import beyond, partition_of
from k2jax.prepare.dedup.survivors import survivors
from k2jax.prepare.engine import Stage
from k2jax.prepare.shuffle import Shuffle, Writer, partitions_for
from k2jax.prepare.tally import Tally

PIECE = np.dtype([("high", "<u8"), ("low", "<u8"), ("node", "<u8"), ("order", "<u4")])  # in the partition of `high`
GONE = np.dtype([("index", "<u4"), ("high", "<u8")])  # of a document's pieces, in the partition of its task
HELD = 1 << 16  # pieces that a task holds before it deals them out


class Shared(NamedTuple):
    """What tasks are told: `folder` is that of the stages.

    Of each subset that asks, `by` is what its pieces are, `shortest` the bytes of a document that is not left out.
    """

    folder: Path
    clean: Clean
    partitions: int
    by: dict[str, str]
    shortest: dict[str, int]
    most: int
    characters: int

    @property
    def pieces(self) -> Shuffle:
        """From the clean documents to where pieces are counted; of another number of parts no file is found."""
        return Shuffle(self.folder / "shared" / f"pieces-{self.partitions}", self.clean.num_tasks, self.partitions)

    @property
    def gone(self) -> Shuffle:
        """Back to the documents."""
        return Shuffle(self.folder / "shared" / "gone", self.partitions, self.clean.num_tasks)

    def by_of(self, rank: int) -> str:
        """What the pieces of a task's documents are; "" where none are looked at."""
        return self.by.get(self.clean.subsets[self.clean.subsets_of(rank)].name, "")


def shared_of(
    config: ConfigDict, stages: Path, clean: Clean, cleaned: dict[str, dict[str, int]]
) -> Shared | None:
    """Of a recipe (reads.SHARING), None where no subset asks for it; `cleaned` has the "bytes" of each subset."""
    by = {name: chosen.drop_shared for name, chosen in config.subsets.items() if chosen.drop_shared and name in cleaned}
    if not by:
        return None
    # So many there are at most: each is as long as that, and parted from the next.
    pieces = sum(cleaned[name]["bytes"] for name in by) // (config.shared.characters + 1)
    partitions = partitions_for(pieces * PIECE.itemsize)
    shortest = {name: config.subsets[name].min_document_bytes for name in by}
    return Shared(stages, clean, partitions, by, shortest, config.shared.most, config.shared.characters)


def stages(shared: Shared) -> Iterator[Stage]:
    """Each may only be asked for when that before is complete; what nothing reads any more is removed."""
    yield Stage("shared", shared.clean.num_tasks, functools.partial(write_pieces, shared=shared))
    yield from shared.pieces.stages("shared")
    yield Stage("shared-find", shared.partitions, functools.partial(find, shared=shared))
    shared.pieces.remove()
    yield from shared.gone.stages("shared-find")


def write_pieces(rank: int, *, shared: Shared) -> None:
    """A task: the pieces (PIECE) of its documents that stay."""
    with shared.pieces.writer(rank) as out:
        if by := shared.by_of(rank):
            _write_pieces(rank, by, shared, out)


def _write_pieces(rank: int, by: str, shared: Shared, out: Writer) -> None:
    order = Order.read(shared.folder / "duplicates" / "order.json")
    batches = [order.of(shared.clean, rank, batch["dump"]) for batch in index_of(shared.clean, rank, ["dump"])]
    orders = np.concatenate([np.empty(0, np.uint32), *batches])
    digests: list[bytes] = []
    indices: list[int] = []

    def write() -> None:
        records = np.empty(len(indices), PIECE)
        halves = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2)
        records["high"], records["low"] = halves.T
        records["node"], records["order"] = nodes_of(rank, np.array(indices, np.int64)), orders[indices]
        out.add_records(partition_of(records["high"], shared.pieces.partitions), records)
        digests.clear()
        indices.clear()

    for index, document in survivors(shared.folder, rank, Tally()):
        own = {hash_of(piece) for piece in lines.pieces(document.text, by) if len(piece) >= shared.characters}
        digests += sorted(own)
        indices += [index] * len(own)
        if len(indices) >= HELD:
            write()
    if indices:
        write()


def hash_of(piece: str) -> bytes:
    """128 bits: a text has as many lines as it has, and none of them shall go for another's sake."""
    return xxhash.xxh3_128_digest(piece.encode())


def find(partition: int, *, shared: Shared) -> None:
    """A task: the pieces that more documents have than may, in those behind (GONE)."""
    with shared.gone.writer(partition) as out:
        for later in beyond(shared.pieces, partition, PIECE, by=["order", "node"], most=shared.most):
            records = np.empty(len(later), GONE)
            records["index"], records["high"] = later["node"].astype(np.uint32), later["high"]
            out.add_records(later["node"] >> 32, records)


class Remover:
    """Takes out of a task's documents the pieces that others have."""

    def __init__(self, shared: Shared, rank: int):
        self._by, self._characters = shared.by_of(rank), shared.characters
        self._gone = shared.gone.read_records(rank, GONE) if self._by else np.empty(0, GONE)
        self._gone = self._gone[np.argsort(self._gone["index"], kind="stable")]

    def __call__(self, index: int, text: str) -> str:
        """The text of the document with that index, without them."""
        start, end = np.searchsorted(self._gone["index"], [index, index + 1])
        if start == end:
            return text
        gone = set(self._gone["high"][start:end].tolist())

        def is_gone(piece: str) -> bool:
            return len(piece) >= self._characters and int.from_bytes(hash_of(piece)[:8], "big") in gone

        return lines.without(text, self._by, is_gone)
