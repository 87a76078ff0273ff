"""The token that a folder in Hugging Face's format names as the beginning of a text.

Whether a tokenizer puts it there is for its tokenizer.json to say (transformers 5 asks nothing else). But what is named
stands before a text that has nothing before it when it is scored, whether the tokenizer puts it there or not.
"""

import json
from pathlib import Path
from typing import Any

from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.hf.untrusted import MAX_JSON_BYTES, has, plain_file, short

BOS_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # the first that names one says which
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")  # of transformers, which have one unless told otherwise


def read_bos_id(folder: Path, tokenizer: Path) -> int | None:
    """Its id in that tokenizer.json; None where none is named, or one that the tokenizer does not have."""
    found = [_read(folder, name) for name in BOS_FILES if has(folder, name)]
    values = [said["bos_token"] for said in found if "bos_token" in said]
    if not values and any(said.get("tokenizer_class") in LLAMA_CLASSES for said in found):
        values = ["<s>"]
    value = values[0] if values else None
    token = value.get("content") if isinstance(value, dict) else value  # older files have it with its properties
    return load_tokenizer(tokenizer).token_to_id(token) if isinstance(token, str) else None


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Not by `read_json`, which counts the brackets of strings: a chat template, which may be among them, is full."""
    path = plain_file(folder, name)
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / name} cannot be read as JSON ({short(error)}): restore it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / name} is not a JSON object: found {short(values)}")
    return values
