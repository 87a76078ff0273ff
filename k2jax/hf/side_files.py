"""What stands beside a folder's weights and is no part of the model: how its tokenizer is used, chat templates, how to
sample, licences. An import keeps their texts in the run's first epoch; an export writes them again, changed only where
training changed what they say.
"""

import json
import re
from pathlib import Path
from typing import Any

from k2jax.errors import ConfigError
from k2jax.hf.untrusted import plain_file, short
from k2jax.run.saved import SavedStep

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
TOKENS_MAP = "special_tokens_map.json"
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
            texts[TOKENIZER_CONFIG] = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    return texts


def token_ids(saved: SavedStep) -> dict[str, Any]:
    """What the imported config.json says of IDS, lists included; {} where the run was not imported."""
    values = saved.imported["config"] if saved.imported else {}
    return {key: values[key] for key in IDS if values.get(key) is not None}


def licences(texts: dict[str, str]) -> list[str]:
    """The names of those that say what may be done with the weights."""
    return [name for name in texts if "." not in name or name.lower().endswith((".txt", ".md"))]
