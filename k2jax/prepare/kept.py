"""The documents that stay, dealt into buckets by a keyed hash of their ids: the order that they have in the stores.

A task takes what one task of cleaning wrote, leaves out duplicates, and writes `kept/<rank>.jsonl.zst`: for each bucket
of the subset a compressed frame with its documents. `kept/<rank>.npy`, written last, says where the frames are: the
offsets of each run's frames, int64 (runs, buckets + 1); there is more than one run if the documents exceed RUN_BYTES.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from k2jax.errors import StorageError
from k2jax.files import whole_file, write_json
from k2jax.prepare.documents import compressor, read_documents, read_frame, to_line
from k2jax.prepare.tally import Tally

RUN_BYTES = 1 << 30  # of documents, compressed in memory


def order_key(seed: int, id: str) -> int:
    """64 bits that order the documents of a store."""
    return int.from_bytes(hashlib.blake2b(id.encode(), key=str(seed).encode(), digest_size=8).digest(), "big")


def keep(rank: int, *, out: Path, seed: int, buckets: list[int]) -> None:
    """A task: `out` is the folder of the stages, `buckets` how many there are for the documents of each rank."""
    name = f"{rank:05d}"
    tally = Tally()
    with whole_file(out / "kept" / f"{name}.jsonl.zst") as file:
        offsets = _write_runs(file, _survivors(out, name, tally), buckets[rank], seed)
    write_json(out / "kept" / f"{name}.json", tally.to_json())
    with whole_file(out / "kept" / f"{name}.npy") as file:
        np.save(file, offsets)


def _survivors(out: Path, name: str, tally: Tally) -> Iterator[Document]:
    """The documents of a rank without the duplicates; those that had some know how many, and where."""
    duplicates = out / "duplicates" / f"{name}.parquet"  # there for every task: without it no document would go
    try:
        found: dict[int, dict[str, Any]] = {row.pop("index"): row for row in pq.read_table(duplicates).to_pylist()}
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise StorageError(f"{duplicates} cannot be read ({reason}): remove its stage and prepare again") from error
    for index, document in enumerate(read_documents(out / "clean" / "documents" / f"{name}.jsonl.zst")):
        num_bytes = len(document.text.encode())
        tally.saw("duplicates", num_bytes)
        row = found.get(index)
        if row and row["reason"]:
            tally.removed("duplicates", row["reason"], num_bytes)
            continue
        if row:
            where = {entry["name"]: entry["count"] for entry in row["by"]}
            document.metadata["duplicates"] = {"copies": row["copies"], "by": where, "sources": row["sources"]}
        tally.kept(num_bytes, document.metadata.get("language", ""), document.metadata.get("licence", ""))
        yield document


def _write_runs(file: Any, documents: Iterator[Document], buckets: int, seed: int) -> np.ndarray:
    """Writes the frames; returns their offsets (runs, buckets + 1)."""
    offsets: list[list[int]] = []
    frames: dict[int, Any] = {}
    chunks: dict[int, list[bytes]] = {}
    size = 0

    def write_run() -> None:
        places = [file.tell()]
        for bucket in range(buckets):
            if bucket in frames:
                file.write(b"".join(chunks[bucket]) + frames[bucket].flush())
            places.append(file.tell())
        offsets.append(places)
        frames.clear()
        chunks.clear()

    for document in documents:
        bucket = order_key(seed, document.id) * buckets >> 64
        if bucket not in frames:
            frames[bucket], chunks[bucket] = compressor().compressobj(), []
        line = to_line(document)
        chunks[bucket].append(frames[bucket].compress(line))
        size += len(line)
        if size > RUN_BYTES:
            write_run()
            size = 0
    write_run()
    return np.array(offsets, np.int64)


def bucket_of(out: Path, ranks: list[int], bucket: int, seed: int) -> list[Document]:
    """The documents of a bucket of a subset, whose ranks these are, in the order of their keys."""
    found = []
    for rank in ranks:
        offsets = np.load(out / "kept" / f"{rank:05d}.npy")
        for begin, end in offsets[:, bucket : bucket + 2].tolist():
            found += read_frame(out / "kept" / f"{rank:05d}.jsonl.zst", begin, end)
    # The same text can come twice where nothing removes duplicates; the sort keeps the order of ranks for those.
    return sorted(found, key=lambda document: order_key(seed, document.id))
