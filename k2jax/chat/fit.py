"""Whether a chat template fits the tokenizer, asked before anything is made of it."""

import re

from k2jax.chat.template import ChatTemplate
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import ConfigError

# What reads like a control token in a template's own text. "[INST]" does not: LLaMA-2's is text.
LIKE_CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,60}[|\uff5c]>|<[a-z]+_of_[a-z]+>|</?s>|<(?:bos|eos)>")


def check(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """What a person should know of a template with this tokenizer before it makes data: one line each.

    Raises ConfigError if it is no template, or needs a token or the date and there is none.
    """
    wrong, names, notes = _looked_at(template, tokenizer)
    if wrong:
        raise ConfigError(wrong[0])
    if "strftime_now" in names and not template.date:
        raise ConfigError(
            f"{template.source}: writes the day (strftime_now), and the same recipe must give the same tokens on every "
            "day: name one, chat.date='YYYY-MM-DD'"
        )
    return notes


def notes(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """The same of one that a model is asked with, which is rendered as it is. Raises ConfigError if it is none."""
    wrong, _, notes = _looked_at(template, tokenizer)
    return wrong + notes


def _looked_at(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[list[str], set[str], list[str]]:
    """(what makes it another template than its maker's, the names that it looks up, what else should be known)."""
    try:
        from k2jax.chat import render  # Jinja, which only conversations need
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'k2jax[data]'") from error

    names, literals = render.names_and_literals(template)
    wrong = [
        f"{template.source}: writes {name}, which the tokenizer's side files do not name, so that nothing would stand "
        f"there: set {name} in tokenizer_config.json, or name another template as chat.template"
        for name in ("bos_token", "eos_token")
        if name in names and name not in template.tokens
    ]
    controls = {tokenizer.id_to_token(id) for id in tokenizer.control_ids}
    wrong += [
        f"{template.source}: {name} is {token!r}, no control token of the tokenizer but {len(tokenizer.encode(token))} "
        "tokens of text: add it to tokenizer.json, or correct its side files"
        for name, token in template.tokens.items()
        if name in names and token not in controls
    ]
    split = sorted(set(LIKE_CONTROL.findall(literals)) - controls)
    notes = [
        f"{token!r} of the template is no token of its own in this tokenizer: it is {len(tokenizer.encode(token))} "
        "tokens of text"
        for token in split
    ]
    return wrong, names, notes
