"""Files and folders that appear under their name once they are complete and on the disk, and never in part.

Each is written under a name of its own beside its place, NAME.new-HOST-PID: on a cluster an earlier attempt may still
be writing the same. That is synced, renamed, and the folder synced, without which a power cut may take the new name
back. No reader here takes such a name for a file: what they look for ends otherwise.

An object of a bucket is put whole, from a file of this machine where it is large (bucket.py); folders are upload.py's.
"""

import errno
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from k2jax.bucket import BucketPath
from k2jax.errors import ConfigError, StorageError
from k2jax.transfer import upload

AnyPath = str | os.PathLike | BucketPath
# Which the system raises without a file's name, for writing alone.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def whole_file(path: AnyPath, mode: str = "wb") -> Iterator[IO]:
    """A new file, in place of the old one at the end; after an exception the old one, or none. Text is UTF-8."""
    if isinstance(path, BucketPath):
        with tempfile.TemporaryDirectory(prefix="k2jax-object-") as folder:
            with whole_file(Path(folder) / "object", mode) as file:
                yield file
            upload(Path(folder) / "object", path)
        return
    path = Path(path)
    if path.exists() and not path.is_file():  # root would rename over /dev/null
        raise StorageError(f"{path} is no plain file, and nothing else is written over: name another")
    make_folder(path.parent)
    new = _beside(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}  # whatever the locale
    try:
        with open(new, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None and error.errno in NO_ROOM:
            error.filename = str(path)
        raise
    finally:
        new.unlink(missing_ok=True)


def write_bytes(path: AnyPath, data: bytes) -> None:
    """A whole file of these bytes."""
    if isinstance(path, BucketPath):
        path.put(data)
        return
    with whole_file(path) as file:
        file.write(data)


def write_text(path: AnyPath, text: str) -> None:
    """A whole file of this text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: AnyPath, value: Any, *, sort_keys: bool = False, end: str = "\n") -> None:
    """A whole file of JSON that a person can read."""
    write_text(path, json.dumps(value, indent=1, sort_keys=sort_keys) + end)


def read_bytes(path: AnyPath, max_bytes: int) -> bytes:
    """What a file holds; ConfigError when it is larger than any that we write."""
    if isinstance(path, BucketPath):
        data = path.read_bytes()
    else:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ConfigError(f"{path}: more than {max_bytes:,} bytes, which none of its kind has: restore it from a copy")
    return data


def read_json(path: AnyPath, max_bytes: int = 1 << 26) -> Any:
    """What a file of JSON holds; ConfigError when it is damaged, or larger than any that we write."""
    return parse_json(read_bytes(path, max_bytes), str(path))


def parse_json(text: bytes | str, where: str) -> Any:
    """What a text of JSON says; ConfigError, naming `where` it is from, for what is none, or nested without end."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is damaged: {error}; restore it from a copy") from error


def append_line(path: AnyPath, line: bytes) -> None:
    """Adds a line, with its line feed, to a file that only grows: all of it and on the disk, or nothing."""
    if isinstance(path, BucketPath):
        path.append(line)
        return
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if file.write(line) != len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file.fileno())
    if not size:
        sync_folder(Path(path).parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path`, absent or empty, at the end; after an exception nothing is left of it."""
    make_folder(path.parent)
    new = _beside(path)
    shutil.rmtree(new, ignore_errors=True)  # of a killed process that had our number
    try:
        new.mkdir()
        yield new
        for folder, _, names in os.walk(new):
            for name in names:
                _sync(Path(folder, name))
            sync_folder(Path(folder))
        os.rename(new, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def move(path: Path, to: Path) -> None:
    """Gives a file or folder another place on the same file system; both folders say so on the disk then."""
    make_folder(to.parent)
    os.rename(path, to)
    sync_folder(to.parent)
    sync_folder(path.parent)


def make_folder(path: Path | BucketPath) -> None:
    """A folder and those above it, on the disk; a bucket has none."""
    if not isinstance(path, BucketPath) and not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def check_room(folder: Path) -> None:
    """Raises OSError where a folder takes no file, or its disk nothing more; leaves none."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 12))
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """What the folder lists is on the disk then."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems on which folders have no sync
            raise


def remove_leftovers(folder: Path | BucketPath, name: str = "*", *, alone: bool = False) -> None:
    """Removes what killed writers of files or folders named `name`, a pattern, have left in `folder`.

    Those of this host whose process is gone; all of them where no other process can be writing there (`alone`).
    """
    if isinstance(folder, BucketPath):  # where nothing is written under another name
        return
    for path in folder.glob(f"{name}.new-*"):
        host, _, pid = path.name.rpartition(".new-")[2].rpartition("-")
        if pid.isdigit() and (alone or (host == socket.gethostname() and not is_running(int(pid)))):
            remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(folder: Path) -> Path:
    """A folder that nobody shall meet with a part of it gone, under another name: for `remove_tree`."""
    new = f"{folder.name}-{secrets.token_hex(4)}"  # which no killed process of our number has left
    gone = _beside(folder.with_name(new))
    os.rename(folder, gone)
    sync_folder(folder.parent)
    return gone


def remove_tree(folder: Path) -> None:
    """Removes a folder that another process may be removing, too; what cannot be removed stays."""
    shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.new-{socket.gethostname()}-{os.getpid()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
