"""A data experiment: every key of it, its meaning and its checks.

`experiments/data/NAME.py` defines `get_config()`, which starts from `base()` and names its subsets. What comes out of a
preparation depends on that and on the documents alone: not on workers, the executor, or earlier attempts.
"""

import math
import re
import runpy
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from k2jax import paths
from k2jax.data.tokenizer import EOS, NUM_FIXED
from k2jax.errors import ConfigError, RunError, in_file
from k2jax.prepare import rule_checks
from k2jax.prepare.chat import options
from k2jax.prepare.rules import pii as pii_rules

DUMP = r"CC-MAIN-20\d\d-\d\d"  # of Common Crawl, by year and week: their order is that of the names
KINDS = {  # of sources: "KIND:WHERE"; WHERE is a path or URL with wildcards (local, gs://, s3://, hf://)
    "python": "code, docstrings or documents of the Python at work: a corpus with no download",
    "text": "files, one document each: plain text, source trees, HTML",
    "jsonl": "JSON lines, plain, .gz or .zst",
    "parquet": "Parquet files, such as Hugging Face's",
    "arrow": "a Hugging Face dataset on disk (save_to_disk): its .arrow files",
    "warc": "web archives, .warc or .warc.gz",
    "megatron": "tokens: Megatron's .bin, with its .idx beside it",
    "llm360": "tokens: LLM360's released chunks, JSON lines with token_ids",
    "seqio": "tokens: a registered seqio task and its split, as NAME/train",
}
ROW_KINDS = ("jsonl", "parquet", "arrow")  # whose records have keys
TOKEN_KINDS = ("megatron", "llm360", "seqio")
PII = tuple(pii_rules.PLACEHOLDERS)  # the kinds of personal data: email, ipv6, ipv4, phone
UNITS = ("characters", "words")


def base() -> ConfigDict:
    """Every key of a data experiment with its default; `config.subsets.NAME = subset(...)` adds a subset."""
    c = ConfigDict()
    c.seed = 22238  # of the order of the documents, of samples, and of FIM's draws
    c.tokenizer = ""  # tokenizer.json or SentencePiece .model; empty: one is trained on these documents
    c.eos = ""  # the control token of `tokenizer` that ends documents; empty: the one that has a well-known name
    c.add_k2_tokens = False  # K2's 18 special tokens behind those of `tokenizer`, where it lacks them
    c.vocab_size = 32018  # ids of a trained tokenizer, K2's 18 special tokens among them
    c.tokenizer_bytes = 100_000_000  # of each subset's text that a trained tokenizer learns from; held in memory
    c.validation_fraction = 0.001  # of each store's tokens, held out at its end
    c.part_bytes = 600_000_000  # larger files of Parquet, and of JSON lines that are not packed, are read in parts
    c.bucket_bytes = 256_000_000  # of text that one task of tokenizing holds in memory
    c.removed_samples = 20  # removed documents kept for reading, by task and reason
    c.dedup = ConfigDict()
    c.dedup.exact = True  # each text once, over all subsets
    c.dedup.near = True  # one text of those that are nearly the same, over all subsets: MinHash
    c.dedup.unit = "characters"  # or "words": what n-grams are made of. TxT360 says 13-grams; see docs of SlimPajama
    c.dedup.n_grams = 13
    c.dedup.bands = 9  # two documents are compared if one of their bands of hashes is equal
    c.dedup.hashes_per_band = 13
    c.dedup.seed = 1  # of the hash functions
    c.dedup.sources_kept = 100  # names of removed copies that the surviving document keeps
    # Of subsets with drop_shared: documents that a line stays in (Llama 3's number); shorter lines stay everywhere.
    c.shared = ConfigDict({"most": 6, "characters": 20})
    c.contamination = ConfigDict()
    c.contamination.sources = ()  # evaluation sets: jsonl:, parquet: or text: sources
    c.contamination.unit = "words"  # or "tokens" of `tokenizer`: what n-grams are made of
    c.contamination.n_grams = 13
    c.contamination.remove = False  # documents that hold one; else they are only reported
    c.slurm = ConfigDict()  # of --executor=slurm
    c.slurm.partition = ""
    c.slurm.time = "24:00:00"
    c.slurm.gib_per_cpu = 4
    c.slurm.environment = ""  # command that activates the Python environment on a node
    c.chat = ConfigDict()  # of the subsets that are conversations()
    c.chat.template = ""  # file of a Jinja template; empty: the one beside `tokenizer`
    c.chat.name = ""  # of the templates beside `tokenizer`, where there are several; empty: the default
    c.chat.date = ""  # YYYY-MM-DD: the day that a template writes (strftime_now)
    c.subsets = ConfigDict(sort_keys=False)  # their order is that of their priority, where that is equal
    c.lock()
    c.subsets.unlock()
    return c


