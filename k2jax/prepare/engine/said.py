"""What libraries print while a task runs: counted, and kept in a file, escaped. No terminal gets it as it is.

warcio writes what stands in a web archive to stderr, others log the pages' addresses or warn of their markup.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from k2jax.files import read_json, write_json
from k2jax.text import shown

LINES, CHARACTERS = 100, 300  # kept by task, of each line


class _Said(io.TextIOBase):
    """A stream that counts its lines and keeps the first of them; bars that begin a line again are one line."""

    def __init__(self) -> None:
        self.num_lines, self.kept, self._begun = 0, [], False

    def writable(self) -> bool:
        return True

    def write(self, string: str) -> int:
        for part in string.splitlines(keepends=True):
            self.num_lines += not self._begun
            if not self._begun and len(self.kept) < LINES:
                self.kept.append("")
            if self.num_lines <= LINES:
                self.kept[-1] = (self.kept[-1] + part.rstrip("\n"))[:CHARACTERS]
            self._begun = not part.endswith("\n")
        return len(string)


@contextlib.contextmanager
def kept(path: Path) -> Iterator[None]:
    """What Python's stdout and stderr get in this block goes to the file, if there is any."""
    said = _Said()
    path.unlink(missing_ok=True)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        if said.num_lines:
            with contextlib.suppress(OSError):  # a full disk: the task's own error goes on
                write_json(path, {"num_lines": said.num_lines, "first": [shown(line) for line in said.kept]})


def summary(folder: Path) -> str:
    """One line about what the files in a folder hold; "" if there is none."""
    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        return ""
    total, first = sum(one["num_lines"] for one in found), found[0]["first"][0]
    lines = f"{total:,} line{'s' * (total > 1)}"
    return f"libraries printed {lines}, which lie in {folder} until the end; the first: {first[:100].strip()}"
