"""Pieces of a store: what a task of tokenizing wrote, joined to a store once all are there.

A piece is `<name>.tokens`, little-endian ids, and `<name>.parquet`, the documents in them (store.DOCUMENTS): the second
is written last, so that a piece without it is unfinished. Each document ends with EOS unless its writer says otherwise.
"""

import os
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from k2jax.data.manifest import canonical_json
from k2jax.data.store import DOCUMENTS, ROW_GROUP
from k2jax.errors import ConfigError
from k2jax.prepare.documents import whole_file

BLOCK_TOKENS = 1 << 24  # read at a time when joining


def token_dtype(vocab_size: int) -> np.dtype:
    """Of the ids in stores and pieces."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class PieceWriter:
    """Writes a piece, document by document:

    with PieceWriter(folder / "00003", vocab_size=..., eos_id=...) as piece:
        piece.add(ids, id=sha256_of_text, source="file:line", metadata={...})
    """

    def __init__(self, path: str | os.PathLike, *, vocab_size: int, eos_id: int):
        self.path, self.vocab_size, self.eos_id = str(path), vocab_size, eos_id
        self.num_tokens = 0
        self._eos = np.array([eos_id], token_dtype(vocab_size)).tobytes()
        self._rows: list[tuple] = []

    def __enter__(self) -> Self:
        self._file = whole_file(f"{self.path}.tokens")
        self._out = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)
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
    ) -> None:
        """Appends one document, and EOS after it if `eos`; ConfigError if an id is outside the vocabulary."""
        ids = np.asarray(ids)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            outside = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            raise ConfigError(
                f"document {id} ({source}) has token id {outside}, outside the vocabulary of {self.vocab_size}: "
                "name the tokenizer that it was made with"
            )
        self._out.write(ids.astype(token_dtype(self.vocab_size)).tobytes())
        if eos:
            self._out.write(self._eos)
        self._rows.append((id, source, len(ids) + eos, canonical_json(metadata or {}).decode()))
        self.num_tokens += len(ids) + eos
