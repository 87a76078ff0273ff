"""Which task reads which files: listed once for all, so that no two tasks see different ones, and cut to `max_bytes`.

The files of a subset are in an order that the seed draws, large ones in parts (parts.py), and a task has neighbours of
that order, so that the documents of all tasks, one behind the other, are in one order for any number of them: which of
equal documents stands first, and stays, does not depend on it either. Where a subset has a limit, its text is what
stands first, up to the document that would exceed it. Where that is, is found by reading as many files as hold that
much, in waves of which each is as large as the one before it lets one expect.

Below stages/files; a task reads what is its own, for the lists of all have millions of rows:

    summary.json                   {subset: {"files", "bytes", "digest"}}, written last of the listing, of those that
                                   are dealt out together: pieces, cuts and waves are of them
    <subset>.jsonl                 File of all, with the date that tells of a rewrite, a line each, in their order
    pieces/<rank>.json             [[subset, number of the file, *File, begin, end], ...] to be cut
    cuts/<rank>.json               [[subset, number of the file, begin, [Cut, ...]], ...] of those
    shares/<subset>/<shard>.json   {"files": [File, ...], "last_bytes"} of a task of reading
    waves/<n>/files/<rank>.json    [[subset, number, *File], ...] of a task of measuring
    waves/<n>/sizes/<rank>.json    {subset: {number of the file: bytes of text, null of one that cannot be read}}
"""

import functools
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax.errors import ConfigError, UnreadableError
from k2jax.files import whole_file, write_json
from k2jax.prepare import reads, recipe
from k2jax.prepare.chat import texts
from k2jax.prepare.engine.engine import Engine, Stage
from k2jax.prepare.recipe import Task
from k2jax.prepare.sources import parts, unreadable
from k2jax.prepare.sources.files import File, iter_files
from k2jax.prepare.sources.listing import OPENING, Listing
from k2jax.prepare.sources.read import RenderRow, documents, dump_of
from k2jax.prepare.tally import Tally, shown_name

PACKED = 4  # bytes of text in a byte as it is stored, until a wave has told
MORE = 1.1  # than is expected to be enough
MOST_CUTTING = 1 << 12  # tasks


class Share(NamedTuple):
    """What a task reads: files, and where it stops in the last of them."""

    files: list[File]
    last_bytes: int | None = None  # of text, from the last file; None: all of it


def listed(config: ConfigDict) -> dict[str, Listing]:
    """The files of each subset that has some, in the order in which they are dealt out.

    Raises ConfigError for a source without files; reads none.
    """
    found = {}
    for name, chosen in sorted(config.subsets.items()):
        if recipe.kind_of(chosen.source)[0] != "seqio":
            files = _of_dumps(iter_files(chosen.source, follow_links=chosen.follow_links), name, chosen)
            found[name] = Listing(files, chosen, seed=config.seed, part_bytes=config.part_bytes)
    return found


def settled(config: ConfigDict, listing: dict[str, Listing]) -> ConfigDict:
    """The recipe with a number for each `tasks` that it leaves open: a function of it and of the files."""
    config = config.copy_and_resolve_references().unlock()
    for name, chosen in config.subsets.items():
        if not chosen.tasks:
            chosen.tasks = listing[name].num_tasks(chosen, config.part_bytes) if name in listing else 1
    return config.lock()


def _of_dumps(files: Iterator[File], name: str, chosen: ConfigDict) -> Iterator[File]:
    """Those of the dumps that are asked for, by their paths."""
    if not chosen.dumps:
        yield from files
        return
    first, last = chosen.dumps
    number = found = 0
    for number, file in enumerate(files, 1):  # noqa: B007
        if not (dump := dump_of(file)):
            where = f"subsets.{name}.dumps: {shown_name(file.name)}"
            raise ConfigError(f"{where} names no dump in its path: leave dumps out")
        if first <= dump <= last:
            found += 1
            yield file
    if not found:
        raise ConfigError(f"subsets.{name}.dumps={chosen.dumps}: none of its {number:,} files is of those")


def summary(listing: dict[str, Listing]) -> dict[str, dict[str, Any]]:
    """Of each subset the number of its files, their bytes, and a digest of their names and sizes."""
    return {name: files.summary() for name, files in listing.items()}


