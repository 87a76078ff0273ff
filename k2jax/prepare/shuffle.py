"""What many tasks wrote, gathered by key: a shuffle through files, bounded at any number of tasks and partitions.

Each of `writers` tasks deals bytes out to `partitions`; each partition is then read as a whole, in the order of the
writers and, of each, in the order in which it was written. Between the two are stages where numbers ask for them:

  (writer)     one file a task: whatever it held whenever that was RUN_BYTES, by partition
  NAME-group   FAN files to one: where there are more writers
  NAME-split   a range of partitions out of all files to one file: where there are more than SLOTS partitions, or each
               read from all files would take more than OPENS a task

What a stage has read is removed, so that no more than two copies lie there at a time.

So no task has more than FAN files open, none opens more than FAN or one for each FAN writers, and what all of them open
grows as their number. A file is zstd frames with checksums, each of one slot (a partition, or a
range of them) and one run; the index of them (INDEX) is at its end.
"""

import contextlib
import functools
import itertools
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
import zstandard

from k2jax.errors import StorageError
from k2jax.files import whole_file
from k2jax.prepare.engine.engine import Stage
from k2jax.prepare.made import remedy

FAN = 512  # files that one task has open: the usual limit is 1,024
SLOTS = 4096  # partitions that a file has slots for; more are split in two steps
OPENS = 64  # files for each that writes or reads, on average
RUN_BYTES = 1 << 28  # that a task holds before it writes them
PARTITION_BYTES = 1 << 28  # of what is held as a whole when it is read; sorting takes several times as much
LEVEL = 1  # of zstd: hashes do not get smaller, and text is compressed by its writer's runs
BUFFER = 1 << 18  # bytes of each open file

INDEX = np.dtype([("slot", "<u4"), ("begin", "<u8"), ("end", "<u8")])
_PART = struct.Struct("<IQ")  # in a frame: partition, bytes
_END = struct.Struct("<Q8s")  # of a file: bytes of the compressed index, MAGIC
MAGIC = b"k2shuf01"
GROUP, SPLIT, ENDING = "group", "split", ".runs"


