"""Documents that are tokens already: Megatron's .bin and .idx, LLM360's released chunks, seqio tasks.

They are neither filtered nor deduplicated: their ids go to stores as they are, with the tokenizer that made them.

    megatron  each document of the index; source FILE#NUMBER, from 0
    llm360    each row, of one length (K2: 2,048 or 8,192), cut from a stream of documents with EOS between them. It has
              no documents of its own and gets no EOS, so that with label_shift "inside" a window is a row. One store
              for each subset_name; source FILE:LINE, from 1
    seqio     each example, see seqio_bridge.py

A preparation's files of these, below its folder of stages:

    tokens/<store>/<task:05d>           a piece of the store (pieces.py)
    tokens/<store>/held-out-<task:05d>  the same of a seqio task's split for validation: it sorts behind the others
    token-sources/<rank:05d>.json       written last: {"subset", "tally", "stores": {store: {"documents", "tokens",
                                        "held_out_documents", "held_out_tokens"}}, "row_length"}
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import orjson
from ml_collections import ConfigDict

from k2jax.data.tokenizer import load_tokenizer
from k2jax.errors import ConfigError
from k2jax.files import write_json
from k2jax.prepare import reads
from k2jax.prepare.dealing import share
from k2jax.prepare.engine.engine import Stage
from k2jax.prepare.recipe import TOKEN_KINDS, Task, kind_of, subset, tasks
from k2jax.prepare.recipe import task as task_of
from k2jax.prepare.sources.files import DAMAGE, File, bounded_lines, opened, place
from k2jax.prepare.tally import Tally, combine, shown_name, why_none
from k2jax.prepare.tokens.megatron import read_documents
from k2jax.prepare.tokens.pieces import PieceWriter
from k2jax.prepare.tokens.token_document import TokenDocument, token_document
from k2jax.text import without_secrets

MOST_STORES = 256  # of one subset: more are no subsets, but a key that differs from row to row
# Of a subset, that mean something here
KEYS = ("source", "tasks", "follow_links", "priority", "repeats", "licence", "max_line_bytes")
ROW_FIELDS = ("subset_name", "source", "src_filename", "line_idx_in_src")  # kept of LLM360's rows


def token_tasks(config: ConfigDict) -> list[Task]:
    """The tasks of the subsets that are tokens, by rank of `stage`."""
    return tasks(config, tokens=True)


def check(config: ConfigDict) -> None:
    """Raises ConfigError if a subset of tokens asks for what is done to text alone, or two could have one store."""
    usual = subset("")
    for name, chosen in config.subsets.items():
        kind = kind_of(chosen.source)[0]
        wrong = [f"{key}={chosen[key]}" for key in chosen if key not in KEYS and chosen[key] != usual[key]]
        if kind in TOKEN_KINDS and wrong:
            raise ConfigError(
                f"subsets.{name}: {', '.join(wrong)}: a source of tokens knows only {', '.join(KEYS)}; leave others out"
            )
        near = [other for other in config.subsets if other.startswith(f"{name}-")]
        if kind == "llm360" and near:
            raise ConfigError(f"subsets.{near[0]}: could be the name of a store of {name}, {name}-...: rename one")


def stage(config: ConfigDict, out: Path, tokenizer: Path) -> Stage:
    """Converts the subsets that are tokens to pieces of stores, in OUT/stages.

    `tokenizer` is the tokenizer.json that the ids are of. Raises ConfigError as `check`; a task raises it for ids
    outside the vocabulary, too.
    """
    check(config)
    converting = reads.view(config, reads.CONVERTING)
    return Stage("token-sources", len(token_tasks(config)), partial(_convert, converting, Path(out), Path(tokenizer)))


def read(
    chosen: ConfigDict, files: list[File], *, shard: int, num_shards: int, seed: int, tally: Tally, eos: int
) -> Iterator[TokenDocument]:
    """The documents of one task of a subset, which has been dealt `files`; of seqio's those of its shard.

    `eos` is the id of EOS: where a document ends with it, it counts once. What cannot be read is counted in `tally`,
    which also gets a "read" step in bytes of uint32. Raises ConfigError for a source that is not what it should be.
    """
    kind, where = kind_of(chosen.source)
    if kind == "seqio":
        from k2jax.prepare.tokens import seqio_bridge  # it imports TensorFlow: 6 seconds and 0.8 GB

        found = seqio_bridge.read(where, shard=shard, num_shards=num_shards, seed=seed, eos=eos)
    else:
        read_file = partial(_llm360, most=chosen.max_line_bytes, tally=tally) if kind == "llm360" else _megatron
        found = (one for file in files for one in read_file(file, eos=eos))
    for one in found:
        tally.saw("read", 4 * len(one.ids))
        yield one._replace(metadata={**one.metadata, "licence": chosen.licence}) if chosen.licence else one


def _megatron(file: File, eos: int) -> Iterator[TokenDocument]:
    for number, ids in enumerate(read_documents(file)):
        ids = ids[:-1] if len(ids) and ids[-1] == eos else ids  # --append-eod
        yield token_document(ids, source=f"{shown_name(file.name)}#{number}", eos=True)


def _llm360(file: File, *, eos: int, most: int, tally: Tally) -> Iterator[TokenDocument]:
    number = 0
    try:
        with opened(file) as stream:
            for number, line in bounded_lines(stream, most):
                row = "longer than max_line_bytes" if line is None else _row(line)
                if isinstance(row, TokenDocument):
                    yield row._replace(source=f"{shown_name(file.name)}:{number}")
                elif row:
                    tally.problem(row, place(file, number))
    except DAMAGE as error:
        tally.problem("damaged", place(file, number + 1), f"{error}; what stands before it was read")


def _row(line: bytes) -> TokenDocument | str:
    """A row of LLM360's, or what is wrong with it; "" for an empty line."""
    if not line.strip():
        return ""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return "no JSON"
    if not isinstance(row, dict) or "token_ids" not in row:
        return "no token_ids"
    try:
        ids = np.array(row["token_ids"])
    except (ValueError, OverflowError):  # lists in it, of different lengths
        ids = np.empty(0)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or not 0 <= ids.min() <= ids.max() < 1 << 32:
        return "token_ids is no list of ids"
    part = row.get("subset_name") or row.get("source")  # the rows of K2's second stage have no subset_name
    part = re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:100] if isinstance(part, str) else ""
    if not part:
        return "no subset_name"
    metadata = {key: _short(row[key]) for key in ROW_FIELDS if isinstance(row.get(key), str | int)}
    return token_document(ids, source="", eos=False, metadata=metadata, part=part)


