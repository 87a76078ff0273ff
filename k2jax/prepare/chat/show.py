"""One conversation of each store, or pair, as a person should see it before training: what is learned stands out."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.data.store import Store
from k2jax.data.tokenizer import Tokenizer, load_tokenizer
from k2jax.prepare.chat.mask import REJECTED
from k2jax.prepare.chat.pairs import HALVES
from k2jax.text import printable

COLOURS = "\x1b[32m", "\x1b[0m"  # green, and back
MARKS = "[[", "]]"
SHOWN_TOKENS = 600


def examples(out: Path, data: dict[str, Any], *, colours: bool) -> str:
    """The first conversation of each store with a loss mask in the preparation `out`; "" if there is none.

    What is learned is in colour, or between [[ and ]]; of a preference pair both halves are shown. Control characters
    of the data are escapes. Raises StorageError or ConfigError as Store's methods do.
    """
    lines, tokenizer = [], load_tokenizer(out / "tokenizer.json")
    for name in (name for name, row in data["stores"].items() if "supervised_tokens" in row):
        store = Store.open(out / name)
        first = store.document(0)
        place = [first["start"]], first["num_tokens"]
        [ids], [mask] = store.read(*place), store.read_mask(*place)
        how = "in colour" if colours else "in [[ ]]"
        is_rejected = mask >= REJECTED
        halves = zip(HALVES, (~is_rejected, is_rejected), strict=True) if store.pairs else [("", ~is_rejected)]
        for half, own in halves:
            size, what = int(own.sum()), f"{name}, {half}" if half else name
            more = f", {SHOWN_TOKENS} of its {size:,} tokens" if size > SHOWN_TOKENS else ""
            lines.append(f"{what}: {printable(first['source'])}{more}; what is learned is {how}:")
            shown = ids[own][:SHOWN_TOKENS], mask[own][:SHOWN_TOKENS] & 1
            lines += picture(*shown, tokenizer, colours=colours).split("\n")
    return "\n".join(lines)


def picture(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, *, colours: bool) -> str:
    """The text of ids, control tokens by name, with the parts marked whose mask (n,) is 1; indented lines."""
    begin, end = COLOURS if colours else MARKS
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    text, done = "", ""
    for start, stop in zip(borders, borders[1:], strict=False):
        before, done = done, tokenizer.decode(ids[:stop].tolist())  # a part alone would lose the space at its start
        part = printable(done[len(before) :])
        text += f"{begin}{part}{end}" if mask[start] else part
    if colours:
        text = _whole_lines(text)
    return "    " + text.replace("\n", "\n    ")


def _whole_lines(text: str) -> str:
    """A colour ends with its line and begins again on the next: pagers and half a screen show lines alone."""
    begin, end = COLOURS
    parts = text.split(begin)
    inside = [part.partition(end) for part in parts[1:]]
    return parts[0] + "".join(begin + a.replace("\n", f"{end}\n{begin}") + end + c for a, _, c in inside)


def wants_colours(stream: Any) -> bool:
    """Whether the stream is a terminal whose user has not said NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
