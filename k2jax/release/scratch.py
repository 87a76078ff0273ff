"""The folder in which a release grows, OUT.partial, until it is whole and becomes OUT.

    OUT.partial/release/      what will be OUT
    OUT.partial/state.json    of what release it is the beginning: another one is not mixed into it
    OUT.partial/done.jsonl    the files that are finished, a line each: bytes, SHA-256, and of what file they are a copy

A second call checks what is finished by its digest, and keeps it; all else is made anew. files.json is written last,
and the folder renamed after that: nothing else looks like a release.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from k2jax import files, locks
from k2jax.data.manifest import canonical_json
from k2jax.errors import ConfigError, StorageError
from k2jax.release.sources import Source

FORMAT = 1
FILES, SIGNATURE = "files.json", "model.sig"
BLOCK_BYTES = 1 << 23


class Scratch:
    """One process at a time: `with opened(out, identity, made) as scratch`."""

    def __init__(self, folder: Path, made: str):
        self.folder, self.made, self.root = folder, made, folder / "release"
        self._journal = folder / "done.jsonl"
        self._done = {line["name"]: line for line in _lines(self._journal)}  # the last of a name counts
        self._names: set[str] = set()  # of the files that this release has
        files.make_folder(self.root)

    def copy(self, source: Source, progress: Callable[[int], object]) -> None:
        """A file of the run, in blocks, of which `progress` is told; StorageError where it is not as planned."""
        origin = [source.bytes, source.changed]
        if self._is_done(source.name, origin):
            progress(source.bytes)
            return
        digest, size = hashlib.sha256(), 0
        with files.whole_file(self.root / source.name) as target, source.path.open("rb") as data:
            while block := data.read(BLOCK_BYTES):
                digest.update(block)
                target.write(block)
                size += len(block)
                progress(len(block))
            if size != source.bytes:
                raise StorageError(
                    f"{source.path} has changed while it was copied ({source.bytes:,} bytes, then {size:,}): end what "
                    f"writes it, and run the same command again"
                )
        self._note(source.name, size, digest.hexdigest(), origin)

    def write(self, name: str, data: bytes | str) -> None:
        """A small file, made anew at each call."""
        data = data.encode() if isinstance(data, str) else data
        with files.whole_file(self.root / name) as file:
            file.write(data)
        self._note(name, len(data), hashlib.sha256(data).hexdigest(), None, keep=False)

    def stream(self, name: str, lines: Iterator[bytes]) -> None:
        """A file that is made piece by piece, anew at each call."""
        digest, size = hashlib.sha256(), 0
        with files.whole_file(self.root / name) as file:
            for line in lines:
                digest.update(line)
                file.write(line)
                size += len(line)
        self._note(name, size, digest.hexdigest(), None, keep=False)

    def make(self, name: str, make: Callable[[Path], object], *, whole: bool, but: str = "") -> None:
        """A folder that `make` fills: `whole` or not at all, or bit by bit, going on with what it notes in `but` there,
        which no release has."""
        folder, mark = self.root / name, f"{name}/"
        listed = [entry for entry in self._done if entry.startswith(mark) and entry != mark]
        if mark in self._done and all(self._is_done(entry, None) for entry in listed):
            return
        if whole or not (folder / but).is_dir():  # what it cannot go on with
            shutil.rmtree(folder, ignore_errors=True)
        make(folder)
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder).as_posix()
            if path.is_file() and not (but and inside.startswith(f"{but}/")):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._note(f"{name}/{inside}", path.stat().st_size, digest, None)
        files.append_line(self._journal, canonical_json({"name": mark}) + b"\n")

    def check(self, name: str, check: Callable[[Path], object]) -> None:
        """Of a folder that was copied, once and for all calls; one that fails goes, and is copied again by the next."""
        mark = f"checked {name}"
        if mark in self._done:
            return
        try:
            check(self.root / name)
        except StorageError:
            shutil.rmtree(self.root / name)
            raise
        files.append_line(self._journal, canonical_json({"name": mark}) + b"\n")

    def size(self, name: str) -> int:
        """Bytes of a finished file."""
        return self._done[name]["bytes"]

    def size_below(self, prefix: str) -> int:
        """Of all whose names begin so."""
        return sum(self.size(name) for name in self._names if name.startswith(prefix))

    def digest(self, name: str) -> str:
        return self._done[name]["sha256"]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self._names if name.startswith(prefix))

    def close_with_list(self) -> str:
        """Takes away what belongs to nothing, and writes files.json, whose SHA-256 it returns: the release's digest."""
        for path in sorted(self.root.rglob("*"), reverse=True):  # what is in a folder before the folder
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.root).as_posix() not in self._names:
                path.unlink()
        entries = {name: {key: self._done[name][key] for key in ("bytes", "sha256")} for name in self._names}
        data = canonical_json({"format": FORMAT, "files": entries}) + b"\n"
        files.write_bytes(self.root / FILES, data)
        return hashlib.sha256(data).hexdigest()

    def become(self, out: Path) -> None:
        """The release gets its name, and the scratch folder goes."""
        files.move(self.root, out)
        shutil.rmtree(self.folder)

    def _is_done(self, name: str, origin: list[int] | None) -> bool:
        """Whether the file was finished, of the same source, and is what it was then."""
        entry, path = self._done.get(name), self.root / name
        if entry is None or entry["origin"] != origin or path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        if same:
            self._names.add(name)
        return same

    def _note(self, name: str, size: int, sha256: str, origin: list[int] | None, *, keep: bool = True) -> None:
        entry = {"name": name, "bytes": size, "sha256": sha256, "origin": origin}
        if keep:
            files.append_line(self._journal, canonical_json(entry) + b"\n")
        self._done[name] = entry
        self._names.add(name)


