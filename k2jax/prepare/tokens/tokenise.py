"""Documents to the pieces of stores: one bucket of a subset a task, in the order of the documents' keys.

A subset gives one store or several: by how a document is turned for FIM, and by how many copies of it there were.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from k2jax.errors import ConfigError
from k2jax.files import whole_file, write_json
from k2jax.prepare.chat import mask
from k2jax.prepare.kept import Kept, bucket_of
from k2jax.prepare.recipe import factors_of
from k2jax.prepare.tally import Tally, combine
from k2jax.prepare.tokens import fim, spm
from k2jax.prepare.tokens.pieces import PieceWriter

BATCH_BYTES = 1 << 20  # of text handed to the tokenizer at a time: enough for every core
KEPT_METADATA = (
    "subset", "url", "source_id", "licence", "date", "dump", "language", "duplicates", "contaminated", "turns",
    "quality", "score",
)  # fmt: skip


def store_of(chosen: ConfigDict, name: str, mode: str, copies: int) -> str:
    """The store of one document; what is turned for FIM in a store of its own is not upsampled."""
    if chosen.fim_stores and mode != "plain":
        return f"{name}-fim" if mode == "psm" else f"{name}-spm"
    factors = [factor for least, factor in chosen.upsample if copies >= least]
    return f"{name}-x{factors[-1]}" if factors else name


def tokenize(bucket: int, *, config: dict[str, Any], kept: Kept, tokenizer: Path, eos: int) -> None:
    """A task: writes a piece for each store of the bucket's subset, and beside it how much text it holds.

    `tokenizer` is the tokenizer.json, `eos` its id for the end of a document.
    """
    recipe, name = ConfigDict(config), kept.of_bucket(bucket).subset
    chosen = recipe.subsets[name]
    encoder = load_tokenizer(tokenizer)
    if chosen.conversations:
        _tokenize_conversations(bucket, recipe, kept, encoder, eos)
        return
    library = spm.Encoder(kept.folder / spm.FILE, encoder) if (kept.folder / spm.FILE).exists() else None
    sentinels = sentinel_ids(encoder, tokenizer) if chosen.fim_rate else {}
    documents = bucket_of(kept, bucket, recipe.seed)
    paths = _pieces(kept, bucket, recipe)
    num_bytes, unknown = dict.fromkeys(paths, 0), dict.fromkeys(paths, 0)
    with contextlib.ExitStack() as stack:
        size = encoder.vocab_size
        pieces = {
            store: stack.enter_context(PieceWriter(path, vocab_size=size, eos_id=eos)) for store, path in paths.items()
        }
        for document, cut, ids in encoded(documents, chosen, encoder, sentinels, recipe.seed, library):
            metadata = {key: document.metadata[key] for key in KEPT_METADATA if key in document.metadata}
            if chosen.fim_rate:
                metadata["fim"] = cut._asdict()
            copies = document.metadata.get("duplicates", {}).get("copies", 1)
            store = store_of(chosen, name, cut.mode, copies)
            pieces[store].add(ids, id=document.id, source=document.metadata["source"], metadata=metadata)
            num_bytes[store] += len(document.text.encode())
            unknown[store] += ids.count(encoder.unk_id)
    for store, path in paths.items():
        write_json(f"{path}.json", {"bytes": num_bytes[store], "unknown_tokens": unknown[store]})


def _pieces(kept: Kept, bucket: int, recipe: ConfigDict) -> dict[str, Path]:
    """The pieces of a bucket, by store; their names sort as the buckets do."""
    subset, _, first, _ = kept.of_bucket(bucket)
    return {store: kept.folder / "tokens" / store / f"{bucket - first:07d}" for store in factors_of(recipe, subset)}


def _tokenize_conversations(bucket: int, recipe: ConfigDict, kept: Kept, encoder: Tokenizer, eos: int) -> None:
    """The same of conversations, whose pieces have a loss mask and end as their template ends them.

    What was counted lies in conversations/<bucket>.json, written last.
    """
    name = kept.of_bucket(bucket).subset
    chosen, tally, counts = recipe.subsets[name], Tally(), Counter()
    control = tuple(sorted(filter(None, map(encoder.id_to_token, encoder.control_ids))))
    documents, paths = bucket_of(kept, bucket, recipe.seed), _pieces(kept, bucket, recipe)
    num_bytes, unknown = dict.fromkeys(paths, 0), dict.fromkeys(paths, 0)
    with contextlib.ExitStack() as stack:
        options = {"vocab_size": encoder.vocab_size, "eos_id": eos, "masked": True}
        pieces = {store: stack.enter_context(PieceWriter(path, **options)) for store, path in paths.items()}
        for batch in batches(documents):
            found = mask.encoded(batch, encoder, chosen.conversations, control=control, tally=tally, counts=counts)
            for one, ids, learned in found:
                copies = one.metadata.get("duplicates", {}).get("copies", 1)
                store = store_of(chosen, name, "plain", copies)
                metadata = {key: one.metadata[key] for key in KEPT_METADATA if key in one.metadata}
                source = one.metadata["source"]
                pieces[store].add(ids, id=one.id, source=source, metadata=metadata, eos=False, mask=learned)
                num_bytes[store] += len(one.text.encode())
                unknown[store] += list(ids).count(encoder.unk_id)
    for store, path in paths.items():
        write_json(f"{path}.json", {"bytes": num_bytes[store], "unknown_tokens": unknown[store]})
    write_json(_counted(kept, bucket), {"tally": tally.to_json(), "counts": dict(counts)})


def _counted(kept: Kept, bucket: int) -> Path:
    return kept.folder / "conversations" / f"{bucket:05d}.json"


def conversations_of(kept: Kept, subsets: Iterable[str]) -> dict[str, dict[str, dict]]:
    """What was counted of subsets of conversations: {"tally": of step "tokens", "counts": of what is in stores}."""
    found: dict[str, list[dict[str, dict]]] = {}
    for name, _, first, number in (one for one in kept.subsets if one.subset in subsets):
        found[name] = [json.loads(_counted(kept, bucket).read_bytes()) for bucket in range(first, first + number)]
    return {
        name: {"tally": combine([one["tally"] for one in parts]), "counts": _sum(one["counts"] for one in parts)}
        for name, parts in found.items()
    }


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total = Counter(dict.fromkeys(mask.COUNTS, 0))
    for one in counts:
        total.update(one)
    return dict(total)


def encoded(
    documents: Iterable[Document],
    chosen: ConfigDict,
    encoder: Tokenizer,
    sentinels: dict[str, int],
    seed: int,
    library: spm.Encoder | None = None,
) -> Iterator[tuple[Document, fim.Cut, list[int]]]:
    """Each document with its cut and its ids: the tokenizer gets batches, of the texts between sentinels.

    `library` is SentencePiece, of whose model the tokenizer was made: ConfigError where the two differ.
    """
    for batch in batches(documents):
        cuts = [
            fim.draw(one.id, len(one.text), seed=seed, rate=chosen.fim_rate, spm_rate=chosen.fim_spm_rate)
            for one in batch
        ]
        pieces = [fim.pieces(one.text, cut) for one, cut in zip(batch, cuts, strict=True)]
        found = encoder.encode_documents(pieces)
        if library:
            library.check(found, pieces, [one.metadata["source"] for one in batch])
        for one, cut, ids in zip(batch, cuts, found, strict=True):
            yield one, cut, fim.written(cut.mode, ids, sentinels)


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_BYTES of text."""
    batch, size = [], 0
    for one in documents:
        batch.append(one)
        size += len(one.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def sentinel_ids(encoder: Tokenizer, path: Path) -> dict[str, int]:
    """The ids of FIM's sentinels; ConfigError if the tokenizer lacks one."""
    ids = {sentinel: encoder.token_to_id(sentinel) for sentinel in fim.SENTINELS}
    if missing := [sentinel for sentinel, id in ids.items() if id not in encoder.control_ids]:
        raise ConfigError(
            f"tokenizer {path}: it has no control token {missing[0]}, which fim_rate needs: add FIM's tokens or set "
            "fim_rate=0"
        )
    return ids


def train_tokenizer(_: int, *, config: dict[str, Any], kept: Kept, path: Path) -> None:
    """A task: learns a tokenizer from the first documents of each subset, in the order of their keys, to `path`."""
    recipe = ConfigDict(config)
    texts = []
    for _, _, first, number in kept.subsets:
        num_bytes = 0
        for bucket in range(first, first + number):
            if num_bytes >= recipe.tokenizer_bytes:
                break
            for document in bucket_of(kept, bucket, recipe.seed):
                if num_bytes < recipe.tokenizer_bytes:
                    texts.append(document.text)
                    num_bytes += len(document.text.encode())
    with whole_file(path, "w") as file:
        file.write(train_bpe(texts, recipe.vocab_size).to_str())
