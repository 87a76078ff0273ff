"""SentencePiece models: the tokenizer.json that is made of one, and whether it does the same.

Stores hold what SentencePiece itself gives. All readers use a tokenizer.json, made by transformers' converter, which
is close and not the same: a charsmap is applied to whole characters with their accents, Unigram adds up scores in
64 bits and not 32, a BPE's pieces of one score merge in another order. So each document is encoded by both, and one on
which they differ ends the preparation.

Pieces that the model defines for its user ("<mask>") are found by SentencePiece in any text. Here they are control
tokens, which no text becomes, but for single characters (digits) and white space, which are ordinary pieces.
"""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, decoders, normalizers

from k2jax.data.tokenizer import Tokenizer, encode_documents
from k2jax.errors import ConfigError

if TYPE_CHECKING:  # of a package that only these models need
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

SPACE = "\u2581"
FILE = "tokenizer.model"  # the recipe's, in the folder of the stages, where all workers find it


def is_model(where: str) -> bool:
    """Whether a recipe's tokenizer is a SentencePiece model."""
    return where.endswith(".model") and not where.startswith("seqio:")


def read(path: str | Path) -> bytes:
    """The bytes of a .model file. Raises ConfigError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: cannot be read ({error.strerror})") from error


def parse(data: bytes, name: str) -> "ModelProto":
    """The model in the bytes of a .model file; ConfigError, which gives its name, if SentencePiece cannot use them."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise _not_installed(name, error) from error
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        if not model.pieces or not model.HasField("trainer_spec"):
            raise ValueError("no pieces or no trainer_spec")
        SentencePieceProcessor(model_proto=data)
    except Exception as error:  # protobuf's DecodeError, and what the library makes of its own
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"tokenizer {name}: is no SentencePiece model ({reason}): restore it") from error
    return model


def convert(data: bytes, name: str) -> Tokenizer:
    """The tokenizer.json of a .model file's bytes, with the same ids. Raises ConfigError if there cannot be one."""
    model = parse(data, name)
    try:
        if problem := _problem(model):
            raise ValueError(problem)
        file = _convert(model)
    except ImportError as error:
        raise _not_installed(name, error) from error
    except Exception as error:  # of the converter, and what `tokenizers` raises is a bare one
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"tokenizer {name}: no tokenizer.json can hold it ({reason}): use another model") from error
    return Tokenizer(file, name)


def _convert(model: "ModelProto") -> str:
    from transformers.convert_slow_tokenizer import SpmConverter, generate_merges

    trainer, scores = model.trainer_spec, {piece.piece: piece.score for piece in model.pieces}
    [trainer.unk_id] = [id for id, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN]
    trainer.unk_piece = model.pieces[trainer.unk_id].piece  # SentencePiece goes by the type, the converter by these
    plain = {piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED and _is_text(piece.piece)}
    if trainer.model_type == trainer.BPE:
        ids = {text: id for id, text in enumerate(scores)}
        others = {piece.piece for piece in model.pieces if piece.type != piece.NORMAL} - plain
        merges = generate_merges(ids, scores, others)
        plain &= {left + right for left, right in merges} | {text for text in plain if len(text) == 1}
        tokenizer = SpmConverter.build_tokenizer_from_spm_proto(model, ids, merges)
    else:
        tokenizer = SpmConverter.build_tokenizer_from_spm_proto(model, [*scores.items()])
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model))
    tokenizer.decoder = decoders.Sequence(_decoders(model))
    control = [
        piece.piece
        for piece in model.pieces
        if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.USER_DEFINED) and piece.piece not in plain
    ]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    return tokenizer.to_str()


