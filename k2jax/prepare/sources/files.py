"""The files of a source, local or remote: found, opened, decompressed, and read in bounded memory.

Patterns are fsspec's: `*` within a folder, `**` at any depth; local paths, gs://, s3://, hf:// and what else fsspec
knows. Names that begin with a dot are left out unless the pattern has one; a link to a folder is refused.
"""

import contextlib
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import IO, Any, NamedTuple

import fsspec
from fsspec.core import has_magic, strip_protocol
from fsspec.utils import glob_translate

from k2jax.errors import ConfigError, RunError, StorageError
from k2jax.prepare.recipe import kind_of
from k2jax.prepare.sources import python_corpus
from k2jax.prepare.sources.packed import HEAD, PACKINGS, Damaged, Unpacked, no_archive, packing
from k2jax.prepare.sources.stored import Stored, patiently, version_of
from k2jax.prepare.sources.whole import Whole
from k2jax.prepare.tally import shown_name
from k2jax.text import without_secret_parameters

BLOCK = 1 << 20  # bytes read at a time
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
FOLDER, PATTERN, HIDDEN_PATTERN, ONE = range(4)  # what a source names; the third has a dot's name in it
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub"}  # for pip
LINKED = "link to a folder"  # a type of entries beside fsspec's own
EVERYWHERE = re.compile(r"[^*?[]*/\*\*(/[^/]*)?")  # what a pattern's fixed part holds at any depth
LOCAL = ("", "file", "local")  # schemes of this machine's disks
# What reading packed data raises when the data is at fault; the storage's own errors are StorageError.
DAMAGE = (EOFError, Damaged)


class File(NamedTuple):
    """A file of a source: its name below the pattern's fixed part, where it lies, its bytes on the storage.

    Or a part of one (parts.py): from `begin` to `end`, bytes of JSON lines between line ends or row groups of Parquet,
    behind `first` lines or rows, `size` of `whole` bytes. `version`, a checksum or date, tells of a rewrite; behind a
    space that of Megatron's index. A size of 0 may be one that its server does not tell.
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
    and `follow_links` is False, it is not whole or has several splits (whole.py), or a package is missing; StorageError
    if the storage cannot be listed.
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
            found = os.stat(one.path) if os.path.exists(one.path) else os.lstat(one.path)
            yield File(*one, found.st_size, version=version_of({"mtime": found.st_mtime}))
        return
    file = None
    for file in _find(source, kind, where, follow_links):
        yield file
    if file is None:
        Whole(source, folder=False).nothing()


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
    local = scheme in LOCAL
    fs, root, entries, how = _entries(where, local=local)
    whole, everywhere = Whole(source, folder=how == FOLDER), how == FOLDER or EVERYWHERE.fullmatch(where)
    for path, entry in entries:
        name = path[len(root) :].lstrip("/")
        name = name if local else without_secret_parameters(name)  # a new signature must not deal files anew, either
        last = name.rpartition("/")[2]
        if "/." in f"/{name}" and how in (FOLDER, PATTERN):
            continue
        if entry["type"] == LINKED:
            whole.linked += [] if everywhere and not _links_out(path, root) else [name]  # what lies within is there
            continue
        if not _is_file(path, entry, local=local) or (kind == "arrow" and last.startswith("cache-")):
            continue  # cache-*: of a transformation that Hugging Face's datasets once ran: the same rows again
        if not _is_data(kind, last, how):
            if how == FOLDER and _matches(BESIDE, last):
                whole.beside(fs, path, name)
            else:
                whole.no_data.append(name)
            continue
        whole.add(name)
        if local and not follow_links and how != ONE and _links_out(path, root):
            whole.out.append(name)
        version = version_of(entry) + (_of_index(fs, path) if kind == "megatron" else "")
        yield File(name, path if local else fs.unstrip_protocol(path), entry["size"] or 0, version=version)
    whole.check()


def _of_index(fs: Any, path: str) -> str:
    """What tells that the .idx beside Megatron's .bin was written again; "" without one, which its reader refuses.

    A bucket's storage knows it from the folder's listing, which it keeps until all of the folder has been seen.
    """
    try:
        entry = patiently(lambda: fs.info(f"{path.removesuffix('.bin')}.idx"))
    except FileNotFoundError:
        return ""
    return f" {entry['size']}:{version_of(entry)}"


def _is_data(kind: str, name: str, how: int) -> bool:
    """By its name: in a folder that of the kind's data; what a pattern matches is, unless it is known as none."""
    if kind == "text" or how == ONE:
        return True
    return _matches(NAMES[kind], name) if how == FOLDER else not _matches(NO_DATA, name)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name, re.IGNORECASE | re.DOTALL) is not None


def _links_out(path: str, root: str) -> bool:
    return not f"{os.path.realpath(path)}/".startswith(os.path.realpath(root or "/").rstrip("/") + "/")


