"""What a command prints: nothing of it ends or commands anything, whatever becomes of the terminal, pipe or file.

    with output.guarded(ends=False, raw=False): ...      around a whole command

A character that cannot be encoded becomes an escape, and so do control characters, which come with text from outside
(in a pipe or a file, too, unless the output is `raw`: logs are looked at in terminals). Where the output is gone (a
closed pipe, a closed terminal, a full disk under the log), a command goes on without it, or, where it makes nothing
else (`ends`), is over.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from k2jax import text

GONE = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET, errno.ENXIO}  # for good
# That progress bars and libraries write to stderr: back to the line's start, a line up, colours.
KEPT = re.compile(r"(\r|\x1b\[[0-9;]*[mA])")
CLOSED_PIPE = 128 + 13  # a program's exit code that SIGPIPE ended


class OutputClosed(BaseException):
    """Nobody reads what this command prints, and it makes nothing else."""


class Output:
    """Text stream around another; what `keeps` matches of control sequences passes."""

    def __init__(self, stream: Any, *, keeps: re.Pattern | None = None, ends: bool = False, raw: bool = False):
        self._stream, self._keeps, self._ends, self._gone = stream, keeps, ends, False
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        self._escapes = stream.isatty() or not raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, string: str) -> int:
        """As of any stream; raises nothing but OutputClosed."""
        self._try(lambda: self._stream.write(self._shown(string) if self._escapes else string))
        return len(string)

    def writelines(self, lines: Any) -> None:
        """As of any stream."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As of any stream."""
        self._try(self._stream.flush)

    def close(self) -> None:
        """Standard streams stay open: absl's handler would close what it finds is no longer sys.stderr."""
        self.flush()

    def settle(self) -> None:
        """What cannot be written by now never will be: Python would try at its end, and change the exit code."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._to_nowhere()

    def _shown(self, string: str) -> str:
        if self._keeps is None:
            return text.printable(string)
        parts = self._keeps.split(string)
        return "".join(part if i % 2 else text.printable(part) for i, part in enumerate(parts))

    def _try(self, act: Any) -> None:
        try:
            act()
        except OSError as error:
            if error.errno in GONE:
                self._lose(error.strerror)
        except ValueError as error:  # closed by somebody in this process
            self._lose(str(error))

    def _lose(self, why: str) -> None:
        if self._gone:
            return
        self._gone = True
        self._to_nowhere()
        if self._ends:
            raise OutputClosed
        if self is sys.stdout:  # which may be read by a program: nothing else is ever said there
            print(f"the standard output is gone ({why}): this goes on without it", file=sys.stderr, flush=True)

    def _to_nowhere(self) -> None:
        """The descriptor itself: libraries in C write to it, too."""
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextmanager
def guarded(*, ends: bool, raw: bool) -> Iterator[None]:
    """Stdout and stderr as `Output` for as long as the block runs."""
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    out, err = (stream or open(os.devnull, "w") for stream in before)
    sys.stdout, sys.stderr = Output(out, ends=ends, raw=raw), Output(err, keeps=KEPT)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Output):
                stream.settle()
        sys.stdout, sys.stderr = before


def libraries_to_stderr() -> None:
    """What libraries in C print to stdout from here on, as Gloo does of its peers: a program may read our stdout."""
    sys.stdout.flush()
    ours = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)
    sys.stdout = Output(ours)


def _open_standard_descriptors() -> None:
    """Where a shell closed them (>&-), the next file to be opened would get what libraries print."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