def _short(value: str | int) -> str | int:
    return shown_name(value) if isinstance(value, str) else value


def _convert(config: ConfigDict, out: Path, path: Path, rank: int) -> None:
    """One task: its pieces, then the JSON that says what they hold."""
    task, tokenizer, tally = task_of(config, rank, tokens=True), load_tokenizer(path, config.eos), Tally()
    options = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    has_files = kind_of(config.subsets[task.subset].source)[0] != "seqio"
    found = read(
        config.subsets[task.subset],
        share(out, task).files if has_files else [],
        shard=task.shard,
        num_shards=task.num_shards,
        seed=config.seed,
        tally=tally,
        eos=options["eos_id"],
    )
    stores: dict[str, dict[str, int]] = {}
    row_length = 0
    with contextlib.ExitStack() as stack:
        pieces: dict[str, PieceWriter] = {}
        for one in found:
            store = f"{task.subset}-{one.part}" if one.part else task.subset
            piece = f"{store}/{'held-out-' * one.held_out}{task.shard:05d}"
            if piece not in pieces:
                _check_number(task, len(pieces), one)
                pieces[piece] = stack.enter_context(PieceWriter(out / "stages" / "tokens" / piece, **options))
            if not one.eos and one.part:
                row_length = _same_length(row_length, one)
            pieces[piece].add(one.ids, id=one.id, source=one.source, metadata=one.metadata, eos=one.eos)
            _count(stores.setdefault(store, {}), one)
    summary = {"subset": task.subset, "tally": tally.to_json(), "stores": stores, "row_length": row_length}
    write_json(out / "stages" / "token-sources" / f"{rank:05d}.json", summary)


