"""DATA.md of a release, a data card, from the manifests and journal of the run."""

from typing import Any

from k2jax.data.manifest import manifest_digest
from k2jax.data.order import Order
from k2jax.release.cards import as_yaml, one_line
from k2jax.release.record import Record
from k2jax.text import as_code, for_markdown

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
SIZES += ((10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"))


def data_card(record: Record, facts: dict[str, Any], rows: int) -> str:
    """The text; `rows` is how many the released chunks have."""
    name = for_markdown(record.name)
    lines = [f"# What {name} read", ""]
    lines += [
        f"Steps 1 to {record.step:,} read {record.tokens:,} tokens, in {len(record.chunks):,} chunks; one chunk of "
        "data belongs to one range of steps and one checkpoint. Which tokens a step reads follows from the manifest, "
        "the journal and its number alone (SPECIFICATION.md says how).",
        "",
    ]
    if facts["data"] == "tokens":
        lines += [
            "`data/` has the tokens as trained on, a Parquet file a chunk, in the order of training; `data/README.md` "
            "says what the columns are and how to check a step.",
            "",
        ]
    else:
        lines += [
            "The tokens are not here: `data/digests.jsonl` has the digest of each step's batch, `data/stores.json` the "
            "stores by root digest. Whoever has the stores can compute both again.",
            "",
        ]
    order, parts = record.order, []
    while order is not None:
        parts.insert(0, order)
        order = order.past
    for part in parts:
        lines += _part(part)
    lines += [*_decisions(record), "## Made by", ""]
    lines += [
        "k2jax's `tools/prepare_data.py`, or whatever wrote the stores: their own data card says what came in, what "
        "was left out and why, and belongs beside this one. A store's root digest is over the SHA-256 of its files.",
        "",
        "## Licences",
        "",
        "LICENSES.md, by subset, as the stores record them. Document ids are the SHA-256 of the text, sources are as "
        "their publishers wrote them.",
    ]
    return _front_matter(record, facts, rows) + "\n".join(lines) + "\n"


def _front_matter(record: Record, facts: dict[str, Any], rows: int) -> str:
    tokens = facts["data"] == "tokens"
    size = next((name for most, name in SIZES if rows < most), "n>1T")
    files = "data/chunk_*.parquet" if tokens else "data/digests.jsonl"
    return as_yaml(
        {
            "pretty_name": one_line(f"{record.name}: training data in the order of training"),
            "license": "other",
            "license_name": "see-licenses",
            "license_link": "LICENSES.md",
            "task_categories": ["text-generation"],
            "size_categories": [size],
            "tags": ["k2jax", "pretraining", "training-order"],
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}],
        }
    )


def _part(order: Order) -> list[str]:
    manifest = order.manifest
    since = f"since step {order.after_step + 1:,}" if order.past else "from the beginning"
    lines = [f"## Subsets, {since}", "", f"Manifest {as_code(manifest_digest(manifest))}, seed {manifest['seed']}.", ""]
    lines += ["| subset | documents | tokens | of these held out | root digest |", "|---|---|---|---|---|"]
    for name, store in sorted(manifest["stores"].items()):
        held_out = store["num_tokens"] - store["num_train_tokens"]
        digest = as_code(store["root_digest"])
        lines.append(
            f"| {for_markdown(name)} | {store['num_documents']:,} | {store['num_tokens']:,} | {held_out:,} | {digest} |"
        )
    lines += ["", "| stage | subset | rows planned | share | repeats asked | epochs planned |", "|" + "---|" * 6]
    for stage in manifest["stages"]:
        total = sum(subset["rows"] for subset in stage["subsets"])
        for subset in sorted(stage["subsets"], key=lambda s: (-s["rows"], s["name"])):
            names = f"| {for_markdown(stage['name'])} | {for_markdown(subset['name'])}"
            share, epochs = 100 * subset["rows"] / total, subset["rows"] / subset["windows"]
            lines.append(f"{names} | {subset['rows']:,} | {share:.2f}% | {subset['repeats']:g} | {epochs:.3g} |")
    return [*lines, ""]


def _decisions(record: Record) -> list[str]:
    """What the journal skipped or put off."""
    lines = []
    for entry in record.journal:
        if entry["kind"] in ("skip", "defer"):
            a, b = entry["positions"]
            lines.append(f"- after step {entry['at_step']:,}: {entry['kind']} of positions {a:,} to {b:,}: ")
        elif entry["kind"] == "rollback":
            ranges = ", ".join(f"{a:,} to {b:,}" for a, b in entry["ranges"]) or "none"
            lines.append(f"- rolled back to step {entry['at_step']:,}: {entry['how']} of positions {ranges}: ")
        else:
            continue
        lines[-1] += for_markdown(str(entry.get("why", "no reason given"))[:500])
    return ["## Skipped and put off", "", *lines, ""] if lines else []
