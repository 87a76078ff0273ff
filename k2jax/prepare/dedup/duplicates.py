"""Deduplication: the stages, from the clean documents to what becomes of each that has a duplicate.

  ids         hashes of the texts, sorted                             one task for each of the clean documents
  exact       pairs of the same text                                  one for 16 of them
  signatures  MinHash of the documents that exact left                one for each of the clean documents
  near        pairs that share a band                                 `bands` x parts
  clusters    what pairs connect, and which document of it stays      one task
  duplicates  <rank>.parquet of the documents of each task (ROWS)     one for 64 of them

A document that is removed as an exact copy is `exact` also where its survivor is then removed as a near duplicate: both
then name the last survivor.
"""

import functools
import heapq
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from k2jax.errors import StorageError
from k2jax.files import whole_file
from k2jax.prepare.dedup import exact, near
from k2jax.prepare.dedup.clusters import MEMBERS, find_clusters
from k2jax.prepare.dedup.index import Clean, clean_documents, read_index, task_bounds
from k2jax.prepare.dedup.minhash import MinHash, write_signatures
from k2jax.prepare.documents import read_documents
from k2jax.prepare.engine import Stage

ROWS = pa.schema(
    [
        ("index", pa.uint32()),  # of the document in its task
        ("reason", pa.string()),  # "exact" or "near"; null if it stays
        ("survivor_rank", pa.uint32()),
        ("survivor_index", pa.uint32()),
        ("copies", pa.int64()),  # on survivors: documents of the cluster, itself included; else 1
        ("by", pa.list_(pa.struct([("name", pa.string()), ("count", pa.int64())]))),  # of those: "subset[/dump]"
        ("sources", pa.list_(pa.string())),  # names of the removed ones
    ]
)
TASKS_A_PARTITION = 16  # of the clean documents: their number bounds what a task of finding exact copies holds
TOGETHER = 64  # tasks of the clean documents whose duplicates one task looks after


