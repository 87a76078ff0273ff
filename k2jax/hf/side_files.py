"""What stands beside a folder's weights and is no part of the model: how its tokenizer is used, chat templates, how to
sample, licences. An import keeps their texts in the run's first epoch; an export writes them again, changed only where
training changed what they say.
"""

import json
import re
from pathlib import Path
from typing import Any

from k2jax.chat.template import DEFAULT, LLAMA_CLASSES, MORE, TOKENIZER_CONFIG, TOKENS_MAP
from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.hf.untrusted import plain_file, short
from k2jax.run import chat_template
from k2jax.run.saved import SavedStep

GENERATION_CONFIG = "generation_config.json"
LICENCES = r"(?i:(licen[sc]e|notice|use_policy)[a-z0-9._-]*)"
KEPT = re.compile(
    rf"{TOKENIZER_CONFIG}|{GENERATION_CONFIG}|{TOKENS_MAP}|chat_template\.(jinja|json)"
    rf"|{LICENCES}"
)
MAX_BYTES = 8 << 20  # of all of them: a tokenizer_config.json with thousands of added tokens has one
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json


def read(folder: Path) -> dict[str, str]:
    """{name: text} of those that the folder has. ConfigError where one is no text, no JSON or too large."""
    texts: dict[str, str] = {}
    room = MAX_BYTES
    names = sorted(path.name for path in folder.iterdir() if KEPT.fullmatch(path.name))
    more = folder / MORE  # which transformers knows as templates by name
    names += [f"{MORE}/{path.name}" for path in sorted(more.glob("*.jinja"))] if more.is_dir() else []
    for name in names:
        with path_of(folder, name).open("rb") as file:
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


def path_of(folder: Path, name: str) -> Path:
    """The real path of one of them, which may be in a folder of its own. ConfigError as plain_file has it."""
    inner, _, name = name.rpartition("/")
    if inner and (folder / inner).resolve().parent != folder.resolve():
        raise ConfigError(f"{folder / inner} is a link out of its folder, and is not followed: copy it with `cp -rL`")
    return plain_file(folder / inner, name)


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
    """Of a checkpoint's run, as an export has them; {} where it was not imported, or with none, and has no template."""
    imported = saved.imported or {}
    texts = dict(imported.get("side_files", {}))
    trained = trained_chat(saved)
    if trained:
        texts[DEFAULT] = trained["template"]
        texts.pop("chat_template.json", None)
    if GENERATION_CONFIG in texts and trained and trained["ends"]:
        values = read_object(texts[GENERATION_CONFIG])
        texts[GENERATION_CONFIG] = json.dumps({**values, "eos_token_id": list(saved.stop_ids)}, indent=2) + "\n"
    if TOKENIZER_CONFIG in texts:
        values = read_object(texts[TOKENIZER_CONFIG])
        changed = values.pop("auto_map", None) is not None  # names code of the folder, which was not taken
        changed = bool(trained and values.pop("chat_template", None)) or changed
        longest = values.get("model_max_length")
        if saved.context > imported["context"] and isinstance(longest, int | float) and longest < saved.context:
            values["model_max_length"], changed = saved.context, True
        if changed:
            texts[TOKENIZER_CONFIG] = json.dumps(values, indent=2) + "\n"
    return texts


def trained_chat(saved: SavedStep) -> dict[str, Any] | None:
    """What the checkpoint records of its chat template where training changed that; None where it did not."""
    chat, texts = saved.meta.get("chat"), (saved.imported or {}).get("side_files", {})
    begun = chat_template.of_side_files(texts, "the import") if chat else None
    return chat if chat and (not begun or chat["sha256"] != begun["sha256"] or chat["ends"]) else None


def token_ids(saved: SavedStep) -> dict[str, Any]:
    """What the imported config.json says of IDS, lists included; {} where the run was not imported."""
    values = saved.imported["config"] if saved.imported else {}
    return {key: values[key] for key in IDS if values.get(key) is not None}


def licences(texts: dict[str, str]) -> list[str]:
    """The names of those that say what may be done with the weights."""
    return [name for name in texts if re.fullmatch(LICENCES, name)]
