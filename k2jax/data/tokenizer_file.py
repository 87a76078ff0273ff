"""Variants of a tokenizer.json: without what a caller must not meet, as text alone, and for text that continues.

The library keeps switches in the file (truncation, padding, dropout) and in the loaded object (whether special tokens
in a text are text, which is not saved). Here each way of encoding is a file of its own, made once and never switched.
"""

import json
import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

from tokenizers import Tokenizer


class Loaded(NamedTuple):
    """A file, whole."""

    tokenizer: Tokenizer  # only decodes, and knows the names
    moved: str  # the first added token that the library gave another id than the file; it numbers them itself
    control: set[str]  # what no text may become
    puts_space: bool  # before a text
    unknown: str | None  # what stands for characters that the vocabulary lacks


def load(file: str, named: Iterable[str]) -> Loaded:
    """The tokenizer as the file has it. What the library raises for a damaged one comes before anything is made of it.

    Control tokens are the added ones, with exceptions among those not marked special: a single character, white space
    (GPT-NeoX's indents), and what a BPE's own merges make, unless it is `named`.
    """
    tokenizer, parsed, control, moved = Tokenizer.from_str(file), _read(file), set(), ""
    model = parsed["model"]
    made, named = {_merged(model, pair) for pair in model.get("merges", ())}, set(named)
    for token in parsed.get("added_tokens") or ():
        text = token["content"]
        id = tokenizer.token_to_id(text)
        if id != token["id"] and text and not moved:
            moved = f"added token {text!r} has id {token['id']} and is loaded as {id}"
        if token["special"] or text in named or not (_is_plain(text) or text in made):
            control.add(text)
    unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else model.get("unk_token")
    unknown = unknown or None
    return Loaded(tokenizer, moved, control | ({unknown} - {None}), _without_space(parsed) != parsed, unknown)


def with_control(file: str, *, continues: bool, bare: bool = False) -> Tokenizer:
    """For text whose control tokens are control tokens; bare: without what adds some, or trims tokens' places in it."""
    parsed = _read(file)
    if bare:
        parsed["post_processor"] = None
    return _build(_without_space(parsed) if continues else parsed)


def as_text(file: str, control: set[str], *, continues: bool) -> Tokenizer:
    """For text that is nothing but text: none of the `control` tokens comes of it.

    The library can leave added tokens in a text alone, but a model that has one in its vocabulary finds it there:
    "</s>" is the likeliest piece of its own four characters in any Unigram. So control tokens have names here that are
    drawn anew each time: no text holds them, and ids do not depend on names.
    """
    parsed = _read(file)
    parsed["post_processor"] = None
    names = {text: f"{secrets.token_hex(16)} {i}" for i, text in enumerate(sorted(control))}
    for token in parsed.get("added_tokens") or ():
        token["special"] = not _is_plain(token["content"]) or token["content"] in control  # special ones are skipped
        token["content"] = names.get(token["content"], token["content"])
    _rename(parsed["model"], names)
    built = _build(_without_space(parsed) if continues else parsed)
    built.encode_special_tokens = True
    return built


def _is_plain(text: str) -> bool:
    return len(text) == 1 or text.replace("\u2581", " ").isspace()


def _read(file: str) -> dict[str, Any]:
    """The file less truncation, padding and dropout, which lose or change text in silence."""
    parsed = json.loads(file)
    parsed["truncation"] = parsed["padding"] = None
    if parsed["model"].get("dropout"):
        parsed["model"]["dropout"] = None
    return parsed


def _build(parsed: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(parsed))


def _merged(model: dict[str, Any], pair: str | list[str]) -> str:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Renames entries of the vocabulary; the merges that make them, or are made with them, go."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): id for text, id in vocab.items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [
            pair
            for pair in model["merges"]
            if names.keys().isdisjoint([_merged(model, pair), *(pair.split(" ") if isinstance(pair, str) else pair)])
        ]


def _without_space(part: Any) -> Any:
    """The file, or a part of it, with nothing that puts a space before a text."""
    if isinstance(part, list):
        return [_without_space(one) for one in part if not (isinstance(one, dict) and one.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace":
        return {**part, "prepend_scheme": "never", "add_prefix_space": False}
    if part.get("type") == "ByteLevel":
        return {**part, "add_prefix_space": False}
    keys = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")
    return {key: _without_space(value) if key in keys else value for key, value in part.items()}
