"""The journal: decisions that change a run after it began, one JSON object a line of journal.jsonl.

Every entry has "time" (ISO 8601, UTC), "by" (who or what decided), "why", "kind" and "at_step" (the step after which it
holds). Entries of kind "skip" and "defer" have "positions": [a, b) of an "epoch", change the order (order.py), and have
the order's digest before and after ("order_before", "order_after"). "abandon" says which checkpoint was found damaged
and moved away. A change of configuration or data is no entry but an epoch (epochs.py).
"""

import json
import os
from typing import Any

from k2jax import files
from k2jax.errors import ConfigError, StorageError

Entry = dict[str, Any]
MAX_BYTES = 1 << 26


def read_journal(path: str | os.PathLike) -> list[Entry]:
    """The entries of a journal, [] if there is no such file yet.

    Raises ConfigError naming the line that is damaged, StorageError if the file cannot be read.
    """
    try:
        lines = files.read_bytes(path, MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read the journal {path}: {error.strerror}") from error
    entries = [_parse(line, f"journal {path}, line {i}") for i, line in enumerate(lines[:-1], 1)]
    if lines[-1]:
        raise ConfigError(
            f"journal {path}, line {len(lines)}: cut off, no line end: complete the line or take it out"
        )
    return entries


def _parse(line: bytes, where: str) -> Entry:
    entry = files.parse_json(line, where)
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise ConfigError(f'{where}: expected a JSON object with a "kind": restore the line from a copy')
    if entry["kind"] in ("skip", "defer"):
        positions = entry.get("positions")
        if not (isinstance(positions, list) and [type(p) for p in positions] == [int, int]):
            raise ConfigError(f'{where}: "positions" is {positions}: expected two whole numbers [a, b)')
        numbers = all(type(entry.get(key)) is int for key in ("epoch", "at_step"))
        if not numbers or not all(isinstance(entry.get(key), str) for key in ("order_before", "order_after")):
            raise ConfigError(
                f'{where}: expected "epoch", "at_step", "order_before" and "order_after": tools/journal.py writes them'
            )
    return entry


def append_entry(path: str | os.PathLike, entry: Entry) -> None:
    """Adds one entry, whole and flushed to the disk, or nothing; StorageError if it cannot."""
    line = json.dumps(entry, sort_keys=True).encode() + b"\n"
    try:
        files.append_line(path, line)
    except OSError as error:
        raise StorageError(f"cannot write the journal {path}: {error.strerror}") from error
