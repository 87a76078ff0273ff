"""A run in a bucket is released as the same run on a disk."""

from concurrent.futures import ThreadPoolExecutor

from release_runs import MADE
from test_release import files_below

from k2jax import transfer
from k2jax.bucket import BucketPath
from k2jax.release.build import Options, release


def test_the_same_bytes_from_a_bucket(server, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", MADE)
    place = BucketPath(f"{server.bucket()}/run")
    paths = [path for path in tiny_run.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: transfer.upload(path, place / path.relative_to(tiny_run).as_posix()), paths))
    options = Options("last", False, "last", "tokens")
    release(place, tmp_path / "bucket", options)
    release(tiny_run, tmp_path / "disk", options)
    assert files_below(tmp_path / "bucket") == files_below(tmp_path / "disk")
