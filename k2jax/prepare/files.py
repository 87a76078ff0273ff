"""The files of a source, local or remote: found, opened, decompressed, and read in bounded memory.

Patterns are fsspec's: `*` within a folder, `**` at any depth; local paths, gs://, s3://, hf:// and what else fsspec
knows. Names that begin with a dot are left out unless the pattern has one, and links to folders are not followed.
"""

import contextlib
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import fsspec
import zstandard

from k2jax.errors import ConfigError, StorageError
from k2jax.prepare import python_corpus
from k2jax.prepare.recipe import kind_of
from k2jax.prepare.tally import clean_name
from k2jax.text import without_secret_parameters, without_secrets

BLOCK = 1 << 20  # bytes read at a time
# Compressed bytes decoded at once. A zstd block of 4 can stand for 128 KiB, a byte of gzip for about 1,032, so at most
# 64 MiB and 17 MiB come out.
ZSTD_STEP, GZIP_STEP = 1 << 11, 1 << 14
NAME_CHARACTERS = 2000  # kept of a name or URL; object stores allow names of 1,024 bytes
PATTERNS = {  # of a source that is a folder
    "text": "**",
    "jsonl": "**/*.jsonl*",
    "parquet": "**/*.parquet",
    "arrow": "**/*.arrow",
    "warc": "**/*.warc*",
    "megatron": "**/*.bin",
    "llm360": "**/*.jsonl*",
}
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub"}  # for pip
# What reading compressed data raises when the data is at fault; the storage's own errors are StorageError.
DAMAGE = (EOFError, zlib.error, zstandard.ZstdError)


class File(NamedTuple):
    """A file of a source: its name below the pattern's fixed part, where it lies, its bytes on the storage."""

    name: str
    path: str
    size: int


def list_files(source: str) -> list[File]:
    """The files of a source of text, sorted by name; a document of python: counts as a file.

    Raises ConfigError if none matches or a package is missing, StorageError if the storage cannot be listed.
    """
    kind, where = kind_of(source)
    if kind == "python":
        if not python_corpus.known(source):
            raise ConfigError(f"source {source!r}: expected python:code, python:docstrings or python:documents")
        return [File(*one, os.lstat(one.path).st_size) for one in python_corpus.candidates(source)]
    found = _find(source, kind, where)
    if not found:
        raise ConfigError(f"source {source!r}: no file matches; check the path and its wildcards")
    return sorted(found)


def shown_name(name: str) -> str:
    """A name or URL from outside, in characters that print, up to NAME_CHARACTERS of them, without credentials."""
    name = without_secrets(name)[:NAME_CHARACTERS]
    if name.isprintable():
        return name
    return "".join(clean_name(name[i : i + 300]) for i in range(0, len(name), 300))


def place(file: File, line: int) -> str:
    """FILE:LINE for a message, cut at its front where it is long; line 0 is the file as a whole."""
    name = shown_name(file.name)
    name = name if len(name) <= 160 else "..." + name[-157:]
    return f"{name}:{line}" if line else name


def _find(source: str, kind: str, where: str) -> list[File]:
    scheme = where.partition("://")[0] if "://" in where else ""
    try:
        fs, root, entries, hidden = _entries(kind, where, local=not scheme)
    except ImportError as error:
        package = PACKAGES.get(scheme, f"what fsspec needs for {scheme}://")
        raise ConfigError(f"source {source!r}: needs a package that is not there: pip install {package}") from error
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise ConfigError(f"source {source!r}: {error}") from error
    except Exception as error:  # each storage has exceptions of its own
        raise StorageError(f"source {source!r} cannot be listed ({type(error).__name__}: {error})") from error
    files = []
    for path, entry in entries.items():
        name = path[len(root) :].lstrip("/")
        name = without_secret_parameters(name) if scheme else name  # a new signature must not deal files anew, either
        if not _is_file(path, entry, local=not scheme) or ("/." in f"/{name}" and not hidden):
            continue
        if kind == "arrow" and name.rpartition("/")[2].startswith("cache-"):
            continue  # of a transformation that Hugging Face's datasets once ran: the same rows again
        files.append(File(name, fs.unstrip_protocol(path) if scheme else path, entry["size"] or 0))
    return files


def _entries(kind: str, where: str, *, local: bool) -> tuple[Any, str, dict[str, dict[str, Any]], bool]:
    """The file system, the fixed part of the pattern, what matches, by path, and whether hidden names are meant."""
    fs, pattern = fsspec.core.url_to_fs(where)
    if fs.isfile(pattern):  # whose name may hold a wildcard's character
        path = pattern.partition("?")[0] if "://" in where else pattern  # a signature may hold a slash
        return fs, path.rpartition("/")[0], {pattern: fs.info(pattern)}, True
    if fs.isdir(pattern):
        pattern = f"{pattern.rstrip('/')}/{PATTERNS[kind]}"
    # A local folder that cannot be read would else be left out without a word.
    entries = fs.glob(pattern, detail=True, **({"on_error": "raise"} if local else {}))
    root = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    return fs, root, entries, "/." in pattern[len(root) :]


def _is_file(path: str, entry: dict[str, Any], *, local: bool) -> bool:
    """A link to nowhere is one too: it is reported when it is opened, where leaving it out would hide a loss."""
    if not local or entry["type"] != "other":
        return entry["type"] == "file"
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


class Stored(io.RawIOBase):
    """A file as it is stored; whatever goes wrong in reading it is a StorageError that names it."""

    def __init__(self, path: str):
        self.path = path
        try:
            self._file: Any = fsspec.open(path, "rb").open() if "://" in path else open(path, "rb", buffering=0)
        except Exception as error:  # each storage has exceptions of its own
            raise self._error(error) from error

    def readinto(self, buffer: Any) -> int:
        """As of any raw file."""
        try:
            data = self._file.read(len(buffer))
        except Exception as error:
            raise self._error(error) from error
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._file.tell()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True: Parquet is read from its end."""
        return True

    def close(self) -> None:
        """Closes it on the storage."""
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _error(self, error: Exception) -> StorageError:
        what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return StorageError(f"{shown_name(self.path)} cannot be read ({what}): the source is not complete without it")


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
            self._ready = memoryview(self._decoder.decompress(data))
            self._rest = self._decoder.unused_data if self._decoder.eof else b""
            self._decoder = None if self._decoder.eof else self._decoder
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


@contextlib.contextmanager
def opened(file: File) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed if its name ends in .gz or .zst; reading may raise StorageError or DAMAGE."""
    with Stored(file.path) as raw:
        inner: Any = raw
        if file.path.endswith(".gz"):
            inner = _Unpacked(io.BufferedReader(raw, BLOCK), lambda: zlib.decompressobj(wbits=31), GZIP_STEP)
        elif file.path.endswith(".zst"):
            new_decoder = zstandard.ZstdDecompressor().decompressobj
            inner = _Unpacked(io.BufferedReader(raw, BLOCK), new_decoder, ZSTD_STEP)
        yield io.BufferedReader(inner, BLOCK)


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
