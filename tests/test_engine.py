"""Stages run everywhere alike: a rank is done once, a failure reaches the user, what is incomplete never passes."""

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

from k2jax import files, locks
from k2jax.errors import ConfigError, RunError, StorageError
from k2jax.prepare.engine import engine as engine_module
from k2jax.prepare.engine import executors
from k2jax.prepare.engine.engine import Engine, Stage, check_executor

SLURM = {"partition": "cpu", "time": "1:00:00", "gib_per_cpu": 1, "environment": ""}


def note(rank: int, *, folder: Path, failing: str = "", error: type = ConfigError) -> None:
    """A task: notes that it ran; the rank in the file `failing` fails while that file is there."""
    with open(folder / f"{rank}.ran", "a") as file:
        file.write("x")
    if failing and Path(failing).exists() and Path(failing).read_text() == str(rank):
        raise error(f"document 7 of rank {rank} is wrong")


def die(rank: int, *, folder: Path) -> None:
    """A task that is killed the first time."""
    note(rank, folder=folder)
    if rank == 2 and len((folder / "2.ran").read_text()) == 1:
        os._exit(9)


def runs(folder: Path) -> dict[int, int]:
    return {int(path.stem): len(path.read_text()) for path in folder.glob("*.ran")}


def engine(folder: Path, executor: str = "local", workers: int = 1) -> Engine:
    return Engine(folder / "done", executor, workers, SLURM)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_rank_runs_once_and_a_second_run_does_nothing(tmp_path, workers):
    stage = Stage("note", 5, partial(note, folder=tmp_path))
    for _ in range(2):
        engine(tmp_path, workers=workers).run(stage)
        assert runs(tmp_path) == dict.fromkeys(range(5), 1)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("error", "expected"), [(ConfigError, ConfigError), (KeyError, KeyError)])
def test_a_failure_is_raised_as_it_is_and_what_is_done_stays_done(tmp_path, workers, error, expected):
    failing = tmp_path / "failing"
    failing.write_text("1")
    stage = Stage("note", 3, partial(note, folder=tmp_path, failing=str(failing), error=error))
    with pytest.raises(expected, match="document 7 of rank 1"):
        engine(tmp_path, workers=workers).run(stage)
    before = runs(tmp_path)
    failing.unlink()
    engine(tmp_path, workers=workers).run(stage)
    assert runs(tmp_path)[1] == before[1] + 1 and runs(tmp_path)[0] == 1
    assert set(runs(tmp_path)) == {0, 1, 2}


def test_a_stage_is_not_over_while_a_rank_is_missing(tmp_path):
    stage = Stage("note", 2, partial(note, folder=tmp_path))
    engine(tmp_path).run(stage)
    (tmp_path / "done/note/completions/00001").unlink()
    engine(tmp_path).run(stage)
    assert runs(tmp_path) == {0: 1, 1: 2}


def test_a_killed_worker_is_an_error_and_its_rank_is_run_again(tmp_path):
    stage = Stage("die", 4, partial(die, folder=tmp_path))
    with pytest.raises(RunError, match="a worker process was killed"):
        engine(tmp_path, workers=2).run(stage)
    engine(tmp_path, workers=2).run(stage)
    assert runs(tmp_path)[2] == 2 and set(runs(tmp_path)) == {0, 1, 2, 3}


