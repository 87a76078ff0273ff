"""The store: one subset's tokens in an open format that can be checked, on a disk or in a bucket.

A store is a Zarr v3 group at a local path or a gs:// or s3:// URL:

    tokens/            one 1-D array, uint16 or uint32: each document, then EOS; crc32c over every chunk
    loss_mask/         of conversations alone: uint8, for each token 1 if it is learned, 0 if it is only read; of pairs
                       bit 1 (value 2), too, if it is of the rejected half
    document_start/    int64: where each document starts in tokens, and last the number of tokens
    documents.parquet  per document: id, source, num_tokens (EOS included), metadata (JSON)
    documents.blocks   the SHA-256 of each MiB of that, a line of hex each
    store.json         counts, tokenizer, size and SHA-256 of every other file, a root digest; written last

Tokens from `num_train_tokens` on, whole documents, are held out for validation. A store without a valid
store.json is unfinished and is refused. With a loss mask a document ends as its writer left it, mostly without EOS, and
may hold EOS anywhere: `document_start` alone tells such documents apart. store.json then has `supervised_tokens`.
A store of preference pairs, whose store.json has `pairs`, holds in each document the chosen conversation's tokens, then
the rejected one's.
"""

import json
import os
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import tensorstore as ts

from k2jax.data import storage, verified
from k2jax.data.manifest import StoreSummary, sha256_json
from k2jax.data.storage import storage_errors
from k2jax.errors import ConfigError

FORMAT = 1
DOCUMENTS_FILE, BLOCKS_FILE = "documents.parquet", "documents.blocks"
DOCUMENTS = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("num_tokens", pa.int64()), ("metadata", pa.string())]
)
ROW_GROUP = 1 << 16  # documents; every row group but the last is full, so the number tells the group
STARTS_LAYOUT = (1 << 22, 1 << 12)  # documents in a file, in a chunk
STARTS_CACHE_BYTES = 1 << 24
REMEDY = "restore it from a copy, or prepare the store again"


class DocumentSpan(NamedTuple):
    """Tokens [start, stop) of a store, part of document number `index`."""

    index: int
    start: int
    stop: int


