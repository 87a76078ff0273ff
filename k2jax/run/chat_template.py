"""The chat template of a checkpoint: a file's that the user names, or the run's own.

Checkpoints hold the template that goes with them as `chat` in their meta: text, SHA-256, the tokens that it is rendered
with, and those that end an answer. It is that of the folder which was imported, or of the conversations that the run
was trained on. Named ones beside the default are in an import's side files.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from k2jax.bucket import at
from k2jax.chat.template import DEFAULT, ChatTemplate, named, read_file, tokens_of
from k2jax.data.epochs import Epoch, imported
from k2jax.data.tokenizer import BOS_NAMES, load_tokenizer
from k2jax.errors import ConfigError
from k2jax.run.saved import SavedStep


def recorded(template: ChatTemplate, ends: list[str]) -> dict[str, Any]:
    """As `chat` in a checkpoint's meta has it; `ends` are the tokens by which answers end."""
    return {"template": template.text, "sha256": template.sha256, "tokens": template.tokens, "ends": ends}


def of_side_files(texts: dict[str, str], where: str) -> dict[str, Any] | None:
    """The same of an imported folder's files; None where they have no default template."""
    try:
        text, source = named(texts, where, "")
    except ConfigError:
        return None
    return recorded(ChatTemplate(text, source, tokens_of(texts, where), ""), [])


def by_stage(
    config: ConfigDict, masked: Collection[str], before: dict[str, Any] | None
) -> list[dict[str, Any] | None]:
    """Of each stage of a run what its checkpoints record: of the first on conversations (`masked` subsets) and those
    after it the template of those, until then what the run began with, `before`.

    Raises ConfigError where the template beside the stores is not the one that made them.
    """
    found, stages = before, []
    for stage in config.stages:
        if set(masked) & set(stage.mix):
            found = _of_stores(config.data.root) or found
        stages.append(found)
    return stages


def began_with(epochs: Sequence[Epoch], restored: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a run has before its first stage: that of the checkpoint it goes on from, whose meta is `restored`, or of
    its import."""
    if restored and "chat" in restored:
        return restored["chat"]
    return of_side_files((imported(epochs) or {}).get("side_files", {}), "the import")


def _of_stores(root: str) -> dict[str, Any] | None:
    """Of a preparation; None where its data.json is not beside the stores, or knows of no conversations."""
    folder = at(root)
    try:
        chat = json.loads((folder / "data.json").read_bytes()).get("chat")
        text = (folder / DEFAULT).read_bytes().decode() if chat else ""
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}: its data.json or {DEFAULT} cannot be read ({error}): prepare it again") from error
    if not chat:
        return None
    template = ChatTemplate(text, f"{folder}/{DEFAULT}", chat.get("tokens", {}), "")
    if template.sha256 != chat["template_sha256"]:
        raise ConfigError(
            f"{template.source}: its SHA-256 is {template.sha256[:12]}, the conversations beside it were rendered by "
            f"{str(chat['template_sha256'])[:12]}: restore it"
        )
    return recorded(template, chat.get("ends", []))


def template_of(saved: SavedStep, *, file: Path | None = None, name: str = "", date: str = "") -> ChatTemplate:
    """The template of a checkpoint, or that of a `file`, or the run's of a `name`. ConfigError where there is none."""
    texts, where = (saved.imported or {}).get("side_files", {}), f"the files that {saved.workdir} was imported with"
    own = saved.meta.get("chat") or of_side_files(texts, where)
    tokens = own["tokens"] if own else tokens_of(texts, where) or _by_name(saved)
    if file:
        return ChatTemplate(read_file(file, "--chat-template"), str(file), tokens, date)
    if own and name in ("", "default"):
        return ChatTemplate(own["template"], f"the chat template of step {saved.step}", tokens, date)
    if name:
        text, source = named(texts, where, name, option="--chat-template")
        return ChatTemplate(text, source, tokens, date)
    raise ConfigError(
        f"step {saved.step} of {saved.workdir} has no chat template: its run was neither imported with one nor trained "
        f"on conversations: name a file that holds one, --chat-template=FILE"
    )


def _by_name(saved: SavedStep) -> dict[str, str]:
    """Where nothing says what the tokens are."""
    encoder = load_tokenizer(saved.tokenizer)
    begin = [token for token in BOS_NAMES if encoder.token_to_id(token) is not None]
    end = encoder.id_to_token(saved.meta["eos_id"])
    return {**({"bos_token": begin[0]} if begin else {}), **({"eos_token": end} if end else {})}