def stages(config: ConfigDict, clean: Path, out: Path) -> list[Stage]:
    """The stages that read the clean documents of `clean` and write <rank>.parquet and summary.json to `out`.

    Files between them are in folders of `out`. Each stage raises StorageError if a file that it needs is missing or
    damaged.
    """
    dedup, documents = config.dedup, clean_documents(config, clean)
    num_tasks = len(documents.subsets)
    parts, partitions = -(-num_tasks // TOGETHER), -(-num_tasks // TASKS_A_PARTITION) * dedup.exact
    minhash = minhash_of(config)
    folders = {name: out / name for name in ("exact", "signatures", "near")}
    result = []
    if dedup.exact:
        function = functools.partial(exact.sort_ids, clean=documents, folder=folders["exact"])
        result.append(Stage("ids", num_tasks, function))
        function = functools.partial(
            exact.find_exact, clean=documents, folder=folders["exact"], num_partitions=partitions
        )
        result.append(Stage("exact", partitions, function))
    if dedup.near:
        function = functools.partial(
            sign, clean=documents, exact_folder=folders["exact"], folder=folders["signatures"],
            num_partitions=partitions, config=minhash,
            exempt=frozenset(name for name, chosen in config.subsets.items() if chosen.conversations),
        )  # fmt: skip
        result.append(Stage("signatures", num_tasks, function))
        function = functools.partial(
            near.find_near, signatures=folders["signatures"], folder=folders["near"],
            num_tasks=num_tasks, parts=parts, config=minhash,
        )  # fmt: skip
        result.append(Stage("near", minhash.bands * parts, function))
    pairs = {
        "exact": [exact.pairs_path(folders["exact"], partition) for partition in range(partitions)],
        "near": [
            near.pairs_path(folders["near"], *divmod(rank, parts)) for rank in range(minhash.bands * parts * dedup.near)
        ],
    }
    result.append(Stage("clusters", 1, functools.partial(find_clusters, clean=documents, folder=out, **pairs)))
    function = functools.partial(write_duplicates, clean=documents, folder=out, sources_kept=dedup.sources_kept)
    return [*result, Stage("duplicates", parts, function)]


def minhash_of(config: ConfigDict) -> MinHash:
    """The parameters of a recipe."""
    return MinHash(**{key: config.dedup[key] for key in MinHash._fields})


def sign(
    rank: int,
    *,
    clean: Clean,
    exact_folder: Path,
    folder: Path,
    num_partitions: int,
    config: MinHash,
    exempt: frozenset[str] = frozenset(),
) -> None:
    """Writes the signatures of a task's documents that are no exact copies (num_partitions=0: of all).

    Subsets that are `exempt` have none: their documents are nearly the same as no other.
    """
    if clean.subsets[rank] in exempt:
        write_signatures((), folder, rank, config)
        return
    removed = (
        exact.removed_of_task(rank, folder=exact_folder, num_partitions=num_partitions).tolist()
        if num_partitions
        else []
    )
    expected = len(read_index(clean, rank, ["num_bytes"]))
    path = clean.folder / "documents" / f"{rank:05d}.jsonl.zst"
    seen = 0

    def remaining():
        nonlocal seen
        gone = iter(removed)
        skip = next(gone, None)
        for seen, document in enumerate(read_documents(path), 1):
            if seen - 1 == skip:
                skip = next(gone, None)
            else:
                yield seen - 1, document.text
        if seen != expected:
            raise StorageError(f"{path} has {seen} documents, its index {expected}: remove its stage and prepare again")

    write_signatures(remaining(), folder, rank, config)


def write_duplicates(group: int, *, clean: Clean, folder: Path, sources_kept: int) -> None:
    """Writes <rank>.parquet (ROWS) for each of a group of tasks of the clean documents."""
    first, last = group * TOGETHER, min(len(clean.subsets), (group + 1) * TOGETHER) - 1
    fields = [pc.field("task"), pc.field("survivor_task")]
    removed, kept = ((field >= first) & (field <= last) for field in fields)
    try:
        table = pq.read_table(folder / "members.parquet", filters=removed | kept)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{folder}/members.parquet cannot be read ({error}): prepare again") from error
    members = {name: table[name].to_numpy() for name in table.column_names}
    details = _details(members, (first, last), clean, sources_kept)
    for rank in range(first, last + 1):
        rows = []
        ours = [members[name][members["task"] == rank].tolist() for name in MEMBERS.names[1:]]
        for index, *survivor, is_exact in zip(*ours, strict=True):
            stays = (survivor := tuple(survivor)) == (rank, index)
            reason = None if stays else "exact" if is_exact else "near"
            copies, by, sources = details[survivor] if stays else (1, [], [])
            rows.append((index, reason, *survivor, copies, by, sources))
        columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in ROWS]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, ROWS, strict=True)]
        with whole_file(folder / f"{rank:05d}.parquet") as file:
            pq.write_table(pa.table(arrays, schema=ROWS), file, compression="zstd")


def _details(members: dict[str, np.ndarray], ranks: tuple[int, int], clean: Clean, sources_kept: int) -> dict:
    """{survivor: (copies, by, sources)} of the survivors in tasks ranks[0] to ranks[1]."""
    by: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    sources: dict[tuple[int, int], list[str]] = defaultdict(list)
    for task, where in task_bounds(members["task"], len(clean.subsets)):
        survivors = members["survivor_task"][where]
        [ours] = np.nonzero((survivors >= ranks[0]) & (survivors <= ranks[1]))
        if not len(ours):
            continue
        mine = {name: column[where][ours].tolist() for name, column in members.items()}
        rows = read_index(clean, task, ["source", "dump"]).take(mine["index"]).to_pydict()
        subset = clean.subsets[task]
        for index, *survivor, dump, source in zip(
            mine["index"], mine["survivor_task"], mine["survivor_index"], rows["dump"], rows["source"], strict=True
        ):
            key = tuple(survivor)
            by[key][f"{subset}/{dump}" if dump else subset] += 1
            if key != (task, index):
                sources[key].append(source)
    return {
        key: (
            counts.total(),
            [{"name": name, "count": count} for name, count in sorted(counts.items())],
            heapq.nsmallest(sources_kept, sources[key]),
        )
        for key, counts in by.items()
    }
