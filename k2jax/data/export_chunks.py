"""The training sequence of a run as Parquet files that anyone can read: one a chunk, in the order of training.

Everything follows from the run's manifest, journal and stores; where the ledger has a step, what is written is compared
with the digest of what the step read. A chunk of a million rows is made in the memory of a few thousand.

Measured on one core with text of 2 documents a row, 2,049 ids each: 3,100 rows (6.3 million tokens) a CPU-second, and
in all columns 0.91 bytes a token for a vocabulary of 4,096, 1.11 for one of 32,018.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from k2jax import errors, files, locks
from k2jax.bucket import BucketPath, at
from k2jax.data.chunks import checkpoint_steps
from k2jax.data.document_table import DocumentTable
from k2jax.data.export_readme import readme
from k2jax.data.export_rows import GROUP_TOKENS, row_batches, schema
from k2jax.data.loader import row_length
from k2jax.data.manifest import is_packed, manifest_digest
from k2jax.data.provenance import Run, open_run
from k2jax.data.store import Store
from k2jax.errors import ConfigError, RunError, StorageError
from k2jax.lease import taken

FORMAT = 1
# Measured on 16 MB of Python's documents and code, ids in shuffled rows of 2,049: bytes a token with a vocabulary of
# 4,096 / 32,018, and million tokens a CPU-second. Plain: zstd 3 1.02 / 1.17 (40), 9 0.89 / 1.07 (12), 15 0.86 / 1.04
# (1.3). BYTE_STREAM_SPLIT: zstd 3 0.98 / 1.14 (50), 9 0.94 / 1.12 (19). Dictionary: zstd 9 0.93 / 1.40 (20).
# DELTA_BINARY_PACKED: zstd 9 1.46 / 1.74 (20). Plain ids are also what every reader of Parquet knows.
COMPRESSION = {"compression": "zstd", "compression_level": 9}
WORK = ".export"  # in the output folder: what is known of finished chunks, and their locks


def export_chunks(
    workdir: str | os.PathLike | BucketPath,
    out: str | os.PathLike | BucketPath,
    *,
    chunks: tuple[int | None, int | None] = (None, None),
    stores: str | os.PathLike | None = None,
    workers: int = 1,
    report: Callable[[dict[str, Any], bool], None] = lambda entry, was_there: None,
) -> dict[str, Any]:
    """Writes chunks [first, stop) of a run, and last chunks.json, which it returns: it lists all finished chunks.

    A finished chunk whose bytes are as they were is left. Other processes may write other chunks into the same folder.

    Args:
        workdir: the run directory, which may belong to a run at work.
        out: a new folder, or one that this function wrote for the same run.
        chunks: from 0; None for the first and for all to the last.
        stores: where the stores are, by name, if they have moved.
        workers: processes, each at one chunk. Scratch files, 150 bytes a document, go to the system's temporary folder.
        report: called with each chunk's entry in chunks.json, and whether it was there before.

    Raises ConfigError if the run or the folder is not what it should be, or a step is not what the ledger says that
    the run read; StorageError if something cannot be read or written.
    """
    errors.keep_files_ours()
    run, out = open_run(workdir, stores), at(out)
    steps = chunk_steps(run)
    first, stop = _range(chunks, len(steps))
    if out.exists() and any(out.iterdir()) and not (out / WORK).is_dir():
        raise ConfigError(f"--out={out}: holds files that are no export of ours; choose an empty folder")
    (out / WORK).mkdir(parents=True, exist_ok=True)
    _check_identity(run, out, len(steps))
    (out / "chunks.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="k2jax-documents-") as scratch:
        work = partial(export_chunk, str(workdir), str(out), stores and str(stores), scratch)
        wanted = []
        for chunk in range(first, stop):
            if entry := finished_entry(run, out, chunk, steps[chunk], sha256=True):
                report(entry, True)
            else:
                wanted.append(chunk)
        if wanted:
            for name, store in sorted(_stores_read(run, [steps[chunk] for chunk in wanted]).items()):
                DocumentTable.build(store, Path(scratch) / name)
        for entry in _run_all(work, wanted, workers):
            report(entry, False)
    return _write_summary(run, out, steps)


def chunk_steps(run: Run) -> list[tuple[int, int]]:
    """First and last step of each chunk, as the journal stands. Chunk i is number i + 1 of the run's ledger."""
    ends = checkpoint_steps(run.order)
    return list(zip([1, *(end + 1 for end in ends)], ends, strict=False))


