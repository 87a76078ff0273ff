"""From a step to the documents it read, and from a document to the steps that read it.

All of it follows from the run's epochs and journal and from the stores that their manifests name.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k2jax.bucket import BucketPath, at
from k2jax.data.conversations import ConversationRows
from k2jax.data.epochs import check_journal, order_of, read_epochs
from k2jax.data.journal import read_journal
from k2jax.data.launches import read_launches
from k2jax.data.loader import row_length
from k2jax.data.manifest import is_packed
from k2jax.data.order import Order, StagePlan
from k2jax.data.released import ReleasedRows, released_rows
from k2jax.data.store import Store, open_stores
from k2jax.data.tokenizer import load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError

Range = tuple[int, int]  # tokens [first, stop)


@dataclass(frozen=True)
class Run:
    """What a run directory says of its data, of all steps; `manifest` and `stores` are of its last epoch."""

    workdir: Path
    order: Order
    places: dict[str, str]  # {root digest: path} of stores that have moved since the manifest was made
    folder: str | os.PathLike | None = None  # where the stores are, by name, if the user says so
    released: ReleasedRows | None = None  # what steps read, in a release of the run

    @property
    def manifest(self) -> dict[str, Any]:
        return self.order.manifest

    @cached_property
    def stores(self) -> dict[str, Store]:
        """By name. Raises ConfigError, StorageError when one is not the manifest's or cannot be read."""
        return open_stores(self.manifest, folder=self.folder, places=self.places)

    @property
    def rows(self) -> dict[str, Store] | ReleasedRows:
        """What batches are read from: the stores, or in a release its own rows. Raises as `stores`."""
        return self.released or self.stores

    def of_step(self, step: int) -> "Run":
        """The same run with manifest and stores of the epoch that has the step."""
        order = self.order.of_step(step)
        return self if order is self.order else Run(self.workdir, order, self.places, self.folder, self.released)

    def epochs(self) -> "list[Run]":
        """The same of each epoch with steps, the last one last."""
        earlier = self.of_step(self.order.after_step).epochs() if self.order.past else []
        return [*earlier, self]

    @property
    def subset_names(self) -> list[str]:
        """The names by subset index."""
        return sorted(self.manifest["stores"])


class DocumentPart(NamedTuple):
    """The tokens of a row that come from one document: where they are in the document and in the row."""

    index: int | None  # the document's number in the store; None of a release, which has no stores
    id: str
    source: str
    in_document: Range
    in_row: Range
    text: str | None  # None where it was not asked for


class RowOrigin(NamedTuple):
    """Where row number `row` of a step comes from."""

    row: int
    position: int
    subset: str
    epoch: int
    window: int
    documents: list[DocumentPart]


class Read(NamedTuple):
    """One reading of a part of a document; step and row are None if the journal skips it."""

    step: int | None
    row: int | None
    stage: str
    subset: str
    epoch: int
    window: int
    position: int
    in_document: Range
    in_row: Range


class DocumentReads(NamedTuple):
    """A document as it is in one store, and all that the run reads of it, in the order of the steps."""

    subset: str
    index: int
    source: str
    num_tokens: int
    held_out: bool
    reads: list[Read]


def open_run(workdir: str | os.PathLike | BucketPath, stores_folder: str | os.PathLike | None = None) -> Run:
    """Opens a run's data; with `stores_folder` the stores are looked for there, by name.

    Of a run in a release the rows are the release's, and no store is needed, unless a folder of stores is given.

    Raises ConfigError if journal, manifest and stores are not those of one run, StorageError if one of them
    cannot be read.
    """
    workdir = at(workdir)
    epochs, journal = read_epochs(workdir), read_journal(workdir / "journal.jsonl")
    check_journal(epochs, journal)
    released = None if stores_folder else released_rows(workdir)
    run = Run(workdir, order_of(epochs, journal), _places(workdir), stores_folder, released)
    _ = run.rows  # now, where a wrong one is an error of the command
    return run


