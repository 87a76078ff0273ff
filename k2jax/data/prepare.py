"""From documents to stores: a tokenizer, one store for each subset, and data.json, which says what is there.

A data experiment (`experiments/data/NAME.py`) defines `get_config()`, which starts from `base()` and names
its subsets. What comes out depends on that and the documents alone, not on threads or earlier attempts.
"""

import contextlib
import difflib
import fcntl
import itertools
import json
import os
import re
import runpy
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tokenizers import Tokenizer
from tqdm import tqdm

from k2jax.data import sources
from k2jax.data.sources import Document
from k2jax.data.store import Store, StoreWriter
from k2jax.data.tokenizer import EOS, NUM_FIXED, load_tokenizer, tokenizer_sha256, train_bpe
from k2jax.errors import ConfigError, StorageError

FORMAT = 1
BATCH_BYTES = 1 << 20  # of text handed to the tokenizer at a time: enough for every core
MARKER = ".preparing"  # in an unfinished output folder: its subsets; locked by the process at work
SUBSET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def base() -> ConfigDict:
    """Every key of a data experiment with its default; `config.subsets.NAME = subset(...)` adds a subset."""
    c = ConfigDict()
    c.vocab_size = 32018  # ids of the tokenizer, K2's 18 special tokens among them
    c.tokenizer_bytes = 100_000_000  # of each subset's text that the tokenizer learns from; held in memory
    c.seed = 22238  # of the order of the documents
    c.validation_fraction = 0.001  # of each subset's tokens, held out at its end
    c.subsets = ConfigDict()
    c.lock()
    c.subsets.unlock()
    return c


def subset(
    source: str, max_bytes: int = 0, min_document_bytes: int = 1, max_document_bytes: int = 0
) -> ConfigDict:
    """One subset: where its documents come from and which are taken; a `max` of 0 is no limit."""
    c = ConfigDict()
    c.source = source  # see k2jax/data/sources.py
    c.max_bytes = max_bytes  # of text in all; what is taken is a fair sample
    c.min_document_bytes = min_document_bytes  # shorter documents are left out
    c.max_document_bytes = max_document_bytes  # longer documents are left out
    return c.lock()


