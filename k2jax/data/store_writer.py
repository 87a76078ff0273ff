"""Writes a store (store.py), document by document, in the memory of a shard."""

import math
import os
from fractions import Fraction
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from k2jax.data import storage, verified
from k2jax.data.manifest import canonical_json, sha256_json
from k2jax.data.storage import storage_errors
from k2jax.data.store import BLOCKS_FILE, DOCUMENTS, DOCUMENTS_FILE, FORMAT, ROW_GROUP, STARTS_LAYOUT
from k2jax.errors import ConfigError
from k2jax.text import without_secrets

FILES = ("store.json", "zarr.json", "tokens", "loss_mask", "document_start", DOCUMENTS_FILE, BLOCKS_FILE)  # deleted so
SHARD_TOKENS, CHUNK_TOKENS = 1 << 24, 1 << 16  # of a store, where nothing else is said


class StoreWriter:
    """Writes a store, document by document, in the memory of a shard:

        with StoreWriter(path, tokenizer_sha256=..., vocab_size=..., eos_id=...) as writer:
            writer.add(tokens, id=sha256_of_text, source="file or URL")
            writer.finish(validation_fraction=0.01)

    Until `finish` returns, the store is unfinished: nothing reads it, and another writer starts it afresh.

    Args:
        path: local path, or gs:// or s3:// URL.
        shard_tokens: tokens in a file, a multiple of chunk_tokens.
        chunk_tokens: tokens under one checksum, the least that a read fetches.
        masked: each document comes with a loss mask, see `add`.
        pairs: each is a pair, whose mask has the rejected half's bit; with `masked`.
        overwrite: replace a finished store.

    Raises ConfigError if `path` holds a finished store or other things; StorageError, here and in the
    methods, if it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        tokenizer_sha256: str,
        vocab_size: int,
        eos_id: int,
        shard_tokens: int = SHARD_TOKENS,
        chunk_tokens: int = CHUNK_TOKENS,
        masked: bool = False,
        pairs: bool = False,
        overwrite: bool = False,
    ):
        assert 0 <= eos_id < vocab_size, (eos_id, vocab_size)
        assert masked or not pairs, "a store of pairs is masked"
        self.path = storage.normal_path(path)
        self._info = {
            "format": FORMAT,
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
            "shard_tokens": shard_tokens,
            "chunk_tokens": chunk_tokens,
            "max_token_id": eos_id,
        }
        self._rows: list[tuple] = []  # of documents.parquet
        self._finished = False
        with storage_errors(f"cannot write the store {self.path}"):
            self._fs, self._root = storage.file_system(self.path)
            self._clear(overwrite)
            self._fs.create_dir(self._root)
            storage.write_json(self._fs, f"{self._root}/zarr.json", {"zarr_format": 3, "node_type": "group"})
            layout = (shard_tokens, chunk_tokens)
            self._tokens = self._array("tokens", self._info["dtype"], *layout)
            self._starts = storage.ArrayWriter(f"{self.path}/document_start", "int64", *STARTS_LAYOUT)
            self._mask = None
            if masked:  # a store without has the bytes, and so the digest, that it had before there were masks
                self._mask = self._array("loss_mask", "uint8", *layout)
                self._info |= {"supervised_tokens": 0, **({"pairs": True} if pairs else {})}
            self._file = self._fs.open_output_stream(f"{self._root}/{DOCUMENTS_FILE}", compression=None)
            # Ids are random: a dictionary of them would only take space.
            options = {"compression": "zstd", "use_dictionary": ["source", "metadata"]}
            self._parquet = pq.ParquetWriter(self._file, DOCUMENTS, **options)

    def _array(self, name: str, *layout: Any) -> storage.ArrayWriter:
        return storage.ArrayWriter(f"{self.path}/{name}", *layout)

    def _digests(self, names: list[str]) -> dict[str, str]:
        return storage.sha256_of_files(self._fs, self._root, names)

    def _clear(self, overwrite: bool) -> None:
        delete_store(self.path, overwrite)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type | None, error: object, traceback: object) -> None:
        assert self._finished or error_type, "the writer's block ended without finish()"

    def add(
        self,
        tokens: npt.ArrayLike,
        *,
        id: str,
        source: str,
        metadata: dict[str, Any] | None = None,
        eos: bool = True,
        mask: npt.ArrayLike | None = None,
    ) -> None:
        """Appends one document, and EOS after it.

        Args:
            tokens: token ids (n,), without EOS; n may be 0.
            id: SHA-256 (hex) of the document's text.
            source: the path or URL that it came from.
            metadata: what preparation knows of it, anything that JSON can hold.
            eos: False for a row that was cut from a stream of documents, or a conversation; it is not empty.
            mask: (n,) of 0 and 1, in a store that is `masked`: which tokens are learned. EOS after them is not. Of a
                pair, which has no EOS: 0 and 1 of the chosen half, then 2 and 3 of the rejected one.

        Raises ConfigError, and appends nothing, if a token is outside the vocabulary.
        """
        tokens = np.asarray(tokens, np.int64)
        self._check(tokens, f"document {id} ({source})")
        ended = np.append(tokens, self._info["eos_id"]) if eos else tokens
        mask = np.append(mask, 0) if eos and mask is not None else mask
        self._append(ended, [(id, source, len(ended), canonical_json(metadata or {}).decode())], mask)

    def extend(self, tokens: np.ndarray, documents: pa.RecordBatch, mask: np.ndarray | None = None) -> None:
        """Appends documents (rows of DOCUMENTS) and their tokens, all in one array, with every EOS that they have.

        `mask` is as long as `tokens`, in a store that is `masked`.

        Raises ConfigError, and appends nothing, if a token is outside the vocabulary.
        """
        assert sum(documents["num_tokens"].to_pylist()) == len(tokens), "the documents' tokens, all of them"
        self._check(tokens, f"one of the documents from {documents['id'][0]} on")
        columns = (documents[name].to_pylist() for name in DOCUMENTS.names)
        self._append(tokens, list(zip(*columns, strict=True)), mask)

    def _check(self, tokens: np.ndarray, whose: str) -> None:
        low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
        if low < 0 or high >= self._info["vocab_size"]:
            raise ConfigError(
                f"store {self.path}: {whose} has token id {low if low < 0 else high}, outside the "
                f"vocabulary of {self._info['vocab_size']}: tokenize it with the store's tokenizer"
            )
        self._info["max_token_id"] = max(self._info["max_token_id"], high)

    def _append(self, tokens: np.ndarray, rows: list[tuple], mask: npt.ArrayLike | None) -> None:
        assert (mask is None) == (self._mask is None), "all documents of a store have a loss mask, or none"
        with storage_errors(f"cannot write the store {self.path}"):
            lengths = self._append_rows(rows)
            self._tokens.append(tokens)
            if self._mask:
                mask = np.asarray(mask, np.uint8)
                self._check_mask(mask, lengths)
                self._mask.append(mask)
                self._info["supervised_tokens"] += int((mask & 1).sum(dtype=np.int64))

    def _append_rows(self, rows: list[tuple]) -> np.ndarray:
        """Appends to documents.parquet and document_start; returns the documents' lengths."""
        lengths = np.array([row[2] for row in rows], np.int64)
        self._starts.append(self._tokens.size + np.cumsum(lengths) - lengths)
        # A document's source and URL may be links with a token in them.
        self._rows += [(id, without_secrets(source), n, without_secrets(more)) for id, source, n, more in rows]
        while len(self._rows) >= ROW_GROUP:
            self._write_rows()
        return lengths

    def _check_mask(self, mask: np.ndarray, lengths: np.ndarray) -> None:
        pairs = self._info.get("pairs", False)
        assert len(mask) == lengths.sum() and mask.max(initial=0) <= (3 if pairs else 1), "one value for each token"
        for one in np.split(mask, np.cumsum(lengths)[:-1]) if pairs else ():
            rejected = one > 1
            assert len(one) and not rejected[0] and np.diff(rejected).sum() == 1, "a chosen half, then a rejected one"

    def _write_rows(self) -> None:
        columns = [pa.array(values) for values in zip(*self._rows[:ROW_GROUP], strict=True)]
        self._parquet.write_table(pa.table(columns, schema=DOCUMENTS), row_group_size=ROW_GROUP)
        del self._rows[:ROW_GROUP]

    def finish(self, validation_fraction: float = 0.0, num_train_tokens: int | None = None) -> dict[str, Any]:
        """Completes the store, store.json last, and returns what that holds.

        `validation_fraction` (from 0, below 1) of the tokens are held out, rounded down to whole documents; or,
        where the documents to hold out are given, what is behind the first `num_train_tokens`, which end a document.
        """
        assert 0 <= validation_fraction < 1, validation_fraction
        assert num_train_tokens is None or validation_fraction == 0, "give one of both"
        num_documents, num_tokens = self._starts.size, self._tokens.size
        if num_documents == 0:
            raise ConfigError(f"store {self.path}: no document was added, expected at least one")
        with storage_errors(f"cannot write the store {self.path}"):
            self._starts.append(np.array([num_tokens]))
            self._tokens.finish()
            if self._mask:
                self._mask.finish()
            starts = self._starts.finish()
            if self._rows:
                self._write_rows()
            self._parquet.close()
            self._file.close()
            with self._fs.open_output_stream(f"{self._root}/{BLOCKS_FILE}", compression=None) as file:
                file.write(verified.digest_blocks(self._fs, f"{self._root}/{DOCUMENTS_FILE}"))
            # Fraction(str(x)) is the decimal number that was written (0.1), not the float nearest to it.
            train = math.ceil((1 - Fraction(str(validation_fraction))) * num_tokens)
            train = train if num_train_tokens is None else num_train_tokens
            first_held_out = storage.searchsorted(starts, train)
            assert num_train_tokens in (None, int(starts[first_held_out].read().result())), num_train_tokens
            sizes = storage.file_sizes(self._fs, self._root)
            digests = self._digests(sorted(sizes))
            info = {
                **self._info,
                "num_tokens": num_tokens,
                "num_documents": num_documents,
                "num_train_tokens": int(starts[first_held_out].read().result()),
                "files": {name: {"bytes": sizes[name], "sha256": digest} for name, digest in digests.items()},
            }
            info["root_digest"] = sha256_json(info)
            storage.write_json(self._fs, f"{self._root}/store.json", info)
        self._finished = True
        return info


def delete_store(path: str, overwrite: bool) -> None:
    """Empties the place of a store; ConfigError if it holds a finished one, and not `overwrite`, or other things."""
    found = storage.names_in(path)
    if "store.json" in found and not overwrite:
        raise ConfigError(f"{path} holds a finished store: name another path, or overwrite it")
    if found and not found & {"store.json", "zarr.json"}:
        raise ConfigError(f"{path} is not empty and no store: name another path, or empty it")
    for name in (name for name in FILES if name in found):
        storage.delete(f"{path}/{name}")
