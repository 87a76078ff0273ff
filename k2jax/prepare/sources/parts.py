"""Large files in parts that several tasks can read: the same records by the same lines as of the whole file.

Parts depend on the file and on the recipe's `part_bytes` alone, not on the number of tasks: what is damaged in one ends
that part, whoever reads it. A file of JSON lines is cut at line ends, and lines are counted first, so that each part
knows how many stand before it; Parquet is cut between row groups. What is packed, of another encoding, or cannot be
read now stays whole.
"""

from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from k2jax.errors import UnreadableError
from k2jax.prepare.recipe import kind_of
from k2jax.prepare.sources.files import BLOCK, File, as_stored
from k2jax.prepare.sources.listing import num_parts
from k2jax.prepare.sources.packed import HEAD, is_text, packing
from k2jax.prepare.sources.stored import Stored


class Cut(NamedTuple):
    """Part of a file as it is measured: row groups or bytes [begin, end), and how many rows or line ends are in it."""

    begin: int
    end: int
    records: int
    size: int  # bytes on the storage


def pieces(file: File, chosen: ConfigDict, part_bytes: int) -> list[tuple[int, int]]:
    """The ranges of bytes of a file that are measured apart: [] of one that stays whole, the whole one of Parquet."""
    number = num_parts(file, chosen, part_bytes)
    if number < 2:
        return []
    if kind_of(chosen.source)[0] == "parquet":
        return [(0, file.size)]
    borders = [file.size * i // number for i in range(number + 1)]
    return list(zip(borders[:-1], borders[1:], strict=True))


def measure(file: File, chosen: ConfigDict, part_bytes: int, begin: int, end: int) -> list[Cut]:
    """The parts of a piece of a file; [] if the file is to stay whole."""
    try:
        if kind_of(chosen.source)[0] == "parquet":
            return _row_groups(file, part_bytes)
        return _lines(file, begin, end)
    except (UnreadableError, pa.ArrowException, OSError):
        return []  # told by the task that reads it


def _row_groups(file: File, part_bytes: int) -> list[Cut]:
    with as_stored(file) as raw:
        table = pq.ParquetFile(raw).metadata
    cuts: list[Cut] = []
    begin = rows = size = 0
    for number in range(table.num_row_groups):
        group = table.row_group(number)
        rows += group.num_rows
        size += sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if size >= part_bytes or number == table.num_row_groups - 1:
            cuts.append(Cut(begin, number + 1, rows, size))
            begin, rows, size = number + 1, 0, 0
    return cuts


def _lines(file: File, begin: int, end: int) -> list[Cut]:
    """From the first line that begins at `begin` or behind it to the last that begins before `end`."""
    with as_stored(file) as raw:
        head = raw.read(HEAD)
        if packing(head, file.path) is not None or not is_text(head):
            return []
        start = _line_start(raw, begin)
        stop = _line_start(raw, end) if end < file.size else file.size
        number, raw_at = 0, start
        raw.seek(start)
        while raw_at < stop:
            data = raw.read(min(BLOCK, stop - raw_at))
            if not data:
                return []  # shorter than it was listed: the task that reads it says so
            number, raw_at = number + data.count(b"\n"), raw_at + len(data)
    return [Cut(start, stop, number, stop - start)]


def _line_start(raw: Stored, at: int) -> int:
    """Where the first line begins that begins at `at` or behind it; the file's end where none does."""
    if not at:
        return 0
    raw.seek(at - 1)
    place = at - 1
    while data := raw.read(BLOCK):
        found = data.find(b"\n")
        if found >= 0:
            return place + found + 1
        place += len(data)
    return place


def of_pieces(file: File, pieces: list[list[Cut]]) -> list[File]:
    """The parts of a file, from what was measured of its pieces, in order; those without a line are none."""
    found, first = [], 0
    for one in (cut for cuts in pieces for cut in cuts):
        if one.begin < one.end:
            part = {"size": max(one.size, 1), "begin": one.begin, "end": one.end, "first": first, "whole": file.size}
            found.append(file._replace(**part))
        first += one.records
    return found if len(found) > 1 and all(pieces) else [file]