def load_config(path: str) -> ConfigDict:
    """The data experiment's `get_config()`, checked and locked. It is code: loading it runs it.

    Raises ConfigError if there is no such file, if it defines no get_config(), or if values are wrong.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--config={path}: no such data experiment; experiments/data has the ones shipped")
    try:
        names = runpy.run_path(path)
        if "get_config" not in names:
            raise ConfigError(f"--config={path} does not define get_config(); see experiments/data/smoke.py")
        config = names["get_config"]()
    except (AttributeError, KeyError, TypeError, SyntaxError) as error:
        message = str(error.args[0] if isinstance(error, KeyError) else error).partition("\n")[0]
        raise ConfigError(f"--config={path}: {type(error).__name__}: {message}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config={path}: get_config() returned {type(config).__name__}, not what base() made"
        )
    validate(config)
    return config.lock()


def validate(config: ConfigDict) -> None:
    """Raises ConfigError listing every problem: the key, the value found, what it must be."""
    problems = _key_problems("", config, base())
    if not problems:
        if config.vocab_size < NUM_FIXED + 2:
            problems.append(f"vocab_size={config.vocab_size}: must be at least {NUM_FIXED + 2}")
        if config.tokenizer_bytes < 1:
            problems.append(f"tokenizer_bytes={config.tokenizer_bytes}: must be positive")
        if not 0 <= config.validation_fraction < 1:
            problems.append(f"validation_fraction={config.validation_fraction}: must lie in [0, 1)")
        if not config.subsets:
            problems.append("subsets: empty; add one with config.subsets.NAME = subset(SOURCE)")
        for name, chosen in config.subsets.items():
            problems += _subset_problems(name, chosen)
    if problems:
        raise ConfigError(f"{len(problems)} problem(s) in the data configuration: " + "; ".join(problems))


def prepare(config: ConfigDict, out: str | Path) -> tuple[dict[str, Any], bool]:
    """Makes tokenizer.json, a store for each subset and, last, data.json in the folder `out`.

    Returns what data.json holds, and whether it was there already. What an interrupted preparation left is
    made again from the start. Raises ConfigError if `out` holds anything else or another process works in it;
    StorageError if it cannot be written.
    """
    if "://" in str(out):
        raise ConfigError(f"--out={out}: must be a local folder; copy it to the bucket once it is finished")
    out = Path(out)
    try:
        if (out / "data.json").exists():
            return _finished(config, out), True
        out.mkdir(parents=True, exist_ok=True)
        with _claimed(config, out):
            return _make(config, out), False
    except OSError as error:
        raise StorageError(
            f"--out={out}: {error.strerror or error} ({error.filename or out}): give a folder "
            "that can be written, with room on its disk"
        ) from error


def describe(data: dict[str, Any]) -> str:
    """A table of what data.json holds."""
    lines = [f"{'subset':<16}{'documents':>10}{'text':>12}{'tokens':>13}{'held out':>11}  left out"]
    for name, row in data["subsets"].items():
        left_out = ", ".join(f"{count:,} {why}" for why, count in row["left_out"].items())
        lines.append(
            f"{name:<16}{row['documents']:>10,}{row['bytes'] / 1e6:>9,.2f} MB{row['tokens']:>13,}"
            f"{row['tokens'] - row['train_tokens']:>11,}  {left_out}"
        )
    return "\n".join(lines)


def _make(config: ConfigDict, out: Path) -> dict[str, Any]:
    """Reads each document once: those that the tokenizer learns from are kept until they are stored."""
    seen: set[bytes] = set()
    left_out = {name: Counter() for name in config.subsets}
    streams = {
        name: sources.documents(chosen, seed=config.seed, seen=seen, left_out=left_out[name])
        for name, chosen in config.subsets.items()
    }
    samples = {}
    for name, stream in streams.items():
        with _progress(f"reading {name}", config.tokenizer_bytes) as progress:
            samples[name] = list(_first_bytes(stream, config.tokenizer_bytes, progress))
        if not samples[name]:
            found = ", ".join(f"{count:,} {why}" for why, count in left_out[name].items()) or "nothing there"
            raise ConfigError(f"subset {name}: {config.subsets[name].source} gave no document ({found})")
    texts = [document.text for sample in samples.values() for document in sample]
    path = out / "tokenizer.json"
    _write(path, train_bpe(texts, config.vocab_size).to_str())
    del texts
    tokenizer, sha256 = load_tokenizer(path), tokenizer_sha256(path)
    data = {
        "format": FORMAT,
        "config": config.to_dict(),
        "tokenizer_sha256": sha256,
        "vocab_size": config.vocab_size,
        "eos_id": tokenizer.token_to_id(EOS),
        "subsets": {},
    }
    for name, stream in streams.items():
        progress = _progress(name, config.subsets[name].max_bytes)
        with (
            progress,
            StoreWriter(
                str(out / name), tokenizer_sha256=sha256, vocab_size=config.vocab_size, eos_id=data["eos_id"]
            ) as writer,
        ):
            size = _write_documents(writer, tokenizer, itertools.chain(samples.pop(name), stream), progress)
            info = writer.finish(validation_fraction=config.validation_fraction)
        data["subsets"][name] = {
            "documents": info["num_documents"],
            "bytes": size,
            "tokens": info["num_tokens"],
            "train_tokens": info["num_train_tokens"],
            "root_digest": info["root_digest"],
            "left_out": dict(sorted(left_out[name].items())),
        }
    _write(out / "data.json", json.dumps(data, indent=1) + "\n")
    return data


def _first_bytes(stream: Iterator[Document], num_bytes: int, progress: tqdm) -> Iterator[Document]:
    """Documents off the stream until they make up `num_bytes`."""
    total = 0
    while total < num_bytes and (document := next(stream, None)) is not None:
        total += document.num_bytes
        progress.update(document.num_bytes)
        yield document


def _write_documents(
    writer: StoreWriter, tokenizer: Tokenizer, stream: Iterable[Document], progress: tqdm
) -> int:
    """Encodes the documents into the store in batches; returns the bytes of their texts."""
    stream, size = iter(stream), 0
    while batch := list(_first_bytes(stream, BATCH_BYTES, progress)):
        texts = [document.text for document in batch]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for document, encoding in zip(batch, encodings, strict=True):
            writer.add(encoding.ids, id=document.id, source=document.source)
            size += document.num_bytes
    return size


def _progress(title: str, num_bytes: int) -> tqdm:
    """A bar over bytes of text, on a terminal only."""
    return tqdm(desc=title, total=num_bytes or None, unit="B", unit_scale=True, disable=None, leave=False)


@contextlib.contextmanager
def _claimed(config: ConfigDict, out: Path) -> Iterator[None]:
    """This process alone works in `out`, which is empty or cleared of an unfinished preparation."""
    marker = out / MARKER
    if not marker.exists() and any(out.iterdir()):
        raise ConfigError(f"--out={out}: holds files that are no preparation of ours; choose an empty folder")
    with open(marker, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--out={out}: another process is preparing data there; wait for it") from error
        file.seek(0)
        for name in file.read().split():
            if SUBSET_NAME.fullmatch(name) and (out / name).is_dir():
                shutil.rmtree(out / name)
        file.truncate(0)
        file.write("\n".join(config.subsets))
        file.flush()
        yield
        marker.unlink()


def _finished(config: ConfigDict, out: Path) -> dict[str, Any]:
    """What data.json holds, once shown to be what `config` asks for and what lies in the folder."""
    again = f"remove {out} to prepare it again"
    try:
        data = json.loads((out / "data.json").read_text(encoding="utf-8"))
        made, expected = data["config"], {name: row["root_digest"] for name, row in data["subsets"].items()}
        expected["tokenizer.json"] = data["tokenizer_sha256"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{out}/data.json is damaged: {again}") from error
    wanted = json.loads(json.dumps(config.to_dict()))
    if made != wanted:
        changes = "; ".join(
            f"{key} was {made.get(key)}, asked for is {wanted.get(key)}"
            for key in sorted(made | wanted)
            if made.get(key) != wanted.get(key)
        )
        raise ConfigError(
            f"--out={out} was made by another configuration ({changes}): remove it or choose another folder"
        )
    for name, digest in expected.items():
        path = out / name
        found = tokenizer_sha256(path) if name == "tokenizer.json" else Store.open(str(path)).root_digest
        if found != digest:
            raise ConfigError(f"{out}/{name} has digest {found}, data.json says {digest}: {again}")
    return data


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _key_problems(prefix: str, found: ConfigDict, expected: ConfigDict) -> list[str]:
    """Keys that are missing, unknown or of another type; a whole number may stand where a fraction does."""
    problems = []
    for key in sorted(set(found) - set(expected)):
        near = difflib.get_close_matches(key, list(expected), n=1)
        problems.append(f"unknown key {prefix}{key}" + (f", did you mean {near[0]!r}?" if near else ""))
    for key in sorted(expected):
        types = (int, float) if isinstance(expected[key], float) else type(expected[key])
        if key not in found:
            problems.append(f"{prefix}{key} is missing: start from base() and subset()")
        elif not isinstance(found[key], types):
            problems.append(f"{prefix}{key}={found[key]!r}: must be such as {expected[key]!r}")
    return problems


def _subset_problems(name: str, chosen: ConfigDict) -> list[str]:
    where = f"subsets.{name}"
    problems = []
    if not SUBSET_NAME.fullmatch(name):
        problems.append(f"{where}: the name is a folder's: use lower-case letters, digits, - and _")
    if not isinstance(chosen, ConfigDict):
        return problems + [f"{where}={chosen!r}: must be made by subset()"]
    if keys := _key_problems(f"{where}.", chosen, subset("")):
        return problems + keys
    if not sources.known(chosen.source):
        problems.append(f"{where}.source={chosen.source!r}: must be {sources.CHOICES}")
    return problems + [
        f"{where}.{key}={chosen[key]}: must not be negative"
        for key in chosen
        if key != "source" and chosen[key] < 0
    ]
