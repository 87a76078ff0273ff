"""Documents between the stages of a preparation: files of JSON lines, compressed, whole or not there.

A stage's task writes one file, `documents/<rank>.jsonl.zst`. A document's `id` is the SHA-256 (hex) of its text;
`metadata` holds at least `subset` and `source`, its name (`file:line`, `file`, or a URL), and where known `url`,
`licence`, `date`, `dump`, `language`.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import IO, Any

import orjson
import zstandard
from datatrove.data import Document

from k2jax.errors import StorageError
from k2jax.files import whole_file
from k2jax.prepare.made import remedy

LEVEL = 3  # of zstd: near the best of what costs less than reading JSON
READ_BYTES = 1 << 18


def document(text: str, **metadata: Any) -> Document:
    """A document, by its text; raises UnicodeEncodeError for half a surrogate pair, which is no text."""
    return Document(text=text, id=hashlib.sha256(text.encode()).hexdigest(), metadata=metadata)


def write_documents(path: str | os.PathLike, documents: Iterable[Document]) -> None:
    """Writes them in their order."""
    with whole_file(path) as file, compressor().stream_writer(file, closefd=False) as out:
        for one in documents:
            out.write(to_line(one))


def compressor() -> zstandard.ZstdCompressor:
    """Of every file between stages: a flipped bit in one is an error."""
    return zstandard.ZstdCompressor(LEVEL, write_checksum=True)


def to_line(one: Document) -> bytes:
    """A document's line, with its line feed.

    A copy: what orjson returns is the beginning of a larger buffer, and 122 MB of such lines held take 650 MB.
    """
    return bytes(memoryview(orjson.dumps([one.id, one.text, one.metadata], option=orjson.OPT_APPEND_NEWLINE)))


def read_documents(path: str | os.PathLike) -> Iterator[Document]:
    """What `write_documents` wrote; StorageError if the file is damaged."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:  # a file of no document has a frame of nothing
            raise StorageError(f"{path} is empty: {remedy(path)}")
        yield from _parsed(file, path)


def _parsed(file: IO[bytes], path: str | os.PathLike) -> Iterator[Document]:
    try:
        rest = b""
        for block in _decompressed(file):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                id, text, metadata = orjson.loads(line)
                yield Document(text=text, id=id, metadata=metadata)
        if rest:
            raise ValueError("it ends within a line")
    except (zstandard.ZstdError, ValueError) as error:
        raise StorageError(f"{path} is damaged ({error}): {remedy(path)}") from error


def _decompressed(file: IO[bytes]) -> Iterator[bytes]:
    """The blocks of every frame; zstandard's own reader takes a frame that is cut off for a whole one."""
    decompressor = zstandard.ZstdDecompressor()
    data = file.read(READ_BYTES)
    while data:
        frame = decompressor.decompressobj()
        while True:
            yield frame.decompress(data)
            if frame.eof:
                break
            if not (data := file.read(READ_BYTES)):
                raise ValueError("it is cut off")
        data = frame.unused_data or file.read(READ_BYTES)
