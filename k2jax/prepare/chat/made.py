"""Conversations that are made here, the same ones each time: small sums, and what comes before and after a number.

For experiments/data/smoke_chat.py: enough to see a model learn to answer in a template's form, with no download.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

from k2jax.files import write_text

Turns = list[tuple[str, str]]  # (question, answer)

TEMPLATE = """{% for m in messages %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
SUMS = ("What is {a} + {b}?", "Add {a} and {b}.")


def write(folder: Path, *, count: int = 1500) -> None:
    """Writes sums.jsonl and numbers.jsonl, of `count` conversations each, and chat_template.jinja into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"chat_template.jinja": TEMPLATE}
    contents |= {f"{name}.jsonl": _lines(ask, name, count) for name, ask in (("sums", _sum), ("numbers", _number))}
    for name, text in contents.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randrange(6), draw.randrange(6)
    return draw.choice(SUMS).format(a=a, b=b), f"It is {a + b}."


def _number(draw: random.Random) -> tuple[str, str]:
    n = draw.randrange(1, 20)
    if draw.random() < 0.5:
        return f"What comes after {n}?", f"It is {n + 1}."
    return f"What comes before {n}?", f"It is {n - 1}."


def _lines(ask: Callable[[random.Random], tuple[str, str]], name: str, count: int) -> str:
    """`count` different conversations of one to four questions, a line of JSON each."""
    draw, found = random.Random(name), {}
    while len(found) < count:
        turns = [ask(draw) for _ in range(draw.randint(1, 4))]
        said = [(("user", question), ("assistant", answer)) for question, answer in turns]
        messages = [{"role": role, "content": content} for turn in said for role, content in turn]
        found.setdefault(json.dumps({"messages": messages}), None)
    return "".join(line + "\n" for line in found)
