"""Which task reads which files: listed once for all, so that no two tasks see different ones, and cut to `max_bytes`.

The files of a subset are in an order that the seed draws, and dealt out in turns. Where a subset has a limit, its text
is what stands first in that order, up to the document that would exceed it: the same for any number of tasks. Where
that is, is found by reading as many files as hold that much, in waves of which each is as large as the one before it
lets one expect.

Below stages/files; a task reads what is its own, for the lists of all have millions of rows:

    <subset>.json                  [[name, path, size], ...] of all, in their order
    summary.json                   {subset: {"files", "bytes", "digest"}} of those
    shares/<subset>/<shard>.json   {"files": [[name, path, size], ...], "last_bytes"} of a task of reading
    waves/subsets.json             those whose limits are found together
    waves/<n>/files/<rank>.json    [[subset, number, name, path, size], ...] of a task of measuring
    waves/<n>/sizes/<rank>.json    {subset: {number of the file: bytes of text}}
"""

import functools
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax.data.manifest import sha256_json
from k2jax.errors import ConfigError, UnreadableError
from k2jax.files import write_json
from k2jax.prepare import reads, recipe, unreadable
from k2jax.prepare.chat import texts
from k2jax.prepare.engine import Engine, Stage
from k2jax.prepare.files import File, list_files
from k2jax.prepare.read import RenderRow, documents, dump_of, in_order
from k2jax.prepare.recipe import Task
from k2jax.prepare.tally import Tally, shown_name

PACKED = 4  # bytes of text in a byte as it is stored, until a wave has told
MORE = 1.1  # than is expected to be enough


class Share(NamedTuple):
    """What a task reads: files, and where it stops in the last of them."""

    files: list[File]
    last_bytes: int | None = None  # of text, from the last file; None: all of it


def listed(config: ConfigDict) -> dict[str, list[File]]:
    """The files of each subset that has some, in the order in which they are dealt out.

    Raises ConfigError for a source without files; reads none.
    """
    found = {}
    for name, chosen in sorted(config.subsets.items()):
        if recipe.kind_of(chosen.source)[0] != "seqio":
            files = list_files(chosen.source, follow_links=chosen.follow_links)
            found[name] = in_order(_of_dumps(files, name, chosen), config.seed)
    return found


def _of_dumps(files: list[File], name: str, chosen: ConfigDict) -> list[File]:
    """Those of the dumps that are asked for, by their paths."""
    if not chosen.dumps:
        return files
    first, last = chosen.dumps
    if nameless := [file.name for file in files if not dump_of(file)]:
        raise ConfigError(f"subsets.{name}.dumps: {shown_name(nameless[0])} names no dump in its path: leave dumps out")
    found = [file for file in files if first <= dump_of(file) <= last]
    if not found:
        raise ConfigError(f"subsets.{name}.dumps={chosen.dumps}: none of its {len(files):,} files is of those")
    return found


def summary(files: dict[str, list[File]]) -> dict[str, dict[str, Any]]:
    """Of each subset the number of its files, their bytes, and a digest of their names and sizes."""
    found = {}
    for name, own in files.items():
        names = sorted([file.name, file.size] for file in own)
        found[name] = {"files": len(own), "bytes": sum(file.size for file in own), "digest": sha256_json(names)}
    return found


def deal(config: ConfigDict, out: Path, engine: Engine, inputs: dict[str, Any]) -> None:
    """Lists the sources, as `inputs` has them, and finds where each that has a limit ends.

    Raises ConfigError if they change meanwhile.
    """
    listing, measuring = (reads.view(config, keys).to_dict() for keys in (reads.LISTING, reads.MEASURING))
    engine.run(Stage("files", 1, functools.partial(list_all, config=listing, out=out)))
    began = json.loads((_folder(out) / "summary.json").read_bytes())
    if changed := [name for name in inputs if inputs[name] != began.get(name)]:
        raise ConfigError(
            f"--out={out}: the files of subset {changed[0]} change while they are listed ({inputs[changed[0]]}, then "
            f"{began.get(changed[0])}): run the same command again when they are complete"
        )
    for number, num_tasks in enumerate(_waves(config, out)):
        task = functools.partial(measure, number=number, config=measuring, out=out)
        engine.run(Stage(f"limits-{number}", num_tasks, task))


def share(out: Path, task: Task) -> Share:
    """What a task of reading, of text or of tokens, has been dealt."""
    found = json.loads(_share_of(out, task.subset, task.shard).read_bytes())
    return Share([File(*row) for row in found["files"]], found["last_bytes"])


def list_all(_: int, *, config: dict[str, Any], out: Path) -> None:
    """A task: lists the sources once for all, and deals out those without a limit."""
    whole = ConfigDict(config)
    found = listed(whole)
    for name, files in found.items():
        write_json(_folder(out) / f"{name}.json", files)
        if not whole.subsets[name].max_bytes:
            _deal_out(out, name, files, whole.subsets[name].tasks, None)
    write_json(_folder(out) / "summary.json", summary(found))


