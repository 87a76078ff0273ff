"""The rows of stages of kind "sft" and "dpo": whole conversations side by side, told apart by marks, and padding.

A row holds conversations of one store, as a window does. Beside its tokens it has a mark for each of them: 2 d + l, d
the number of the conversation in the row, from 1, and l whether the token is learned. Padding is token 0, marked 0.
EOS, which a template may write anywhere, tells nothing here.

In a stage of kind "dpo" a document is a pair: two conversations, the preferred one with the odd number.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from k2jax.data.order import Rows
from k2jax.data.packing import SHORTEST_PAIR, VERSION, Packing, Placed, check_targets, packing_of
from k2jax.data.permutation import derive_key
from k2jax.data.store import Store
from k2jax.errors import ConfigError

PADDING = 0  # a token that no loss and no other token sees


def packed(stage: Mapping[str, Any], stores: Mapping[str, Store], *, check: bool) -> dict[str, dict[str, int]]:
    """What the manifest says of how each store of such a stage's mix is packed, by name.

    `check`: all of their loss masks are read, for a conversation that teaches nothing. Raises ConfigError for that, and
    for one that does not fit.
    """
    found = {}
    for name in sorted(set(stage["mix"]) & set(stores)):
        store = stores[name]
        packing = packing_of(store, stage["sequence_length"], stage["too_long"])
        if check:
            check_targets(store)
        found[name] = {
            "windows": packing.num_rows,
            "conversations": packing.num_documents,
            "tokens": packing.num_tokens,
            "left_out": packing.left_out,
            "cut": packing.cut,
        }
    return found


def check_kind(stage: Mapping[str, Any], name: str, store: Store) -> None:
    """Raises ConfigError for a store whose documents are not those of the stage's kind."""
    kind = "dpo" if store.pairs else "sft" if store.masked else "pretrain"
    if kind != stage["kind"]:
        holds = {
            "pretrain": "text without a loss mask",
            "sft": "conversations, each by itself",
            "dpo": "pairs, of a chosen and a rejected conversation",
        }
        raise ConfigError(
            f"stage {stage['name']!r}, of kind {stage['kind']!r}: store {name!r} holds {holds[kind]}: expected "
            f"{holds[stage['kind']]}: take it out of the mix (config.mix_of(FOLDER, {stage['kind']!r}) has none "
            f"such), or set the stage's kind to {kind!r}"
        )


class ConversationRows:
    """Of one sft or dpo stage of a manifest, in any epoch. Picklable, with the packings.

    Raises ConfigError where a store is not packed as the manifest says.
    """

    def __init__(self, manifest: Mapping[str, Any], stage: int, stores: Mapping[str, Store]):
        about = manifest["stages"][stage]
        self._length, self._key = about["sequence_length"], (manifest["seed"], "conversations", stage)
        self._names, self._stores = sorted(manifest["stores"]), stores
        self.pairs = most_pairs(self._length) if about["kind"] == "dpo" else 0  # that a row can hold
        self.first_number, self.num_pairs = pair_numbers(manifest, stage)
        self._packings: dict[str, Packing] = {}
        for subset in about["subsets"]:
            name = subset["name"]
            packing = packing_of(stores[name], self._length, about["too_long"])
            found = (VERSION, packing.num_rows, packing.num_tokens)
            expected = (about["packing"], subset["windows"], subset["tokens"])
            if found != expected:
                raise ConfigError(
                    f"stage {about['name']!r}: store {name!r} is packed here, by version {found[0]}, into {found[1]:,} "
                    f"rows of {found[2]:,} tokens, the manifest has {expected}: use the version of k2jax that made it"
                )
            self._packings[name] = packing

    def key(self, name: str, epoch: int) -> int:
        """By which an epoch of a subset is dealt."""
        return derive_key(*self._key, name, epoch)

    def placed(self, rows: Rows) -> Iterator[tuple[str, np.ndarray, Placed]]:
        """(subset, which of the rows are of it, what stands in those)."""
        for subset in np.unique(rows.subset):
            here = np.flatnonzero(rows.subset == subset)
            name, epochs = self._names[subset], rows.epoch[here]
            keys = {epoch: self.key(name, epoch) for epoch in np.unique(epochs).tolist()}
            dealt = np.array([keys[epoch] for epoch in epochs.tolist()], np.uint64)
            yield name, here, self._packings[name].rows(rows.window[here], dealt)

    def window_of(self, name: str, document: int, epoch: int) -> int | None:
        """In which window of an epoch a document of a subset stands; None of one that is left out."""
        return self._packings[name].window_of(document, self.key(name, epoch))

    def read(self, rows: Rows, width: int) -> dict[str, np.ndarray]:
        """tokens and marks, uint32 (rows, width) each, all reads in flight at once; of pairs their numbers, too: int32
        (rows, pairs), as `pair_numbers` counts them, -1 where there is none."""
        reads, pairs = [], np.full((len(rows.window), self.pairs), -1, np.int32)
        for name, here, placed in self.placed(rows):
            store, spans = self._stores[name], (placed.begin, placed.length)
            reading = store.start_reading_spans(*spans), store.start_reading_spans(*spans, masks=True)
            reads.append((here, placed, reading))
            if self.pairs:
                pairs[here[placed.row], number_in_row(placed) - 1] = self.first_number[name] + placed.document
        tokens = np.full((len(rows.window), width), PADDING, np.uint32)
        marks = np.zeros_like(tokens)
        for here, placed, reading in reads:
            fill(tokens, marks, here, placed, *(finish() for finish in reading), bool(self.pairs))
        return {"tokens": tokens, "marks": marks} | ({"pairs": pairs} if self.pairs else {})


