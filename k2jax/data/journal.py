"""The journal: decisions that change a run after it began, one JSON object a line of journal.jsonl.

Every entry has "time" (ISO 8601, UTC), "by" (who or what decided), "why", "kind" and "at_step" (the step after which it
holds). Entries of kind "skip" and "defer" have "positions": [a, b) and change the order (order.py); they and
"allow_drift" have the order's digest before and after ("order_before", "order_after"). "import" says how a run on
imported weights differs from them, "abandon" which checkpoint was found damaged and moved away.
"""

import json
import os
from datetime import UTC, datetime
from typing import Any

from k2jax import files
from k2jax.data.order import Order
from k2jax.errors import ConfigError, StorageError

Entry = dict[str, Any]


def read_journal(path: str | os.PathLike) -> list[Entry]:
    """The entries of a journal, [] if there is no such file yet.

    Raises ConfigError naming the line that is damaged, StorageError if the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
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
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not a JSON object ({error}): restore the line from a copy") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        raise ConfigError(f'{where}: expected a JSON object with a "kind": restore the line from a copy')
    if entry["kind"] in ("skip", "defer"):
        positions = entry.get("positions")
        if not (isinstance(positions, list) and [type(p) for p in positions] == [int, int]):
            raise ConfigError(f'{where}: "positions" is {positions}: expected two whole numbers [a, b)')
    return entry


def append_entry(path: str | os.PathLike, entry: Entry) -> None:
    """Adds one entry, whole and flushed to the disk, or nothing; StorageError if it cannot."""
    line = json.dumps(entry, sort_keys=True).encode() + b"\n"
    try:
        files.append_line(path, line)
    except OSError as error:
        raise StorageError(f"cannot write the journal {path}: {error.strerror}") from error


def decide(
    manifest: dict[str, Any],
    journal: list[Entry],
    *,
    kind: str,
    positions: tuple[int, int],
    at_step: int,
    by: str,
    why: str,
) -> Entry:
    """Makes the entry that skips or defers positions [a, b) of a run at step `at_step`; writes nothing.

    Args:
        kind: "skip", or "defer" to the end of the stage.
        positions: whole steps of one stage, none of them read by steps 1 to `at_step`.
        at_step: the checkpoint from which the run goes on; 0 before the first step.

    Raises ConfigError if the positions do not fit.
    """
    assert kind in ("skip", "defer"), kind
    a, b = positions
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": by,
        "why": why,
        "kind": kind,
        "at_step": at_step,
        "positions": [a, b],
    }
    before, after = Order(manifest, journal), Order(manifest, [*journal, entry])
    if not 0 <= at_step <= before.num_steps:
        raise ConfigError(f"at step {at_step}: the run's steps are 1 to {before.num_steps}, 0 is before them")
    rows_per_step = next(stage.rows_per_step for stage in before.stages if a < stage.stop_position)
    first_read = min(before.step_of_position(p) for p in range(a, b, rows_per_step))
    if first_read <= at_step:
        raise ConfigError(
            f"{kind} of positions {a}:{b} at step {at_step}: step {first_read} has read some of them: "
            f"name later ones, or go back to a checkpoint before step {first_read}"
        )
    return {**entry, "order_before": before.digest(), "order_after": after.digest()}


def check_resume(journal: list[Entry], saved_order: str, order: Order, step: int) -> None:
    """Refuses a checkpoint of `step` that was made under another data order (digest `saved_order`).

    Decisions taken since then are fine as long as they change only what comes after the step: the others would
    have the run read rows twice, or never. Raises ConfigError.
    """
    if saved_order == order.digest():
        return
    since = next((i for i, entry in enumerate(journal) if entry.get("order_before") == saved_order), None)
    late = [] if since is None else [e for e in journal[since:] if "positions" in e and e["at_step"] < step]
    if since is None or late:
        why = (
            f"the journal's decision at step {late[0]['at_step']} changes rows that it has read"
            if late
            else (
                f"it has order {saved_order[:12]}, from which no entry of the journal leads to {order.digest()[:12]}"
            )
        )
        raise ConfigError(
            f"checkpoint {step}: made under another data order: {why}; bring the journal and the "
            f"manifest back, or move checkpoints after the decision to abandoned/"
        )


def check_journal(journal: list[Entry], order: Order) -> None:
    """Refuses (ConfigError) a journal whose digests do not lead to `order`, the one made from it.

    That is: a decision before the last was edited or lost, or the manifest is not the one it was made on.
    The last decision's loss shows only in what recorded the order's digest after it: the checkpoints.
    """
    links = [(i, e["order_before"], e["order_after"]) for i, e in enumerate(journal, 1) if "order_after" in e]
    expected = [before for _, before, _ in links[1:]] + [order.digest()]
    for (i, _, after), following in zip(links, expected, strict=False):
        if after != following:
            raise ConfigError(
                f"journal entry {i} leads to data order {after[:12]}, but what follows is {following[:12]}: "
                "a line was edited or lost, or the manifest has changed: restore both from a copy"
            )
