"""The files of a subset, listed once: kept on a disk as they come, and in memory what orders them, 60 bytes a file.

They are in the order of a hash of their names, keyed by the seed: it is the order of the text that `max_bytes` takes,
and of the tasks that read.
"""

import hashlib
import json
import math
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from k2jax.prepare.recipe import kind_of
from k2jax.prepare.sources.files import File

OPENING = 1 << 16  # bytes that could be read while a file is opened
SPLIT = ("jsonl", "parquet")  # kinds whose large files are read in parts


def in_order(files: Iterable[File], seed: int) -> list[File]:
    """Files in the order of a hash of their names, keyed by the seed."""
    key = _key(seed)
    return sorted(files, key=lambda file: _rank(file, key))


def _key(seed: int) -> bytes:
    return hashlib.sha256(str(seed).encode()).digest()


def _rank(file: File, key: bytes) -> bytes:
    return hashlib.blake2b(file.name.encode("utf-8", "surrogateescape"), key=key).digest()


class Listing:
    """Made once of `files`, as they come; then to be gone through in order, as often as is wanted.

    `num_bytes` is theirs on the storage, `versions` a digest of by what it tells that one was written again (which is
    another on another machine), `most_parts` how many parts of at most `part_bytes` they could be read in.
    """

    def __init__(self, files: Iterable[File], chosen: ConfigDict, *, seed: int, part_bytes: int):
        self._spool = tempfile.TemporaryFile(prefix="k2jax-files-")
        self.num_bytes, self.most_parts, self._digest, versions = 0, 0, 0, 0
        high, low, places, place, key = array("Q"), array("Q"), array("Q"), 0, _key(seed)
        for file in files:
            rank, name = _rank(file, key), file.name.encode("utf-8", "surrogateescape")
            high.append(int.from_bytes(rank[:8], "big"))
            low.append(int.from_bytes(rank[8:16], "big"))
            places.append(place)
            place += self._spool.write(json.dumps(file).encode() + b"\n")
            self.num_bytes += file.size
            self.most_parts += num_parts(file, chosen, part_bytes)
            self._digest += _number(file.size.to_bytes(8) + name)
            versions += _number(f"{file.version}\0".encode() + name)
        self._spool.flush()
        self.versions = _hex(versions)
        order = np.lexsort((np.frombuffer(low, np.uint64), np.frombuffer(high, np.uint64)))
        places.append(place)
        borders = np.frombuffer(places, np.uint64)
        self._spans = np.stack([borders[:-1], borders[1:]], axis=1)[order]

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[File]:
        for begin, end in self._spans:
            yield File(*json.loads(os.pread(self._spool.fileno(), int(end - begin), int(begin))))

    def first(self) -> File:
        """The file that stands first."""
        return next(iter(self))

    def num_tasks(self, chosen: ConfigDict, part_bytes: int) -> int:
        """As many tasks as take about `part_bytes` each, where the recipe leaves it open. To open a file counts."""
        wanted = min(self.num_bytes + OPENING * len(self), chosen.max_bytes or math.inf)
        return max(1, min(math.ceil(wanted / part_bytes), self.most_parts))

    def summary(self) -> dict[str, Any]:
        """The number of the files, their bytes, and a digest of their names and sizes: the sum of those of each."""
        return {"files": len(self), "bytes": self.num_bytes, "digest": _hex(self._digest)}


def _number(data: bytes) -> int:
    """Such are added up, so that the sum does not depend on the order."""
    return int.from_bytes(hashlib.sha256(data).digest())


def _hex(total: int) -> str:
    return f"{total % (1 << 256):064x}"


def num_parts(file: File, chosen: ConfigDict, part_bytes: int) -> int:
    """How many parts a file may be read in, by its name."""
    kind = kind_of(chosen.source)[0]
    plain = kind == "parquet" or not chosen.encoding and file.name.lower().endswith((".jsonl", ".ndjson", ".json"))
    return max(1, math.ceil(file.size / part_bytes)) if kind in SPLIT and plain else 1
