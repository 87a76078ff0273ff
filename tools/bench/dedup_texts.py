"""Texts for tools/bench/dedup.py: this machine's own, and pairs of a random one and a copy changed in a known way."""

import os
import random
import string
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from k2jax.prepare.dedup.minhash import MinHash, hashed_shingles

MIN_BYTES, MAX_BYTES = 200, 2_000_000  # of a file
WORDS, VOCABULARY = 300, 20_000  # of a text; words drawn by rank^-1 as in natural text
SIMILARITIES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # aimed at


def default_directories() -> list[Path]:
    """Where this machine has text: the Pythons' libraries and packages, documentation, licences."""
    paths = [Path(path) for key, path in sysconfig.get_paths().items() if key in ("stdlib", "purelib", "platlib")]
    siblings = Path(sys.base_prefix).parent
    paths += sorted(siblings.glob("*/lib")) if siblings.name == "versions" else []  # pyenv
    return list(dict.fromkeys([*paths, Path("/usr/share"), Path("/usr/lib/python3")]))


def text_files(directories: list[Path]) -> Iterator[tuple[str, str]]:
    """(path, text) of the files that are UTF-8, in an order that mixes the directories."""
    found = {path for directory in directories for path in directory.rglob("*") if path.is_file()}
    for path in sorted(found, key=lambda path: (zlib.crc32(os.fsencode(path)), path)):
        try:
            if MIN_BYTES <= path.stat().st_size <= MAX_BYTES and b"\0" not in (data := path.read_bytes()):
                yield str(path), data.decode()
        except (UnicodeDecodeError, OSError):
            continue


class Pair(NamedTuple):
    """A text and its copy."""

    kind: str
    text: str
    copy: str


def pairs(config: MinHash, each: int) -> Iterator[Pair]:
    """`each` pairs of every kind."""
    draw = random.Random(1)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 11))) for _ in range(VOCABULARY)]
    weights = [1 / rank for rank in range(1, VOCABULARY + 1)]

    def new(count: int) -> list[str]:
        return draw.choices(words, weights, k=count)

    for _ in range(each):
        for kind, change in (("exact", str), ("white space", _spaced), ("case and punctuation", _shouted)):
            text = " ".join(new(WORDS))
            yield Pair(kind, text, change(text))
        for similarity in SIMILARITIES:
            text = new(WORDS)
            yield Pair(f"edited to {similarity}", " ".join(text), " ".join(_edited(text, similarity, config, new)))
        yield Pair("unrelated", " ".join(new(WORDS)), " ".join(new(WORDS)))


def _spaced(text: str) -> str:
    return "\n" + text.replace(" ", "  ", 20).replace("e ", "e\n\t") + " \r\n"


def _shouted(text: str) -> str:
    return text.replace(" a", " A").replace("s ", "s, ") + "."


def _edited(text: list[str], similarity: float, config: MinHash, new: Callable[[int], list[str]]) -> list[str]:
    """With as many words replaced as bring the shingles' Jaccard similarity near the one aimed at."""
    # A word lies in n shingles of words, or in n plus its length of characters.
    total = len(text) if config.unit == "words" else len(" ".join(text))
    touched = config.n_grams if config.unit == "words" else config.n_grams + total // len(text)
    count = round(total * (1 - similarity) / (touched * (1 + similarity)))
    changed = list(text)
    for at in range(count):
        changed[int((at + 0.5) * len(text) / count)] = new(1)[0] + "q"
    return changed


def similarity(one: str, two: str, config: MinHash) -> float:
    """The true Jaccard similarity of two texts' sets of shingles."""
    sets = [set(np.concatenate(list(hashed_shingles(text, config))).tolist()) for text in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])
