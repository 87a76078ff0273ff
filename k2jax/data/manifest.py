"""The manifest: which stores, which stages and which shares make up the data of a run.

The manifest fixes the data order together with the journal (order.py). Its digest is the data's identity.
"""

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from k2jax.errors import ConfigError
from k2jax.keys import PACKED_KINDS, TOO_LONG

FORMAT = 1
LABEL_SHIFTS = ("next", "inside")


@dataclass(frozen=True)
class StoreSummary:
    """What the manifest must know of a store; `num_train_tokens` and above are held out for validation."""

    path: str
    root_digest: str  # SHA-256, hex: the identity of the store's content
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    num_tokens: int
    num_train_tokens: int
    num_documents: int


def canonical_json(x: Any) -> bytes:
    """The one JSON text (UTF-8) of `x` that digests are taken of: sorted keys, no spaces."""
    return json.dumps(x, sort_keys=True, separators=(",", ":")).encode()


def sha256_json(x: Any) -> str:
    """SHA-256 of `canonical_json(x)` as hex."""
    return hashlib.sha256(canonical_json(x)).hexdigest()


def num_windows(num_tokens: int, sequence_length: int, label_shift: str) -> int:
    """How many windows of `sequence_length` (T) lie in `num_tokens` tokens.

    A window holds T + 1 tokens for "next" (the last one is shared with the next window), T for "inside".
    """
    last_target = 1 if label_shift == "next" else 0
    return max(0, num_tokens - last_target) // sequence_length


def build_manifest(
    *, stages: list[dict[str, Any]], stores: dict[str, StoreSummary], seed: int, label_shift: str
) -> dict[str, Any]:
    """Makes the manifest of a run.

    Args:
        stages: dicts with name, sequence_length, rows_per_step, steps_per_chunk, chunks and mix, a dict
            from store name to repeats; of kind "sft" or "dpo" with too_long, and packing and packed of
            conversations.py. Repeats are weights: a stage's rows are shared out in proportion to windows * repeats, so
            what results is rows / windows epochs of a subset.
        stores: every store of the run by name. A store in no mix is read by no stage.
        seed: of all permutations.
        label_shift: "next" or "inside", see `num_windows`.

    Raises ConfigError when stores and stages do not fit together.
    """
    if label_shift not in LABEL_SHIFTS:
        raise ConfigError(f"label_shift is {label_shift!r}: expected one of {', '.join(LABEL_SHIFTS)}")
    first = _one_tokenizer(stores)
    return {
        "format": FORMAT,
        "seed": seed,
        "tokenizer_sha256": first.tokenizer_sha256,
        "vocab_size": first.vocab_size,
        "eos_id": first.eos_id,
        "label_shift": label_shift,
        "stores": {
            name: {
                "path": store.path,
                "root_digest": store.root_digest,
                "num_tokens": store.num_tokens,
                "num_train_tokens": store.num_train_tokens,
                "num_documents": store.num_documents,
            }
            for name, store in sorted(stores.items())
        },
        "stages": [_build_stage(stage, stores, label_shift) for stage in stages],
    }


def _one_tokenizer(stores: dict[str, StoreSummary]) -> StoreSummary:
    if not stores:
        raise ConfigError("the run names no stores: expected at least one")
    first_name, first = min(stores.items())
    for name, store in sorted(stores.items()):
        for field in ("tokenizer_sha256", "vocab_size", "eos_id"):
            found, expected = getattr(store, field), getattr(first, field)
            if found != expected:
                raise ConfigError(
                    f"stores {first_name!r} and {name!r} differ in {field} ({expected} and {found}): "
                    "build both with the same tokenizer"
                )
    return first


def is_packed(stage: dict[str, Any]) -> bool:
    """Whether rows of a stage hold whole documents, as data/packing.py has it: stages of pre-training say no kind in
    manifests."""
    return "kind" in stage and stage["kind"] in PACKED_KINDS


