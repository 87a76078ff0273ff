"""The documents that stay, dealt into buckets by a keyed hash of their ids: the order that they have in the stores.

A task takes what one task of cleaning wrote, leaves out duplicates, and lines that too many share (dedup/shared.py),
and deals the others out to the buckets of their subset (shuffle.py); `kept/<rank>.json`, written last, is what it
counted.
"""

import bisect
import hashlib
import json
import math
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import orjson
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.files import write_json
from k2jax.prepare.dedup.shared import Shared, without_shared
from k2jax.prepare.dedup.survivors import survivors
from k2jax.prepare.documents import to_line
from k2jax.prepare.shuffle import Shuffle
from k2jax.prepare.tally import Tally

LONG = 4  # times as long as the others are documents that stay, at most, for a bucket to be what it should be


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


def deal(config: ConfigDict, stages: Path, found: dict[str, dict[str, int]]) -> Kept:
    """What stays, of the clean documents and bytes of each subset, and as many tasks of tokenizing for a subset as its
    text needs, whatever the workers.

    Text that stays is told from the documents that do; not by more than LONG, lest those that stay are the long ones.
    """
    removed = json.loads((stages / "duplicates" / "summary.json").read_bytes())["removed"]
    dealt, rank, bucket = [], 0, 0
    for name, counts in found.items():
        gone = sum(removed.get(name, {}).values()) / max(1, counts["documents"])
        num_bytes = counts["bytes"] * max(1 - gone, 1 / LONG)
        dealt.append(Dealt(name, rank, bucket, max(1, math.ceil(num_bytes / config.bucket_bytes))))
        rank, bucket = rank + config.subsets[name].tasks, bucket + dealt[-1].num_buckets
    return Kept(stages, rank, tuple(dealt))


def order_key(seed: int, id: str) -> int:
    """64 bits that order the documents of a store."""
    return int.from_bytes(hashlib.blake2b(id.encode(), key=str(seed).encode(), digest_size=8).digest(), "big")


def keep(rank: int, *, kept: Kept, seed: int, shared: Shared | None = None) -> None:
    """A task: deals out the documents of a rank that stay, without what they share with others (shared.py)."""
    tally, dealt = Tally(), kept.of_rank(rank)
    found = survivors(kept.folder, rank, tally)
    if shared:
        found = without_shared(rank, found, shared, tally)
    with kept.shuffle.writer(rank) as out:
        for _, document in found:
            get, size = document.metadata.get, len(document.text.encode())
            tally.kept(size, get("language", ""), get("licence", ""))
            tally.copies[str(get("duplicates", {}).get("copies", 1))] += 1
            bucket = order_key(seed, document.id) * dealt.num_buckets >> 64
            out.add(dealt.first_bucket + bucket, to_line(document))
    write_json(kept.folder / "kept" / f"{rank:05d}.json", tally.to_json())


def bucket_of(kept: Kept, bucket: int, seed: int) -> list[Document]:
    """The documents of a bucket in the order of their keys."""
    found = []
    for lines in kept.shuffle.read(bucket):
        for line in lines.split(b"\n")[:-1]:
            id, text, metadata = orjson.loads(line)
            found.append(Document(text=text, id=id, metadata=metadata))
    # The same text can come twice where nothing removes duplicates; the sort keeps the order of ranks for those.
    return sorted(found, key=lambda document: order_key(seed, document.id))