def deal(config: ConfigDict, out: Path, engine: Engine, listing: dict[str, Listing]) -> dict[str, dict[str, Any]]:
    """Deals out what has been listed, and finds where each subset that has a limit ends; returns the summary.

    Those that have been dealt out in an earlier attempt stay as they are: what is of other files by now has been
    removed before (made.py), or it is a ConfigError.
    """
    inputs, began = summary(listing), _folder(out) / "summary.json"
    if not began.exists():
        shutil.rmtree(_folder(out) / "pieces", ignore_errors=True)  # of a listing that was not finished
        left = [name for name in inputs if not _share_of(out, name, config.subsets[name].tasks - 1).exists()]
        write_listing(config, out, {name: listing[name] for name in left})
        write_json(began, {name: inputs[name] for name in left})
    before = json.loads(began.read_bytes())
    if changed := [name for name, one in before.items() if inputs[name] != one]:
        raise ConfigError(
            f"--out={out}: the files of subset {changed[0]} have changed since they were dealt out "
            f"({before[changed[0]]} then, {inputs[changed[0]]} now): remove the folder and begin again"
        )
    listed_keys, measured_keys = (reads.view(config, keys).to_dict() for keys in (reads.LISTING, reads.MEASURING))
    task = functools.partial(cut, config=listed_keys, out=out)
    engine.run(Stage("cuts", len(list((_folder(out) / "pieces").glob("*.json"))), task))
    deal_out(config, out)
    for number, num_tasks in enumerate(_waves(config, out)):
        task = functools.partial(measure, number=number, config=measured_keys, out=out)
        engine.run(Stage(f"limits-{number}", num_tasks, task))
    return inputs


def share(out: Path, task: Task) -> Share:
    """What a task of reading, of text or of tokens, has been dealt."""
    found = json.loads(_share_of(out, task.subset, task.shard).read_bytes())
    return Share([File(*row) for row in found["files"]], found["last_bytes"])


def write_listing(config: ConfigDict, out: Path, listing: dict[str, Listing]) -> None:
    """Keeps the lists, in order, and says which files are to be cut into parts."""
    wanted = []
    for name, files in listing.items():
        with whole_file(_folder(out) / f"{name}.jsonl") as kept:
            for number, file in enumerate(files):
                kept.write(json.dumps(file).encode() + b"\n")
                found = parts.pieces(file, config.subsets[name], config.part_bytes)
                wanted += [[name, number, *file, *piece] for piece in found]
    num_tasks = min(len(wanted), MOST_CUTTING)
    for rank in range(num_tasks):
        write_json(_folder(out) / "pieces" / f"{rank:05d}.json", wanted[rank::num_tasks])


def cut(rank: int, *, config: dict[str, Any], out: Path) -> None:
    """A task: measures some pieces of large files."""
    whole, found = ConfigDict(config), []
    for name, number, *file, begin, end in json.loads((_folder(out) / "pieces" / f"{rank:05d}.json").read_bytes()):
        cuts = parts.measure(File(*file), whole.subsets[name], whole.part_bytes, begin, end)
        found.append([name, number, begin, cuts])
    write_json(_folder(out) / "cuts" / f"{rank:05d}.json", found)


def deal_out(config: ConfigDict, out: Path) -> None:
    """To each subset's tasks what they read, but where it has a limit."""
    for name, found in json.loads((_folder(out) / "summary.json").read_bytes()).items():
        num_shards, total = config.subsets[name].tasks, found["bytes"] + OPENING * found["files"]
        if not config.subsets[name].max_bytes and not _share_of(out, name, num_shards - 1).exists():
            _deal_out(out, name, _files_of(out, name), total, num_shards, None)


