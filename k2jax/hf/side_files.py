"""What stands beside a folder's weights and is no part of the model: how its tokenizer is used, chat templates, how to
sample, licences. An import keeps their texts in the run's first epoch; an export writes them again, changed only where
training changed what they say.
"""

import json
import re
from pathlib import Path
from typing import Any

from k2jax.chat.template import LLAMA_CLASSES, TOKENIZER_CONFIG, TOKENS_MAP
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.hf.untrusted import plain_file, short
from k2jax.run.saved import SavedStep

GENERATION_CONFIG = "generation_config.json"
KEPT = re.compile(
    rf"{TOKENIZER_CONFIG}|{GENERATION_CONFIG}|{TOKENS_MAP}|chat_template\.(jinja|json)"
    r"|(?i:(licen[sc]e|notice|use_policy)[a-z0-9._-]*)"
)
MAX_BYTES = 8 << 20  # of all of them: a tokenizer_config.json with thousands of added tokens has one
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json


def read(folder: Path) -> dict[str, str]:
    """{name: text} of those that the folder has. ConfigError where one is no text, no JSON or too large."""
    texts: dict[str, str] = {}
    room = MAX_BYTES
    for name in sorted(path.name for path in folder.iterdir() if KEPT.fullmatch(path.name)):
        with plain_file(folder, name).open("rb") as file:
            found = file.read(room + 1)
        room -= len(found)
        if room < 0:
            raise ConfigError(f"{folder / name}: with the files beside the weights more than {MAX_BYTES:,} bytes")
        try:
            texts[name] = found.decode()
            if name.endswith(".json"):
                read_object(texts[name])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{folder / name} cannot be read: {short(error)}: restore it, or remove it") from error
    return texts


def read_object(text: str) -> dict[str, Any]:
    """A JSON object; ValueError when it is anything else."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"found {short(values)}, expected a JSON object")
    return values


def bos_id(texts: dict[str, str], tokenizer: Path) -> int | None:
    """Of the token that they name as the beginning of a text; None for none, or one that tokenizer.json does not have.

    Whether it is put there is for tokenizer.json to say (transformers 5 asks nothing else). But what is named stands
    before a text that has nothing before it when it is scored.
    """
    found = [read_object(texts[name]) for name in (TOKENIZER_CONFIG, TOKENS_MAP) if name in texts]
    values = [said["bos_token"] for said in found if "bos_token" in said]  # the first that names one says which
    if not values and any(said.get("tokenizer_class") in LLAMA_CLASSES for said in found):
        values = ["<s>"]
    value = values[0] if values else None
    token = value.get("content") if isinstance(value, dict) else value  # older files have it with its properties
    return load_tokenizer(tokenizer).token_to_id(token) if isinstance(token, str) else None


def of_run(saved: SavedStep) -> dict[str, str]:
    """Of a checkpoint's run, as an export has them; {} where it was not imported, or with none."""
    imported = saved.imported or {}
    texts = dict(imported.get("side_files", {}))
    if TOKENIZER_CONFIG in texts:
        values = read_object(texts[TOKENIZER_CONFIG])
        changed = values.pop("auto_map", None) is not None  # names code of the folder, which was not taken
        longest = values.get("model_max_length")
        if saved.context > imported["context"] and isinstance(longest, int | float) and longest < saved.context:
            values["model_max_length"], changed = saved.context, True
        if changed:
            texts[TOKENIZER_CONFIG] = json.dumps(values, indent=2) + "\n"
    return texts


def token_ids(saved: SavedStep) -> dict[str, Any]:
    """What the imported config.json says of IDS, lists included; {} where the run was not imported."""
    values = saved.imported["config"] if saved.imported else {}
    return {key: values[key] for key in IDS if values.get(key) is not None}


def licences(texts: dict[str, str]) -> list[str]:
    """The names of those that say what may be done with the weights."""
    return [name for name in texts if "." not in name or name.lower().endswith((".txt", ".md"))]