def _stores_read(run: Run, steps: list[tuple[int, int]]) -> dict[str, Store]:
    """{root digest: store} of what is read by steps first to last of any of these chunks."""
    found = {}
    for part in {id(run.order.of_step(first)): run.of_step(first) for first, _ in steps}.values():
        names = {entry["name"] for stage in part.manifest["stages"] for entry in stage["subsets"]}
        found |= {part.stores[name].root_digest: part.stores[name] for name in names}
    return found


def _range(chunks: tuple[int | None, int | None], available: int) -> tuple[int, int]:
    first, stop = chunks[0] or 0, available if chunks[1] is None else chunks[1]
    if not 0 <= first < stop <= available:
        raise ConfigError(f"--chunks={first}:{stop}: the run's chunks are 0:{available}")
    return first, stop


def _check_identity(run: Run, out: Path | BucketPath, num_chunks: int) -> None:
    """Refuses the chunks of another run; removes those past the end, which a skip in the journal moved forward."""
    expected = {manifest_digest(part.manifest) for part in run.epochs()}
    for path in sorted((out / WORK).glob("*.json")):
        found = _read_entry(path)
        if found and found["data"] not in expected:
            raise ConfigError(
                f"--out={out} holds chunks of data {found['data'][:12]}, the run's is "
                f"{' and '.join(sorted(digest[:12] for digest in expected))}: choose another folder"
            )
        if int(path.stem) >= num_chunks:
            path.unlink()
            (out / f"chunk_{path.stem}.parquet").unlink(missing_ok=True)


def _run_all(work: Callable[[int], dict], chunks: list[int], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1 or len(chunks) < 2:
        yield from map(work, chunks)
        return
    context = multiprocessing.get_context("spawn")  # tensorstore has threads
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(chunks)), context) as pool:
        futures = [pool.submit(work, chunk) for chunk in chunks]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RunError("a worker died, often for memory: run the same command again") from error
        finally:
            pool.shutdown(cancel_futures=True)


def export_chunk(workdir: str, out: str, stores: str | None, scratch: str, chunk: int) -> dict[str, Any]:
    """Writes one chunk; `scratch` is the folder of the stores' DocumentTables. Returns its entry in chunks.json."""
    run, folder = open_run(workdir, stores), at(out)
    first, last = chunk_steps(run)[chunk]
    run, stage = run.of_step(first), run.order.stage_of_step(first)
    path = folder / f"chunk_{chunk:05d}.parquet"
    with _locked(folder, chunk):
        (folder / WORK / f"{chunk:05d}.json").unlink(missing_ok=True)
        in_ledger = ledger_digests(run.workdir, chunk, first, last)
        files.remove_leftovers(folder, path.name, alone=True)
        files.remove_leftovers(folder / WORK, f"{chunk:05d}.json", alone=True)
        with files.whole_file(path) as file:
            rows, parts = _write_rows(file, run, Path(scratch), first, last, in_ledger)
        entry = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
            "data": manifest_digest(run.manifest),
            "stage": stage.name,
            "first_step": first,
            "last_step": last,
            "positions": _intervals(run, first, last),
            "rows": rows,
            "token_ids": rows * row_length(stage.sequence_length, run.manifest["label_shift"]),
            "document_parts": parts,
            "steps_in_ledger": len(in_ledger),
        }
        files.write_json(folder / WORK / f"{chunk:05d}.json", entry)
    return entry


def finished_entry(
    run: Run, out: Path | BucketPath, chunk: int, steps: tuple[int, int], *, sha256: bool
) -> dict[str, Any] | None:
    """The entry of a chunk that is there, reads what the run reads now, and was compared with all of the ledger."""
    entry, path = _read_entry(out / WORK / f"{chunk:05d}.json"), out / f"chunk_{chunk:05d}.parquet"
    if entry is None or not path.is_file() or path.stat().st_size != entry["bytes"]:
        return None
    if entry["positions"] != _intervals(run, *steps) or (entry["first_step"], entry["last_step"]) != steps:
        return None
    if sha256:
        if entry["steps_in_ledger"] < len(ledger_digests(run.workdir, chunk, *steps)):
            return None  # the run has gone on: what it read can now be compared
        if entry["sha256"] != _sha256(path):
            return None
    return entry


