"""What is looked at before a preparation's first stage, and before it writes anything: hours later it would cost them.

The folder can be written, the executor is here, the tokenizer is one that ends documents and has what is asked of it,
the chat template fits it. Sources and rules are plan.facts's.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from k2jax.chat import fit, template
from k2jax.chat.template import ChatTemplate
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import StorageError
from k2jax.files import check_room, write_bytes
from k2jax.prepare import dealing, spm, token_sources, tokenise
from k2jax.prepare.claim import TEMPLATE
from k2jax.prepare.recipe_tokenizer import k2_tokens, open_tokenizer


class Given(NamedTuple):
    """What a recipe names beside its sources: its tokenizer, if any, and the template of conversations, if any."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    notes: list[str]  # what a person should know of the template

    def told(self) -> list | None:
        """What tasks know of the template, wherever it lies."""
        if self.template is None:
            return None
        control = sorted(filter(None, map(self.tokenizer.id_to_token, self.tokenizer.control_ids)))
        return [list(self.template._replace(source="")), control, sorted(self.tokenizer.special_tokens)]


def given(config: ConfigDict) -> Given:
    """Raises ConfigError, in one line, for what would end the preparation at a later stage."""
    token_sources.check(config)
    if not config.tokenizer:
        return Given(None, None, [])
    found = open_tokenizer(config.tokenizer)
    whole = k2_tokens(found) if config.add_k2_tokens else found
    if whole.vocab_size != found.vocab_size:
        print(
            f"add_k2_tokens: tokenizer {config.tokenizer} has {found.vocab_size:,} ids and gets "
            f"{whole.vocab_size - found.vocab_size} more: an experiment on these stores says "
            f"model.vocab_size={whole.vocab_size}, or a multiple above it",
            file=sys.stderr,
        )
    tokenizer = Tokenizer(whole.to_str(), config.tokenizer, config.eos)
    _ = tokenizer.eos_id
    if any(chosen.fim_rate for chosen in config.subsets.values()):
        tokenise.sentinel_ids(tokenizer, Path(config.tokenizer))
    if not any(chosen.conversations for chosen in config.subsets.values()):
        return Given(tokenizer, None, [])
    chosen = template.find(config, tokenizer)
    return Given(tokenizer, chosen, fit.check(chosen, tokenizer))


def take(config: ConfigDict, out: Path, found: Given) -> None:
    """Writes the tokenizer that is given, as tokenizer.json and for the tasks, and the template.

    A tokenizer that is a tokenizer.json already keeps its bytes, and so its identity.
    """
    if found.tokenizer:
        write_bytes(out / "tokenizer.json", found.tokenizer.to_str().encode())
    if spm.is_model(config.tokenizer):
        write_bytes(out / "stages" / spm.FILE, spm.read(config.tokenizer))
    if found.template:
        template.save(dealing.template_of(out), found.template, found.tokenizer)
        write_bytes(out / TEMPLATE, found.template.text.encode())


def check_writable(out: Path) -> None:
    """Raises StorageError where nothing can be written; leaves nothing."""
    folder = next(path for path in (out, *out.parents) if path.exists())
    try:
        check_room(folder)
    except OSError as error:
        raise StorageError(
            f"--out={out}: {folder} cannot be written ({error.strerror}): give a folder that can be, with room on its "
            "disk"
        ) from error