def _deal_out(
    out: Path, name: str, files: Iterable[File], total: int, num_shards: int, last_bytes: int | None
) -> None:
    """Neighbours to each task, of about the same size, of `total`; the last task's share is written last.

    Of the last of `files` so many bytes of text are read; None: all.
    """
    before = shard = 0
    own: list[File] = []
    for file in files:
        weight = file.size + OPENING
        wanted = min((before + weight // 2) * num_shards // total, num_shards - 1)
        while shard < wanted:
            _write_share(out, name, shard, own, None)
            shard, own = shard + 1, []
        own.append(file)
        before += weight
    if shard < num_shards - 1:  # those behind have nothing
        for other in range(shard + 1, num_shards - 1):
            _write_share(out, name, other, [], None)
        _write_share(out, name, shard, own, last_bytes)
        shard, own, last_bytes = num_shards - 1, [], None
    _write_share(out, name, shard, own, last_bytes)


def _write_share(out: Path, name: str, shard: int, files: list[File], last_bytes: int | None) -> None:
    write_json(_share_of(out, name, shard), {"files": files, "last_bytes": last_bytes})


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


def _files_of(out: Path, name: str) -> Iterator[File]:
    """In their order, large ones in their parts."""
    cuts = _cuts_of(out, name)
    with open(_folder(out) / f"{name}.jsonl", "rb") as lines:
        for number, line in enumerate(lines):
            file = File(*json.loads(line))
            pieces = [found for _, found in sorted(cuts.get(number, []))]
            yield from parts.of_pieces(file, pieces)


def _cuts_of(out: Path, name: str) -> dict[int, list[tuple[int, list[parts.Cut]]]]:
    """{number of a file: [(begin, cuts) of each of its pieces]} of those that are large."""
    found: dict[int, list[tuple[int, list[parts.Cut]]]] = {}
    for path in sorted((_folder(out) / "cuts").glob("*.json")):
        for subset, number, begin, cuts in json.loads(path.read_bytes()):
            if subset == name:
                found.setdefault(number, []).append((begin, [parts.Cut(*one) for one in cuts]))
    return found


# ---- limits ----------------------------------------------------------------------------------------------------------


def _waves(config: ConfigDict, out: Path) -> Iterator[int]:
    """The tasks of each wave, whose files are dealt to them, until it is known where each limit is: those subsets are
    dealt out then."""
    names = sorted(json.loads((_folder(out) / "summary.json").read_bytes()))
    limits = {name: config.subsets[name].max_bytes for name in names if config.subsets[name].max_bytes}
    files = {name: _Known(_files_of(out, name)) for name in limits}
    left_out: dict[str, set[str]] = {name: set() for name in limits}
    sizes: dict[str, list[int]] = {name: [] for name in limits}
    number = 0
    while limits:
        wave = {name: _next(files[name], sizes[name], limit) for name, limit in limits.items()}
        folder = _folder(out) / "waves" / str(number)
        rows = [(name, i, *files[name].files[i]) for name, (start, stop) in wave.items() for i in range(start, stop)]
        num_tasks = min(len(rows), sum(config.subsets[name].tasks for name in wave))
        for rank in range(num_tasks):
            write_json(folder / "files" / f"{rank:05d}.json", rows[rank::num_tasks])
        yield num_tasks
        for name, (start, stop) in wave.items():
            sizes[name] += [0] * (stop - start)
        for rank in range(num_tasks):
            for name, found in json.loads((folder / "sizes" / f"{rank:05d}.json").read_bytes()).items():
                for index, size in found.items():
                    sizes[name][int(index)] = size or 0
                    left_out[name] |= {files[name].files[int(index)].name} if size is None else set()
        for name, gone in left_out.items():  # whole, with the parts that could be read
            if gone:
                measured = zip(files[name].files, sizes[name], strict=False)
                sizes[name] = [0 if file.name in gone else size for file, size in measured]
        number += 1
        for name, limit in list(limits.items()):
            if sum(sizes[name]) > limit or files[name].at(len(sizes[name])) is None:
                num_files, last_bytes = _cut(sizes[name], limit)
                read = files[name].files[:num_files]
                total = sum(file.size + OPENING for file in read)
                _deal_out(out, name, read, total, config.subsets[name].tasks, last_bytes)
                del limits[name]


class _Known:
    """The files of a subset as far as they have been asked for."""

    def __init__(self, files: Iterator[File]):
        self.files: list[File] = []
        self._rest = files

    def at(self, index: int) -> File | None:
        """That with a number, None behind the last."""
        self.files += itertools.islice(self._rest, max(index + 1 - len(self.files), 0))
        return self.files[index] if index < len(self.files) else None


def _next(known: _Known, sizes: list[int], limit: int) -> tuple[int, int]:
    """The files behind those that are measured which should be enough: at least one."""
    stored, text = sum(file.size for file in known.files[: len(sizes)]), sum(sizes)
    ratio = text / stored if text and stored else PACKED
    wanted, stop = (limit - text) / ratio * (MORE if sizes else 1), len(sizes)
    while (file := known.at(stop)) and (wanted > 0 or stop == len(sizes)):
        wanted -= file.size
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
    found: dict[str, dict[str, int | None]] = {}
    for name, index, *row in json.loads((folder / "files" / f"{rank:05d}.json").read_bytes()):
        file, size = File(*row), None
        try:
            if file.name not in unreadable.names(out, name):
                size = _text_bytes(whole.subsets[name], name, file, out)
        except UnreadableError as error:
            unreadable.note(out, name, whole.subsets[name], [file], error)
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
