"""Which documents hold text of evaluation sets: n-grams of words, or of tokens, that stand in both.

Words are runs of letters and digits with the marks on them, lower-cased, in Unicode's composed form: punctuation,
spacing, line breaks, soft hyphens and other characters that are not seen make no difference. In scripts that write no
spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) each character counts as a word. An item of
an evaluation set is one string field of a record (those in lists too), or a file of text. A document is contaminated if
it holds any n words in a row of any item; an item shorter than n words counts as a whole if it has at least SHORTEST,
and is skipped else. Compared are 64-bit hashes (a polynomial of xxh3 of the words): two different n-grams agree by
chance once in 2^64 pairs, for 10^7 evaluation n-grams and 10^12 words once in two corpora.

Tokens are the ids of the recipe's tokenizer, of text in the composed form: case, punctuation and spacing make a
difference, as they do for a model, and an n-gram holds fewer words. An item is looked for as it is tokenized at the
beginning of a text, behind a line feed, and behind a space, since its first token may be another in each. So may its
last: many tokenizers take the line feeds behind a question mark into one token with it. An item of n tokens or fewer
counts from SHORTEST_TOKENS on, and without its last one where as many remain. The check takes as long as tokenizing.

The index is made once, before cleaning: `hashes.npy`, sorted, which tasks map into memory and share; `items.npy`, the
item of each hash, one of each evaluation set that has it; `items.json`, the names of the items and what was counted.
Making it takes 53 bytes an n-gram.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import xxhash
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.data.records import Bad, text_of
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import ConfigError, StorageError
from k2jax.files import whole_file, write_json
from k2jax.prepare import recipe
from k2jax.prepare.sources.files import list_files, place
from k2jax.prepare.sources.read import records
from k2jax.prepare.tally import shown_name
from k2jax.prepare.tokens.recipe_tokenizer import open_tokenizer

SHORTEST = 8  # words of an item; shorter ones ("What is the capital of France?") stand everywhere
SHORTEST_TOKENS = 11  # of an item, about as many words
HITS = 100  # kept of a task, with their text
# One character of a script without spaces, or a run of letters and digits of the others.
NO_SPACES = "\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
NO_SPACES += "\U00020000-\U0003ffff"
LETTERS = rf"[^\W_{NO_SPACES}]+"
WORD = re.compile(f"[{NO_SPACES}]|{LETTERS}")
_marks = "".join(c for c in map(chr, range(1 << 16)) if unicodedata.category(c)[0] == "M")  # such as Hindi's vowels
MARKS = re.compile(f"[{re.sub(f'[{NO_SPACES}]', '', _marks)}]")
MARKED_WORD = re.compile(f"[{NO_SPACES}]|{LETTERS}(?:{MARKS.pattern}+(?:{LETTERS})?)*")  # takes six times as long
UNSEEN = re.compile("[\u00ad\u200b-\u200d\u2060\ufe00-\ufe0f\ufeff]")  # soft hyphens, joiners, selectors of a glyph
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash loses a bit


def words_of(text: str) -> list[str]:
    """The words that are compared."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", UNSEEN.sub("", text))
    return (MARKED_WORD if MARKS.search(text) else WORD).findall(text.lower())


class Words:
    """N-grams of words."""

    shortest = SHORTEST

    def variants(self, text: str, n: int) -> list[list[Any]]:
        """An item's units, in each way that they may stand in a document; of more than `n` every n in a row count."""
        return [words_of(text)]

    def of(self, text: str) -> list[Any]:
        """A document's units."""
        return words_of(text)

    def hashes(self, units: list[Any]) -> npt.NDArray[np.uint64]:
        """One hash a unit."""
        return hash_words(units)

    def shown(self, units: list[Any]) -> str:
        """Units as text."""
        return " ".join(units)


class Tokens(Words):
    """N-grams of a tokenizer's ids."""

    shortest = SHORTEST_TOKENS

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def variants(self, text: str, n: int) -> list[list[Any]]:
        """As the first of a text, behind a line feed, and behind a space; whatever is behind it."""
        text, encode = unicodedata.normalize("NFC", text).strip(), self._tokenizer.encode
        found = [encode(text), encode(text, continues=True), encode(f" {text}", continues=True)]
        found = [ids[:-1] if self.shortest < len(ids) <= n else ids for ids in found]
        return [ids for i, ids in enumerate(found) if ids not in found[:i]]

    def of(self, text: str) -> list[Any]:
        """A document's ids."""
        return self._tokenizer.encode(unicodedata.normalize("NFC", text))

    def hashes(self, units: list[Any]) -> npt.NDArray[np.uint64]:
        """One hash an id: splitmix64."""
        mixed = np.array(units, np.uint64) * FACTOR
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return mixed ^ (mixed >> np.uint64(31))

    def shown(self, units: list[Any]) -> str:
        """Ids as text."""
        return self._tokenizer.decode(units)


def units_of(config: ConfigDict) -> Words:
    """What the recipe's n-grams are made of; ConfigError for a tokenizer that cannot be used."""
    return Tokens(open_tokenizer(config.tokenizer)) if config.contamination.unit == "tokens" else Words()


def hash_words(words: list[str]) -> npt.NDArray[np.uint64]:
    """One hash a word."""
    return np.fromiter((xxhash.xxh3_64_intdigest(word) for word in words), np.uint64, len(words))


def hash_n_grams(hashes: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.uint64]:
    """One hash for each n words in a row; none if there are fewer."""
    count = max(len(hashes) - n + 1, 0)
    total = np.full(count, n, np.uint64)
    for i in range(n):
        total = total * FACTOR + hashes[i : i + count]  # modulo 2^64
    return total


