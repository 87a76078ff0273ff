"""A checkpoint's parameters as Hugging Face's tensors, one piece after the other, in the order of a forward pass.

Pieces are read, checked and converted on two threads ahead of whoever takes them, as far as a budget of memory goes.
Letters as in model/decoder.py.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from k2jax.errors import StorageError
from k2jax.hf.layout import AS_THEY_ARE, Tensor, tensors
from k2jax.run.digest import numpy_digest
from k2jax.run.saved import SavedStep, check_digests, open_array

BLOCK_BYTES = 1 << 26  # of embedding and head at a time, as float32; a layer's matrix is always whole
BUDGET_BYTES = 2 << 26  # of what is being read and converted ahead, as float32
ALIGNMENT = 64  # bytes
COLUMNS = 256  # copied at a time in a transposition: some cache lines of the result

Item, Result = TypeVar("Item"), TypeVar("Result")


class Piece(NamedTuple):
    """Some rows of a tensor of theirs, or all of it."""

    tensor: Tensor  # its shapes are the piece's
    index: tuple[int | slice, ...]  # of the piece in our array

    @property
    def source_bytes(self) -> int:
        return 4 * math.prod(self.tensor.our_shape)


class Converted(NamedTuple):
    piece: Piece
    data: np.ndarray  # in their layout, contiguous, rounded to the export's type
    digest: int  # the piece's part of the digest of our array
    square: float  # of the piece's L2 norm
    num_nonfinite: int


def stream(saved: SavedStep, dtype: np.dtype) -> Iterator[Converted]:
    """Every tensor, read from the checkpoint and converted.

    Raises StorageError when an array cannot be read and, after the last piece, when one is not what was saved.
    """
    names = dict.fromkeys(tensor.array for tensor in tensors(saved.config.model))
    arrays = {name: open_array(saved, f"{saved.weights}/{name}") for name in names}
    items = [piece for tensor in tensors(saved.config.model) for piece in pieces(tensor, arrays[tensor.array])]
    digests = dict.fromkeys(names, 0)

    def start(piece: Piece) -> Converted:
        return _convert(arrays[piece.tensor.array], piece, dtype, saved.step)

    for item in ahead(items, start, lambda piece: piece.source_bytes, BUDGET_BYTES):
        array = item.piece.tensor.array
        digests[array] = (digests[array] + item.digest) & 0xFFFFFFFF
        yield item
    check_digests(saved, digests)


def pieces(tensor: Tensor, array: ts.TensorStore) -> list[Piece]:
    """A layer's tensor is one piece; embedding and head are some, along V."""
    if tensor.layer is not None:
        return [Piece(tensor, (tensor.layer,))]
    if len(tensor.shape) == 1:
        return [Piece(tensor, ())]
    axis = 0 if tensor.array in AS_THEY_ARE else 1
    found = []
    for part in blocks(array, axis):
        rows = part.stop - part.start
        ours = (rows, tensor.our_shape[1]) if axis == 0 else (tensor.our_shape[0], rows)
        index = (part, slice(None)) if axis == 0 else (slice(None), part)
        found.append(Piece(tensor._replace(shape=(rows, tensor.shape[1]), our_shape=ours), index))
    return found


def blocks(array: ts.TensorStore, axis: int) -> list[slice]:
    """A matrix cut along an axis, into whole chunks on disk, so that none is read twice."""
    size, other = array.shape[axis], array.shape[1 - axis]
    chunk = min(array.chunk_layout.read_chunk.shape[axis], size)
    step = max(BLOCK_BYTES // (4 * other) // chunk, 1) * chunk
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def _convert(array: ts.TensorStore, piece: Piece, dtype: np.dtype, step: int) -> Converted:
    source = read(array, piece.index, piece.tensor.our_shape, f"checkpoint {step}: {piece.tensor.array}")
    digest = _digest(source, piece, array.shape)
    ours = rounded(source, dtype)
    square = sum_of_squares(ours)
    num_nonfinite = 0 if np.isfinite(square) else int(ours.size - np.count_nonzero(np.isfinite(ours)))
    return Converted(piece, contiguous(piece.tensor.to_hf(ours)), digest, square, num_nonfinite)


def read(array: ts.TensorStore, index: tuple[int | slice, ...], shape: tuple[int, ...], what: str) -> np.ndarray:
    """float32 of `array`, at an address that XLA computes on as it is, where it would copy another first."""
    num_bytes = 4 * math.prod(shape)
    buffer = np.empty(num_bytes + ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % ALIGNMENT
    found = buffer[first : first + num_bytes].view(np.float32).reshape(shape)
    try:
        ts.array(found).write(array[index]).result()
    except Exception as error:  # TensorStore raises ValueError, ... for what it finds on disk
        reason = str(error).splitlines()[0][:200]
        raise StorageError(f"{what} cannot be read: {reason}: use another step, or a copy") from error
    return found


def _digest(source: np.ndarray, piece: Piece, shape: tuple[int, ...]) -> int:
    """The part of the array's digest that comes from a piece: a layer, some rows, or some columns of it."""
    match piece.index:
        case (slice(), slice() as columns) if columns.start is not None:
            return sum(numpy_digest(row, i * shape[1] + columns.start) for i, row in enumerate(source))
        case (slice() as rows, _):
            return numpy_digest(source, rows.start * shape[1])
        case (layer,):
            return numpy_digest(source, layer * math.prod(shape[1:]))
    return numpy_digest(source)


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """To the nearest, ties to even; by XLA, that is four times as fast as numpy here."""
    return x if x.dtype == dtype else np.asarray(_round(x, dtype))


@partial(jax.jit, static_argnums=1)
def _round(x: jax.Array, dtype: np.dtype) -> jax.Array:
    return x.astype(dtype)


def sum_of_squares(x: np.ndarray) -> float:
    """In float32, not finite where a value is not (or beyond 1e19)."""
    return float(_sum_of_squares(x))


@jax.jit
def _sum_of_squares(x: jax.Array) -> jax.Array:
    """A program of its own: within `_round` it would make both slower."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def contiguous(view: np.ndarray) -> np.ndarray:
    """A copy in row-major order, some columns at a time: four times as fast as numpy's where `view` is transposed."""
    if view.flags.c_contiguous:
        return view
    copy = np.empty(view.shape, view.dtype)
    for first in range(0, view.shape[1], COLUMNS):
        copy[:, first : first + COLUMNS] = view[:, first : first + COLUMNS]
    return copy


def ahead(
    items: Iterable[Item], start: Callable[[Item], Result], size: Callable[[Item], int], budget: int
) -> Iterator[Result]:
    """`start(item)` of each in order, later ones under way on two threads: as many as fit the budget, at least one."""
    waiting: deque = deque()
    used = 0
    with ThreadPoolExecutor(2) as pool:
        try:
            for item in items:
                while len(waiting) > 1 and used + size(item) > budget:
                    used -= waiting[0][1]
                    yield waiting.popleft()[0].result()
                waiting.append((pool.submit(start, item), size(item)))
                used += size(item)
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)
