"""A SentencePiece .model as a tokenizer.json: training, generation and provenance then know one kind of tokenizer.

What the library does is put together from parts of `tokenizers`:

    normalizer  charsmap, spaces squeezed, "▁" before the text and for spaces
    model       BPE or Unigram, byte tokens for characters without a piece, runs of <unk> as one
    decoder     the way back

A BPE model without a charsmap ("identity", as LLaMA's) gives the library's ids for every text. Of the others
`tokenizers` does two things differently, as in Hugging Face's own T5. It applies a charsmap to a whole combined
character of up to five bytes or else to each of its code points, not to the longest match (letters with several accents
behind them, Korean and Japanese in parts): 1 of 3,788 files with 13 million non-ASCII characters came out differently,
a binary one. And Unigram adds up scores in 64 bits, the library in 32, so that between segmentations that score alike
another may win: 57 of 4.5 million tokens, all such.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from k2jax.data.tokenizer import K2_SPECIAL_TOKENS, load_tokenizer
from k2jax.errors import ConfigError

SPACE = "\u2581"
EOS_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
# sentencepiece_model.proto: values of ModelProto.SentencePiece.Type and of TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
PRIVATE = range(0xE000, 0xF8FF)  # Unicode's characters without a meaning


class Piece(NamedTuple):
    """An entry of the vocabulary; its id is its place."""

    text: str
    score: float
    type: int


class Model(NamedTuple):
    """What encoding and decoding depend on."""

    pieces: list[Piece]
    type: str  # one of MODEL_TYPES
    byte_fallback: bool
    space_behind: bool  # treat_whitespace_as_suffix
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    denormalizes: bool  # has a charsmap for decoding


def open_tokenizer(where: str | Path) -> Tokenizer:
    """A recipe's tokenizer: a tokenizer.json, a SentencePiece .model, or "seqio:MODULE@NAME", a task's or mixture's.

    Raises ConfigError if there is none, or none that a tokenizer.json can hold.
    """
    if str(where).startswith("seqio:"):
        from k2jax.prepare import seqio_bridge  # it imports TensorFlow: 6 seconds and 0.8 GB

        return seqio_bridge.tokenizer(str(where).removeprefix("seqio:"))
    return convert(where) if Path(where).suffix == ".model" else load_tokenizer(where)


def convert(path: str | Path) -> Tokenizer:
    """The tokenizer of a SentencePiece .model, with the same ids, which encodes special tokens as plain text.

    Raises ConfigError if the file cannot be read, or holds what has no equal in a tokenizer.json.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: cannot be read ({error.strerror})") from error
    return build(parse(data, str(path)), str(path))


def build(model: Model, name: str) -> Tokenizer:
    """The tokenizer of a model; ConfigError, which gives its name, if it holds what has no equal."""
    if problem := _problem(model):
        raise ConfigError(f"tokenizer {name}: {problem}, which cannot be converted exactly: use another model")
    if model.type == "bpe":
        tokenizer, swap = Tokenizer(_bpe(model, name)), None
    else:
        swap = _unused_characters(model)
        tokenizer = Tokenizer(_unigram(model, swap))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model, swap))
    tokenizer.decoder = decoders.Sequence(_decoders(model, swap))
    special = [piece.text for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    symbols = [piece.text for piece in model.pieces if piece.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in symbols])
    tokenizer.encode_special_tokens = True
    return tokenizer


def k2_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with K2's 18 special tokens, those that it lacks behind its vocabulary: LLaMA's gives K2's."""
    extended = Tokenizer.from_str(tokenizer.to_str())
    missing = [token for token in K2_SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    extended.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])
    extended.encode_special_tokens = True
    return extended


