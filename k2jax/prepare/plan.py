"""What a preparation consists of, as made.py compares it: its units, what each reads, which it follows, what it writes.

    template -> files, contamination -> clean -> deduplicate -> shared -> kept -> tokenizer
    tokenizer -> tokens, token-sources -> shards -> stores
    deduplicate -> card

`files`, `clean` and `tokens` have a part for each subset. A tokenizer that is given follows nothing.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax.data.manifest import sha256_json
from k2jax.data.tokenizer import Tokenizer
from k2jax.errors import ConfigError
from k2jax.prepare import dealing, reads, recipe
from k2jax.prepare.claim import TEMPLATE
from k2jax.prepare.made import Unit
from k2jax.prepare.rules import pii, rules
from k2jax.prepare.sources import unreadable
from k2jax.prepare.sources.files import File, list_files
from k2jax.prepare.sources.listing import Listing
from k2jax.prepare.tokens import spm
from k2jax.text import shown, without_secrets

SHARED = ("summary.json", "pieces", "cuts", "waves")
CLEANED = (
    "documents/{rank}.jsonl.zst", "index/{rank}.parquet", "removed/{rank}.jsonl.zst", "contamination/{rank}.json",
    "left-out/{rank}.json", "tally/{rank}.json",
)  # fmt: skip


class Facts(NamedTuple):
    """What a preparation reads beside its recipe, before it begins."""

    inputs: dict[str, dict[str, Any]]  # files of subsets, as dealing.summary has them
    versions: dict[str, str]  # of those, by which it shows that one was written again (Listing.versions)
    evaluation: dict[str, dict[str, Any]]  # files of evaluation sets, likewise
    rules: dict[str, str]  # SHA-256 of files that rules are made of, by path
    tokenizer: dict[str, Any]  # that is given: what it is; empty of one that is trained
    template: str  # what it is; "" without conversations


def facts(
    config: ConfigDict, listing: dict[str, Listing], tokenizer: Tokenizer | None, template: list | None
) -> Facts:
    """Of what is there now.

    `listing` is clean.check's; `tokenizer` the recipe's, where it names one, `template` what tasks know of that of
    conversations.
    """
    given = {}
    if tokenizer:
        given = {"the tokenizer's content": _sha256(tokenizer.to_str().encode()), "the id of eos": tokenizer.eos_id}
        given |= {"its .model": _sha256(spm.read(config.tokenizer))} if spm.is_model(config.tokenizer) else {}
    files = {path for chosen in config.subsets.values() for path in rules.files_of(chosen)}
    return Facts(
        inputs=dealing.summary(listing),
        versions={name: files.versions for name, files in listing.items()},
        evaluation={source: _summary(list_files(source)) for source in config.contamination.sources},
        rules={path: _sha256_of(path, Path(path).stat().st_mtime_ns) for path in sorted(files)},
        tokenizer=given,
        template=sha256_json(template) if template else "",
    )


def named(config: ConfigDict, inputs: dict[str, dict[str, Any]]) -> Facts:
    """The same of a recipe alone, with files by their names: what it reads may be gone. `inputs` are data.json's."""
    given = {key: config[key] for key in ("tokenizer", "add_k2_tokens", "eos")} if config.tokenizer else {}
    return Facts(
        inputs={name: one for name, one in inputs.items() if name in config.subsets},
        versions=defaultdict(str),
        evaluation={source: {"files": 0, "bytes": 0, "digest": ""} for source in config.contamination.sources},
        rules=defaultdict(str),
        tokenizer=given,
        template=str(config.chat.to_dict()) if any(one.conversations for one in config.subsets.values()) else "",
    )


def units(config: ConfigDict, known: Facts) -> dict[str, Unit]:
    """All of a recipe, each behind those that it follows."""
    found: dict[str, Unit] = {}
    if known.template:
        outputs = (TEMPLATE, "stages/chat_template.json")
        found["template"] = Unit({"the chat template": known.template}, outputs=outputs)
    found |= {f"files/{name}": _dealt(config, name, known) for name in sorted(known.inputs)}
    if known.evaluation:
        read = reads.values(config, reads.with_units(reads.EVALUATION, config), ())
        read |= _files_of(known.evaluation, list(known.evaluation)) | _units(config, known)
        found["contamination"] = Unit(read, outputs=("stages/contamination",))
    ranks: dict[str, list[int]] = {}
    for rank, task in enumerate(recipe.tasks(config)):
        ranks.setdefault(task.subset, []).append(rank)
    cleaned = {f"clean/{name}": _cleaned(config, name, ranks[name], known) for name in ranks}
    text = recipe.names(config)  # the others are neither deduplicated nor dealt into buckets
    dedup = reads.values(config, reads.DEDUPLICATION, text)
    order = sorted(text, key=lambda name: config.subsets[name].priority)
    dedup |= {f"subsets.{name}.priority": number for number, name in enumerate(order)}  # their order alone counts
    found |= cleaned | {"deduplicate": Unit(dedup, tuple(cleaned), outputs=("stages/duplicates",))}
    follows = ("deduplicate",)
    if sharing := [name for name in text if config.subsets[name].drop_shared]:
        read = reads.values(config, reads.SHARING, sharing)
        found["shared"] = Unit(read, follows, outputs=("stages/shared",))
        follows = (*follows, "shared")
    found["kept"] = Unit(reads.values(config, reads.KEEPING, text), follows, outputs=("stages/kept",))
    found["tokenizer"] = Unit(
        known.tokenizer or reads.values(config, reads.LEARNING, text),
        () if known.tokenizer else ("kept",),
        outputs=("tokenizer.json", f"stages/{spm.FILE}"),
    )
    chunks = {task.subset for task in recipe.tasks(config, tokens=True)}
    tokens = {f"tokens/{name}": _tokenized(config, name) for name in ranks}
    tokens |= {"token-sources": _converted(config, sorted(chunks), known)} if chunks else {}
    found |= tokens
    found["shards"] = Unit({}, ("tokenizer", *tokens))
    found["stores"] = Unit(reads.values(config, reads.JOINING), ("shards",))
    found["card"] = Unit({}, ("deduplicate",), outputs=("stages/card",))
    return found