def place_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def clear_renamed(out: Path) -> None:
    """Takes away what a kill between the renaming and the end left: a scratch folder whose release is `out` by now."""
    folder = place_of(out)
    if (folder / "state.json").is_file() and not (folder / "release").exists() and (out / FILES).is_file():
        shutil.rmtree(folder)


@contextmanager
def opened(out: Path, identity: dict[str, Any], made: str) -> Iterator[Scratch]:
    """The scratch folder of a release to `out`, new or gone on with; `made` counts where it is new.

    Raises ConfigError where it, or `out`, holds something else, or another process is at it.
    """
    check_free(out)
    folder = place_of(out)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is in the way, and no folder of ours: remove it, or name another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "state.json").exists():
        if {path.name for path in folder.iterdir()} - {"lock"}:
            raise ConfigError(f"{folder} holds files that are no release of ours: remove it, or name another --out")
    files.make_folder(folder)
    try:
        lock = locks.hold(folder / "lock", f"host {socket.gethostname()}, pid {os.getpid()}")
    except locks.Held as holder:
        raise ConfigError(f"--out={out}: another process ({holder}) is making it: wait for it") from None
    with lock:
        files.remove_leftovers(folder, alone=True)
        state = {"format": FORMAT, "identity": identity, "made": made}
        if (folder / "state.json").exists():
            there = files.read_json(folder / "state.json")
            _check_same(folder, there.get("identity") if isinstance(there, dict) else None, identity)
            state = there
        else:
            files.write_json(folder / "state.json", state, sort_keys=True)
        yield Scratch(folder, state["made"])


def check_free(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError(f"--out={out} is there and not empty: name a new folder, or remove it")


def _check_same(folder: Path, there: Any, identity: dict[str, Any]) -> None:
    if there != identity:
        there = there if isinstance(there, dict) else {}
        key = next(key for key in identity if there.get(key) != identity[key])
        raise ConfigError(
            f"{folder} is the beginning of another release: its {key} is {json.dumps(there.get(key))}, this one's "
            f"{json.dumps(identity[key])}: finish that one with its own options, or remove the folder"
        )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of done.jsonl, less a half-written last one, which goes."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        files.write_bytes(path, whole)
    return [files.parse_json(line, str(path)) for line in whole.splitlines()]
