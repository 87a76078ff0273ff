"""Packing: which whole conversations of a store share each row, as a function of the epoch. No conversation is split.

What fits together depends on lengths alone. So the documents are packed once by how many there are of each length, best
fit and longest first, into kinds of rows: so many rows, each of so many documents of this length and so many of that.
An epoch then deals the documents of each length to the places for that length by a keyed permutation, and the rows to
their windows by another: every document stands in one row of every epoch, beside others as far as others have its
length. Nothing is kept from row to row, and every epoch has as many rows.

In memory are 12 to 20 bytes a document; 10 million take some seconds.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from k2jax.data.permutation import permute, splitmix, unpermute
from k2jax.data.store import Store
from k2jax.errors import ConfigError

VERSION = 1  # of what is packed where, in manifests
PIECE = 1 << 24  # tokens whose loss mask is looked at together
SHORTEST_PAIR = 8  # tokens, so that a row has a greatest number of pairs: fewer hold no two answers in any template

Kind = tuple[int, list[tuple[int, int]]]  # rows, and what each of them holds: (length, documents of it), longest first


class Placed(NamedTuple):
    """Documents in rows, all int64 (documents,), row by row."""

    row: np.ndarray  # which of the rows asked for
    document: np.ndarray  # its number in the store
    begin: np.ndarray  # its first token in the store
    start: np.ndarray  # its first token in the row
    length: np.ndarray  # tokens of it in the row


class Packing:
    """Of documents by their lengths, in rows of `capacity` tokens.

    Args:
        documents: their numbers in the store, ascending (documents,).
        begins: their first tokens in the store.
        lengths: of each that many tokens are packed, 1 to `capacity`.
        left_out, cut: how many conversations that are longer than a row are not here, or here in part.
    """

    def __init__(
        self,
        documents: np.ndarray,
        begins: np.ndarray,
        lengths: np.ndarray,
        capacity: int,
        *,
        left_out: int = 0,
        cut: int = 0,
    ):
        assert lengths.min() >= 1 and lengths.max() <= capacity, (lengths.min(), lengths.max(), capacity)
        self.capacity, self.left_out, self.cut = capacity, left_out, cut
        self.num_documents, self.num_tokens = len(documents), int(lengths.sum())
        by_length = np.argsort(lengths.astype(np.uint16 if capacity < 1 << 16 else np.uint32), kind="stable")
        self._documents, self._begins = documents[by_length], begins[by_length]
        counts = np.bincount(lengths, minlength=capacity + 1)
        self._class = np.concatenate([[0], np.cumsum(counts)])  # where in them each length begins
        kinds = best_fit(counts, capacity)
        self._kind = np.concatenate([[0], np.cumsum([rows for rows, _ in kinds])])  # the first row of each kind
        self.num_rows = int(self._kind[-1])
        parts = [(k, rows, length, each) for k, (rows, held) in enumerate(kinds) for length, each in held]
        self._part_kind, rows, self._part_length, self._part_each = np.array(parts).T
        self._part = np.searchsorted(self._part_kind, np.arange(len(kinds) + 1))  # the first part of each kind
        # Places for a length are numbered from part to part, so that each document has one.
        order, places = np.argsort(self._part_length, kind="stable"), rows * self._part_each
        self._part_place = np.empty_like(places)
        self._part_place[order] = np.cumsum(places[order]) - places[order]
        self._part_order = order  # of the parts by their places

    @property
    def padding(self) -> float:
        """The share of all positions that hold no token."""
        return 1.0 - self.num_tokens / (self.num_rows * self.capacity)

    def rows(self, windows: np.ndarray, keys: np.ndarray) -> Placed:
        """What stands in windows (rows,) of the epochs whose keys are `keys` (rows,), uint64."""
        row = permute(windows, self.num_rows, _of_rows(keys))
        kind = self._kind.searchsorted(row, side="right") - 1
        number, part = _expand(self._part[kind], self._part[kind + 1])
        each, length = self._part_each[part], self._part_length[part]
        first = self._part_place[part] + (row - self._kind[kind])[number] * each
        of_part, place = _expand(first, first + each)
        number, length = number[of_part], length[of_part]
        begin, size = self._class[length], self._class[length + 1] - self._class[length]
        found = begin + permute(place - begin, size, _of_length(keys[number], length))
        end = np.cumsum(length)
        row_begins = (end - length)[number.searchsorted(np.arange(len(windows)))]
        return Placed(number, self._documents[found], self._begins[found], end - length - row_begins[number], length)

    def window_of(self, document: int, key: int) -> int | None:
        """In which window of the epoch with this key a document stands; None of one that is left out."""
        found = np.flatnonzero(self._documents == document)
        if not found.size:
            return None
        at, key = int(found[0]), np.array([key], np.uint64)
        length = int(self._class.searchsorted(at, side="right")) - 1
        begin, size = int(self._class[length]), int(self._class[length + 1] - self._class[length])
        of_length = int(_of_length(key, np.array([length]))[0])
        place = begin + unpermute(at - begin, size, of_length)
        in_order = self._part_order
        part = in_order[self._part_place[in_order].searchsorted(place, side="right") - 1]
        row = self._kind[self._part_kind[part]] + (place - self._part_place[part]) // self._part_each[part]
        return unpermute(int(row), self.num_rows, int(_of_rows(key)[0]))


def _expand(first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(which range, number in it) of all numbers of the ranges [first, stop), one after the other."""
    sizes = stop - first
    which = np.repeat(np.arange(len(first)), sizes)
    return which, first[which] + np.arange(len(which)) - (np.cumsum(sizes) - sizes)[which]


def _of_rows(keys: np.ndarray) -> np.ndarray:
    return splitmix(keys, np.zeros(len(keys), np.uint64))


