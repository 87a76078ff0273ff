"""The loader: batches as a function of the step, read ahead by Grain's threads and worker processes.

One element of the Grain pipeline is one step. So nothing depends on how many threads, workers or hosts
there are, and there is no iterator state to save: resuming at step n is starting at step n.

What a batch holds, for the rows that this host reads (T = sequence length):

    tokens    int32 (rows, T + 1), or (rows, T) with label_shift "inside"
    marks     int32, as tokens: of an sft or dpo stage alone, see conversations.py
    pairs     int32 (rows, P): of a dpo stage alone, see conversations.py
    subset    int32 (rows,)       index in sorted(manifest["stores"])
    position  int64 (rows,)       of order.py
    digest    uint32 (rows, 8)    of `row_digests`, of a row's tokens and then its marks
"""

import hashlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
from absl import flags

from k2jax.data.conversations import ConversationRows
from k2jax.data.manifest import is_packed, num_windows
from k2jax.data.order import Order, Rows
from k2jax.data.released import ReleasedRows
from k2jax.data.store import Store
from k2jax.errors import RunError

Batch = dict[str, np.ndarray]


class BatchSource:
    """The batches of steps first_step to last_step of one stage: `source[step - first_step]`, in any order.

    Args:
        order: the run's.
        stores: every store of the manifest by name; or the rows as a release has them.
        label_shift: the manifest's.
        local_rows: which rows of each step this host reads (indices, or a slice); None for all.
    """

    def __init__(
        self,
        order: Order,
        stores: Mapping[str, Store] | ReleasedRows,
        *,
        label_shift: str,
        first_step: int,
        last_step: int,
        local_rows: npt.ArrayLike | slice | None = None,
    ):
        stage = order.stage_of_step(first_step)
        assert first_step <= last_step <= stage.last_step, (first_step, last_step, stage)
        self._order, self._rows_per_step = order, stage.rows_per_step
        self._released = stores if isinstance(stores, ReleasedRows) else None
        self._stores = [] if self._released else [stores[name] for name in sorted(stores)]
        self._first_step, self._last_step = first_step, last_step
        self._sequence_length = stage.sequence_length
        self._row_length = row_length(stage.sequence_length, label_shift)
        self._local_rows = np.arange(stage.rows_per_step)[slice(None) if local_rows is None else local_rows]
        self._conversations, self._marked, manifest = None, False, order.of_step(first_step).manifest
        if is_packed(manifest["stages"][stage.index]):
            self._marked = True
            self._conversations = None if self._released else ConversationRows(manifest, stage.index, stores)

    def __len__(self) -> int:
        return self._last_step - self._first_step + 1

    def __getitem__(self, index: int) -> Batch:
        step = self._first_step + int(index)
        positions = self._order.positions(step)[self._local_rows]
        rows = self._order.rows(positions)
        if self._conversations:
            read = self._conversations.read(rows, self._row_length)
        elif self._released:
            of_rows = step, self._local_rows, self._rows_per_step, self._row_length
            read = {"tokens": self._released.read(*of_rows)}
            if self._marked:
                read["marks"] = self._released.read(*of_rows, "marks")
        else:
            read = {"tokens": self._read(rows)}
        digested = [read[name] for name in ("tokens", "marks") if name in read]
        return {
            **{name: array.view(np.int32) for name, array in read.items()},
            "subset": rows.subset.astype(np.int32),
            "position": positions,
            "digest": row_digests(self._local_rows, np.concatenate(digested, axis=1)),
        }

    def _read(self, rows: Rows) -> np.ndarray:
        """Their tokens, uint32 (rows, row length), all reads in flight at once."""
        starts = rows.window * self._sequence_length
        reads = []
        for subset in np.unique(rows.subset):
            here = np.flatnonzero(rows.subset == subset)
            reads.append((here, self._stores[subset].start_reading(starts[here], self._row_length)))
        tokens = np.empty((len(starts), self._row_length), np.uint32)
        for here, finish in reads:
            tokens[here] = finish()
        return tokens


def row_length(sequence_length: int, label_shift: str) -> int:
    """Tokens in a row: with label_shift "next" there is one more, the last target."""
    return sequence_length + (label_shift == "next")


