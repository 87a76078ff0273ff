"""The lock of a folder, where the file system has locks and where it has none: real processes that want it at once."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

from k2jax import locks

# Lustre without -o flock. Times are short here: a beat is 15 s.
WITHOUT_FLOCK = """
import errno, fcntl, os
def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
"""
HOLDER = """
import sys, time
sys.path.insert(0, {repository!r})
from pathlib import Path
from k2jax import locks
locks.BEAT_S, locks.STALE_S = 0.1, {stale_s}
{patch}
time.sleep(max(0, {at} - time.time()))
try:
    with locks.hold(Path({path!r}), "the holder {name}", log=lambda line: print(line, file=sys.stderr)):
        print("held", flush=True)
        sys.stdin.read()
except locks.Held as error:
    print("refused:", error, flush=True)
"""


def start(path: Path, patch: str = WITHOUT_FLOCK, *, stale_s: float = 1.0, name: int = 0, at: float = 0):
    code = HOLDER.format(repository=str(REPOSITORY), patch=patch, stale_s=stale_s, path=str(path), name=name, at=at)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        **{n: subprocess.PIPE for n in ("stdin", "stdout", "stderr")},
        text=True,
    )


def end(process: subprocess.Popen) -> str:
    return process.communicate(timeout=60)[1]


@pytest.fixture
def no_flock(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "STALE_S", 1.0)
    monkeypatch.setattr(locks, "_told", set())

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.fault("B8")
@pytest.mark.parametrize("patch", ["", WITHOUT_FLOCK], ids=["flock", "none"])
def test_one_holds_it_and_the_next_may(tmp_path: Path, patch: str):
    path = tmp_path / "lock"
    first = start(path, patch)
    assert first.stdout.readline() == "held\n"
    assert path.read_text() == "the holder 0"
    second = start(path, patch)
    assert second.stdout.readline() == "refused: the holder 0\n"
    assert ("no lock for all hosts" in end(first)) == bool(patch)
    third = start(path, patch)
    assert third.stdout.readline() == "held\n"
    end(third)


@pytest.mark.fault("B8")
@pytest.mark.parametrize("patch", ["", WITHOUT_FLOCK], ids=["flock", "none"])
def test_a_killed_holder_leaves_it_free_at_once(tmp_path: Path, patch: str):
    first = start(tmp_path / "lock", patch, stale_s=1000)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    second = start(tmp_path / "lock", patch, stale_s=1000)
    assert second.stdout.readline() == "held\n"
    assert ("which is gone" in end(second)) == bool(patch)


def test_of_many_at_once_one_gets_it(tmp_path: Path):
    """After a killed holder, too, whom all of them find gone."""
    for _ in range(2):
        at = time.time() + 2.5
        all_of_them = [start(tmp_path / "lock", name=name, at=at) for name in range(6)]
        told = [process.stdout.readline() for process in all_of_them]
        assert told.count("held\n") == 1 and all(line.startswith("refused: ") for line in told if line != "held\n")
        all_of_them[told.index("held\n")].kill()
        for process in all_of_them:
            end(process)


def held_elsewhere(path: Path, **other: object) -> None:
    state = {"who": "host far", "beat": 7, "free": False, "process": {**locks._this_process(), **other}}
    path.with_name("lock.000003").write_text(json.dumps(state))


@pytest.mark.parametrize("other", [{"host": "far"}, {"boot": "other"}, {"namespace": "pid:[1]"}])
def test_a_process_that_cannot_be_seen_from_here_is_watched(tmp_path, no_flock, other):
    """Its number says nothing: on another host, or in a container, it is another's. It counts as gone if silent."""
    path, said = tmp_path / "lock", []
    held_elsewhere(path, **other, pid=2**22 + 1)
    locks.hold(path, "me", said.append).release()
    assert "no lock" in said[0] and "watching" in said[1] and "no sign of life" in said[2] and "host far" in said[2]
    assert [p.name for p in tmp_path.glob("lock.*")] == ["lock.000004"]


def test_one_that_beats_elsewhere_holds_it(tmp_path, no_flock, monkeypatch):
    path = tmp_path / "lock"
    held_elsewhere(path, host="far")
    monkeypatch.setattr(locks, "STALE_S", 1000.0)
    beats = iter(range(100))
    sleep = time.sleep

    def sleep_and_beat(seconds: float) -> None:
        held = json.loads(path.with_name("lock.000003").read_text())
        path.with_name("lock.000003").write_text(json.dumps({**held, "beat": 100 + next(beats)}))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep_and_beat)
    with pytest.raises(locks.Held, match="host far"):
        locks.hold(path, "me", print)
    assert [p.name for p in tmp_path.glob("lock.*")] == ["lock.000003"]


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path, no_flock):
    held_elsewhere(tmp_path / "lock", started="12")
    locks.hold(tmp_path / "lock", "me", print).release()


def test_half_a_file_is_watched_too(tmp_path, no_flock):
    """Of one that takes it just now, or was killed at that, or of a full disk."""
    (tmp_path / "lock.000001").write_text('{"who": "x"')
    locks.hold(tmp_path / "lock", "me", print).release()
    assert [p.name for p in tmp_path.glob("lock.*")] == ["lock.000002"]


def test_a_holder_that_was_stopped_and_replaced_ends_when_it_goes_on(tmp_path: Path):
    """Ctrl-Z, or a machine that sleeps. Seen from elsewhere it is silent; here the finder is told that it is far."""
    far = WITHOUT_FLOCK + "world = locks._world\nlocks._world = lambda: {**world(), 'host': 'far'}"
    stopped = start(tmp_path / "lock", far)
    assert stopped.stdout.readline() == "held\n"
    stopped.send_signal(signal.SIGSTOP)
    second = start(tmp_path / "lock", name=1)
    assert second.stdout.readline() == "held\n"
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(60) == 74
    assert "another process took it while this one was stopped" in stopped.stderr.read()
    assert second.poll() is None and json.loads((tmp_path / "lock.000002").read_text())["who"] == "the holder 1"
    end(second)
    assert json.loads((tmp_path / "lock.000002").read_text())["free"]


MOUNTS = """\
21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw,errors=remount-ro
30 21 0:50 / /lus\\040tre rw - lustre 10.0.0.1@tcp:/fs rw,lazystatfs,localflock
31 30 0:51 / /lus\\040tre/good rw - lustre 10.0.0.1@tcp:/fs2 rw,flock
40 21 0:52 / /home rw - nfs server:/home rw,vers=3,nolock,local_lock=all
"""


def test_a_lock_of_one_host_alone_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "MOUNTS", tmp_path / "mountinfo")
    (tmp_path / "mountinfo").write_text(MOUNTS)
    found = {
        path: sorted(locks._mount_options(Path(path)) & locks.OF_ONE_HOST)
        for path in ("/x/lock", "/lus tre/run/lock", "/lus tre/good/lock", "/lus trees/lock", "/home/lock")
    }
    assert found == {
        "/x/lock": [],
        "/lus tre/run/lock": ["localflock"],
        "/lus tre/good/lock": [],
        "/lus trees/lock": [],
        "/home/lock": ["local_lock=all", "nolock"],
    }
    (tmp_path / "mountinfo").write_text(f"21 1 8:1 / {tmp_path} rw - lustre fs rw,localflock\n")
    said: list[str] = []
    locks.hold(tmp_path / "lock", "me", said.append).release()
    assert "localflock" in said[0] and (tmp_path / "lock.000001").exists()


def test_another_error_is_an_error(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"):
        locks.hold(tmp_path / "lock", "me")
