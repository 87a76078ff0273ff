"""The stage that reads: documents of every subset, cleaned by the subset's rules, counted, whole or not at all.

One task deals the files to the others. Those write, below OUT/stages/clean: documents/, index/, removed/ and, where
evaluation sets are named, contamination/; last tally/, which marks one complete. Killed and run again, a task gives the
same bytes.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.data.manifest import sha256_json
from k2jax.files import whole_file, write_json
from k2jax.prepare import contamination, recipe, rules
from k2jax.prepare.chat import rows
from k2jax.prepare.documents import write_documents
from k2jax.prepare.engine import Stage
from k2jax.prepare.files import File, list_files
from k2jax.prepare.read import documents, in_order
from k2jax.prepare.rules import Rule
from k2jax.prepare.tally import Tally

SAMPLE_CHARACTERS = 2000  # kept of a removed document
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


def stages(config: ConfigDict, out: str | Path) -> list[Stage]:
    """The dealing of files to tasks, the index of evaluation sets, if any are named, and the cleaning."""
    at = {"config": config.to_dict(), "out": Path(out)}
    deal = Stage("files", 1, functools.partial(deal_files, **at))
    clean_all = Stage("clean", len(recipe.tasks(config)), functools.partial(clean_task, **at))
    if not config.contamination.sources:
        return [deal, clean_all]
    return [deal, Stage("contamination", 1, functools.partial(contamination.build, **at)), clean_all]


def check(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The files of each subset of text: their number, bytes, and a digest of their names and sizes.

    Raises ConfigError for a source without files, or a rule whose file or package is missing; reads no document.
    """
    for source in config.contamination.sources:
        list_files(source)
    found = {}
    for name in sorted({task.subset for task in recipe.tasks(config)}):
        rules.build(config.subsets[name])
        found[name] = _summary(list_files(config.subsets[name].source))
    return found


def _summary(files: list[File]) -> dict[str, Any]:
    names = [[file.name, file.size] for file in files]
    return {"files": len(files), "bytes": sum(file.size for file in files), "digest": sha256_json(names)}


def deal_files(_: int, *, config: dict[str, Any], out: Path) -> None:
    """A task: lists the sources once for all, so that no two tasks see different files; clean/files/<rank>.json."""
    whole, summary = ConfigDict(config), {}
    for rank, task in enumerate(recipe.tasks(whole)):
        if task.shard == 0:
            found = list_files(whole.subsets[task.subset].source)
            summary[task.subset], files = _summary(found), in_order(found, whole.seed)
        write_json(_files_of(out, rank), files[task.shard :: task.num_shards])
    write_json(out / "stages" / "clean" / "files" / "summary.json", summary)


def template_of(out: str | Path) -> Path:
    """The chat template that every task reads, as it was when the preparation began."""
    return Path(out) / "stages" / "chat_template.json"


def _files_of(out: Path, rank: int) -> Path:
    return out / "stages" / "clean" / "files" / f"{rank:05d}.json"


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
    for one in found:
        size = len(one.text.encode())
        for step, apply in steps:
            before = one.text
            tally.saw(step, size)
            if reason := apply(one):
                tally.removed(step, reason, size)
                keep_removed(one, step, reason)
                break
            if one.text != before:
                data = one.text.encode()
                size, one.id = len(data), hashlib.sha256(data).hexdigest()
        else:
            tally.kept(size, one.metadata.get("language", ""), one.metadata.get("licence", ""))
            yield one


def clean_task(rank: int, *, config: dict[str, Any] | ConfigDict, out: str | Path) -> None:
    """Task `rank` of recipe.tasks(config): reads, cleans and writes its documents.

    Raises ConfigError and StorageError as `read` does; nothing is then left that looks complete.
    """
    config, folder = ConfigDict(config), Path(out) / "stages" / "clean"
    name, shard, num_shards = recipe.tasks(config)[rank]
    chosen, tally = config.subsets[name], Tally()
    removed = _Removed(config.removed_samples)
    check_of: contamination.Contamination | None = None
    steps = rules.build(chosen)
    if config.contamination.sources:
        check_of = contamination.Contamination(contamination.folder_of(out), remove=config.contamination.remove)
        steps.append(Rule("contamination", check_of.apply))
    with contextlib.ExitStack() as stack:
        raw = documents(
            chosen,
            [File(*row) for row in json.loads(_files_of(Path(out), rank).read_bytes())],
            name=name,
            shard=shard,
            num_shards=num_shards,
            tally=tally,
            keep_removed=removed.keep,
            render=stack.enter_context(rows.rendering(template_of(out), chosen)) if chosen.conversations else None,
        )
        found = clean(raw, steps, tally=tally, keep_removed=removed.keep)
        index = stack.enter_context(_index(folder / "index" / f"{rank:05d}.parquet"))
        write_documents(folder / "documents" / f"{rank:05d}.jsonl.zst", map(index, found))
    write_documents(folder / "removed" / f"{rank:05d}.jsonl.zst", removed.documents)
    if check_of:
        write_json(folder / "contamination" / f"{rank:05d}.json", check_of.report())
    write_json(folder / "tally" / f"{rank:05d}.json", tally.to_json())


class _Removed:
    """The first documents that each step removed for each reason, cut to what a person reads."""

    def __init__(self, most: int):
        self.documents: list[Document] = []
        self._most, self._counts = most, {}

    def keep(self, one: Document, step: str, reason: str) -> None:
        count = self._counts[step, reason] = self._counts.get((step, reason), 0) + 1
        if count <= self._most:
            metadata = {**one.metadata, "step": step, "reason": reason}
            self.documents.append(Document(one.text[:SAMPLE_CHARACTERS], one.id, metadata=metadata))


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
