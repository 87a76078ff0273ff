"""Documents out of files: source trees and text, JSON lines, Parquet, Arrow, web archives.

What gives no document (bad JSON, bytes that are no UTF-8, a truncated file) is counted with its file and line, and
what stands before and after it is read. A file that cannot be read at all is an error: a corpus must not shrink
silently. Files are dealt to the tasks of a subset in an order that the seed draws.
"""

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.errors import ConfigError
from k2jax.prepare import python_corpus
from k2jax.prepare.documents import document
from k2jax.prepare.files import DAMAGE, File, Stored, bounded_lines, opened, place, shown_name
from k2jax.prepare.recipe import kind_of
from k2jax.prepare.tally import Tally

FIELDS = ("url", "id", "license", "licence", "date", "dump")  # kept of a record beside its text
ROWS = 256  # of Parquet, in memory at a time
IDS_WATCHED = 1 << 20  # of a file, for those seen before: 100 MB; later ones are not compared
TOO_LONG = "longer than max_line_bytes"
QUIET = ("not status 200", "no page")  # counted without a line each: most of a web archive
KeepRemoved = Callable[[Document, str, str], None]  # (document, step, reason)


class Bad(NamedTuple):
    """Input that gives no document: the reason it is counted under, and what was found."""

    reason: str
    what: str = ""


Record = tuple[int, dict[str, Any] | Bad]  # line, row or record from 1, 0 for a file as a whole; what is there


def documents(
    chosen: ConfigDict,
    files: list[File],
    *,
    name: str,
    shard: int,
    num_shards: int,
    tally: Tally,
    keep_removed: KeepRemoved | None = None,
) -> Iterator[Document]:
    """The documents of one task of subset `name`: those of its files, in their order.

    `max_bytes` is dealt out evenly: the task ends before the document that exceeds its part, counted as "over
    max_bytes". Documents shorter or longer than the subset's limits are removed here, in step "read"; with `extract`
    the upper limit is that of the text alone, not of the page. Raises ConfigError for a source without files or a
    text column, StorageError for a file that cannot be read.
    """
    room = chosen.max_bytes // num_shards + (shard < chosen.max_bytes % num_shards)
    longest = 0 if chosen.extract else chosen.max_document_bytes
    for file in files:
        seen: set[int] = set()
        for line, record in records(chosen.source, file, chosen=chosen):
            one = record if isinstance(record, Bad) else _document(record, chosen, name, file, line)
            if isinstance(one, Bad):
                _count(tally, one, file, line)
                continue
            size = len(one.text.encode())
            if chosen.max_bytes and size > room:
                tally.problem("over max_bytes", place(file, line), "reading stops here")
                return
            if _seen_before(one, seen):
                tally.problem("id seen before", place(file, line), f"{one.metadata['source_id'][:60]}; kept")
            tally.saw("read", size)
            if reason := size_problem(size, chosen.min_document_bytes, longest):
                tally.removed("read", reason, size)
                if keep_removed:
                    keep_removed(one, "read", reason)
                continue
            room -= size
            yield one


def size_problem(size: int, shortest: int, longest: int) -> str | None:
    """Why a document of so many bytes is left out; an empty one always is. `longest` 0 is no limit."""
    if size < max(shortest, 1):
        return "too short"
    return "too long" if longest and size > longest else None


def in_order(files: list[File], seed: int) -> list[File]:
    """Files in the order of a hash of their names, keyed by the seed: they are dealt out to tasks in turns."""
    key = hashlib.sha256(str(seed).encode()).digest()

    def rank(file: File) -> bytes:
        return hashlib.blake2b(file.name.encode("utf-8", "surrogateescape"), key=key).digest()

    return sorted(files, key=rank)


def records(source: str, file: File, *, chosen: ConfigDict, every_field: bool = False) -> Iterator[Record]:
    """What a file of the source holds, in its order, one by one; all columns if `every_field`, else those we keep."""
    kind, _ = kind_of(source)
    columns = None if every_field else (chosen.text_key, *FIELDS)
    if kind == "warc":
        from k2jax.prepare.warc import warc_records  # warcio is needed for these alone

        return warc_records(file, most=chosen.max_line_bytes, html_only=chosen.extract, text_key=chosen.text_key)
    if kind == "python":
        return _python_records(source, file, chosen.text_key)
    if kind == "text":
        return _text_records(file, chosen.max_line_bytes, chosen.text_key)
    if kind == "jsonl":
        return _json_records(file, chosen.max_line_bytes)
    required = None if every_field else chosen.text_key
    return (_parquet_records if kind == "parquet" else _arrow_records)(file, columns, required)


def text_of(value: Any, most: int) -> str | Bad:
    """The text, or why it is none."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return Bad("not UTF-8", f"byte {error.start}")
    if not isinstance(value, str):
        return Bad("text is no string", type(value).__name__)
    if "\0" in value:
        return Bad("NUL in the text", f"character {value.index(chr(0))}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        return Bad("half a surrogate pair", f"character {error.start}")
    return Bad(TOO_LONG, f"{size} bytes") if size > most else value


def _document(record: dict[str, Any], chosen: ConfigDict, name: str, file: File, line: int) -> Document | Bad:
    if chosen.text_key not in record:
        return Bad("no text", f"key {chosen.text_key!r} is missing")
    text = text_of(record[chosen.text_key], chosen.max_line_bytes)
    if isinstance(text, Bad):
        return text
    source = shown_name(file.name)
    metadata = {
        "subset": name,
        "source": f"{source}:{line}" if line else source,
        "url": _short(record.get("url")),
        "source_id": _short(record.get("id")),
        "licence": _short(record.get("license")) or _short(record.get("licence")) or chosen.licence,
        "date": _short(record.get("date")),
        "dump": _short(record.get("dump")) or chosen.dump or _dump_of(file),
    }
    return document(text, **{key: value for key, value in metadata.items() if value})


def _dump_of(file: File) -> str:
    """The dump of Common Crawl that a file's path names."""
    found = re.search(r"\bCC-MAIN-20\d\d-\d\d\b", file.path)
    return found.group() if found else ""


