"""Rows of conversations to turns: OpenAI's `messages`, `prompt` and `completion`, ShareGPT's `conversations`.

A turn is {"role", "content", ...} with a role that is known, and text. What is none is `Bad`, never repaired: a row
that is changed silently teaches something else.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax.chat import template
from k2jax.chat.turns import MEDIA, control_token, turn_of, two_systems
from k2jax.chat.worker import Renderer
from k2jax.data.records import Bad

COLUMNS = ("messages", "conversations", "prompt", "completion", "system", "tools", "image", "images", "audio", "videos")


class Turns(NamedTuple):
    """A conversation before it is rendered."""

    turns: list[dict[str, Any]]
    tools: list | None
    learned: list[int]  # numbers of the turns that are to be learned


@contextlib.contextmanager
def rendering(path: Path, chosen: ConfigDict) -> Iterator[Callable]:
    """Gives a function from a row to its text and metadata, or to what is wrong with it (`read.RenderRow`).

    `path` is what template.save wrote. The metadata are `answers`, the characters [start, stop) that are learned, the
    number of `turns`, and whether both ways to find answers were `compared`.
    """
    saved = template.load(path)
    with Renderer(saved.template, saved.control, most=chosen.max_line_bytes) as renderer:

        def render(record: dict[str, Any], chosen: ConfigDict) -> tuple[str, dict[str, Any]] | Bad:
            found = turns_of(record, chosen, saved.special)
            if isinstance(found, Bad):
                return found
            done = renderer(*found)
            if "reason" in done:
                return Bad(done["reason"], done["what"])
            return done.pop("text"), {**done, "turns": len(found.turns)}

        yield render


def turns_of(record: dict[str, Any], chosen: ConfigDict, special: list[str]) -> Turns | Bad:
    """The turns of a row, or what is wrong with it.

    `chosen` is the subset, `special` the names of the tokens that a turn must not write. With `prompt` and `completion`
    the completion's answers alone are learned; an answer of weight 0 (OpenAI's) is not; of answers="last", the last
    that would be.
    """
    found = _form(record)
    if isinstance(found, Bad):
        return found
    raw, first_learned = found
    options, turns = chosen.conversations, []
    for i, turn in enumerate(raw):
        one = turn_of(turn, i, dict(options.roles), chosen.max_line_bytes)
        if isinstance(one, Bad):
            return one
        turns.append(one)
    weights = [turn.pop("weight", 1) for turn in turns]
    if unknown := [weight for weight in weights if weight not in (0, 1)]:
        return Bad("a weight that is neither 0 nor 1", repr(unknown[0])[:60])
    learned = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= first_learned and weights[i]]
    learned = learned[-1:] if options.answers == "last" else learned
    return _problem(record, turns, learned, special, options) or Turns(turns, record.get("tools") or None, learned)


def _form(record: dict[str, Any]) -> tuple[list[Any], int] | Bad:
    """The row's turns as they are, and the first that may be learned."""
    lists = [name for name in ("messages", "conversations") if record.get(name) is not None]
    pair = [name for name in ("prompt", "completion") if record.get(name) is not None]
    if len(lists) > 1:
        return Bad("two conversations in one row", "both messages and conversations")
    if lists:
        found, first = record[lists[0]], 0
        if not isinstance(found, list):
            return Bad("no list of turns", f"{lists[0]} is {type(found).__name__}")
    elif len(pair) == 2:
        sides = [_side(record[name], role) for name, role in (("prompt", "user"), ("completion", "assistant"))]
        if None in sides:
            return Bad("no list of turns", "prompt and completion must be texts, or lists of turns")
        found, first = sides[0] + sides[1], len(sides[0])
    else:
        keys = ", ".join(map(str, record))[:100]
        expected = "messages, conversations, or prompt and completion"
        return Bad("no conversation", f"expected {expected}, found {keys or 'none'}")
    system = record.get("system")
    if system:
        found, first = [{"role": "system", "content": system}, *found], first + 1
    return found, first


def _side(value: Any, role: str) -> list[Any] | None:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else None


def _problem(
    record: dict[str, Any], turns: list[dict[str, Any]], learned: list[int], special: list[str], options: ConfigDict
) -> Bad | None:
    """What is wrong with a conversation as a whole."""
    if media := [name for name in MEDIA if record.get(name)]:
        return Bad("content that is no text", f"the row has {media[0]}")
    if bad := two_systems(turns):
        return bad
    if not learned:
        return Bad("no answer to learn", f"{len(turns)} turns, none of role assistant that is to be learned")
    if not isinstance(record.get("tools") or [], list):
        return Bad("tools that are no list", type(record["tools"]).__name__)
    bad = None if options.control_in_turns else control_token(turns, special)
    return bad and bad._replace(what=f"{bad.what}; control_in_turns=True allows it")
