"""What becomes of a command whose terminal, pipe or log goes away, or shows ASCII alone: real pipes and terminals."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

COMMAND = """
import sys, time
sys.path.insert(0, {repository!r})
from k2jax.errors import ConfigError, run_main
def main():
    print("first", flush=True)
    sys.stdin and sys.stdin.readline()
    {lines}
run_main(main, {options})
"""
MANY = "for i in range(1000): print('line', i, 'x' * 100)"


def start(lines: str, options: str = "", **kwargs) -> subprocess.Popen:
    code = COMMAND.format(repository=str(REPOSITORY), lines=lines, options=options)
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([sys.executable, "-c", code], text=True, **{**pipes, **kwargs})


def close_the_pipe(process: subprocess.Popen) -> str:
    """As `| head -1` does; what stderr then got."""
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    process.wait(60)
    return process.stderr.read()


def test_who_only_prints_ends_quietly_when_nobody_reads():
    process = start(f"{MANY}\n    open('/nowhere/x')", "prints=True")
    assert close_the_pipe(process) == "" and process.returncode == 141


def test_who_makes_something_goes_on_without_its_output(tmp_path: Path):
    process = start(f"{MANY}\n    open({str(tmp_path / 'made')!r}, 'w').close()\n    {MANY}")
    assert close_the_pipe(process) == "the standard output is gone (Broken pipe): this goes on without it\n"
    assert process.returncode == 0 and (tmp_path / "made").exists()


def test_both_outputs_gone_and_an_error(tmp_path: Path):
    """The exit code is what is left to say."""
    process = start(f"{MANY}\n    print('x', file=sys.stderr)\n    raise ConfigError('no')")
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(60) == 78


@pytest.mark.parametrize("options", ["", "prints=True"])
def test_a_full_disk_under_the_log_changes_no_exit_code(options: str):
    with open("/dev/full", "w") as full:
        process = start(MANY, options, stdout=full)
        assert process.communicate("\n", 60) == (None, "") and process.returncode == 0


def test_closed_standard_streams_are_given_to_no_file(tmp_path: Path):
    """Else the first file that is opened gets what libraries print."""
    lines = f"file = open({str(tmp_path / 'made')!r}, 'w'); import os; os.write(1, b'noise'); os.write(2, b'noise')"
    code = COMMAND.format(repository=str(REPOSITORY), lines=lines, options="")
    shell = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code], timeout=60)
    assert shell.returncode == 0 and (tmp_path / "made").read_text() == ""


HOSTILE = "ä 漢 \\x1b[2J\\x1b]0;title\\x07 \\x9b31m \\r \\u202e \\udcff"


@pytest.mark.fault("S17")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("end", ["print(text)", "raise ConfigError(text)", "raise ValueError(text)"])
def test_a_terminal_gets_what_it_can_show_and_nothing_that_it_obeys(encoding: str, end: str):
    master, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    process = start(f"text = '{HOSTILE}'; {end}", stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    process.stdin.write("\n")
    process.stdin.close()
    told = b""
    try:
        while part := os.read(master, 4096):
            told += part
    except OSError:  # EIO: the other side is closed
        pass
    assert process.wait(60) == (0 if "print" in end else 78 if "Config" in end else 70), told
    assert b"\\u001b[2J" in told and b"\\u202e" in told and b"\\udcff" in told
    assert not set(told.replace(b"\r\n", b"\n")) & set(b"\x1b\x07\r"), told
    assert (b"\\xe4 \\u6f22", b"\xe4 \\u6f22", "ä 漢".encode())[["ascii", "latin-1", "utf-8"].index(encoding)] in told


def test_a_closed_terminal_ends_who_has_nothing_to_save():
    """By its SIGHUP, and not where that is ignored (nohup), where its output goes nowhere then."""
    for ignores, code in ((False, 129), (True, 0)):
        master, terminal = pty.openpty()
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN) if ignores else None
        try:
            process = start(MANY, stdout=terminal, stderr=terminal)
        finally:
            if ignores:
                signal.signal(signal.SIGHUP, before)
        os.close(terminal)
        assert os.read(master, 100).startswith(b"first")
        os.close(master)
        process.send_signal(signal.SIGHUP)
        process.stdin.close()
        assert process.wait(60) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_takes_away_what_is_half_written(tmp_path: Path, number: signal.Signals):
    writes = f"""
    from k2jax import files
    with files.whole_folder(__import__('pathlib').Path({str(tmp_path / "out")!r})) as new, files.whole_file(new / 'x'):
        print('second', flush=True)
        time.sleep(60)"""
    process = start("signal = __import__('signal'); signal.signal(2, signal.default_int_handler)" + writes)
    assert process.stdout.readline() == "first\n"
    process.stdin.close()
    assert process.stdout.readline() == "second\n"
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert process.stderr.read() == f"error: ended by {number.name}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("S13")
@pytest.mark.parametrize(("mask", "expected"), [(0o000, 0o644), (0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_no_file_is_for_all_to_write(tmp_path: Path, mask: int, expected: int):
    """Seen red without the umask."""
    process = start(f"open({str(tmp_path / 'made')!r}, 'w').close()", umask=mask)
    process.communicate("\n", 60)
    assert (tmp_path / "made").stat().st_mode & 0o777 == expected


def test_arguments_that_are_no_text_are_refused():
    code = COMMAND.format(repository=str(REPOSITORY), lines="", options="")
    found = subprocess.run([sys.executable, "-c", code, b"--prompt=\xff"], capture_output=True, timeout=60)
    assert found.returncode == 78 and found.stderr.startswith(b"error: --prompt=\\udcff: is no text in UTF-8"), found
