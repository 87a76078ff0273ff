"""What a recipe may say of how documents are read and cleaned: each problem with its key and what it must be."""

import codecs
import difflib
import itertools
import re
from typing import Any

from ml_collections import ConfigDict

from k2jax.errors import ConfigError
from k2jax.prepare.rules import pii
from k2jax.prepare.sources import fields

FIELDS = ("url", "id", "license", "licence", "date", "dump")  # kept of a record beside its text
FILTERS = ("gopher-repetition", "gopher-quality", "c4")
REPEATED = ("lines", "paragraphs")
CONTAMINATION_UNITS = ("words", "tokens")
DETECT = "detect"  # an encoding, file by file
# Codecs of Python that no file is written in, that are slow, or that take any text for theirs.
NO_FILES = {"idna", "punycode", "unicode-escape", "raw-unicode-escape", "undefined", "utf-7"}
ENCODED = ("text", "jsonl")  # kinds of sources whose files are text
SUBSET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
OTHERS_IN_OUT = {"card": "the data card", "stages": "what lies between documents and stores"}  # beside stores
TYPES = {
    bool: "a bool", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple", ConfigDict: "a section",
    type(None): "a number or None",
}  # fmt: skip
SCORER = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def key_problems(prefix: str, found: ConfigDict, expected: ConfigDict) -> list[str]:
    """Keys that are missing, unknown or of another type; a whole number may stand where a fraction does."""
    problems = []
    for key in sorted(set(found) - set(expected)):
        near = difflib.get_close_matches(key, list(expected), n=1)
        problems.append(f"unknown key {prefix}{key}" + (f", did you mean {near[0]!r}?" if near else ""))
    for key in sorted(expected):
        value: Any = expected[key]
        types = {float: (int, float), type(None): (int, float, type(None)), tuple: (tuple, list)}.get(type(value))
        if key not in found:
            problems.append(f"{prefix}{key} is missing: start from base() and subset()")
        elif not isinstance(found[key], types or type(value)):
            such = ("x",) if value == () else value
            problems.append(f"{prefix}{key}={found[key]!r}: must be {TYPES[type(value)]}, such as {such!r}")
        elif isinstance(value, ConfigDict) and len(value):
            problems += key_problems(f"{prefix}{key}.", found[key], value)
    return problems


def name_problems(name: str) -> list[str]:
    """Of a subset's name, which is that of a folder of the preparation: its store."""
    if not SUBSET_NAME.fullmatch(name):
        return [f"subsets.{name}: the name is a folder's: use lower-case letters, digits, - and _"]
    if name in OTHERS_IN_OUT:
        return [f"subsets.{name}: its store would be OUT/{name}, where {OTHERS_IN_OUT[name]} is: give it another name"]
    return []


def _rising(upsample: Any) -> bool:
    pairs = [pair for pair in upsample if isinstance(pair, (tuple, list)) and len(pair) == 2]
    numbers = [number for pair in pairs for number in pair]
    if len(pairs) < len(upsample) or not all(type(number) is int and number >= 2 for number in numbers):
        return False
    return all(one[0] < other[0] for one, other in itertools.pairwise(pairs))


def problems(where: str, chosen: ConfigDict, has_rows: bool) -> list[str]:
    """Of a subset; `has_rows`: its records have keys."""
    found = _text_problems(where, chosen, has_rows)
    if not _rising(chosen.upsample):
        found.append(f"{where}.upsample={chosen.upsample}: must be rising pairs (copies, factor), both 2 or more")
    for key, known in (("filters", FILTERS), ("drop_repeated", REPEATED)):
        if unknown := sorted(set(chosen[key]) - set(known)):
            found.append(f"{where}.{key}: {unknown} unknown; there are {', '.join(known)}")
    if chosen.drop_shared not in ("", *REPEATED):
        found.append(f"{where}.drop_shared={chosen.drop_shared!r}: must be one of {', '.join(REPEATED)}, or empty")
    found += pii.problems(where, chosen.pii, chosen.pii_regions)
    return found + _language_problems(where, chosen) + _score_problems(where, chosen)


