"""k2jax.files: a file or folder is there whole and on the disk, or as it was; whatever kills, fills or fails."""

import glob
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from k2jax import files
from k2jax.errors import ConfigError, StorageError
from k2jax.evals.results import Identity, Outcome, Results
from k2jax.run.ledger import Ledger, StepLog


def child(program: str, *arguments: object, **options: object) -> subprocess.Popen:
    """A program on its own, with k2jax.files imported."""
    command = [sys.executable, "-c", f"import os, sys\nfrom k2jax import files\n{program}", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


WRITES = """
from contextlib import ExitStack
from pathlib import Path
run = Path(sys.argv[1])
with ExitStack() as stack:
    for name in sys.argv[2:]:
        file = stack.enter_context(files.whole_file(run / name))
        file.write(b'{"half')
        file.flush()
    folder = stack.enter_context(files.whole_folder(run / "out"))
    (folder / "model").write_bytes(b"half")
    print(flush=True)
    sys.stdin.read()
"""


def test_a_kill_leaves_the_old_files_and_confuses_no_reader(tmp_path):
    """A process is killed while it has a half of everything written."""
    whole = {
        "manifest.json": b'{"seed": 1}',
        "metrics/chunk-00001.jsonl": b'{"step": 1}\n{"step": 2}\n',
        "ledger/records.jsonl": b'{"last_step": 1}\n',
        "evals/10/a.json": None,  # not there yet
    }
    for name, data in whole.items():
        if data:
            files.write_bytes(tmp_path / name, data)
    process = child(WRITES, tmp_path, *whole, stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = set(listing(tmp_path)) - set(whole)
    assert len(left) == 5 and all(".new-" in name for name in left)

    assert files.read_json(tmp_path / "manifest.json") == {"seed": 1} and not (tmp_path / "out").exists()
    metrics, ledger = StepLog(tmp_path / "metrics", None), Ledger(tmp_path / "ledger", None)
    assert [row["step"] for row in metrics.rows()] == [1, 2]
    assert ledger.records() == [{"last_step": 1}] and list(ledger.steps.rows()) == []
    assert Results(tmp_path).all() == []

    assert metrics.truncate(1) == 1 and [row["step"] for row in metrics.rows()] == [1]
    assert ledger.steps.truncate(1) == 0 and ledger.records() == [{"last_step": 1}]
    Results(tmp_path).add(10, Identity("t", 1, {}, 0, ""), Outcome("", {}, [], {}), {})
    files.remove_leftovers(tmp_path)
    assert len(Results(tmp_path).all()) == 1 and not list(tmp_path.rglob("*.new-*")), "the next writers tidied up"


@pytest.mark.parametrize("end", [KeyError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_what_was_there(tmp_path, end):
    files.write_text(tmp_path / "x", "old")
    with pytest.raises(end), files.whole_file(tmp_path / "x") as file:
        file.write(b"half")
        raise end
    with pytest.raises(end), files.whole_folder(tmp_path / "y") as folder:
        (folder / "half").write_text("half")
        raise end
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x", {"no json": object()})
    assert listing(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was synced and what renamed, in order: ("file", name), ("folder", name), ("rename", new name)."""
    found, fsync, rename = [], os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).partition(".new-")[0]
        found.append(("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file", name))
        fsync(descriptor)

    def recorded_rename(old: Path, new: Path) -> None:
        found.append(("rename", new.name))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    monkeypatch.setattr(os, "rename", recorded_rename)
    return found


def test_file_and_folder_are_synced_around_the_rename(tmp_path, events):
    here = ("folder", tmp_path.name)
    files.write_text(tmp_path / "x", "text")
    assert events == [("file", "x"), ("rename", "x"), here]
    events.clear()
    files.write_json(tmp_path / "new" / "x", 1)
    assert events == [here, ("file", "x"), ("rename", "x"), ("folder", "new")]
    events.clear()
    with files.whole_folder(tmp_path / "y") as folder:
        (folder / "b").mkdir()
        (folder / "b" / "c").write_text("")
    assert events == [("folder", "y"), ("file", "c"), ("folder", "b"), ("rename", "y"), here]
    events.clear()
    for line in (b"1\n", b"2\n"):
        files.append_line(tmp_path / "log", line)
    assert events == [("file", "log"), here, ("file", "log")] and (tmp_path / "log").read_bytes() == b"1\n2\n"


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (
    lambda: files.write_bytes(sys.argv[1], b"x" * 100_000),
    lambda: files.write_text(sys.argv[1], "x" * 1001),  # in a buffer until the end
    lambda: files.append_line(sys.argv[1], b"x" * 1001),
):
    try:
        write()
    except OSError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path):
    """A limit on the size of files stands for it; /dev/full for a line that does not go in."""
    files.write_text(tmp_path / "x", "old\n")
    process = child(FULL, tmp_path / "x")
    told = process.communicate()[0].decode().splitlines()
    assert process.returncode == 0 and len(told) == 3, told
    assert [line.partition("] ")[2] for line in told[:2]] == [f"File too large: '{tmp_path}/x'"] * 2
    assert "No space left on device" in told[2]  # it began to go in, and was taken out again
    assert listing(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old\n"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY, "this process has no limit"
    with pytest.raises(OSError, match="No space left"):
        files.append_line("/dev/full", b"line\n")


def test_only_plain_files_are_written_over(tmp_path):
    """A rename over /dev/null would be the end of it; tried on a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(StorageError, match="is no plain file"):
            files.write_text(path, "text")
    assert (tmp_path / "pipe").is_fifo()


TEXT = "é 漢\n\U0001f600\u2028\r\n"
PLAIN = f"""
import locale
assert locale.getpreferredencoding(False) == "ANSI_X3.4-1968" and not sys.flags.utf8_mode
text = {ascii(TEXT)}
files.write_text(sys.argv[1] + "/text", text)
files.write_json(sys.argv[1] + "/json", [text])
with files.whole_file(sys.argv[1] + "/file", "w") as file:
    file.write(text)
assert files.read_json(sys.argv[1] + "/json") == [text]
"""


def test_text_is_utf8_whatever_the_locale(tmp_path):
    process = child(PLAIN, tmp_path, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert process.communicate()[0] == b"" and process.returncode == 0
    assert {(tmp_path / name).read_bytes() for name in ("text", "file")} == {TEXT.encode()}
    assert (tmp_path / "json").read_bytes() == json.dumps([TEXT], indent=1).encode() + b"\n"


def test_damaged_json_is_named(tmp_path):
    for data in (b'{"half', b"\xff", b""):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(ConfigError, match="x.json is damaged: .*; restore it from a copy"):
            files.read_json(tmp_path / "x.json")


def test_leftovers_of_others_are_let_be_unless_nobody_else_can_be_there(tmp_path):
    ended = child("")
    ended.wait()
    here = socket.gethostname()
    dead, alive = f"a[1].new-{here}-{ended.pid}", f"a[1].new-{here}-{os.getppid()}"
    names = {dead, alive, "a[1].new-else-where-1", f"b.new-{here}-{ended.pid}", "a[1].new-edition", "a[1]"}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    files.remove_leftovers(tmp_path, glob.escape("a[1]"))
    assert {path.name for path in tmp_path.iterdir()} == names - {dead}
    files.remove_leftovers(tmp_path, alone=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a[1]", "a[1].new-edition"}


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    for name, inside in (("empty", []), ("full", ["x"])):
        (tmp_path / name).mkdir()
        for one in inside:
            (tmp_path / name / one).write_text("mine")
    with files.whole_folder(tmp_path / "empty") as folder:
        (folder / "y").write_text("")
    with pytest.raises(OSError, match="not empty"), files.whole_folder(tmp_path / "full"):
        pass
    assert listing(tmp_path) == ["empty/y", "full/x"]
