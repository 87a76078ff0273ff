"""The journal: decisions that change a run after it began, one JSON object a line of journal.jsonl.

Every entry has "time" (ISO 8601, UTC), "by" (who or what decided), "why", "kind" and "at_step" (the step after which it
holds). Those of kind "skip" and "defer" have "positions": [a, b) of an "epoch", change the order (order.py), and
have the order's digest before and after ("order_before", "order_after"). So has "rollback", which goes back to
`at_step`: its "ranges" of positions are skipped or deferred as "how" says, and what came after that step is in
branches/ under the number "branch" (run/branches.py). "helped" says that it did; "no_update" which step changed
nothing; "abandon" which checkpoint was found damaged and moved away. A change of configuration or data is no entry but
an epoch (epochs.py).
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from k2jax import files
from k2jax.errors import ConfigError, StorageError

Entry = dict[str, Any]
MAX_BYTES = 1 << 26
HOW = ("skip", "defer")


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
    if entry["kind"] in ("skip", "defer", "rollback"):
        key = "ranges" if entry["kind"] == "rollback" else "positions"
        found = entry.get(key)
        ranges = found if key == "ranges" else [found]
        pairs = isinstance(ranges, list) and all(isinstance(r, list) and [*map(type, r)] == [int, int] for r in ranges)
        if not pairs:
            raise ConfigError(f'{where}: "{key}" is {found}: expected two whole numbers [a, b)')
        if entry["kind"] == "rollback" and (type(entry.get("branch")) is not int or entry.get("how") not in HOW):
            raise ConfigError(f'{where}: expected the number of a "branch" and "how", one of {", ".join(HOW)}')
        numbers = all(type(entry.get(key)) is int for key in ("epoch", "at_step"))
        if not numbers or not all(isinstance(entry.get(key), str) for key in ("order_before", "order_after")):
            raise ConfigError(
                f'{where}: expected "epoch", "at_step", "order_before" and "order_after": tools/journal.py writes them'
            )
    return entry


def ranges_of(entry: Entry) -> list[tuple[int, int]]:
    """The positions [a, b) that an entry skips or defers; none of one that leaves the order as it is."""
    if entry["kind"] == "rollback":
        return [(a, b) for a, b in entry["ranges"]]
    return [(entry["positions"][0], entry["positions"][1])] if entry["kind"] in HOW else []


def in_force(journal: Sequence[Entry], step: int) -> list[Entry]:
    """The entries that held when a step was made which the run still has: what came after it is not among them."""
    back = max((i for i, e in enumerate(journal) if e["kind"] == "rollback" and e["at_step"] < step), default=-1)
    return [*journal[: back + 1], *(entry for entry in journal[back + 1 :] if entry["at_step"] < step)]


def append_entry(path: str | os.PathLike, entry: Entry) -> None:
    """Adds one entry, whole and flushed to the disk, or nothing; StorageError if it cannot."""
    line = json.dumps(entry, sort_keys=True).encode() + b"\n"
    try:
        files.append_line(path, line)
    except OSError as error:
        raise StorageError(f"cannot write the journal {path}: {error.strerror}") from error
