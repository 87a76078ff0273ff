"""Paths of buckets and leases on them, against real servers (tests/buckets.py): conditions, faults, two writers."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from k2jax import bucket
from k2jax.bucket import BucketPath, at
from k2jax.errors import ConfigError, StorageError
from k2jax.lease import Lease

ODD = "ü #?%2F x"


@pytest.fixture
def folder(server) -> BucketPath:
    yield at(f"{server.bucket()}/runs/{ODD}")
    server.heal()


@pytest.fixture
def impatient(monkeypatch):
    """Gives up after two tries."""
    monkeypatch.setattr(bucket, "RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
    bucket.forget()
    yield
    bucket.forget()


def test_names():
    path = at("gs://bucket/a//b/c.tar.gz/")
    assert (str(path), path.name, path.stem, path.suffix) == (
        "gs://bucket/a/b/c.tar.gz",
        "c.tar.gz",
        "c.tar",
        ".gz",
    )
    assert path.parent == at("gs://bucket/a/b") == at("gs://bucket") / "a" / Path("b")
    assert str(path.with_suffix(".x.y")) == "gs://bucket/a/b/c.tar.x.y"
    assert path.with_name("d") == path.parent / "d" and {path: 1}[at(str(path))] == 1
    assert at("gs://b23/a") < at("s3://b23/a") and pickle.loads(pickle.dumps(path)) == path
    assert at("runs/x") == Path("runs/x") and at(path) is path
    with pytest.raises(TypeError):
        open(path)  # which would look for a folder "gs:"
    with pytest.raises(TypeError):
        Path(path)


@pytest.mark.parametrize("url", ["http://b23/x", "s3://", "s3:///x", "gs://Bucket", "s3://key:secret@b23/x"])
def test_what_is_no_bucket(url):
    with pytest.raises(ConfigError, match="expected a local path, or a URL as gs://BUCKET/PATH") as refused:
        at(url)
    assert "secret" not in str(refused.value)


def test_objects(folder):
    assert not folder.exists() and folder.keys() == []
    (folder / "a" / "b").put(b"1")
    (folder / "c.json").put("ü".encode())
    (folder / ODD).put(b"")
    (folder.parent / f"{folder.name}0" / "x").put(b"a neighbour")
    (folder / "marker/").parent  # noqa: B018
    assert folder.keys() == ["a/b", "c.json", ODD]
    assert [path.name for path in folder.iterdir()] == ["a", "c.json", ODD]
    assert folder.glob("*/*") == [folder / "a" / "b"] and folder.glob("a*") == [folder / "a"]
    assert folder.glob("*.json") == [folder / "c.json"] and (folder / "c.json").read_text() == "ü"
    assert (
        folder.is_dir()
        and (folder / "a").is_dir()
        and not (folder / "a").is_file()
        and (folder / ODD).is_file()
    )
    with pytest.raises(FileNotFoundError):
        (folder / "a").read_bytes()
    (folder / "c.json").unlink()
    folder.delete_tree()
    assert not folder.exists() and (folder.parent / f"{folder.name}0" / "x").exists()


def test_conditions(folder):
    path = folder / "x"
    first = path.create(b"1")
    assert first and path.create(b"2") is None and path.read() == (b"1", first)
    second = path.replace(b"2", first)
    assert second and path.replace(b"3", first) is None and path.read() == (b"2", second)
    assert path.replace(b"2", first) == second, "a write whose answer was lost finds itself"
    assert not path.remove(first) and path.exists()
    assert path.remove(second) and not path.exists() and path.replace(b"4", second) is None


def test_of_many_who_append_all_do(folder):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: (folder / "x").append(b"%d\n" % i), range(8)))
    assert sorted((folder / "x").read_bytes().split()) == [b"%d" % i for i in range(8)]


def test_of_many_who_create_one_does(folder):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: (folder / "x").create(str(i).encode()), range(16)))
    [winner] = [i for i, generation in enumerate(made) if generation]
    assert (folder / "x").read() == (str(winner).encode(), made[winner])


def test_errors_that_pass(server, folder, monkeypatch):
    monkeypatch.setattr(bucket, "RETRIES", {"max_retries": 6, "initial_delay": "10ms", "max_delay": "20ms"})
    bucket.forget()
    server.fail(503, every=3)
    assert all((folder / str(i)).create(b"1") for i in range(3))
    assert len(folder.keys()) == 3 and server.counted()["failed"] > 0


def test_errors_that_stay(server, folder, impatient):
    (folder / "x").put(b"1")
    server.fail(503)
    for verb, act in [
        ("read", (folder / "x").read_bytes),
        ("write", lambda: (folder / "x").put(b"2")),
        ("write", lambda: (folder / "y").create(b"2")),
        ("list", folder.keys),
    ]:
        with pytest.raises(StorageError, match=f"^cannot {verb} {server.scheme}://b.*retry") as error:
            act()
        assert "\n" not in str(error.value) and "http_response" not in str(error.value)
    server.heal()
    assert (folder / "x").read_bytes() == b"1"
    with pytest.raises(StorageError, match=r"(?i)not.?found"):
        at(f"{server.scheme}://no-such-bucket-{os.getpid()}/x").put(b"1")


def test_a_server_that_never_answers(server, folder, monkeypatch):
    monkeypatch.setattr(bucket, "ANSWER_S", 0.3)
    server.fail(0, delay_s=2)
    with pytest.raises(StorageError, match="cannot write"):
        (folder / "x").put(b"1")
    server.heal()


# ---- leases ----------------------------------------------------------------------------------------------------------


def lease(folder: BucketPath, **options) -> Lease:
    return Lease(folder / "lock", f"--workdir={folder}", **{"lease_s": 1.5, "renew_s": 0.2, **options})


def test_a_lease_has_one_holder(folder):
    said: list[str] = []
    first = lease(folder)
    first.take(said.append)
    with pytest.raises(
        ConfigError, match=rf"^--workdir=.*is in use by another run \(host .*pid {os.getpid()}, since"
    ):
        lease(folder).take(said.append)
    assert len(said) == 1
    first.check()
    first.release()
    second = lease(folder)
    second.take(said.append)
    assert len(said) == 1, "nothing to wait for"
    second.release()
    assert not (folder / "lock").exists()


def test_of_many_who_wait_for_a_dead_holder_one_takes_it(folder):
    (folder / "lock").put(b"of another tool")
    leases, taken = [lease(folder) for _ in range(4)], []

    def take(one: Lease) -> None:
        try:
            one.take(lambda line: None)
            taken.append(one)
        except ConfigError:
            pass

    threads = [threading.Thread(target=take, args=(one,)) for one in leases]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    [winner] = taken
    winner.check()
    winner.release()


def test_a_holder_that_slept_stops_before_it_writes(folder):
    asleep = lease(folder, renew_s=1000)
    asleep.take()
    other = lease(folder)
    other.take(lambda line: None)
    with pytest.raises(ConfigError, match=f"has been taken over by host .*pid {os.getpid()}, since"):
        asleep.check()
    with pytest.raises(ConfigError, match="taken over"):
        asleep.check()
    asleep.release()
    other.check()
    other.release()


def test_a_holder_whose_lock_is_deleted_stops(folder):
    held = lease(folder, renew_s=0.05)
    held.take()
    (folder / "lock").unlink()
    held._thread.join(20)
    with pytest.raises(ConfigError, match="its lock is deleted"):
        held.check()


def test_a_lease_survives_a_server_that_fails_for_a_while(server, folder, impatient):
    held = lease(folder, lease_s=1000, renew_s=0.05)
    held.take()
    server.fail(503)
    while server.counted()["failed"] < 6:
        time.sleep(0.05)
    server.heal()
    renewals = held._renewals
    while held._renewals < renewals + 3:
        time.sleep(0.05)
    held.check()
    held.release()


def test_what_a_write_without_an_answer_left_is_ones_own(folder):
    held = lease(folder, renew_s=1000)
    held.take()
    (folder / "lock").put(held._content().replace(b'"renewals": 0', b'"renewals": 1'))
    held._renewed = -1000
    held._renewals = 5
    held.check()
    held.release()
    assert not (folder / "lock").exists()


def test_a_killed_holder_of_this_machine_is_not_waited_for(server, folder):
    code = (
        "import sys, time; from k2jax.bucket import at; from k2jax.lease import Lease\n"
        "Lease(at(sys.argv[1]) / 'lock', 'x').take(); print('held', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    said: list[str] = []
    held = lease(folder, lease_s=1000)
    held.take(said.append)
    assert not said
    held.release()
