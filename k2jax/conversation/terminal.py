"""Turns from a terminal: an answer's text comes as it is drawn, Ctrl-C stops it, /reset forgets, Ctrl-D ends."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from k2jax.chat.turns import MOST, control_token, turn_of
from k2jax.conversation.answering import LENGTH, Answerer, Prompt
from k2jax.conversation.lines import with_system
from k2jax.data.decoding import Streamer
from k2jax.data.records import Bad
from k2jax.errors import ConfigError

YOU, MODEL = "you> ", "model> "
HELP = "/reset begins a new conversation, /help says this, Ctrl-C stops an answer, Ctrl-D ends"


def talk(answerer: Answerer, special: set[str], system: str | None, say: Callable[[str], None]) -> None:
    """Until the input ends. `special` are the tokens that no turn may write; `say` is for what is no answer."""
    shown = sys.stdin.isatty() and sys.stdout.isatty()
    turns: list[dict[str, Any]] = []
    if shown:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  which gives input() its editing and its history
        say(HELP)
    while (line := _next(YOU if shown else "", say)) is not None:
        text = line.strip()
        if text in ("/reset", "/help"):
            turns = [] if text == "/reset" else turns
            say(HELP if text == "/help" else "a new conversation")
        elif text.startswith("/") and " " not in text and text.count("/") == 1:
            say(f"{text}: no such command; {HELP}")
        elif text:
            turns = _turn(answerer, turns, line, special, system, say, MODEL if shown else "")


def _next(prompt: str, say: Callable[[str], None]) -> str | None:
    """What the user says; None at the end of the input."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            if prompt:
                print()
            return None
        except UnicodeDecodeError:
            say("that is no text in this terminal's encoding")
        except KeyboardInterrupt:
            if not prompt:
                raise
            print()
            say("Ctrl-D ends")


def _turn(
    answerer: Answerer,
    turns: list[dict[str, Any]],
    line: str,
    special: set[str],
    system: str | None,
    say: Callable[[str], None],
    name: str,
) -> list[dict[str, Any]]:
    """Answers one; returns the conversation after it, which is that before it where there is no answer."""
    turn = turn_of({"role": "user", "content": line}, len(turns), None, MOST)
    following = [] if isinstance(turn, Bad) else with_system([*turns, turn], system)
    bad = turn if isinstance(turn, Bad) else control_token(following, special)
    try:
        if bad:
            raise ConfigError(f"{bad.reason}: {bad.what}")
        prompt = answerer.prompt(following)
    except ConfigError as error:
        say(f"error: {error}; /reset begins a new conversation")
        return turns
    return [*prompt.turns, {"role": "assistant", "content": _answer(answerer, prompt, say, name)}]


def _answer(answerer: Answerer, prompt: Prompt, say: Callable[[str], None], name: str) -> str:
    _print(name)
    streamer = Streamer(answerer.decode, prompt.ids, _print)
    with _interrupts() as wanted:

        def take(ids: list[int]) -> bool:
            streamer.add(ids)
            return bool(wanted)

        answer = answerer.answer(prompt, on_tokens=take)
    streamer.finish()
    _print("\n")
    if wanted:
        say("stopped")
    elif answer.fills_context:
        say(f"the model's context of {answerer.context:,} tokens is full: /reset begins a new conversation")
    elif answer.finish == LENGTH:
        say(f"cut after {prompt.most:,} tokens (--max-new-tokens)")
    return answer.content


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, once; the second ends the command as ever."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
