"""Which keys of a recipe each stage reads: a stage's tasks get these and no other, so that reading another ends it.

A change of one of them is a reason to do the stage again (plan.py), a change of any other is none.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax.text import redacted


class Keys(NamedTuple):
    """Keys of a recipe, and of each of its subsets; "section.key", or a section with all that is in it.

    `free` are those of a subset that change nothing of what comes out.
    """

    recipe: tuple[str, ...]
    subset: tuple[str, ...]
    free: tuple[str, ...] = ()


TASKS = ("source", "tasks")  # by which tasks of reading have their ranks (recipe.tasks)
RENDERED = tuple(f"conversations.{key}" for key in ("pairs", "roles", "answers", "bad_rows", "control_in_turns"))
READ = (
    *TASKS, "text_key", "text", "field_keys", "encoding", "licence", "dump", "extract", "min_document_bytes",
    "max_document_bytes", "max_line_bytes", *RENDERED, "max_unreadable",
)  # fmt: skip
RULES = (
    "language_model", "languages", "language_threshold", "language_thresholds", "url_blocklist", "line_rules",
    "drop_repeated", "quality_model", "quality_label", "quality_threshold", "scorer", "scorer_threshold", "filters",
    "nfc", "pii", "pii_regions",
)  # fmt: skip
STORES_OF = ("fim_stores", "upsample")  # by which a subset's stores have their names

LISTING = Keys(("seed", "part_bytes"), (*TASKS, "encoding", "follow_links", "dumps", "max_bytes"))
MEASURING = Keys((), (*READ, "max_bytes"), free=("max_unreadable",))
EVALUATION = Keys(("contamination.sources", "contamination.n_grams", "contamination.unit"), ())
CLEANING = Keys(
    ("removed_samples", "contamination.sources", "contamination.remove", "contamination.unit"),
    (*READ, *RULES),
    free=("max_unreadable",),
)
DEDUPLICATION = Keys(("dedup",), (*TASKS, "priority", "conversations.pairs"))
SHARING = Keys(("shared", "dedup.exact"), ("drop_shared", "min_document_bytes"))
KEEPING = Keys(("seed", "bucket_bytes"), TASKS)
LEARNING = Keys(("seed", "vocab_size", "tokenizer_bytes"), ())
TOKENIZING = Keys(
    ("seed",),
    (
        "fim_rate", "fim_spm_rate", *STORES_OF,
        *(f"conversations.{key}" for key in ("pairs", "max_tokens", "too_long", "bad_rows")),
    ),
)  # fmt: skip
CONVERTING = Keys(("seed", "eos"), (*TASKS, "licence", "max_line_bytes"))
JOINING = Keys(("validation_fraction",), (*TASKS, *STORES_OF, "conversations.pairs"))


def with_units(keys: Keys, config: ConfigDict) -> Keys:
    """EVALUATION or CLEANING, with the tokenizer where n-grams are made of its tokens."""
    in_tokens = config.contamination.sources and config.contamination.unit == "tokens"
    return keys._replace(recipe=(*keys.recipe, "tokenizer")) if in_tokens else keys


def view(config: ConfigDict, keys: Keys, names: Iterable[str] | None = None) -> ConfigDict:
    """A recipe of these keys alone, and of these subsets; None: of all."""
    names = config.subsets if names is None else names
    found = _section(config, keys.recipe)
    return ConfigDict(found | {"subsets": {name: _section(config.subsets[name], keys.subset) for name in names}})


def values(config: ConfigDict, keys: Keys, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The same as {key: value}, as JSON has it and without credentials, less what is free."""
    whole = view(config, keys, names).to_dict()
    for chosen in whole["subsets"].values():
        for key in keys.free:
            chosen.pop(key)
    return flat(json.loads(json.dumps(redacted(whole))))


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of {"a": {"b": value}}; an empty section is a value."""
    found = {}
    for key, value in section.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        found |= inner
    return found


def _section(section: ConfigDict, keys: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in keys:
        head, _, rest = key.partition(".")
        value = section[head]
        if rest:  # of conversations there may be none
            found.setdefault(head, {}).update({rest: value[rest]} if len(value) else {})
        else:
            found[head] = value.to_dict() if isinstance(value, ConfigDict) else value
    return found
