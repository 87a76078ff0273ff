"""Folders of buckets that are complete or not there."""

from functools import partial

import pytest

from k2jax import bucket, transfer, upload
from k2jax.bucket import at
from k2jax.errors import ConfigError, StorageError
from k2jax.lease import Lease


@pytest.fixture
def out(server, monkeypatch):
    monkeypatch.setattr(bucket, "RETRIES", {"max_retries": 3, "initial_delay": "10ms", "max_delay": "20ms"})
    bucket.forget()
    yield at(f"{server.bucket()}/exports/k2")
    server.heal()


def fill(out, **options) -> None:
    with upload.whole_folder(out, last=["config.json", "parity.json"], say=lambda line: None) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "a").write_bytes(b"a" * 1000)
        for name in ("parity.json", "config.json", "README.md"):
            (folder / name).write_text(name)


def test_there_and_back(out, monkeypatch):
    monkeypatch.setattr(transfer, "LARGE_BYTES", 100)  # in parts
    fill(out)
    assert out.keys() == ["README.md", "config.json", "parity.json", "weights/a"]
    with upload.local_copy(out) as folder:
        assert (folder / "weights" / "a").read_bytes() == b"a" * 1000
    assert not folder.exists()
    with pytest.raises(
        ConfigError, match=f"--out={out} is there and not empty: name a new folder, or remove it"
    ):
        fill(out)


def test_it_is_complete_at_its_last_object_or_begun_again(server, out, monkeypatch):
    server.fail(403, match="config.json")
    with pytest.raises(StorageError, match="cannot write .*config.json"):
        fill(out)
    server.heal()
    assert out.keys() == [], "nothing is left where that can be"
    server.fail(403, match="config.json", method="")
    (out / "weights" / "a").put(b"half")
    (out / "unexpected").put(b"of a killed program")
    with pytest.raises(ConfigError, match="not empty"):
        fill(out)
    server.heal()
    (out / upload.LEASE).put(b"of a killed program")
    monkeypatch.setattr(upload, "Lease", partial(Lease, lease_s=0.3, renew_s=0.1))
    fill(out)
    assert out.keys() == ["README.md", "config.json", "parity.json", "weights/a"]


def test_what_could_not_be_removed_is_known_by_its_lease(server, out, monkeypatch):
    monkeypatch.setattr(upload, "Lease", partial(Lease, lease_s=0.3, renew_s=0.1))
    with pytest.raises(StorageError), upload.whole_folder(out, last=[]) as folder:
        (folder / "x").write_text("x")
        (folder / "y").write_text("y")
        upload.put_folder(folder, out, last=[])
        server.fail(403, match="k2/x")
        upload.put_folder(folder, out, last=[])
    server.heal()
    assert upload.LEASE in out.keys()
    fill(out)
    assert out.keys() == ["README.md", "config.json", "parity.json", "weights/a"]


def test_a_failure_leaves_nothing_but_what_was_there(out):
    with pytest.raises(ZeroDivisionError), upload.whole_folder(out, last=[]) as folder:
        (folder / "x").write_text("x")
        raise ZeroDivisionError
    assert out.keys() == [] and not folder.exists()
