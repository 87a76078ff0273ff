"""A release to a Hugging Face hub: the whole of it as `main`, each export as a branch of its revision's name.

The library uploads in many commits, and goes on where an earlier call ended: what is there is not sent again.
files.json and model.sig come last, so that what is half there does not look whole. In the end the hub
is asked what it has.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from k2jax import files
from k2jax.errors import ConfigError, RunError, StorageError
from k2jax.release.scratch import FILES, SIGNATURE
from k2jax.text import HIDDEN, has_secrets, without_secrets

TOKEN = "HF_TOKEN"  # of the environment, from where alone it is taken
HUB = "https://huggingface.co"
THEIRS = {".gitattributes"}  # what a hub adds
LAST = [FILES, SIGNATURE]
LOCAL = {"localhost", "127.0.0.1", "::1"}
NEEDS = "pip install 'k2jax[release]'"
Say = Callable[[str], None]


class Package(NamedTuple):
    """A release, found whole on this disk."""

    folder: Path
    digest: str
    files: dict[str, dict[str, Any]]  # as files.json has them, and itself, and model.sig
    exports: dict[str, str]  # {revision: path}

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())


def open_package(folder: Path) -> Package:
    """Raises ConfigError where the folder is no release, or not what its files.json says."""
    path = folder / FILES
    if not path.is_file():
        raise ConfigError(f"--release={folder}: no release, there is no {FILES} in it")
    text = files.read_bytes(path, 1 << 30)
    values = files.parse_json(text, str(path))
    listed = values.get("files") if isinstance(values, dict) else None
    if not isinstance(listed, dict) or values.get("format") != 1:
        raise ConfigError(f"{path} is none of a release, or of another format: name another folder")
    there = dict(_below(folder))
    more = sorted(there.keys() - listed.keys() - set(LAST)) + sorted(listed.keys() - there.keys())
    wrong = more or sorted(name for name, entry in listed.items() if _entry(there[name]) != entry)
    if wrong:
        raise ConfigError(
            f"--release={folder}: {wrong[0]!r}{', ...' if wrong[1:] else ''} is not as {FILES} says: it is not "
            f"published; release the run again"
        )
    own = {name: _entry(there[name]) for name in LAST if name in there}
    told = files.read_json(folder / "release.json")
    exports = {export["revision"]: export["path"] for export in told["exports"]}
    for revision, place in exports.items():
        if not re.fullmatch(r"step\d+-tokens\d+", revision) or place != f"exports/{revision}":
            raise ConfigError(f"--release={folder}: release.json names an export {revision!r} in {place!r}")
    return Package(folder, hashlib.sha256(text).hexdigest(), {**listed, **own}, exports)


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ConfigError(f"--release={folder}: {path} is a link or a device, which no release holds")
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def publish(package: Package, repo: str, endpoint: str, *, private: bool, say: Say) -> str:
    """Uploads it; returns the address. Raises ConfigError where the hub or the repository does not take it,
    StorageError where it cannot be reached: the same call goes on."""
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise ConfigError(f"{TOKEN} is not set: put an access token that may write to {repo} into the environment")
    check_endpoint(endpoint)
    check_repo(repo)
    with _hub_errors(endpoint, token):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=endpoint, token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        _check_nothing_else(api, repo, package)
        begin = api.list_repo_commits(repo)[-1].commit_id  # the empty repository: a branch is an export, no more
        for revision, place in package.exports.items():
            api.create_branch(repo, branch=revision, revision=begin, exist_ok=True)
            _upload(api, repo, package.folder / place, revision, f"{revision} of release {package.digest[:12]}")
            inside = {n.removeprefix(f"{place}/"): n for n in package.files if n.startswith(f"{place}/")}
            _check_there(api, repo, revision, package, inside)
            say(f"branch {revision}: {len(inside):,} files")
        _upload(api, repo, package.folder, "main", f"Release {package.digest[:12]}", ignore_patterns=list(LAST))
        _upload(api, repo, package.folder, "main", f"Release {package.digest}", allow_patterns=list(LAST))
        _check_there(api, repo, "main", package, {name: name for name in package.files})
        say(f"main: {len(package.files):,} files, {package.bytes / 1e6:,.1f} MB")
    return f"{endpoint}/{repo}"


def _upload(api: Any, repo: str, folder: Path, revision: str, message: str, **patterns: list[str]) -> None:
    api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message, **patterns)


def _check_nothing_else(api: Any, repo: str, package: Package) -> None:
    more = {entry.path for entry in _files(api, repo, "main")} - package.files.keys() - THEIRS
    if more:
        raise ConfigError(
            f"--repo={repo}: main holds {len(more)} file(s) that are not of this release, such as {min(more)!r}: it "
            f"would not be one then: name another repository, or remove them there"
        )


def _check_there(api: Any, repo: str, revision: str, package: Package, names: dict[str, str]) -> None:
    """That the hub has each of {name there: name in the release}, by the digests that it tells of, and nothing else."""
    there = {entry.path: entry for entry in _files(api, repo, revision) if entry.path not in THEIRS}
    wrong = sorted(names.keys() ^ there.keys())
    for name, ours in names.items():
        if not wrong and not _is_same(there[name], package.folder / ours, package.files[ours]):
            wrong.append(name)
    if wrong:
        raise StorageError(
            f"--repo={repo}: {revision} has not {wrong[0]!r} as the release has it, after the upload: run the same "
            f"command again; if it stays so, remove the file there"
        )


def _is_same(there: Any, path: Path, entry: dict[str, Any]) -> bool:
    if there.lfs is not None:
        return there.lfs.sha256 == entry["sha256"]
    if there.size != entry["bytes"]:
        return False
    digest = hashlib.sha1(b"blob %d\0" % entry["bytes"], usedforsecurity=False)  # as git names it
    with path.open("rb") as file:
        while block := file.read(1 << 23):
            digest.update(block)
    return digest.hexdigest() == there.blob_id


def _files(api: Any, repo: str, revision: str) -> list[Any]:
    return [entry for entry in api.list_repo_tree(repo, revision=revision, recursive=True) if hasattr(entry, "blob_id")]


def check_repo(repo: str) -> None:
    """OWNER/NAME, as a hub has them."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", repo, re.ASCII) or ".." in repo:
        raise ConfigError(f"--repo={repo}: expected OWNER/NAME, such as me/smoke-360")


