"""JSON in and out: a line {"messages": [...]} in, a line with the assistant's message out.

    {"messages": [{"role": "user", "content": "Hello!"}], "tools": [...], "id": anything}
    {"line": 1, "id": ..., "message": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop", "usage": ...}
    {"line": 2, "error": "an unknown role: turn 1 is of 'robot'; ..."}

A line that is no conversation, or that the template or the context refuses, is answered by its error, and others go on.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from k2jax.chat.turns import asked
from k2jax.conversation.answering import Answer, Answerer, Prompt
from k2jax.data.records import Bad
from k2jax.errors import ConfigError

Read = tuple[int, Any, Prompt | str]  # line, its "id", the prompt or what is wrong


def answered(
    lines: Iterable[bytes], answerer: Answerer, special: set[str], system: str | None, *, at_once: int
) -> Iterator[dict[str, Any]]:
    """What is printed for each line that is not empty, in their order.

    With `at_once` 1 each is answered before the next is read, and from the row that is kept.
    """
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    read = (_read(number, line, answerer, special, system) for number, line in numbered)
    done = 0  # conversations: what the next draws depends on its number, not on lines that were none
    for some in _batched(read, at_once):
        prompts = [prompt for _, _, prompt in some if isinstance(prompt, Prompt)]
        if at_once == 1:
            answers = [answerer.answer(prompt, number=done) for prompt in prompts]
        else:
            answers = answerer.answer_all(prompts, done) if prompts else []
        done += len(prompts)
        waiting = iter(answers)
        for number, id, prompt in some:
            about = {"line": number} if id is None else {"line": number, "id": id}
            fine = isinstance(prompt, Prompt)
            yield about | (_told(prompt, next(waiting)) if fine else {"error": prompt})


def _batched(values: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while some := list(itertools.islice(values, size)):
        yield some


def _read(number: int, line: bytes, answerer: Answerer, special: set[str], system: str | None) -> Read:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return number, None, f"not UTF-8 (byte {error.start} of the line)"
    except (ValueError, RecursionError) as error:
        return number, None, f"no JSON ({error})"
    id = record.get("id") if isinstance(record, dict) else None
    found = asked(record, special)
    if isinstance(found, Bad):
        return number, id, f"{found.reason}{f': {found.what}' if found.what else ''}"
    turns, tools = found
    try:
        return number, id, answerer.prompt(with_system(turns, system), tools)
    except ConfigError as error:
        return number, id, str(error)


def with_system(turns: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """The turns, with that of the system first where they have none."""
    if system is None or any(turn["role"] == "system" for turn in turns):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _told(prompt: Prompt, answer: Answer) -> dict[str, Any]:
    usage = {"prompt_tokens": len(prompt.ids), "cached_tokens": answer.num_cached, "completion_tokens": len(answer.ids)}
    return {
        "message": {"role": "assistant", "content": answer.content},
        "finish_reason": answer.finish,
        "context_full": answer.fills_context,
        "usage": usage,
        "ids": answer.ids,
    }
