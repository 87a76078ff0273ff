"""Objects of gs:// and s3:// buckets, by TensorStore's key-value stores: paths, whole writes, conditional writes.

    at("gs://bucket/run") / "ledger" / "records.jsonl"      a BucketPath, with the methods of pathlib that readers use
    at("runs/smoke")                                        a Path

An object appears whole or not at all, and there is no renaming. What a rename or a lock is on a disk is a conditional
write here: `create` where there is nothing, `replace` what still has the generation (an etag on S3) that was read.

A key is taken as it is written: no % is decoded. Endpoints other than the vendors' come from the variables that their
own tools use: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, and STORAGE_EMULATOR_HOST.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache, total_ordering
from pathlib import Path
from typing import Any, NamedTuple

from k2jax.errors import ConfigError, StorageError

DRIVERS = {"gs": "gcs", "s3": "s3"}
RETRIES = {"max_retries": 7, "initial_delay": "500ms", "max_delay": "16s"}  # about a minute of 503s
ANSWER_S = 600  # by when a request with its retries has an answer
STALLED_S = 60  # a transfer of less than a byte a second for as long is begun again
ABSENT = b"\x02"  # TensorStore's generation of what is not there
PARALLEL = 16  # requests at a time
INDEX_CACHE_BYTES = 100 << 20  # of checkpoints' arrays


class Size(NamedTuple):
    """What there is of os.stat_result."""

    st_size: int


@total_ordering
class BucketPath:
    """An object, or what lies below it, as pathlib would have it. Deliberately no os.PathLike: open() refuses it.

    Raises ConfigError for a URL that is none of a bucket.
    """

    def __init__(self, url: str):
        found = re.fullmatch(r"([a-z0-9]+)://([a-z0-9][a-z0-9._-]{1,221})(/.*)?", url, re.DOTALL)
        if found is None or found[1] not in DRIVERS:
            shown = re.sub(r"//[^/]*@", "//...@", url)  # the name and password that others take there
            raise ConfigError(
                f"{shown}: expected a local path, or a URL as gs://BUCKET/PATH or s3://BUCKET/PATH"
            )
        self.scheme, self.bucket = found[1], found[2]
        self.key = "/".join(part for part in (found[3] or "").split("/") if part)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    # ---- names ---------------------------------------------------------------------------------------------------

    def __truediv__(self, name: str | Path) -> "BucketPath":
        return BucketPath(f"{self}/{name}")

    def joinpath(self, *names: str | Path) -> "BucketPath":
        return BucketPath("/".join(map(str, (self, *names))))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> "BucketPath":
        return BucketPath(f"{self.scheme}://{self.bucket}/{self.key.rpartition('/')[0]}")

    def with_name(self, name: str) -> "BucketPath":
        return self.parent / name

    def with_suffix(self, suffix: str) -> "BucketPath":
        return self.parent / f"{self.stem}{suffix}"

    def absolute(self) -> "BucketPath":
        return self

    # ---- reading -------------------------------------------------------------------------------------------------

    def read(self) -> tuple[bytes, bytes]:
        """(content, generation); raises FileNotFoundError, or StorageError."""
        with storage_errors("read", self):
            found = _kvstore(self.scheme, self.bucket).read(self.key).result(ANSWER_S)
        if found.state != "value":
            raise FileNotFoundError(2, "no such object", str(self))
        return bytes(found.value), found.stamp.generation

    def read_bytes(self) -> bytes:
        return self.read()[0]

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def keys(self, but: str = "") -> list[str]:
        """What lies below, however deep, by path from here, sorted; not what lies in the folder `but`."""
        below = f"{self.key}/" if self.key else ""
        end = f"{self.key}0" if self.key else ""  # "0" is the character after "/"
        spans = [(below, f"{below}{but}/"), (f"{below}{but}0", end)] if but else [(below, end)]
        with storage_errors("list", self):
            store, span = _kvstore(self.scheme, self.bucket), _tensorstore().KvStore.KeyRange
            found = [key for ends in spans for key in store.list(span(*ends)).result(ANSWER_S)]
        keys = (key.decode(errors="surrogateescape") for key in found)
        # Other tools leave markers of folders, whose names end in "/".
        return sorted(
            key.removeprefix(below) for key in keys if key.startswith(below) and not key.endswith("/")
        )

    def iterdir(self) -> Iterator["BucketPath"]:
        return (self / name for name in sorted({key.split("/")[0] for key in self.keys()}))

    def glob(self, pattern: str) -> list["BucketPath"]:
        """Without "**"."""
        parts = pattern.split("/")
        found = {tuple(key.split("/")[: len(parts)]) for key in self.keys()}
        fits = [names for names in found if len(names) == len(parts) and all(map(fnmatchcase, names, parts))]
        return [self.joinpath(*names) for names in sorted(fits)]

    def is_file(self) -> bool:
        """Of the object the listing alone is asked for, however large it is."""
        span = _tensorstore().KvStore.KeyRange(self.key, f"{self.key}\0")
        with storage_errors("list", self):
            found = _kvstore(self.scheme, self.bucket).list(span).result(ANSWER_S)
        return self.key.encode() in found

    def stat(self) -> Size:
        """Its size in bytes; raises FileNotFoundError, or StorageError."""
        with storage_errors("read", self):
            files, place = arrow_files(self)
            found = files.get_file_info(place)
        if not found.is_file:
            raise FileNotFoundError(2, "no such object", str(self))
        return Size(found.size)

    def open(self, mode: str = "rb") -> Any:
        """To read it as a stream, for what is too large for the memory. Errors are pyarrow's, OSError."""
        assert mode == "rb", mode
        files, place = arrow_files(self)
        return files.open_input_file(place)

    def is_dir(self) -> bool:
        """Whether anything lies below: there are no folders of their own."""
        return bool(self.keys())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    # ---- writing -------------------------------------------------------------------------------------------------

    def mkdir(self, *_: Any, **__: Any) -> None:
        """There are no folders."""

    def put(self, data: bytes) -> bytes:
        """Writes over what may be there; returns the new generation."""
        with storage_errors("write", self):
            return _kvstore(self.scheme, self.bucket).write(self.key, data).result(ANSWER_S).generation

    write_bytes = put  # as JAX's compilation cache calls it

    def create(self, data: bytes) -> bytes | None:
        """Writes where nothing is; the generation, or None: something is there."""
        return self.replace(data, ABSENT)

    def replace(self, data: bytes, generation: bytes) -> bytes | None:
        """Writes over that generation; the new one, or None: it is not there any more, and nothing is written."""
        with storage_errors("write", self):
            store = _kvstore(self.scheme, self.bucket)
            written = store.write(self.key, data, if_equal=generation).result(ANSWER_S).generation
        if written:
            return written
        # A write whose answer was lost is tried again, and then finds itself.
        try:
            found, generation = self.read()
        except FileNotFoundError:
            return None
        return generation if found == data else None

    def append(self, data: bytes) -> None:
        """Adds to what is there, by writing all of it anew, whoever else does the same meanwhile."""
        while True:
            try:
                found, generation = self.read()
            except FileNotFoundError:
                found, generation = b"", ABSENT
            if self.replace(found + data, generation):
                return

    def remove(self, generation: bytes) -> bool:
        """Deletes that generation; False where it is not there any more."""
        with storage_errors("delete", self):
            store = _kvstore(self.scheme, self.bucket)
            return store.write(self.key, None, if_equal=generation).result(ANSWER_S).generation == ABSENT

    def unlink(self, missing_ok: bool = False) -> None:
        with storage_errors("delete", self):
            _kvstore(self.scheme, self.bucket).write(self.key, None).result(ANSWER_S)

    def delete_tree(self, last: str = "") -> None:
        """Deletes all that lies below, the object of that name last; what is not there is no error."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda key: (self / key).unlink(), [key for key in self.keys() if key != last]))
        if last:
            (self / last).unlink()


    def copy_tree(self, target: "BucketPath", last: str) -> None:
        """Copies all that lies below to another folder of the same store, which does that by itself; `last` last.

        pyarrow copies an object in one request: of up to 5 GB on S3.
        """
        store, here = arrow_files(self)
        there = f"{target.bucket}/{target.key}"

        def copy(key: str) -> None:
            with storage_errors("copy", self / key):
                store.copy_file(f"{here}/{key}", f"{there}/{key}")

        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(copy, [key for key in self.keys() if key != last]))
        copy(last)


# ---- between a bucket and a disk -------------------------------------------------------------------------------------


def at(path: str | os.PathLike | BucketPath) -> Path | BucketPath:
    """A path of this machine, or of a bucket where a URL is given; ConfigError for what is neither."""
    if isinstance(path, BucketPath):
        return path
    return BucketPath(path) if isinstance(path, str) and "://" in path else Path(path)


# ---- TensorStore -----------------------------------------------------------------------------------------------------


def spec(path: BucketPath, *, folder: bool = False) -> dict[str, Any]:
    """TensorStore's spec of an object, or of the key-value store below it."""
    key = f"{path.key}/" if folder and path.key else path.key
    found = {"driver": DRIVERS[path.scheme], "bucket": path.bucket, "path": key}
    if path.scheme == "gs":
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", gcs_endpoint())
        return found
    if endpoint := s3_endpoint():
        found["endpoint"], found["aws_region"] = endpoint, s3_region() or "us-east-1"
    return found


