"""Files and 1-D arrays below a local path or a gs:// or s3:// URL: what store.py is made of.

Arrays are sharded Zarr v3 with a crc32c over every chunk, through TensorStore; other files go through
pyarrow. Both take the same paths, and find their credentials by themselves.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import tensorstore as ts

from k2jax import bucket
from k2jax.errors import ConfigError, StorageError

BUCKETS = ("gs://", "s3://")
LAST_SLICE = 1 << 12  # elements that a bisection reads at once at its end


def normal_path(path: str | os.PathLike) -> str:
    """A URL as it is, a local path absolute; no slash at the end."""
    path = os.fspath(path)
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def file_system(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URL, and the path there; ConfigError for an unknown kind of URL."""
    if "://" not in path:  # from_uri would have its own idea of a name that holds % or #
        return pafs.LocalFileSystem(), path
    if path.startswith(BUCKETS):
        return bucket.arrow_files(bucket.BucketPath(path))
    try:
        return pafs.FileSystem.from_uri(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"store path {path}: expected a local path, or a gs:// or s3:// URL") from error


def listing(fs: pafs.FileSystem, root: str, recursive: bool) -> list[pafs.FileInfo]:
    """What lies in a directory; [] if there is none."""
    return fs.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=recursive))


def names_in(path: str) -> set[str]:
    """Of files and folders at a path or URL; empty if there is none."""
    if path.startswith(BUCKETS):  # pyarrow sees no folder of a bucket but those that it made
        return {found.name for found in bucket.BucketPath(path).iterdir()}
    return {info.base_name for info in listing(*file_system(path), recursive=False)}


def delete(path: str) -> None:
    """Deletes the file or folder at a path or URL."""
    if path.startswith(BUCKETS):
        bucket.BucketPath(path).unlink()
        bucket.BucketPath(path).delete_tree()
        return
    fs, place = file_system(path)
    (fs.delete_file if fs.get_file_info(place).is_file else fs.delete_dir)(place)


def file_sizes(fs: pafs.FileSystem, root: str) -> dict[str, int]:
    """Bytes of every file below `root`, by path from there."""
    files = [info for info in listing(fs, root, recursive=True) if info.is_file]
    return {info.path[len(root) :].lstrip("/"): info.size for info in files}


def sha256_of_files(fs: pafs.FileSystem, root: str, names: list[str]) -> dict[str, str]:
    """SHA-256 (hex) of files below `root`, several read at a time."""

    def digest(name: str) -> str:
        with fs.open_input_file(f"{root}/{name}") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def find_damage(
    fs: pafs.FileSystem, root: str, files: dict[str, dict[str, Any]], *, sha256: bool
) -> str | None:
    """What is wrong with files, {path below root: {"bytes": n, "sha256": hex}}; None if nothing is.

    Sizes alone are compared, unless `sha256`, which reads all of every file.
    """
    sizes = file_sizes(fs, root)
    for name, file in files.items():
        if sizes.get(name) != file["bytes"]:
            found = f"{sizes[name]} bytes" if name in sizes else "no file"
            return f"{name}: {found}, expected {file['bytes']} bytes"
    digests = sha256_of_files(fs, root, list(files)) if sha256 else {}
    for name, digest in digests.items():
        expected = files[name]["sha256"]
        if digest != expected:
            return f"{name}: SHA-256 {digest[:12]}, expected {expected[:12]}"
    return None


def write_json(fs: pafs.FileSystem, path: str, content: dict[str, Any]) -> None:
    """Writes `content` for people to read, too.

    Not by files.py: an object store has no renaming and needs none, a file is there once it is complete. On a disk half
    of a store.json does not have the digest that it records, and makes the store an unfinished one.
    """
    with fs.open_output_stream(path, compression=None) as file:
        file.write(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Makes what pyarrow and TensorStore raise (OSError, ValueError) one line of StorageError."""
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore appends whole specs in brackets: [tensorstore_spec='...'] [source locations='...'].
        reason = " ".join(re.split(r" \[[\w ]+='", str(error))[0].split())
        raise StorageError(f"{what}: {reason}") from error


def kvstore(path: str) -> str | dict[str, Any]:
    """TensorStore's name for a folder; as a URL a path would lose what stands behind a #, ? or %."""
    if path.startswith(BUCKETS):
        return bucket.spec(bucket.BucketPath(path), folder=True)
    return f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}


def array_spec(path: str, dtype: str, size: int, shard: int, chunk: int) -> dict[str, Any]:
    """TensorStore's spec of an array of `size` elements in files of `shard`, in chunks of `chunk`.

    Opening with it fails if zarr.json says otherwise.
    """
    endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [chunk],
        "codecs": [endian, {"name": "crc32c"}],
        "index_codecs": [endian, {"name": "crc32c"}],
    }
    return {
        "driver": "zarr3",
        "kvstore": kvstore(path),
        "metadata": {
            "shape": [size],
            "data_type": dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }


def open_array(spec: dict[str, Any], cache_bytes: int = 0) -> ts.TensorStore:
    """Opens an array for reading, keeping up to `cache_bytes` of chunks in memory."""
    # By default a missing shard reads as zeros.
    spec = {**spec, "fill_missing_data_reads": False, "recheck_cached_data": "open"}
    return ts.open(spec, context=bucket.context(cache_bytes), read=True).result()


class ArrayWriter:
    """Appends to a new array, a shard at a time; `size` counts what was appended.

    Or writes a part of one that `create_array` made of `whole` elements: those from `size`, a multiple of `shard`, on.
    """

    def __init__(self, path: str, dtype: str, shard: int, chunk: int, *, size: int = 0, whole: int | None = None):
        self.shard, self.chunk, self.size, self._whole = shard, chunk, size, whole
        self._buffer = np.empty(shard, dtype)
        self._array = _open_to_write(path, dtype, whole or 0, shard, chunk, create=whole is None)

    def append(self, values: np.ndarray) -> None:
        """Appends integers (n,), which must fit the array's dtype."""
        while len(values):
            filled = self.size % self.shard
            part = values[: self.shard - filled]
            self._buffer[filled : filled + len(part)] = part
            self.size += len(part)
            values = values[len(part) :]
            if self.size % self.shard == 0:
                self._write(self.shard)

    def finish(self) -> ts.TensorStore:
        """Writes what is left in memory; returns the array as it stands on the disk."""
        if self.size % self.shard:
            self._write(self.size % self.shard)
        return self._array

    def _write(self, count: int) -> None:
        if self._whole is None:
            self._array = self._array.resize(exclusive_max=[self.size]).result()
        self._array[self.size - count : self.size].write(self._buffer[:count]).result()


def create_array(path: str, dtype: str, shard: int, chunk: int, whole: int) -> None:
    """A new array of `whole` elements, to be written in parts."""
    _open_to_write(path, dtype, whole, shard, chunk, create=True)


def _open_to_write(path: str, dtype: str, size: int, shard: int, chunk: int, *, create: bool) -> ts.TensorStore:
    # By default a chunk of nothing but zeros is not stored, and looks like one that was lost.
    spec = {**array_spec(path, dtype, size, shard, chunk), "store_data_equal_to_fill_value": True}
    return ts.open(spec, create=create, open=not create, context=bucket.context(0)).result()


def searchsorted(array: ts.TensorStore, value: int) -> int:
    """np.searchsorted(array, value), reading only what a bisection meets."""
    low, high = 0, array.shape[0]
    while high - low > LAST_SLICE:
        middle = (low + high) // 2
        if array[middle].read().result() < value:
            low = middle + 1
        else:
            high = middle
    return low + int(np.searchsorted(array[low:high].read().result(), value))
