"""A file as it is stored, local or remote: what fails for a while is tried again, and an error names the file."""

import contextlib
import errno
import io
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import fsspec

from k2jax.errors import UnreadableError
from k2jax.prepare.tally import shown_name

WAITS = (1, 4, 16, 64)  # seconds before a read that failed is tried again
# What a network's file system, or a busy one, says for a while. What has no number is of a storage's own connections.
PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, socket.EAI_AGAIN,
}  # fmt: skip

# Of what storages tell of a file: Google's, S3's and Azure's, Hugging Face's, of a disk.
VERSIONS = ("crc32c", "md5Hash", "ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")
BUSY = (408, 425, 429)  # answers of a server that may be another next time; those from 500 are, too


class Stored(io.RawIOBase):
    """A file as it is stored; what goes wrong in reading it again and again is an UnreadableError that names it.

    So is one of another size than it was listed with, or on a disk of another date, `size` and `version` (version_of)
    where those are known: it was written since. Of a bucket's file an opened one does not tell what the listing did.
    """

    def __init__(self, path: str, size: int = 0, version: str = ""):
        self.path, self._listed, self._at, self._file, self._version = path, (size, version), 0, None, None
        self._trying(lambda file: None)

    def readinto(self, buffer: Any) -> int:
        """As of any raw file."""
        data = self._trying(lambda file: file.read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        self._at = self._trying(lambda file: file.seek(offset, whence))
        return self._at

    def tell(self) -> int:
        """As of any file."""
        return self._at

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True: Parquet is read from its end."""
        return True

    def close(self) -> None:
        """Closes it on the storage."""
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()

    def _trying(self, act: Callable[[Any], Any]) -> Any:
        """What `act` gives of the file; where it fails, again after a while, with the file opened anew."""
        for wait in (*WAITS, None):
            try:
                if self._file is None:
                    self._file = self._opened()
                return act(self._file)
            except Exception as error:  # each storage has exceptions of its own
                if wait is None or not _may_pass(error):
                    raise self._error(error) from error
            with contextlib.suppress(Exception):  # of the connection that broke
                if self._file is not None:
                    self._file.close()
            self._file = None
            time.sleep(wait)

    def _opened(self) -> Any:
        """The file, at the place where reading was; ValueError if it is another by now."""
        path, date = self.path, ""
        file = fsspec.open(path, "rb").open() if "://" in path else open(path, "rb", buffering=0)
        version = size = getattr(file, "size", None)  # of remote ones
        if isinstance(file, io.FileIO):
            found = os.fstat(file.fileno())
            version, size = (found.st_ino, found.st_size, found.st_mtime_ns), found.st_size
            date = version_of({"mtime": found.st_mtime})
        if since := self._since(size, date):
            file.close()
            raise ValueError(
                f"it was written since it was listed, {since}; when it no longer changes, the same command lists it "
                "anew"
            )
        if self._at:
            if version != self._version:
                raise ValueError("it has changed while it was read")
            file.seek(self._at)
        self._version = version
        return file

    def _since(self, size: Any, date: str) -> str:
        """In what it is not as it was listed; "" where it is, or that is not known."""
        listed_size, listed_date = self._listed
        if listed_size and isinstance(size, int) and size != listed_size:
            return f"{size:,} bytes and {listed_size:,} then"
        if date and listed_date and date != listed_date:
            off = int(date) - int(listed_date)
            return f"its date is off by {off:+,} s (its copies on several machines need one date: cp -p)"
        return ""

    def _error(self, error: Exception) -> UnreadableError:
        what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        what += f"; the answer was {status}" if (status := _status(error)) else ""
        found = UnreadableError(
            f"{shown_name(self.path)} cannot be read ({what}): the source is not complete without it"
        )
        found.path = self.path
        return found


def version_of(entry: dict[str, Any]) -> str:
    """By what it shows that a file was written again, of what its storage tells: a checksum, or its date.

    That of a disk in whole seconds: file systems keep no more of it once a file is out of their memory.
    """
    found = next((entry[key] for key in VERSIONS if entry.get(key) not in (None, "")), "")
    return str(int(found) if isinstance(found, float) else found)


def patiently(act: Callable[[], Any]) -> Any:
    """What `act` gives; where it fails, again after a while, of which a line tells, then what it raised."""
    for wait in (*WAITS, None):
        try:
            return act()
        except Exception as error:  # each storage has exceptions of its own
            if wait is None or not _may_pass(error):
                raise
            again = f"a listing failed ({type(error).__name__}): tried again in {wait} s"
            print(again, file=sys.stderr, flush=True)
            time.sleep(wait)


def _may_pass(error: Exception) -> bool:
    """Whether another try may help: not where there is no such file, or no right to it."""
    if status := _status(error):
        return status in BUSY or status >= 500
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in PASSING
    if any("Credentials" in one.__name__ for one in type(error).__mro__):  # botocore's, Google's
        return False
    return not isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError, TypeError))


def _status(error: BaseException | None) -> int | None:
    """What a server answered, of 400 and more: fsspec's HTTP says "not found" of all of them, s3fs "input/output"."""
    while error is not None:
        answer = getattr(error, "response", None)
        answer = answer.get("ResponseMetadata", {}) if isinstance(answer, dict) else answer  # botocore's
        told = answer.get("HTTPStatusCode") if isinstance(answer, dict) else getattr(answer, "status_code", None)
        status = told or getattr(error, "status", None) or getattr(error, "code", None)  # aiohttp's, gcsfs's
        if isinstance(status, int) and 400 <= status < 600:
            return status
        error = error.__cause__
    return None
