"""The files of a source, local or remote: found, opened, decompressed, and read in bounded memory.

Patterns are fsspec's: `*` within a folder, `**` at any depth; local paths, gs://, s3://, hf:// and what else fsspec
knows. Names that begin with a dot are left out unless the pattern has one, and links to folders are not followed.
How a file is packed is seen by its first bytes; its name says it only where those say nothing.
"""

import bz2
import codecs
import contextlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

import fsspec
import zstandard
from fsspec.core import has_magic
from fsspec.utils import glob_translate

from k2jax.errors import ConfigError, RunError, StorageError
from k2jax.prepare import python_corpus
from k2jax.prepare.recipe import kind_of
from k2jax.prepare.stored import Stored, patiently
from k2jax.prepare.tally import shown_name
from k2jax.text import without_secret_parameters

BLOCK = 1 << 20  # bytes read at a time
# Compressed bytes decoded at once. A zstd block of 4 can stand for 128 KiB, a byte of gzip for about 1,032, so at most
# 64 MiB and 17 MiB come out.
ZSTD_STEP, GZIP_STEP, XZ_STEP, BZIP2_STEP = 1 << 11, 1 << 14, 1 << 12, 1 << 10
HEAD = 512  # bytes by which it is seen how a file is packed
PACKED = r"(\.(gz|zst|zstd|xz|bz2))?"
NAMES = {  # of a source's data, in a folder of it
    "text": r".*",
    "jsonl": rf".*\.(jsonl|ndjson){PACKED}",
    "parquet": r".*\.parquet",
    "arrow": r".*\.arrow",
    "warc": rf".*\.(warc|wet){PACKED}",
    "megatron": r".*\.bin",
    "llm360": rf".*\.jsonl{PACKED}",
}
# What stands beside data and is none: texts about it, other tools' marks and descriptions, Megatron's index. A check
# sum, a copy and a part of a file are none either, and matched by no wildcard.
BESIDE = r"(README|LICEN[CS]E|NOTICE|COPYING|CHANGELOG|CITATION)\b.*|.*\.(md|rst|idx|ya?ml|py|crc|html)"
BESIDE += r"|_(SUCCESS|metadata|common_metadata|started.*|committed.*)|(dataset_infos?|state|dataset_dict|index)\.json"
NO_DATA = r".*(\.(sha\d+|md5|sig|asc|bak|old|orig|tmp|temp|part|partial|crdownload|incomplete|aria2|lock|swp)|~)"
NO_DATA += r"|(SHA\d+|MD5)SUMS?"
# Of what storages tell of a file: Google's, S3's and Azure's, Hugging Face's, of a disk.
VERSIONS = ("crc32c", "md5Hash", "ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")
FOLDER, PATTERN, HIDDEN_PATTERN, ONE = range(4)  # what a source names; the third has a dot's name in it
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub"}  # for pip


class Damaged(Exception):
    """Bytes that are not what their packing says."""


# What reading packed data raises when the data is at fault; the storage's own errors are StorageError.
DAMAGE = (EOFError, Damaged)
UNPACKING = (OSError, ValueError, zlib.error, zstandard.ZstdError, lzma.LZMAError, MemoryError)  # bz2's is an OSError
ZSTD_WINDOW = 1 << 31  # of a file made by zstd --long=31, as Pushshift's are: its reader holds as much
XZ_MEMORY = 1 << 30  # a reader of xz holds its dictionary; that of xz -9 is 64 MiB


class File(NamedTuple):
    """A file of a source: its name below the pattern's fixed part, where it lies, its bytes on the storage.

    Or a part of one (parts.py): from `begin` to `end`, bytes of JSON lines between line ends or row groups of Parquet,
    behind `first` lines or rows, `size` of `whole` bytes. `version`, a checksum or date, tells of a rewrite.
    """

    name: str
    path: str
    size: int
    begin: int = 0
    end: int = 0  # 0: it is whole
    first: int = 0
    version: str = ""
    whole: int = 0

    @property
    def part(self) -> str:
        """Its name, and which part it is."""
        return f"{self.name}[{self.begin}:{self.end}]" if self.end else self.name


def list_files(source: str, *, follow_links: bool = True) -> list[File]:
    """The files of a source of text, sorted by name; a document of python: counts as a file.

    Raises ConfigError if none matches, one is no data of that kind by its name, one links out of the source's folder
    and `follow_links` is False, or a package is missing; StorageError if the storage cannot be listed.
    """
    found = iter_files(source, follow_links=follow_links)
    return list(found) if kind_of(source)[0] == "python" else sorted(found)


