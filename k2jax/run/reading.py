"""Reading what was stored: what may go well later is tried again, and what gives the same each time is damage."""

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

from k2jax.errors import DamagedError, RunError, StorageError

T = TypeVar("T")
RETRY_WAITS_S = (1, 5, 20)
# Status codes of TensorStore, Orbax and XLA; what TensorStore says of the system but "no such file"; servers that fail.
TRANSIENT = r"RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|OS error (?!2:)\d|response code: 5"
LASTING = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def patiently(what: str, read: Callable[[], T], log: Callable[[str], None]) -> T:
    """What `read` gives, after some tries where the storage does not give it.

    Raises StorageError where it still does not, which says nothing of what is stored; DamagedError for whatever else
    the libraries raise, whose kinds are many: ValueError, KeyError, JSONDecodeError and others.
    """
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return read()
        except RunError:
            raise
        except Exception as error:
            problem = f"{what}: cannot be read: {one_line(error)}"
            if not is_transient(error):
                raise DamagedError(problem) from error
            if wait_s is None:
                raise StorageError(f"{problem}; tried {len(RETRY_WAITS_S) + 1} times; nothing was moved") from error
        log(f"{problem}: trying again in {wait_s} s")
        time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def is_transient(error: BaseException | None) -> bool:
    """Whether the storage, the network or memory failed, and not what was stored."""
    while error is not None:
        lacks = isinstance(error, (MemoryError, TimeoutError, ConnectionError))
        if lacks or (isinstance(error, OSError) and error.errno not in LASTING) or re.search(TRANSIENT, str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: Exception) -> str:
    """Storage errors are long: their first line says what happened, its end why, less source locations in brackets."""
    text = re.split(r" \[[\w ]+='", (str(error).strip() or repr(error)).splitlines()[0])[0]
    return f"{type(error).__name__}: {text if len(text) < 300 else f'{text[:100]} ... {text[-180:]}'}"
