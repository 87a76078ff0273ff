"""Rows of conversations, or of pairs of them, to the texts that a chat template makes of them.

A pair's text is that of its chosen conversation and, behind character number `border`, that of its rejected one.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from k2jax.chat import template
from k2jax.chat.worker import Renderer
from k2jax.data.records import Bad
from k2jax.prepare.chat.pairs import HALVES, SAME, pair_of
from k2jax.prepare.chat.rows import turns_of


@contextlib.contextmanager
def rendering(path: Path, chosen: ConfigDict) -> Iterator[Callable]:
    """Gives a function from a row to its text and metadata, or to what is wrong with it (`read.RenderRow`).

    `path` is what template.save wrote. The metadata are `answers`, the characters [start, stop) that are learned, the
    number of `turns`, and whether both ways to find answers were `compared`; of a pair the `border`, and both numbers
    are of the two.
    """
    saved = template.load(path)
    with Renderer(saved.template, saved.control, most=chosen.max_line_bytes) as renderer:

        def render(record: dict[str, Any], chosen: ConfigDict) -> tuple[str, dict[str, Any]] | Bad:
            if chosen.conversations.pairs:
                return _pair(record, chosen, saved.special, renderer)
            found = turns_of(record, chosen, saved.special)
            if isinstance(found, Bad):
                return found
            done = renderer(*found)
            if "reason" in done:
                return Bad(done["reason"], done["what"])
            return done.pop("text"), {**done, "turns": len(found.turns)}

        yield render


def _pair(
    record: dict[str, Any], chosen: ConfigDict, special: list[str], renderer: Renderer
) -> tuple[str, dict[str, Any]] | Bad:
    found = pair_of(record, chosen, special)
    if isinstance(found, Bad):
        return found
    done = [renderer(*one) for one in found]
    for name, one in zip(HALVES, done, strict=True):
        if "reason" in one:
            return Bad(one["reason"], f"{name}: {one['what']}")
    first, rejected = (one["text"] for one in done)
    if first == rejected:
        return Bad(SAME, "once rendered")
    border = len(first)
    answers = done[0]["answers"] + [[start + border, stop + border] for start, stop in done[1]["answers"]]
    turns, compared = (sum(values) for values in ((len(one.turns) for one in found), (one["compared"] for one in done)))
    return first + rejected, {"border": border, "answers": answers, "turns": turns, "compared": compared}