def context(cache_bytes: int = INDEX_CACHE_BYTES) -> Any:
    """A new one of TensorStore's, with our patience, to open with.

    Indices are put together between stores of one context alone; what one has read it may not read again, also where
    it is another by now.
    """
    found = {"s3_request_retries": RETRIES, "gcs_request_retries": RETRIES}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it complains of each file that it looks into before
        found["aws_credentials"] = {"type": "environment"}
    return _tensorstore().Context({**found, "cache_pool": {"total_bytes_limit": cache_bytes}})


def forget() -> None:
    """What was made for an environment that has changed."""
    _kvstore.cache_clear()


def s3_endpoint() -> str:
    """Of another store that speaks S3; "" for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def s3_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""


def gcs_endpoint() -> str:
    """That of an emulator, "" for Google's own."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return host if not host or "://" in host else f"http://{host}"


def arrow_files(path: BucketPath) -> tuple[Any, str]:
    """pyarrow's file system of a bucket, and the path there."""
    from pyarrow import fs

    root = f"{path.bucket}/{path.key}".rstrip("/")
    if path.scheme == "gs" and gcs_endpoint():
        scheme, _, host = gcs_endpoint().partition("://")
        return fs.GcsFileSystem(anonymous=True, scheme=scheme, endpoint_override=host), root
    if path.scheme == "s3" and (s3_endpoint() or s3_region()):
        scheme, _, host = s3_endpoint().rpartition("://")
        options = {"scheme": scheme or "https", "endpoint_override": host} if host else {}
        return fs.S3FileSystem(region=s3_region() or "us-east-1", **options), root
    return fs.FileSystem.from_uri(f"{path.scheme}://{path.bucket}")[0], root  # finds out the region


@lru_cache
def _kvstore(scheme: str, bucket: str) -> Any:
    return (
        _tensorstore()
        .KvStore.open(spec(BucketPath(f"{scheme}://{bucket}")), context=context())
        .result(ANSWER_S)
    )


def _tensorstore() -> Any:
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(STALLED_S))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    import tensorstore

    return tensorstore


@contextmanager
def storage_errors(verb: str, path: BucketPath) -> Iterator[None]:
    """Makes what TensorStore raises (ValueError for all that a server says) one line of StorageError."""
    try:
        yield
    except (ValueError, OSError, TimeoutError) as error:
        raise StorageError(f"cannot {verb} {path}: {reason(error) or 'no answer'}") from error


def reason(error: BaseException) -> str:
    """What TensorStore's error says, in one line, without the specs, bodies and places in its code that follow."""
    return " ".join(re.split(r" \[[\w -]+=['\"]", str(error))[0].split())