def _build_stage(stage: dict[str, Any], stores: dict[str, StoreSummary], label_shift: str) -> dict[str, Any]:
    where = f"stage {stage['name']!r}"
    length = stage["sequence_length"]
    windows, is_whole = {}, is_packed(stage)
    for name, repeats in sorted(stage["mix"].items()):
        if name not in stores:
            known = ", ".join(sorted(stores))
            raise ConfigError(f"{where}: its mix names store {name!r}, not one of the stores: {known}")
        if not repeats > 0:
            raise ConfigError(f"{where}: repeats of {name!r} is {repeats}: expected a number above 0")
        windows[name] = num_windows(stores[name].num_train_tokens, length, label_shift)
        if is_whole:
            windows[name] = stage["packed"][name]["windows"]
    if short := [name for name in windows if not windows[name]]:
        sizes = ", ".join(f"{name!r} has {stores[name].num_train_tokens:,} training tokens" for name in short)
        behind = " and the one behind it" if label_shift == "next" else ""
        raise ConfigError(
            f"{where}: store {sizes}, too few for one row of {length:,}{behind}: "
            "take what is too small out of the mix, or shorten sequence_length"
        )
    if not windows:
        raise ConfigError(f"{where}: its mix is empty: expected at least one store")
    total = stage["chunks"] * stage["steps_per_chunk"] * stage["rows_per_step"]
    # Fraction(str(x)) is the decimal number that was written (0.1), not the float nearest to it.
    rows = share_out(total, {name: windows[name] * Fraction(str(stage["mix"][name])) for name in windows})
    fields = ("name", "sequence_length", "rows_per_step", "steps_per_chunk", "chunks")
    more = {key: stage[key] for key in ("kind", "too_long", "packing")} if is_whole else {}
    of_packing = stage["packed"] if is_whole else {name: {} for name in windows}
    return {
        **{field: stage[field] for field in fields},
        **more,
        "subsets": [
            {
                **of_packing[name],
                "name": name,
                "repeats": float(stage["mix"][name]),
                "windows": windows[name],
                "rows": rows[name],
            }
            for name in windows
        ],
    }


def share_out(total: int, weights: dict[str, Fraction]) -> dict[str, int]:
    """Splits `total` in proportion to `weights` by largest remainder, exactly; ties go by name."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The data's identity: SHA-256 (hex) of the manifest without the stores' paths, which may move."""
    stores = {
        name: {key: value for key, value in store.items() if key != "path"}
        for name, store in manifest["stores"].items()
    }
    return sha256_json({**manifest, "stores": stores})


