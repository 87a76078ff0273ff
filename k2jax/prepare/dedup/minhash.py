"""MinHash signatures of documents: the hashes of datatrove's first stage, for a fraction of its CPU time.

A text is normalised and cut into overlapping n-grams ("shingles"), each hashed by XXH64; of every one of `bands` x
`hashes_per_band` permutations of the hashes the smallest is kept. Two texts whose sets of shingles have the Jaccard
similarity J agree in each with probability J, and in a whole band with J^hashes_per_band (Broder 1997).

  words       lower case, numbers to 0, punctuation to spaces, no diacritics; split at spaces: datatrove's defaults with
              `str.split` for its tokenizer, as FineWeb without spaCy, which takes 80% of the time and needs English
  characters  lower case, no ASCII punctuation, white space squeezed: SlimPajama's and TxT360's
"""

import re
import string
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash
from datatrove.utils.text import NUMBERS_PATTERN, PUNCTUATION, WHITESPACE_PATTERN

PRIME = (1 << 61) - 1  # of datatrove's and datasketch's permutations, (a x + b mod 2^64) mod PRIME
SHINGLES = 1 << 15  # hashed at a time: bounds a long document's memory
CACHED = 1024  # shingles permuted at a time, with 117 hashes in 1 MB; with 512 it takes a fifth longer

_UPPER, _LOWER = string.ascii_uppercase.encode(), string.ascii_lowercase.encode()
_ASCII_PUNCTUATION = "".join(c for c in PUNCTUATION if c.isascii()).encode()
_WHITE = b"\t\n\v\f\r\x1c\x1d\x1e\x1f"  # of ASCII, to Python's str
_OTHER_WHITE = [chr(code).encode() for code in range(0x80, 0x3001) if chr(code).isspace()]  # the last is U+3000
_WORDS = bytes.maketrans(_UPPER + _WHITE + _ASCII_PUNCTUATION, _LOWER + b" " * len(_WHITE + _ASCII_PUNCTUATION))
_CHARACTERS = bytes.maketrans(_UPPER + _WHITE, _LOWER + b" " * len(_WHITE))
_NUMBER = re.compile(rb"[0-9]+(?:[.,][0-9]+)?")
_OTHER = re.compile(rb"[\x80-\xff][ \x80-\xff]*")  # with spaces: one run, not one for each word
_SPACED = str.maketrans(dict.fromkeys((c for c in PUNCTUATION if not c.isascii()), " "))


class MinHash(NamedTuple):
    """The parameters; two signatures can be compared if all are equal."""

    unit: str  # "characters" or "words"
    n_grams: int
    bands: int
    hashes_per_band: int
    seed: int

    def parameters(self) -> tuple[np.ndarray, np.ndarray]:
        """a and b of the permutations, drawn as datatrove draws them."""
        draw, size = np.random.RandomState(self.seed), (self.bands * self.hashes_per_band, 1)
        a = draw.randint(1, PRIME, dtype=np.uint64, size=size)
        return a, draw.randint(0, PRIME, dtype=np.uint64, size=size)


