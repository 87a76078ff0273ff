"""Lines, or paragraphs, that many documents of a corpus share: they stay in the first few of those, and go from others.

That is what CCNet does with paragraphs of a shard (Wenzek et al. 2019), and Llama 3 with lines that stand more than six
times among 30 million documents (2024, section 3.1.1); here it is over all subsets that ask for it (`drop_shared`),
among the documents that no other duplicates, in the order in which of two of those one stays. Pieces are compared by
128 bits of a hash of what they say (lines.said); short ones and those without a letter or digit are not. A document of
which too little is left goes, too, even where it was one of the first few. Without what they share, documents can be
the same that were not: of those one stays if the recipe says so of exact duplicates (`dedup.exact`).

  shared         the pieces of each document that stays, once each   one task for each of the clean documents
  shared-find    those behind the first `most` documents             one for each part
  shared-texts   what is left of each document, by its hash          one task for each of the clean documents
  shared-equal   those behind the first of the same                  one for each part
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.prepare.dedup.index import Clean, Order, index_of, nodes_of
from k2jax.prepare.dedup.streams import beyond, partition_of
from k2jax.prepare.dedup.survivors import surviving_ids, survivors
from k2jax.prepare.engine.engine import Stage
from k2jax.prepare.rules import lines
from k2jax.prepare.shuffle import Shuffle, Writer, partitions_for
from k2jax.prepare.sources.read import size_problem
from k2jax.prepare.tally import Tally

PIECE = np.dtype([("high", "<u8"), ("low", "<u8"), ("node", "<u8"), ("order", "<u4")])  # in the partition of `high`
GONE = np.dtype([("index", "<u4"), ("high", "<u8")])  # of a document's pieces, in the partition of its task
HELD = 1 << 16  # pieces that a task holds before it deals them out


class Shared(NamedTuple):
    """What tasks are told: `folder` is that of the stages.

    Of each subset that asks, `by` is what its pieces are, `shortest` the bytes of a document that is not left out;
    `exact` is whether of equal documents one stays, of all subsets.
    """

    folder: Path
    clean: Clean
    partitions: int
    by: dict[str, str]
    shortest: dict[str, int]
    most: int
    characters: int
    exact: bool

    @property
    def pieces(self) -> Shuffle:
        """From the clean documents to where pieces are counted; of another number of parts no file is found."""
        return Shuffle(self.folder / "shared" / f"pieces-{self.partitions}", self.clean.num_tasks, self.partitions)

    @property
    def gone(self) -> Shuffle:
        """Back to the documents."""
        return Shuffle(self.folder / "shared" / "gone", self.partitions, self.clean.num_tasks)

    @property
    def texts(self) -> Shuffle:
        """From what is left of the documents to where that is compared."""
        return Shuffle(self.folder / "shared" / f"texts-{self.partitions}", self.clean.num_tasks, self.partitions)

    @property
    def equal(self) -> Shuffle:
        """Back to the documents, again."""
        return Shuffle(self.folder / "shared" / "equal", self.partitions, self.clean.num_tasks)

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
    most, characters = config.shared.most, config.shared.characters
    return Shared(stages, clean, partitions, by, shortest, most, characters, config.dedup.exact)


def stages(shared: Shared) -> Iterator[Stage]:
    """Each may only be asked for when that before is complete; what nothing reads any more is removed."""
    yield Stage("shared", shared.clean.num_tasks, functools.partial(write_pieces, shared=shared))
    yield from shared.pieces.stages("shared")
    yield Stage("shared-find", shared.partitions, functools.partial(find, shared=shared))
    shared.pieces.remove()
    yield from shared.gone.stages("shared-find")
    if shared.exact:
        yield Stage("shared-texts", shared.clean.num_tasks, functools.partial(write_texts, shared=shared))
        yield from shared.texts.stages("shared-texts")
        yield Stage("shared-equal", shared.partitions, functools.partial(find_equal, shared=shared))
        shared.texts.remove()
        yield from shared.equal.stages("shared-equal")


def write_pieces(rank: int, *, shared: Shared) -> None:
    """A task: the pieces (PIECE) of its documents that stay."""
    by = shared.by_of(rank)
    with shared.pieces.writer(rank) as out:
        if by:
            found = (
                (index, digest)
                for index, document in survivors(shared.folder, rank, Tally())
                for digest in sorted(
                    {hash_of(piece) for piece in lines.pieces(document.text, by) if len(piece) >= shared.characters}
                )
            )
            _write(rank, shared, out, found)


def write_texts(rank: int, *, shared: Shared) -> None:
    """A task: what is left of its documents (PIECE)."""
    with shared.texts.writer(rank) as out:
        if shared.by_of(rank):
            left = Remover(shared, rank).left(survivors(shared.folder, rank, Tally()), Tally())
            ids = ((index, bytes.fromhex(document.id)) for index, document in left)
        else:  # from which nothing goes
            ids = surviving_ids(shared.folder, shared.clean, rank)
        _write(rank, shared, out, ((index, id[:16]) for index, id in ids))


def _write(rank: int, shared: Shared, out: Writer, found: Iterable[tuple[int, bytes]]) -> None:
    """Deals out records (PIECE) of documents by their index, and 128 bits."""
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

    for index, digest in found:
        digests.append(digest)
        indices.append(index)
        if len(indices) >= HELD:
            write()
    if indices:
        write()


def hash_of(piece: str) -> bytes:
    """128 bits: a text has as many lines as it has, and none of them shall go for another's sake."""
    return xxhash.xxh3_128_digest(piece.encode())


