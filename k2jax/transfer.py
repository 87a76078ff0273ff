"""Files of this machine to objects of a bucket, and back."""

from contextlib import suppress
from pathlib import Path

from k2jax.bucket import BucketPath, arrow_files, storage_errors
from k2jax.errors import StorageError

LARGE_BYTES, PART_BYTES = 1 << 26, 1 << 24


def upload(file: Path, target: BucketPath) -> None:
    """Copies a file of this machine, whole or not at all, a large one in parts; raises StorageError."""
    if file.stat().st_size <= LARGE_BYTES:
        target.put(file.read_bytes())
        return
    with storage_errors("write", target):
        files, place = arrow_files(target)
        try:
            with open(file, "rb") as source, files.open_output_stream(place) as there:
                while data := source.read(PART_BYTES):
                    there.write(data)
        except BaseException:  # pyarrow ends an upload when it is left, however
            with suppress(StorageError):
                target.unlink()
            raise


def download(source: BucketPath, file: Path) -> None:
    """The other way round, into a new file in a folder that is there; raises StorageError."""
    with storage_errors("read", source), source.open() as there, open(file, "wb") as here:
        while data := there.read(PART_BYTES):
            here.write(data)
