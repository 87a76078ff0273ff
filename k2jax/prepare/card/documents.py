"""What the data card shows of single documents: samples kept and removed, and where copies stood.

    card  what of them is shown, and counts   one task for TOGETHER of the clean documents
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datatrove.data import Document

from k2jax.files import write_json
from k2jax.prepare.chat.pairs import HALVES
from k2jax.prepare.dedup.index import TOGETHER, Clean, read_part
from k2jax.prepare.dedup.shared import Shared, without_shared
from k2jax.prepare.documents import read_documents
from k2jax.prepare.tally import Tally

TEXT_CHARACTERS = 400  # of a sample
SAMPLES = 3  # of a subset's documents that stay, and for each of its steps and reasons of those that do not
PAIRS = 2  # of duplicates, for each pair of subsets
SEARCHED = 2000  # documents of a task that are looked through for a pair
CLUSTERS = 10  # the largest
Shown = dict[str, Any]  # a document as the card has it, its text cut


def gather(group: int, *, stages: Path, clean: Clean) -> None:
    """A task: what the card shows of TOGETHER tasks of the clean documents, in card/<group>.json."""
    removed: dict[tuple[str, ...], list[Shown]] = defaultdict(list)
    copies, pairs = _Copies(Counter(), []), defaultdict(list)
    for rank in clean.ranks(group, TOGETHER):
        subset = _subset_of(clean, rank)
        _add_copies(copies, stages, rank, subset)
        for _, one in _first(stages, "removed", rank, None):
            where = [subset, *(str(one.metadata.get(key, "")) for key in ("step", "reason"))]
            shown = _shown(one, **dict(zip(("subset", "step", "reason"), where, strict=True)))
            removed[tuple(where)] = _fewest(removed[tuple(where)], [shown])
        for row in _first_duplicates(stages, rank):
            if row["reason"] and row["survivor_index"] < SEARCHED:
                where = row["reason"], subset, _subset_of(clean, row["survivor_rank"])
                _add_pair(pairs[where], [rank, row["index"]], [row["survivor_rank"], row["survivor_index"]])
    found = {"copies_in": copies.copies_in, "largest": copies.largest}
    found |= {"removed": sorted(removed.items()), "pairs": sorted(pairs.items())}
    write_json(stages / "card" / f"{group:05d}.json", found)


def documents_of(
    stages: Path, clean: Clean, shared: Shared | None
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What all tasks gathered: where copies stood, and the largest clusters; and documents to look at, their texts cut,
    chosen by their ids so that they are the same every time."""
    removed: dict[tuple[str, ...], list[Shown]] = defaultdict(list)
    copies, pairs = _Copies(Counter(), []), defaultdict(list)
    for group in range(clean.groups(TOGETHER)):
        part = read_part(stages / "card" / f"{group:05d}.json")
        copies.copies_in.update(part["copies_in"])
        copies.largest[:] = _largest(copies.largest + part["largest"])
        for where, found in part["removed"]:
            removed[tuple(where)] = _fewest(removed[tuple(where)], found)
        for where, found in part["pairs"]:
            for gone, stays in found:
                _add_pair(pairs[tuple(where)], gone, stays)
    samples = {
        "kept": list(_kept(stages, clean, shared)),
        "removed": [one for _, found in sorted(removed.items()) for one in found],
        "duplicates": list(_texts_of(stages, pairs)),
    }
    largest = [shown for *_, shown in copies.largest]
    return {"copies_in": dict(sorted(copies.copies_in.items())), "largest": largest}, samples


class _Copies(NamedTuple):
    """Documents by "subset[/dump]"; [copies, subset, what is shown]."""

    copies_in: Counter[str]
    largest: list[list[Any]]


def _add_copies(copies: _Copies, stages: Path, rank: int, subset: str) -> None:
    for batch in _duplicates(stages, rank):
        stay = pa.Table.from_batches([batch.filter(pc.is_null(batch["reason"]))])
        for entry in pc.list_flatten(stay["by"]).to_pylist():
            copies.copies_in[entry["name"]] += entry["count"]
        largest = stay.sort_by([("copies", "descending")]).slice(0, CLUSTERS).to_pylist()
        for row in largest:
            shown = {"subset": subset, "copies": row["copies"], "sources": (row["sources"] or [])[:5]}
            copies.largest.append([row["copies"], subset, shown])
    copies.largest[:] = _largest(copies.largest)


def _largest(found: list[list[Any]]) -> list[list[Any]]:
    return heapq.nlargest(CLUSTERS, found, key=lambda one: one[:2])


def _add_pair(found: list, gone: list[int], stays: list[int]) -> None:
    """PAIRS for each reason and pair of subsets, of different ones that stay."""
    if len(found) < PAIRS and all(stays != other for _, other in found):
        found.append([gone, stays])


def _subset_of(clean: Clean, rank: int) -> str:
    return clean.subsets[clean.subsets_of(rank)].name


def _kept(stages: Path, clean: Clean, shared: Shared | None) -> Iterator[Shown]:
    """Of each subset, out of the first of its tasks that have some, as they are in the stores."""
    for subset in clean.subsets:
        found: list[Shown] = []
        for rank in range(subset.first, subset.first + subset.tasks):
            if len(found) < SAMPLES:
                gone = {row["index"] for row in _first_duplicates(stages, rank) if row["reason"]}
                stay = ((index, one) for index, one in _first(stages, "documents", rank, SEARCHED) if index not in gone)
                if shared:
                    stay = without_shared(rank, stay, shared, Tally())
                found = _fewest(found, (_shown(one, subset=subset.name) for _, one in stay))
        yield from found


def _fewest(found: list[Shown], more: Iterable[Shown]) -> list[Shown]:
    """The SAMPLES documents of the smallest ids, each text once: a fair choice, the same every time."""
    for one in more:
        if all(one["id"] != other["id"] for other in found):
            found = sorted([*found, one], key=itemgetter("id"))[:SAMPLES]
    return found


def _shown(one: Document, **where: str) -> Shown:
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


def _texts_of(stages: Path, wanted: dict[tuple[str, ...], list]) -> Iterator[dict[str, Any]]:
    """Removed documents beside the ones that stayed for them."""
    places = {tuple(place) for found in wanted.values() for pair in found for place in pair}
    texts = {}
    for rank in sorted({rank for rank, _ in places}):
        for index, one in _first(
            stages, "documents", rank, max(index for r, index in places if r == rank) + 1
        ):
            if (rank, index) in places:
                texts[rank, index] = one
    for (reason, own, other), found in sorted(wanted.items()):
        for gone, stays in (map(tuple, pair) for pair in found):
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