def subset(
    source: str,
    *,
    text_key: str = "text",
    text: str = "",
    field_keys: tuple[tuple[str, str], ...] = (),
    encoding: str = "",
    licence: str = "",
    dump: str = "",
    dumps: tuple[str, ...] = (),
    max_bytes: int = 0,
    min_document_bytes: int = 1,
    max_document_bytes: int = 0,
    max_line_bytes: int = 1 << 28,
    tasks: int = 0,
    follow_links: bool = False,
    max_unreadable: int = 0,
    priority: int = 0,
    extract: bool = False,
    language_model: str = "",
    languages: tuple[str, ...] = (),
    language_threshold: float = 0.65,
    language_thresholds: tuple[tuple[str, float], ...] = (),
    url_blocklist: str = "",
    line_rules: bool = False,
    drop_repeated: tuple[str, ...] = (),
    drop_shared: str = "",
    filters: tuple[str, ...] = (),
    quality_model: str = "",
    quality_label: str = "",
    quality_threshold: float | None = None,
    scorer: str = "",
    scorer_threshold: float | None = None,
    nfc: bool = False,
    pii: bool | tuple[str, ...] = (),
    pii_regions: tuple[str, ...] = pii_rules.REGIONS,
    fim_rate: float = 0.0,
    fim_spm_rate: float = 0.5,
    fim_stores: bool = False,
    repeats: float = 1.0,
    upsample: tuple[tuple[int, int], ...] = (),
) -> ConfigDict:
    """One subset: where its documents come from, what is done to them, how it is used. Everything is off by default."""
    c = ConfigDict()
    c.source = source  # KIND:WHERE, see KINDS
    c.text_key = text_key  # path of the text in a row, as meta.text; kept are also its FIELDS (rule_checks.py)
    c.text = text  # or a template of paths, as "{title}\n\n{meta.text}"; {title?} may be missing (fields.py)
    c.field_keys = field_keys  # (("url", "meta.url"), ...): paths of those of FIELDS that stand elsewhere in a row
    c.encoding = encoding  # of text and JSON lines that have no byte order mark: Python's name; "detect" for a guess
    c.licence = licence  # of documents that name none themselves
    c.dump = dump  # of documents that name none; empty: a CC-MAIN-2024-30 in the file's path. Newer ones are kept first
    c.dumps = dumps  # the first and the last of Common Crawl whose files are read, such as CC-MAIN-2013-20; () for all
    c.max_bytes = max_bytes  # of text to read in all, 0 for no limit; files are taken in an order drawn by seed
    c.min_document_bytes = min_document_bytes  # shorter documents are left out
    c.max_document_bytes = max_document_bytes  # longer documents are left out, 0 for no limit
    c.max_line_bytes = max_line_bytes  # longer lines of JSON, and larger files of text, are not read
    c.tasks = tasks  # that read it, the most workers at once; 0: one for about part_bytes. No store depends on it
    c.follow_links = follow_links  # files of a local source may be links to others outside of its folder
    c.max_unreadable = max_unreadable  # files that are left out, by name, if they cannot be read; 0: it ends there
    c.priority = priority  # of duplicates, the one in the subset of the lowest number stays, of equal ones the first
    c.extract = extract  # text out of HTML, by trafilatura
    c.language_model = language_model  # fastText's file, such as lid.176.bin; needed by `languages`
    c.languages = languages  # kept, as ISO codes; empty for all
    c.language_threshold = language_threshold  # of the model's probability
    c.language_thresholds = language_thresholds  # ((code, threshold), ...) of languages that have another
    c.url_blocklist = url_blocklist  # file of domains, one a line, whose documents are left out
    c.line_rules = line_rules  # RefinedWeb's: drops lines in capitals, of numbers alone, "3 likes", navigation
    c.drop_repeated = drop_repeated  # "lines", "paragraphs": those that stand earlier in the same document
    c.drop_shared = drop_shared  # "lines" or "paragraphs": those that many documents share, of all with this (shared)
    c.filters = filters  # of FILTERS, in that order
    c.quality_model = quality_model  # fastText's file, whose probability of quality_label a document keeps
    c.quality_label = quality_label  # as hq of __label__hq
    c.quality_threshold = quality_threshold  # documents of less are left out; None: of none
    c.scorer = scorer  # "package.module:function", of a list of texts, gives a list of numbers, which documents keep
    c.scorer_threshold = scorer_threshold  # documents of less are left out; None: of none
    c.nfc = nfc  # Unicode's composed form
    c.pii = PII if pii is True else pii or ()  # of PII (True: all), each by one placeholder. Not of code or mathematics
    c.pii_regions = pii_regions  # whose phone numbers are known without their country's code: ISO's codes, such as GB
    c.fim_rate = fim_rate  # of documents: turned for filling in the middle (K2: 0.5 of code)
    c.fim_spm_rate = fim_spm_rate  # of those: suffix before prefix
    c.fim_stores = fim_stores  # plain, PSM and SPM documents in stores NAME, NAME-fim, NAME-spm, as K2 had
    c.repeats = repeats  # of its stores in the mix
    c.upsample = upsample  # ((copies, factor), ...): documents of at least so many copies go to a store NAME-xFACTOR
    c.conversations = ConfigDict()  # empty of text; see conversations()
    return c.lock()


