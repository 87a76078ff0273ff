"""Folders of buckets that are complete or not there: made on this machine, and put object by object, one of them last.

Nothing can be renamed there. So a lease lies in the folder for as long as it is being filled, and the object that says
that it is complete comes last: what reads such folders asks for that one.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from k2jax.bucket import PARALLEL, BucketPath, download, upload
from k2jax.errors import ConfigError, RunError
from k2jax.lease import Lease

LEASE = "k2jax.uploading"


@contextmanager
def whole_folder(path: BucketPath, *, last: list[str], say: Callable[[str], None] = print) -> Iterator[Path]:
    """A folder of this machine to fill, which is put to `path` at the end, the files named in `last` last, in order.

    Raises ConfigError where something lies at `path` that no killed program has left there.
    """
    check_free(path)
    lease = Lease(path / LEASE, f"--out={path}")
    lease.take(say)
    try:
        _clear(path)
        with tempfile.TemporaryDirectory(prefix="k2jax-out-") as folder:
            yield Path(folder)
            lease.check()
            put_folder(Path(folder), path, last=last)
            lease.check()
    except BaseException:
        try:
            lease.check()
            _clear(path)
        except RunError:
            lease.stop()  # it stays, and the next one knows by it what the rest is
        else:
            lease.release()
        raise
    lease.release()


def _clear(path: BucketPath) -> None:
    for key in path.keys():
        if key != LEASE:
            (path / key).unlink()


def put_folder(folder: Path, path: BucketPath, *, last: list[str]) -> None:
    """Every file of a folder of this machine, several at a time; those in `last` alone, and in order."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(PARALLEL // 4) as pool:
        list(pool.map(lambda name: upload(folder / name, path / name), [n for n in names if n not in last]))
    for name in (name for name in last if name in names):
        upload(folder / name, path / name)


def check_free(path: BucketPath) -> None:
    """ConfigError where there is something, and no lease in it."""
    keys = path.keys()
    if keys and LEASE not in keys:
        raise ConfigError(f"--out={path} is there and not empty: name a new folder, or remove it")


@contextmanager
def local_copy(path: BucketPath) -> Iterator[Path]:
    """A folder of this machine with all that lies at `path`; it is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="k2jax-copy-") as folder:
        keys = path.keys()
        for key in keys:
            (Path(folder) / key).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(PARALLEL // 4) as pool:
            list(pool.map(lambda key: download(path / key, Path(folder) / key), keys))
        yield Path(folder)