class Weighed:
    """Notes each time that it is sent to another process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, rank: int) -> None:
        note(rank, folder=self.folder)

    def __reduce__(self) -> tuple:
        with open(self.folder / "sent", "a") as file:
            file.write("x")
        return Weighed, (self.folder,)


def test_workers_get_what_a_stage_does_once_however_many_ranks_it_has(tmp_path):
    """With each rank it were 5 GB of pickles for 100,000 ranks of a recipe of 75 subsets; seen red with that."""
    engine(tmp_path, workers=2).run(Stage("weighed", 60, Weighed(tmp_path)))
    assert runs(tmp_path) == dict.fromkeys(range(60), 1) and len((tmp_path / "sent").read_text()) <= 4


def test_a_rank_is_one_file_which_says_what_it_took(tmp_path):
    engine(tmp_path).run(Stage("note", 3, partial(note, folder=tmp_path)))
    found = [path for path in (tmp_path / "done").rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(tmp_path / "done")) for path in found)
    assert names == [f"note/completions/{rank:05d}" for rank in range(3)]
    (tmp_path / "done/note/completions/00002").write_text("")  # killed as it had ended
    [(name, took)] = engine_module.usage(tmp_path / "done").items()
    assert name == "note" and took["peak_bytes"] > 1 << 20 and took["cpu_seconds"] >= 0


def linger(rank: int, *, folder: Path) -> None:
    """A task that never ends."""
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.parametrize("reaped", [True, False])
def test_workers_end_when_the_command_is_killed(tmp_path, reaped):
    """Also where nobody waits for it, as in a container whose first process is no init: its number is there still."""
    program = start(tmp_path, "linger", workers=2)
    pids = eventually(
        lambda: [int(path.read_text() or 0) for path in tmp_path.glob("*.pid")],
        lambda pids: len(pids) == 2 and all(pids),
    )
    program.kill()
    if reaped:
        program.wait()
    eventually(lambda: [pid for pid in pids if locks.started(pid)], lambda alive: not alive, seconds=20)
    assert files.is_running(program.pid) != reaped
    program.wait()


def test_another_process_that_has_the_commands_number_keeps_no_worker(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(executors.os, "_exit", lambda _: ended.set())
    monkeypatch.setattr(executors.signal, "signal", lambda *_: None)
    executors._end_with(os.getpid(), "before that")
    assert ended.wait(20)


def eventually(look, good, seconds=60):
    """What `look` returns once it is `good`."""
    for _ in range(seconds * 10):
        if good(found := look()):
            return found
        time.sleep(0.1)
    raise AssertionError(f"still {found}")


def start(folder: Path, task: str, workers: int) -> subprocess.Popen:
    """A program that runs two ranks of a task of this file."""
    code = (
        "from functools import partial; from pathlib import Path; import test_engine as t\n"
        "from k2jax.prepare.engine.engine import Stage\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(folder)!r})\n"
        f"    t.engine(folder, workers={workers}).run(Stage({task!r}, 2, partial(t.{task}, folder=folder)))\n"
    )
    (folder / "main.py").write_text(code)
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, folder / "main.py"], env=env, text=True, **pipes)


def test_a_rank_that_failed_and_passed_when_it_was_tried_again_is_no_failure(tmp_path):
    failure = '{"type": "ConfigError", "message": "wrong"}'
    for name, text in {"errors/00001.json": failure, "completions/00001": ""}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    stage = Stage("note", 2, partial(note, folder=tmp_path))
    engine_module._raise_failures(stage, tmp_path)
    (tmp_path / "completions/00001").unlink()
    with pytest.raises(ConfigError, match="wrong"):
        engine_module._raise_failures(stage, tmp_path)


def test_executors_that_cannot_run_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for program in ("sbatch", "squeue"):
        with pytest.raises(ConfigError, match=f"no {program}"):
            check_executor("slurm", SLURM)
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    with pytest.raises(ConfigError, match="partition"):
        check_executor("slurm", {**SLURM, "partition": ""})
    check_executor("slurm", SLURM, tmp_path / "a 'b'")
    for name in ("a\\b", "a\nb"):
        with pytest.raises(ConfigError, match="has a backslash or a character that does not print in its path"):
            check_executor("slurm", SLURM, tmp_path / name)
        check_executor("local", SLURM, tmp_path / name)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(ConfigError, match="a task of a job array"):
        check_executor("slurm", SLURM)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="k2jax\\[data,ray\\]"):
        check_executor("ray", SLURM)


def fill(rank: int, *, folder: Path) -> None:
    raise OSError(28, "No space left on device", str(folder / "x"))


def test_a_full_disk_is_no_bug(tmp_path):
    with pytest.raises((OSError, StorageError), match="No space left"):
        engine(tmp_path).run(Stage("fill", 1, partial(fill, folder=tmp_path)))


def test_datatrove_writes_nothing_to_the_terminal(tmp_path):
    program = start(tmp_path, "note", workers=2)
    assert (*program.communicate(), program.returncode) == ("", "", 0)


def read_archive(rank: int, *, folder: Path) -> None:
    """A task: reads an archive whose addresses and remainders would command a terminal."""
    from k2jax.prepare.sources.files import File
    from k2jax.prepare.sources.warc import warc_records

    body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>a page</p>"
    header = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://x/ \x1b]0;%d\x07\r\n" % rank
    data = header + b"Content-Length: %d\r\n\r\n%b\x1b[2J\r\n\r\n" % (len(body) - 4, body)
    path = folder / f"{rank}.warc"
    path.write_bytes(data)
    found = list(warc_records(File(path.name, str(path), len(data)), most=1000, html_only=True, text_key="text"))
    (folder / f"{rank}.ran").write_text(found[0][1].reason)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_libraries_print_of_pages_is_counted_and_kept_and_commands_no_terminal(tmp_path, workers):
    program = start(tmp_path, "read_archive", workers)
    out, err = program.communicate()
    assert (out, program.returncode) == ("", 0) and [(tmp_path / f"{i}.ran").read_text() for i in range(2)]
    kept = tmp_path / "done/read_archive/said"
    assert err.startswith(f"stage read_archive: libraries printed 8 lines, which lie in {kept} until the end")
    assert err.count("\n") == 1 and err[:-1].isprintable() and "\\u001b]0;0" in err
    assert json.loads((kept / "00001.json").read_bytes())["num_lines"] == 4


def chatter(rank: int, *, folder: Path) -> None:
    for i in range(10_000):
        print("\rbar", i, end="")
    for i in range(1000):
        print(f"\u202e{i} \ud800" * 1000, file=sys.stderr)
    raise OSError(28, "No space left on device")


def test_what_libraries_print_without_end_is_not_all_kept(tmp_path, capsys):
    with pytest.raises((OSError, StorageError), match="No space left"):
        engine(tmp_path).run(Stage("chatter", 1, partial(chatter, folder=tmp_path)))
    found = json.loads((tmp_path / "done/chatter/said/00000.json").read_bytes())
    assert len(found["first"]) == 100 and max(map(len, found["first"])) <= 6 * 300 and found["num_lines"] == 1000
    assert capsys.readouterr().err.count("\n") == 1