def find(partition: int, *, shared: Shared) -> None:
    """A task: the pieces that more documents have than may, in those behind (GONE)."""
    _find(partition, shared.pieces, shared.gone, shared.most)


def find_equal(partition: int, *, shared: Shared) -> None:
    """A task: the documents (GONE) of which the same is left as of one before them."""
    _find(partition, shared.texts, shared.equal, 1)


def _find(partition: int, found: Shuffle, gone: Shuffle, most: int) -> None:
    with gone.writer(partition) as out:
        for later in beyond(found, partition, PIECE, by=["order", "node"], most=most):
            records = np.empty(len(later), GONE)
            records["index"], records["high"] = later["node"].astype(np.uint32), later["high"]
            out.add_records(later["node"] >> 32, records)


class Remover:
    """Takes out of a task's documents the pieces that others have."""

    def __init__(self, shared: Shared, rank: int):
        self._by, self._characters = shared.by_of(rank), shared.characters
        self._shortest = shared.shortest.get(shared.clean.subsets[shared.clean.subsets_of(rank)].name, 0)
        gone = shared.gone.read_records(rank, GONE) if self._by else np.empty(0, GONE)
        order = np.argsort(gone["index"], kind="stable")
        self._index, self._high = gone["index"][order].astype(np.int64), gone["high"][order]

    def __call__(self, index: int, text: str) -> str:
        """The text of the document with that index, without them."""
        start, end = np.searchsorted(self._index, [index, index + 1])
        if start == end:
            return text
        gone = set(self._high[start:end].tolist())

        def is_gone(piece: str) -> bool:
            return len(piece) >= self._characters and int.from_bytes(hash_of(piece)[:8], "big") in gone

        return lines.without(text, self._by, is_gone)

    def left(self, found: Iterable[tuple[int, Document]], tally: Tally) -> Iterator[tuple[int, Document]]:
        """Documents by their index, and what is left of them; those of which that is too little go, and are counted."""
        for index, document in found:
            if not self._by:
                yield index, document
                continue
            tally.saw("shared", len(document.text.encode()))
            text = self(index, document.text)
            data = text.encode()
            tally.saw("size", len(data))
            says_nothing = text != document.text and not any(map(str.isalnum, text))
            if reason := "too short" if says_nothing else size_problem(len(data), self._shortest, 0):
                tally.removed("size", reason, len(data))
                continue
            if text != document.text:
                document.text, document.id = text, hashlib.sha256(data).hexdigest()
            yield index, document


def without_shared(
    rank: int, found: Iterable[tuple[int, Document]], shared: Shared, tally: Tally
) -> Iterator[tuple[int, Document]]:
    """What is left of a task's documents, by their index; of equal ones the first where the recipe says so."""
    left = Remover(shared, rank).left(found, tally)
    if not shared.exact:
        yield from left
        return
    later = set(shared.equal.read_records(rank, GONE)["index"].tolist())
    for index, document in left:
        size = len(document.text.encode())
        tally.saw("equal", size)
        if index in later:
            tally.removed("equal", "exact", size)
            continue
        yield index, document