def conversations(
    source: str,
    *,
    max_tokens: int = 0,
    too_long: str = "refuse",
    bad_rows: str = "refuse",
    answers: str = "all",
    pairs: bool = False,
    roles: tuple[tuple[str, str], ...] = (),
    control_in_turns: bool = False,
    **of_any_subset: Any,
) -> ConfigDict:
    """A subset of conversations: its stores have a loss mask. `of_any_subset` is subset()'s, less what edits text.

    Its rows have `messages`, `conversations`, or `prompt` and `completion` (chat/rows.py), or are `pairs`; near
    duplicates stay, since conversations that share a system turn look nearly the same.
    """
    c = subset(source, **of_any_subset).unlock()
    c.conversations.max_tokens = max_tokens  # of one conversation, or both of a pair; 0 for no limit
    c.conversations.too_long = too_long  # longer ones: "refuse" (an error), "drop" (left out, counted) or "cut" to it
    c.conversations.bad_rows = bad_rows  # rows that give no conversation, or none to learn: "refuse" or "drop"
    c.conversations.answers = answers  # learned of a conversation: "all", or its "last"
    c.conversations.pairs = pairs  # rows are preference pairs, chosen and rejected (chat/pairs.py)
    c.conversations.roles = roles  # ((a row's name, system|user|assistant|tool), ...) beside those that are known
    c.conversations.control_in_turns = control_in_turns  # turns may hold names of special tokens, which become those
    return c.lock()


class Task(NamedTuple):
    """One part of a subset's source: files number `shard`, `shard + num_shards`, ... are its."""

    subset: str
    shard: int
    num_shards: int


