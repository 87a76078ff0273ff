"""Rows of conversations to turns: OpenAI's `messages`, `prompt` and `completion`, ShareGPT's `conversations`.

A turn is {"role", "content", ...} with a role that is known, and text. What is none is `Bad`, never repaired: a row
that is changed silently teaches something else. Rows of preference pairs are pairs.py's.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax.chat.turns import MEDIA, control_token, turn_of, two_systems
from k2jax.data.records import Bad

COLUMNS = (
    "messages", "conversations", "prompt", "completion", "chosen", "rejected", "system", "tools",
    "image", "images", "audio", "videos",
)  # fmt: skip


class Turns(NamedTuple):
    """A conversation before it is rendered."""

    turns: list[dict[str, Any]]
    tools: list | None
    learned: list[int]  # numbers of the turns that are to be learned


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
    turns = read_turns(raw, chosen)
    return turns if isinstance(turns, Bad) else conversation(record, turns, first_learned, chosen, special)


def read_turns(raw: list[Any], chosen: ConfigDict) -> list[dict[str, Any]] | Bad:
    """Turns as a row has them, as templates know them; what is wrong with the first that is none."""
    turns = []
    for i, turn in enumerate(raw):
        one = turn_of(turn, i, dict(chosen.conversations.roles), chosen.max_line_bytes)
        if isinstance(one, Bad):
            return one
        turns.append(one)
    return turns


def conversation(
    record: dict[str, Any], turns: list[dict[str, Any]], first_learned: int, chosen: ConfigDict, special: list[str]
) -> Turns | Bad:
    """The turns of a row, of which answers from number `first_learned` on may be learned, or what is wrong with it."""
    options, weights = chosen.conversations, [turn.get("weight", 1) for turn in turns]
    turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
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
        sides = [side(record[name], role) for name, role in (("prompt", "user"), ("completion", "assistant"))]
        if None in sides:
            return Bad("no list of turns", "prompt and completion must be texts, or lists of turns")
        found, first = sides[0] + sides[1], len(sides[0])
    else:
        more = "; pairs=True is for chosen and rejected" if {"chosen", "rejected"} <= set(record) else ""
        expected = "messages, conversations, or prompt and completion"
        return Bad("no conversation", f"expected {expected}, found {names_in(record)}{more}")
    more = system_turn(record)
    return more + found, first + len(more)


def names_in(record: dict[str, Any]) -> str:
    """What a row has, for a person who looks for something else."""
    return ", ".join(map(str, record))[:100] or "none"


def system_turn(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The turn that a row's own column is; none where it has no such."""
    return [{"role": "system", "content": record["system"]}] if record.get("system") else []


def side(value: Any, role: str) -> list[Any] | None:
    """The turns of a column that is a text of one role, or a list of turns; None of anything else."""
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
