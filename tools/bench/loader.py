"""How fast the loader is on one core, as one JSON line, beside what it stands on. Makes its own data.

    python tools/bench/loader.py

All in tokens/s (windows of 2,048, 32 a step, in the loader's shuffled order), medians of --repeats rounds:
loader (reading, checking and SHA-256 of every row), Store.read alone, and a numpy memmap of the same tokens.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from k2jax.data.loader import make_loader  # noqa: E402
from k2jax.data.manifest import build_manifest  # noqa: E402
from k2jax.data.order import Order  # noqa: E402
from k2jax.data.store import Store  # noqa: E402
from k2jax.data.store_writer import StoreWriter  # noqa: E402
from k2jax.errors import run_main  # noqa: E402

LENGTH, ROWS, VOCAB_SIZE = 2048, 32, 32_032
DOCUMENT_TOKENS = 10_000


def write_store(path: Path, num_tokens: int, chunk_tokens: int) -> tuple[Store, np.memmap]:
    """A store of random tokens, and the same tokens as a plain file."""
    draw = np.random.default_rng(0)
    options = {
        "tokenizer_sha256": "0" * 64,
        "vocab_size": VOCAB_SIZE,
        "eos_id": 2,
        "chunk_tokens": chunk_tokens,
    }
    with StoreWriter(path, **options) as writer:
        for i in range(num_tokens // DOCUMENT_TOKENS):
            writer.add(draw.integers(0, VOCAB_SIZE, DOCUMENT_TOKENS - 1), id=f"{i:064x}", source="random")
        writer.finish()
    store = Store.open(path)
    plain = np.concatenate(
        [store.read([a], DOCUMENT_TOKENS)[0] for a in range(0, num_tokens, DOCUMENT_TOKENS)]
    )
    plain.astype(np.uint16).tofile(path.with_suffix(".bin"))
    return store, np.memmap(path.with_suffix(".bin"), np.uint16, "r")


def tokens_per_s(read_steps: Callable[[], int]) -> float:
    """Of one call, which returns how many steps it read."""
    begin = time.perf_counter()
    steps = read_steps()
    return steps * ROWS * LENGTH / (time.perf_counter() - begin)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=100_000_000, help="in the store, two bytes each")
    parser.add_argument("--chunk-tokens", type=int, default=1 << 16, help="of the store")
    parser.add_argument("--steps", type=int, default=400, help="in a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--threads", type=int, default=2, help="of the loader")
    args = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):  # those that imports started, too; later ones inherit it
        os.sched_setaffinity(int(thread), {core})

    with tempfile.TemporaryDirectory() as folder:
        store, plain = write_store(Path(folder) / "random", args.tokens, args.chunk_tokens)
        stage = {"name": "all", "sequence_length": LENGTH, "rows_per_step": ROWS, "mix": {"random": 1}}
        stages = [{**stage, "steps_per_chunk": args.steps, "chunks": 1}]
        stores = {"random": store}
        summaries = {"random": store.summary()}
        order = Order(build_manifest(stages=stages, stores=summaries, seed=0, label_shift="next"))
        starts = [order.rows(order.positions(step)).window * LENGTH for step in range(1, args.steps + 1)]

        def loader() -> int:
            options = {"label_shift": "next", "first_step": 1, "last_step": args.steps}
            return sum(1 for _ in make_loader(order, stores, **options, threads=args.threads))

        def store_read() -> int:
            return sum(1 for a in starts if len(store.read(a, LENGTH + 1)))

        def memmap() -> int:
            for some in starts:
                rows = np.empty((ROWS, LENGTH + 1), np.uint32)
                for row, start in zip(rows, some.tolist(), strict=True):
                    row[:] = plain[start : start + LENGTH + 1]
            return len(starts)

        readers = {"loader": loader, "store_read": store_read, "memmap": memmap}
        rounds = [{name: tokens_per_s(read) for name, read in readers.items()} for _ in range(args.repeats)]

    result = {f"{name}_tokens_per_s": round(statistics.median(r[name] for r in rounds)) for name in readers}
    result["loader_min_tokens_per_s"] = round(min(r["loader"] for r in rounds))
    result["loader_of_store_read"] = round(
        statistics.median(r["loader"] / r["store_read"] for r in rounds), 3
    )
    result |= vars(args)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
