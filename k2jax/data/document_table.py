"""Which documents given windows of a store are made of, for many windows at a time.

`Store.documents_in` and `Store.document` decode 65,536 records of documents.parquet for one answer, which is fast for
one step and slow for windows spread over a large store. Here ids and sources lie uncompressed in a scratch file that is
mapped into memory: a look-up reads a few pages, and what is in memory at a time does not grow with the store.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from k2jax.data.packing import Placed
from k2jax.data.storage import storage_errors
from k2jax.data.store import REMEDY, ROW_GROUP, Store
from k2jax.errors import ConfigError

NAMES = pa.schema([("id", pa.string()), ("source", pa.string())])
SPAN = pa.struct(
    [
        *NAMES,
        ("start_in_document", pa.int64()),  # tokens of the document before its part in the row
        ("start", pa.int32()),  # the part is tokens [start, stop) of the row
        ("stop", pa.int32()),
    ]
)


class DocumentTable:
    """The documents of one store, from the scratch files that `build` made."""

    def __init__(self, path: str | os.PathLike):
        self._starts = np.memmap(f"{path}.starts", np.int64, "r")
        self._names = pa.ipc.open_file(pa.memory_map(f"{path}.arrow"))
        self._batch = lru_cache(maxsize=64)(self._names.get_batch)

    @classmethod
    def build(cls, store: Store, path: str | os.PathLike) -> Self:
        """Writes `path`.starts and `path`.arrow, together some 150 bytes a document, and opens them.

        Raises StorageError if documents.parquet cannot be read or the files not written, ConfigError if its documents
        are not those of the store's tokens.
        """
        num_documents = num_tokens = 0
        with (
            storage_errors(f"store {store.path}: cannot copy documents.parquet to {Path(path).parent}"),
            store.open_documents() as file,
            open(f"{path}.starts", "wb") as starts,  # written, not mapped: a full disk is an error, not a signal
            pa.ipc.new_file(f"{path}.arrow", NAMES) as names,
        ):
            parquet = pq.ParquetFile(file)
            starts.write(np.zeros(1, np.int64).tobytes())
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, ["id", "source", "num_tokens"])
                ends = num_tokens + np.cumsum(table["num_tokens"].to_numpy(), dtype=np.int64)
                starts.write(ends.tobytes())
                names.write_batch(table.select(NAMES.names).combine_chunks().to_batches()[0])
                num_documents, num_tokens = num_documents + len(table), int(ends[-1])
        found, expected = (num_documents, num_tokens), (store.num_documents, store.num_tokens)
        if found != expected:
            raise ConfigError(
                f"store {store.path}: documents.parquet has {found} documents and tokens, the store "
                f"{expected}: {REMEDY}"
            )
        return cls(path)

    def spans(self, begins: npt.ArrayLike, length: int) -> pa.ListArray:
        """For each of the windows [begin, begin + length) the parts of documents in it, a list of SPAN."""
        begins = np.asarray(begins, np.int64)
        ends = begins + length
        first = np.searchsorted(self._starts, begins, side="right") - 1
        counts = np.searchsorted(self._starts, ends, side="left") - first
        offsets = np.concatenate([[0], np.cumsum(counts)])
        row = np.repeat(np.arange(len(begins)), counts)
        index = first[row] + np.arange(len(row)) - offsets[row]
        document = self._starts[index]
        start = np.maximum(document, begins[row])
        stop = np.minimum(self._starts[index + 1], ends[row])
        return self._listed(offsets, index, (start - document, start - begins[row], stop - begins[row]))

    def of_placed(self, placed: Placed, rows: int) -> pa.ListArray:
        """For each of the `rows` rows of conversations in which those stand, a list of SPAN."""
        offsets = placed.row.searchsorted(np.arange(rows + 1))
        places = (np.zeros_like(placed.start), placed.start, placed.start + placed.length)
        return self._listed(offsets, placed.document, places)

    def _listed(self, offsets: np.ndarray, index: np.ndarray, places: tuple[np.ndarray, ...]) -> pa.ListArray:
        """Of documents `index`, at SPAN's three `places`, a list for each row: from its offset to the next one's."""
        columns = [*self._look_up(index), *(pa.array(place) for place in places)]
        fields = [column.cast(field.type) for column, field in zip(columns, SPAN, strict=True)]
        return pa.ListArray.from_arrays(
            offsets.astype(np.int32), pa.StructArray.from_arrays(fields, fields=list(SPAN))
        )

    def _look_up(self, index: np.ndarray) -> list[pa.Array]:
        """Ids and sources of documents (n,)."""
        group = index // ROW_GROUP
        found, places = [], []
        for number in np.unique(group):
            here = np.flatnonzero(group == number)
            found.append(self._batch(int(number)).take(pa.array(index[here] % ROW_GROUP)))
            places.append(here)
        table = pa.Table.from_batches(found, NAMES).combine_chunks()
        back = pa.array(np.argsort(np.concatenate(places)))
        return [pc.take(column, back).combine_chunks() for column in table.columns]
