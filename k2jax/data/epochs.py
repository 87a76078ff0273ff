"""What a run is, and since which step: epochs/0001.json, 0002.json, ..., each its configuration and its manifest.

Epochs are only ever added, so the order stays what it was for every step that was made. Each has its own SHA-256 and
that of the one before it. One counts from the first checkpoint that names it: until then it is that of the launch at
work, and the next launch may put another in its place (run/directory.py).
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from k2jax import files
from k2jax.data.journal import HOW, Entry, ranges_of
from k2jax.data.manifest import check_manifest, manifest_digest, sha256_json
from k2jax.data.order import Order
from k2jax.errors import ConfigError, StorageError

FORMAT = 1
MAX_BYTES = 1 << 26  # of a file; K2's manifest has 20 kB


class Epoch(NamedTuple):
    """From the step after `after_step` on."""

    number: int  # from 1
    after_step: int
    run: str  # the run's own random name, hex: no two runs share one, whatever their folders are called
    config: dict[str, Any]  # as `config.to_dict` gives it
    manifest: dict[str, Any] | None  # None of imported weights, before a run on them
    changes: dict[str, list[Any]]  # {key: [before, now]} of what `allow_drift` let change
    origin: dict[str, Any] | None  # where the run comes from: {"kind": "import" or "fork", ...}
    previous: str | None  # digest of the epoch before
    time: str

    @property
    def digest(self) -> str:
        """SHA-256, hex: with `previous` in it, of all that the run has been."""
        return sha256_json(self._asdict())

    @property
    def name(self) -> dict[str, Any]:
        """By which checkpoints say to which epoch they belong."""
        return {"number": self.number, "digest": self.digest, "run": self.run}

    def is_as(self, other: "Epoch") -> bool:
        """Whether it says the same, perhaps at another time."""
        return self._replace(time="", run="") == other._replace(time="", run="")


def new_epoch(before: Sequence[Epoch], **values: Any) -> Epoch:
    """That which comes after those before it; `values` are its other fields."""
    previous = before[-1] if before else None
    defaults = {"changes": {}, "origin": None, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    if previous:
        defaults["run"] = previous.run
    return Epoch(**defaults | values, number=len(before) + 1, previous=previous and previous.digest)


def epoch_path(workdir: Path, number: int) -> Path:
    return workdir / "epochs" / f"{number:04d}.json"


def write_epoch(workdir: Path, epoch: Epoch) -> None:
    """Adds it to the run directory, whole."""
    values = {"format": FORMAT, "sha256": epoch.digest, **epoch._asdict()}
    files.write_json(epoch_path(workdir, epoch.number), values, sort_keys=True)


def has_epochs(workdir: Path) -> bool:
    """Whether a run has begun in the folder, or weights were imported into it."""
    return epoch_path(workdir, 1).exists()


def read_epochs(workdir: Path) -> list[Epoch]:
    """All of a run, each found whole and following from the one before it.

    Raises ConfigError when the folder is no run or an epoch is not what its digest says, StorageError when one cannot
    be read.
    """
    folder = workdir / "epochs"
    numbers = sorted(int(path.stem) for path in folder.glob("*.json") if re.fullmatch(r"\d{4}", path.stem))
    if not numbers:
        older = ": written by an older version of k2jax, use that one" if (workdir / "config.json").exists() else ""
        raise ConfigError(f"--workdir={workdir}: no run, there is no epochs/0001.json in it{older}")
    epochs: list[Epoch] = []
    for expected, number in enumerate(numbers, 1):
        if number != expected:
            raise ConfigError(f"{epoch_path(workdir, expected)} is missing: restore it from a copy")
        epochs.append(_read(epoch_path(workdir, number), epochs[-1] if epochs else None))
    return epochs


def _read(path: Path, previous: Epoch | None) -> Epoch:
    try:
        values = files.read_json(path, MAX_BYTES)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{path} has format {found}: this version of k2jax reads {FORMAT}")
    found = values.pop("sha256", None)
    del values["format"]
    if set(values) != set(Epoch._fields) or Epoch(**values).digest != found:
        raise ConfigError(f"{path} is damaged: it does not have the SHA-256 that it records: restore it from a copy")
    epoch = Epoch(**values)
    fine = type(epoch.after_step) is int and epoch.after_step >= 0 and isinstance(epoch.run, str)
    if not fine or not isinstance(epoch.config, dict) or not isinstance(epoch.changes, dict):
        raise ConfigError(f"{path}: its after_step, run, config or changes are none: restore it from a copy")
    if epoch.previous != (previous and previous.digest):
        before = f"that records {str(epoch.previous)[:12]} as the one before it"
        raise ConfigError(f"{path} is of another run, {before}: restore the folder from a copy")
    if epoch.manifest is not None:
        check_manifest(epoch.manifest, str(path))
    return epoch


def imported(epochs: Sequence[Epoch]) -> dict[str, Any] | None:
    """Of a run that began with imported weights, what the import recorded: source, files, config.json's values... It
    stands in the first epoch: of a run that trained on, and of its forks."""
    origins = [epoch.origin for epoch in epochs if epoch.origin and epoch.origin.get("kind") == "import"]
    of_run = ("kind", "eos_id", "tokenizer_sha256")
    return {key: value for key, value in origins[0].items() if key not in of_run} if origins else None


def order_of(epochs: Sequence[Epoch], journal: Sequence[Entry] = ()) -> Order:
    """The data order of a run. ConfigError where it has none, as of imported weights."""
    parts: list[list[Epoch]] = []  # of the same data, one after the other
    for epoch, following in zip(epochs, [*epochs[1:], None], strict=True):
        empty = following is not None and following.after_step <= epoch.after_step
        if epoch.manifest is None or empty:
            continue
        if parts and manifest_digest(parts[-1][-1].manifest) == manifest_digest(epoch.manifest):
            parts[-1].append(epoch)
        else:
            parts.append([epoch])
    order = None
    for part in parts:
        decided = [entry for entry in journal if entry.get("epoch") in {epoch.number for epoch in part}]
        order = Order(part[-1].manifest, decided, order, part[0].after_step if order else 0)
    if order is None:
        raise ConfigError("the run has no data: it is imported weights, on which nothing was trained yet")
    return order


def decide(
    epochs: Sequence[Epoch],
    journal: list[Entry],
    *,
    kind: str,
    ranges: Sequence[tuple[int, int]],
    at_step: int,
    by: str,
    why: str,
    **more: Any,
) -> Entry:
    """Makes the entry that skips or defers positions [a, b) of a run at step `at_step`; writes nothing.

    Args:
        kind: "skip", or "defer" to the end of the stage; "rollback", with "how" and the rest of it in `more`.
        ranges: one, or of a rollback several: whole steps of one stage, none read by steps 1 to `at_step`.
        at_step: the checkpoint from which the run goes on; 0 before the first step.

    Raises ConfigError if the positions do not fit.
    """
    assert kind == "rollback" or (kind in HOW and len(ranges) == 1), (kind, ranges)
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": by,
        "why": why,
        "kind": kind,
        "at_step": at_step,
        "epoch": epochs[-1].number,
        **({"ranges": [list(r) for r in ranges]} if kind == "rollback" else {"positions": list(ranges[0])}),
        **more,
    }
    before, after = order_of(epochs, journal), order_of(epochs, [*journal, entry])
    if not before.after_step <= at_step <= before.num_steps:
        raise ConfigError(
            f"at step {at_step}: the run's steps are {before.after_step + 1} to {before.num_steps}, "
            f"{before.after_step} is before them"
        )
    for a, b in ranges:
        rows_per_step = next(stage.rows_per_step for stage in before.stages if a < stage.stop_position)
        first_read = min(before.step_of_position(p) for p in range(a, b, rows_per_step))
        if first_read <= at_step:
            raise ConfigError(
                f"{kind} of positions {a}:{b} at step {at_step}: step {first_read} has read some of them: "
                f"name later ones, or go back to a checkpoint before step {first_read}"
            )
    return {**entry, "order_before": before.digest(), "order_after": after.digest()}


def check_journal(epochs: Sequence[Epoch], journal: Sequence[Entry]) -> None:
    """Refuses (ConfigError) a journal whose decisions are not those that were taken, in that order, on these epochs.

    That is: a decision before the last was edited or lost. The last one's loss shows only in what recorded the order
    after it: the checkpoints.
    """
    for i, entry in enumerate(journal):
        if "order_before" not in entry:
            continue
        known = [epoch for epoch in epochs if epoch.number <= entry["epoch"]]
        found = [order_of(known, journal[:n]).digest() for n in (i, i + 1)] if len(known) == entry["epoch"] else []
        if found != [entry["order_before"], entry["order_after"]]:
            raise ConfigError(
                f"journal entry {i + 1} was decided on data order {entry['order_before'][:12]} of epoch "
                f"{entry['epoch']}, and led to {entry['order_after'][:12]}; what is there gives "
                f"{' and '.join(d[:12] for d in found) or 'no such epoch'}: a line was edited or lost, or the epoch is "
                f"another one: restore journal.jsonl and epochs/ from a copy"
            )


def check_resume(
    epochs: Sequence[Epoch], journal: list[Entry], saved: dict[str, Any], number: int, order: Order, step: int
) -> None:
    """Refuses a checkpoint of `step` that was made under another data order than `order` is, up to there.

    Decisions taken since then are fine as long as they change only what comes after the step: the others would have
    the run read rows twice, or never. Raises ConfigError.

    Args:
        saved: the checkpoint's data part, whose "journal" says how many entries there were and "order" the digest.
        number: of its epoch.
    """
    then = order_of(epochs[:number], journal[: saved["journal"]])
    if then.digest() != saved["order"]:
        raise ConfigError(
            f"checkpoint {step}: made under data order {saved['order'][:12]}, the first {saved['journal']} journal "
            f"entries lead to {then.digest()[:12]}: bring journal.jsonl back from a copy"
        )
    if then.reads(step) != order.reads(step):
        late = [e for e in journal[saved["journal"] :] if ranges_of(e) and e["at_step"] < step]
        why = f"the journal's decision at step {late[0]['at_step']} changes" if late else "the data now change"
        raise ConfigError(
            f"checkpoint {step}: {why} rows that it has read: bring the journal back, or move checkpoints after the "
            f"decision to abandoned/"
        )
