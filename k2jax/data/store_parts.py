"""A store whose tokens many tasks write, each a part: the bytes that one StoreWriter would give.

    begin(path, num_tokens, options)                the arrays, of their whole length
    write_part(path, first, pieces, ...)            tokens from `first` on, in any order, on any machine
    PartsWriter(path, parts=..., **options)         the documents, and the store as a whole

A part is whole shards, which are files of their own; what `write_part` returns says what is in them.
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from k2jax.data import storage
from k2jax.data.storage import storage_errors
from k2jax.data.store import BLOCKS_FILE, DOCUMENTS, DOCUMENTS_FILE
from k2jax.data.store_writer import CHUNK_TOKENS, SHARD_TOKENS, StoreWriter, delete_store
from k2jax.errors import StorageError


def begin(path: str | os.PathLike, num_tokens: int, *, dtype: str, masked: bool) -> None:
    """An unfinished store at `path`, in place of what store was there, with arrays of `num_tokens`."""
    path = storage.normal_path(path)
    with storage_errors(f"cannot write the store {path}"):
        fs, root = storage.file_system(path)
        delete_store(path, overwrite=True)
        fs.create_dir(root)
        storage.write_json(fs, f"{root}/zarr.json", {"zarr_format": 3, "node_type": "group"})
        for name, kind in {"tokens": dtype, **({"loss_mask": "uint8"} if masked else {})}.items():
            storage.create_array(f"{path}/{name}", kind, SHARD_TOKENS, CHUNK_TOKENS, num_tokens)


def write_part(
    path: str | os.PathLike, first: int, pieces: Iterable[np.ndarray], *, array: str, dtype: str, num_tokens: int
) -> dict[str, Any]:
    """Writes `pieces`, each (n,), to the `array` ("tokens" or "loss_mask") of a store, from token `first` on.

    Returns {"max": the largest value, "odd": how many are odd, "files": {name: SHA-256}}. `first` is a multiple of
    SHARD_TOKENS, and what comes after the last piece is another's part, or nothing.
    """
    path, most, odd = storage.normal_path(path), 0, 0
    assert first % SHARD_TOKENS == 0, first
    with storage_errors(f"cannot write the store {path}"):
        layout = (dtype, SHARD_TOKENS, CHUNK_TOKENS)
        writer = storage.ArrayWriter(f"{path}/{array}", *layout, size=first, whole=num_tokens)
        for piece in pieces:
            writer.append(piece)
            most = max(most, int(piece.max(initial=0)))
            odd += int((piece & 1).sum(dtype=np.int64))
        assert writer.size % SHARD_TOKENS == 0 or writer.size == num_tokens, (first, writer.size, num_tokens)
        writer.finish()
        names = [f"{array}/c/{i}" for i in range(first // SHARD_TOKENS, -(-writer.size // SHARD_TOKENS))]
        digests = storage.sha256_of_files(*storage.file_system(path), names)
    return {"max": most, "odd": odd, "files": digests}


class PartsWriter(StoreWriter):
    """Completes a store of `num_tokens` whose parts are there: documents come by `extend_documents` alone.

    `parts` is what `write_part` returned: {"tokens": [...]}, with a loss mask {"loss_mask": [...]}, too.
    """

    def __init__(self, path: str | os.PathLike, *, num_tokens: int, parts: dict[str, list[dict]], **options: Any):
        self._there: dict[str, str] = {}
        for one in (one for found in parts.values() for one in found):
            self._there |= one["files"]
        self._num_tokens = num_tokens
        num_shards = -(-num_tokens // SHARD_TOKENS)
        assert set(self._there) == {f"{name}/c/{i}" for name in parts for i in range(num_shards)}, "all parts, once"
        layout = {"shard_tokens": SHARD_TOKENS, "chunk_tokens": CHUNK_TOKENS}
        super().__init__(path, **options, **layout, overwrite=True)
        for part in parts["tokens"]:
            if part["max"] >= self._info["vocab_size"]:
                raise StorageError(
                    f"store {self.path}: token id {part['max']} is outside the vocabulary of "
                    f"{self._info['vocab_size']}: a file between stages is damaged: prepare again with "
                    "--redo=tokens (of what came as tokens: --redo=token-sources)"
                )
        self._info["max_token_id"] = max([self._info["eos_id"], *(part["max"] for part in parts["tokens"])])
        if self._mask:
            marks = 3 if self._info.get("pairs") else 1
            assert max((part["max"] for part in parts["loss_mask"]), default=0) <= marks, "a mask of 0 and 1"
            self._info["supervised_tokens"] = sum(part["odd"] for part in parts["loss_mask"])

    def extend_documents(self, documents: pa.RecordBatch) -> None:
        """Appends documents (rows of DOCUMENTS), whose tokens some part has."""
        columns = (documents[name].to_pylist() for name in DOCUMENTS.names)
        with storage_errors(f"cannot write the store {self.path}"):
            self._tokens.size += int(self._append_rows(list(zip(*columns, strict=True))).sum())

    def finish(self, *args: Any, **held_out: Any) -> dict[str, Any]:
        """As StoreWriter's; StorageError if the documents are not those of the tokens."""
        if self._tokens.size != self._num_tokens:
            raise StorageError(
                f"store {self.path}: its documents have {self._tokens.size} tokens, written are {self._num_tokens}: "
                "prepare again with --redo=shards"
            )
        return super().finish(*args, **held_out)

    def _array(self, name: str, *layout: Any) -> Any:
        return _Written()

    def _digests(self, names: list[str]) -> dict[str, str]:
        found = super()._digests([name for name in names if name not in self._there])
        return {name: self._there.get(name) or found[name] for name in names}

    def _clear(self, overwrite: bool) -> None:
        """Not the arrays: what an earlier attempt to complete it left."""
        for name in storage.names_in(self.path) & {"store.json", "document_start", DOCUMENTS_FILE, BLOCKS_FILE}:
            storage.delete(f"{self.path}/{name}")


class _Written:
    """An array whose parts are there: counts what the documents have of it."""

    size = 0

    def finish(self) -> None:
        """Nothing is left to write."""
