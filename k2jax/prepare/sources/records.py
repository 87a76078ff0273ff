"""Records out of one file, by its format: source and text, JSON lines, Parquet, Arrow. Web archives are in warc.py.

A reader gives (line, row or record; what is there or what is wrong with it), and goes on behind what is bad.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from k2jax.data.records import TOO_LONG, Bad, text_of
from k2jax.errors import ConfigError
from k2jax.prepare.sources import python_corpus
from k2jax.prepare.sources.encodings import UNKNOWN, UTF_8, as_utf8
from k2jax.prepare.sources.fields import Text, is_at, leaves, shown
from k2jax.prepare.sources.files import DAMAGE, File, as_stored, bounded_lines, opened, size_of
from k2jax.prepare.sources.stored import Stored
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


def text_records(
    file: File, most: int, text_key: str, encoding: str = "", encodings: Counter[str] | None = None
) -> Iterator[Record]:
    """A file of text as one record; `encodings` counts the encoding that it is in (encodings.py)."""
    try:
        with opened(file) as stored:
            stream, found = as_utf8(stored, encoding)
            data = stream.read(most + 1)
    except DAMAGE as error:
        yield 0, _damaged(error)
        return
    if not data:
        yield 0, Bad("empty file")
        return
    if encodings is not None:
        encodings[found] += 1
    if len(data) > most:
        yield 0, Bad(TOO_LONG, f"{file.size} bytes on the storage")
        return
    text = data if found == UTF_8 else _decoded(data, found)
    yield 0, text if isinstance(text, Bad) else {text_key: text}


def json_records(
    file: File, most: int, encoding: str = "", encodings: Counter[str] | None = None
) -> Iterator[Record]:
    """The lines of a file of JSON lines; `encodings` counts the encoding that it is in (encodings.py)."""
    number = 0
    try:
        with opened(file) as stored:
            stream, found = as_utf8(stored, encoding, begins=not file.begin)
            for number, line in bounded_lines(stream, most):
                if number == 1 and encodings is not None and not file.begin:
                    encodings[found] += 1
                if line is None:
                    yield number, Bad(TOO_LONG, f"more than {most} bytes")
                elif not line.isspace():
                    yield number, _json(line) if found == UTF_8 else _json_of(line, found)
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


def _json_of(line: bytes, encoding: str) -> dict[str, Any] | Bad:
    text = _decoded(line, encoding)
    return text if isinstance(text, Bad) else _json(line)


def _decoded(data: bytes, encoding: str) -> str | Bad:
    """Text that was of another encoding: what was none of it is no UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"character {len(data[: error.start].decode())}"
        return Bad("unknown encoding" if encoding == UNKNOWN else f"not {encoding}", where)


def _damaged(error: Exception) -> Bad:
    return Bad("truncated file" if isinstance(error, EOFError) else "damaged file", f"{error}; what follows is lost")


def parquet_records(file: File, columns: list[str] | None, text: Text | None) -> Iterator[Record]:
    """The rows of a table, of all columns or of those at paths (fields.py); ConfigError if it cannot give `text`."""
    if not size_of(file):
        yield 0, Bad("empty file")
        return
    with as_stored(file) as raw:
        yield from _rows(_parquet_batches(raw, file, columns, text))


def _parquet_batches(raw: Stored, file: File, columns: list[str] | None, text: Text | None) -> Iterator[pa.RecordBatch]:
    """Of a nested column no more is read than the paths lead to."""
    table = pq.ParquetFile(raw, page_checksum_verification=True)
    paths = _checked(file, table.schema_arrow, text)
    kinds = {table.schema.column(i).path: table.schema.column(i).physical_type for i in range(len(table.schema))}
    names = list(kinds)
    if columns is not None and len(paths) == len(names):
        names = [name for name, path in zip(names, paths, strict=True) if _is_wanted(path, columns)]
    texts = [name for name in names if kinds[name] == "BYTE_ARRAY"]
    encoded = pq.ParquetFile(raw, metadata=table.metadata, read_dictionary=texts, page_checksum_verification=True)
    for number in range(file.begin, file.end or table.num_row_groups):
        rows = _rows_at_once(table.metadata.row_group(number), names, encoded, number)
        yield from table.iter_batches(rows, row_groups=[number], columns=names)


