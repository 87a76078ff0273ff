"""What the data card shows of single documents: samples kept and removed, and where copies stood."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datatrove.data import Document
from ml_collections import ConfigDict

from k2jax.prepare import recipe
from k2jax.prepare.chat.pairs import HALVES
from k2jax.prepare.documents import read_documents

TEXT_CHARACTERS = 400  # of a sample
SAMPLES = 3  # of a subset's documents that stay, and for each of its steps and reasons of those that do not
PAIRS = 2  # of duplicates, for each pair of subsets
SEARCHED = 2000  # documents of a task that are looked through for a pair
CLUSTERS = 10  # the largest


def copies_of(stages: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Where copies stood, how many documents that stay had how many, and the largest clusters."""
    copies_in: Counter[str] = Counter()
    by_copies: dict[str, Counter[int]] = defaultdict(Counter)
    largest: list[tuple[int, str, dict]] = []
    for rank, task in enumerate(recipe.tasks(ConfigDict(config))):
        counts = by_copies[task.subset]
        index = stages / "clean" / "index" / f"{rank:05d}.parquet"
        counts[1] += pq.read_metadata(index).num_rows if index.exists() else 0
        for batch in _duplicates(stages, rank):
            counts[1] -= len(batch)
            stay = pa.Table.from_batches([batch.filter(pc.is_null(batch["reason"]))])
            for found in pc.value_counts(stay["copies"]).to_pylist():
                counts[found["values"]] += found["counts"]
            for entry in pc.list_flatten(stay["by"]).to_pylist():
                copies_in[entry["name"]] += entry["count"]
            for row in stay.sort_by([("copies", "descending")]).slice(0, CLUSTERS).to_pylist():
                shown = {
                    "subset": task.subset,
                    "copies": row["copies"],
                    "sources": (row["sources"] or [])[:5],
                }
                largest.append((row["copies"], task.subset, shown))
        largest = heapq.nlargest(CLUSTERS, largest, key=lambda item: item[:2])
    return {
        "copies_in": dict(sorted(copies_in.items())),
        "documents_by_copies": {
            name: {str(copies): n for copies, n in sorted(counts.items()) if n}
            for name, counts in sorted(by_copies.items())
        },
        "largest": [shown for *_, shown in largest],
    }


def samples_of(stages: Path, config: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Documents to look at, their texts cut, chosen by their ids so that they are the same every time."""
    tasks = recipe.tasks(ConfigDict(config))
    kept: dict[str, list] = defaultdict(list)
    removed: dict[tuple, list] = defaultdict(list)
    for rank, task in enumerate(tasks):
        if len(kept[task.subset]) < SAMPLES:
            gone = {row["index"] for row in _first_duplicates(stages, rank) if row["reason"]}
            stay = (one for index, one in _first(stages, "documents", rank, SEARCHED) if index not in gone)
            kept[task.subset] = _fewest(kept[task.subset], stay)
        for _, one in _first(stages, "removed", rank, None):
            key = (task.subset, str(one.metadata.get("step", "")), str(one.metadata.get("reason", "")))
            removed[key] = _fewest(removed[key], [one])
    return {
        "kept": [_shown(one, subset=subset) for subset, found in sorted(kept.items()) for one in found],
        "removed": [
            _shown(one, subset=subset, step=step, reason=reason)
            for (subset, step, reason), found in sorted(removed.items())
            for one in found
        ],
        "duplicates": list(_pairs(stages, [task.subset for task in tasks])),
    }


def _fewest(found: list[Document], more: Iterable[Document]) -> list[Document]:
    """The SAMPLES documents of the smallest ids, each text once: a fair choice, the same every time."""
    for one in more:
        if all(one.id != other.id for other in found):
            found = sorted([*found, one], key=lambda one: one.id)[:SAMPLES]
    return found


def _shown(one: Document, **where: str) -> dict[str, Any]:
    source = str(one.metadata.get("source", ""))[:TEXT_CHARACTERS]
    return {
        **where,
        "id": one.id,
        "source": source,
        "characters": len(one.text),
        "text": _cut(one),
    }


def _cut(one: Document) -> str:
    """The beginning of its text; of a pair of conversations that of each."""
    if "border" not in one.metadata:
        return one.text[:TEXT_CHARACTERS]
    halves = zip(HALVES, (one.text[: one.metadata["border"]], one.text[one.metadata["border"] :]), strict=True)
    return "\n".join(f"{name}: {half[: TEXT_CHARACTERS // len(HALVES)]}" for name, half in halves)


def _pairs(stages: Path, subsets: list[str]) -> Iterator[dict[str, Any]]:
    """Removed documents beside the ones that stayed for them: PAIRS for each reason and pair of subsets."""
    wanted: dict[tuple, list] = defaultdict(list)
    for rank in range(len(subsets)):
        for row in _first_duplicates(stages, rank):
            if row["reason"] and row["survivor_index"] < SEARCHED:
                found = wanted[row["reason"], subsets[rank], subsets[row["survivor_rank"]]]
                survivor = row["survivor_rank"], row["survivor_index"]
                if len(found) < PAIRS and all(survivor != other for _, other in found):
                    found.append(((rank, row["index"]), survivor))
    places = {place for found in wanted.values() for pair in found for place in pair}
    texts = {}
    for rank in sorted({rank for rank, _ in places}):
        for index, one in _first(
            stages, "documents", rank, max(index for r, index in places if r == rank) + 1
        ):
            if (rank, index) in places:
                texts[rank, index] = one
    for (reason, own, other), found in sorted(wanted.items()):
        for gone, stays in found:
            if gone in texts and stays in texts:
                pair = {
                    "removed": _shown(texts[gone], subset=own),
                    "stays": _shown(texts[stays], subset=other),
                }
                yield {"reason": reason, **pair}


def _first(stages: Path, folder: str, rank: int, most: int | None) -> Iterator[tuple[int, Document]]:
    """The first documents of a task's file, numbered; none if there is no such file."""
    path = stages / "clean" / folder / f"{rank:05d}.jsonl.zst"
    if path.exists():
        for index, one in enumerate(read_documents(path)):
            if index == most:
                return
            yield index, one


def _first_duplicates(stages: Path, rank: int) -> Iterator[dict[str, Any]]:
    """The rows of duplicates among the first SEARCHED documents of a task."""
    for batch in _duplicates(stages, rank):
        for row in batch.to_pylist():
            if row["index"] >= SEARCHED:
                return
            yield row


def _duplicates(stages: Path, rank: int) -> Iterator[pa.RecordBatch]:
    """The rows of duplicates of a task, by index, some thousand at a time."""
    path = stages / "duplicates" / f"{rank:05d}.parquet"
    if path.exists():
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(1 << 12)
