"""How the stages of deduplication read partitions: a few hundred MB at a time, however large one of them is.

A partition is chosen by a hash of a key, so that all have about as many keys. They need not have as many records: a
text that is there a billion times is in one of them. What is held is therefore in proportion to a partition's keys.
"""

import struct
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from k2jax.prepare.shuffle import Shuffle, Writer

CHUNK_BYTES = 1 << 27  # of records that are held at a time; sorting takes six times as much
BLOCK = 1 << 16  # records with texts, likewise
_COUNT = struct.Struct("<I")


def partition_of(hashes: np.ndarray, partitions: int) -> np.ndarray:
    """The partition of each of some evenly distributed numbers (u8), by their range."""
    return (hashes >> 32) * np.uint64(partitions) >> 32


def mixed(values: np.ndarray) -> np.ndarray:
    """Evenly distributed numbers, one for each value (u8): the finaliser of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> 27)) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> 31)


def chunks(shuffle: Shuffle, partition: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The records of a partition, CHUNK_BYTES of them at a time."""
    size = max(1, CHUNK_BYTES // dtype.itemsize)
    parts, count = [], 0
    for data in shuffle.read(partition):
        records = np.frombuffer(data, dtype)
        while count + len(records) >= size:
            yield np.concatenate([*parts, records[: size - count]])
            parts, count, records = [], 0, records[size - count :]
        parts.append(records)
        count += len(records)
    if count:
        yield np.concatenate(parts)


def repeats(shuffle: Shuffle, partition: int, dtype: np.dtype, by: list[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """(later, first): of records with the same key (`high` and `low`) each but the first by `by`, with one before it.

    Each record but the first of all is `later` once; that with which it comes may turn out to be another's `later`. Of
    each key one record is held.
    """
    held = np.empty(0, dtype)
    for chunk in chunks(shuffle, partition, dtype):
        records = np.concatenate([held, chunk]) if len(held) else chunk
        later, first = _repeated(records, by)
        yield records[later], records[first]
        held = np.delete(records, later)


def beyond(shuffle: Shuffle, partition: int, dtype: np.dtype, by: list[str], most: int) -> Iterator[np.ndarray]:
    """The records behind the first `most` by `by` of those with the same key, each once; of a key so many are held."""
    held = np.empty(0, dtype)
    for chunk in chunks(shuffle, partition, dtype):
        records = np.concatenate([held, chunk]) if len(held) else chunk
        later, first = _repeated(records, by)
        if most > 1:  # the place of each behind the first of its key
            later = later[_places(first) >= most - 1]
        yield records[later]
        held = np.delete(records, later)


def _places(first: np.ndarray) -> np.ndarray:
    """0, 1, 2 ... of each run of equal numbers."""
    starts = np.flatnonzero(np.r_[True, first[1:] != first[:-1]]) if len(first) else np.empty(0, np.int64)
    return np.arange(len(first)) - np.repeat(starts, np.diff(np.r_[starts, len(first)]))


def _repeated(records: np.ndarray, by: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Where later ones stand, key by key in their order, and the first one of each."""
    high = np.ascontiguousarray(records["high"])
    order = np.argsort(high)
    same = high[order[1:]] == high[order[:-1]]
    some = order[np.r_[same, False] | np.r_[False, same]] if len(order) else order
    columns = {name: records[name][some] for name in ("high", "low", *by)}
    order = np.lexsort([columns[name] for name in reversed(columns)])
    some, high, low = some[order], columns["high"][order], columns["low"][order]
    is_later = np.zeros(len(some), bool)
    is_later[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = np.maximum.accumulate(np.where(is_later, 0, np.arange(len(some))))
    return some[is_later], some[first[is_later]]


def add_blocks(out: Writer, partition_of: np.ndarray, records: np.ndarray, texts: list[bytes]) -> None:
    """Appends records (n,) that have a text each, to their partitions (n,); their `length` is set here."""
    records["length"] = [len(text) for text in texts]
    order = np.argsort(partition_of, kind="stable")
    partitions, starts = np.unique(partition_of[order], return_index=True)
    for partition, (start, end) in zip(partitions.tolist(), pairwise([*starts, len(order)]), strict=True):
        where = order[start:end]
        block = [_COUNT.pack(len(where)), records[where].tobytes(), *(texts[i] for i in where.tolist())]
        out.add(partition, b"".join(block))


def read_blocks(shuffle: Shuffle, partition: int, dtype: np.dtype) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    """Records with their texts, at least BLOCK at a time, but for the last."""
    parts, texts = [], []
    for data in shuffle.read(partition):
        at = 0
        while at < len(data):
            [count] = _COUNT.unpack_from(data, at)
            parts.append(np.frombuffer(data, dtype, count, at + _COUNT.size))
            at += _COUNT.size + count * dtype.itemsize
            for length in parts[-1]["length"].tolist():
                texts.append(data[at : at + length])
                at += length
            if len(texts) >= BLOCK:
                yield np.concatenate(parts), texts
                parts, texts = [], []
    if parts:
        yield np.concatenate(parts), texts
