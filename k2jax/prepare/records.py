"""Records out of one file, by its format: source and text, JSON lines, Parquet, Arrow. Web archives are in warc.py.

A reader gives (line, row or record; what is there or what is wrong with it), and goes on behind what is bad.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from k2jax.data.records import TOO_LONG, Bad, text_of
from k2jax.errors import ConfigError
from k2jax.prepare import python_corpus
from k2jax.prepare.files import DAMAGE, File, bounded_lines, opened
from k2jax.prepare.stored import Stored
from k2jax.prepare.tally import shown_name

ROWS = 256  # of Parquet, in memory at a time, or as few as are sure to take no more than
BATCH_BYTES = 64 << 20

Record = tuple[int, dict[str, Any] | Bad]  # line, row or record from 1, 0 for a file as a whole; what is there


def python_records(source: str, file: File, text_key: str) -> Iterator[Record]:
    with Stored(file.path) as raw:
        text = text_of(raw.readall(), 1 << 40)
    text = text if isinstance(text, Bad) else python_corpus.text_of(source, file.name, text)
    if text is None:
        text = Bad("no Python", "it cannot be parsed")
    yield 0, text if isinstance(text, Bad) else {text_key: text}


def text_records(file: File, most: int, text_key: str) -> Iterator[Record]:
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


def json_records(file: File, most: int) -> Iterator[Record]:
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


def parquet_records(file: File, columns: tuple[str, ...] | None, required: str | None) -> Iterator[Record]:
    if not file.size:
        yield 0, Bad("empty file")
        return
    with Stored(file.path) as raw:
        yield from _rows(file, columns, required, lambda wanted: _parquet_batches(raw, file, wanted))


def _parquet_batches(raw: Stored, part: File, wanted: Callable[[pa.Schema], list[str]]) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(raw, page_checksum_verification=True)
    names = wanted(file.schema_arrow)
    kinds = (file.schema_arrow.field(name).type for name in names)
    texts = [name for name, kind in zip(names, kinds, strict=True) if kind in (pa.string(), pa.binary())]
    encoded = pq.ParquetFile(raw, metadata=file.metadata, read_dictionary=texts, page_checksum_verification=True)
    for number in range(part.begin, part.end or file.num_row_groups):
        rows = _rows_at_once(file.metadata.row_group(number), names, encoded, number)
        yield from file.iter_batches(rows, row_groups=[number], columns=names)


def _rows_at_once(group: pq.RowGroupMetaData, names: list[str], encoded: pq.ParquetFile, number: int) -> int:
    """So few that they fit: by their mean size, and by the longest value of a dictionary, which rows can repeat."""
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    columns = {path: column for path, column in columns.items() if path.partition(".")[0] in names}
    largest = max((column.total_uncompressed_size // max(group.num_rows, 1) for column in columns.values()), default=0)
    for path, column in columns.items():
        if column.has_dictionary_page and column.total_uncompressed_size * ROWS > BATCH_BYTES:
            first = next(encoded.iter_batches(1, row_groups=[number], columns=[path]), None)
            if first is not None and pa.types.is_dictionary(first.column(0).type):
                longest = pc.max(pc.binary_length(first.column(0).dictionary)).as_py()
                largest = max(largest, longest or 0)
    return min(ROWS, max(BATCH_BYTES // max(largest, 1), 1))


def arrow_records(file: File, columns: tuple[str, ...] | None, required: str | None) -> Iterator[Record]:
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
    except (ValueError, OverflowError):  # a year behind 9999, or nanoseconds without pandas
        return [_value(one) for one in column]


def _value(one: pa.Scalar) -> Any:
    try:
        return one.as_py()
    except (ValueError, OverflowError) as error:
        return Bad("field out of range", str(error))
