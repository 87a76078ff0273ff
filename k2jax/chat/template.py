"""A chat template: where it comes from.

A template is taken as transformers takes it: from chat_template.jinja beside the tokenizer, else from the key
`chat_template` of tokenizer_config.json, a text or a list of named ones. A recipe can name another file.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax.bucket import BucketPath, at
from k2jax.data.tokenizer import BOS_NAMES, EOS_NAMES, Tokenizer
from k2jax.errors import ConfigError, StorageError
from k2jax.files import write_json

TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate(NamedTuple):
    """A template, and what it is rendered with beside the turns."""

    text: str
    source: str  # the file it is from, for messages
    tokens: dict[str, str]  # bos_token, eos_token, ...: those that there are
    date: str  # YYYY-MM-DD, what strftime_now says; "" if the recipe names none

    @property
    def sha256(self) -> str:
        """Of the text, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class Saved(NamedTuple):
    """What the tasks of a preparation read of template and tokenizer."""

    template: ChatTemplate
    control: list[str]  # names of control tokens
    special: list[str]  # of those that are marked special; <think> and <tool_call>, which turns may hold, are not


def find(config: ConfigDict, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a recipe's conversations. Raises ConfigError if there is none, or not the one that is named."""
    folder, known = _folder(config.tokenizer), {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has the last word
        known |= _json(folder / name) if folder else {}
    text, source = _text(config.chat, folder, known)
    tokens = {name: known[name] for name in TOKENS if known.get(name)}
    tokens = {name: one["content"] if isinstance(one, dict) else one for name, one in tokens.items()}
    if not known:  # nothing says what the tokens are but their names
        for name, names in (("bos_token", BOS_NAMES), ("eos_token", (config.eos, *EOS_NAMES))):
            found = [token for token in names if token and tokenizer.token_to_id(token) is not None]
            tokens |= {name: found[0]} if found else {}
    return ChatTemplate(text, source, tokens, config.chat.date)


def _folder(tokenizer: str) -> Path | BucketPath | None:
    return None if tokenizer.startswith("seqio:") else at(tokenizer).parent


def _text(chat: ConfigDict, folder: Path | BucketPath | None, known: dict[str, Any]) -> tuple[str, str]:
    """The template's text and the file that it is from."""
    if chat.template:
        if (text := _read(at(chat.template))) is None:
            raise ConfigError(f"chat.template={chat.template}: no such file; name a file that holds a Jinja template")
        return text, chat.template
    if folder is None:
        raise ConfigError("chat.template: empty, and a tokenizer of seqio has no template: name a file that holds one")
    place = folder / (f"additional_chat_templates/{chat.name}.jinja" if chat.name else "chat_template.jinja")
    if (text := _read(place)) is not None:
        return text, str(place)
    found, place = known.get("chat_template"), folder / "tokenizer_config.json"
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        wanted = chat.name or "default"
        if wanted not in named:
            names = ", ".join(map(str, named))
            raise ConfigError(f"{place}: has no chat template named {wanted!r}: set chat.name to one of {names}")
        return named[wanted], f"{place} ({wanted})"
    if not isinstance(found, str) or not found or chat.name not in ("", "default"):
        raise ConfigError(
            f"{folder}: has no chat template{f' named {chat.name!r}' if chat.name else ''} in chat_template.jinja or "
            "tokenizer_config.json: name a file that holds one as chat.template"
        )
    return found, str(place)


def _read(path: Path | BucketPath) -> str | None:
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 (byte {error.start}): restore it") from error
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path}: this locale cannot write that name ({error.encoding}): set PYTHONUTF8=1") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error


def _json(path: Path | BucketPath) -> dict[str, Any]:
    """A side file of the tokenizer; {} if there is none."""
    text = _read(path)
    try:
        found = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON ({error}): restore it") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: is {type(found).__name__}, expected a JSON object: restore it")
    return found


def save(path: Path, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Writes what the tasks of a preparation read."""
    control = sorted(filter(None, map(tokenizer.id_to_token, tokenizer.control_ids)))
    write_json(path, {"template": template._asdict(), "control": control, "special": sorted(tokenizer.special_tokens)})


def load(path: Path) -> Saved:
    """What `save` wrote."""
    found = json.loads(path.read_bytes())
    return Saved(**{**found, "template": ChatTemplate(**found["template"])})
