"""RefinedWeb's rules for lines (Penedo et al. 2023, appendix G.2), which TxT360 took over; repeated lines; sentences.

A line goes if all its letters are capitals, if it is of numbers alone, if it counts something ("3 likes"), if it is one
word, or if it is short and reads like a button. The paper edits such a short line, here it goes as a whole.
They are for languages that put spaces between words: where none does, every line is one word.
"""

import re
from collections.abc import Callable, Iterator

from datatrove.data import Document

REMOVED_WORDS = 0.05  # of a document, in such lines: above it the document goes (RefinedWeb, appendix G.2)
SHORT_LINE = 10  # words: the most that a line of navigation has (the same)
# No pattern here takes time that grows with the square of a line or of a run in it.
NUMBERS = re.compile(r"[\d\s.,:;/%+()#$\u20ac\u00a3-]+")
COUNTER = re.compile(
    r"\d[\d.,]*(?:\s?[km])?\s+(likes?|shares?|comments?|replies|retweets?|reposts?|quotes?|bookmarks?|upvotes?|downvotes?|"
    r"downloads?|views?|followers?|reactions?|points?|votes?|subscribers?)",
    re.IGNORECASE,
)
NAVIGATION = re.compile(
    r"^(sign|log)[ -]?(in|up|out)\b|\b(read|show|see|load) (more|all)\s*(\.\.\.|\u2026|>+|\u00bb|\u2192)?$|"
    r"\b\d+ items? in (your )?(cart|basket)\b|^items? in (your )?(cart|basket)\b|^(add|back) to (cart|top)$|"
    r"^skip to (main )?content$|^share (on|via) \w+$",
    re.IGNORECASE,
)
BETWEEN = {"lines": re.compile(r"(\n)"), "paragraphs": re.compile(r"(\n[^\S\n]*\n\s*)")}
SENTENCE = re.compile(r"(?<![.!?\u3002\uff01\uff1f])[.!?\u3002\uff01\uff1f]+[\"'\u201d\u2019)]*(?:\s+|$)|\n+")


def drop_lines(one: Document) -> str | None:
    """Drops such lines; the reason to leave the document out if they hold too many of its words."""
    kept, words, removed = [], 0, 0
    for line in one.text.split("\n"):
        count = len(line.split())
        words += count
        if count and is_no_prose(line.strip(), count):
            removed += count
        else:
            kept.append(line)
    if removed > REMOVED_WORDS * words:
        return f"over {REMOVED_WORDS:.0%} of the words in removed lines"
    if removed:
        one.text = "\n".join(kept)
    return None


def is_no_prose(line: str, num_words: int) -> bool:
    """Whether a line, without white space around it, goes."""
    if num_words == 1 or (line.upper() == line and line.lower() != line):
        return True
    if (NUMBERS.fullmatch(line) and re.search(r"\d", line)) or COUNTER.fullmatch(line):
        return True
    return num_words <= SHORT_LINE and NAVIGATION.search(line) is not None


def without_repeated(text: str, *, lines: bool, paragraphs: bool) -> str:
    """The text less the paragraphs, and then the lines, that stand earlier in it; paragraphs are what empty lines part.

    Compared is what they say, whatever the white space; what has no letter and no digit ("---", "}") stays. That is of
    one document; of a corpus see dedup/shared.py.
    """
    for by in ("paragraphs",) * paragraphs + ("lines",) * lines:
        seen: set[str] = set()
        text = without(text, by, lambda piece, seen=seen: piece in seen or seen.add(piece))
    return text


def pieces(text: str, by: str) -> Iterator[str]:
    """What the "lines" or "paragraphs" of a text say; those that say nothing are left out."""
    return filter(None, map(_said, BETWEEN[by].split(text)[::2]))


def without(text: str, by: str, is_gone: Callable[[str], bool | None]) -> str:
    """The text less the pieces of which that is so, given what they say; each goes with what parts it from that before
    it, but for how it is indented. What says nothing stays."""
    parts, kept = BETWEEN[by].split(text), []
    for part, before in zip(parts[::2], ["", *parts[1::2]], strict=True):
        if (said := _said(part)) and is_gone(said):
            continue
        kept += [before if kept else before.rpartition("\n")[2], part]
    return "".join(kept)


def _said(part: str) -> str:
    """Whatever the white space; nothing without a letter or a digit."""
    said = " ".join(part.split())
    return said if any(one.isalnum() for one in said) else ""


def sentences(text: str) -> list[str]:
    """Sentences by their ends, which is what counting them needs."""
    ends = [match.end() for match in SENTENCE.finditer(text)]
    starts = [0, *ends]
    return [part for a, b in zip(starts, [*ends, len(text)], strict=True) if (part := text[a:b].strip())]
