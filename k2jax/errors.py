"""Errors that a user can act on, each with the exit code that tells a restart script what to do.

75 is "restart me", 74 is "the storage failed, restart after a delay", 65 and 78 are "a person must look first".
Anything else that is raised is a bug: it keeps its traceback and ends with 70.
"""

import errno
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

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


class NumericsError(RunError):
    """The numerics guard stopped the run: do not restart blindly."""

    exit_code = 65


class PeerError(RunError):
    """Another process failed, is gone, or does not answer: its own line says more."""

    exit_code = 70


class Preempted(RunError):
    """Stopped by SIGTERM with the state saved: restart to go on."""

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


def run_main(main: Callable[[], None]) -> None:
    """Runs a command's `main` and exits: 0, or a RunError's one line on stderr and its exit code."""
    # A failed save is one line of ours; without this there are hundreds: Orbax logs, with tracebacks, what it then
    # raises, leaves tasks that nobody waits for, and closes an event loop that TensorStore calls back into.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _hide_closed_loops
    try:
        main()
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _exit(error.exit_code, str(error))
    except KeyboardInterrupt:
        _exit(130, "interrupted from its keyboard")
    except Exception as error:
        if _peers:
            _peers.blame(error)
        as_ours = of_system(error)
        if isinstance(as_ours, StorageError):
            print(f"error: {as_ours}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        _exit(as_ours.exit_code, str(as_ours))


def of_system(error: Exception) -> RunError:
    """What an exception of another's means to a run: the disk said no, or it is a bug."""
    if isinstance(error, RunError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return StorageError(f"{error}: make room or access, then run the same command")
    return RunError(f"{type(error).__name__}: {error}")


def _exit(code: int, reason: str) -> NoReturn:
    if _peers and code != Preempted.exit_code:  # all processes stop at one step then, and end in order
        _peers.leave(code, reason)
    sys.exit(code)


def _hide_closed_loops(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