def row_digests(indices: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """SHA-256 of each row's index in its step (uint64) and its tokens (uint32), both little-endian.

    Args:
        indices: (rows,), integers from 0, counted over all hosts.
        tokens: (rows, length), integers of 0 to 2**31 - 1.

    Returns the digests as eight little-endian uint32 lanes: (rows, 8).
    """
    heads, rows = np.asarray(indices, "<u8"), np.asarray(tokens, "<u4")
    digests = [hashlib.sha256(head.tobytes() + row.tobytes()) for head, row in zip(heads, rows, strict=True)]
    lanes = np.frombuffer(b"".join(digest.digest() for digest in digests), "<u4")
    return lanes.reshape(-1, 8).astype(np.uint32)


def batch_digest(digests: npt.ArrayLike) -> str:
    """The digest (hex) of a batch: the sum, lane by lane modulo 2**32, of its rows' digests, uint32 (..., 8).

    Sums of parts of the batch may stand for their rows: how rows are spread over hosts makes no difference.
    """
    lanes = np.asarray(digests, np.uint32).reshape(-1, 8).sum(axis=0, dtype=np.uint32)
    return lanes.astype("<u4").tobytes().hex()


def make_loader(
    order: Order,
    stores: Mapping[str, Store] | ReleasedRows,
    *,
    label_shift: str,
    first_step: int,
    last_step: int,
    local_rows: npt.ArrayLike | slice | None = None,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 4,
) -> Iterator[tuple[int, Batch]]:
    """Yields (step, batch) for each step from first_step to last_step, which must lie in one stage.

    Args:
        threads: read ahead in each process; 0 to read only when asked.
        workers: processes to read in; 0 for this one. They end with this process, however it ends.
        prefetch: steps to read ahead, at least `threads`. With workers, some three more for each of them.

    Other arguments as for `BatchSource`. Close the iterator, or use it up, to end threads and workers.

    Raises what the stores raise, and RunError if a worker dies.
    """
    import grain  # here, as it imports JAX and Orbax, which who wants a few batches does without

    source = BatchSource(
        order,
        stores,
        label_shift=label_shift,
        first_step=first_step,
        last_step=last_step,
        local_rows=local_rows,
    )
    ahead = max(threads, -(-prefetch // max(1, workers)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    if workers:
        # Grain 0.2.18 reads its flags, and raises where nothing has parsed absl's (grain #1355).
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        _start_tracker()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _start_worker)
    return _iterate(dataset, first_step, last_step)


def _iterate(dataset: Iterable[Batch], first_step: int, last_step: int) -> Iterator[tuple[int, Batch]]:
    iterator = iter(dataset)
    try:
        for step in range(first_step, last_step + 1):
            try:
                batch = next(iterator)
            except RuntimeError as error:
                hint = "-9: killed, often for memory; -7: /dev/shm, where workers put batches, is full"
                raise RunError(f"the loader failed before step {step}: {error} ({hint})") from error
            # Workers' arrays come as a subclass over shared memory.
            yield step, {name: np.asarray(array) for name, array in batch.items()}
    finally:
        iterator.close()


def _start_tracker() -> None:
    # Python's own process that keeps count of shared memory: it ignores the other signals, and dies of this one.
    before = signal.getsignal(signal.SIGHUP)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        multiprocessing.resource_tracker.ensure_running()
        signal.signal(signal.SIGHUP, before)


def _start_worker(index: int, count: int) -> None:
    # A signal to the whole process group, as schedulers and terminals send it, is for the trainer: it still
    # needs batches for the step it is in, and ends the workers itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A trainer killed by SIGKILL cannot stop its workers: they would live on, holding its log pipe and memory.
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def validation_rows(store: Store, sequence_length: int, label_shift: str, max_windows: int) -> np.ndarray:
    """Up to `max_windows` windows, evenly spaced, of a store's held-out tokens.

    Returns int32 (windows, T + 1), or (windows, T) with label_shift "inside". No windows if the store holds
    out fewer tokens than one needs.
    """
    starts = validation_starts(store, sequence_length, label_shift, max_windows)
    return store.read(starts, row_length(sequence_length, label_shift)).view(np.int32)


def validation_starts(
    store: Store, sequence_length: int, label_shift: str, max_windows: int | None = None
) -> np.ndarray:
    """Where in the store the windows of `validation_rows` start, int64 (windows,); all of them without a limit."""
    available = num_windows(store.num_tokens - store.num_train_tokens, sequence_length, label_shift)
    count = available if max_windows is None else min(available, max_windows)
    windows = np.arange(count) * available // max(1, count)
    return store.num_train_tokens + windows * sequence_length