def _places(workdir: Path) -> dict[str, str]:
    """{root digest: path} as the launches so far found them, the newest last."""
    return {digest: place for launch in read_launches(workdir) for digest, place in launch.get("stores", {}).items()}


def which_docs(run: Run, step: int, row: int | None = None, *, text: bool = False) -> list[RowOrigin]:
    """The documents that each row of a step (or one row of it) was cut from.

    A row is all that the step reads, with label_shift "next" its last target, too. `text` decodes the tokens
    with the run's tokenizer.json.

    Raises ConfigError for a step or row that the run does not have.
    """
    run, stage = run.of_step(step), run.order.stage_of_step(step)
    if row is not None and not 0 <= row < stage.rows_per_step:
        raise ConfigError(f"row {row}: the rows of step {step} are 0 to {stage.rows_per_step - 1}")
    decode = _decoder(run) if text else None
    positions, conversations = run.order.positions(step).tolist(), _conversations_of(run, stage.index)
    origins = []
    for number in range(stage.rows_per_step) if row is None else [row]:
        found = run.order.row(positions[number])
        subset = run.subset_names[found.subset]
        if conversations:
            parts = _conversations_in_row(run, conversations, positions[number], decode)
        elif run.released:
            parts = _parts_released(run, step, number, decode)
        else:
            parts = _parts_in_store(run, run.stores[subset], found.window * stage.sequence_length, step, decode)
        origins.append(RowOrigin(number, positions[number], subset, found.epoch, found.window, parts))
    return origins


def _conversations_of(run: Run, stage: int) -> ConversationRows | None:
    """Of an sft stage; None of one of windows, and of a release, which says itself what its rows hold."""
    if run.released or not is_packed(run.manifest["stages"][stage]):
        return None
    return ConversationRows(run.manifest, stage, run.stores)


def _conversations_in_row(run: Run, rows: ConversationRows, position: int, decode: Any) -> list[DocumentPart]:
    [(name, _, placed)] = rows.placed(run.order.rows(np.array([position])))
    store, parts = run.stores[name], []
    for index, begin, start, length in zip(placed.document, placed.begin, placed.start, placed.length, strict=True):
        document = store.document(int(index))
        words = decode(store.read([begin], length)[0].tolist()) if decode else None
        places = (0, int(length)), (int(start), int(start + length))
        parts.append(DocumentPart(int(index), document["id"], document["source"], *places, words))
    return parts


def _parts_in_store(run: Run, store: Store, start: int, step: int, decode: Any) -> list[DocumentPart]:
    length = row_length(run.order.stage_of_step(step).sequence_length, run.manifest["label_shift"])
    tokens = store.read([start], length)[0].tolist() if decode else []
    parts = []
    for span in store.documents_in(start, start + length):
        document = store.document(span.index)
        in_row = (span.start - start, span.stop - start)
        in_document = (span.start - document["start"], span.stop - document["start"])
        words = decode(tokens[slice(*in_row)]) if decode else None
        parts.append(DocumentPart(span.index, document["id"], document["source"], in_document, in_row, words))
    return parts


def _parts_released(run: Run, step: int, row: int, decode: Any) -> list[DocumentPart]:
    stage = run.order.stage_of_step(step)
    length = row_length(stage.sequence_length, run.manifest["label_shift"])
    tokens = run.released.read(step, np.array([row]), stage.rows_per_step, length)[0].tolist() if decode else []
    parts = []
    for one in run.released.documents(step, row, stage.rows_per_step):
        start, stop, skipped = one["start"], one["stop"], one["start_in_document"]
        words = decode(tokens[start:stop]) if decode else None
        in_document = (skipped, skipped + stop - start)
        parts.append(DocumentPart(None, one["id"], one["source"], in_document, (start, stop), words))
    return parts


def _decoder(run: Run) -> Any:
    path = run.workdir / "tokenizer.json"
    tokenizer, found = load_tokenizer(path), tokenizer_sha256(path)
    expected = run.manifest["tokenizer_sha256"]
    if found != expected:
        found, expected = found[:12], expected[:12]
        raise ConfigError(f"{path} has SHA-256 {found}, the stores were made with {expected}: restore it")
    return tokenizer.decode


