"""Renders in a process of its own, because a template is a program of somebody else's: it may not end.

The process gets and gives lines of JSON. The kernel ends it when one conversation has taken SECONDS of processor time,
wherever it is then, and it can hold BYTES at most; either costs that conversation, and the next gets a new process.
What counts is processor time, so that a machine that is busy with other things refuses nothing.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import k2jax
from k2jax.chat.template import ChatTemplate, Saved
from k2jax.errors import ConfigError, RunError

SECONDS = 20.0  # of processor time for one conversation; most take a hundredth
BYTES = 4 << 30  # of address space


class Unrendered(ConfigError):
    """Turns of which a template makes no prompt."""

    def __init__(self, reason: str, what: str):
        super().__init__(f"chat template: {reason}{f' ({what})' if what else ''}")
        self.reason = reason


class Renderer:
    """Gives the functions of `render` a process to run in; to be used in a `with`."""

    def __init__(self, template: ChatTemplate, control: list[str], *, most: int, seconds: float = SECONDS):
        """`control` as `render.conversation` has it; `most` characters of text are taken."""
        values = {"template": template._asdict(), "control": control, "most": most, "seconds": seconds}
        self._first, self._seconds, self._control = _line(values), seconds, control
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._end()

    def __call__(self, turns: list[dict], tools: list | None, learned: list[int]) -> dict[str, Any]:
        """{"text", "answers": [[start, stop], ...], "compared"}, or {"reason", "what"} of a conversation without."""
        return self._ask({"turns": turns, "tools": tools, "learned": learned})

    def prompt(self, turns: list[dict], tools: list | None = None, *, begun: bool = False) -> str:
        """The text after which the model answers; or, where the last turn has `begun`, goes on. Raises Unrendered."""
        found = self._ask({"turns": turns, "tools": tools, "begun": begun})
        if "reason" in found:
            raise Unrendered(found["reason"], found["what"])
        return found["text"]

    def ends(self) -> list[str]:
        """The control tokens that end an answer, as the template writes one; [] where it does not say."""
        turns = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "Number 1"}]
        found = self(turns, None, [1])
        if "reason" in found:
            return []
        [[_, stop]] = found["answers"]
        return sorted((token for token in self._control if found["text"][:stop].endswith(token)), key=len)[-1:]

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._process = self._process or self._start()
        process = self._process
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(_line(asked))
            process.stdin.flush()
        if line := process.stdout.readline():
            return json.loads(line)
        code = self._end()
        if code == -signal.SIGVTALRM:
            return {"reason": "the template does not end on it", "what": f"{self._seconds:g} s of processor time"}
        if code == 1 or code == -signal.SIGINT:
            raise RunError(f"the process that renders chat templates ended with {code}: is jinja2 installed?")
        return {"reason": "the template fails on it", "what": f"its process ended with {code}"}

    def _start(self) -> subprocess.Popen:
        here = str(Path(k2jax.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "k2jax.chat.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        process.stdin.write(self._first)
        return process

    def _end(self) -> int:
        if self._process is None:
            return 0
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        code, self._process = self._process.wait(), None
        return code


def written(saved: Saved) -> dict[str, Any]:
    """The tokens that a preparation's template is rendered with, and those that end an answer."""
    with Renderer(saved.template, saved.control, most=1 << 20) as renderer:
        return {"tokens": saved.template.tokens, "ends": renderer.ends()}


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"  # a table's turns may hold the time of day


def main() -> None:
    """The process: the template comes first, then conversations, each answered by one line."""
    from k2jax.chat import render

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process, whose end ends this one
    with contextlib.suppress(ValueError, OSError):  # systems without such a limit
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    start, program = json.loads(sys.stdin.buffer.readline()), None
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, start["seconds"])  # its signal, which nobody catches, ends the process
        try:
            program = program or render.compiled(ChatTemplate(**start["template"]))
            found = _answer(program, asked, start)
        except render.Refused as error:
            found = {"reason": error.reason, "what": error.what[:500]}
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.buffer.write(_line(found))
        sys.stdout.buffer.flush()


def _answer(program: Any, asked: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    from k2jax.chat import render

    if "begun" in asked:
        text = (render.begun if asked["begun"] else render.prompt)(program, asked["turns"], asked["tools"])
        if len(text) > start["most"]:
            raise render.Refused("a prompt that is too long", f"{len(text)} characters once rendered")
        return {"text": text}
    control = start["control"]
    text, answers, compared = render.conversation(program, asked["turns"], asked["tools"], asked["learned"], control)
    if len(text) > start["most"]:
        raise render.Refused("longer than max_line_bytes", f"{len(text)} characters once rendered")
    if not any(text[begin:end].strip() for begin, end in answers):
        raise render.Refused("no answer to learn", "the template gives no text of one")
    return {"text": text, "answers": answers, "compared": compared}


if __name__ == "__main__":
    main()