def check_manifest(manifest: Any, where: str) -> None:
    """Raises ConfigError, naming `where` it is from, unless it is what `build_manifest` makes, of sizes that exist."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ConfigError(f"{where}: its manifest is none: {what}: restore it from a copy")

    def whole(values: dict, keys: tuple[str, ...], low: int = 1, high: int = 1 << 48) -> bool:
        return all(type(values.get(key)) is int and low <= values[key] < high for key in keys)

    need(isinstance(manifest, dict), "expected a JSON object")
    need(manifest.get("format") == FORMAT, f"format {manifest.get('format')}, this version of k2jax reads {FORMAT}")
    need(whole(manifest, ("vocab_size",)) and whole(manifest, ("seed", "eos_id"), 0, 1 << 64), "its numbers")
    need(manifest.get("label_shift") in LABEL_SHIFTS, f"label_shift {manifest.get('label_shift')!r}")
    need(isinstance(manifest.get("tokenizer_sha256"), str), "tokenizer_sha256")
    stores, stages = manifest.get("stores"), manifest.get("stages")
    need(isinstance(stores, dict) and isinstance(stages, list) and bool(stages), "its stores or stages")
    for name, store in stores.items():
        texts = isinstance(store, dict) and all(isinstance(store.get(key), str) for key in ("path", "root_digest"))
        counts = ("num_tokens", "num_train_tokens", "num_documents")
        need(texts and whole(store, counts, 0), f"its store {name!r}")
    for row in stages:
        sizes = ("sequence_length", "rows_per_step", "steps_per_chunk", "chunks")
        named = isinstance(row, dict) and isinstance(row.get("name"), str)
        need(named and whole(row, sizes), "a stage's name or numbers")
        how = row.get("kind") in PACKED_KINDS and row.get("too_long") in TOO_LONG and whole(row, ("packing",))
        need("kind" not in row or how, f"the kind of {row['name']!r}, or how it is packed")
        subsets = row.get("subsets")
        need(isinstance(subsets, list) and bool(subsets), f"the subsets of {row['name']!r}")
        for subset in subsets:
            fine = isinstance(subset, dict) and subset.get("name") in stores and type(subset.get("repeats")) is float
            need(fine and whole(subset, ("windows",)) and whole(subset, ("rows",), 0), f"a subset of {row['name']!r}")
            counts = whole(subset, ("conversations", "tokens")) and whole(subset, ("left_out", "cut"), 0)
            need("kind" not in row or counts, f"a packed subset of {row['name']!r}")
        total = row["chunks"] * row["steps_per_chunk"] * row["rows_per_step"]
        need(sum(subset["rows"] for subset in subsets) == total, f"the rows of {row['name']!r}")


def describe(manifest: dict[str, Any]) -> str:
    """A short table for start-up: tokens, share, epochs asked for and epochs that result, by subset."""
    digest = manifest_digest(manifest)
    lines = [f"data {digest[:12]}, seed {manifest['seed']}, {len(manifest['stores'])} stores"]
    for stage in manifest["stages"]:
        length = stage["sequence_length"]
        steps = stage["chunks"] * stage["steps_per_chunk"]
        total = steps * stage["rows_per_step"]
        lines.append(
            f"stage {stage['name']}: {steps:,} steps in {stage['chunks']} chunks, {total * length:,} tokens, "
            f"{stage['rows_per_step']:,} rows of {length:,} a step"
        )
        lines.append(f"  {'subset':<28}{'tokens':>20}{'share':>9}{'asked':>8}{'epochs':>8}")
        for subset in stage["subsets"]:
            rows = subset["rows"]
            lines.append(
                f"  {subset['name']:<28}{rows * length:>20,}{100 * rows / total:>8.2f}%"
                f"{subset['repeats']:>8.3g}{rows / subset['windows']:>8.3g}"
            )
        lines += [_packed(subset, length) for subset in stage["subsets"] if "conversations" in subset]
        lines += _not_seen(manifest, stage)
    return "\n".join(lines)


def _not_seen(manifest: dict[str, Any], stage: dict[str, Any]) -> list[str]:
    """What a reader of the table might take for granted: that each subset is read, and has a held-out loss."""
    length, lines = stage["sequence_length"], []
    if unread := [subset["name"] for subset in stage["subsets"] if not subset["rows"]]:
        lines.append(f"  no row is of {', '.join(unread)}: the share of the stage's rows rounds to zero")
    without = []
    for name in (subset["name"] for subset in stage["subsets"]):
        store = manifest["stores"][name]
        tokens = store["num_tokens"] - store["num_train_tokens"]
        if not (tokens if is_packed(stage) else num_windows(tokens, length, manifest["label_shift"])):
            without.append(f"{name} ({tokens:,} tokens)")
    if without:
        lines.append(
            f"  no validation loss of {', '.join(without)}: what is held out is shorter than a row of {length:,}: "
            "prepare the data with a larger validation_fraction"
        )
    return lines


def _packed(subset: dict[str, Any], length: int) -> str:
    """Of a subset of an sft stage: how full its rows are, and what is not in them."""
    padding = 1 - subset["tokens"] / (subset["windows"] * length)
    parts = [
        f"  {subset['name']}: {subset['conversations']:,} conversations an epoch, {subset['tokens']:,} tokens in "
        f"{subset['windows']:,} rows, {padding:.2%} padding"
    ]
    parts += [f"{subset['cut']:,} cut at the row's end"] if subset["cut"] else []
    parts += [f"{subset['left_out']:,} left out, too long"] if subset["left_out"] else []
    return "; ".join(parts)
