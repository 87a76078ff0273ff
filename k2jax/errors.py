"""Errors that a user can act on, each with the exit code that tells a restart script what to do.

75 is "restart me", 74 is "the storage failed, restart after a delay", 65 and 78 are "a person must look first".
Anything else that is raised is a bug: it keeps its traceback and ends with 70.
"""

import errno
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Protocol

from k2jax import output
from k2jax.text import shown

# What the machine's storage does to any write, wherever it happens.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


class RunError(Exception):
    """One clear line for the user: the thing, what was found, what was expected, what to do."""

    exit_code = 70


class ConfigError(RunError):
    """Configuration, data or tokenizer is wrong or has changed: do not restart."""

    exit_code = 78


class StorageError(RunError):
    """A checkpoint or directory cannot be read or written."""

    exit_code = 74


class DamagedError(StorageError):
    """What was read is not what was written: reading it again gives the same."""


class UnreadableError(StorageError):
    """A file of a source cannot be read, as often as it is tried; `path` is where it lies."""

    path = ""


class NumericsError(RunError):
    """The numerics guard stopped the run: do not restart blindly."""

    exit_code = 65


class PeerError(RunError):
    """Another process failed, is gone, or does not answer: its own line says more."""

    exit_code = 70


class Preempted(RunError):
    """Stopped by a signal with the state saved: restart to go on."""

    exit_code = 75


BY_NEED = (ConfigError, NumericsError, PeerError, StorageError, DamagedError, Preempted)  # of a person, most first


class Peers(Protocol):
    """The other processes of a run, where there are some."""

    def blame(self, error: Exception) -> None:
        """Does not return where another process is the cause of an error of this one."""

    def leave(self, code: int, reason: str) -> NoReturn:
        """Ends this process, and tells the others."""


_peers: Peers | None = None


def leave_with(peers: Peers) -> None:
    """From here on a failure ends all processes."""
    global _peers
    _peers = peers


class Ended(BaseException):
    """A command that has nothing to save got SIGTERM or SIGHUP: what it was writing is taken away, and it ends."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def run_main(main: Callable[[], None], *, prints: bool = False, raw: bool = False) -> None:
    """Runs a command's `main` and exits: 0, or a RunError's one line on stderr and its exit code.

    A command that makes nothing but what it `prints` is over when nobody reads that; any other goes on. `raw` is text
    that is somebody's data: a file or pipe gets it as it is.
    """
    # A failed save is one line of ours; without this there are hundreds: Orbax logs, with tracebacks, what it then
    # raises, leaves tasks that nobody waits for, and closes an event loop that TensorStore calls back into.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _hide_closed_loops
    keep_files_ours()
    with output.guarded(ends=prints, raw=raw), _ended_by_signals():
        _run(main)


def _run(main: Callable[[], None]) -> None:
    try:
        _check_arguments()
        main()
        sys.stdout.flush()
    except RunError as error:
        print_error(error)
        _exit(error.exit_code, str(error))
    except (KeyboardInterrupt, Ended) as error:
        name = str(error) if isinstance(error, Ended) else "SIGINT"
        print_error(f"ended by {name}")
        _exit(getattr(error, "exit_code", 130), f"ended by {name}")
    except output.OutputClosed:
        _exit(output.CLOSED_PIPE, "its output was closed")
    except Exception as error:
        if _peers:
            _peers.blame(error)
        as_ours = of_system(error)
        if isinstance(as_ours, StorageError):
            print_error(as_ours)
        else:
            print_trace(error)
        _exit(as_ours.exit_code, str(as_ours))


def _check_arguments() -> None:
    """Neither a tokenizer nor the libraries that store arrays take text that is no Unicode."""
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{argument}: is no text in UTF-8: write or name it so; if it is, this locale hides it "
                f"({sys.getfilesystemencoding()}): set PYTHONUTF8=1"
            ) from None


def print_error(error: object) -> None:
    """The one line on stderr."""
    print(f"error: {shown(error)}", file=sys.stderr, flush=True)


def print_trace(error: BaseException) -> None:
    """Of a bug, on stderr."""
    print(shown("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)


def keep_files_ours() -> None:
    """No file that this process or one that it starts makes is for all to write; for its group where the umask says so.

    A umask that keeps nobody from writing was set by nobody: it is what containers and schedulers start with.
    """
    mask = os.umask(0o022)
    os.umask(mask if mask & 0o002 else mask | 0o022)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does, unless it was started to ignore them, or has its own way."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python gives signals to that one alone
    for number in numbers:
        signal.signal(number, _raise_ended)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is _raise_ended:
                signal.signal(number, signal.SIG_DFL)


def _raise_ended(number: int, frame: FrameType | None) -> NoReturn:
    raise Ended(number)


def of_system(error: Exception) -> RunError:
    """What an exception of another's means to a run: the disk said no, or it is a bug."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return StorageError(f"{error}: make room or access, then run the same command")
    return RunError(f"{type(error).__name__}: {error}")


def in_file(path: str | os.PathLike, error: Exception) -> str:
    """In one line what the Python raised that a user wrote in a file: where in it, and what is wrong."""
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else (frames or [None])[-1]
    said: object = error
    while isinstance(said, (AttributeError, KeyError, SyntaxError)) and said.args:
        said = said.args[0]  # KeyError escapes its own text, and ml_collections wraps one in an AttributeError
    # ml_collections writes the whole configuration between the key and the one that may have been meant.
    text = re.sub(r" Other fields present: .*\"(\n|$)", " ", str(said), flags=re.DOTALL)
    text = " ".join(text.split())
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}{f': {text}' if text else ''}"


def leave_now(code: int, reason: str) -> NoReturn:
    """For a thread that finds out that this process must not go on."""
    print_error(reason)
    if _peers:
        _peers.leave(code, reason)
    os._exit(code)


def _exit(code: int, reason: str) -> NoReturn:
    if _peers and code != Preempted.exit_code:  # all processes stop at one step then, and end in order
        _peers.leave(code, reason)
    sys.exit(code)


def _hide_closed_loops(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