def _check_number(task: Task, number: int, one: TokenDocument) -> None:
    if number == MOST_STORES:
        raise ConfigError(
            f"subset {task.subset}: {one.source} has the {MOST_STORES + 1}th subset_name, {one.part!r}: expected a "
            "few, each of which becomes a store"
        )


def _same_length(expected: int, one: TokenDocument) -> int:
    """A row of another length would move all rows behind it off the windows."""
    if expected and len(one.ids) != expected:
        raise ConfigError(
            f"{one.source} has {len(one.ids)} token ids, the rows before it {expected}: rows of different lengths "
            "cannot be in one subset; take the file out of its source"
        )
    return len(one.ids)


def _count(counts: dict[str, int], one: TokenDocument) -> None:
    prefix = "held_out_" if one.held_out else ""
    for key, number in (("documents", 1), ("tokens", len(one.ids) + one.eos)):
        counts[prefix + key] = counts.get(prefix + key, 0) + number


def summary(config: ConfigDict, out: Path) -> tuple[dict[str, dict], dict[str, dict[str, int]]]:
    """What the stage did: by subset {"tokens": what its tasks counted}, and by store the counts of its pieces.

    Raises ConfigError if the tasks of one store have rows of different lengths, or a subset gave no document.
    """
    parts: dict[str, list] = {}
    stores: dict[str, dict[str, int]] = {}
    lengths: dict[str, int] = {}
    for rank, task in enumerate(token_tasks(config)):
        found = json.loads((out / "token-sources" / f"{rank:05d}.json").read_bytes())
        parts.setdefault(task.subset, []).append(found["tally"])
        length = lengths.setdefault(task.subset, found["row_length"]) or found["row_length"]
        if found["row_length"] not in (0, length):
            raise ConfigError(
                f"subset {task.subset}: some of its files have rows of {length} tokens, others of "
                f"{found['row_length']}: make two subsets of them"
            )
        lengths[task.subset] = length
        for store, counts in found["stores"].items():
            total = stores.setdefault(store, {"subset": task.subset})
            for key, number in counts.items():
                total[key] = total.get(key, 0) + number
    tallies = {name: combine(found) for name, found in parts.items()}
    filled = {counts["subset"] for counts in stores.values()}
    for name, counts in tallies.items():
        if name in filled:
            continue
        source = without_secrets(config.subsets[name].source)
        raise ConfigError(f"subset {name}: {source} gave no document ({why_none(counts)})")
    return {name: {"tokens": counts} for name, counts in tallies.items()}, stores


def mix_of_rates(
    rates: Mapping[str, float], examples: Mapping[str, int], tokens: Mapping[str, int]
) -> dict[str, float]:
    """The repeats of stores that train as a mixture of these rates would, by name.

    seqio's rates count examples: of every 8 examples of a mixture {a: 3, b: 1} 6 are a's. A manifest's rows are in
    proportion to windows * repeats, where windows are in proportion to tokens. So repeats are rate / examples, which
    gives examples * repeats = rate. Where each rate is a task's number of examples all repeats are 1; their scale is
    such that the mix has as many tokens as the stores.

    Args:
        rates: of the mixture, such as the `repeats` of its recipe.
        examples: documents of each store's training part.
        tokens: tokens of it.
    """
    weights = {name: Fraction(rate) / examples[name] for name, rate in rates.items()}
    scale = Fraction(sum(tokens[name] for name in rates), 1) / sum(weights[name] * tokens[name] for name in rates)
    return {name: float(weight * scale) for name, weight in weights.items()}
