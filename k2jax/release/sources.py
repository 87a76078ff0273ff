"""What of a run directory goes into a release, file by file: found, and refused where it is no plain file.

Bytes are copied as they are: epochs and launches are chained by digests. Only rows after the last checkpoint, which no
record closes over, stay behind.
"""

import io
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.errors import ConfigError, StorageError
from k2jax.release.record import AnyPath, Record
from k2jax.run import branches, storage

# Of a run directory, by name. What else lies there (locks, TensorBoard's files, what was abandoned) is nobody's record.
SMALL = ("epochs", "journal.jsonl", "environment.json", "tokenizer.json", "spikes", "goodput.jsonl", "validation.json")
SMALL += ("prediction.json", "plan.json", "evals", "gallery", "compiled", "reference")
ROWS = ("ledger", "metrics", "held_out")
OF_A_BRANCH = (*SMALL, *ROWS, branches.DONE)
UNFINISHED = re.compile(r"\.new-.+-\d+$|\.orbax-checkpoint-tmp|^lock$")  # what writers leave behind, killed or not
STRANGE = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")  # in a name: no other system, and no list, takes it


class Source(NamedTuple):
    """A file of the run, and its place in the release."""

    name: str  # relative, POSIX
    path: AnyPath
    bytes: int
    changed: int  # mtime in ns; 0 in a bucket, which has none


def check_plain(workdir: AnyPath) -> None:
    """Before anything is read, which would wait for ever at a pipe: all that is read at once are plain files."""
    if isinstance(workdir, BucketPath):
        return
    places = [workdir / name for name in (*SMALL, *ROWS, "branches")]
    for place in [*places, *workdir.glob("checkpoints/*/meta")]:
        for _ in below(place, place.relative_to(workdir).as_posix()):
            pass


def run_files(record: Record) -> tuple[list[Source], list[Source]]:
    """(copied as they are, cut): all but checkpoints, those of branches included: small beside them.

    Cut are the rows of the last chunk, in which steps may stand that no checkpoint closes over.
    """
    copied = [source for name in SMALL for source in below(record.workdir / name, f"run/{name}")]
    cut, last = [], len(record.chunks)
    for source in (source for name in ROWS for source in below(record.workdir / name, f"run/{name}")):
        chunk = re.fullmatch(r"chunk-(\d{5,})\.jsonl", source.path.name)
        if chunk is None or int(chunk[1]) < last:
            copied.append(source)
        elif int(chunk[1]) == last:
            cut.append(source)
    for number in record.branches:
        folder = branches.branch_folder(record.workdir, number)
        for name in OF_A_BRANCH:
            copied += below(folder / name, f"run/branches/{number:02d}/{name}")
    return copied, cut


def rows_up_to(source: Source, step: int) -> Iterator[bytes]:
    """The whole lines of a file of rows, up to a step."""
    with source.path.open("rb") as file:
        for line in io.BufferedReader(file):
            if line.endswith(b"\n") and files.parse_json(line, str(source.path))["step"] <= step:
                yield line


def checkpoint_files(folder: AnyPath, name: str, moments: bool) -> list[Source]:
    """Of one step, with or without its optimizer's state."""
    left_out = f"{name}/moments/"
    return [source for source in below(folder, name) if moments or not source.name.startswith(left_out)]


def checkpoint_name(step: int, branch: int | None = None) -> str:
    return f"run/checkpoints/{step}" if branch is None else f"run/branches/{branch:02d}/checkpoints/{step}"


def loses_moments(sources: list[Source], name: str, moments: bool, meta: dict) -> bool:
    """Whether a release takes them away, and must say so as thinning does; sources are those without them."""
    thinned = any(source.name == f"{name}/{storage.THINNED}" for source in sources)
    return not moments and not thinned and storage.has_moments(meta)


def below(path: AnyPath, name: str) -> Iterator[Source]:
    """The file, or all files of the folder, in the order of their names; none where there is nothing.

    Raises ConfigError for a link, a device, or a name that a release cannot hold.
    """
    if STRANGE.search(name):
        raise ConfigError(f"{str(path)!r}: a name with control characters, backslashes or no text: rename or remove it")
    if isinstance(path, BucketPath):
        yield from _in_bucket(path, name)
        return
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(found.st_mode):
        for entry in sorted(os.listdir(path)):
            if not UNFINISHED.search(entry):
                yield from below(path / entry, f"{name}/{entry}")
    elif stat.S_ISREG(found.st_mode):
        yield Source(name, path, found.st_size, found.st_mtime_ns)
    else:
        kind = "a link" if stat.S_ISLNK(found.st_mode) else "a device, pipe or socket"
        raise ConfigError(f"{path} is {kind}: a release holds plain files: put the file itself there, or remove it")


def _in_bucket(path: BucketPath, name: str) -> Iterator[Source]:
    keys = path.keys()
    if not keys and path.is_file():
        yield Source(name, path, path.stat().st_size, 0)
    for key in keys:
        if STRANGE.search(key):
            raise ConfigError(f"{str(path / key)!r}: a name with control characters or backslashes: rename it")
        yield Source(f"{name}/{key}", path / key, (path / key).stat().st_size, 0)
