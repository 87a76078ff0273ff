"""Full partitions for `scale.py partitions`: one task of each kind, made and run, each in a process.

    python tools/bench/scale_partitions.py make|run KIND FOLDER
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402

from k2jax.data.tokenizer import load_tokenizer, train_bpe  # noqa: E402
from k2jax.files import write_json, write_text  # noqa: E402
from k2jax.prepare import kept, recipe  # noqa: E402
from k2jax.prepare.dedup import components, exact, members, near, shared  # noqa: E402
from k2jax.prepare.dedup.index import Clean, Order, Subset  # noqa: E402
from k2jax.prepare.dedup.streams import add_blocks  # noqa: E402
from k2jax.prepare.documents import document, to_line  # noqa: E402
from k2jax.prepare.shuffle import PARTITION_BYTES, RUN_BYTES, Shuffle  # noqa: E402
from k2jax.prepare.tokens import tokenise  # noqa: E402

TASKS = 10_000
SOURCE = b"crawl-data/CC-MAIN-2024-30/segments/1720763514387.30/warc/CC-MAIN-20240712094214-20240712124214-00123.warc"
TEXT = "the quick brown fox jumps over the lazy dog and some other words of a document " * 40


def one(folder: Path, name: str, partitions: int = 1) -> Shuffle:
    return Shuffle(folder / name, 1, partitions)


def random_records(dtype: np.dtype, size: int, distinct: float) -> np.ndarray:
    """Records of random numbers; of the first two fields `distinct` of so many different values."""
    draw = np.random.default_rng(0)
    found = np.empty(size // dtype.itemsize, dtype)
    key = draw.integers(0, int(len(found) * distinct), len(found)).astype(np.uint64)
    for name in found.dtype.names:
        found[name] = draw.integers(0, 1 << 8 * min(4, found.dtype[name].itemsize), len(found))
    names = found.dtype.names
    found[names[0]] = key * np.uint64(0x9E3779B97F4A7C15)
    if names[1] == "low":
        found["low"] = key
    if "node" in names:
        found["node"] = draw.integers(0, TASKS, len(found)).astype(np.uint64) << 32 | np.arange(len(found)).astype("u8")
    return found


def write(shuffle: Shuffle, records: np.ndarray) -> None:
    with shuffle.writer(0) as out:
        for part in np.array_split(records, 40):
            out.add_records(np.zeros(len(part), np.int64), part)


def make_edges(folder: Path) -> None:
    """Both ends of each: nodes with three neighbours or so."""
    draw = np.random.default_rng(0)
    number = PARTITION_BYTES // components.EDGE.itemsize // 2
    ends = [draw.integers(0, number * 2 // 3, number).astype(np.uint64) for _ in range(2)]
    edges = one(folder, "edges")
    with edges.writer(0) as out:
        for part in np.array_split(np.stack(ends), 40, axis=1):
            components.add_edges(out, edges, *part)


def make_members(folder: Path) -> None:
    """Of three documents a cluster."""
    number = PARTITION_BYTES // 256
    records = np.zeros(number, members.MEMBER)
    records["component"] = np.arange(number) // 3
    records["node"] = np.arange(number)
    write_json(folder / "order.json", Order(number, [""])._asdict())
    with one(folder, "members").writer(0) as out:
        for part in np.array_split(records, 40):
            add_blocks(out, np.zeros(len(part), np.int64), part, [SOURCE] * len(part))


def made_documents(num_bytes: int):
    for i in range(num_bytes // len(TEXT)):
        yield document(f"{i} {TEXT}", subset="web", source=SOURCE.decode(), url=f"https://example.org/{i}")


def make_bucket(folder: Path) -> None:
    """As much text as a bucket has."""
    write_text(folder / "tokenizer.json", train_bpe([TEXT] * 50, 340).to_str())
    dealt = kept.Kept(folder, 1, (kept.Dealt("web", 0, 0, 1),))
    with dealt.shuffle.writer(0) as out:
        for found in made_documents(recipe.base().bucket_bytes):
            out.add(0, to_line(found))


def run_bucket(folder: Path) -> None:
    config = recipe.base()
    config.subsets.web = recipe.subset("jsonl:x")
    dealt = kept.Kept(folder, 1, (kept.Dealt("web", 0, 0, 1),))
    eos = load_tokenizer(folder / "tokenizer.json").eos_id
    tokenise.tokenize(0, config=config.to_dict(), kept=dealt, tokenizer=folder / "tokenizer.json", eos=eos)


def run_writer(folder: Path) -> None:
    """Documents of several runs to the buckets that TxT360's need."""
    shuffle = one(folder, "kept", 86_000)
    with shuffle.writer(0) as out:
        for number, found in enumerate(made_documents(4 * RUN_BYTES)):
            out.add(number * 7919 % 86_000, to_line(found))


def run_survivors(folder: Path) -> None:
    clean = Clean(folder, (Subset("web", 0, TASKS, 0),))
    rows, parts = one(folder, "rows", TASKS), folder / "parts"
    given = {"clean": clean, "order": folder / "order.json", "rows": rows, "parts": parts, "sources_kept": 100}
    members.find_survivors(0, members=one(folder, "members"), **given)


def shared_of(folder: Path) -> shared.Shared:
    """Of one task that writes; those that read are as many as the pieces' documents have."""
    clean = Clean(folder, (Subset("web", 0, 1, 0),))
    return shared.Shared(folder, clean, 1, {"web": "lines"}, {"web": 1}, most=1, characters=20, exact=True)


def edges_of(folder: Path) -> Shuffle:
    return one(folder, "edges", 5_000)


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "exact": (
        lambda folder: write(one(folder, "ids"), random_records(exact.ID, PARTITION_BYTES, 0.7)),
        lambda folder: exact.find_exact(
            0, ids=one(folder, "ids"), removed=one(folder, "removed", TASKS), edges=edges_of(folder)
        ),
    ),
    "near": (
        lambda folder: write(one(folder, "bands"), random_records(near.BAND, PARTITION_BYTES, 0.7)),
        lambda folder: near.find_near(0, bands=one(folder, "bands"), edges=edges_of(folder), first_writer=0),
    ),
    "large_star": (
        make_edges,
        lambda folder: components.large_star(
            0, edges=one(folder, "edges"), out=one(folder, "large", 5_000), unfinished=folder / "unfinished"
        ),
    ),
    "small_star": (
        make_edges,
        lambda folder: components.small_star(0, edges=one(folder, "edges"), out=one(folder, "small", 5_000)),
    ),
    "survivors": (make_members, run_survivors),
    "shared": (
        lambda folder: write(shared_of(folder).pieces, random_records(shared.PIECE, PARTITION_BYTES, 0.5)),
        lambda folder: shared.find(0, shared=shared_of(folder)),
    ),
    "kept": (lambda folder: None, run_writer),
    "tokens": (make_bucket, run_bucket),
}


def main() -> None:
    what, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    make, run = (partial(function, folder) for function in KINDS[kind])
    if what == "make":
        make()
        return
    cpu = time.process_time()
    run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"task": kind, "cpu_seconds": time.process_time() - cpu, "peak_mib": peak}))


if __name__ == "__main__":
    main()