def of_stage(found: dict[str, Unit], stage: str) -> dict[str, Unit]:
    """A stage's units."""
    return {name: unit for name, unit in found.items() if name.partition("/")[0] == stage}


def read_again(config: ConfigDict, out: Path) -> dict[str, str]:
    """{unit: why} of those of which `out` lacks more files than the recipe allows: begun anew, they note none.

    What was allowed then is not compared: to allow fewer changes nothing where none is left out.
    """
    found = unreadable.too_many(config, unreadable.of_all(out, recipe.names(config)))
    return {f"{'files' if config.subsets[name].max_bytes else 'clean'}/{name}": why for name, why in found.items()}


def check_names(found: dict[str, Unit], names: Iterable[str]) -> None:
    """Raises ConfigError where one is neither a stage's nor a unit's."""
    stages = dict.fromkeys(name.partition("/")[0] for name in found)
    for name in names:
        if name not in {*found, *stages}:
            raise ConfigError(f"--redo={shown(name)}: no stage of this recipe; expected one of {', '.join(stages)}")


def _dealt(config: ConfigDict, name: str, known: Facts) -> Unit:
    """Which task reads what, and where a subset's limit is. Those that are dealt out together share some files."""
    read, follows = reads.values(config, reads.LISTING, [name]), ()
    if config.subsets[name].max_bytes:
        read, follows = read | reads.values(config, reads.MEASURING, [name]), _template_of(config, name)
    shared = tuple(f"stages/files/{one}" for one in SHARED)
    outputs = (*shared, f"stages/files/{name}.jsonl", f"stages/files/shares/{name}", f"stages/unreadable/{name}")
    read |= _files_of(known.inputs, [name]) | {f"the dates of the files of {name}": known.versions[name][:16]}
    return Unit(read, follows, outputs=outputs)


def _cleaned(config: ConfigDict, name: str, ranks: list[int], known: Facts) -> Unit:
    read = reads.values(config, reads.with_units(reads.CLEANING, config), [name]) | _units(config, known)
    chosen = config.subsets[name]
    read |= {f"the content of {path}": known.rules[path] for path in rules.files_of(chosen)}
    if "phone" in chosen.pii:  # the plans of the world's numbers change every other week
        read["libphonenumber"] = pii.phones_version()
    outputs = tuple(f"stages/clean/{path}" for path in CLEANED)
    outputs += () if chosen.max_bytes else (f"stages/unreadable/{name}",)  # else the limit was found without those
    follows = (f"files/{name}", *_template_of(config, name), *(("contamination",) if known.evaluation else ()))
    return Unit(read, follows, (ranks[0], ranks[-1] + 1), outputs)


def _units(config: ConfigDict, known: Facts) -> dict[str, Any]:
    """Of what the n-grams that are looked for are made."""
    return known.tokenizer if known.evaluation and config.contamination.unit == "tokens" else {}


def _tokenized(config: ConfigDict, name: str) -> Unit:
    outputs = tuple(f"stages/tokens/{store}" for store in recipe.factors_of(config, name))
    read = reads.values(config, reads.TOKENIZING, [name])
    return Unit(read, ("kept", "tokenizer"), outputs=(*outputs, "stages/conversations/{rank}.json"))


def _converted(config: ConfigDict, names: list[str], known: Facts) -> Unit:
    read = reads.values(config, reads.CONVERTING, names)
    follows = tuple(f"files/{name}" for name in names if name in known.inputs)
    parts = [name for name in names if recipe.kind_of(config.subsets[name].source)[0] == "llm360"]  # NAME-PART
    outputs = [*(f"stages/tokens/{name}" for name in names), *(f"stages/tokens/{name}-*" for name in parts)]
    return Unit(read, (*follows, "tokenizer"), outputs=("stages/token-sources", *outputs))


def _template_of(config: ConfigDict, name: str) -> tuple[str, ...]:
    return ("template",) if config.subsets[name].conversations else ()


def _summary(files: list[File]) -> dict[str, Any]:
    names = sorted([file.name, file.size, file.version] for file in files)
    return {"files": len(files), "bytes": sum(file.size for file in files), "digest": sha256_json(names)}


def _files_of(summary: dict[str, dict[str, Any]], names: list[str]) -> dict[str, str]:
    return {
        f"the files of {without_secrets(name)}": f"{one['files']:,} of {one['bytes']:,} bytes, {one['digest'][:16]}"
        for name, one in summary.items() if name in names
    }  # fmt: skip


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@cache
def _sha256_of(path: str, _: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
