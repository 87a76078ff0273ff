"""A checkpoint's parameters as Hugging Face's tensors, one piece after the other, in the order of a forward pass.

Pieces are read, checked and converted on two threads ahead of whoever takes them, as far as a budget of memory goes.
Letters as in model.py.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from tensorstore import TensorStore

from k2jax.digest import numpy_digest
from k2jax.errors import StorageError
from k2jax.hf.layout import AS_THEY_ARE, Tensor, tensors
from k2jax.saved import SavedStep, check_digests, open_array

PIECE_BYTES = 1 << 26  # of embedding and head, as float32; a layer's matrix is always whole
BUDGET_BYTES = 3 << 26  # of pieces being read and converted ahead, as float32
COLUMNS = 256  # copied at a time in a transposition: some cache lines of the result

Item, Result = TypeVar("Item"), TypeVar("Result")


class Piece(NamedTuple):
    """Some rows of a tensor of theirs, or all of it."""

    tensor: Tensor  # its shapes are the piece's
    index: tuple[int | slice, ...]  # of the piece in our array
    is_first: bool
    is_head_of_tied: bool = False  # the embedding once more, as the head: no tensor of theirs

    @property
    def source_bytes(self) -> int:
        return 4 * math.prod(self.tensor.our_shape)


class Converted(NamedTuple):
    piece: Piece
    ours: np.ndarray  # in our layout, rounded to the export's type
    theirs: np.ndarray  # the same in their layout, contiguous
    digest: int  # the piece's part of the digest of our array
    square: float  # of the piece's L2 norm
    num_nonfinite: int


def pieces(saved: SavedStep, arrays: dict[str, TensorStore]) -> list[Piece]:
    """Every piece of the model, in the order of a forward pass."""
    found = []
    for tensor in tensors(saved.config.model):
        if tensor.layer is None and len(tensor.our_shape) == 2:
            found += _rows_of_theirs(tensor, arrays[tensor.array])
        else:
            found.append(Piece(tensor, () if tensor.layer is None else (tensor.layer,), True))
    if saved.config.model.tie_embeddings:
        found += [p._replace(is_head_of_tied=True) for p in found if p.tensor.array == "embed_VD"]
    return found


def _rows_of_theirs(tensor: Tensor, array: TensorStore) -> list[Piece]:
    """Embedding and head in pieces along V, which are whole chunks on disk: no chunk is read twice."""
    axis = 0 if tensor.array in AS_THEY_ARE else 1  # V's, in our array
    rows, width = tensor.shape
    chunk = min(array.chunk_layout.read_chunk.shape[axis], rows)
    step = max(PIECE_BYTES // (4 * width) // chunk, 1) * chunk
    found = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        index = tuple(slice(first, last) if i == axis else slice(None) for i in range(2))
        shapes = {
            "shape": (last - first, width),
            "our_shape": tuple(last - first if i == axis else n for i, n in enumerate(tensor.our_shape)),
        }
        found.append(Piece(tensor._replace(**shapes), index, first == 0))
    return found


def stream(saved: SavedStep, dtype: np.dtype) -> Iterator[Converted]:
    """Every piece, read from the checkpoint and converted.

    Raises StorageError when an array cannot be read and, after the last piece, when one is not what was saved.
    """
    names = dict.fromkeys(tensor.array for tensor in tensors(saved.config.model))
    arrays = {name: open_array(saved, f"params/{name}") for name in names}

    def start(piece: Piece) -> Converted:
        return _convert(arrays[piece.tensor.array], piece, dtype, saved.step)

    digests = dict.fromkeys(names, 0)
    for item in ahead(pieces(saved, arrays), start, lambda piece: piece.source_bytes, BUDGET_BYTES):
        if not item.piece.is_head_of_tied:
            array = item.piece.tensor.array
            digests[array] = (digests[array] + item.digest) & 0xFFFFFFFF
        yield item
    check_digests(saved, digests)


def _convert(array: TensorStore, piece: Piece, dtype: np.dtype, step: int) -> Converted:
    try:
        source = array[piece.index].read().result()
    except Exception as error:  # TensorStore raises ValueError, ... for what it finds on disk
        what = str(error).splitlines()[0][:200]
        raise StorageError(
            f"checkpoint {step}: cannot read array {piece.tensor.array}: {what}: use another step, or a copy"
        ) from error
    digest = _digest(source, piece, array.shape)
    with np.errstate(over="ignore"):  # infinite then, and counted
        ours = source.astype(dtype)
    theirs = contiguous(piece.tensor.to_hf(ours))
    square = sum_of_squares(ours)
    num_nonfinite = 0 if np.isfinite(square) else int(ours.size - np.count_nonzero(np.isfinite(ours)))
    return Converted(piece, ours, theirs, digest, square, num_nonfinite)


def _digest(source: np.ndarray, piece: Piece, shape: tuple[int, ...]) -> int:
    """The part of the array's digest that comes from a piece: a layer, some rows, or some columns of it."""
    first = piece.index[-1].start if piece.index and isinstance(piece.index[-1], slice) else None
    if first is not None:  # columns
        return sum(numpy_digest(row, i * shape[1] + first) for i, row in enumerate(source))
    first = 0 if not piece.index else piece.index[0] if piece.tensor.layer is not None else piece.index[0].start
    return numpy_digest(source, first * math.prod(shape[1:]))


def sum_of_squares(x: np.ndarray) -> float:
    """In float64, a part that stays in the cache at a time. Not by BLAS: its threads would fight ours for the cores."""
    flat, total = x.reshape(-1), 0.0
    for first in range(0, flat.size, 1 << 17):
        part = flat[first : first + (1 << 17)].astype(np.float64)
        part *= part
        total += float(part.sum())
    return total


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
