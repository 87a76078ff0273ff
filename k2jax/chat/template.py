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

DEFAULT, MORE = "chat_template.jinja", "additional_chat_templates"  # beside a tokenizer: a file, and a folder of others
TOKENIZER_CONFIG, TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")  # have tokens that no file names
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
    folder = None if config.tokenizer.startswith("seqio:") else at(config.tokenizer).parent
    chat, texts = config.chat, _beside(folder, config.chat.name) if folder else {}
    tokens = tokens_of(texts, folder)
    if not any(name in texts for name in (TOKENS_MAP, TOKENIZER_CONFIG)):  # nothing says what they are but their names
        for name, names in (("bos_token", BOS_NAMES), ("eos_token", (config.eos, *EOS_NAMES))):
            found = [token for token in names if token and tokenizer.token_to_id(token) is not None]
            tokens |= {name: found[0]} if found else {}
    if chat.template:
        text, source = read_file(at(chat.template), "chat.template"), chat.template
    elif folder is None:
        raise ConfigError("chat.template: empty, and a tokenizer of seqio has no template: name a file that holds one")
    else:
        text, source = named(texts, folder, chat.name)
    return ChatTemplate(text, source, tokens, chat.date)


def tokens_of(texts: dict[str, str], where: Any) -> dict[str, str]:
    """The tokens that side files, {name: text}, name as bos_token, eos_token and so on; `where` is for messages."""
    known: dict[str, Any] = {}
    for name in (TOKENS_MAP, TOKENIZER_CONFIG):  # the second has the last word
        known |= _json(texts, where, name)
    if known.get("tokenizer_class") in LLAMA_CLASSES:
        known = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **known}
    found = {name: known.get(name) for name in TOKENS}
    tokens = {name: one.get("content") if isinstance(one, dict) else one for name, one in found.items()}
    return {name: token for name, token in tokens.items() if token and isinstance(token, str)}


def named(texts: dict[str, str], where: Any, name: str, *, option: str = "chat.template") -> tuple[str, str]:
    """The template of this name, "" the default one, of side files, and the file that it is from.

    Raises ConfigError where there is none; `option` is what else can name one.
    """
    for file in (f"{MORE}/{name}.jinja" if name else DEFAULT, *((DEFAULT,) if name == "default" else ())):
        if file in texts:
            return texts[file], f"{where}/{file}"
    found, place = _json(texts, where, TOKENIZER_CONFIG).get("chat_template"), f"{where}/{TOKENIZER_CONFIG}"
    if isinstance(found, list):
        templates = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        wanted = name or "default"
        if not isinstance(templates.get(wanted), str):
            names = ", ".join(map(str, templates))
            setting = "set chat.name to" if option == "chat.template" else "name"
            raise ConfigError(f"{place}: has no chat template named {wanted!r}: {setting} one of {names}")
        return templates[wanted], f"{place} ({wanted})"
    if not isinstance(found, str) or not found or name not in ("", "default"):
        raise ConfigError(
            f"{where}: has no chat template{f' named {name!r}' if name else ''} in {DEFAULT} or {TOKENIZER_CONFIG}: "
            f"name a file that holds one as {option}"
        )
    return found, place


def read_file(path: Path | BucketPath, option: str) -> str:
    """The text of a template's file that `option` names. Raises ConfigError."""
    if (text := _read(path)) is None:
        raise ConfigError(f"{option}={path}: no such file; name a file that holds a Jinja template")
    return text


def _beside(folder: Path | BucketPath, name: str) -> dict[str, str]:
    """{name: text} of the files in a tokenizer's folder that a template of this name may be in."""
    names = (TOKENS_MAP, TOKENIZER_CONFIG, DEFAULT, *((f"{MORE}/{name}.jinja",) if name else ()))
    return {file: text for file in names if (text := _read(folder / file)) is not None}


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


def _json(texts: dict[str, str], where: Any, name: str) -> dict[str, Any]:
    """A side file of the tokenizer; {} if there is none."""
    try:
        found = json.loads(texts.get(name, "{}"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}/{name}: is no JSON ({error}): restore it") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}/{name}: is {type(found).__name__}, expected a JSON object: restore it")
    return found


def save(path: Path, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Writes what the tasks of a preparation read."""
    control = sorted(filter(None, map(tokenizer.id_to_token, tokenizer.control_ids)))
    write_json(path, {"template": template._asdict(), "control": control, "special": sorted(tokenizer.special_tokens)})


def load(path: Path) -> Saved:
    """What `save` wrote."""
    found = json.loads(path.read_bytes())
    return Saved(**{**found, "template": ChatTemplate(**found["template"])})
