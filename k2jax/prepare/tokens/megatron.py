"""Megatron's token files: NAME.bin, ids one after another, and NAME.idx, which says where documents are.

The index (MMapIndexedDataset of Megatron-LM, little-endian): b"MMIDIDX\\0\\0", uint64 version 1, uint8 dtype, uint64
number of sequences, uint64 number of document ends; then int32 lengths of the sequences, int64 offsets of them in the
.bin in bytes, int64 numbers of sequences before each document, 0 first. A document is a run of sequences, mostly one.
"""

import io
import struct
from collections.abc import Iterator

import numpy as np

from k2jax.errors import ConfigError, StorageError
from k2jax.prepare.sources.files import File, as_stored, size_of
from k2jax.prepare.sources.stored import Stored
from k2jax.prepare.tally import shown_name

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are fractions
BLOCK = 1 << 20  # bytes read at a time


def read_documents(file: File) -> Iterator[np.ndarray]:
    """The documents of a .bin file in the order of its index, as they are, with EOS where they have it.

    Raises ConfigError, before the first one, if the index is missing or damaged or the .bin shorter than it says;
    StorageError if a file cannot be read.
    """
    dtype, lengths, offsets, ends = _index(file)
    with as_stored(file) as raw, io.BufferedReader(raw, BLOCK) as stream:
        for first, last in zip(ends, ends[1:], strict=False):
            parts = [_sequence(stream, file, int(offsets[i]), int(lengths[i]), dtype) for i in range(first, last)]
            yield parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


def _sequence(stream: io.BufferedReader, file: File, offset: int, length: int, dtype: np.dtype) -> np.ndarray:
    stream.seek(offset)
    data = stream.read(length * dtype.itemsize)
    if len(data) != length * dtype.itemsize:
        raise StorageError(f"{shown_name(file.path)} ended at byte {offset + len(data)} while it was read: run again")
    return np.frombuffer(data, dtype)


def _index(file: File) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(dtype, lengths, offsets, documents' ends), found to fit together and to the .bin."""
    path, name = f"{file.path.removesuffix('.bin')}.idx", shown_name(f"{file.name.removesuffix('.bin')}.idx")
    if not file.path.endswith(".bin"):
        raise ConfigError(f"{shown_name(file.name)} is no .bin: name Megatron's .bin files, as megatron:DATA/*.bin")
    try:
        with Stored(path) as raw:
            data = raw.readall()
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise ConfigError(f"{shown_name(file.name)} has no {name} beside it: copy both") from error
    if len(data) < HEADER.size or data[:9] != MAGIC:
        raise ConfigError(f"{name} begins with {data[:9]!r}, expected {MAGIC!r}: it is no index of Megatron's")
    _, version, code, num_sequences, num_ends = HEADER.unpack_from(data)
    if version != 1 or code not in DTYPES:
        raise ConfigError(f"{name} has version {version}, dtype {code}: expected version 1, a dtype of {[*DTYPES]}")
    if len(data) < HEADER.size + 12 * num_sequences + 8 * num_ends:
        raise ConfigError(f"{name} ends within its {num_sequences} sequences and {num_ends} ends: copy it again")
    dtype = np.dtype(DTYPES[code])
    lengths = np.frombuffer(data, "<i4", num_sequences, HEADER.size)
    offsets = np.frombuffer(data, "<i8", num_sequences, HEADER.size + 4 * num_sequences)
    ends = np.frombuffer(data, "<i8", num_ends, HEADER.size + 12 * num_sequences)
    if num_ends == 0 or ends[0] != 0 or ends[-1] != num_sequences or (np.diff(ends) < 0).any():
        raise ConfigError(f"{name}: its documents do not cover its {num_sequences} sequences: copy it again")
    size, needed = size_of(file), int((offsets + lengths.astype(np.int64) * dtype.itemsize).max(initial=0))
    if (lengths < 0).any() or (offsets < 0).any() or needed > size:
        raise ConfigError(
            f"{shown_name(file.name)} has {size} bytes, its index needs {needed}: it is truncated or not its .bin"
        )
    return dtype, lengths, offsets, ends
