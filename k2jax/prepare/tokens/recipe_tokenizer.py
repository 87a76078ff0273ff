"""A recipe's tokenizer, wherever it comes from, as the tokenizer.json of its stores."""

from pathlib import Path

from k2jax.data.tokenizer import K2_SPECIAL_TOKENS, Tokenizer, load_tokenizer
from k2jax.prepare.tokens import spm


def open_tokenizer(where: str | Path) -> Tokenizer:
    """A tokenizer.json, a SentencePiece .model, or "seqio:MODULE@NAME", a task's or mixture's.

    Raises ConfigError if there is none, or none that a tokenizer.json can hold.
    """
    where = str(where)
    if where.startswith("seqio:"):
        from k2jax.prepare.tokens import seqio_bridge  # it imports TensorFlow: 6 seconds and 0.8 GB

        return seqio_bridge.tokenizer(where.removeprefix("seqio:"))
    return spm.convert(spm.read(where), where) if spm.is_model(where) else load_tokenizer(where)


def k2_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with K2's 18 special tokens, those that it lacks behind its vocabulary: LLaMA's gives K2's."""
    return tokenizer.with_control_tokens(K2_SPECIAL_TOKENS)