def build(rank: int, *, config: dict[str, Any] | ConfigDict, out: Path) -> None:
    """Stage "contamination", one task: writes the index of the evaluation sets to OUT/stages/contamination.

    Raises ConfigError if a source has no files or holds what is no record: a check that skips them is none.
    """
    config = ConfigDict(config)
    n, folder, units = config.contamination.n_grams, folder_of(out), units_of(config)
    names, sets, hashes, items, lengths = [], [], [], [], set()
    counts: dict[str, Counter[str]] = {}  # of evaluation sets
    for name, text in _items(config):
        variants = [found for found in units.variants(text, n) if len(found) >= min(n, units.shortest)]
        own = counts.setdefault(_set_of(name), Counter(items=0, too_short=0))
        own["items" if variants else "too_short"] += 1
        if variants and (not names or names[-1] != name):
            names.append(name)
            sets.append(list(counts).index(_set_of(name)))
        for variant in variants:
            lengths.add(min(n, len(variant)))
            found = hash_n_grams(units.hashes(variant), min(n, len(variant)))
            hashes.append(found)
            items.append(np.full(len(found), len(names) - 1, np.uint32))
    if not hashes:
        raise ConfigError(
            f"contamination.sources={list(config.contamination.sources)}: no text of {min(n, units.shortest)} "
            f"{config.contamination.unit}"
        )
    found = {"names": names, "lengths": sorted(lengths), "sets": counts}
    found["n_grams"] = _write_index(folder, np.concatenate(hashes), np.concatenate(items), np.array(sets, np.uint32))
    write_json(folder / "items.json", found)


def _write_index(folder: Path, hashes: np.ndarray, items: np.ndarray, sets: np.ndarray) -> int:
    """Of each hash (u8) the first item (u4) of each of the evaluation sets, which `sets` are of items; how many hashes
    there are."""
    order = np.lexsort([sets[items], hashes])  # equal ones stay in the order of their items
    hashes, items = hashes[order], items[order]
    of = sets[items]
    another = np.r_[True, hashes[1:] != hashes[:-1]]
    first = another | np.r_[True, of[1:] != of[:-1]]
    for name, array in (("hashes", hashes[first]), ("items", items[first])):
        with whole_file(folder / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)
    return int(another.sum())


def _items(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """(name of the record, text) of every string in the evaluation sets."""
    for source, file in [(one, file) for one in config.contamination.sources for file in list_files(one)]:
        if "/" not in file.name:  # "mmlu/test.jsonl" says more than its file does
            file = file._replace(name=f"{file.path.rpartition('/')[0].rpartition('/')[2]}/{file.name}")
        name = shown_name(file.name)
        for line, record in records(source, file, chosen=recipe.subset(source), every_field=True):
            texts = [record] if isinstance(record, Bad) else (text_of(one, 1 << 40) for one in _strings(record))
            for text in texts:
                if isinstance(text, Bad):
                    raise ConfigError(
                        f"contamination.sources: {place(file, line)}: {text.reason} ({text.what}): repair or leave "
                        "out the evaluation set, a check that skips parts of it is none"
                    )
                yield f"{name}:{line}" if line else name, text


def _set_of(item: str) -> str:
    """The evaluation set of an item's name: its file."""
    return re.sub(r":\d+$", "", item)


def _strings(value: Any) -> Iterator[str | bytes]:
    if isinstance(value, (str, bytes)):
        yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


class Contamination:
    """The check of one task's documents; `apply` is a rule, `report` what it found."""

    def __init__(self, folder: str | Path, *, remove: bool, units: Words | None = None):
        folder, self._units = Path(folder), units or Words()
        try:
            self._index = orjson.loads((folder / "items.json").read_bytes())
            self._hashes = np.load(folder / "hashes.npy", mmap_mode="r", allow_pickle=False)
            self._items = np.load(folder / "items.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StorageError(f"{folder}: the index of evaluation sets cannot be read ({error})") from error
        self._remove = remove
        self._documents, self._sets, self._hits = Counter(checked=0, contaminated=0), Counter(), []

    def apply(self, one: Document) -> str | None:
        """Notes the document if it is contaminated; the reason to leave it out, if those are to be removed."""
        self._documents["checked"] += 1
        units = self._units.of(one.text)
        hashes, names, n_gram = self._units.hashes(units), {}, ""
        for length in self._index["lengths"]:
            n_grams = hash_n_grams(hashes, length)
            at = np.searchsorted(self._hashes, n_grams)
            found = np.flatnonzero(self._hashes[np.minimum(at, len(self._hashes) - 1)] == n_grams)
            if len(found) and not names:
                n_gram = self._units.shown(units[found[0] : found[0] + length])
            for start, end in zip(at[found], np.searchsorted(self._hashes, n_grams[found], "right"), strict=True):
                names |= {self._index["names"][item]: None for item in self._items[start:end].tolist()}
        return self._note(one, list(names), n_gram) if names else None

    def _note(self, one: Document, names: list[str], n_gram: str) -> str | None:
        """`names` are of items, that of the n-gram first."""
        self._documents["contaminated"] += 1
        name, evaluation_set = names[0], _set_of(names[0])
        self._sets.update(set(map(_set_of, names)))
        if len(self._hits) < HITS:
            hit = {"id": one.id, "source": one.metadata["source"], "evaluation": name, "n_gram": n_gram[:1000]}
            self._hits.append(hit)
        one.metadata["contaminated"] = name
        return f"contaminated by {evaluation_set}" if self._remove else None

    def report(self) -> dict[str, Any]:
        """Documents checked and contaminated, these by each evaluation set they hold text of, and the first HITS."""
        return {"documents": dict(self._documents), "sets": dict(sorted(self._sets.items())), "hits": self._hits}


def folder_of(out: Path) -> Path:
    """Where `build` puts the index."""
    return Path(out) / "stages" / "contamination"
