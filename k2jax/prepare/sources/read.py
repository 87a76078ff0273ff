"""Documents out of the records of a subset's files.

What gives no document (bad JSON, bytes that are no UTF-8, a truncated file) is counted with its file and line, and
what stands before and after it is read. A file that cannot be read at all is an error: a corpus must not shrink
silently.
"""

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import xxhash
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.data.records import Bad, text_of
from k2jax.errors import ConfigError
from k2jax.prepare.chat.rows import COLUMNS
from k2jax.prepare.documents import document
from k2jax.prepare.recipe import DUMP, ROW_KINDS, kind_of
from k2jax.prepare.rule_checks import FIELDS
from k2jax.prepare.sources.fields import Text, at, is_at, paths_of, seen, shown, text_by
from k2jax.prepare.sources.files import File, place
from k2jax.prepare.sources.records import (
    Record,
    arrow_records,
    json_records,
    parquet_records,
    python_records,
    text_records,
)
from k2jax.prepare.tally import Tally, clean_name, shown_name

ROWS_LOOKED_AT = 10_000  # of a subset's first file, for the keys of its text
MANY = 200  # keys of those rows that are looked through for a message
IDS_WATCHED = 1 << 20  # of a file, for those seen before: 100 MB; later ones are not compared
QUIET = ("not status 200", "no page")  # counted without a line each: most of a web archive
KeepRemoved = Callable[[Document, str, str], None]  # (document, step, reason)
RenderRow = Callable[[dict[str, Any], ConfigDict], tuple[str, dict[str, Any]] | Bad]  # (row, subset) to text, metadata


def documents(
    chosen: ConfigDict,
    files: list[File],
    *,
    name: str,
    tally: Tally,
    last_bytes: int | None = None,
    keep_removed: KeepRemoved | None = None,
    render: RenderRow | None = None,
) -> Iterator[Document]:
    """The documents of some files of subset `name`, in their order.

    `render` gives the text of a row, and more metadata, where rows are conversations: a row that is none is then a
    ConfigError that names file and row, unless the recipe says bad_rows="drop".

    `last_bytes` is the text that is taken from the last file: it ends before the document that exceeds that, counted as
    "over max_bytes". Documents shorter or longer than the subset's limits are removed here, in step "read"; with
    `extract` the upper limit is that of the text alone, not of the page. Raises ConfigError for a source without files
    or a text column, StorageError for a file that cannot be read.
    """
    longest = 0 if chosen.extract else chosen.max_document_bytes
    make = partial(_conversation, render=render) if render else partial(_document, text=_text(chosen))
    for number, file in enumerate(files, 1):
        room = last_bytes if number == len(files) else None
        seen: set[int] = set()
        for line, record in records(chosen.source, file, chosen=chosen, encodings=tally.encodings):
            line = line and line + file.first
            one = record if isinstance(record, Bad) else make(record, chosen, name, file, line)
            if isinstance(one, Bad):
                if render and chosen.conversations.bad_rows == "refuse":
                    raise ConfigError(_refusal(one, file, line))
                _count(tally, one, file, line)
                continue
            size = len(one.text.encode())
            reason = size_problem(size, chosen.min_document_bytes, longest)
            if not reason and room is not None and size > room:  # of what is left out anyway max_bytes counts nothing
                tally.problem("over max_bytes", place(file, line), "reading stops here")
                return
            for bad in (record[key] for key in FIELDS if isinstance(record.get(key), Bad)):
                tally.problem(bad.reason, place(file, line), f"{bad.what}; the document is kept without it")
            if _seen_before(one, seen):
                tally.problem("id seen before", place(file, line), f"{one.metadata['source_id'][:60]}; kept")
            tally.saw("read", size)
            if reason:
                tally.removed("read", reason, size)
                if keep_removed:
                    keep_removed(one, "read", reason)
                continue
            room = None if room is None else room - size
            yield one


def size_problem(size: int, shortest: int, longest: int) -> str | None:
    """Why a document of so many bytes is left out; an empty one always is. `longest` 0 is no limit."""
    if size < max(shortest, 1):
        return "too short"
    return "too long" if longest and size > longest else None