def _rows_at_once(group: pq.RowGroupMetaData, names: list[str], encoded: pq.ParquetFile, number: int) -> int:
    """So few that they fit: by their mean size, and by the longest value of a dictionary, which rows can repeat."""
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    columns, num_rows = {name: columns[name] for name in names}, max(group.num_rows, 1)
    largest = max((column.total_uncompressed_size // num_rows for column in columns.values()), default=0)
    for name, column in columns.items():
        if column.has_dictionary_page and column.total_uncompressed_size * ROWS > BATCH_BYTES:
            longest = _longest(encoded.iter_batches(1, row_groups=[number], columns=[name]))
            largest = max(largest, longest * -(-column.num_values // num_rows))
    return min(ROWS, max(BATCH_BYTES // max(largest, 1), 1))


def _longest(batches: Iterator[pa.RecordBatch]) -> int:
    """The bytes of the longest value of a column's dictionary, which the first row with a value brings."""
    for batch in islice(batches, ROWS):
        values = batch.column(0)
        while not pa.types.is_dictionary(values.type):
            if not pa.types.is_nested(values.type):
                return 0
            values = values.field(0) if pa.types.is_struct(values.type) else values.flatten()
        if len(values.dictionary):
            return pc.max(pc.binary_length(values.dictionary)).as_py() or 0
    return BATCH_BYTES  # not known: one row at a time


def arrow_records(file: File, columns: list[str] | None, text: Text | None) -> Iterator[Record]:
    """The same of an Arrow file; nested columns are read whole."""
    if not size_of(file):
        yield 0, Bad("empty file")
        return
    with as_stored(file) as raw:
        yield from _rows(_arrow_batches(raw, file, columns, text))


def _arrow_batches(raw: Stored, file: File, columns: list[str] | None, text: Text | None) -> Iterator[pa.RecordBatch]:
    """Of a stream of batches, which Hugging Face writes, or of Arrow's file format."""
    is_file = raw.read(6) == b"ARROW1"
    raw.seek(0)
    if is_file:
        reader = pa.ipc.open_file(raw)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = reader = pa.ipc.open_stream(raw)
    _checked(file, reader.schema, text)
    names = [field.name for field in reader.schema if any(_is_wanted(path, columns) for path in leaves([field]))]
    for batch in batches:
        yield from pa.Table.from_batches([batch]).select(names).to_batches(max_chunksize=ROWS)


def _checked(file: File, schema: pa.Schema, text: Text | None) -> list[str]:
    """The path of each column; ConfigError if there is none for the text."""
    paths = list(leaves(schema))
    missing = text.missing(lambda wanted: any(is_at(path, wanted) for path in paths)) if text else []
    if missing:
        raise ConfigError(
            f"{shown_name(file.path)} has no column {missing[0]!r}, it has {shown(paths)}: name the column of the text "
            "as text_key, or those that it is made of in text"
        )
    return paths


def _is_wanted(path: str, columns: list[str] | None) -> bool:
    return columns is None or any(is_at(path, wanted) for wanted in columns)


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
    row = 0
    try:
        for batch in batches:
            values = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
            for i in range(batch.num_rows):
                row += 1
                yield row, {name: column[i] for name, column in values.items()}
    except (pa.ArrowException, OSError) as error:  # StorageError is none of these
        yield row + 1, _damaged(error)


def _values(column: pa.Array) -> list[Any]:
    """The column in Python's types; strings that are no UTF-8 stay bytes, to be counted one by one."""
    raw = column.cast(_binary(column.type))
    raw.validate(full=True)  # offsets of a damaged file would have it read outside of its memory
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(one) for one in raw]
    except (ValueError, OverflowError):  # a year behind 9999, or nanoseconds without pandas
        return [_value(one) for one in column]


def _binary(kind: pa.DataType) -> pa.DataType:
    """A type with bytes in place of the strings in it: whether those are UTF-8 is seen value by value."""
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_binary(kind.field(i).type)) for i in range(kind.num_fields)])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_binary(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_binary(kind.value_type)))
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    return binary[kind] if kind in binary else kind


def _value(one: pa.Scalar) -> Any:
    try:
        return one.as_py()
    except UnicodeDecodeError as error:  # of a map, whose parts no path leads to
        return Bad("not UTF-8", f"byte {error.start}")
    except (ValueError, OverflowError) as error:
        return Bad("field out of range", str(error))