class Encoder:
    """SentencePiece itself, with the control tokens of the tokenizer.json that was made of its model."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        """Of the model in a file. Raises ConfigError."""
        model, control = parse(read(path), str(path)), tokenizer.control_ids
        from sentencepiece import SentencePieceProcessor  # which is there, if the line above came through

        for id, piece in enumerate(model.pieces):
            if piece.type == piece.USER_DEFINED:
                piece.type = piece.CONTROL if id in control else piece.NORMAL
        self._tokenizer = tokenizer
        threads = int(os.environ.get("RAYON_NUM_THREADS", -1))  # as many as `tokenizers` takes
        self._first = partial(SentencePieceProcessor(model_proto=model.SerializeToString()).encode, num_threads=threads)
        model.normalizer_spec.add_dummy_prefix = False
        self._rest = partial(SentencePieceProcessor(model_proto=model.SerializeToString()).encode, num_threads=threads)

    def encode_documents(self, documents: list[list[str]]) -> list[list[list[int]]]:
        """The ids of each piece of each document, as `Tokenizer.encode_documents`."""
        return encode_documents(documents, self._first, self._rest)

    def check(self, found: list[list[list[int]]], documents: list[list[str]], names: list[str]) -> None:
        """Raises ConfigError, which names the document, if `found`, by the tokenizer.json, is not SentencePiece's."""
        for name, ours, theirs in zip(names, found, self.encode_documents(documents), strict=True):
            if ours != theirs:
                [(ours, theirs), *_] = [both for both in zip(ours, theirs, strict=True) if both[0] != both[1]]
                raise ConfigError(f"document {name}: {self._difference(ours, theirs)}")

    def _difference(self, ours: list[int], theirs: list[int]) -> str:
        pairs = zip(ours, theirs, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        a, b = (
            f"{ids[first]} ({self._tokenizer.id_to_token(ids[first])!r})" if first < len(ids) else "nothing"
            for ids in (theirs, ours)
        )
        text = self._tokenizer.decode(theirs[max(0, first - 8) : first + 8])
        return (
            f"token {first}, in {text!r}, is {a} by SentencePiece and {b} by the tokenizer.json made of its model: "
            "leave it out, or make a copy of that tokenizer.json the recipe's tokenizer, which then encodes everything"
        )


def _not_installed(name: str, error: ImportError) -> ConfigError:
    missing = error.name or "a package"
    return ConfigError(f"tokenizer {name}: needs {missing} ({error}): pip install 'k2jax[sentencepiece]'")


def _is_text(symbol: str) -> bool:
    """Whether a piece that the model defines for its user is text by nature."""
    return len(symbol) == 1 or symbol.replace(SPACE, " ").isspace()


def _problem(model: "ModelProto") -> str:
    """What of the model has no equal in a tokenizer.json; empty if all has."""
    trainer = model.trainer_spec
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        return f"it is a model of type {trainer.ModelType.Name(trainer.model_type).lower()}"
    if trainer.treat_whitespace_as_suffix:
        return "treat_whitespace_as_suffix is set"
    if not model.normalizer_spec.escape_whitespaces:
        return "escape_whitespaces is off"
    if model.denormalizer_spec.precompiled_charsmap:
        return "it has a denormalizer"
    if [piece.type for piece in model.pieces].count(model.SentencePiece.UNKNOWN) != 1:
        return "it has no unknown piece, or several"
    if unused := [piece.piece for piece in model.pieces if piece.type == piece.UNUSED]:
        return f"{unused[0]!r} is an unused piece"
    return ""


def _normalizers(model: "ModelProto") -> list[normalizers.Normalizer]:
    """The converter has none that heed what the model says of spaces."""
    spec = model.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        charsmap = normalizers.Precompiled(spec.precompiled_charsmap)
        if charsmap.normalize_str("\r") == charsmap.normalize_str("\n"):  # "\r\n" would be taken as one character
            steps.append(normalizers.Replace("\r\n", "\n\n"))
        steps.append(charsmap)
    prefix = [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []  # none before an empty text
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " "), *prefix]
    else:
        steps = prefix + steps  # before a text of which the charsmap leaves nothing, too
    steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return steps


def _decoders(model: "ModelProto") -> list[decoders.Decoder]:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return [*steps, decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else steps