def _entries(where: str, *, local: bool) -> tuple[Any, str, Iterable[tuple[str, dict[str, Any]]], int]:
    """The file system, the fixed part of the pattern, paths that match with what is known of them, and what the source
    names."""
    if local:  # no chain of fsspec's, which a name with :: would be
        fs, pattern = fsspec.filesystem("file"), strip_protocol(where)
    else:
        fs, pattern = fsspec.core.url_to_fs(where)
    if fs.isfile(pattern):  # whose name may hold a wildcard's character, as a folder's may
        path = pattern if local else pattern.partition("?")[0]  # a signature may hold a slash
        return fs, path.rpartition("/")[0], [(pattern, fs.info(pattern))], ONE
    if fs.isdir(pattern):
        root = pattern.rstrip("/")
        return fs, root, _in_folder(fs, root, local=local), FOLDER
    root = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    how = HIDDEN_PATTERN if "/." in pattern[len(root) :] else PATTERN
    return fs, root, _matching(fs, pattern, root, local=local), how


def _finds_itself(fs: Any) -> bool:
    """Whether it has a way of its own to list many folders at once: hf, http."""
    return "_glob" in vars(type(fs)) or "glob" in vars(type(fs))


def _in_folder(fs: Any, root: str, *, local: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """All of a folder."""
    if _finds_itself(fs):
        yield from patiently(lambda: fs.find(f"{root}/", detail=True)).items()
    else:
        yield from _files_below(fs, root, lambda _: True, local=local)


def _matching(fs: Any, pattern: str, root: str, *, local: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """What fsspec's glob finds, but for folders: one by one, where its memory would be that of all."""
    if _finds_itself(fs) or not has_magic(pattern):
        yield from patiently(lambda: fs.glob(pattern, detail=True)).items()
        return
    parts = pattern.split("/")

    @cache
    def matcher(depth: int) -> Callable[[str], Any]:
        return re.compile(glob_translate("/".join(parts[:depth]))).match

    def enters(folder: str) -> bool:
        depth = folder.count("/") + 1
        return "**" in parts[:depth] or depth < len(parts) and bool(matcher(depth)(folder))

    for path, entry in _files_below(fs, root, enters, local=local):
        if entry["type"] == LINKED or matcher(len(parts))(path):
            yield path, entry


def _files_below(
    fs: Any, root: str, enters: Callable[[str], bool], *, local: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All that are no folders, and links to those that it would go into; a folder that cannot be read is an error."""
    top = root or "/" * local
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            for path, entry in _listed(fs, folder, local=local):
                if entry["type"] == "directory" and enters(path):
                    folders.append(path)
                elif entry["type"] not in ("directory", LINKED) or entry["type"] == LINKED and enters(path):
                    yield path, entry
        except (FileNotFoundError, NotADirectoryError) as error:
            if folder != top or local and os.path.isdir(folder):
                raise StorageError(f"{shown_name(str(error))}: it went away while it was listed: try again") from error
        if not local:
            fs.invalidate_cache(folder)  # which would hold them all


def _listed(fs: Any, folder: str, *, local: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if local:
        with patiently(lambda: os.scandir(folder)) as found:
            yield from ((entry.path, _of_disk(fs, entry)) for entry in found)
        return
    for entry in patiently(lambda: fs.ls(folder, detail=True)):
        if (path := entry["name"].rstrip("/")) != folder.rstrip("/"):  # a marker of the folder
            yield path, entry


def _of_disk(fs: Any, entry: os.DirEntry) -> dict[str, Any]:
    """What fsspec tells, which is of a link itself: with the date of what it leads to, which may be written again."""
    info = fs.info(entry)
    if info["islink"]:
        with contextlib.suppress(OSError):  # to nowhere
            target = os.stat(entry.path)
            info["mtime"], info["type"] = target.st_mtime, LINKED if stat.S_ISDIR(target.st_mode) else info["type"]
    return info


def _is_file(path: str, entry: dict[str, Any], *, local: bool) -> bool:
    """A link to nowhere is one too: it is reported when it is opened, where leaving it out would hide a loss."""
    if not local or entry["type"] != "other":
        return entry["type"] == "file"
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


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


def as_stored(file: File) -> Stored:
    """The file as it lies on its storage; reading raises UnreadableError where it was written since it was listed."""
    return Stored(file.path, file.whole or file.size, file.version.partition(" ")[0])


def size_of(file: File) -> int:
    """Its bytes, asked of the file itself where the listing has none: it may be empty, or its server tells no sizes.

    Raises UnreadableError for what can be read from its beginning alone, too.
    """
    if file.size:
        return file.size
    with as_stored(file) as raw:
        return raw.seek(0, io.SEEK_END)


@contextlib.contextmanager
def opened(file: File) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked where they are packed (PACKINGS); reading may raise StorageError or DAMAGE.

    Raises ConfigError for an archive of files.
    """
    with as_stored(file) as raw:
        if file.end:
            raw.seek(file.begin)
            yield io.BufferedReader(_Part(raw, file.size), BLOCK)
            return
        stream = io.BufferedReader(raw, BLOCK)
        head = stream.peek(HEAD)[:HEAD]
        no_archive(head, file.name)
        if (how := packing(head, file.path)) is not None:
            *_, new_decoder, step = PACKINGS[how]
            stream = io.BufferedReader(Unpacked(stream, new_decoder, step), BLOCK)
            no_archive(stream.peek(HEAD), file.name)
        yield stream


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
