"""A tokenizer.json as everything here uses it, and the training of one.

What is trained is byte-pair encoding that gives back every text exactly, in K2's layout of ids: 0 <unk>, 1 <s>,
2 </s>, then 256 byte tokens <0x00>..<0xFF>, characters, merges, and last K2's 18 special tokens. K2 itself has 32,000
ids before them, so they are its 32000..32017.

Spaces stay spaces: with LLaMA's U+2581 in their place a space and a U+2581 of the text come out the same.
What has no token of its own is written as its UTF-8 bytes, so <unk> never occurs.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from k2jax import files
from k2jax.bucket import BucketPath, at
from k2jax.data import tokenizer_file
from k2jax.errors import ConfigError

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# In the order of K2's tokenize_datasets.py (k2-data-prep): the ids follow from it.
K2_SPECIAL_TOKENS = (
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
)
CONTROL_TOKENS = (UNK, BOS, EOS)
# The names by which a file's own are found where nobody says which.
EOS_NAMES = (EOS, "<|endoftext|>", "<|end_of_text|>", "<eos>")
BOS_NAMES = (BOS, "<|begin_of_text|>", "<bos>")
# Characters that no normalizer takes away: of several scripts, of one to four bytes.
PROBES = "aZ059.,(+\u00e9\u00df\u0416\u05d0\u0639\u0915\u0e01\u3042\u4e2d\ud55c\U0001f600"
NUM_FIXED = len(CONTROL_TOKENS) + len(BYTE_TOKENS) + len(K2_SPECIAL_TOKENS)

# Merges stay inside these pieces: letters or punctuation with the space before them, one digit (as in LLaMA),
# and white space less the space of the piece behind it. Letters, digits and punctuation never meet in one:
# no merge can spell a special token or a byte token.
PIECES = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
# The characters that make up this share of the text get tokens of their own (LLaMA's figure).
CHARACTER_COVERAGE = 0.99995


class Tokenizer:
    """What a tokenizer.json does to text, with nothing that a caller could set: it never truncates, pads or drops.

    As text, which is how documents and prompts are encoded, nothing becomes a control token: a document that holds
    "</s>" must not end itself. With control tokens, as transformers does by default, those that stand in a text become
    their ids. Either way a text may be said to continue another: it then gets none of the space that many tokenizers
    put before a text, which decoding takes away again at the start alone.
    """

    def __init__(self, file: str, name: str = "", eos: str = ""):
        """Of the text of a tokenizer.json; `name` is for messages, `eos` as in `load_tokenizer`. Raises ConfigError."""
        self._arguments = file, name, eos
        self._file, self._name, self._eos = file, f"tokenizer {name}".strip(), eos
        self._variants: dict[tuple[bool, bool, bool], tokenizers.Tokenizer] = {}
        named = {eos, *EOS_NAMES, *BOS_NAMES}
        loaded = self._built(lambda: tokenizer_file.load(file, named))
        self._whole, moved, self._control, self._puts_space, self._unknown = loaded
        added = self._whole.get_added_tokens_decoder()
        self._added = {token.content: id for id, token in added.items()}
        if eos and eos not in self._added:
            raise ConfigError(
                f"{self._name}: eos={eos!r} is none of its control tokens ({', '.join([*self._added][:8]) or 'none'}): "
                "name one, or add it to added_tokens of the tokenizer.json"
            )
        if moved:
            raise ConfigError(f"{self._name}: {moved}: number the added tokens without holes")

    def __reduce__(self) -> tuple:
        return Tokenizer, self._arguments

    @property
    def vocab_size(self) -> int:
        """The largest id and 1: ids may have holes."""
        return max(self._whole.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_id(self) -> int:
        """Of the token that ends a document. Raises ConfigError if nobody named one and its names do not decide."""
        if self._eos:
            return self._added[self._eos]
        found = [token for token in EOS_NAMES if token in self._added]
        if len(found) != 1:
            raise ConfigError(
                f"{self._name}: {' and '.join(found) or 'none'} of its control tokens can end a document, of "
                f"{', '.join(EOS_NAMES)} exactly one can be told: name it by the key eos (data.eos in an experiment)"
            )
        return self._added[found[0]]

    @property
    def bos_id(self) -> int | None:
        """Of the token that begins a text, if there is one; no text gets it unasked."""
        return next((self._added[token] for token in BOS_NAMES if token in self._added), None)

    @property
    def unk_id(self) -> int | None:
        """Of the token that stands for characters that the vocabulary lacks, if there is one."""
        return self._whole.token_to_id(self._unknown) if self._unknown else None

    def dropped(self) -> str:
        """Those of PROBES that are nothing to it, not even <unk>: a text loses them."""
        return "".join(one for one, ids in zip(PROBES, self.encode_batch([*PROBES]), strict=True) if not ids)

    @property
    def begin_ids(self) -> list[int]:
        """What the file itself puts before a text, where it is asked to: mostly BOS, or nothing."""
        framed, bare = (self.encode_with_control("a", framed=framed) for framed in (True, False))
        return framed[: next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)]

    @property
    def control_ids(self) -> set[int]:
        """Of control tokens. As text, only characters that the vocabulary lacks become one, and that is <unk>."""
        return {self._whole.token_to_id(token) for token in self._control} - {None}

    @property
    def special_tokens(self) -> set[str]:
        """Names of the added tokens that the file marks special: a control token may be none, such as <think>."""
        return {token.content for token in self._whole.get_added_tokens_decoder().values() if token.special}

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name in the file."""
        return self._whole.token_to_id(token)

    def id_to_token(self, id: int) -> str | None:
        """The name of a token in the file."""
        return self._whole.id_to_token(id)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The ids of a text, as text."""
        return self._variant(False, continues).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], *, continues: bool = False) -> list[list[int]]:
        """Those of many texts, on all cores."""
        found = self._variant(False, continues).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """The ids of each of the pieces that are one document in their order: all but the first continue it."""
        return self.encode_documents([pieces])[0]

    def encode_documents(self, documents: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """`encode_pieces` of many documents, on all cores."""
        return encode_documents(documents, self.encode_batch, partial(self.encode_batch, continues=True))

    def encode_with_control(self, text: str, *, continues: bool = False, framed: bool = False) -> list[int]:
        """The ids of a text, where control tokens in it are their ids; framed: with the file's own BOS and EOS."""
        return self._variant(True, continues).encode(text, add_special_tokens=framed).ids

    def encode_rendered(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Of texts that write their own control tokens: the ids, and the characters [start, stop) that each stands for.

        Nothing is added; a character's bytes, where they are tokens of their own, all stand for that character.
        """
        found = self._variant(True, False, bare=True).encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_control: bool = False) -> str:
        """The text of ids; control tokens are written by name, or left out."""
        return self._whole.decode(ids, skip_special_tokens=skip_control)

    def decode_batch(self, rows: Sequence[Sequence[int]], *, skip_control: bool = False) -> list[str]:
        """Those of many rows of ids, on all cores."""
        return self._whole.decode_batch(rows, skip_special_tokens=skip_control)

    def with_control_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """A tokenizer that has these too, those that it lacks behind its vocabulary. Raises ConfigError."""
        missing = [token for token in tokens if self.token_to_id(token) is None]
        if not missing:
            return self
        extended = tokenizers.Tokenizer.from_str(self._file)
        extended.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])
        if extended.token_to_id(missing[0]) != self.vocab_size:
            raise ConfigError(f"{self._name}: its ids have holes, {missing[0]} would not come last: add it yourself")
        return Tokenizer(extended.to_str(), *self._arguments[1:])

    def to_str(self) -> str:
        """The text of the tokenizer.json, as it was given."""
        return self._file

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json, as it was given."""
        files.write_bytes(path, self._file.encode())

    def _variant(self, control: bool, continues: bool, bare: bool = False) -> tokenizers.Tokenizer:
        """Made when it is first needed: many readers only decode."""
        continues = continues and self._puts_space
        key = control, continues, bare
        if key not in self._variants:
            as_text = partial(tokenizer_file.as_text, control=self._control)
            make = partial(tokenizer_file.with_control, bare=bare) if control else as_text
            self._variants[key] = self._built(lambda: make(self._file, continues=continues))
        return self._variants[key]

    def _built(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # what the library raises for a damaged file is a bare Exception
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{self._name}: cannot be read as a tokenizer.json ({reason}): restore it, or prepare the data again"
            ) from error


def encode_documents(
    documents: Sequence[Sequence[str]],
    encode_first: Callable[[list[str]], list[list[int]]],
    encode_rest: Callable[[list[str]], list[list[int]]],
) -> list[list[list[int]]]:
    """The ids of documents in pieces, by two functions for many texts.

    The first piece that has any text begins the document: where a prefix is empty, the middle does.
    """
    places: tuple[list, list] = [], []
    for i, pieces in enumerate(documents):
        begun = False
        for j, text in enumerate(pieces):
            places[begun].append((i, j))
            begun = begun or bool(text)
    found: list[list[list[int]]] = [[[]] * len(pieces) for pieces in documents]
    for encode, part in zip((encode_first, encode_rest), places, strict=True):
        for (i, j), ids in zip(part, encode([documents[i][j] for i, j in part]), strict=True):
            found[i][j] = ids
    return found


def load_tokenizer(path: str | Path | BucketPath, eos: str = "") -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    `eos` names the control token that ends documents; "" leaves it to the well-known names, and only who asks for
    `eos_id` needs one of them. Raises ConfigError if the file is missing or damaged, or has no such token.
    """
    try:
        file = at(path).read_bytes().decode()
    except FileNotFoundError as error:
        raise ConfigError(f"tokenizer {path}: no such file; tools/prepare_data.py makes one") from error
    except (OSError, UnicodeError) as error:  # no UTF-8; or a name that this locale cannot write
        raise ConfigError(f"tokenizer {path}: cannot be read ({error}): restore it, or prepare again") from error
    return Tokenizer(file, str(path), eos)


def tokenizer_sha256(path: str | Path | BucketPath) -> str:
    """SHA-256 (hex) of the file's bytes: what stores and manifests call the tokenizer's identity.

    Raises ConfigError if the file cannot be read.
    """
    try:
        return hashlib.sha256(at(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: cannot be read ({error.strerror})") from error


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` ids, the same for the same texts in the same order.

    Raises ConfigError if `vocab_size` leaves no room for characters, or if the texts are too few to fill it.
    """
    room = vocab_size - NUM_FIXED
    if room < 2:
        raise ConfigError(f"vocab_size={vocab_size}: must exceed the {NUM_FIXED} fixed ids; K2 has 32018")
    texts = list(texts)
    alphabet = _alphabet(texts, most=room // 2)
    # As special tokens the control and byte tokens get the first ids. The limit makes the trainer keep our
    # alphabet alone: its own choice among equally rare characters differs from run to run.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(K2_SPECIAL_TOKENS),
        special_tokens=[*CONTROL_TOKENS, *BYTE_TOKENS],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    learner.train_from_iterator(texts, trainer, length=len(texts))
    learned = json.loads(learner.to_str())["model"]
    if len(learned["vocab"]) + len(K2_SPECIAL_TOKENS) != vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: {sum(map(len, texts)):,} characters of text give only "
            f"{len(learned['vocab']) + len(K2_SPECIAL_TOKENS)} ids: lower it or give more text"
        )
    return _assemble(learned["vocab"], [tuple(pair) for pair in learned["merges"]])


def _alphabet(texts: list[str], most: int) -> list[str]:
    """The characters that get tokens of their own: the most frequent, up to the coverage, at most `most`."""
    counts = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    wanted, covered, chosen = CHARACTER_COVERAGE * counts.total(), 0, []
    for character, count in ranked[:most]:
        if covered >= wanted:
            break
        chosen.append(character)
        covered += count
    return chosen


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(PIECES), behavior="isolated")


def _assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """What was learned, with byte fallback, the exact inverse, and the special tokens behind the rest."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=UNK, byte_fallback=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*CONTROL_TOKENS, *K2_SPECIAL_TOKENS)]
    )
    return Tokenizer(tokenizer.to_str())