def _of_length(keys: np.ndarray, length: np.ndarray) -> np.ndarray:
    return splitmix(keys, length.astype(np.uint64))


def best_fit(counts: np.ndarray, capacity: int) -> list[Kind]:
    """Kinds of rows for counts[length] documents of each length: best fit, the longest first.

    A document goes to the row with the least room that it fits in. So do those of the same length after it, to that
    same row while they fit: rows that are alike are filled together, and what is done once holds for millions.
    """
    with_room: dict[int, list[Kind]] = {}
    there = 0  # bit r: there are rows with room for r tokens

    def put(room: int, kind: Kind) -> None:
        nonlocal there
        if kind[0]:
            with_room.setdefault(room, []).append(kind)
            there |= 1 << room

    put(capacity, (int(counts.sum()), []))  # empty ones: more than can be needed
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = there >> length
            room = length + (fitting & -fitting).bit_length() - 1
            rows, held = with_room[room].pop()
            if not with_room[room]:
                there ^= 1 << room
            each = min(room // length, left)
            filled = min(rows, left // each)
            put(room - each * length, (filled, [*held, (length, each)]))
            put(room, (rows - filled, held))
            left -= filled * each
    return [kind for kinds in with_room.values() for kind in kinds if kind[1]]


# ---- the documents of a store ----------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def packing_of(store: Store, sequence_length: int, too_long: str, held_out: bool = False) -> Packing | None:
    """The packing of a store's training documents, or of those that it holds out; None where none of those is left.

    `too_long` of documents that are longer than a row: "refuse", "drop", or "cut" at the row's end, where those that
    then have nothing to learn are dropped, too. Held-out ones are cut in any case but "drop".

    Raises ConfigError, naming a document, where one is too long and `too_long` is "refuse", or empty; and where none is
    left to train on.
    """
    first = store.num_train_documents if held_out else 0
    starts = store.document_starts()[first : (None if held_out else store.num_train_documents + 1)]
    begins, lengths = starts[:-1], np.diff(starts)
    documents, longer = np.arange(first, first + len(lengths)), lengths > sequence_length
    least = SHORTEST_PAIR if store.pairs else 1
    if lengths.min(initial=least) < least:
        short = int(documents[lengths.argmin()])
        raise ConfigError(
            f"store {store.path}: document {short} has {lengths.min()} tokens, expected {least} or more of a "
            f"{'pair' if store.pairs else 'conversation'}: prepare the store again"
        )
    count, left_out = int(longer.sum()), np.zeros(len(lengths), bool)
    if count and too_long == "refuse" and not held_out:
        _refuse(store, int(documents[longer.argmax()]), int(lengths[longer.argmax()]), count, sequence_length)
    if count and too_long == "drop":
        left_out = longer
    elif count:
        lengths = np.minimum(lengths, sequence_length)
        some = np.flatnonzero(longer)
        left_out[some] = targets_of(store, begins[some], lengths[some]) == 0
    kept = ~left_out
    if not kept.any() and held_out:
        return None
    if not kept.any():
        raise ConfigError(
            f"store {store.path}: no conversation of {len(lengths):,} fits rows of {sequence_length} tokens with "
            f"something to learn: lengthen sequence_length"
        )
    dropped = int(left_out.sum())
    counts = {"left_out": dropped, "cut": count - dropped}
    return Packing(documents[kept], begins[kept], lengths[kept], sequence_length, **counts)


def _refuse(store: Store, document: int, length: int, count: int, sequence_length: int) -> None:
    source = store.document(document)["source"]
    raise ConfigError(
        f"store {store.path}: {count:,} conversation(s) longer than a row of {sequence_length} tokens, such as "
        f"document {document} ({source}) of {length:,}: lengthen the stage's sequence_length, or set its too_long to "
        f"'drop' or 'cut'"
    )


def targets_of(store: Store, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many targets each of some documents, of which so many tokens are read, has: int64 (documents,).

    The first token of a document is no target: nothing of it stands before.
    """
    found, ends, first = np.zeros(len(begins), np.int64), np.cumsum(lengths), 0
    while first < len(begins):
        stop = max(first + 1, int(ends.searchsorted(ends[first] + PIECE)))
        behind = lengths[first:stop] - 1
        masks = store.start_reading_spans(begins[first:stop] + 1, behind, masks=True)() & 1
        found[first:stop] = np.bincount(np.repeat(np.arange(stop - first), behind), masks, stop - first)
        first = stop
    return found


def check_targets(store: Store) -> None:
    """Raises ConfigError for a training document without a target: a row of such alone would teach nothing. Of a pair
    both halves must have one."""
    starts, first = store.document_starts()[: store.num_train_documents + 1], 0
    while first < len(starts) - 1:
        stop = max(first + 1, int(starts.searchsorted(starts[first] + PIECE)) - 1)
        begins = starts[first:stop] - starts[first]
        [mask] = store.read_mask([starts[first]], int(starts[stop] - starts[first]))
        rejected = mask >> 1
        begins_half = np.diff(rejected, prepend=0) == 1  # the first token of a rejected half is no target, either
        learned = mask & 1
        learned[begins] = 0
        learned[begins_half] = 0
        halves = [learned & (rejected == half) for half in range(1 + store.pairs)]
        fewest = np.min([np.add.reduceat(half, begins, dtype=np.int64) for half in halves], axis=0)
        none = np.flatnonzero(fewest == 0)
        if none.size:
            number = first + int(none[0])
            raise ConfigError(
                f"store {store.path}: document {number} ({store.document(number)['source']}) has nothing to learn "
                f"behind {'the first token of one of its halves' if store.pairs else 'its first token'}: take it out "
                f"of the conversations, or prepare them with bad_rows='drop'"
            )
        first = stop
