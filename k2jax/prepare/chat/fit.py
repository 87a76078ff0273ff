"""Whether a chat template fits the tokenizer, asked before anything is prepared."""

import re

from k2jax.chat.template import ChatTemplate
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import ConfigError

# What reads like a control token in a template's own text. "[INST]" does not: LLaMA-2's is text.
LIKE_CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,60}[|\uff5c]>|<[a-z]+_of_[a-z]+>|</?s>|<(?:bos|eos)>")


def check(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """What a person should know of a template with this tokenizer: one line each.

    Raises ConfigError if it is no template, or needs a token or the date and there is none.
    """
    try:
        from k2jax.chat import render  # Jinja, which only conversations need
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'k2jax[data]'") from error

    names, literals = render.names_and_literals(template)
    for name in ("bos_token", "eos_token"):
        if name in names and name not in template.tokens:
            raise ConfigError(
                f"{template.source}: writes {name}, which the tokenizer's side files do not name, so that nothing "
                f"would stand there: set {name} in tokenizer_config.json, or name another template as chat.template"
            )
    controls = {tokenizer.id_to_token(id) for id in tokenizer.control_ids}
    for name, token in template.tokens.items():
        if name in names and token not in controls:
            raise ConfigError(
                f"{template.source}: {name} is {token!r}, no control token of the tokenizer but "
                f"{len(tokenizer.encode(token))} tokens of text: add it to tokenizer.json, or correct its side files"
            )
    if "strftime_now" in names and not template.date:
        raise ConfigError(
            f"{template.source}: writes the day (strftime_now), and the same recipe must give the same tokens on every "
            "day: name one, chat.date='YYYY-MM-DD'"
        )
    split = sorted(set(LIKE_CONTROL.findall(literals)) - controls)
    return [
        f"{token!r} of the template is no token of its own in this tokenizer: it is {len(tokenizer.encode(token))} "
        "tokens of text"
        for token in split
    ]