def iter_files(source: str, *, follow_links: bool = True) -> Iterator[File]:
    """The same files as they are found, one by one, in any order; what is wrong is raised in the end."""
    kind, where = kind_of(source)
    if kind == "python":
        if not python_corpus.known(source):
            raise ConfigError(f"source {source!r}: expected python:code, python:docstrings or python:documents")
        for one in python_corpus.candidates(source):
            stat = os.lstat(one.path)
            yield File(*one, stat.st_size, version=_version({"mtime": stat.st_mtime}))
        return
    file = None
    for file in _find(source, kind, where, follow_links):
        yield file
    if file is None:
        raise ConfigError(f"source {source!r}: no file matches; check the path and its wildcards")


def place(file: File, line: int) -> str:
    """FILE:LINE for a message, cut at its front where it is long; line 0 is the file as a whole."""
    name = shown_name(file.name)
    name = name if len(name) <= 160 else "..." + name[-157:]
    return f"{name}:{line}" if line else name


def _find(source: str, kind: str, where: str, follow_links: bool) -> Iterator[File]:
    scheme = where.partition("://")[0] if "://" in where else ""
    try:
        yield from _found(source, kind, where, scheme, follow_links)
    except ImportError as error:
        package = PACKAGES.get(scheme, f"what fsspec needs for {scheme}://")
        raise ConfigError(f"source {source!r}: needs a package that is not there: pip install {package}") from error
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ConfigError(f"source {source!r}: {error}") from error
    except RunError:
        raise
    except Exception as error:  # each storage has exceptions of its own
        raise StorageError(f"source {source!r} cannot be listed ({type(error).__name__}: {error})") from error


def _found(source: str, kind: str, where: str, scheme: str, follow_links: bool) -> Iterator[File]:
    fs, root, entries, how = _entries(where, local=not scheme)
    no_data, out = [], []
    for path, entry in entries:
        name = path[len(root) :].lstrip("/")
        name = without_secret_parameters(name) if scheme else name  # a new signature must not deal files anew, either
        last = name.rpartition("/")[2]
        if not _is_file(path, entry, local=not scheme) or ("/." in f"/{name}" and how in (FOLDER, PATTERN)):
            continue
        if kind == "arrow" and last.startswith("cache-"):
            continue  # of a transformation that Hugging Face's datasets once ran: the same rows again
        if not _is_data(kind, last, how):
            if how != FOLDER or not _matches(BESIDE, last):
                no_data.append(name)
            continue
        if not scheme and not follow_links and how != ONE and _links_out(path, root):
            out.append(name)
        where = fs.unstrip_protocol(path) if scheme else path
        yield File(name, where, entry["size"] or 0, version=_version(entry))
    if no_data:
        raise ConfigError(
            f"source {source!r}: {_some(no_data)} by name no {kind} data: take that out, or give a pattern that "
            f"matches the data alone"
        )
    if out:
        raise ConfigError(
            f"source {source!r}: {_some(out)} a link out of its folder: copy the data there, or set follow_links=True"
        )


def _version(entry: dict[str, Any]) -> str:
    """A date of a disk in whole seconds: file systems keep no more of it once a file is out of their memory."""
    found = next((entry[key] for key in VERSIONS if entry.get(key)), "")
    return str(int(found) if isinstance(found, float) else found)


def _some(names: list[str]) -> str:
    """For a message: the first names, and what they are to be said of."""
    first = ", ".join(shown_name(name) for name in sorted(names)[:5])
    return f"{first} is" if len(names) == 1 else f"{len(names)} files ({first}{', ...' * (len(names) > 5)}) are each"


def _is_data(kind: str, name: str, how: int) -> bool:
    """By its name: in a folder that of the kind's data; what a pattern matches is, unless it is known as none."""
    if kind == "text" or how == ONE:
        return True
    return _matches(NAMES[kind], name) if how == FOLDER else not _matches(NO_DATA, name)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name, re.IGNORECASE | re.DOTALL) is not None


def _links_out(path: str, root: str) -> bool:
    return not os.path.realpath(path).startswith(os.path.realpath(root).rstrip("/") + "/")