def ledger_digests(workdir: Path | BucketPath, chunk: int, first: int, last: int) -> dict[int, str]:
    """What the ledger has of steps first to last, all in its file of this chunk: their batches' digests by step."""
    path, found = workdir / "ledger" / f"chunk-{chunk + 1:05d}.jsonl", {}
    try:
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if line.endswith(b"\n"):  # else the run was killed at it, or is writing it
                row = json.loads(line)
                found[row["step"]] = row["batch"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: cannot be read ({error!r}): restore the file from a copy") from error
    return {step: digest for step, digest in found.items() if first <= step <= last}


def _intervals(run: Run, first: int, last: int) -> list[list[int]]:
    """The positions that steps first to last read, in that order, as ranges [a, b)."""
    found: list[list[int]] = []
    for step in range(first, last + 1):
        positions = run.order.positions(step)
        a, b = int(positions[0]), int(positions[-1]) + 1
        if found and found[-1][1] == a:
            found[-1][1] = b
        else:
            found.append([a, b])
    return found


def _write_rows(
    file: IO[bytes], run: Run, scratch: Path, first: int, last: int, in_ledger: dict[int, str]
) -> tuple[int, int]:
    """Writes steps first to last; returns how many rows and parts of documents they have."""
    places = [scratch / run.manifest["stores"][name]["root_digest"] for name in run.subset_names]
    tables = [DocumentTable(place) if place.with_name(f"{place.name}.starts").exists() else None for place in places]
    marked = is_packed(run.manifest["stages"][run.order.stage_of_step(first).index])
    columns, rows, parts = schema(run.manifest["vocab_size"], marked), 0, 0
    waiting: list[pa.RecordBatch] = []
    with pq.ParquetWriter(file, columns, use_dictionary=["subset"], **COMPRESSION) as writer:
        for batch in row_batches(run, tables, columns, first, last, in_ledger):
            waiting.append(batch)
            rows += len(batch)
            parts += len(batch["documents"].values)
            if sum(len(one["token_ids"].values) for one in waiting) >= GROUP_TOKENS:
                writer.write_table(pa.Table.from_batches(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting))
    return rows, parts


def _write_summary(run: Run, out: Path | BucketPath, steps: list[tuple[int, int]]) -> dict[str, Any]:
    entries = [finished_entry(run, out, chunk, steps[chunk], sha256=False) for chunk in range(len(steps))]
    manifest = run.manifest
    summary = {
        "format": FORMAT,
        "data": manifest_digest(manifest),
        "order": run.order.digest(),
        "num_chunks": len(steps),
        "num_steps": run.order.num_steps,
        **{key: manifest[key] for key in ("tokenizer_sha256", "vocab_size", "eos_id", "label_shift")},
        "subsets": {name: store["root_digest"] for name, store in manifest["stores"].items()},
        "stages": [
            {key: stage[key] for key in ("name", "sequence_length", "rows_per_step")}
            for stage in manifest["stages"]
        ],
        "chunks": [
            {key: value for key, value in entry.items() if key != "data"} for entry in entries if entry
        ],
    }
    for name in ("README.md", "chunks.json"):  # others may be writing them, too
        files.remove_leftovers(out, name)
    files.write_text(out / "README.md", readme(summary))
    files.write_json(out / "chunks.json", summary)
    return summary


def _locked(out: Path | BucketPath, chunk: int) -> contextlib.AbstractContextManager:
    """This process alone writes this chunk."""
    if isinstance(out, BucketPath):
        return taken(out / WORK / f"{chunk:05d}.lock", f"--out={out}: chunk {chunk}")
    try:
        return locks.hold(out / WORK / f"{chunk:05d}.lock", f"host {socket.gethostname()}, pid {os.getpid()}")
    except locks.Held as holder:
        raise ConfigError(f"--out={out}: another process ({holder}) is writing chunk {chunk}: wait for it") from None


def _read_entry(path: Path | BucketPath) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(
            f"{path} is damaged ({error}): remove it and its chunk, and export again"
        ) from error


def _sha256(path: Path | BucketPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