def _deal_out(out: Path, name: str, files: list[File], num_shards: int, last_bytes: int | None) -> None:
    """Of the last of `files` so many bytes of text are read; None: all."""
    for shard in range(num_shards):
        has_last = files and (len(files) - 1) % num_shards == shard
        own = {"files": files[shard::num_shards], "last_bytes": last_bytes if has_last else None}
        write_json(_share_of(out, name, shard), own)


def _share_of(out: Path, name: str, shard: int) -> Path:
    return _folder(out) / "shares" / name / f"{shard:05d}.json"


def template_of(out: str | Path) -> Path:
    """The chat template that every task reads, as it was when the preparation began."""
    return Path(out) / "stages" / "chat_template.json"


def rendering(out: Path, chosen: ConfigDict) -> AbstractContextManager[RenderRow | None]:
    """What makes texts of a subset's rows where they are conversations; None else."""
    return texts.rendering(template_of(out), chosen) if chosen.conversations else nullcontext()


def _folder(out: Path) -> Path:
    return out / "stages" / "files"


def _files_of(out: Path, name: str) -> list[File]:
    return [File(*row) for row in json.loads((_folder(out) / f"{name}.json").read_bytes())]


# ---- limits ----------------------------------------------------------------------------------------------------------


def _waves(config: ConfigDict, out: Path) -> Iterator[int]:
    """The tasks of each wave, whose files are dealt to them, until it is known where each limit is: those subsets are
    dealt out then."""
    limits = {name: config.subsets[name].max_bytes for name in _measured(config, out)}
    files = {name: _files_of(out, name) for name in limits}
    sizes: dict[str, list[int]] = {name: [] for name in limits}
    number = 0
    while limits:
        wave = {name: _next(files[name], sizes[name], limit) for name, limit in limits.items()}
        folder = _folder(out) / "waves" / str(number)
        rows = [(name, i, *files[name][i]) for name, (start, stop) in wave.items() for i in range(start, stop)]
        num_tasks = min(len(rows), sum(config.subsets[name].tasks for name in wave))
        for rank in range(num_tasks):
            write_json(folder / "files" / f"{rank:05d}.json", rows[rank::num_tasks])
        yield num_tasks
        for name, (start, stop) in wave.items():
            sizes[name] += [0] * (stop - start)
        for rank in range(num_tasks):
            for name, found in json.loads((folder / "sizes" / f"{rank:05d}.json").read_bytes()).items():
                for index, size in found.items():
                    sizes[name][int(index)] = size
        number += 1
        for name, limit in list(limits.items()):
            if sum(sizes[name]) > limit or len(sizes[name]) == len(files[name]):
                num_files, last_bytes = _cut(sizes[name], limit)
                _deal_out(out, name, files[name][:num_files], config.subsets[name].tasks, last_bytes)
                del limits[name]


def _measured(config: ConfigDict, out: Path) -> list[str]:
    """The subsets whose limits these waves find: those that were not dealt out when the waves began."""
    begun = _folder(out) / "waves" / "subsets.json"
    limited = [(name, chosen.tasks) for name, chosen in sorted(config.subsets.items()) if chosen.max_bytes]
    if not limited:
        return []
    if not begun.exists():
        write_json(begun, [name for name, tasks in limited if not _share_of(out, name, tasks - 1).exists()])
    return json.loads(begun.read_bytes())


def _next(files: list[File], sizes: list[int], limit: int) -> tuple[int, int]:
    """The files behind those that are measured which should be enough: at least one."""
    stored, text = sum(file.size for file in files[: len(sizes)]), sum(sizes)
    ratio = text / stored if text and stored else PACKED
    wanted, stop = (limit - text) / ratio * (MORE if sizes else 1), len(sizes)
    while stop < len(files) and (wanted > 0 or stop == len(sizes)):
        wanted -= files[stop].size
        stop += 1
    return len(sizes), stop


def _cut(sizes: list[int], limit: int) -> tuple[int, int | None]:
    """(files that are read, bytes of text of the last of them) where `limit` bytes end; None: all of it.

    The document that exceeds it is left out, and all behind it.
    """
    for number, size in enumerate(sizes):
        if size > limit:
            return number + 1, limit
        limit -= size
    return len(sizes), None


def measure(rank: int, *, number: int, config: dict[str, Any], out: Path) -> None:
    """A task: the bytes of text of some of a wave's files, as reading counts them; no further than the limit in one."""
    whole, folder = ConfigDict(config), _folder(out) / "waves" / str(number)
    found: dict[str, dict[str, int]] = {}
    for name, index, *row in json.loads((folder / "files" / f"{rank:05d}.json").read_bytes()):
        try:
            size = _text_bytes(whole.subsets[name], name, File(*row), out)
        except UnreadableError as error:
            unreadable.note(out, name, whole.subsets[name], [File(*row)], error)
            size = 0
        found.setdefault(name, {})[str(index)] = size
    write_json(folder / "sizes" / f"{rank:05d}.json", found)


def _text_bytes(chosen: ConfigDict, name: str, file: File, out: Path) -> int:
    size = 0
    with rendering(out, chosen) as render:
        for one in documents(chosen, [file], name=name, tally=Tally(), render=render):
            size += len(one.text.encode())
            if size > chosen.max_bytes:
                break
    return size
