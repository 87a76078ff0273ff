"""The stage that reads: documents of every subset, cleaned by the subset's rules, counted, whole or not at all.

A task writes, below OUT/stages/clean: documents/, index/, removed/ and, where evaluation sets are named,
contamination/, where files of it are left out, left-out/ with their names; last tally/, which marks it complete. Killed
and run again, it gives the same bytes.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.errors import UnreadableError
from k2jax.files import whole_file, write_json
from k2jax.prepare import dealing, reads, recipe
from k2jax.prepare.documents import write_documents
from k2jax.prepare.engine.engine import Stage
from k2jax.prepare.rules import contamination, rules
from k2jax.prepare.rules.rules import Rule
from k2jax.prepare.sources import unreadable
from k2jax.prepare.sources.files import list_files
from k2jax.prepare.sources.listing import Listing
from k2jax.prepare.sources.read import check_first_rows, documents
from k2jax.prepare.tally import Tally

SAMPLE_CHARACTERS = 2000  # kept of a removed document
EDITED_CHARACTERS = SAMPLE_CHARACTERS + 1000  # an address that is cut in two looks like none
GROUP, GROUP_BYTES = 64, 1 << 24  # documents that a scorer gets at once, and about their text
INDEX = pa.schema(
    {
        "id": pa.binary(32),
        "subset": pa.string(),
        "source": pa.string(),
        "dump": pa.string(),
        "num_bytes": pa.int64(),
    }
)
INDEX_ROWS = 1 << 14  # written at a time


def stages(config: ConfigDict, out: str | Path, again: Callable[[str, list[int]], None]) -> Iterator[Stage]:
    """The index of evaluation sets, if any are named, and the cleaning of what was dealt (dealing.py).

    That comes again for tasks that had read a part of a file when another task found that it cannot be read, after
    `again(stage, ranks)`: each is to have run before the next is asked for.
    """
    out = Path(out)
    cleaning = reads.view(config, reads.with_units(reads.CLEANING, config)).to_dict()
    clean_all = Stage(
        "clean", len(recipe.tasks(config)), functools.partial(clean_task, config=cleaning, out=out)
    )
    if config.contamination.sources:
        searching = reads.view(config, reads.with_units(reads.EVALUATION, config), ()).to_dict()
        yield Stage("contamination", 1, functools.partial(contamination.build, config=searching, out=out))
    yield clean_all
    while ranks := _outdated(config, out):
        again("clean", ranks)
        yield clean_all


def _outdated(config: ConfigDict, out: Path) -> list[int]:
    """The tasks that left out other files of theirs than are noted now that all have ended."""
    folder = out / "stages" / "clean" / "left-out"
    told = set(os.listdir(folder)) if folder.is_dir() else set()
    noted = {name: unreadable.names(out, name) for name in recipe.names(config)}
    if not told and not any(noted.values()):
        return []
    found = []
    for rank, task in enumerate(recipe.tasks(config)):
        path = folder / f"{rank:05d}.json"
        if noted[task.subset] or path.name in told:
            files = dealing.share(out, task).files
            wanted = sorted({file.name for file in files} & noted[task.subset])
            found += [rank] if wanted != (json.loads(path.read_bytes()) if path.name in told else []) else []
    return found


def check(config: ConfigDict) -> dict[str, Listing]:
    """The files of each subset, listed.

    Raises ConfigError for a source without files, a rule whose file or package is missing, or a text that no row of a
    subset's first file has; reads no more than the rows that it begins with.
    """
    for source in config.contamination.sources:
        list_files(source)
    if config.contamination.sources:
        contamination.units_of(config)
    for name in recipe.names(config):
        rules.build(config.subsets[name])
    listed = dealing.listed(config)
    for name in recipe.names(config):
        with contextlib.suppress(UnreadableError):  # told, or left out, by the stage that reads
            check_first_rows(config.subsets[name], name, listed[name].first())
    return listed


def clean(
    found: Iterable[Document],
    steps: list[Rule],
    *,
    tally: Tally,
    keep_removed: Callable[[Document, str, str], None],
) -> Iterator[Document]:
    """The documents that pass every step, edited; their ids are of the edited texts.

    `keep_removed(document, step, reason)` gets each that does not.
    """
    passed = ((one, len(one.text.encode())) for one in found)
    for rule in steps:
        passed = _passed(passed, rule, tally, keep_removed)
    for one, size in passed:
        tally.kept(size, one.metadata.get("language", ""), one.metadata.get("licence", ""))
        yield one


def _passed(
    found: Iterable[tuple[Document, int]], rule: Rule, tally: Tally, keep_removed: Callable[[Document, str, str], None]
) -> Iterator[tuple[Document, int]]:
    """The documents that pass one step, with the bytes of their texts."""
    for one, size in _scored(found, rule.together) if rule.together else found:
        before = one.text
        tally.saw(rule.step, size)
        if reason := rule.apply(one):
            tally.removed(rule.step, reason, size)
            keep_removed(one, rule.step, reason)
            continue
        if one.text != before:
            data = one.text.encode()
            size, one.id = len(data), hashlib.sha256(data).hexdigest()
        yield one, size


def _scored(
    found: Iterable[tuple[Document, int]], together: Callable[[list[Document]], None]
) -> Iterator[tuple[Document, int]]:
    """The same documents, a few at a time: so many, or so much text."""
    group: list[tuple[Document, int]] = []
    for pair in found:
        group.append(pair)
        if len(group) == GROUP or sum(size for _, size in group) > GROUP_BYTES:
            together([one for one, _ in group])
            yield from group
            group = []
    if group:
        together([one for one, _ in group])
        yield from group


def clean_task(rank: int, *, config: dict[str, Any] | ConfigDict, out: str | Path) -> None:
    """Task `rank` of recipe.tasks(config): reads, cleans and writes its documents.

    A file that cannot be read is left out where the subset allows it, and the task begins again without it. Raises
    ConfigError and StorageError as `read` does; nothing is then left that looks complete.
    """
    config = ConfigDict(config)
    task = recipe.task(config, rank)
    dealt = dealing.share(Path(out), task)
    while True:
        try:
            return _clean_share(rank, task.subset, dealt, config, Path(out))
        except UnreadableError as error:
            unreadable.note(Path(out), task.subset, config.subsets[task.subset], dealt.files, error)


def _clean_share(rank: int, name: str, dealt: dealing.Share, config: ConfigDict, out: Path) -> None:
    folder, tally, chosen = out / "stages" / "clean", Tally(), config.subsets[name]
    files = unreadable.others(out, name, dealt.files, tally)
    is_whole = files[-1:] == dealt.files[-1:]  # else the file that a limit cuts is left out
    check_of: contamination.Contamination | None = None
    steps = rules.build(chosen, tally)
    removed = _Removed(config.removed_samples, rules.edits(chosen))
    if config.contamination.sources:
        remove, units = config.contamination.remove, contamination.units_of(config)
        check_of = contamination.Contamination(contamination.folder_of(out), remove=remove, units=units)
        steps.append(Rule("contamination", check_of.apply))
    with contextlib.ExitStack() as stack:
        raw = documents(
            chosen,
            files,
            name=name,
            tally=tally,
            last_bytes=dealt.last_bytes if is_whole else None,
            keep_removed=removed.keep,
            render=stack.enter_context(dealing.rendering(out, chosen)),
        )
        found = clean(raw, steps, tally=tally, keep_removed=removed.keep)
        index = stack.enter_context(_index(folder / "index" / f"{rank:05d}.parquet"))
        write_documents(folder / "documents" / f"{rank:05d}.jsonl.zst", map(index, found))
    write_documents(folder / "removed" / f"{rank:05d}.jsonl.zst", removed.documents)
    left_out, told = {file.name for file in dealt.files} - {file.name for file in files}, folder / "left-out"
    if left_out:
        write_json(told / f"{rank:05d}.json", sorted(left_out))
    else:
        (told / f"{rank:05d}.json").unlink(missing_ok=True)
    if check_of:
        write_json(folder / "contamination" / f"{rank:05d}.json", check_of.report())
    write_json(folder / "tally" / f"{rank:05d}.json", tally.to_json())


class _Removed:
    """The first documents that each step removed for each reason, cut to what a person reads.

    `edits` are done to them, whatever was before they were removed: a card must not show what a store would not.
    """

    def __init__(self, most: int, edits: list[Rule]):
        self.documents: list[Document] = []
        self._most, self._counts, self._edits = most, {}, edits

    def keep(self, one: Document, step: str, reason: str) -> None:
        count = self._counts[step, reason] = self._counts.get((step, reason), 0) + 1
        if count <= self._most:
            metadata = {**one.metadata, "step": step, "reason": reason}
            shown = Document(one.text[:EDITED_CHARACTERS], one.id, metadata=metadata)
            for rule in self._edits:
                rule.apply(shown)
            shown.text = shown.text[:SAMPLE_CHARACTERS]
            self.documents.append(shown)


@contextlib.contextmanager
def _index(path: Path) -> Iterator[Callable[[Document], Document]]:
    """Notes a row for each document that is handed through."""
    with whole_file(path) as file, pq.ParquetWriter(file, INDEX, compression="zstd") as writer:
        rows: list[tuple] = []

        def note(one: Document) -> Document:
            get = one.metadata.get
            rows.append((bytes.fromhex(one.id), get("subset"), get("source"), get("dump"), len(one.text.encode())))
            if len(rows) == INDEX_ROWS:
                _write_rows(writer, rows)
            return one

        yield note
        _write_rows(writer, rows)


def _write_rows(writer: pq.ParquetWriter, rows: list[tuple]) -> None:
    if rows:
        writer.write_table(pa.table([list(column) for column in zip(*rows, strict=True)], schema=INDEX))
        rows.clear()
