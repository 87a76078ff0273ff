"""The ledger: per step, the batch's digest, loss and gradient norm as exact bits; per checkpoint, a record that hashes
its steps and the record before it. Whoever holds a later record can check that nothing before it was changed.

Rows of metrics and ledger lie in one JSON-lines file per chunk, so that a resume drops what came after its checkpoint
by removing whole files and cutting one.
"""

import hashlib
import io
import itertools
import json
import operator
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from k2jax import files
from k2jax.data.manifest import canonical_json
from k2jax.errors import StorageError

MAX_BYTES = 1 << 30  # of a file; a chunk of K2's has 941 rows of 1.5 kB
GENESIS = "0" * 64  # what the first record has in the place of a record before it


class StepLog:
    """One JSON row a step, in `directory`/chunk-00001.jsonl, ... ; rows are flushed as they are written."""

    def __init__(self, directory: Path, chunk_of_step: Any):
        self.directory, self.chunk_of_step = directory, chunk_of_step
        self._file, self._path = None, None

    def path(self, chunk: int) -> Path:
        return self.directory / f"chunk-{chunk:05d}.jsonl"

    def append(self, row: dict[str, Any]) -> None:
        path = self.path(self.chunk_of_step(row["step"]))
        with _writing(path):
            if path != self._path:
                self.close()
                self.directory.mkdir(exist_ok=True)
                self._file, self._path = path.open("ab"), path
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """The rows up to now are on the disk then: of a step that is saved none is lost with the host."""
        if self._file is not None:
            with _writing(self._path):
                os.fsync(self._file.fileno())

    def rows(self, first_step: int = 1, last_step: int | None = None) -> Iterator[dict[str, Any]]:
        """Rows of steps in [first_step, last_step], in order; files that hold none of them are not read."""
        paths = sorted(self.directory.glob("chunk-*.jsonl"))
        for path, following in zip(paths, [*paths[1:], None], strict=False):
            if first_step > 1 and following and (_first_step(following) or first_step) < first_step:
                continue
            for line in files.read_bytes(path, MAX_BYTES).splitlines():
                row = _parse(line, path)
                if last_step is not None and row["step"] > last_step:
                    return
                if row["step"] >= first_step:
                    yield row

    def truncate(self, last_step: int) -> int:
        """Drops rows after `last_step`, and a half-written last line; returns how many steps were dropped."""
        self.close()
        with _writing(self.directory):
            self.directory.mkdir(exist_ok=True)
        files.remove_leftovers(self.directory, alone=True)  # none but the holder of the run's lock writes here
        dropped = 0
        for path in sorted(self.directory.glob("chunk-*.jsonl")):
            lines = files.read_bytes(path, MAX_BYTES).splitlines(keepends=True)
            kept = [
                line for line in lines if line.endswith(b"\n") and _parse(line, path)["step"] <= last_step
            ]
            dropped += len(lines) - len(kept)
            if not kept:
                path.unlink()
            elif len(kept) < len(lines):
                files.write_bytes(path, b"".join(kept))
        return dropped

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._path = None, None


BELONGING = ("checkpoint", "order", "config")


def belonging(meta: dict[str, Any]) -> dict[str, str]:
    """What a record says its steps belong to, of a checkpoint's meta: three digests."""
    return dict(zip(BELONGING, (meta["digest"], meta["data"]["order"], meta["config_digest"]), strict=True))


def read_records(path: Path) -> list[dict[str, Any]]:
    """In order; a half-written last line is none. Raises StorageError when a line is damaged."""
    lines = files.read_bytes(path, MAX_BYTES).splitlines(keepends=True) if path.exists() else []
    return [_parse(line, path, "last_step") for line in lines if line.endswith(b"\n")]