def _text_problems(where: str, chosen: ConfigDict, has_rows: bool) -> list[str]:
    found, kind = [], chosen.source.partition(":")[0]
    try:
        fields.text_by(chosen.text_key, chosen.text)
    except ConfigError as error:
        found.append(f"{where}.{error}")
    if chosen.text and not has_rows:
        found.append(f"{where}.text={chosen.text!r}: is made of keys, which {kind}: has not; leave it out")
    if chosen.text and chosen.text_key != "text":
        found.append(f"{where}.text_key={chosen.text_key!r}: stands beside text={chosen.text!r}; leave one out")
    if not chosen.text_key:
        found.append(f"{where}.text_key='': must be a key, or keys with dots between them")
    for pair in chosen.field_keys:
        if not _is_pair(pair, str) or pair[0] not in FIELDS or not all(pair[1].split(".")) or not has_rows:
            must = f"(one of {', '.join(FIELDS)}, a path in the rows of jsonl:, parquet:)"
            found.append(f"{where}.field_keys: {pair!r} must be {must}")
    if chosen.url_blocklist and kind in ("text", "python"):
        found.append(f"{where}.url_blocklist={chosen.url_blocklist!r}: {kind}: documents have no URL; leave it out")
    if problem := _encoding_problem(chosen.encoding):
        found.append(f"{where}.encoding={chosen.encoding!r}: {problem}")
    if chosen.encoding and kind not in ENCODED:
        found.append(f"{where}.encoding={chosen.encoding!r}: is of {' and '.join(ENCODED)} files, {kind}: has its own")
    return found


def _encoding_problem(name: str) -> str | None:
    if name in ("", DETECT):
        return None
    try:
        " ".encode(name)
        found = codecs.lookup(name).name
    except (LookupError, ValueError):
        return "no encoding that Python knows; there are utf-8, latin-1, cp1252, gb18030, ..., and detect"
    if found in ("utf-16", "utf-32"):
        return f"with a byte order mark it is known without a name; without one say {found}-le or {found}-be"
    return "not an encoding of files" if found in NO_FILES else None


def _language_problems(where: str, chosen: ConfigDict) -> list[str]:
    found = []
    if chosen.languages and not chosen.language_model:
        found.append(f"{where}.languages={chosen.languages}: needs language_model, a file of fastText")
    if not 0 <= chosen.language_threshold <= 1:
        found.append(f"{where}.language_threshold={chosen.language_threshold}: must lie in [0, 1]")
    for pair in chosen.language_thresholds:
        if not _is_pair(pair, float, int) or not 0 <= pair[1] <= 1 or pair[0] not in chosen.languages:
            must = f"(one of languages={tuple(chosen.languages)}, a threshold in [0, 1])"
            found.append(f"{where}.language_thresholds: {pair!r} must be {must}")
    return found


def _is_pair(pair: Any, *kinds: type) -> bool:
    """A text, and something of one of the kinds."""
    return isinstance(pair, (tuple, list)) and list(map(type, pair)) in [[str, kind] for kind in kinds]


def _score_problems(where: str, chosen: ConfigDict) -> list[str]:
    found = []
    if chosen.quality_model and not chosen.quality_label:
        found.append(f"{where}.quality_model={chosen.quality_model!r}: needs quality_label, one of the model's")
    for key in ("quality_label", "quality_threshold"):
        if chosen[key] not in ("", None) and not chosen.quality_model:
            found.append(f"{where}.{key}={chosen[key]}: needs quality_model, a file of fastText")
    if chosen.quality_threshold is not None and not 0 <= chosen.quality_threshold <= 1:
        found.append(f"{where}.quality_threshold={chosen.quality_threshold}: must lie in [0, 1]")
    if chosen.scorer and not SCORER.fullmatch(chosen.scorer):
        found.append(f"{where}.scorer={chosen.scorer!r}: must be package.module:function")
    if chosen.scorer_threshold is not None and not chosen.scorer:
        found.append(f"{where}.scorer_threshold={chosen.scorer_threshold}: needs scorer, package.module:function")
    if chosen.scorer_threshold is not None and chosen.scorer_threshold != chosen.scorer_threshold:
        found.append(f"{where}.scorer_threshold={chosen.scorer_threshold}: must be a number")
    return found


def contamination_problems(chosen: ConfigDict, tokenizer: str) -> list[str]:
    """Of the recipe's `contamination`."""
    found = []
    if chosen.n_grams < 1:
        found.append(f"contamination.n_grams={chosen.n_grams}: must be positive")
    if chosen.unit not in CONTAMINATION_UNITS:
        found.append(f"contamination.unit={chosen.unit!r}: must be one of {', '.join(CONTAMINATION_UNITS)}")
    if chosen.unit == "tokens" and not tokenizer:
        found.append("contamination.unit='tokens': needs tokenizer; one that is trained here comes after the check")
    return found