def eos_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document: the one special token among EOS_TOKENS.

    Raises ConfigError if there is none, or more than one.
    """
    special = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    found = [token for token in EOS_TOKENS if token in special]
    if len(found) != 1:
        raise ConfigError(
            f"tokenizer: {' and '.join(found) or 'none'} of its special tokens can end a document, expected exactly "
            f"one of {', '.join(EOS_TOKENS)}: add it, or take the others out, in tokenizer.json's added_tokens"
        )
    return special[found[0]]


def parse(data: bytes, name: str) -> Model:
    """The model in the bytes of a .model file; ConfigError, which gives its name, if they are damaged."""
    try:
        fields = list(_fields(data))
        pieces = [_piece(dict(_fields(value))) for number, value in fields if number == 1]
        parts = dict(fields)  # of a field that comes twice the last counts, as in protobuf
        trainer, normalizer = (dict(_fields(parts.get(number, b""))) for number in (2, 3))
        model = Model(
            pieces=pieces,
            type=MODEL_TYPES.get(trainer.get(3, 1), f"number {trainer.get(3)}"),
            byte_fallback=bool(trainer.get(35, 0)),
            space_behind=bool(trainer.get(24, 0)),
            charsmap=normalizer.get(2, b""),
            add_dummy_prefix=bool(normalizer.get(3, 1)),
            remove_extra_whitespaces=bool(normalizer.get(4, 1)),
            escape_whitespaces=bool(normalizer.get(5, 1)),
            denormalizes=bool(dict(_fields(parts.get(5, b""))).get(2)),
        )
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise ConfigError(f"tokenizer {name}: is no SentencePiece model ({error}): restore it") from error
    if 2 not in parts or [piece.type for piece in pieces].count(UNKNOWN) != 1:
        raise ConfigError(f"tokenizer {name}: is no SentencePiece model (no <unk> or no trainer_spec): restore it")
    return model


def _piece(fields: dict[int, Any]) -> Piece:
    [score] = struct.unpack("<f", fields.get(2, b"\0\0\0\0"))
    return Piece(fields[1].decode(), score, fields.get(3, NORMAL))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Protobuf's wire format: (number, int or bytes) of each field of a message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            value |= (byte & 127) << shift
            position, shift = position + 1, shift + 7
            if byte < 128:
                return value

    while position < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        sizes = {1: 8, 5: 4}
        if kind != 2 and kind not in sizes:
            raise ValueError(f"wire type {kind} at byte {position}")
        size = varint() if kind == 2 else sizes[kind]
        if position + size > len(data):
            raise ValueError("it ends within a field")
        yield number, data[position : position + size]
        position += size


def _problem(model: Model) -> str:
    """What of the model has no equal in a tokenizer.json; empty if all has."""
    types = {piece.type for piece in model.pieces}
    plain = not (model.charsmap or model.add_dummy_prefix or model.remove_extra_whitespaces)
    special = [piece.text for piece in model.pieces if piece.type in (CONTROL, UNKNOWN)]
    if model.type not in ("bpe", "unigram"):
        return f"model type {model.type}"
    if model.space_behind:
        return "treat_whitespace_as_suffix is set"
    if not model.escape_whitespaces:
        return "escape_whitespaces is off"
    if model.denormalizes:
        return "it has a denormalizer"
    if UNUSED in types:
        return f"{next(piece.text for piece in model.pieces if piece.type == UNUSED)!r} is an unused piece"
    if USER_DEFINED in types and (model.type == "unigram" or not plain):
        return "it has user-defined symbols and is no BPE without charsmap, dummy prefix and space removal"
    if spaced := [piece.text for piece in model.pieces if piece.type == USER_DEFINED and " " in piece.text]:
        return f"user-defined symbol {spaced[0]!r} has a space"
    if short := [text for text in special if len(text) < 2]:
        return f"control piece {short[0]!r} is a single character"
    if model.type == "unigram" and model.byte_fallback:
        return "it is Unigram with byte_fallback"
    if model.type == "unigram" and (bare := [text for text in special if "<" not in text]):
        return f"control piece {bare[0]!r} has no '<'"
    return ""


def _bpe(model: Model, name: str) -> models.BPE:
    """Byte-pair encoding that merges in the order of the scores.

    The library looks up whether two neighbours joined are a piece; `tokenizers` needs to know the pairs. For each
    piece there is one: in a text all merges inside a piece come before the last one that completes it, and go as
    they go in the piece alone.
    """
    scores = {piece.text: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = [(-score, pair) for text, score in scores.items() if (pair := _last_merge(text, scores))]
    merges.sort()
    for (one, pair), (other, next_pair) in zip(merges, merges[1:], strict=False):
        if one == other:  # the library takes the leftmost of both
            raise ConfigError(
                f"tokenizer {name}: pieces {''.join(pair)!r} and {''.join(next_pair)!r} have one score, "
                "which cannot be converted exactly: use another model"
            )
    return models.BPE(
        {piece.text: id for id, piece in enumerate(model.pieces)},
        [pair for _, pair in merges],
        unk_token=_unknown(model).text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _last_merge(text: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """The two parts that become `text` at the end when it is encoded alone; None if they never do."""
    parts = list(text)
    while len(parts) > 1:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
        if not pairs:
            return None
        _, i = min(pairs)
        if len(parts) == 2:
            return parts[0], parts[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return None


def _unigram(model: Model, swap: tuple[str, str]) -> models.Unigram:
    """The likeliest segmentation. Special tokens stand in the list of pieces with their "<", which no text has here:
    the normalizer writes another character for it, or "</s>" in a text would end the document.
    """
    normal = [piece.score for piece in model.pieces if piece.type == NORMAL]
    vocab = [
        (piece.text.replace("<", swap[0]), piece.score) if piece.type == NORMAL else (piece.text, max(normal))
        for piece in model.pieces
    ]
    return models.Unigram(vocab, unk_id=model.pieces.index(_unknown(model)), byte_fallback=False)


def _unused_characters(model: Model) -> tuple[str, str]:
    """Two characters that no piece has: one to stand for "<", one to stand for that one in texts (both unknown)."""
    used = set("".join(piece.text for piece in model.pieces))
    first, second, *_ = (chr(code) for code in PRIVATE if chr(code) not in used)
    return first, second


def _unknown(model: Model) -> Piece:
    return next(piece for piece in model.pieces if piece.type == UNKNOWN)


def _normalizers(model: Model, swap: tuple[str, str] | None) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        charsmap = normalizers.Precompiled(model.charsmap)
        if charsmap.normalize_str("\r") == charsmap.normalize_str("\n"):  # "\r\n" would be taken as one character
            steps.append(normalizers.Replace("\r\n", "\n\n"))
        steps.append(charsmap)
    prefix = [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []  # none before an empty text
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " "), *prefix]
    else:
        steps = prefix + steps  # before a text of which the charsmap leaves nothing, too
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    if swap:
        steps += [normalizers.Replace(swap[0], swap[1]), normalizers.Replace("<", swap[0])]
    return steps


def _decoders(model: Model, swap: tuple[str, str] | None) -> list[decoders.Decoder]:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if swap:
        steps.append(decoders.Replace(swap[0], "<"))
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return steps
