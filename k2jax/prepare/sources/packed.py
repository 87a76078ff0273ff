"""How a file is packed, and its bytes unpacked in bounded memory: gzip, zstd, xz, bzip2.

It is seen by a file's first bytes; its name says it only where those say nothing.
"""

import bz2
import codecs
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any

import zstandard

from k2jax.errors import ConfigError
from k2jax.prepare.tally import shown_name

# Compressed bytes decoded at once. A zstd block of 4 can stand for 128 KiB, a byte of gzip for about 1,032, so at most
# 64 MiB and 17 MiB come out.
ZSTD_STEP, GZIP_STEP, XZ_STEP, BZIP2_STEP = 1 << 11, 1 << 14, 1 << 12, 1 << 10
HEAD = 512  # bytes by which it is seen how a file is packed
UNPACKING = (OSError, ValueError, zlib.error, zstandard.ZstdError, lzma.LZMAError, MemoryError)  # bz2's is an OSError
ZSTD_WINDOW = 1 << 31  # of a file made by zstd --long=31, as Pushshift's are: its reader holds as much
XZ_MEMORY = 1 << 30  # a reader of xz holds its dictionary; that of xz -9 is 64 MiB


class Damaged(Exception):
    """Bytes that are not what their packing says."""


class Unpacked(io.RawIOBase):
    """Decompresses member after member, or frame after frame, and gives all that stands before a damage.

    Python's gzip keeps back what it read last; zstandard's reader takes a truncated file for a whole one.
    """

    def __init__(self, file: IO[bytes], new_decoder: Callable[[], Any], step: int):
        self._file, self._new_decoder, self._step = file, new_decoder, step
        self._decoder, self._rest, self._ready = None, b"", memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As of any raw file; raises Damaged, or EOFError where the file ends too early."""
        while not self._ready:
            data = self._rest or self._file.read(self._step)
            if not data and self._decoder is None:
                return 0
            if not data:
                raise EOFError("it ends within compressed data")
            self._decoder = self._decoder or self._new_decoder()
            try:
                self._ready = memoryview(self._decoder.decompress(data))
            except UNPACKING as error:
                raise Damaged(str(error)) from error
            self._rest = self._decoder.unused_data if self._decoder.eof else b""
            self._decoder = None if self._decoder.eof else self._decoder
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()


# {how: (its first bytes, names that end so, what decodes it, compressed bytes at a time)}
PACKINGS: dict[str, tuple[bytes, tuple[str, ...], Callable[[], Any], int]] = {
    "gzip": (b"\x1f\x8b\x08", (".gz",), lambda: zlib.decompressobj(wbits=31), GZIP_STEP),
    "zstd": (b"\x28\xb5\x2f\xfd", (".zst", ".zstd"), _zstd, ZSTD_STEP),
    "xz": (b"\xfd7zXZ\x00", (".xz",), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY), XZ_STEP),
    "bzip2": (b"BZh", (".bz2",), bz2.BZ2Decompressor, BZIP2_STEP),
}
SKIPPABLE = b"\x2a\x4d\x18"  # of zstd's frames without data, behind a byte 0x50 to 0x5f: .warc.zst begins with one


def packing(head: bytes, name: str) -> str | None:
    """How a file is packed: by its first bytes, and by its name where they are neither that nor text."""
    for how, (first, *_) in PACKINGS.items():
        if head.startswith(first) and (how != "bzip2" or head[4:10] == b"1AY&SY"):
            return how
    if head[1:4] == SKIPPABLE and 0x50 <= head[0] <= 0x5F:
        return "zstd"
    named = next((how for how, (_, ends, *_) in PACKINGS.items() if name.lower().endswith(ends)), None)
    return named if named and not is_text(head) else None


def is_text(head: bytes) -> bool:
    """As a server has it that unpacks what is named .gz."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut at its end
    except UnicodeDecodeError:
        return False
    return bool(head) and b"\0" not in head


def no_archive(head: bytes, name: str) -> None:
    """Raises ConfigError for an archive of files, whose first bytes would be taken for data."""
    is_tar = head[257:262] == b"ustar" and b"\0" in head[:257]  # text may have the word there
    if is_tar or head.startswith(b"PK\3\4"):
        what = "tar" if is_tar else "zip"
        raise ConfigError(f"{shown_name(name)} is a {what} archive, whatever its name says: unpack it first")