class Signer:
    """Signs texts; holds the permutations and their working memory."""

    def __init__(self, config: MinHash):
        self._config = config
        self._a, self._b = config.parameters()
        # x = a s + b mod 2^64 is mod PRIME its low 61 bits plus its high three. The low bits alone, shifted up, decide
        # which shingle's is the smallest: no reduction for the others. It is not datatrove's if two shingles are
        # less than 8 of 2^61 apart: one hash in 10^13.
        self._a8, self._b8 = self._a << 3, self._b << 3
        self._work = np.empty((len(self._a), CACHED), np.uint64)

    def sign(self, text: str) -> np.ndarray | None:
        """The smallest hash of each permutation (uint64), or None for a text shorter than one n-gram."""
        smallest = best = None
        for block in hashed_shingles(text, self._config):
            block.sort()  # numpy's unique takes ten times as long
            block = block[np.r_[True, block[1:] != block[:-1]]]
            for at in range(0, len(block), CACHED):
                low, chosen = self._smallest(block[at : at + CACHED])
                if smallest is None:
                    smallest, best = low, chosen
                else:
                    best = np.where(low < smallest, chosen, best)
                    smallest = np.minimum(low, smallest)
        if best is None:
            return None
        x = best * self._a[:, 0] + self._b[:, 0]
        x = (x & np.uint64(PRIME)) + (x >> 61)
        return np.where(x >= PRIME, x - np.uint64(PRIME), x)

    def _smallest(self, shingles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each permutation the smallest value, and the shingle that has it."""
        work = self._work[:, : len(shingles)]
        with np.errstate():  # which restores the buffer: with the usual one numpy first copies what it broadcasts
            np.setbufsize(16)
            np.multiply(shingles, self._a8, out=work)
            np.add(work, self._b8, out=work)
        where = work.argmin(axis=1)
        return work[np.arange(len(work)), where], shingles[where]


def hashed_shingles(text: str, config: MinHash) -> Iterator[np.ndarray]:
    """The hashes of all n-grams of a text (uint64), in blocks."""
    if config.unit == "words":
        data = normalise_words(text)
        spaces = np.flatnonzero(np.frombuffer(data, np.uint8) == ord(" "))
        starts, ends = np.r_[0, spaces + 1], np.r_[spaces, len(data)]
        ends = ends[config.n_grams - 1 :] if data else ends[:0]
        for at in range(0, len(ends), SHINGLES):
            spans = zip(starts[at : at + SHINGLES].tolist(), ends[at : at + SHINGLES].tolist(), strict=False)
            yield np.array([xxhash.xxh64_intdigest(data[start:end]) for start, end in spans], np.uint64)
        return
    normal = normalise_characters(text)
    for at in range(0, len(normal) - config.n_grams + 1, SHINGLES):
        piece = normal[at : at + SHINGLES + config.n_grams - 1]
        data = np.frombuffer(piece.encode(), np.uint8)
        if piece.isascii():
            yield xxh64_windows(data, None, config.n_grams)
            continue
        starts = np.r_[np.flatnonzero((data & 0xC0) != 0x80), len(data)]
        lengths = starts[config.n_grams :] - starts[: -config.n_grams]
        for length in np.unique(lengths).tolist():
            yield xxh64_windows(data, starts[: -config.n_grams][lengths == length], length)


def normalise_words(text: str) -> bytes:
    """The words of datatrove's simplify_text, in UTF-8 with one space between them."""
    if text.isascii():
        return _squeezed(_NUMBER.sub(b"0", text.encode()).translate(_WORDS))
    data = NUMBERS_PATTERN.sub("0", text.lower()).encode().translate(_WORDS)
    return _squeezed(_OTHER.sub(_without_marks, data))


def _without_marks(match: re.Match[bytes]) -> bytes:
    """Punctuation and white space to spaces, then no diacritics, in a run of characters beyond ASCII."""
    text = WHITESPACE_PATTERN.sub(" ", match.group().decode().translate(_SPACED))
    return unicodedata.normalize("NFD", text).translate(_no_marks).encode()


class _NoMarks(dict):
    """For str.translate, which asks once for a character: nonspacing marks to nothing."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code)) == "Mn" else code
        return self[code]


_no_marks = _NoMarks()


def normalise_characters(text: str) -> str:
    """Lower case, without ASCII punctuation, white space squeezed to single spaces."""
    data = text.lower().encode().translate(_CHARACTERS, string.punctuation.encode())
    if not text.isascii():
        for white in _OTHER_WHITE:
            data = data.replace(white, b" ")
    return _squeezed(data).decode()


def _squeezed(data: bytes) -> bytes:
    """Without a space at the ends or after a space: as b" ".join(data.split(b" ")), and no list of words in memory."""
    array = np.frombuffer(data, np.uint8)
    keep = array != ord(" ")
    keep[1:] |= keep[:-1]
    return array[keep].tobytes().strip(b" ")


# XXH64 (xxhash.com/doc/v0.8.3, doc/xxhash_spec.md) of many windows of one length at once.
_P1, _P2, _P3, _P4, _P5 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)


def xxh64_windows(data: np.ndarray, starts: np.ndarray | None, length: int) -> np.ndarray:
    """XXH64 of data[start : start + length] for each start, or for every possible start if None; bytes to uint64."""
    count = len(data) - length + 1 if starts is None else len(starts)

    def lanes(at: int, dtype: str) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        overlapping = np.ndarray((len(data) - size + 1,), dtype, data, strides=(1,))
        chosen = overlapping[at : at + count] if starts is None else overlapping[starts + at]
        return chosen.astype(np.uint64)

    done, hashes = 0, np.full(count, _P5, np.uint64)
    if length >= 32:
        sums = [np.full(count, v % (1 << 64), np.uint64) for v in (_P1 + _P2, _P2, 0, -_P1)]
        for at in range(0, length - 31, 32):
            sums = [_round(total, lanes(at + 8 * i, "<u8")) for i, total in enumerate(sums)]
        done = length // 32 * 32
        hashes = sum(_rotated(total, by) for total, by in zip(sums, (1, 7, 12, 18), strict=True))
        for total in sums:
            hashes = (hashes ^ _round(np.uint64(0), total)) * _P1 + _P4
    hashes += np.uint64(length)
    for at in range(done, length - 7, 8):
        hashes = _rotated(hashes ^ _round(np.uint64(0), lanes(at, "<u8")), 27) * _P1 + _P4
    if length % 8 >= 4:
        hashes = _rotated(hashes ^ (lanes(length // 8 * 8, "<u4") * _P1), 23) * _P2 + _P3
    for at in range(length // 4 * 4, length):
        hashes = _rotated(hashes ^ (lanes(at, "u1") * _P5), 11) * _P1
    for shift, factor in ((33, _P2), (29, _P3), (32, 1)):
        hashes ^= hashes >> shift
        hashes *= np.uint64(factor)
    return hashes


def _rotated(x: np.ndarray, by: int) -> np.ndarray:
    return (x << by) | (x >> (64 - by))


def _round(total: np.ndarray, lane: np.ndarray) -> np.ndarray:
    return _rotated(total + lane * _P2, 31) * _P1
