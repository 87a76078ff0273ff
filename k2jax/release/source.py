"""source/: the code that made the run, as an archive: of the commit that its last launch recorded, where this checkout
has it; else of the tree that makes the release, and then it is said so. And the versions of what it ran with.
"""

import gzip
import importlib.metadata
import io
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import k2jax
from k2jax.errors import StorageError
from k2jax.release.record import Record

ARCHIVE, LOCK = "source/k2jax.tar.gz", "source/requirements.lock"
ROOT = Path(k2jax.__file__).resolve().parent.parent
LIMIT_S = 600
BLOCK = 512  # of a tar archive
# Of an installed package there is k2jax/ alone; of a checkout all that the top level may hold.
OF_THE_TREE = ("k2jax", "kernels", "experiments", "tools", "tests", "setup.py", "pyproject.toml", "requirements.lock")
OF_THE_TREE += ("Makefile", "README.md", "LICENSE")


class Source(NamedTuple):
    """What is in source/, and what is said of it."""

    archive: bytes
    lock: bytes
    said: str


def read_source(record: Record) -> Source:
    """A few megabytes at most."""
    recorded = next((launch["commit"] for launch in reversed(record.launches) if launch.get("commit")), None)
    found = re.fullmatch(r"([0-9a-f]{7,64})([+?]?)", str(recorded))
    if found and (tar := _git("archive", "--format=tar", "--prefix=k2jax/", found[1])) is not None:
        changed = {"+": "; files had changed since it, and are not those of the archive", "?": ""}.get(found[2], "")
        lock = _git("show", f"{found[1]}:requirements.lock")
        said = f"commit {found[1]}, which the last launch recorded{changed}"
        return Source(_gzip(tar), _installed() if lock is None else lock, said)
    why = "the run records no commit" if recorded is None else f"commit {str(recorded)[:64]} is not in this checkout"
    said = f"the tree that made this release, not the one that made the run: {why}"
    lock = ROOT / "requirements.lock"
    return Source(_gzip(_tar()), lock.read_bytes() if lock.is_file() else _installed(), said)


def _git(*command: str) -> bytes | None:
    """What git says of this checkout; None where it does not, as of a commit that is not there."""
    if not (ROOT / ".git").exists():
        return None
    try:
        options = ["-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-C", str(ROOT)]
        quiet = {"capture_output": True, "timeout": LIMIT_S, "stdin": subprocess.DEVNULL}
        done = subprocess.run(["git", *options, *command], **quiet)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _tar() -> bytes:
    """The tree's files as a ustar archive: written out, as the same tree gives the same bytes then."""
    paths = [path for name in OF_THE_TREE for path in [ROOT / name, *sorted((ROOT / name).rglob("*"))]]
    out = io.BytesIO()
    for path in paths:
        if path.is_symlink() or not path.is_file() or "__pycache__" in path.parts or path.suffix == ".pyc":
            continue
        data = path.read_bytes()
        out.write(_header(f"k2jax/{path.relative_to(ROOT).as_posix()}", len(data)) + data + bytes(-len(data) % BLOCK))
    return out.getvalue() + bytes(2 * BLOCK)


def _header(name: str, size: int) -> bytes:
    encoded = name.encode()
    if len(encoded) > 100:
        raise StorageError(f"{name}: a path too long for the archive of the code: shorten it")
    fields = [encoded.ljust(100, b"\0"), b"0000644\0", b"0000000\0", b"0000000\0", b"%011o\0" % size, b"%011o\0" % 0]
    rest = b"0" + bytes(100) + b"ustar\00000" + bytes(64) + b"0000000\0" + b"0000000\0" + bytes(155 + 12)
    checksum = sum(b"".join(fields)) + sum(rest) + 8 * ord(" ")
    return b"".join(fields) + b"%06o\0 " % checksum + rest


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=9, mtime=0)


def _installed() -> bytes:
    """Where there is no lock: the versions that are installed here."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    lines = [f"{name}=={version}" for name, version in sorted(found.items(), key=lambda pair: pair[0].lower())]
    return ("\n".join(["# What is installed where this release was made.", *lines]) + "\n").encode()
