"""Filling in the middle: a document as prefix, suffix and middle, between sentinel tokens, as K2 trained on code.

Bavarian et al. (2022, arXiv:2207.14255). Cut points are between characters, uniform, as in K2's code (k2-data-prep);
unlike there they are drawn for a whole document and from its id: the same on every machine and in every order.

    PSM   <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle
    SPM   <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle     (K2's, "variant 2" of the paper)

Middle and suffix continue the document that the prefix began: the space that SentencePiece puts before a text stands
before the document alone, and adds nothing to the indent of a line that is cut.
"""

import hashlib
from typing import NamedTuple

PREFIX, MIDDLE, SUFFIX = SENTINELS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


class Cut(NamedTuple):
    """How a document is written: "plain", or as "psm" or "spm" with its middle from `first` to `second`, characters."""

    mode: str
    first: int = 0
    second: int = 0


def draw(id: str, num_characters: int, *, seed: int, rate: float, spm_rate: float) -> Cut:
    """The cut of the document with this id: a share `rate` of documents is turned, `spm_rate` of those to SPM."""
    digest = hashlib.blake2b(id.encode(), key=f"fim {seed}".encode(), digest_size=32).digest()
    turned, spm, *places = (int.from_bytes(digest[i : i + 8], "little") for i in range(0, 32, 8))
    if turned >= rate * 2**64:
        return Cut("plain")
    first, second = sorted(place * (num_characters + 1) >> 64 for place in places)
    return Cut("spm" if spm < spm_rate * 2**64 else "psm", first, second)


def pieces(text: str, cut: Cut) -> list[str]:
    """What is tokenized of a document, in its order: the text, or prefix, middle and suffix."""
    if cut.mode == "plain":
        return [text]
    return [text[: cut.first], text[cut.first : cut.second], text[cut.second :]]


def written(mode: str, pieces: list[list[int]], sentinels: dict[str, int]) -> list[int]:
    """The ids of a document, in the order of its mode, from those of its pieces and the sentinels."""
    if mode == "plain":
        return pieces[0]
    prefix, middle, suffix = pieces
    if mode == "psm":
        return [sentinels[PREFIX], *prefix, sentinels[SUFFIX], *suffix, sentinels[MIDDLE], *middle]
    return [sentinels[PREFIX], sentinels[SUFFIX], *suffix, sentinels[MIDDLE], *prefix, *middle]
