"""Pieces of a store: what a task of tokenizing wrote, joined to a store once all are there.

A piece is `<name>.tokens`, little-endian ids, of conversations `<name>.mask`, a byte for each id, and `<name>.parquet`,
the documents in them (store.DOCUMENTS): that is written last, so that a piece without it is unfinished. Each document
ends with EOS unless its writer says otherwise.
"""

import contextlib
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from k2jax.data.manifest import canonical_json
from k2jax.data.store import DOCUMENTS, ROW_GROUP, StoreWriter
from k2jax.errors import ConfigError, StorageError
from k2jax.files import whole_file

BATCH_DOCUMENTS = 1 << 12  # joined at a time


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the ids in stores and pieces."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class PieceWriter:
    """Writes a piece, document by document:

    with PieceWriter(folder / "00003", vocab_size=..., eos_id=...) as piece:
        piece.add(ids, id=sha256_of_text, source="file:line", metadata={...})
    """

    def __init__(self, path: str | os.PathLike, *, vocab_size: int, eos_id: int, masked: bool = False):
        self.path, self.vocab_size, self.eos_id = str(path), vocab_size, eos_id
        self.num_tokens = 0
        self._eos = np.array([eos_id], token_dtype(vocab_size)).tobytes()
        self._rows: list[tuple] = []
        self._masked = masked

    def __enter__(self) -> Self:
        self._files = contextlib.ExitStack()
        self._out = self._files.enter_context(whole_file(f"{self.path}.tokens"))
        self._mask = self._files.enter_context(whole_file(f"{self.path}.mask")) if self._masked else None
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)
        if error[0] is None:
            columns = [pa.array(list(values)) for values in zip(*self._rows, strict=True)] or [[], [], [], []]
            with whole_file(f"{self.path}.parquet") as file:
                pq.write_table(pa.table(columns, schema=DOCUMENTS), file, compression="zstd", row_group_size=ROW_GROUP)

    def add(
        self,
        ids: npt.ArrayLike,
        *,
        id: str,
        source: str,
        metadata: dict[str, Any] | None = None,
        eos: bool = True,
        mask: np.ndarray | None = None,
    ) -> None:
        """Appends one document, and EOS after it if `eos`; ConfigError if an id is outside the vocabulary.

        `mask` (n,) says of each id whether it is learned, in a piece that is `masked`; EOS after them is not.
        """
        ids = np.asarray(ids)
        assert (mask is None) == (self._mask is None), "all documents of a piece have a loss mask, or none"
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            outside = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            raise ConfigError(
                f"document {id} ({source}) has token id {outside}, outside the vocabulary of {self.vocab_size}: "
                "name the tokenizer that it was made with"
            )
        self._out.write(ids.astype(token_dtype(self.vocab_size)).tobytes())
        if eos:
            self._out.write(self._eos)
        if self._mask:
            assert len(mask) == len(ids), (len(mask), len(ids))
            self._mask.write(np.asarray(mask, np.uint8).tobytes() + b"\0" * eos)
        self._rows.append((id, source, len(ids) + eos, canonical_json(metadata or {}).decode()))
        self.num_tokens += len(ids) + eos


def join(folder: Path, store: Path, options: dict[str, Any], held_out: dict[str, Any]) -> dict[str, Any] | None:
    """The pieces of a folder, in the order of their names, as a store; returns what its store.json holds.

    `options` are StoreWriter's, `held_out` those of its finish(). None, and no store, if the pieces hold no document.
    """
    names = sorted(path.stem for path in folder.glob("*.parquet"))
    if not any(pq.read_metadata(folder / f"{name}.parquet").num_rows for name in names):
        return None
    dtype, masked = token_dtype(options["vocab_size"]), (folder / f"{names[0]}.mask").exists()
    with StoreWriter(store, **options, masked=masked, overwrite=True) as writer:
        for name in names:
            tokens, documents = _piece(folder / name, "tokens", dtype)
            mask = _piece(folder / name, "mask", np.dtype(np.uint8))[0] if masked else None
            done = 0
            for batch in documents.iter_batches(BATCH_DOCUMENTS):
                part = slice(done, done + sum(batch["num_tokens"].to_pylist()))
                writer.extend(np.asarray(tokens[part]), batch, np.asarray(mask[part]) if masked else None)
                done = part.stop
        return writer.finish(**held_out)


def _piece(path: Path, kind: str, dtype: np.dtype) -> tuple[np.ndarray, pq.ParquetFile]:
    """The tokens, or the mask, and the documents of a piece, found to fit each other."""
    documents = pq.ParquetFile(f"{path}.parquet")
    try:
        tokens = np.memmap(f"{path}.{kind}", dtype) if os.path.getsize(f"{path}.{kind}") else np.empty(0, dtype)
    except FileNotFoundError as error:
        raise StorageError(f"{path}.{kind} is not there: remove the stage and prepare again") from error
    expected = pc.sum(documents.read(["num_tokens"])["num_tokens"]).as_py() or 0
    if len(tokens) != expected:
        raise StorageError(
            f"{path}.{kind} has {len(tokens)} tokens, its documents {expected}: remove the stage and prepare again"
        )
    return tokens, documents
