"""Turns of a conversation as templates know them: {"role", "content", ...} with a role that is known, and text.

What is none is `Bad`, never repaired: a turn that is changed silently says something else.
"""

from typing import Any

from k2jax.data.records import Bad, text_of

ROLES = {  # ShareGPT's names and OpenAI's
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "tool": "tool",
}  # fmt: skip


def turn_of(turn: Any, i: int, more_roles: dict[str, str], most: int) -> dict[str, Any] | Bad:
    """One turn as templates know them, less what is null: Parquet has a place for every key of any turn."""
    where = f"turn {i + 1}"
    if not isinstance(turn, dict):
        return Bad("a turn that is no object", f"{where} is {type(turn).__name__}")
    turn = _without_null(turn)
    role, content = turn.pop("from", None), turn.pop("value", None)
    role, content = turn.pop("role", role), turn.pop("content", content)
    known = more_roles.get(role, ROLES.get(role)) if isinstance(role, str) else None
    if known is None:
        return Bad("an unknown role", f"{where} is of {role!r}; known are {', '.join(ROLES)}, and those of roles"[:200])
    if isinstance(content, list):
        content = _joined(content)
        if isinstance(content, Bad):
            return content._replace(what=f"{where}: {content.what}")
    if content is None or (isinstance(content, str) and not content.strip()):
        if known == "assistant" and turn.get("tool_calls"):
            return {"role": known, "content": "", **turn}
        return Bad("an empty turn", f"{where}, of role {known}")
    text = text_of(content, most)
    if isinstance(text, Bad):
        return text._replace(what=f"{where}: {text.what}")
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
