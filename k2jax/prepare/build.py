"""A preparation from start to end: what `tools/prepare_data.py` does, stage by stage.

    read, clean -> exact and near duplicates -> what stays, in its order -> tokenizer -> tokens -> stores -> data card

Each stage can be stopped and goes on where it was. data.json, written last, says that all of it is there.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import k2jax
from k2jax import errors
from k2jax.chat import template, worker
from k2jax.data.store import Store
from k2jax.data.tokenizer import load_tokenizer, tokenizer_sha256
from k2jax.errors import ConfigError, StorageError
from k2jax.files import remove_tree, sync_folder, write_json
from k2jax.prepare import before, claim, clean, dealing, finished, kept, plan, reads, recipe, tally
from k2jax.prepare.card import card
from k2jax.prepare.card import documents as card_documents
from k2jax.prepare.chat import mask
from k2jax.prepare.claim import TEMPLATE
from k2jax.prepare.dedup import duplicates
from k2jax.prepare.dedup import shared as sharing
from k2jax.prepare.dedup.index import TOGETHER, clean_documents
from k2jax.prepare.engine.cores import cores
from k2jax.prepare.engine.engine import Engine, Stage, check_executor, set_environment
from k2jax.prepare.made import Made
from k2jax.prepare.sources import unreadable
from k2jax.prepare.sources.listing import Listing
from k2jax.prepare.tokens import pieces, token_sources, tokenise
from k2jax.prepare.work import Work
from k2jax.text import redacted

FORMAT = 2


def build(
    config: ConfigDict, out: str | Path, *,
    executor: str = "local", workers: int = 0, keep_stages: bool = False, other_code: bool = False,
    redo: Sequence[str] = (),
) -> tuple[dict[str, Any], bool]:
    """Makes tokenizer.json, the stores, the data card and, last, data.json in the folder `out`; of conversations the
    chat_template.jinja, too.

    Returns what data.json holds, and whether it was there already. What an interrupted preparation finished is not
    done again; where the recipe or its documents have changed since, what they change is (made.py), and said first.
    `workers` tasks run at once, 0 for as many as there are cores (cores.py). `keep_stages` leaves what lies between
    documents and stores, several times the documents' size; `other_code` lets this code go on with what another
    version of it began; `redo` names stages that are done again, with what follows. Raises ConfigError if `out` holds
    anything else or is being worked in, or if what another recipe needs of it is gone; StorageError if it cannot be
    written.
    """
    errors.keep_files_ours()
    config, out, was_there = claim.numbered(config), Path(out).absolute(), False
    workers = workers or cores()
    try:
        data = finished.read(out) if (out / "data.json").exists() else None
        finished.check_redo(config, out, data, redo)
        if data and finished.is_left(config, out, data, other_code or bool(redo)):
            finished.mend_card(out, data)  # for which neither executor nor documents need be there any more
            was_there = True
            claim.sweep(out)
        elif data and not claim.has_stages(out):
            data = finished.rewritten(config, out, data, other_code)
        else:
            check_executor(executor, config.slurm.to_dict(), out)
            before.check_writable(out)
            before.check_apart(config, out)
            given = before.given(config)
            listing = clean.check(config)
            whole = dealing.settled(config, listing)
            known = plan.facts(whole, listing, given.tokenizer, given.told())
            set_environment(executor, workers)
            out.mkdir(parents=True, exist_ok=True)
            with claim.claimed(config, out, other_code):
                engine = Engine(out / "stages" / "done", executor, workers, config.slurm.to_dict())
                units = plan.units(whole, known)
                plan.check_names(units, redo)
                made = Made(out, redo, plan.read_again(whole, out))
                work = Work(engine, made, units)
                was_there = data is not None and work.is_complete() and not finished.changes(data, config)
                if not was_there:
                    _clear(config, out, work, data)
                    data = _make(whole, out, work, given, listing)
                made.end_redo()
                gone = None if keep_stages else claim.drop_stages(out)
            if gone:
                remove_tree(gone)
    except OSError as error:
        raise StorageError(
            f"--out={out}: {error.strerror or error} ({error.filename or out}): give a folder "
            "that can be written, with room on its disk"
        ) from error
    return data, was_there


def _clear(config: ConfigDict, out: Path, work: Work, data: dict[str, Any] | None) -> None:
    """Removes what is not of this recipe, having said what and why; data.json first, which says that all is there."""
    told = work.stale_lines()
    if data and not told:
        told = [f"data.json and card are written anew ({'; '.join(finished.changes(data, config).values())})"]
    for line in told:
        print(line, file=sys.stderr, flush=True)
    (out / "data.json").unlink(missing_ok=True)
    sync_folder(out)
    shutil.rmtree(out / "card", ignore_errors=True)
    work.remove_stale()


def _make(
    config: ConfigDict, out: Path, work: Work, given: before.Given, listing: dict[str, Listing]
) -> dict[str, Any]:
    stages, tokenizer = out / "stages", out / "tokenizer.json"
    work.begin("template")
    if given.tokenizer:
        work.begin("tokenizer")
    before.take(config, out, given)
    work.begin_files()
    inputs = dealing.deal(config, out, work.of("files"), listing)
    for stage in clean.stages(config, out, work.again):
        work.run(stage)
    dealt = _what_stays(config, stages, work)

    if not config.tokenizer:
        learning = reads.view(config, reads.LEARNING).to_dict()
        learn = partial(tokenise.train_tokenizer, config=learning, kept=dealt, path=tokenizer)
        work.run(Stage("tokenizer", 1, learn))
    encoder = load_tokenizer(tokenizer, config.eos)
    eos = encoder.eos_id

    tokenizing = reads.view(config, reads.TOKENIZING).to_dict()
    write = partial(tokenise.tokenize, config=tokenizing, kept=dealt, tokenizer=tokenizer, eos=eos)
    for name, _, first, number in dealt.subsets:
        work.describe(f"tokens/{name}", ranks=(first, first + number))
    work.run(Stage("tokens", dealt.num_buckets, write))
    chats = tokenise.conversations_of(dealt, _conversations(config))
    for name in (name for name, found in chats.items() if not found["counts"]["conversations"]):
        why = tally.why_none(chats[name]["tally"])
        raise ConfigError(f"subset {name}: no conversation of it has an answer to learn ({why}): see max_tokens")
    work.run(token_sources.stage(config, out, tokenizer))
    of_tokens = token_sources.summary(config, stages)[1].items()

    names = sorted(path.name for path in (stages / "tokens").iterdir())
    options = {
        "tokenizer_sha256": tokenizer_sha256(tokenizer), "vocab_size": encoder.vocab_size, "eos_id": eos
    }  # fmt: skip
    found = pieces.Pieces(stages, out, tuple(names), options)
    work.describe("shards", outputs=(*names, "stages/layout", "stages/shards"))
    work.run(Stage("layout", len(names), partial(pieces.lay_out, pieces=found)), "shards")
    parts = found.parts()
    work.run(Stage("shards", len(parts), partial(pieces.write_part, parts=parts, pieces=found)))
    train = {name: counts.get("tokens", 0) for name, counts in of_tokens if "held_out_tokens" in counts}
    joining = reads.view(config, reads.JOINING).to_dict()
    finish = partial(_finish, config=joining, found=found, train_tokens=train)
    work.run(Stage("stores", len(names), finish))

    data = {"format": FORMAT, "config": redacted(config.to_dict()), **options}
    data |= {"inputs": inputs, "code": claim.codes(out)}
    return _sum_up(config, out, data, names, chats, given.notes)


def _what_stays(config: ConfigDict, stages: Path, work: Work) -> kept.Kept:
    """Without duplicates and what too many share, dealt out to buckets."""
    dedup, keeping = reads.view(config, reads.DEDUPLICATION), reads.view(config, reads.KEEPING)
    for stage in duplicates.stages(dedup, stages / "clean", stages / "duplicates"):
        work.run(stage, "deduplicate")
    tallies, documents = _tallies(config, stages / "clean" / "tally"), clean_documents(dedup, stages / "clean")
    cleaned = {name: counts["kept"] for name, counts in tallies.items()}
    gather = partial(card_documents.gather, stages=stages, clean=documents)
    work.run(Stage("card", documents.groups(TOGETHER), gather))
    shared = sharing.shared_of(reads.view(config, reads.SHARING), stages, documents, cleaned)
    for stage in sharing.stages(shared) if shared else ():
        work.run(stage)
    dealt = kept.deal(keeping, stages, cleaned)
    keep = partial(kept.keep, kept=dealt, seed=keeping.seed, shared=shared)
    work.run(Stage("kept", dealt.num_tasks, keep))
    for stage in dealt.shuffle.stages("kept"):
        work.run(stage)
    _check_not_empty(config, stages, tallies)
    return dealt


def _sum_up(
    config: ConfigDict, out: Path, data: dict[str, Any], names: list[str], chats: dict[str, dict], notes: list[str]
) -> dict[str, Any]:
    """The data card, and data.json, which holds what is returned: `data`, and what was counted."""
    if left := unreadable.of_all(out, list(config.subsets)):
        data |= {"unreadable": left}
    data |= _summary(config, out, names)
    if chats:
        sha256 = hashlib.sha256((out / TEMPLATE).read_bytes()).hexdigest()
        counts = {name: found["counts"] for name, found in chats.items()}
        written = worker.written(template.load(dealing.template_of(out)))
        data |= {"chat": {"template_sha256": sha256, "notes": notes, "conversations": counts, **written}}
        for name, found in chats.items():
            data["subsets"][name]["tokens"] = found["tally"]
    card.write_card(out, data)
    write_json(out / "data.json", data)
    return data


def _conversations(config: ConfigDict) -> list[str]:
    return [name for name, chosen in config.subsets.items() if chosen.conversations]


def _pairs(config: ConfigDict) -> list[str]:
    return [name for name in _conversations(config) if config.subsets[name].conversations.pairs]


def _tallies(config: ConfigDict, folder: Path) -> dict[str, dict[str, Any]]:
    """What the tasks of a stage counted, by subset."""
    parts: dict[str, list] = {}
    for rank, task in enumerate(recipe.tasks(config)):
        parts.setdefault(task.subset, []).append(json.loads((folder / f"{rank:05d}.json").read_bytes()))
    return {name: tally.combine(found) for name, found in parts.items()}


def _check_not_empty(config: ConfigDict, stages: Path, read_and_cleaned: dict[str, dict[str, Any]]) -> None:
    """A subset of which nothing stays is a mistake, and ends before the long stages."""
    for name, counts in _tallies(config, stages / "kept").items():
        if not counts["kept"]["documents"]:
            source, why = config.subsets[name].source, tally.why_none(read_and_cleaned[name], counts)
            raise ConfigError(f"subset {name}: {source} gave no document ({why})")


def _finish(rank: int, *, config: dict[str, Any], found: pieces.Pieces, train_tokens: dict[str, int]) -> None:
    """A task: completes a store. What a seqio task has for validation is held out, else a share of the end."""
    whole, name = ConfigDict(config), found.stores[rank]
    held_out = {"validation_fraction": whole.validation_fraction}
    if name in train_tokens:
        held_out = {"num_train_tokens": train_tokens[name]}
    pairs = any(name in recipe.factors_of(whole, one) for one in _pairs(whole))
    pieces.finish(name, pieces=found, held_out=held_out, pairs=pairs)


def _summary(config: ConfigDict, out: Path, names: list[str]) -> dict[str, Any]:
    """What data.json says of stores and subsets."""
    stages = out / "stages"
    token_subsets, token_stores = token_sources.summary(config, stages)
    subset_of = {name: counts["subset"] for name, counts in token_stores.items()}
    for name in recipe.names(config):
        subset_of |= dict.fromkeys(recipe.factors_of(config, name), name)
    opened = {name: Store.open(out / name) for name in names if (out / name / "store.json").exists()}
    for name in config.subsets:  # each has given documents, and what is made of them is in stores
        if name not in {subset_of[store] for store in opened}:
            raise StorageError(f"{stages}: the store of subset {name} is not there: prepare again with --redo=tokens")
    mix = finished.mix_of(config, {name: subset_of[name] for name in opened}, opened)
    stores = {}
    for name, store in opened.items():
        counts = [json.loads(path.read_bytes()) for path in (stages / "tokens" / name).glob("*.json")]
        stores[name] = {
            "subset": subset_of[name],
            "documents": store.num_documents,
            "bytes": sum(one["bytes"] for one in counts),  # of text; 0 of what came as tokens
            "tokens": store.num_tokens,
            "unknown_tokens": sum(one.get("unknown_tokens", 0) for one in counts),  # of text that was tokenized here
            "train_tokens": store.num_train_tokens,
            "root_digest": store.root_digest,
            "repeats": mix[name],
            **({"supervised_tokens": store.info["supervised_tokens"]} if store.masked else {}),
        }
    cleaned, dealt = _tallies(config, stages / "clean" / "tally"), _tallies(config, stages / "kept")
    subsets = {name: {"clean": cleaned[name], "duplicates": dealt[name]} for name in cleaned} | token_subsets
    return {"version": k2jax.__version__, "stores": stores, "mix": mix, "subsets": subsets}


def describe(data: dict[str, Any]) -> str:
    """A table of what data.json holds."""
    lines = [f"{'store':<24}{'documents':>10}{'text':>12}{'tokens':>13}{'held out':>11}{'repeats':>9}"]
    for name, row in data["stores"].items():
        lines.append(
            f"{name:<24}{row['documents']:>10,}{row['bytes'] / 1e6:>9,.2f} MB{row['tokens']:>13,}"
            f"{row['tokens'] - row['train_tokens']:>11,}{row['repeats']:>9g}"
        )
    for name, row in data["stores"].items():
        if unknown := row.get("unknown_tokens"):
            share = f"{unknown:,} of the tokens of {name} ({unknown / row['tokens']:.2%})"
            lines.append(f"{share} stand for characters that the tokenizer does not know: the text is lost there")
    lines += _describe_held_out(data)
    for name, counts in data["subsets"].items():
        reasons = tally.left_out(*counts.values())
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        lines += [f"left out of {name}: {why}"] if why else []
    return "\n".join(lines + _describe_chat(data["chat"]) if "chat" in data else lines)


def _describe_held_out(data: dict[str, Any]) -> list[str]:
    """Held out are whole documents, so that a share of a small store may be none."""
    share = data["config"]["validation_fraction"]
    none = [name for name, row in data["stores"].items() if row["tokens"] == row["train_tokens"]]
    if not none or not share:
        return []
    return [
        f"nothing is held out of {', '.join(none)}: the last document is larger than validation_fraction={share:g} of "
        "the tokens: training will say no validation loss of it; a larger fraction does"
    ]


def _describe_chat(chat: dict[str, Any]) -> list[str]:
    lines = [f"chat template: {note}" for note in chat["notes"]]
    for name, n in chat["conversations"].items():
        pairs = f"{n['pairs']:,} pairs, " if n.get("pairs") else ""  # older preparations do not count them
        lines.append(
            f"{name}: {pairs}{n['conversations']:,} conversations, {n['turns']:,} turns, {n['answers']:,} answers; "
            f"{n['supervised_tokens']:,} of {n['tokens']:,} tokens are learned"
            + (f"; {n['cut']:,} conversations cut" if n["cut"] else "")
        )
        lines += [f"{name}: {note}" for note in mask.notes(n)]
    return lines
