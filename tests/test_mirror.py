"""The small files of a run at a URL: put whole, over what was seen, rows first."""

import threading
import time

import buckets
import pytest

from k2jax import bucket
from k2jax.bucket import at
from k2jax.errors import ConfigError, StorageError
from k2jax.run.mirror import Mirror


@pytest.fixture(scope="module")
def server():
    with buckets.serving("gs") as server:
        bucket.forget()
        yield server
    bucket.forget()


@pytest.fixture
def workdir(server):
    yield at(f"{server.bucket()}/run")
    server.heal()


def free() -> None:
    """No lease stops this one."""


def write(mirror: Mirror, name: str, text: str) -> None:
    path = mirror.local / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_there_and_back(workdir):
    for name in ("checkpoints/1/a", "committed/1", "evals/1/x", "lock"):
        (workdir / name).put(b"of others")
    first = Mirror(workdir, free)
    first.fetch()
    assert not list(first.local.iterdir())
    for name in ("config.json", "ledger/chunk-00001.jsonl", "ledger/records.jsonl", "tensorboard/events"):
        write(first, name, "1\n")
    write(first, "metrics/chunk-00001.jsonl.new-host-1", "half")
    first.put()
    write(first, "ledger/chunk-00001.jsonl", "1\n2\n")
    (first.local / "ledger" / "records.jsonl").unlink()
    first.close()
    assert not first.local.exists()
    small = ["config.json", "ledger/chunk-00001.jsonl"]
    others = ["committed/1", "evals/1/x", "lock", "tensorboard/events"]
    assert workdir.keys("checkpoints") == sorted([*small, *others])
    second = Mirror(workdir, free)
    second.fetch()
    assert sorted(str(path.relative_to(second.local)) for path in second._files()) == small
    assert (second.local / small[1]).read_text() == "1\n2\n"
    second.close()


def test_what_has_not_changed_is_not_put_again(server, workdir):
    mirror = Mirror(workdir, free)
    write(mirror, "a", "1")
    mirror.put()
    server.heal()
    mirror.put()
    assert server.counted()["seen"] == 0
    mirror.close()


def test_rows_come_before_what_closes_over_them(server, workdir):
    mirror = Mirror(workdir, free)
    write(mirror, "ledger/records.jsonl", "1")
    time.sleep(0.01)
    write(mirror, "ledger/chunk-00001.jsonl", "1")
    server.fail(403, match="chunk-00001")
    with pytest.raises(StorageError, match="chunk-00001"):
        mirror.put()
    assert not workdir.exists()
    server.heal()
    mirror.close()
    assert len(workdir.keys()) == 2


def test_two_writers_cannot_mix(workdir):
    one, two = Mirror(workdir, free), Mirror(workdir, free)
    for mirror in (one, two):
        write(mirror, "journal.jsonl", f"by {id(mirror)}")
    one.put()
    with pytest.raises(
        StorageError, match=r"journal.jsonl was changed by another program while this run had it"
    ):
        two.put()
    write(one, "journal.jsonl", "more")
    one.close()
    assert (workdir / "journal.jsonl").read_text() == "more"
    (two.local / "journal.jsonl").unlink()
    two.close()


def test_nothing_is_put_without_the_lease(workdir):
    def lost() -> None:
        raise ConfigError("taken over")

    mirror = Mirror(workdir, lost)
    mirror.put()
    write(mirror, "a", "1")
    with pytest.raises(ConfigError, match="taken over"):
        mirror.close()
    assert not workdir.exists()


def test_what_grows_is_put_by_and_by(server, workdir, monkeypatch):
    monkeypatch.setattr("k2jax.run.mirror.LARGE_BYTES", 10)
    said: list[str] = []
    mirror = Mirror(workdir, free, said.append)
    write(mirror, "large", "x" * 11)
    mirror.keep_putting(0.02)
    write(mirror, "small", "1")
    until(lambda: (workdir / "small").exists())
    server.fail(403)
    write(mirror, "small", "12")
    until(lambda: said)
    server.heal()
    until(lambda: (workdir / "small").read_text() == "12")
    assert "not yet in gs://" in said[0] and not (workdir / "large").exists()
    mirror.close()
    assert (workdir / "large").exists() and threading.active_count() < 50


def until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
