"""Patience with storage: what may go well later is tried again, and only what is proved to be damage is called so.

An exception of a library says little of what is stored: a storage that fails for a while, a bug here or there and a
damaged file look alike. Damage is a digest or checksum that differs, or bytes that are certainly not there, found at
two tries; the rest ends the run and moves nothing.
"""

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

from k2jax.errors import DamagedError, RunError, StorageError

T = TypeVar("T")
RETRY_WAITS_S = (1, 5, 20)  # between tries to read
WRITE_WAITS_S = (1, 5, 20, 60, 120, 300)  # between tries to write: nobody waits, the run goes on meanwhile
# Status codes of TensorStore, Orbax and XLA; what TensorStore says of the system but "no such file"; servers that fail.
TRANSIENT = (
    r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|OS error (?!2:)\d|response code: 5"
)
LASTING = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# What TensorStore says when a checksum differs, a file is shorter than its index says or gone, bytes do not decode.
DAMAGE = r"DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|CRC-32C|[Zz][Ss][Tt][Dd]|Error decoding"
# Of ours or of a library: no storage raises these.
BUGS = (TypeError, AttributeError, NameError, LookupError, ArithmeticError, AssertionError, ImportError)


def patiently(what: str, read: Callable[[], T], log: Callable[[str], None]) -> T:
    """What `read` gives, after some tries where it raises; ConfigError and bugs (70) come through at once.

    Raises DamagedError where a second try has proved damage again; StorageError where the storage does not give it,
    which says nothing of what is stored.
    """
    for tries, wait_s in enumerate((*RETRY_WAITS_S, None), 1):
        try:
            return read()
        except Exception as error:
            if isinstance(error, BUGS) or (
                isinstance(error, RunError) and not isinstance(error, StorageError)
            ):
                raise
            problem = _meaning(what, error)
            if isinstance(problem, DamagedError) and tries > 1:
                raise problem from error
            if wait_s is None:
                raise StorageError(f"{problem}; tried {tries} times; nothing was moved") from error
        log(f"{problem}: trying again in {wait_s} s")
        time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _meaning(what: str, error: Exception) -> StorageError:
    if isinstance(error, StorageError):
        return error
    kind = DamagedError if is_damage(error) else StorageError
    return kind(f"{what}: cannot be read: {one_line(error)}")


def keep_writing(what: str, write: Callable[[], T], log: Callable[[str], None]) -> T:
    """What `write` gives, tried again after the waits of WRITE_WAITS_S; then, or for a bug at once, what it raises.

    Each try is said. A full disk is tried again like the rest: old checkpoints are being deleted meanwhile.
    """
    for wait_s in WRITE_WAITS_S:
        try:
            return write()
        except BUGS:
            raise
        except Exception as error:
            if isinstance(error, RunError) and not isinstance(error, StorageError):
                raise
            log(f"{what}: cannot be written: {one_line(error)}: trying again in {wait_s} s")
            time.sleep(wait_s)
    return write()


def is_transient(error: BaseException | None) -> bool:
    """Whether the storage, the network or memory failed, and not what was stored."""
    while error is not None:
        lacks = isinstance(error, (MemoryError, TimeoutError, ConnectionError))
        if (
            lacks
            or (isinstance(error, OSError) and error.errno not in LASTING)
            or re.search(TRANSIENT, str(error))
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_damage(error: Exception) -> bool:
    """Whether it proves that what is stored is not what was written."""
    return not is_transient(error) and re.search(DAMAGE, str(error)) is not None


def one_line(error: Exception) -> str:
    """Storage errors are long: their first line says what happened, its end why, less source locations in brackets."""
    text = re.split(r" \[[\w ]+='", (str(error).strip() or repr(error)).splitlines()[0])[0]
    return f"{type(error).__name__}: {text if len(text) < 300 else f'{text[:100]} ... {text[-180:]}'}"
