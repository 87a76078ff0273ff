"""generate --chat in a real terminal: prompts are shown, Ctrl-C stops an answer alone, Ctrl-D ends."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_folders import chat_folder
from conftest import REPOSITORY

pytest.importorskip("jinja2")

from k2jax.hf.importer import import_hf  # noqa: E402


class Terminal:
    """A program with a terminal of its own."""

    def __init__(self, *arguments: str):
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", sys.executable, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1"},
        )
        os.close(slave)
        self.text, self._seen = b"", 0

    def types(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def shows(self, wanted: bytes, within_s: float = 120.0) -> None:
        """Waits for text behind what was waited for before."""
        end = time.monotonic() + within_s
        while wanted not in self.text[self._seen :]:
            assert time.monotonic() < end, (wanted, self.text)
            self._reads()
        self._seen = self.text.index(wanted, self._seen) + len(wanted)

    def settles(self, last: bytes, within_s: float = 120.0) -> None:
        """Waits until nothing more comes behind this."""
        end = time.monotonic() + within_s
        while self._reads() or not self.text.endswith(last):
            assert time.monotonic() < end, (last, self.text)
        self._seen = len(self.text)

    def _reads(self) -> bool:
        """What has come within 0.3 s; whether anything has."""
        if not select.select([self._master], [], [], 0.3)[0]:
            return False
        try:
            self.text += os.read(self._master, 4096)
        except OSError:  # what a terminal gives whose program has ended
            pytest.fail(f"it ended: {self.text.decode(errors='replace')[-2000:]}")
        return True

    def ends(self) -> int:
        return self._process.wait(60)


def conversation(folder: Path) -> Terminal:
    import_hf(chat_folder(folder / "hf", "chatml", context=1 << 16), folder / "run", "talk", False)
    options = "--temperature=3", "--max-new-tokens=60000"
    there = Terminal("-m", "k2jax.generate", "--chat", f"--workdir={folder / 'run'}", *options)
    there.shows(b"Ctrl-C stops an answer")
    return there


@pytest.mark.processes
def test_ctrl_c_ends_nothing_wherever_it_comes(tmp_path: Path):
    """Within a line, before an answer, in it, and between it and the prompt."""
    there = conversation(tmp_path)
    there.shows(b"you> ")
    for ms in range(0, 60, 8):
        there.types(b"a\n")
        time.sleep(ms / 1000)
        there.types(b"\x03")
        there.settles(b"you> ")  # a second one of the same answer would end it
    there.types(b"/help\n")
    there.shows(b"/reset begins")
    there.settles(b"you> ")
    there.types(b"\x04")
    assert there.ends() == 0


@pytest.mark.processes
def test_a_conversation_at_a_terminal(tmp_path: Path):
    there = conversation(tmp_path)
    for _ in range(5):  # an answer that ends by itself is drawn one time in ten
        there.shows(b"you> ")
        there.types("naïve 日本?\n".encode())
        there.shows(b"model> ")
        there.types(b"\x03")
        there.shows(b"\n")
    assert b"\r\nstopped\r\n" in there.text
    there.settles(b"you> ")  # readline prints it some instants before it waits, and sees no signal between the two
    there.types(b"\x03")
    there.shows(b"Ctrl-D ends")
    there.types(b"/reset\n")
    there.shows(b"a new conversation")
    there.shows(b"you> ")
    there.types(b"<|im_end|>\n")
    there.shows(b"error: a control token in a turn: turn 1, of role user")
    there.settles(b"you> ")
    there.types(b"\x04")
    assert there.ends() == 0
