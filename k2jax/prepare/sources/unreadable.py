"""Files of sources that cannot be read, and are left out by name where a subset allows so many (`max_unreadable`).

Each is noted when it is met, and no reader of this preparation tries it again: what comes out is that of the others. A
file is left out whole: where other tasks had read parts of it by then, they read again without it (clean.py).

    OUT/stages/unreadable/<subset>/<hash of the file's name>.json    {"name", "path", "error", "date"}
"""

import datetime
import hashlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from k2jax.errors import UnreadableError
from k2jax.files import read_json, write_json
from k2jax.prepare.sources.files import File, place
from k2jax.prepare.tally import Tally, shown_name

REASON = "file that cannot be read"


def noted(out: Path, subset: str) -> dict[str, str]:
    """{name: error} of the files of a subset that are left out."""
    found = [read_json(path) for path in sorted(_folder(out, subset).glob("*.json"))]
    return {one["name"]: one["error"] for one in sorted(found, key=lambda one: one["name"])}


def names(out: Path, subset: str) -> set[str]:
    """The same as File.name has them."""
    return {read_json(path)["path"] for path in _folder(out, subset).glob("*.json")}


def too_many(config: ConfigDict, found: dict[str, dict[str, str]]) -> dict[str, str]:
    """{subset: why} of those of which more files are left out than the recipe allows; `found` is `of_all`'s."""
    return {
        name: f"files that are left out were {len(files)}, max_unreadable is {config.subsets[name].max_unreadable}"
        for name, files in found.items()
        if name in config.subsets and len(files) > config.subsets[name].max_unreadable
    }  # fmt: skip


def note(out: Path, subset: str, chosen: ConfigDict, files: list[File], error: UnreadableError) -> None:
    """Leaves out the one of `files`, or of their parts, that an error is of, all of it; raises the error where no more
    may be left out."""
    [file] = [file for file in files if file.path == error.path][:1] or [None]
    if file is None or not chosen.max_unreadable:
        raise error
    path = _folder(out, subset) / f"{hashlib.sha256(file.name.encode('utf-8', 'surrogateescape')).hexdigest()}.json"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(path, {"name": shown_name(file.name), "path": file.name, "error": str(error), "date": date})
    if len(list(path.parent.glob("*.json"))) > chosen.max_unreadable:
        path.unlink()  # when the storage is well again it is read
        raise UnreadableError(f"{error}; subsets.{subset}.max_unreadable={chosen.max_unreadable} are left out already")


def others(out: Path, subset: str, files: list[File], tally: Tally) -> list[File]:
    """Those that are not left out; the others are counted, each by its first part."""
    found = {one["path"]: one for one in (read_json(path) for path in _folder(out, subset).glob("*.json"))}
    for file in files:
        if file.name in found and not file.begin:
            tally.problem(REASON, place(file, 0), found[file.name]["error"])
    return [file for file in files if file.name not in found]


def of_all(out: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """What `noted` gives for each subset that has some."""
    found: dict[str, Any] = {name: noted(out, name) for name in names}
    return {name: files for name, files in found.items() if files}


def _folder(out: Path, subset: str) -> Path:
    return Path(out) / "stages" / "unreadable" / subset