def check_endpoint(endpoint: str) -> None:
    """An address of a hub to which a token may go."""
    parts = urlsplit(endpoint)
    if has_secrets(endpoint):
        raise ConfigError(f"--endpoint={without_secrets(endpoint)}: holds credentials: the token is {TOKEN}'s alone")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--endpoint={endpoint}: expected the address of a hub, such as {HUB}")
    if parts.scheme == "http" and parts.hostname not in LOCAL:
        raise ConfigError(f"--endpoint={endpoint}: without https anyone on the way could read the token: use https")


@contextmanager
def _hub_errors(endpoint: str, token: str) -> Iterator[None]:
    """What the library raises, as ours; the token is in no message."""
    try:
        yield
    except RunError:
        raise
    except ImportError as error:
        raise ConfigError(f"publishing needs a package that is not there ({error.name}): {NEEDS}") from error
    except Exception as error:
        if _is_ours(error):
            raise
        said = " ".join(str(error).split()).replace(token, HIDDEN)
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        refused = status in (400, 401, 402, 403, 404, 409, 422) or isinstance(error, ValueError)
        kind = ConfigError if refused else StorageError
        advice = "" if refused else ": what is there stays, run the same command again"
        raise kind(f"{endpoint}: {type(error).__name__}: {said[:400]}{advice}") from None


def _is_ours(error: Exception) -> bool:
    """A bug, which keeps its traceback."""
    return isinstance(error, (TypeError, AttributeError, NameError, AssertionError, LookupError))


def describe(package: Package, repo: str, endpoint: str) -> dict[str, Any]:
    """What would be done."""
    return {
        "repo": f"{endpoint}/{repo}",
        "digest": package.digest,
        "files": len(package.files),
        "bytes": package.bytes,
        "branches": sorted(package.exports),
    }


def as_text(said: dict[str, Any]) -> str:
    """The same for people."""
    branches = ", ".join(said["branches"]) or "none"
    return f"{said['repo']}: {said['files']:,} files, {said['bytes'] / 1e6:,.1f} MB on main; branches: {branches}"
