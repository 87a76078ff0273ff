"""What is looked at before a preparation's first stage, and before it writes anything: hours later it would cost them.

The folder can be written and is no source's, the executor is here, the tokenizer is one that ends documents and has
what is asked of it, the chat template fits it. Sources and rules are plan.facts's.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from fsspec.core import strip_protocol
from fsspec.utils import glob_translate
from ml_collections import ConfigDict

from k2jax.chat import fit, template
from k2jax.chat.template import ChatTemplate
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import ConfigError, StorageError
from k2jax.files import check_room, write_bytes
from k2jax.prepare import dealing
from k2jax.prepare.claim import TEMPLATE
from k2jax.prepare.recipe import factors_of, kind_of
from k2jax.prepare.tokens import spm, token_sources, tokenise
from k2jax.prepare.tokens.recipe_tokenizer import k2_tokens, open_tokenizer
from k2jax.text import without_secrets

# Of what a preparation writes, a file of each folder and name's end; {store} stands for each store.
WRITTEN = ("data.json", "tokenizer.json", TEMPLATE, "card/data.json", "card/data.md", "card/index.html")
WRITTEN += tuple(f"{{store}}/{name}" for name in ("store.json", "zarr.json", "documents.parquet", "documents.blocks"))
WRITTEN += ("{store}/tokens/zarr.json", "{store}/tokens/c/0", "stages/made.json", "stages/lock")
WRITTEN += ("stages/files/{store}.jsonl", "stages/files/shares/{store}/00000.json", "stages/files/summary.json")
WRITTEN += ("stages/clean/documents/00000.jsonl.zst", "stages/clean/index/00000.parquet")
WRITTEN += ("stages/clean/tally/00000.json", "stages/unreadable/{store}/0.json")
WRITTEN += tuple(f"stages/tokens/{{store}}/0000000.{end}" for end in ("json", "parquet", "tokens"))
WRITTEN += ("stages/kept/00000.runs", "stages/done/clean/completions/00000")


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
    if dropped := tokenizer.dropped():
        raise ConfigError(
            f"tokenizer {config.tokenizer}: drops {' '.join(dropped)} and whatever else its vocabulary lacks, without "
            "a trace: give it an unknown token (unk_token), byte_fallback, or a byte-level alphabet"
        )
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


def check_apart(config: ConfigDict, out: Path) -> None:
    """Raises ConfigError where a source on this machine's disks would hold what is written in `out`.

    When the preparation goes on, its files would be another source's: all would be done again, and read itself.
    """
    stores = [store for name in config.subsets for store in factors_of(config, name)]
    written = list(dict.fromkeys(one.format(store=store) for one in WRITTEN for store in stores))
    sources = [(f"subsets.{name}.source", chosen.source) for name, chosen in config.subsets.items()]
    for key, source in [*sources, *(("contamination.sources", source) for source in config.contamination.sources)]:
        kind, where = kind_of(source)
        is_local = "://" not in where or where.startswith(("file://", "local://"))
        if kind not in ("python", "seqio") and is_local and (name := _matched(where, out, written)):
            raise ConfigError(
                f"{key}={without_secrets(source)}: --out={out} lies in it, and {name} there would be a file of it when "
                "the same command goes on: choose another folder"
            )


def _matched(where: str, out: Path, written: list[str]) -> str | None:
    """The first of the names below `out` that a pattern matches, or that is in a folder, as files.py lists them."""
    pattern = strip_protocol(where)
    is_folder = os.path.isdir(pattern)  # whose name may hold a wildcard's character
    root = pattern.rstrip("/") if is_folder else re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    below = os.path.relpath(os.path.realpath(out), os.path.realpath(root or "/"))
    if below.partition("/")[0] == ".." or os.path.isfile(pattern):
        return None
    try:
        matches = bool if is_folder else re.compile(glob_translate(pattern)).match
    except ValueError:  # a wrong pattern, of which the listing tells
        return None
    names_dots = "/." in pattern[len(root) :]
    for name in written:
        path = os.path.normpath(f"{root}/{below}/{name}")
        if matches(path) and (names_dots or "/." not in path[len(root) :]):
            return name
    return None