def which_steps(run: Run, document_id: str) -> list[DocumentReads]:
    """Every reading of every document with this id (SHA-256, hex, of its text), in all stores.

    Raises ConfigError if no store has it.
    """
    found: dict[tuple[str, str, int], DocumentReads] = {}
    there: dict[str, list[int]] = {}  # by root digest: epochs share stores
    for part in run.epochs():
        for name in part.subset_names:
            store = part.stores[name]
            if store.root_digest not in there:
                there[store.root_digest] = store.find_documents(document_id)
            for index in there[store.root_digest]:
                document = store.document(index)
                start, num_tokens = document["start"], document["num_tokens"]
                held_out = start >= store.num_train_tokens
                whole = DocumentReads(name, index, document["source"], num_tokens, held_out, [])
                reads = found.setdefault((name, store.root_digest, index), whole).reads
                reads += _reads(run, part, name, start, start + num_tokens)
                reads += _reads_of_conversation(run, part, name, index)
    if not found:
        names = sorted({name for part in run.epochs() for name in part.subset_names})
        raise ConfigError(f"document {document_id}: none of the stores {', '.join(names)} has it")
    for document in found.values():
        document.reads.sort(key=lambda read: (read.step is None, read.step or 0, read.position))
    return list(found.values())


def _reads(run: Run, part: Run, subset: str, start: int, stop: int) -> list[Read]:
    """All readings of tokens [start, stop) of a store under the manifest of one part of a run."""
    reads, order = [], part.order
    for stage, plan in zip(part.manifest["stages"], order.stages, strict=True):
        windows = {entry["name"]: entry["windows"] for entry in stage["subsets"]}.get(subset, 0)
        windows = 0 if is_packed(stage) else windows
        stride = plan.sequence_length  # from a window to the next
        length = row_length(stride, part.manifest["label_shift"])
        first = max(0, (start - length) // stride + 1)
        for window in range(first, min(windows, (stop - 1) // stride + 1)):
            begin = window * stride
            a, b = max(start, begin), min(stop, begin + length)
            for position in order.find(plan.index, part.subset_names.index(subset), window):
                places = ((a - start, b - start), (a - begin, b - begin))
                reads += _read_at(run, part, plan, subset, position, places)
    return reads


def _reads_of_conversation(run: Run, part: Run, subset: str, document: int) -> list[Read]:
    """All readings of a document of a store by the sft stages of one part of a run."""
    reads, number = [], part.subset_names.index(subset)
    for stage, plan in zip(part.manifest["stages"], part.order.stages, strict=True):
        of = {entry["name"]: entry for entry in stage["subsets"]}.get(subset)
        if of is None or not is_packed(stage):
            continue
        rows = ConversationRows(part.manifest, plan.index, part.stores)
        for epoch in range(of["rows"] // of["windows"] + 2):  # one more where the stage goes on after a change
            window = rows.window_of(subset, document, epoch)
            positions = [] if window is None else part.order.find(plan.index, number, window)
            for position in (p for p in positions if part.order.row(p).epoch == epoch):
                [(_, _, placed)] = rows.placed(part.order.rows(np.array([position])))
                [at] = np.flatnonzero(placed.document == document)
                start, length = int(placed.start[at]), int(placed.length[at])
                reads += _read_at(run, part, plan, subset, position, ((0, length), (start, start + length)))
    return reads


def _read_at(
    run: Run, part: Run, plan: StagePlan, subset: str, position: int, places: tuple[Range, Range]
) -> list[Read]:
    """What stands at a position is read; not where the data had changed before its turn: the next part has that."""
    step = run.order.step_of_position(position)
    if step is None and part.order.step_of_position(position) is not None:
        return []
    # The journal moves whole steps, so a row keeps its place in its step.
    row = None if step is None else (position - plan.first_position) % plan.rows_per_step
    found = part.order.row(position)
    return [Read(step, row, plan.name, subset, found.epoch, found.window, position, *places)]
