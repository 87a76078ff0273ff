"""The data card of a preparation: card/data.json, and the same for people in card/data.md and card/index.html.

It has what came in and out of every step, what was removed and why with samples, duplicates, distributions, stores and
their mix, parameters, versions and digests. No time of day is in it: the same preparation gives the same bytes.
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from k2jax.files import read_json, write_json, write_text
from k2jax.prepare import reads, recipe
from k2jax.prepare.card.documents import documents_of
from k2jax.prepare.card.html import page
from k2jax.prepare.card.markdown import markdown
from k2jax.prepare.card.pii_figures import FIGURES
from k2jax.prepare.dedup.index import clean_documents
from k2jax.prepare.dedup.shared import shared_of
from k2jax.prepare.tally import combine

FORMAT = 1
LIBRARIES = (
    "datatrove", "tokenizers", "trafilatura", "lxml", "fasttext-numpy2-wheel", "warcio", "xxhash", "phonenumberslite",
    "phonenumbers", "numpy", "pyarrow", "jinja2", "zstandard", "orjson", "tensorstore", "fsspec", "seqio", "ray",
    "chardet",
)  # fmt: skip
HITS = 20  # contaminated documents shown


def write_card(out: Path, data: dict[str, Any]) -> None:
    """Writes the three files to out/card, each whole or not at all.

    Args:
        out: of the preparation, with its `stages` still there.
        data: what the preparation's data.json will hold; needed are config, version, tokenizer_sha256, vocab_size,
            inputs, stores, and subsets: {name: {stage: what tally.combine gave}}, in the order of stages and steps.

    Raises StorageError if documents between the stages are damaged.
    """
    _write(out, make_card(out / "stages", data))


def rewrite_card(out: Path, data: dict[str, Any]) -> None:
    """The same where the stages are gone, and config and repeats alone have changed."""
    card = read_json(out / "card" / "data.json")
    card |= {"config": json.loads(json.dumps(data["config"])), "stores": mix_of(data["stores"])}
    _write(out, card)


def _write(out: Path, card: dict[str, Any]) -> None:
    write_json(out / "card" / "data.json", card)
    write_text(out / "card" / "data.md", markdown(card))
    write_text(out / "card" / "index.html", page(card))


def make_card(stages: Path, data: dict[str, Any]) -> dict[str, Any]:
    """What the card says, from the folder of the stages (documents.gather's, too) and what data.json will hold."""
    config = json.loads(json.dumps(data["config"]))
    duplicates = _read(stages / "duplicates" / "summary.json") or {
        "removed": {},
        "pairs": {},
        "cluster_sizes": {},
    }
    subsets = {name: _subset(name, tallies, data) for name, tallies in sorted(data["subsets"].items())}
    clean = clean_documents(ConfigDict(config), stages / "clean")
    shared = shared_of(
        reads.view(ConfigDict(config), reads.SHARING),
        stages,
        clean,
        {one.name: data["subsets"][one.name]["clean"]["kept"] for one in clean.subsets},
    )
    copies, samples = documents_of(stages, clean, shared)
    of_copies = {name: tallies.get("duplicates", {}).get("copies", {}) for name, tallies in data["subsets"].items()}
    copies["documents_by_copies"] = {name: counts for name, counts in sorted(of_copies.items()) if counts}
    return {
        "format": FORMAT,
        "version": data["version"],
        "config": config,
        "tokenizer": {"sha256": data["tokenizer_sha256"], "vocab_size": data["vocab_size"]},
        "versions": versions(),
        "subsets": subsets,
        "total": _total(subsets, data["stores"]),
        "stores": mix_of(data["stores"]),
        "chat": data.get("chat", {"template_sha256": "", "notes": [], "conversations": {}}),
        "upsampling": _upsampling(config, copies["documents_by_copies"]),
        "duplicates": {**duplicates, **copies},
        "contamination": _contamination(stages, config),
        "personal": _personal(data["subsets"], config),
        "samples": samples,
        "inconsistencies": _inconsistencies(subsets, duplicates["removed"]),
    }


def versions() -> dict[str, str]:
    """Of Python and of the libraries that documents went through, those that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _subset(name: str, tallies: dict[str, dict], data: dict[str, Any]) -> dict[str, Any]:
    """One subset: its steps in order, and what its documents were like after each stage."""
    steps = [step for stage, tally in tallies.items() for step in steps_of(stage, tally)]
    both = combine(list(tallies.values()))
    stores = [row for _, row in sorted(data["stores"].items()) if row["subset"] == name]
    return {
        "input": {key: data["inputs"].get(name, {}).get(key, 0) for key in ("files", "bytes")},
        "steps": steps,
        "bad": both.get("bad", {}),
        "encodings": both.get("encodings", {}),
        "scores": both.get("scores", {}),
        "unreadable": (data["unreadable"] if "unreadable" in data else {}).get(name, {}),
        "problems": both["problems"],
        **{
            key: {stage: tally.get(key, {}) for stage, tally in tallies.items()}
            for key in ("kept", "lengths", "languages", "licences")
        },
        "stored": {
            key: sum(row[key] for row in stores) for key in ("documents", "bytes", "tokens", "train_tokens")
        },
    }


def steps_of(stage: str, tally: dict[str, Any]) -> list[dict[str, Any]]:
    """A stage's steps in their order, with what came out of each: in - removed. Later steps can change bytes."""
    steps = []
    for name, counts in tally.get("steps", {}).items():
        removed = {reason: dict(n) for reason, n in sorted(counts["removed"].items())}
        came = {key: counts[key] for key in ("documents", "bytes")}
        left = {key: came[key] - sum(n[key] for n in removed.values()) for key in came}
        steps.append({"stage": stage, "step": name, "in": came, "removed": removed, "out": left})
    return steps


def mix_of(stores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The stores, with the tokens of each in one pass over the mix (training tokens x repeats) and its share of all."""
    total = sum(row["train_tokens"] * row["repeats"] for row in stores.values())
    return {
        name: {
            **row,
            "mix_tokens": round(row["train_tokens"] * row["repeats"]),
            "mix_share": round(row["train_tokens"] * row["repeats"] / total, 6) if total else 0.0,
        }
        for name, row in sorted(stores.items())
    }


def _total(subsets: dict[str, dict], stores: dict[str, dict]) -> dict[str, int]:
    first = [subset["steps"][0]["in"] for subset in subsets.values() if subset["steps"]]
    last = [subset["steps"][-1]["out"] for subset in subsets.values() if subset["steps"]]
    return {
        "files": sum(subset["input"]["files"] for subset in subsets.values()),
        "file_bytes": sum(subset["input"]["bytes"] for subset in subsets.values()),
        "bad": sum(sum(subset["bad"].values()) for subset in subsets.values()),
        **{f"{key}_in": sum(counts[key] for counts in first) for key in ("documents", "bytes")},
        **{f"{key}_out": sum(counts[key] for counts in last) for key in ("documents", "bytes")},
        **{key: sum(row[key] for row in stores.values()) for key in ("tokens", "train_tokens")},
    }


def _upsampling(config: dict[str, Any], documents: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """For each subset that is upsampled: documents by the range of copies that has one factor."""
    rows = []
    for name, chosen in sorted(config["subsets"].items()):
        pairs = [(1, 1), *chosen["upsample"]] if chosen["upsample"] else []
        ends = [least - 1 for least, _ in pairs[1:]] + [None]
        for (least, factor), most in zip(pairs, ends, strict=False):
            counts = documents.get(name, {}).items()
            found = sum(
                n for copies, n in counts if least <= int(copies) and (most is None or int(copies) <= most)
            )
            rows.append({"subset": name, "copies": [least, most], "factor": factor, "documents": found})
    return rows


def _personal(tallies: dict[str, dict[str, dict]], config: dict[str, Any]) -> dict[str, Any]:
    """By subset and kind, what placeholders stand for; of the rules, how well they do on a labelled sample."""
    subsets = {}
    for name, chosen in sorted(config["subsets"].items()):
        if chosen["pii"]:
            counts = combine(list(tallies.get(name, {}).values())).get("personal", {})
            replaced = {kind: counts.get(kind, 0) for kind in chosen["pii"]}
            subsets[name] = {"replaced": replaced, "regions": chosen["pii_regions"] if "phone" in replaced else []}
    return {"subsets": subsets, "measured": FIGURES if subsets else {}}


def _inconsistencies(subsets: dict[str, dict], removed: dict[str, dict[str, int]]) -> list[str]:
    """Where counts of different stages contradict each other: a bug of ours that nobody should overlook."""
    found = []
    for name, subset in subsets.items():
        steps = subset["steps"]
        for before, after in zip(steps, steps[1:], strict=False):
            out, came = before["out"]["documents"], after["in"]["documents"]
            if out != came:
                found.append(
                    f"{name}: {out:,} documents out of {before['step']}, {came:,} into {after['step']}"
                )
        for stage, kept in subset["kept"].items():
            last = [step["out"]["documents"] for step in steps if step["stage"] == stage][-1:]
            if kept and last and last != [kept["documents"]]:
                found.append(
                    f"{name}: {last[0]:,} documents out of stage {stage}, which kept {kept['documents']:,}"
                )
        counted = [step["removed"] for step in steps if step["step"] == "duplicates"]
        for reason, expected in sorted(removed.get(name, {}).items()) if counted else ():
            count = counted[0].get(reason, {"documents": 0})["documents"]
            if count != expected:
                found.append(f"{name}: {expected:,} {reason} duplicates found, {count:,} removed")
    return found


def _contamination(stages: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Documents checked and contaminated by subset, contaminated ones by evaluation set, and the first of them; items
    of each set that could be looked for, and those that are too short."""
    subsets: dict[str, list] = {}
    sets: list[dict] = []
    hits: list[dict] = []
    for rank, task in enumerate(recipe.tasks(ConfigDict(config))):
        if report := _read(stages / "clean" / "contamination" / f"{rank:05d}.json"):
            subsets.setdefault(task.subset, []).append({"documents": report["documents"]})
            sets.append({"sets": report["sets"]})
            hits = [*hits, *report["hits"]][:HITS]
    by_subset = {name: combine(found)["documents"] for name, found in subsets.items()}
    items = (_read(stages / "contamination" / "items.json") or {}).get("sets", {})
    return {"subsets": by_subset, "sets": combine(sets).get("sets", {}), "hits": hits, "items": items}


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_bytes()) if path.exists() else None