def _entries(where: str, *, local: bool) -> tuple[Any, str, Iterable[tuple[str, dict[str, Any]]], int]:
    """The file system, the fixed part of the pattern, paths that match with what is known of them, and what the source
    names."""
    fs, pattern = fsspec.core.url_to_fs(where)
    if fs.isfile(pattern):  # whose name may hold a wildcard's character
        path = pattern.partition("?")[0] if "://" in where else pattern  # a signature may hold a slash
        return fs, path.rpartition("/")[0], [(pattern, fs.info(pattern))], ONE
    is_folder = fs.isdir(pattern)
    if is_folder:
        pattern = f"{pattern.rstrip('/')}/**"
    root = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    how = FOLDER if is_folder else HIDDEN_PATTERN if "/." in pattern[len(root) :] else PATTERN
    return fs, root, _matching(fs, pattern, root, local=local), how


def _matching(fs: Any, pattern: str, root: str, *, local: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What fsspec's glob finds, but for folders: one by one, where its memory would be that of all."""
    if "_glob" in vars(type(fs)) or "glob" in vars(type(fs)) or not has_magic(pattern):  # a storage's own: hf, http
        yield from patiently(lambda: fs.glob(pattern, detail=True)).items()
        return
    depth = None if "**" in pattern else pattern[len(root) :].strip("/").count("/") + 1
    matches = re.compile(glob_translate(pattern)).match
    for path, entry in _files_below(fs, root, depth, local=local):
        if matches(path):
            yield path, entry


def _files_below(fs: Any, root: str, depth: int | None, *, local: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """All that are no folders; a folder that cannot be read is an error, and no loss without a word."""
    folders = [(root or "/" * local, 1)]
    while folders:
        folder, level = folders.pop()
        try:
            for path, entry in _listed(fs, folder, local=local):
                if entry["type"] != "directory":
                    yield path, entry
                elif depth is None or level < depth:
                    folders.append((path, level + 1))
        except (FileNotFoundError, NotADirectoryError) as error:
            if level > 1 or local and os.path.isdir(folder):
                raise StorageError(f"{shown_name(str(error))}: it went away while it was listed: try again") from error
        if not local:
            fs.invalidate_cache(folder)  # which would hold them all


def _listed(fs: Any, folder: str, *, local: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if local:
        with patiently(lambda: os.scandir(folder)) as found:
            yield from ((entry.path, fs.info(entry)) for entry in found)
        return
    for entry in patiently(lambda: fs.ls(folder, detail=True)):
        if (path := entry["name"].rstrip("/")) != folder.rstrip("/"):  # a marker of the folder
            yield path, entry


def _is_file(path: str, entry: dict[str, Any], *, local: bool) -> bool:
    """A link to nowhere is one too: it is reported when it is opened, where leaving it out would hide a loss."""
    if not local or entry["type"] != "other":
        return entry["type"] == "file"
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


class _Unpacked(io.RawIOBase):
    """Decompresses member after member, or frame after frame, and gives all that stands before a damage.

    Python's gzip keeps back what it read last; zstandard's reader takes a truncated file for a whole one.
    """

    def __init__(self, file: IO[bytes], new_decoder: Callable[[], Any], step: int):
        self._file, self._new_decoder, self._step = file, new_decoder, step
        self._decoder, self._rest, self._ready = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
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


class _Part(io.RawIOBase):
    """So many bytes of a file, from where it stands."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


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


@contextlib.contextmanager
def opened(file: File) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where they are packed (PACKINGS); reading may raise StorageError or DAMAGE."""
    with Stored(file.path, file.whole or file.size) as raw:
        if file.end:
            raw.seek(file.begin)
            yield io.BufferedReader(_Part(raw, file.size), BLOCK)
            return
        stored = io.BufferedReader(raw, BLOCK)
        how = packing(stored.peek(HEAD)[:HEAD], file.path)
        if how is None:
            yield stored
        else:
            *_, new_decoder, step = PACKINGS[how]
            yield io.BufferedReader(_Unpacked(stored, new_decoder, step), BLOCK)


def bounded_lines(stream: io.BufferedReader, most: int) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line with its line feed); None for a line of more than `most` bytes, which is passed over."""
    number = 0
    while line := stream.readline(most + 1):
        number += 1
        if line.endswith(b"\n") or len(line) <= most:
            yield number, line
            continue
        yield number, None
        while (rest := stream.readline(BLOCK)) and not rest.endswith(b"\n"):
            pass
