"""Safetensors files, written as a stream, and read back piece by piece.

A file is the length of its header (8 bytes, little-endian), the header (JSON: type, shape and place of each tensor),
and the tensors' bytes. All sizes are known before the first byte, so nothing is ever held but the piece being written.
"""

import hashlib
import json
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SYNC_BYTES = 1 << 28  # written data goes to the disk this often, beside the writing, and not all at the end
READ_BYTES = 1 << 24


class Entry(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


# ---- writing ---------------------------------------------------------------------------------------------------------


def plan_shards(entries: list[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
    """{file name: its tensors}, in order, each file as full as `shard_bytes` allows; a larger tensor has its own."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.num_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_json(shards: dict[str, list[Entry]]) -> dict[str, Any]:
    """What model.safetensors.index.json says: which file has which tensor."""
    total = sum(entry.num_bytes for shard in shards.values() for entry in shard)
    return {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: file for file, shard in shards.items() for entry in shard},
    }


def header_bytes(shard: list[Entry]) -> bytes:
    """What a file begins with; padded with spaces, so that the data begins at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        begin, end = end, end + entry.num_bytes
        place = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [begin, end]}
        header[entry.name] = place
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """`write()` takes the tensors' bytes in the order of the plan, in pieces of any size; a file after the other.

    For a folder that `files.whole_folder` makes: files are sent to the disk here as they come, so that its own syncing
    finds next to nothing left.
    """

    def __init__(self, folder: Path, shards: dict[str, list[Entry]]):
        self._folder, self._shards = folder, iter(shards.items())
        self._file: BinaryIO | None = None
        self._left = self._unsynced = 0
        self._disk = ThreadPoolExecutor(1)
        self._syncs: list[Future] = []

    def write(self, data: np.ndarray) -> None:
        """Contiguous; no piece has bytes of two files."""
        if self._left == 0:
            name, shard = next(self._shards)
            self._file = (self._folder / name).open("wb")
            self._file.write(header_bytes(shard))
            self._left = sum(entry.num_bytes for entry in shard)
        self._file.write(data.reshape(-1).view(np.uint8))
        self._left -= data.nbytes
        self._unsynced += data.nbytes
        assert self._left >= 0, "a piece reaches into the next file"
        if self._left == 0:
            self._syncs.append(self._disk.submit(_sync_and_close, self._file))
        elif self._unsynced >= SYNC_BYTES:
            self._unsynced = 0
            self._syncs.append(self._disk.submit(os.fdatasync, self._file.fileno()))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """All of it is on the disk then, or an OSError is raised."""
        self._disk.shutdown(wait=True)
        if error is None:
            assert self._left == 0 and next(self._shards, None) is None, "tensors are missing"
            for sync in self._syncs:
                sync.result()
        elif self._left:
            self._file.close()


def _sync_and_close(file: BinaryIO) -> None:
    with file:
        file.flush()
        os.fdatasync(file.fileno())


# ---- reading back ----------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """{tensor: {"dtype", "shape", "data_offsets"}}, offsets from the file's beginning; ValueError when damaged."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header has {length:,} bytes, the file {size:,}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end = 0
    for name, place in header.items():
        if place["data_offsets"][0] != end:
            raise ValueError(f"tensor {name} begins at byte {place['data_offsets'][0]}, expected {end}")
        end = place["data_offsets"][1]
        place["data_offsets"] = [8 + length + offset for offset in place["data_offsets"]]
    if 8 + length + end != size:
        raise ValueError(f"its tensors end at byte {8 + length + end:,}, the file has {size:,}")
    return header


def sha256_of(path: Path, begin: int = 0, end: int | None = None) -> str:
    """SHA-256 (hex) of a file's bytes [begin, end)."""
    digest, left = hashlib.sha256(), (path.stat().st_size if end is None else end) - begin
    buffer = memoryview(bytearray(min(max(left, 1), READ_BYTES)))
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while left and (got := file.readinto(buffer[:left])):
            digest.update(buffer[:got])
            left -= got
    return digest.hexdigest()