def tasks(config: ConfigDict, *, tokens: bool = False) -> list[Task]:
    """The tasks of reading, by rank: all parts of all subsets of text, or of tokens, in the order of their names.

    Of a recipe whose `tasks` are known (dealing.settled).
    """
    found = [(name, config.subsets[name].tasks) for name in names(config, tokens=tokens)]
    assert all(number for _, number in found), "tasks=0 is settled when the sources have been listed"
    return [Task(name, shard, number) for name, number in found for shard in range(number)]


def task(config: ConfigDict, rank: int, *, tokens: bool = False) -> Task:
    """tasks(...)[rank], which would be 100,000 to find one."""
    for name in names(config, tokens=tokens):
        number = config.subsets[name].tasks
        if rank < number:
            return Task(name, rank, number)
        rank -= number
    raise IndexError(rank)


def names(config: ConfigDict, *, tokens: bool = False) -> list[str]:
    """The subsets of text, or of tokens, sorted."""
    kinds = {name: kind_of(config.subsets[name].source)[0] for name in sorted(config.subsets)}
    return [name for name, kind in kinds.items() if (kind in TOKEN_KINDS) == tokens]


def factors_of(config: ConfigDict, name: str) -> dict[str, int]:
    """The stores that a subset can give: NAME, NAME-fim, NAME-spm, NAME-xFACTOR; `repeats` of each is times that."""
    chosen, turned = config.subsets[name], ("-fim", "-spm")
    stores = {name: 1} | {f"{name}{end}": 1 for end in turned if chosen.fim_stores}
    return stores | {f"{name}-x{factor}": factor for _, factor in chosen.upsample}


def kind_of(source: str) -> tuple[str, str]:
    """("jsonl", "data/*.jsonl") of "jsonl:data/*.jsonl"."""
    kind, _, where = source.partition(":")
    return kind, where


