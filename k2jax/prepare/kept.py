"""The documents that stay, dealt into buckets by a keyed hash of their ids: the order that they have in the stores.

A task takes what one task of cleaning wrote, leaves out duplicates, and deals the others out to the buckets of their
subset (shuffle.py); `kept/<rank>.json`, written last, is what it counted.
"""

import bisect
import hashlib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from k2jax.errors import StorageError
from k2jax.files import write_json
from k2jax.prepare.documents import read_documents, to_line
from k2jax.prepare.made import remedy
from k2jax.prepare.shuffle import Shuffle
from k2jax.prepare.tally import Tally


class Dealt(NamedTuple):
    """One subset: its tasks of cleaning follow each other, and so do its buckets."""

    subset: str
    first_rank: int
    first_bucket: int
    num_buckets: int


class Kept(NamedTuple):
    """What tasks are told: `folder` is that of the stages, `subsets` are in the order of their ranks and buckets."""

    folder: Path
    num_tasks: int
    subsets: tuple[Dealt, ...]

    @property
    def num_buckets(self) -> int:
        """Of all subsets."""
        return sum(one.num_buckets for one in self.subsets)

    @property
    def shuffle(self) -> Shuffle:
        """From the tasks of cleaning to the buckets."""
        return Shuffle(self.folder / "kept", self.num_tasks, self.num_buckets)

    def of_bucket(self, bucket: int) -> Dealt:
        """Whose bucket that is."""
        return self.subsets[bisect.bisect_right(self.subsets, bucket, key=attrgetter("first_bucket")) - 1]

    def of_rank(self, rank: int) -> Dealt:
        """Whose task that is."""
        return self.subsets[bisect.bisect_right(self.subsets, rank, key=attrgetter("first_rank")) - 1]


def order_key(seed: int, id: str) -> int:
    """64 bits that order the documents of a store."""
    return int.from_bytes(hashlib.blake2b(id.encode(), key=str(seed).encode(), digest_size=8).digest(), "big")


def keep(rank: int, *, kept: Kept, seed: int) -> None:
    """A task: deals out the documents of a rank that stay."""
    tally, dealt = Tally(), kept.of_rank(rank)
    with kept.shuffle.writer(rank) as out:
        for document in _survivors(kept.folder, f"{rank:05d}", tally):
            bucket = order_key(seed, document.id) * dealt.num_buckets >> 64
            out.add(dealt.first_bucket + bucket, to_line(document))
    write_json(kept.folder / "kept" / f"{rank:05d}.json", tally.to_json())


def _survivors(out: Path, name: str, tally: Tally) -> Iterator[Document]:
    """The documents of a rank without the duplicates; those that had some know how many, and where."""
    duplicates = out / "duplicates" / f"{name}.parquet"  # there for every task: without it no document would go
    try:
        found: dict[int, dict[str, Any]] = {row.pop("index"): row for row in pq.read_table(duplicates).to_pylist()}
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{duplicates} cannot be read ({reason}): {remedy(duplicates)}") from error
    for index, document in enumerate(read_documents(out / "clean" / "documents" / f"{name}.jsonl.zst")):
        num_bytes = len(document.text.encode())
        tally.saw("duplicates", num_bytes)
        row = found.get(index)
        if row and row["reason"]:
            tally.removed("duplicates", row["reason"], num_bytes)
            continue
        if row:
            where = {entry["name"]: entry["count"] for entry in row["by"]}
            document.metadata["duplicates"] = {"copies": row["copies"], "by": where, "sources": row["sources"]}
        tally.kept(num_bytes, document.metadata.get("language", ""), document.metadata.get("licence", ""))
        yield document


def bucket_of(kept: Kept, bucket: int, seed: int) -> list[Document]:
    """The documents of a bucket in the order of their keys."""
    found = []
    for lines in kept.shuffle.read(bucket):
        for line in lines.split(b"\n")[:-1]:
            id, text, metadata = orjson.loads(line)
            found.append(Document(text=text, id=id, metadata=metadata))
    # The same text can come twice where nothing removes duplicates; the sort keeps the order of ranks for those.
    return sorted(found, key=lambda document: order_key(seed, document.id))
