"""Turns of a conversation as templates know them: {"role", "content", ...} with a role that is known, and text.

What is none is `Bad`, never repaired: a turn that is changed silently says something else.
"""

import json
from collections.abc import Iterable
from typing import Any

from k2jax.data.records import Bad, text_of

ROLES = {  # ShareGPT's names and OpenAI's
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool",
}  # fmt: skip


MEDIA = ("image", "images", "audio", "videos")
MOST = 64 << 20  # bytes of a turn that a model is asked with, and characters of its prompt
NAMED = ("messages", "tools", "id")  # of what is asked


def asked(record: Any, special: set[str]) -> tuple[list[dict[str, Any]], list | None] | Bad:
    """(turns, tools) of {"messages": [...], "tools": [...]}, to which a model is to answer, or what is wrong with it.

    `special` are the tokens that no turn may write: what is quoted would end turns and begin others.
    """
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list) or not record["messages"]:
        return Bad("no conversation", 'expected {"messages": [{"role": ..., "content": ...}, ...]}')
    if unknown := [key for key in record if key not in NAMED]:
        return Bad("an unknown key", f"{str(unknown[0])[:60]!r}; known are {', '.join(NAMED)}")
    turns = []
    for i, turn in enumerate(record["messages"]):
        one = turn_of(turn, i, None, MOST)
        if isinstance(one, Bad):
            return one
        turns.append(one)
    tools = record.get("tools") or None
    if not isinstance(tools, list | None):
        return Bad("tools that are no list", type(tools).__name__)
    if turns[-1]["role"] == "assistant":
        return Bad("nothing to answer", f"turn {len(turns)}, the last, is of role assistant")
    return two_systems(turns) or control_token(turns, special) or (turns, tools)


def two_systems(turns: list[dict[str, Any]]) -> Bad | None:
    """What is wrong where more than one turn is the system's."""
    places = [str(i + 1) for i, turn in enumerate(turns) if turn["role"] == "system"]
    return Bad("two system turns", f"turns {', '.join(places[:5])}") if len(places) > 1 else None


def control_token(turns: list[dict[str, Any]], special: Iterable[str]) -> Bad | None:
    """What is wrong where a turn holds one of the `special` tokens by name."""
    for i, turn in enumerate(turns):
        text = turn["content"] if len(turn) == 2 else json.dumps(turn, ensure_ascii=False, default=str)
        if within := next((token for token in special if token in text), None):
            what = f"turn {i + 1}, of role {turn['role']}, holds {within!r}, which would not be text"
            return Bad("a control token in a turn", what)
    return None


def turn_of(turn: Any, i: int, more_roles: dict[str, str] | None, most: int) -> dict[str, Any] | Bad:
    """One turn as templates know them, less what is null: Parquet has a place for every key of any turn.

    `more_roles` are those of a recipe, None where there is none.
    """
    where = f"turn {i + 1}"
    if not isinstance(turn, dict):
        return Bad("a turn that is no object", f"{where} is {type(turn).__name__}")
    turn = _without_null(turn)
    role, content = turn.pop("from", None), turn.pop("value", None)
    role, content = turn.pop("role", role), turn.pop("content", content)
    known = (more_roles or {}).get(role, ROLES.get(role)) if isinstance(role, str) else None
    if known is None:
        more = "" if more_roles is None else ", and those of roles"
        return Bad("an unknown role", f"{where} is of {role!r}; known are {', '.join(ROLES)}{more}"[:200])
    if isinstance(content, list):
        content = _joined(content)
        if isinstance(content, Bad):
            return content._replace(what=f"{where}, of role {known}: {content.what}")
    if content is None or (isinstance(content, str) and not content.strip()):
        if known == "assistant" and turn.get("tool_calls"):
            return {"role": known, "content": "", **turn}
        return Bad("an empty turn", f"{where}, of role {known}")
    text = text_of(content, most)
    if isinstance(text, Bad):
        return text._replace(what=f"{where}, of role {known}: {text.what}")
    return {"role": known, "content": text, **turn}


def _joined(parts: list[Any]) -> str | Bad:
    """Content in parts as one text, which is what templates make of it."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            return Bad("content that is no text", f"a part of type {kind!r}"[:100])
    return "".join(texts)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(one) for key, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value