def records(
    source: str, file: File, *, chosen: ConfigDict, every_field: bool = False, encodings: Counter[str] | None = None
) -> Iterator[Record]:
    """What a file of the source holds, in its order, one by one; all columns if `every_field`, else those we keep.

    `encodings` counts files of text, and of JSON lines, by their encoding.
    """
    kind, _ = kind_of(source)
    conversations = bool(chosen.conversations) and not every_field
    if kind == "warc":
        from k2jax.prepare.sources.warc import warc_records  # warcio is needed for these alone

        return warc_records(file, most=chosen.max_line_bytes, html_only=chosen.extract, text_key=chosen.text_key)
    if kind == "python":
        return python_records(source, file, chosen.text_key)
    if kind == "text":
        return text_records(file, chosen.max_line_bytes, chosen.text_key, chosen.encoding, encodings)
    if kind == "jsonl":
        return json_records(file, chosen.max_line_bytes, chosen.encoding, encodings)
    text = None if every_field or conversations else _text(chosen)
    columns = [*COLUMNS] if conversations else [field.path for field in text.fields] if text else None
    if columns is not None:
        columns += [*FIELDS, *dict(chosen.field_keys).values()]
    return (parquet_records if kind == "parquet" else arrow_records)(file, columns, text)


def check_first_rows(chosen: ConfigDict, name: str, file: File) -> None:
    """Raises ConfigError where no row that a subset's first file begins with has a key that the recipe reads: those of
    the text, `field_keys`, and the URL of a block list. Of a table its columns say so."""
    kind, _ = kind_of(chosen.source)
    if kind not in ROW_KINDS or chosen.conversations:
        return
    text, moved, has, num_rows = _text(chosen), dict(chosen.field_keys), set(), 0
    others = [*moved.values(), *(["url"] if chosen.url_blocklist and "url" not in moved else [])]
    paths: dict[str, None] = {}
    for _, row in islice(records(chosen.source, file, chosen=chosen), ROWS_LOOKED_AT if kind == "jsonl" else 1):
        if isinstance(row, Bad):
            continue
        num_rows += 1
        if kind == "jsonl":
            has |= seen(row, [*(field.path for field in text.fields), *others])
        else:  # of whose columns those that are read are here, and for the text there are some
            has |= {field.path for field in text.fields} | {path for path in others if any(is_at(path, k) for k in row)}
        lacking = text.missing(has.__contains__) or [path for path in others if path not in has]
        if not lacking:
            return
        if len(paths) < MANY:
            paths |= dict.fromkeys(islice(paths_of(row), MANY))
    if num_rows:
        if kind != "jsonl":
            paths = dict.fromkeys(paths_of(next(records(chosen.source, file, chosen=chosen, every_field=True))[1]))
        key = "field_keys" if lacking[0] in others else "text_key, or those that it is made of as text"
        raise ConfigError(
            f"subsets.{name}: of the {num_rows:,} rows that {place(file, 0)} begins with none has {lacking[0]!r}, they "
            f"have {shown(paths)}: name the right one as {key}"
        )


def _text(chosen: ConfigDict) -> Text:
    return text_by(chosen.text_key, chosen.text)


def _document(
    record: dict[str, Any], chosen: ConfigDict, name: str, file: File, line: int, *, text: Text
) -> Document | Bad:
    found = text.of(record, chosen.max_line_bytes)
    return found if isinstance(found, Bad) else document(found, **_metadata(record, chosen, name, file, line))


def _conversation(
    record: dict[str, Any], chosen: ConfigDict, name: str, file: File, line: int, *, render: RenderRow
) -> Document | Bad:
    found = render(record, chosen)
    text = found if isinstance(found, Bad) else text_of(found[0], chosen.max_line_bytes)
    return text if isinstance(text, Bad) else document(text, **_metadata(record, chosen, name, file, line), **found[1])


def _refusal(bad: Bad, file: File, line: int) -> str:
    what = f" ({clean_name(bad.what)})" if bad.what else ""
    return f"{place(file, line)}: {bad.reason}{what}: correct the row or take it out, or set bad_rows='drop'"


def _metadata(record: dict[str, Any], chosen: ConfigDict, name: str, file: File, line: int) -> dict[str, str]:
    source = shown_name(file.name)
    if chosen.field_keys:
        record = record | {name: at(record, path) for name, path in chosen.field_keys}
    metadata = {
        "subset": name,
        "source": f"{source}:{line}" if line else source,
        "url": _short(record.get("url")),
        "source_id": _short(record.get("id")),
        "licence": _short(record.get("license")) or _short(record.get("licence")) or chosen.licence,
        "date": _short(record.get("date")),
        "dump": _short(record.get("dump")) or chosen.dump or dump_of(file),
    }
    return {key: value for key, value in metadata.items() if value}


def dump_of(file: File) -> str:
    """The dump of Common Crawl that a file's path names."""
    found = re.search(rf"\b{DUMP}\b", file.path)
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