def load_config(path: str | Path) -> ConfigDict:
    """The data experiment's `get_config()`, checked and locked. It is code: loading it runs it.

    Raises ConfigError if there is no such file, if it defines no get_config(), or if values are wrong.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--config={path}: no such data experiment; experiments/data has the ones shipped")
    try:
        names = runpy.run_path(str(path))
        if "get_config" not in names:
            raise ConfigError(f"--config={path} does not define get_config(); see experiments/data/smoke.py")
        config = names["get_config"]()
    except RunError:
        raise
    except Exception as error:  # it is a user's code, which may raise anything
        raise ConfigError(f"--config={path}: {in_file(path, error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config={path}: get_config() returned {type(config).__name__}, not what base() made"
        )
    validate(config)
    config.tokenizer = tokenizer_path(config.tokenizer)
    config.chat.template = config.chat.template and str(paths.parse(config.chat.template, "chat.template"))
    return config.lock()


def tokenizer_path(text: str) -> str:
    """The key `tokenizer` with a path in it parsed; what names a seqio task, and nothing, stay. Raises ConfigError."""
    return text if not text or text.startswith("seqio:") else str(paths.parse(text, "tokenizer"))


def validate(config: ConfigDict) -> None:
    """Raises ConfigError listing every problem: the key, the value found, what it must be."""
    problems = rule_checks.key_problems("", config, base())
    if not problems:
        problems = _base_problems(config)
        for name, chosen in config.subsets.items():
            problems += _subset_problems(name, chosen, config.tokenizer)
    if not problems:
        problems = _store_problems(config)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) in the data configuration: " + "; ".join(problems))


def _base_problems(config: ConfigDict) -> list[str]:
    problems = []
    try:
        tokenizer_path(config.tokenizer)
    except ConfigError as error:
        problems.append(str(error))
    if config.chat.date and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", config.chat.date):
        problems.append(f"chat.date={config.chat.date!r}: must be a day, YYYY-MM-DD")
    if config.vocab_size < NUM_FIXED + 2:
        problems.append(f"vocab_size={config.vocab_size}: must be at least {NUM_FIXED + 2}")
    if not 0 <= config.validation_fraction < 1:
        problems.append(f"validation_fraction={config.validation_fraction}: must lie in [0, 1)")
    if config.eos and not config.tokenizer:
        problems.append(f"eos={config.eos!r}: goes with tokenizer; one that is trained here ends documents with {EOS}")
    for key in ("tokenizer_bytes", "bucket_bytes", "part_bytes"):
        if config[key] < 1:
            problems.append(f"{key}={config[key]}: must be positive")
    if config.dedup.unit not in UNITS:
        problems.append(f"dedup.unit={config.dedup.unit!r}: must be one of {', '.join(UNITS)}")
    for key in ("dedup.n_grams", "dedup.bands", "dedup.hashes_per_band", "shared.most", "shared.characters"):
        section, _, name = key.partition(".")
        if config[section][name] < 1:
            problems.append(f"{key}={config[section][name]}: must be positive")
    problems += rule_checks.contamination_problems(config.contamination, config.tokenizer)
    for source in config.contamination.sources:
        if kind_of(source)[0] not in ("jsonl", "parquet", "text"):
            problems.append(f"contamination.sources: {source!r} is no jsonl:, parquet: or text: source")
    if not config.subsets:
        problems.append("subsets: empty; add one with config.subsets.NAME = subset(SOURCE)")
    return problems


def _subset_problems(name: str, chosen: ConfigDict, tokenizer: str) -> list[str]:
    where = f"subsets.{name}"
    problems = rule_checks.name_problems(name)
    if not isinstance(chosen, ConfigDict):
        return problems + [f"{where}={chosen!r}: must be made by subset()"]
    expected = conversations("") if chosen.get("conversations") else subset("")
    if keys := rule_checks.key_problems(f"{where}.", chosen, expected):
        return problems + keys
    kind, rest = kind_of(chosen.source)
    if chosen.conversations:
        problems += options.problems(where, chosen, kind, tokenizer, usual=subset(""))
    if kind not in KINDS or not rest:
        known = "; ".join(f"{kind}:WHERE ({meaning})" for kind, meaning in KINDS.items())
        problems.append(f"{where}.source={chosen.source!r}: must be one of {known}")
    if kind in TOKEN_KINDS and not tokenizer:
        problems.append(f"{where}: a source of tokens needs tokenizer, the one that its ids were made with")
    if kind in TOKEN_KINDS and chosen.max_unreadable:
        problems.append(f"{where}.max_unreadable={chosen.max_unreadable}: is of documents, {kind}: is of tokens")
    for key in ("tasks", "max_bytes", "min_document_bytes", "max_document_bytes", "max_unreadable"):
        if chosen[key] < 0:
            problems.append(f"{where}.{key}={chosen[key]}: must not be negative")
    if 0 < chosen.max_document_bytes < chosen.min_document_bytes:
        least = f"min_document_bytes={chosen.min_document_bytes}"
        problems.append(f"{where}.max_document_bytes={chosen.max_document_bytes}: must be at least {least}")
    if chosen.max_line_bytes < 1:
        problems.append(f"{where}.max_line_bytes={chosen.max_line_bytes}: must be positive")
    for key in ("fim_rate", "fim_spm_rate"):
        if not 0 <= chosen[key] <= 1:
            problems.append(f"{where}.{key}={chosen[key]}: must lie in [0, 1]")
    if not 0 < chosen.repeats < math.inf:
        problems.append(f"{where}.repeats={chosen.repeats}: must be above 0, and finite")
    if chosen.dumps and (len(chosen.dumps) != 2 or not all(re.fullmatch(DUMP, dump) for dump in chosen.dumps)):
        problems.append(f"{where}.dumps={chosen.dumps}: must be the first and the last, such as CC-MAIN-2013-20")
    problems += rule_checks.problems(where, chosen, kind in ROW_KINDS)
    return problems


def _store_problems(config: ConfigDict) -> list[str]:
    """Two subsets whose documents would go to one store."""
    problems, taken = [], {}
    for name in config.subsets:
        for store in factors_of(config, name):
            if taken.setdefault(store, name) != name:
                problems.append(f"subsets.{name}: its store {store} is one of subsets.{taken[store]}, too: rename one")
    return problems
