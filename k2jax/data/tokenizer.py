"""The tokenizer: byte-pair encoding that gives back every text exactly, in K2's layout of ids.

Ids: 0 <unk>, 1 <s>, 2 </s>, then 256 byte tokens <0x00>..<0xFF>, characters, merges, and last K2's 18 special
tokens. K2 itself has 32,000 ids before them, so they are its 32000..32017.

Spaces stay spaces: with LLaMA's U+2581 in their place a space and a U+2581 of the text come out the same.
What has no token of its own is written as its UTF-8 bytes, so <unk> never occurs.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

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
NUM_FIXED = len(CONTROL_TOKENS) + len(BYTE_TOKENS) + len(K2_SPECIAL_TOKENS)

# Merges stay inside these pieces: letters or punctuation with the space before them, one digit (as in LLaMA),
# and white space less the space of the piece behind it. Letters, digits and punctuation never meet in one:
# no merge can spell a special token or a byte token.
PIECES = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
# The characters that make up this share of the text get tokens of their own (LLaMA's figure).
CHARACTER_COVERAGE = 0.99995


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
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    learner.train_from_iterator(texts, trainer, length=len(texts))
    learned = json.loads(learner.to_str())["model"]
    if len(learned["vocab"]) + len(K2_SPECIAL_TOKENS) != vocab_size:
        raise ConfigError(
            f"vocab_size={vocab_size}: {sum(map(len, texts)):,} characters of text give only "
            f"{len(learned['vocab']) + len(K2_SPECIAL_TOKENS)} ids: lower it or give more text"
        )
    return _assemble(learned["vocab"], [tuple(pair) for pair in learned["merges"]])


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, set to encode special tokens that stand in a text as plain text.

    A document that holds "</s>" must not end itself. The setting is not in the file: load with this function.
    Raises ConfigError if the file is missing or damaged.
    """
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"tokenizer {path}: no such file; tools/prepare_data.py makes one") from error
    except Exception as error:  # what the library raises for a damaged file is a bare Exception
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"tokenizer {path}: cannot be read as a tokenizer.json ({reason}): restore it, or "
            "prepare the data again"
        ) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of the file's bytes: what stores and manifests call the tokenizer's identity.

    Raises ConfigError if the file cannot be read.
    """
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: cannot be read ({error.strerror})") from error


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
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=UNK, byte_fallback=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*CONTROL_TOKENS, *K2_SPECIAL_TOKENS)]
    )
    tokenizer.encode_special_tokens = True
    return tokenizer