def _short(value: Any) -> str:
    """A record's field as one line; "" if it is nothing that names a document."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = ", ".join(value)  # several licences
    if isinstance(value, (datetime.date, datetime.datetime)):
        value = value.isoformat()
    return shown_name(str(value)) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""


def _seen_before(one: Document, seen: set[int]) -> bool:
    if "source_id" not in one.metadata:
        return False
    digest = xxhash.xxh3_64_intdigest(one.metadata["source_id"])
    if digest in seen:
        return True
    if len(seen) < IDS_WATCHED:
        seen.add(digest)
    return False


def _count(tally: Tally, bad: Bad, file: File, line: int) -> None:
    if bad.reason in QUIET:
        tally.bad[bad.reason] += 1
    else:
        tally.problem(bad.reason, place(file, line), bad.what)


def _python_records(source: str, file: File, text_key: str) -> Iterator[Record]:
    with Stored(file.path) as raw:
        text = text_of(raw.readall(), 1 << 40)
    text = text if isinstance(text, Bad) else python_corpus.text_of(source, file.name, text)
    if text is None:
        text = Bad("no Python", "it cannot be parsed")
    yield 0, text if isinstance(text, Bad) else {text_key: text}


def _text_records(file: File, most: int, text_key: str) -> Iterator[Record]:
    try:
        with opened(file) as stream:
            data = stream.read(most + 1)
    except DAMAGE as error:
        yield 0, _damaged(error)
        return
    if not data:
        yield 0, Bad("empty file")
    else:
        yield 0, {text_key: data} if len(data) <= most else Bad(TOO_LONG, f"{file.size} bytes on the storage")


def _json_records(file: File, most: int) -> Iterator[Record]:
    number = 0
    try:
        with opened(file) as stream:
            for number, line in bounded_lines(stream, most):
                if line is None:
                    yield number, Bad(TOO_LONG, f"more than {most} bytes")
                elif not line.isspace():
                    yield number, _json(line)
    except DAMAGE as error:
        yield number + 1, _damaged(error)
        return
    if not number:
        yield 0, Bad("empty file")


def _json(line: bytes) -> dict[str, Any] | Bad:
    try:
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:  # orjson refuses NaN, which many a tool writes, and half surrogate pairs
            value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", f"byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Bad("bad JSON", str(error))
    return value if isinstance(value, dict) else Bad("JSON that is no object", type(value).__name__)


def _damaged(error: Exception) -> Bad:
    return Bad("truncated file" if isinstance(error, EOFError) else "damaged file", f"{error}; what follows is lost")


def _parquet_records(file: File, columns: tuple[str, ...] | None, required: str | None) -> Iterator[Record]:
    if not file.size:
        yield 0, Bad("empty file")
        return
    with Stored(file.path) as raw:
        yield from _rows(file, columns, required, lambda wanted: _parquet_batches(raw, wanted))


def _parquet_batches(raw: Stored, wanted: Callable[[pa.Schema], list[str]]) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(raw, page_checksum_verification=True)
    yield from file.iter_batches(ROWS, columns=wanted(file.schema_arrow))


def _arrow_records(file: File, columns: tuple[str, ...] | None, required: str | None) -> Iterator[Record]:
    if not file.size:
        yield 0, Bad("empty file")
        return
    with Stored(file.path) as raw:
        yield from _rows(file, columns, required, lambda wanted: _arrow_batches(raw, wanted))


def _arrow_batches(raw: Stored, wanted: Callable[[pa.Schema], list[str]]) -> Iterator[pa.RecordBatch]:
    """Of a stream of batches, which Hugging Face writes, or of Arrow's file format."""
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    if is_file:
        reader = pa.ipc.open_file(raw)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = reader = pa.ipc.open_stream(raw)
    names = wanted(reader.schema)
    for batch in batches:
        yield from pa.Table.from_batches([batch]).select(names).to_batches(max_chunksize=ROWS)


def _rows(
    file: File,
    columns: tuple[str, ...] | None,
    required: str | None,
    batches: Callable[[Callable[[pa.Schema], list[str]]], Iterator[pa.RecordBatch]],
) -> Iterator[Record]:
    def wanted(schema: pa.Schema) -> list[str]:
        if required is not None and required not in schema.names:
            raise ConfigError(
                f"{shown_name(file.path)} has no column {required!r}, it has {', '.join(schema.names)}: name the "
                "column of the text as text_key"
            )
        return [name for name in schema.names if columns is None or name in columns]

    row = 0
    try:
        for batch in batches(wanted):
            values = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
            for i in range(batch.num_rows):
                row += 1
                yield row, {name: column[i] for name, column in values.items()}
    except (pa.ArrowException, OSError) as error:  # StorageError is none of these
        yield row + 1, _damaged(error)


def _values(column: pa.Array) -> list[Any]:
    """The column in Python's types; strings that are no UTF-8 stay bytes, to be counted one by one."""
    raw = column
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.cast(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    raw.validate(full=True)  # offsets of a damaged file would have it read outside of its memory
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return raw.to_pylist()
