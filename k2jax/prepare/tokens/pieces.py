"""Pieces of a store: what a task of tokenizing wrote, joined to a store once all are there, in three stages.

    layout  which tokens of the store are whose          one task a store
    shards  tokens and loss masks, PART_TOKENS of them   one task a part
    stores  documents, digests, store.json               one task a store

A piece is `<name>.tokens`, little-endian ids, of conversations `<name>.mask`, a byte for each id, and `<name>.parquet`,
the documents in them (store.DOCUMENTS): that is written last, so that a piece without it is unfinished. Each document
ends with EOS unless its writer says otherwise.
"""

import bisect
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from k2jax.data import store_parts
from k2jax.data.manifest import canonical_json
from k2jax.data.store import DOCUMENTS, ROW_GROUP
from k2jax.errors import ConfigError, StorageError
from k2jax.files import whole_file, write_json

BATCH_DOCUMENTS = 1 << 12  # joined at a time
PART_TOKENS = 64 * store_parts.SHARD_TOKENS  # that one task writes: 2 or 4 GB
AGAIN = "prepare again with --redo=tokens (of what came as tokens: --redo=token-sources)"
BLOCK_TOKENS = 1 << 20  # held at a time, beside a shard


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


class Part(NamedTuple):
    """Tokens of a store that one task writes: from `first` on, PART_TOKENS of them or what is left."""

    store: str
    first: int


class Pieces(NamedTuple):
    """What the tasks are told: the folder of the stages, where stores go, their names, and StoreWriter's options."""

    stages: Path
    out: Path
    stores: tuple[str, ...]
    options: dict[str, Any]

    @property
    def dtype(self) -> np.dtype:
        """Of the ids."""
        return token_dtype(self.options["vocab_size"])

    def layout(self, store: str) -> dict[str, Any]:
        """What `lay_out` wrote: {"pieces": [names], "ends": [of each, in tokens], "documents": are there some,
        "masked": bool}."""
        return json.loads((self.stages / "layout" / f"{store}.json").read_bytes())

    def parts(self) -> list[Part]:
        """The tasks of `write_part`, once all is laid out."""
        return [part for store in self.stores for part in _parts_of(store, self.layout(store))]

    def part_path(self, part: Part) -> Path:
        """What the task of a part found in it."""
        return self.stages / "shards" / part.store / f"{part.first // PART_TOKENS:05d}.json"


def _parts_of(store: str, layout: dict[str, Any]) -> list[Part]:
    return [Part(store, first) for first in range(0, layout["ends"][-1] if layout["ends"] else 0, PART_TOKENS)]


def lay_out(rank: int, *, pieces: Pieces) -> None:
    """A task: begins a store, if its pieces hold a document, and says which tokens are whose."""
    store = pieces.stores[rank]
    folder, dtype = pieces.stages / "tokens" / store, pieces.dtype
    names = sorted(path.stem for path in folder.glob("*.parquet"))
    sizes = [_num_tokens(folder / name, "tokens", dtype) for name in names]
    has_documents = any(pq.read_metadata(folder / f"{name}.parquet").num_rows for name in names)
    masked = bool(names) and (folder / f"{names[0]}.mask").exists()
    ends = np.cumsum(np.array(sizes, np.int64)).tolist()
    if has_documents:
        store_parts.begin(pieces.out / store, ends[-1], dtype=dtype.name, masked=masked)
    found = {"pieces": names, "ends": ends, "documents": has_documents, "masked": masked}
    write_json(pieces.stages / "layout" / f"{store}.json", found)


def write_part(rank: int, *, parts: list[Part], pieces: Pieces) -> None:
    """A task: writes the tokens of a part, and its loss mask, to the store."""
    part = parts[rank]
    layout, found = pieces.layout(part.store), {}
    for array, suffix, dtype in (("tokens", "tokens", pieces.dtype), ("loss_mask", "mask", np.dtype(np.uint8))):
        if suffix == "tokens" or layout["masked"]:
            values = _pieces_of(pieces.stages / "tokens" / part.store, suffix, dtype, layout, part.first)
            size = {"dtype": dtype.name, "num_tokens": layout["ends"][-1]}
            found[array] = store_parts.write_part(pieces.out / part.store, part.first, values, array=array, **size)
    write_json(pieces.part_path(part), found)


def _pieces_of(folder: Path, suffix: str, dtype: np.dtype, layout: dict, first: int) -> Iterator[np.ndarray]:
    """Tokens, or masks, from token `first` of the store to the end of its part, out of the pieces that hold them."""
    begins, stop = [0, *layout["ends"]], first + PART_TOKENS
    for number in range(bisect.bisect_right(layout["ends"], first), len(layout["pieces"])):
        begin, end = begins[number : number + 2]
        if begin >= stop:
            break
        path = folder / layout["pieces"][number]
        if _num_tokens(path, suffix, dtype) != end - begin:
            raise StorageError(f"{path}.{suffix} is not of {end - begin} tokens: {AGAIN}")
        if end > begin:
            values = np.memmap(f"{path}.{suffix}", dtype, "r")[max(first - begin, 0) : stop - begin]
            yield from (values[at : at + BLOCK_TOKENS] for at in range(0, len(values), BLOCK_TOKENS))


def finish(store: str, *, pieces: Pieces, held_out: dict[str, Any], pairs: bool = False) -> dict[str, Any] | None:
    """Completes a store, once its parts are there; returns what its store.json holds.

    `held_out` are options of StoreWriter.finish. None, and no store, if the pieces hold no document.
    """
    layout, folder = pieces.layout(store), pieces.stages / "tokens" / store
    if not layout["documents"]:
        return None
    own = [json.loads(pieces.part_path(part).read_bytes()) for part in _parts_of(store, layout)]
    arrays = ("tokens", "loss_mask") if layout["masked"] else ("tokens",)
    parts = {array: [one[array] for one in own] for array in arrays}
    options = {**pieces.options, "masked": layout["masked"], "pairs": pairs and layout["masked"]}
    num_tokens = layout["ends"][-1]
    with store_parts.PartsWriter(pieces.out / store, num_tokens=num_tokens, parts=parts, **options) as writer:
        for name, begin, end in zip(layout["pieces"], [0, *layout["ends"]], layout["ends"], strict=False):
            documents = pq.ParquetFile(folder / f"{name}.parquet")
            expected = pc.sum(documents.read(["num_tokens"])["num_tokens"]).as_py() or 0
            if end - begin != expected:
                raise StorageError(
                    f"{folder / name}.tokens has {end - begin} tokens, its documents {expected}: {AGAIN}"
                )
            for batch in documents.iter_batches(BATCH_DOCUMENTS):
                writer.extend_documents(batch)
        return writer.finish(**held_out)


def _num_tokens(path: Path, suffix: str, dtype: np.dtype) -> int:
    try:
        return os.path.getsize(f"{path}.{suffix}") // dtype.itemsize
    except FileNotFoundError as error:
        raise StorageError(f"{path}.{suffix} is not there: {AGAIN}") from error
