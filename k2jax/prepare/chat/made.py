"""Conversations that are made here, the same ones each time: what comes after a number, and opposites of words; and
preference pairs of such, whose last answer is right in one and wrong in the other.

For experiments/data/smoke_chat.py: enough to see a model learn to answer in a template's form, with no download.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from k2jax.files import write_text

TEMPLATE = """{% for m in messages %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
OPPOSITES = (
    "hot cold", "big small", "fast slow", "old new", "up down", "left right", "true false", "first last",
)  # fmt: skip
NUMBERS = range(1, 13)


def write(folder: Path, *, count: int = 1500) -> None:
    """Writes numbers.jsonl and opposites.jsonl, `count` conversations each, preferred.jsonl, half as many pairs, and
    chat_template.jinja into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"chat_template.jinja": TEMPLATE}
    contents |= {f"{name}.jsonl": _lines(ask, name, count) for name, ask in QUESTIONS.items()}
    contents["preferred.jsonl"] = _pairs(count // 2)
    for name, text in contents.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _number(draw: random.Random) -> tuple[str, str]:
    number = draw.choice(NUMBERS)
    return f"After {number}?", f"{number + 1}."


def _opposite(draw: random.Random) -> tuple[str, str]:
    pair = draw.choice(OPPOSITES).split()
    draw.shuffle(pair)
    return f"Opposite of {pair[0]}?", f"{pair[1]}."


QUESTIONS = {"numbers": _number, "opposites": _opposite}


def _lines(ask: Callable[[random.Random], tuple[str, str]], name: str, count: int) -> str:
    """`count` different conversations of two to six questions, a line of JSON each."""
    draw, found = random.Random(name), {}
    while len(found) < count:
        messages = _messages([ask(draw) for _ in range(draw.randint(2, 8))])
        found.setdefault(json.dumps({"messages": messages}), None)
    return "".join(line + "\n" for line in found)


def _pairs(count: int) -> str:
    """`count` different pairs of one to four questions; the last answer is that to another question in the rejected."""
    draw, found = random.Random("preferred"), {}
    while len(found) < count:
        ask = draw.choice([*QUESTIONS.values()])
        *before, (question, right) = [ask(draw) for _ in range(draw.randint(1, 4))]
        _, wrong = ask(draw)
        if wrong != right:
            chosen, rejected = (_messages([*before, (question, answer)]) for answer in (right, wrong))
            found.setdefault(json.dumps({"chosen": chosen, "rejected": rejected}), None)
    return "".join(line + "\n" for line in found)


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    said = [(("user", question), ("assistant", answer)) for question, answer in turns]
    return [{"role": role, "content": content} for turn in said for role, content in turn]
