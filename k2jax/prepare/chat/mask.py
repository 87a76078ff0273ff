"""Rendered conversations to ids and their loss mask.

A token is learned if any character that it stands for is an answer's. One that spans the border is: what the model must
write there is that token. (At an answer's beginning this means that the tokens of the prompt alone would be others;
such answers are counted as `joined`.) It is also transformers' rule for its assistant masks.

The two halves of a preference pair are tokenized apart, each as a conversation alone, and stand in one document.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.data.records import Bad
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import ConfigError
from k2jax.prepare.chat.pairs import HALVES, SAME
from k2jax.prepare.tally import Tally

STEP = "tokens"
COUNTS = (  # of conversations that are in stores, all as they were before any was cut, but for tokens; a pair has two
    "conversations", "turns", "answers", "tokens", "supervised_tokens", "cut", "joined", "endless", "compared", "pairs",
)  # fmt: skip
REJECTED = 2  # the bit in the mask of every token of a pair's rejected half


class Encoded(NamedTuple):
    """A conversation, or a pair of them, in tokens."""

    document: Document
    ids: np.ndarray  # (n,)
    mask: np.ndarray  # (n,) uint8: bit 0 where a token is learned, REJECTED where it is of a pair's rejected half


def mask_of(offsets: np.ndarray, answers: list[list[int]]) -> np.ndarray:
    """The mask (n,) of tokens that stand for the characters [start, stop) of `offsets` (n, 2).

    A token that stands for nothing, as some tokenizers put before a text, goes with the character that it is before.
    """
    starts, stops = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    mask = np.zeros(len(offsets), np.uint8)
    for begin, end in answers:
        mask |= (starts < end) & (stops > begin)
    return mask


def encoded(
    batch: list[Document],
    encoder: Tokenizer,
    options: ConfigDict,
    *,
    control: tuple[str, ...],
    tally: Tally,
    counts: Counter,
) -> Iterator[Encoded]:
    """The conversations of a batch that stay, by `options`, the subset's for conversations; the others are counted.

    `control` are the names of control tokens. Raises ConfigError, naming file and row, where the recipe says so of one
    that is too long or teaches nothing.
    """
    rendered = [one.text[start:stop] for one in batch for start, stop in _halves(one)]
    found = iter(encoder.encode_rendered(rendered))
    for one in batch:
        size = len(one.text.encode())
        ids, mask, offsets = (np.concatenate(parts) for parts in zip(*_encoded_halves(one, found), strict=True))
        tally.saw(STEP, size)
        cut = 0 < options.max_tokens < len(ids)
        if cut and options.too_long != "cut":
            remedy = f"raise max_tokens, or set too_long to drop{'' if options.pairs else ' or cut'}"
            _leave_out(one, "too long", f"{len(ids)} tokens", options.too_long, remedy)
            tally.removed(STEP, "too long", size)
            continue
        if cut:
            ids, mask = ids[: options.max_tokens], mask[: options.max_tokens]
        if bad := _useless(one, ids, mask, cut):
            _leave_out(one, *bad, options.bad_rows, "take the row out, or set bad_rows='drop'")
            tally.removed(STEP, bad.reason, size)
            continue
        tally.kept(size, licence=one.metadata.get("licence", ""))
        _count(counts, one, mask, offsets, control, cut)
        yield Encoded(one, ids, mask)


def _halves(one: Document) -> list[tuple[int, int]]:
    """The characters [start, stop) of each conversation in a document: of its only one, or of both of a pair."""
    size, border = len(one.text), one.metadata.get("border")
    return [(0, size)] if border is None else [(0, border), (border, size)]


def _encoded_halves(
    one: Document, found: Iterator[tuple[list[int], list[tuple[int, int]]]]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, mask, offsets in the document's text) of each of its conversations, which are the next of `found`."""
    for number, (start, stop) in enumerate(_halves(one)):
        ids, offsets = next(found)
        offsets = np.array(offsets, np.int64).reshape(-1, 2) + start
        learned = mask_of(offsets, [answer for answer in one.metadata["answers"] if start <= answer[0] < stop])
        yield np.array(ids, np.int64), learned | np.uint8(REJECTED * number), offsets


def _useless(one: Document, ids: np.ndarray, mask: np.ndarray, cut: bool) -> Bad | None:
    """Why nothing can be learned of it: of a pair, from which half; what stands first in one is no target."""
    if "border" not in one.metadata:
        what = f"of {len(one.metadata['answers'])} answers {'all are behind max_tokens' if cut else 'none has a token'}"
        return None if mask.any() else Bad("no answer to learn", what)
    border = int((mask < REJECTED).sum())
    if np.array_equal(ids[:border], ids[border:]):
        return Bad(SAME, "once tokenized")
    for name, half in zip(HALVES, (mask[:border], mask[border:]), strict=True):
        if not (half[1:] & 1).any():
            return Bad("no answer to learn", f"{name} has none behind its first token")
    return None


def _leave_out(one: Document, reason: str, what: str, how: str, remedy: str) -> None:
    if how == "refuse":
        raise ConfigError(f"{one.metadata['source']}: {reason} ({what}): {remedy}")


def _count(
    counts: Counter, one: Document, mask: np.ndarray, offsets: np.ndarray, control: tuple[str, ...], cut: bool
) -> None:
    answers, starts = one.metadata["answers"], set(offsets[:, 0].tolist())
    counts.update(
        conversations=len(_halves(one)),
        turns=one.metadata["turns"],
        answers=len(answers),
        tokens=len(mask),
        supervised_tokens=int((mask & 1).sum()),
        cut=int(cut),
        joined=sum(begin not in starts for begin, _ in answers),
        endless=sum(not one.text[begin:end].rstrip().endswith(control) for begin, end in answers),
        compared=int(one.metadata["compared"]),
        pairs=int("border" in one.metadata),
    )


def notes(counts: dict[str, int]) -> Iterable[str]:
    """What a person should know of a subset's conversations: one line each."""
    if counts["endless"]:
        yield (
            f"{counts['endless']:,} of {counts['answers']:,} answers end with no control token: what learns them does "
            "not learn to stop"
        )
    if counts["joined"]:
        yield (
            f"{counts['joined']:,} of {counts['answers']:,} answers begin within a token of the prompt: a prompt that "
            "is tokenized alone has other tokens there"
        )