def partitions_for(num_bytes: int) -> int:
    """How many partitions so much gives, so that each can be held."""
    return max(1, -(-num_bytes // PARTITION_BYTES))


class Shuffle(NamedTuple):
    """Where it lies, and between how many; tasks on other machines are told no more than this."""

    folder: Path
    writers: int
    partitions: int

    def stages(self, name: str) -> Iterator[Stage]:
        """What has to run between the tasks that write and those that read, each to be asked for when that before is
        complete: what it read is then removed."""
        if self._groups < self.writers:
            yield Stage(f"{name}-group", self._groups, functools.partial(_group, shuffle=self))
            _remove(self.folder)
        if self._range > 1:
            yield Stage(f"{name}-split", self._slots, functools.partial(_split, shuffle=self))
            _remove(self.folder)
            _remove(self.folder / GROUP)

    def remove(self) -> None:
        """Removes its files: for when all who read them are complete."""
        for folder in (self.folder, self.folder / GROUP, self.folder / SPLIT):
            _remove(folder)

    @contextlib.contextmanager
    def writer(self, rank: int) -> Iterator["Writer"]:
        """Of one task; what it wrote is there, whole, once it is closed without an exception."""
        with _writing(self._written(rank), lambda partition: partition // self._range) as out:
            yield out

    def read(self, partition: int) -> Iterator[bytes]:
        """What was written to a partition, in pieces of at most a run; StorageError if a file is missing or damaged."""
        paths = [self._split_of(partition // self._range)] if self._range > 1 else self._files()
        slot = partition % self._range if self._range > 1 else partition
        for path in paths:
            with _Reader(path) as file:
                for found, data in file.parts(slot):
                    if found != partition:
                        raise StorageError(_damaged(path, f"partition {found} stands where {partition} should"))
                    yield data

    def read_records(self, partition: int, dtype: np.dtype) -> np.ndarray:
        """What was written to a partition, as records; copied, so that it can be sorted in its place."""
        parts = [np.frombuffer(data, dtype) for data in self.read(partition)]
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    @property
    def _groups(self) -> int:
        return -(-self.writers // FAN) if self.writers > FAN else self.writers

    @property
    def _range(self) -> int:
        """Partitions that share a slot of the files of writers and groups."""
        opens = OPENS * (self.writers + self.partitions)
        if self.partitions <= SLOTS and self.partitions * self._groups <= opens:
            return 1
        return -(-self.partitions // min(FAN, max(1, opens // self._groups)))

    @property
    def _slots(self) -> int:
        return -(-self.partitions // self._range)

    def _written(self, rank: int) -> Path:
        return self.folder / f"{rank:05d}{ENDING}"

    def _split_of(self, slot: int) -> Path:
        return self.folder / SPLIT / f"{slot:05d}{ENDING}"

    def _files(self) -> list[Path]:
        """What writers, or else groups, wrote."""
        if self._groups == self.writers:
            return [self._written(rank) for rank in range(self.writers)]
        return [self.folder / GROUP / f"{group:05d}{ENDING}" for group in range(self._groups)]


class Writer:
    """Takes bytes for partitions."""

    def __init__(self, file: IO[bytes], slot_of: Callable[[int], int]):
        self._file, self._slot_of = file, slot_of
        self._parts: dict[int, list[bytes]] = defaultdict(list)
        self._size = 0
        self._index: list[tuple[int, int, int]] = []

    def add(self, partition: int, data: bytes) -> None:
        """Appends to a partition."""
        self._parts[partition].append(data)
        self._size += len(data) + 100  # of Python's own
        if self._size > RUN_BYTES:
            self._write_run()

    def add_records(self, partition_of: np.ndarray, records: np.ndarray) -> None:
        """Appends each record (n,) to its partition (n,), in their order."""
        order = np.argsort(partition_of, kind="stable")
        partition_of, records = partition_of[order], records[order]
        starts = np.flatnonzero(np.r_[True, partition_of[1:] != partition_of[:-1]]) if len(records) else []
        for start, end in itertools.pairwise([*starts, len(records)]):
            self.add(int(partition_of[start]), records[start:end].tobytes())

    def _write_run(self) -> None:
        for slot, partitions in itertools.groupby(sorted(self._parts), self._slot_of):
            parts = []
            for partition in partitions:
                data = self._parts.pop(partition)
                parts += [_PART.pack(partition, sum(map(len, data))), *data]
            begin = self._file.tell()
            self._file.write(_compress(b"".join(parts)))
            self._index.append((slot, begin, self._file.tell()))
        self._size = 0

    def _close(self) -> None:
        self._write_run()
        _write_index(self._file, self._index)


@contextlib.contextmanager
def _writing(path: Path, slot_of: Callable[[int], int]) -> Iterator[Writer]:
    with whole_file(path) as file:
        out = Writer(file, slot_of)
        yield out
        out._close()


def _compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(LEVEL, write_checksum=True).compress(data)


def _write_index(file: IO[bytes], index: list[tuple[int, int, int]]) -> None:
    data = _compress(np.array(index, INDEX).tobytes())
    file.write(data + _END.pack(len(data), MAGIC))


class _Reader:
    """A file that was written; a context manager."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> Self:
        try:
            self._file = open(self._path, "rb", buffering=BUFFER)  # closed in __exit__
            size = self._file.seek(0, 2)
            self._file.seek(max(0, size - _END.size))
            length, magic = _END.unpack(self._file.read(_END.size))
            if magic != MAGIC or length + _END.size > size:
                raise ValueError("its end is not one of ours")
            [index] = self._contents(size - _END.size - length, size - _END.size)
            self.index = np.frombuffer(index, INDEX)
        except (OSError, ValueError, struct.error, zstandard.ZstdError) as error:
            raise StorageError(_damaged(self._path, error)) from error
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def parts(self, slot: int) -> Iterator[tuple[int, bytes]]:
        """(partition, bytes) of a slot."""
        try:
            for begin, end in self.places(slot):
                for content in self._contents(begin, end):
                    data, at = memoryview(content), 0
                    while at < len(data):
                        partition, size = _PART.unpack_from(data, at)
                        at += _PART.size
                        yield partition, bytes(data[at : at + size])
                        at += size
        except (zstandard.ZstdError, ValueError, struct.error) as error:
            raise StorageError(_damaged(self._path, error)) from error

    def copy(self, slot: int, out: IO[bytes]) -> None:
        """Writes the frames of a slot as they are."""
        for begin, end in self.places(slot):
            self._file.seek(begin)
            while begin < end:
                data = self._file.read(min(end - begin, BUFFER))
                if not data:
                    raise StorageError(_damaged(self._path, "it is cut off"))
                out.write(data)
                begin += len(data)

    def places(self, slot: int) -> list[tuple[int, int]]:
        """Where the frames of a slot begin and end."""
        return self.index[self.index["slot"] == slot][["begin", "end"]].tolist()

    def _contents(self, begin: int, end: int) -> Iterator[bytes]:
        """What the frames that stand there hold, one after the other."""
        self._file.seek(begin)
        left, data = end - begin, b""
        while left or data:
            frame, parts = zstandard.ZstdDecompressor().decompressobj(), []
            while not frame.eof:
                if not data:
                    data = self._file.read(min(left, BUFFER))
                    left -= len(data)
                    if not data:
                        raise ValueError("a frame is cut off")
                parts.append(frame.decompress(data))
                data = frame.unused_data
            yield b"".join(parts)


def _remove(folder: Path) -> None:
    for path in folder.glob(f"*{ENDING}"):
        path.unlink()


def _damaged(path: Path, why: object) -> str:
    return f"{path} cannot be read ({why}): {remedy(path)}"


def _group(group: int, *, shuffle: Shuffle) -> None:
    """A task: the files of FAN writers as one, slot by slot; holds an index of each and one frame."""
    ranks = range(group * FAN, min((group + 1) * FAN, shuffle.writers))
    index: list[tuple[int, int, int]] = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_Reader(shuffle._written(rank))) for rank in ranks]
        out = stack.enter_context(whole_file(shuffle._files()[group]))
        slots = np.unique(np.concatenate([file.index["slot"] for file in files])).tolist()
        for slot in slots:
            begin = out.tell()
            for file in files:
                file.copy(slot, out)
            index.append((slot, begin, out.tell()))
        _write_index(out, index)


def _split(slot: int, *, shuffle: Shuffle) -> None:
    """A task: the partitions of one slot, each in a slot of its own."""
    with _writing(shuffle._split_of(slot), lambda partition: partition % shuffle._range) as out:
        for path in shuffle._files():
            with _Reader(path) as file:
                for partition, data in file.parts(slot):
                    out.add(partition, data)
