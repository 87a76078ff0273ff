"""Turns from a terminal: an answer's text comes as it is drawn, Ctrl-C stops it, /reset forgets, Ctrl-D ends."""

import contextlib
import signal
import sys
from collections.abc import Callable
from typing import Any, Self

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
    with _Interrupts() as interrupts:
        while (line := _next(YOU if shown else "", say, interrupts)) is not None:
            text = line.strip()
            if text in ("/reset", "/help"):
                turns = [] if text == "/reset" else turns
                say(HELP if text == "/help" else "a new conversation")
            elif text.startswith("/") and " " not in text and text.count("/") == 1:
                say(f"{text}: no such command; {HELP}")
            elif text:
                turns = _turn(answerer, turns, line, special, system, say, MODEL if shown else "", interrupts)


class _Interrupts:
    """Ctrl-C while somebody talks: it is noted while a turn is answered, and raised while one is typed.

    One handler for all of it, so that there is no moment between the two at which a key ends the command.
    """

    noted = raises = False

    def _note(self, number: int, frame: Any) -> None:
        if self.raises or self.noted:  # the second of one answer ends the command as ever
            self.raises = False
            raise KeyboardInterrupt
        self.noted = True

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        signal.signal(signal.SIGINT, self._before)


def _next(prompt: str, say: Callable[[str], None], interrupts: _Interrupts) -> str | None:
    """What the user says; None at the end of the input."""
    while True:
        try:
            interrupts.raises = True
            line = input(prompt)
            interrupts.noted = interrupts.raises = False
            return line
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
    interrupts: _Interrupts,
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
    return [*prompt.turns, {"role": "assistant", "content": _answer(answerer, prompt, say, name, interrupts)}]


def _answer(
    answerer: Answerer, prompt: Prompt, say: Callable[[str], None], name: str, interrupts: _Interrupts
) -> str:
    _print(name)
    streamer = Streamer(answerer.decode, prompt.ids, _print)

    def take(ids: list[int]) -> bool:
        streamer.add(ids)
        return interrupts.noted

    answer = answerer.answer(prompt, on_tokens=take)
    stopped, interrupts.noted = interrupts.noted, False
    streamer.finish()
    _print("\n")
    if stopped:
        say("stopped")
    elif answer.fills_context:
        say(f"the model's context of {answerer.context:,} tokens is full: /reset begins a new conversation")
    elif answer.finish == LENGTH:
        say(f"cut after {prompt.most:,} tokens (--max-new-tokens)")
    return answer.content


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
