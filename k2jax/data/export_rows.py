"""The rows of an exported chunk: what each step read, with its documents, as Arrow batches."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from k2jax.data.conversations import ConversationRows
from k2jax.data.document_table import SPAN, DocumentTable
from k2jax.data.loader import BatchSource, batch_digest, row_length
from k2jax.data.provenance import Run
from k2jax.errors import ConfigError

GROUP_TOKENS = 1 << 22  # in a row group, about: what is held in memory


def schema(vocab_size: int, marked: bool) -> pa.Schema:
    """The columns of a chunk; rows of conversations are `marked`."""
    ids = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    marks = [("marks", pa.list_(pa.uint32()))] if marked else []
    return pa.schema(
        [
            ("step", pa.int64()),
            ("row", pa.int32()),
            ("position", pa.int64()),
            ("subset", pa.dictionary(pa.int32(), pa.string())),
            ("epoch", pa.int32()),
            ("window", pa.int64()),
            ("token_ids", pa.list_(ids)),
            ("documents", pa.list_(SPAN)),
            *marks,
        ]
    )


def row_batches(
    run: Run,
    tables: list[DocumentTable | None],
    columns: pa.Schema,
    first: int,
    last: int,
    in_ledger: dict[int, str],
) -> Iterator[pa.RecordBatch]:
    """The rows of steps first to last in order, at most GROUP_TOKENS at a time; each step is checked at its end."""
    stage, label_shift = run.order.stage_of_step(first), run.manifest["label_shift"]
    size = max(1, GROUP_TOKENS // row_length(stage.sequence_length, label_shift))
    options = {"label_shift": label_shift}
    for step in range(first, last + 1):
        digests = []
        for begin in range(0, stage.rows_per_step, size):
            local = slice(begin, begin + size)
            source = BatchSource(
                run.order, run.stores, first_step=step, last_step=step, local_rows=local, **options
            )
            batch = source[0]
            digests.append(batch["digest"])
            yield _record_batch(run, tables, columns, step, begin, batch)
        found = batch_digest(np.concatenate(digests))
        if in_ledger.get(step, found) != found:
            raise ConfigError(
                f"step {step}: the stores give a batch of digest {found[:12]}, {run.workdir}/ledger says that "
                f"the run read {in_ledger[step][:12]}: restore the manifest, journal and stores of that step"
            )


def _record_batch(
    run: Run,
    tables: list[DocumentTable | None],
    columns: pa.Schema,
    step: int,
    first_row: int,
    batch: dict[str, np.ndarray],
) -> pa.RecordBatch:
    rows, length = run.order.rows(batch["position"]), batch["tokens"].shape[1]
    stride = run.order.stage_of_step(step).sequence_length
    count = len(rows.window)
    lists, places = [], []
    if "marks" in batch:
        conversations = ConversationRows(run.manifest, run.order.stage_of_step(step).index, run.stores)
        for name, here, placed in conversations.placed(rows):
            lists.append(tables[run.subset_names.index(name)].of_placed(placed, len(here)))
            places.append(here)
    else:
        for subset in np.unique(rows.subset):
            here = np.flatnonzero(rows.subset == subset)
            lists.append(tables[subset].spans(rows.window[here] * stride, length))
            places.append(here)
    documents = pa.concat_arrays(lists).take(pa.array(np.argsort(np.concatenate(places))))
    ids = pa.array(
        batch["tokens"].ravel().astype(columns.field("token_ids").type.value_type.to_pandas_dtype())
    )
    values = [
        np.full(count, step),
        np.arange(first_row, first_row + count, dtype=np.int32),
        batch["position"],
        pa.DictionaryArray.from_arrays(pa.array(batch["subset"]), run.subset_names),
        rows.epoch.astype(np.int32),
        rows.window,
        pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * length, ids),
        documents,
    ]
    if "marks" in batch:
        marks = pa.array(batch["marks"].ravel().view(np.uint32))
        values.append(pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * length, marks))
    return pa.record_batch(values, schema=columns)