class Store:
    """A finished store, read at random; `info` is what store.json holds. Picklable: files are opened anew."""

    def __init__(self, path: str, info: dict[str, Any]):
        self.path, self.info = path, info
        self.num_tokens: int = info["num_tokens"]
        self.num_train_tokens: int = info["num_train_tokens"]
        self.num_documents: int = info["num_documents"]
        self.root_digest: str = info["root_digest"]

    @classmethod
    def open(cls, path: str | os.PathLike, *, verify: str = "sizes") -> Self:
        """Opens a store after checking store.json, its root digest, and that every file is there.

        `verify` is "sizes", or "sha256", which reads all of every file, or "no", where another process has done it. A
        bit flipped inside a chunk is found when the chunk is read, whatever `verify` is.

        Raises ConfigError if the store is unfinished or has changed, StorageError if it cannot be read.
        """
        assert verify in ("no", "sizes", "sha256"), verify
        path = storage.normal_path(path)
        with storage_errors(f"cannot read the store {path}"):
            fs, root = storage.file_system(path)
            info = _read_info(fs, root, path)
            if verify != "no" and (
                damage := storage.find_damage(fs, root, info["files"], sha256=verify == "sha256")
            ):
                raise ConfigError(f"store {path}: {damage}: {REMEDY}")
            store = cls(path, info)
            _ = store._tokens, store._starts, store.masked and store._mask  # a wrong zarr.json shows now
        return store

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.info)

    @property
    def masked(self) -> bool:
        """Whether its tokens have a loss mask: it is of conversations."""
        return "supervised_tokens" in self.info

    @property
    def pairs(self) -> bool:
        """Whether each document is a preference pair, whose loss mask has bit 1 where the rejected half is."""
        return self.info.get("pairs", False)

    @cached_property
    def num_train_documents(self) -> int:
        """Documents that are not held out."""
        with storage_errors(f"store {self.path}: cannot read document_start"):
            return storage.searchsorted(self._starts, self.num_train_tokens)

    @property
    def _num_marks(self) -> int:
        """Values that the loss mask may hold, from 0."""
        return 4 if self.pairs else 2

    def summary(self) -> StoreSummary:
        """What the manifest must know of this store."""
        fields = [name for name in StoreSummary.__dataclass_fields__ if name != "path"]
        return StoreSummary(path=self.path, **{name: self.info[name] for name in fields})

    @cached_property
    def _tokens(self) -> ts.TensorStore:
        return self._open("tokens", self.info["dtype"])

    @cached_property
    def _mask(self) -> ts.TensorStore:
        return self._open("loss_mask", "uint8")

    def _open(self, name: str, dtype: str) -> ts.TensorStore:
        layout = [self.info[key] for key in ("num_tokens", "shard_tokens", "chunk_tokens")]
        with storage_errors(f"cannot read the store {self.path}"):
            return storage.open_array(storage.array_spec(f"{self.path}/{name}", dtype, *layout))

    @cached_property
    def _starts(self) -> ts.TensorStore:
        layout = ("int64", self.num_documents + 1, *STARTS_LAYOUT)
        spec = storage.array_spec(f"{self.path}/document_start", *layout)
        return storage.open_array(spec, STARTS_CACHE_BYTES)

    def open_documents(self) -> verified.VerifiedFile:
        """documents.parquet, which raises DamagedError where what is read of it is not what was written."""
        fs, root = storage.file_system(self.path)
        return verified.open_verified(fs, root, DOCUMENTS_FILE, BLOCKS_FILE, self.info["files"])

    @cached_property
    def _parquet(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.open_documents())

    @cached_property
    def _row_group(self) -> Callable[[int], pa.Table]:
        return lru_cache(maxsize=4)(self._parquet.read_row_group)

    def read(self, starts: npt.ArrayLike, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each of the starts (n,): uint32 (n, length).

        Raises StorageError if they cannot be read or fail their checksum, ConfigError if one is outside the
        vocabulary.
        """
        return self.start_reading(starts, length)()

    def start_reading(self, starts: npt.ArrayLike, length: int) -> Callable[[], np.ndarray]:
        """As `read`, but returns at once, all reads in flight, with a function that waits for the tokens."""
        starts = np.asarray(starts, np.int64).tolist()
        reading = self._start_reading(self._tokens, starts, length, np.uint32)

        def finish() -> np.ndarray:
            rows = reading()
            if rows.size and rows.max() >= self.info["vocab_size"]:
                row, column = np.unravel_index(rows.argmax(), rows.shape)
                raise ConfigError(
                    f"store {self.path}: token {starts[row] + column} has id {rows.max()}, outside the "
                    f"vocabulary of {self.info['vocab_size']}: {REMEDY}"
                )
            return rows

        return finish

    def read_mask(self, starts: npt.ArrayLike, length: int) -> np.ndarray:
        """The loss mask of what `read` gives for the same arguments: uint8 (n, length), 1 where a token is learned.

        Of document i it is `read_mask([start], num_tokens)` with both from `document(i)`. Of `pairs` it is 2 more in
        the rejected half. Raises ConfigError if the store has no mask or one holds anything else, StorageError as
        `read`.
        """
        return self.start_reading_mask(starts, length)()

    def start_reading_mask(self, starts: npt.ArrayLike, length: int) -> Callable[[], np.ndarray]:
        """As `read_mask`, but returns at once, as `start_reading` does."""
        if not self.masked:
            raise ConfigError(f"store {self.path}: has no loss mask: name one that was prepared from conversations")
        reading = self._start_reading(self._mask, np.asarray(starts, np.int64).tolist(), length, np.uint8)

        def finish() -> np.ndarray:
            rows = reading()
            if (most := int(rows.max(initial=0))) >= self._num_marks:
                raise ConfigError(
                    f"store {self.path}: its loss mask holds {most}, expected less than {self._num_marks}: {REMEDY}"
                )
            return rows

        return finish

    def _start_reading(
        self, array: ts.TensorStore, starts: list[int], length: int, dtype: npt.DTypeLike
    ) -> Callable[[], np.ndarray]:
        with ts.Batch() as batch:  # one request for what lies close together in a shard
            reads = [array[start : start + length].read(batch=batch) for start in starts]

        def finish() -> np.ndarray:
            rows = np.empty((len(reads), length), dtype)
            for row, start, read in zip(rows, starts, reads, strict=True):
                with storage_errors(f"store {self.path}: cannot read the window at token {start}"):
                    row[:] = read.result()
            return rows

        return finish

    def start_reading_spans(
        self, starts: npt.ArrayLike, lengths: npt.ArrayLike, *, masks: bool = False
    ) -> Callable[[], np.ndarray]:
        """Tokens [start, start + length) of each of some spans, one after the other, as `start_reading`: uint32.

        `masks` gives the loss mask in their place, uint8.
        """
        spans = list(zip(np.asarray(starts).tolist(), np.asarray(lengths).tolist(), strict=True))
        with ts.Batch() as batch:
            array = self._mask if masks else self._tokens
            reads = [array[start : start + length].read(batch=batch) for start, length in spans]

        def finish() -> np.ndarray:
            with storage_errors(f"store {self.path}: cannot read {'the loss mask' if masks else 'tokens'}"):
                found = np.concatenate([np.empty(0, np.uint8 if masks else np.uint32), *(r.result() for r in reads)])
            most = int(found.max(initial=0))
            if most >= (self._num_marks if masks else self.info["vocab_size"]):
                what = "its loss mask" if masks else f"outside the vocabulary of {self.info['vocab_size']}, a token"
                raise ConfigError(f"store {self.path}: {what} holds {most}: {REMEDY}")
            return found

        return finish

    def document_starts(self) -> np.ndarray:
        """Where each document starts, and last the number of tokens: int64 (documents + 1,)."""
        with storage_errors(f"store {self.path}: cannot read document_start"):
            return np.asarray(self._starts.read().result())

    def documents_in(self, start: int, stop: int) -> list[DocumentSpan]:
        """The documents that tokens [start, stop) belong to, in order, first and last cut to the range."""
        with storage_errors(f"store {self.path}: cannot read document_start"):
            first = storage.searchsorted(self._starts, start + 1) - 1
            last = storage.searchsorted(self._starts, stop)
            inner = self._starts[first + 1 : last].read().result().tolist()
        begins, ends = [start, *inner], [*inner, stop]
        return [DocumentSpan(first + i, *span) for i, span in enumerate(zip(begins, ends, strict=True))]

    def document(self, index: int) -> dict[str, Any]:
        """A document's id, source, num_tokens (EOS included), metadata, and start (of its tokens)."""
        group, row = divmod(index, ROW_GROUP)
        with storage_errors(f"store {self.path}: cannot read document {index}"):
            [record] = self._row_group(group).slice(row, 1).to_pylist()
            start = int(self._starts[index].read().result())
        return {**record, "metadata": json.loads(record["metadata"]), "start": start}

    def find_documents(self, id: str) -> list[int]:
        """The indices of the documents with this id (a text that comes twice has one id). Reads all ids."""
        found, first = [], 0
        with storage_errors(f"store {self.path}: cannot read documents.parquet"):
            for batch in self._parquet.iter_batches(ROW_GROUP, columns=["id"]):
                matches = pc.equal(batch["id"], id).to_numpy(zero_copy_only=False)
                found += (first + np.flatnonzero(matches)).tolist()
                first += len(batch)
        return found

    def find_document(self, id: str) -> int | None:
        """The first of `find_documents`, None if there is none."""
        return next(iter(self.find_documents(id)), None)


def _read_info(fs: pafs.FileSystem, root: str, path: str) -> dict[str, Any]:
    """What store.json holds, found consistent in itself."""
    try:
        with fs.open_input_file(f"{root}/store.json") as file:
            info = json.loads(file.read())
    except FileNotFoundError as error:
        raise ConfigError(f"store {path}: no store.json: it is unfinished, prepare it again") from error
    except ValueError as error:
        raise ConfigError(f"store {path}: store.json is no JSON ({error}): {REMEDY}") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ConfigError(f"store {path}: store.json is not of format {FORMAT}, which this k2jax reads")
    found, expected = str(info.pop("root_digest", None)), sha256_json(info)
    if found != expected:
        raise ConfigError(
            f"store {path}: store.json has root digest {found[:12]}, its content {expected[:12]}: {REMEDY}"
        )
    return {**info, "root_digest": found}


def open_stores(
    manifest: dict[str, Any],
    *,
    folder: str | os.PathLike | None = None,
    places: dict[str, str] | None = None,
    verify: str = "sizes",
) -> dict[str, Store]:
    """Opens every store of a manifest: at folder/<name>, or where `places` has its root digest, or at its path.

    Raises ConfigError if one is not the store that the manifest was made with.
    """
    stores = {}
    for name, entry in manifest["stores"].items():
        place = (places or {}).get(entry["root_digest"], entry["path"])
        stores[name] = Store.open(f"{os.fspath(folder)}/{name}" if folder else place, verify=verify)
        found, expected = stores[name].root_digest, entry["root_digest"]
        if found != expected:
            raise ConfigError(
                f"store {name!r} at {stores[name].path} has root digest {found[:12]}, the manifest has "
                f"{expected[:12]}: the data has changed; bring the old store back, or start a new run"
            )
    return stores
