"""A file of a store as whoever reads it gets it: in blocks, each compared with its SHA-256 before a byte of it is used.

`documents.blocks` has them, a line of hex for each MiB of documents.parquet; store.json has that file's own digest. A
reader of one row group then reads, and verifies, some MB of what may be many GB in a bucket. Parquet's own checksums
leave out page headers, statistics and the footer, where a flipped bit gives other numbers too.
"""

import hashlib
import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow.fs as pafs

from k2jax.errors import DamagedError

BLOCK = 1 << 20
BLOCKS_KEPT = 8  # in memory


def digest_blocks(fs: pafs.FileSystem, path: str) -> bytes:
    """What `documents.blocks` holds of the file at `path`."""
    return "".join(f"{hashlib.sha256(block).hexdigest()}\n" for block in _blocks(fs, path)).encode()


def open_verified(
    fs: pafs.FileSystem, root: str, name: str, blocks_name: str, files: dict[str, dict[str, Any]]
) -> "VerifiedFile":
    """A file below `root`, whose store.json lists `files`: {path below root: {"bytes": n, "sha256": hex}}.

    Where a store is too old to have block digests, all of the file is read once here, and gives them. Raises
    DamagedError where that is not what store.json says.
    """
    path = f"{root}/{name}"
    if blocks_name in files:
        with fs.open_input_file(f"{root}/{blocks_name}") as file:
            lines = file.read()
        _check(f"{root}/{blocks_name}", hashlib.sha256(lines), files[blocks_name]["sha256"])
        digests = [bytes.fromhex(line) for line in lines.decode().split()]
    else:
        whole, digests = hashlib.sha256(), []
        for block in _blocks(fs, path):
            whole.update(block)
            digests.append(hashlib.sha256(block).digest())
        _check(path, whole, files[name]["sha256"])
    return VerifiedFile(fs.open_input_file(path), path, files[name]["bytes"], digests)


class VerifiedFile(io.RawIOBase):
    """Read-only; `read` raises DamagedError for a block that is not what was written."""

    def __init__(self, file: Any, path: str, size: int, digests: list[bytes]):
        self._file, self._path, self._size, self._digests, self._at = file, path, size, digests, 0
        self._block = lru_cache(maxsize=BLOCKS_KEPT)(self._read_block)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """As of any file."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """All of what is asked for, up to the end."""
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        first, parts = self._at // BLOCK, []
        for number in range(first, -(-stop // BLOCK)):
            begin = number * BLOCK
            parts.append(self._block(number)[max(0, self._at - begin) : stop - begin])
        self._at = max(self._at, stop)
        return b"".join(parts)

    def close(self) -> None:
        """Closes it on the storage."""
        if not self.closed:
            self._file.close()
        super().close()

    def _read_block(self, number: int) -> bytes:
        block = self._file.read_at(min(BLOCK, self._size - number * BLOCK), number * BLOCK)
        expected = self._digests[number].hex() if number < len(self._digests) else "none"
        _check(f"{self._path}, MiB {number}", hashlib.sha256(block), expected)
        return block


def _blocks(fs: pafs.FileSystem, path: str) -> Iterator[bytes]:
    with fs.open_input_stream(path, compression=None) as file:
        while block := file.read(BLOCK):
            while len(block) < BLOCK and (more := file.read(BLOCK - len(block))):
                block += more  # a stream may give less than was asked for
            yield block


def _check(what: str, digest: Any, expected: str) -> None:
    if digest.hexdigest() != expected:
        raise DamagedError(
            f"{what}: SHA-256 {digest.hexdigest()[:12]}, expected {expected[:12]}: it is damaged; restore the store "
            f"from a copy, or prepare it again"
        )
