"""Every array of a checkpoint that is handed over, read once from the copy, is the one that its meta records.

A damaged checkpoint would be found by whoever checks the release: it is found here first.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts

from k2jax.errors import StorageError
from k2jax.run import storage
from k2jax.run.digest import numpy_digest
from k2jax.run.reading import one_line

BLOCK_BYTES = 1 << 26  # of an array at a time, or one row of its chunks where that is more


def check_arrays(folder: Path) -> None:
    """Of one step's folder. StorageError naming an array that is damaged."""
    meta, thinned = storage.read_meta(folder), storage.is_thinned(folder)
    for name, recorded in meta["digests"].items():
        if thinned and storage.is_moment(name):
            continue
        try:
            found = _digest(storage.open_array(folder, meta, name))
        except StorageError:
            raise
        except Exception as error:  # TensorStore raises ValueError, KeyError, ... for what it finds on disk
            raise StorageError(
                f"checkpoint {meta['step']}: array {name} cannot be read ({one_line(error)}): restore the run's "
                f"checkpoint from a copy, or leave it out"
            ) from error
        if found != recorded:
            raise StorageError(
                f"checkpoint {meta['step']}: array {name} is damaged (digest {found:08x}, recorded {recorded:08x}): "
                f"restore the run's checkpoint from a copy, or leave it out"
            )


def _digest(array: ts.TensorStore) -> int:
    return sum(numpy_digest(block, first) for first, block in _blocks(array)) & 0xFFFFFFFF


def _blocks(array: ts.TensorStore) -> Iterator[tuple[int, np.ndarray]]:
    """(linear index of the first element, elements), whole chunks of the disk at a time, so that none is read twice."""
    if not array.shape:
        yield 0, array.read().result()
        return
    row = math.prod(array.shape[1:])
    chunk = min(array.chunk_layout.read_chunk.shape[0], array.shape[0])
    step = max(BLOCK_BYTES // (row * array.dtype.numpy_dtype.itemsize) // chunk, 1) * chunk
    for first in range(0, array.shape[0], step):
        yield first * row, array[first : min(first + step, array.shape[0])].read().result()