def pair_numbers(manifest: Mapping[str, Any], stage: int) -> tuple[dict[str, int], int]:
    """({store: number of its first document}, how many there are), through the stage's stores in the order of names."""
    names = sorted(subset["name"] for subset in manifest["stages"][stage]["subsets"])
    *firsts, total = np.cumsum([0, *(manifest["stores"][name]["num_documents"] for name in names)]).tolist()
    return dict(zip(names, firsts, strict=True)), total


def most_pairs(sequence_length: int) -> int:
    """That stand in a row."""
    return max(1, sequence_length // SHORTEST_PAIR)


def number_in_row(placed: Placed) -> np.ndarray:
    """Of each document, from 1: int64 (documents,)."""
    return np.arange(len(placed.row)) - placed.row.searchsorted(placed.row) + 1


def fill(
    tokens: np.ndarray,
    marks: np.ndarray,
    here: np.ndarray,
    placed: Placed,
    found: np.ndarray,
    masks: np.ndarray,
    pairs: bool,
) -> None:
    """Puts the tokens of placed documents, and what their loss masks say, into rows `here` of tokens and marks."""
    number = number_in_row(placed)
    of = np.repeat(np.arange(len(placed.row)), placed.length)
    within = np.arange(len(of)) - np.repeat(np.cumsum(placed.length) - placed.length, placed.length)
    at = here[placed.row][of], placed.start[of] + within
    conversation = 2 * number[of] - 1 + (masks >> 1) if pairs else number[of]
    tokens[at], marks[at] = found, 2 * conversation + (masks & 1)


def num_held_out_rows(store: Store, sequence_length: int, too_long: str) -> int:
    """Rows of a store's held-out conversations, packed as those of training; what is too long is cut, or dropped."""
    packing = packing_of(store, sequence_length, too_long, held_out=True)
    return packing.num_rows if packing else 0


def read_held_out(
    store: Store, sequence_length: int, too_long: str, rows: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, marks), uint32 (rows, width), of some of those rows."""
    packing = packing_of(store, sequence_length, too_long, held_out=True)
    placed = packing.rows(rows, np.zeros(len(rows), np.uint64))
    reading = [store.start_reading_spans(placed.begin, placed.length, masks=masks) for masks in (False, True)]
    tokens = np.full((len(rows), width), PADDING, np.uint32)
    marks = np.zeros_like(tokens)
    fill(tokens, marks, np.arange(len(rows)), placed, *(finish() for finish in reading), store.pairs)
    return tokens, marks


def is_target(marks: np.ndarray, pairs: bool = False) -> np.ndarray:
    """Of rows' tokens behind the first, which are learned: bool (rows, width - 1). As model/conversations.py has it.

    `pairs`: of their chosen conversations alone.
    """
    behind = marks[:, 1:]
    found = (behind & 1 == 1) & (behind >> 1 == marks[:, :-1] >> 1)
    return found & (behind >> 1 & 1 == 1) if pairs else found