class Ledger:
    """`ledger/`: the step rows, and `records.jsonl`, the chain with one record a checkpoint."""

    def __init__(self, directory: Path, chunk_of_step: Any):
        self.steps = StepLog(directory, chunk_of_step)
        self.path = directory / "records.jsonl"

    def append_step(
        self,
        step: int,
        batch_digest: str,
        loss: float,
        grad_norm: float,
        applied: bool,
        outlier: bool,
        **of_conversations: int,
    ) -> None:
        """`of_conversations`: more numbers of a step of an sft stage."""
        self.steps.append(
            {
                "step": step,
                "batch": batch_digest,
                "loss": float_bits(loss),
                "grad_norm": float_bits(grad_norm),
                "applied": applied,
                "outlier": outlier,
                **of_conversations,
            }
        )

    def records(self) -> list[dict[str, Any]]:
        """As `read_records` gives them."""
        return read_records(self.path)

    def append_record(self, step: int, belongs: dict[str, str]) -> None:
        """Closes the steps since the last record with the checkpoint of `step`; `belongs` as `belonging` gives it."""
        records = self.records()
        previous = records[-1] if records else None
        rows = self.steps.rows(previous["last_step"] + 1 if previous else 1, step)
        record = self._record(previous, step, belongs, list(rows))
        with _writing(self.path):
            files.append_line(self.path, canonical_json(record) + b"\n")

    def _record(self, previous: dict | None, step: int, belongs: dict[str, str], rows: list[dict]) -> dict[str, Any]:
        first = previous["last_step"] + 1 if previous else 1
        steps, wanted = [row["step"] for row in rows], range(first, step + 1)
        if len(steps) != len(wanted) or any(map(operator.ne, steps, wanted)):
            found = set(steps)
            missing = list(itertools.islice((step for step in wanted if step not in found), 6))
            raise StorageError(
                f"{self.path.parent}: of steps {first} to {step} there are {sum(step in wanted for step in found)} "
                f"rows, missing {missing[:5]}{'...' if len(missing) > 5 else ''}: restore the folder from a copy, or "
                f"move checkpoints from {step} on away"
            )
        record = {
            "first_step": first,
            "last_step": step,
            **belongs,
            "steps": hashlib.sha256(b"".join(canonical_json(row) + b"\n" for row in rows)).hexdigest(),
            "num_rows": len(rows),
            "previous": previous["record"] if previous else GENESIS,
        }
        return {**record, "record": hashlib.sha256(canonical_json(record)).hexdigest()}

    def resume(self, step: int, belongs: dict[str, str] | None) -> int:
        """Cuts the ledger back to a restored checkpoint, and writes its record if a kill came before that.

        Returns how many steps were dropped. `belongs` None: the run starts, there is no checkpoint.
        """
        dropped = self.steps.truncate(step)
        kept = [record for record in self.records() if record["last_step"] <= step]
        for key, value in (belongs or {}).items():
            if kept and kept[-1]["last_step"] == step and kept[-1].get(key) != value:
                raise StorageError(
                    f"{self.path}: the {key} of step {step} that it records is {str(kept[-1].get(key))[:12]}, the one "
                    f"there is {str(value)[:12]}: of another run, or replaced; put the run's own back"
                )
        files.write_bytes(self.path, b"".join(canonical_json(record) + b"\n" for record in kept))
        if belongs and (not kept or kept[-1]["last_step"] < step):
            self.append_record(step, belongs)
        self.verify()
        return dropped

    def verify(self) -> None:
        """Recomputes the chain; raises StorageError naming the first record that does not hold."""
        previous, rows = None, self.steps.rows()  # all files are read once, however many records there are
        for record in self.records():
            belongs = {key: record.get(key) for key in BELONGING}
            num_rows = record["last_step"] - (previous["last_step"] if previous else 0)
            own = list(itertools.islice(rows, max(0, num_rows)))
            expected = self._record(previous, record["last_step"], belongs, own)
            if record != expected:
                key = next(k for k in expected if record.get(k) != expected[k])
                raise StorageError(
                    f"{self.path}: the record of step {record['last_step']} does not hold: {key} is "
                    f"{record.get(key)!r}, recomputed {expected[key]!r}"
                )
            previous = record


def _first_step(path: Path) -> int | None:
    """Of the file's first row; None where it has no whole one."""
    with path.open("rb") as file:
        line = io.BufferedReader(file).readline()  # a stream out of a bucket has no lines of its own
    return _parse(line, path)["step"] if line.endswith(b"\n") else None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def _parse(line: bytes, path: Path, step: str = "step") -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: a line is damaged ({error}): restore the file from a copy") from error
    if not isinstance(row, dict) or type(row.get(step)) is not int:
        raise StorageError(f'{path}: a line is damaged (no object with "{step}"): restore the file from a copy')
    return row


def float_bits(value: float) -> str:
    """The bits of a float32 as 8 hex digits: what "the same loss" means."""
    return struct.pack(">f", value).hex()


def bits_float(text: str) -> float:
    return struct.unpack(">f", bytes.fromhex(text))[0]
