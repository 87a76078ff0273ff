"""Time and memory of the data order at K2's size, as one JSON line. No data is needed.

    python tools/bench/order.py
"""

import json
import random
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from k2jax.data.manifest import StoreSummary, build_manifest  # noqa: E402
from k2jax.data.order import Order  # noqa: E402
from k2jax.errors import run_main  # noqa: E402

# K2's first stage (k2-facts 4.1): billions of tokens, repeats on the data card.
STAGE_1 = {
    "refinedweb": (612.3, 1),
    "redpajama.wikipedia": (22.1, 6),
    "s2orc": (107.9, 1),
    "redpajama.book": (80.6, 1),
    "pile-of-law": (76.7, 1),
    "starcoder": (132.6, 0.5),
    "redpajama.stackexchange": (61.1, 1),
    "starcoder.fim": (67.6, 0.5),
    "starcoder.spm": (67.6, 0.5),
    "redpajama.arxiv": (27.3, 1),
    "pubmed-central": (26, 1),
    "pubmed-abstracts": (4.77, 3),
    "uspto": (4.77, 3),
    "dm-math": (4.33, 3),
}
# The second (k2-facts 4.2): billions of tokens read. Stores that stage 1 lacks hold just these.
STAGE_2 = {
    "python": 20.5,
    "open-web-math": 14.6,
    "algebraic-stack": 10.9,
    "books": 5.8,
    "simple-wiki": 4.3,
    "peS2o": 1.2,
    "redpajama.arxiv": 2,
    "redpajama.book": 2,
    "redpajama.wikipedia": 2,
    "pile-of-law": 2,
    "pubmed-central": 2,
    "s2orc": 2,
}


def k2_manifest() -> dict[str, Any]:
    """A manifest of K2's size: 360 chunks of 941 steps of 2040 rows at 2048, then 20 chunks at 8192."""
    billions = STAGE_2 | {name: tokens for name, (tokens, _) in STAGE_1.items()}
    stores = {}
    for name, tokens in billions.items():
        num_tokens = round(tokens * 10**9)
        stores[name] = StoreSummary(
            path=f"stores/{name}",
            root_digest=name.encode().hex().ljust(64, "0"),
            tokenizer_sha256="0" * 64,
            vocab_size=32032,
            eos_id=2,
            num_tokens=num_tokens,
            num_train_tokens=num_tokens,
            num_documents=num_tokens // 1000,
        )
    stages = [
        {
            "name": "stage1",
            "sequence_length": 2048,
            "rows_per_step": 2040,
            "steps_per_chunk": 941,
            "chunks": 360,
            "mix": {name: repeats for name, (_, repeats) in STAGE_1.items()},
        },
        {
            "name": "stage2",
            "sequence_length": 8192,
            "rows_per_step": 510,
            "steps_per_chunk": 831,  # * 510 * 8192 = 3.47B tokens a chunk
            "chunks": 20,
            "mix": {name: tokens / billions[name] for name, tokens in STAGE_2.items()},
        },
    ]
    return build_manifest(stages=stages, stores=stores, seed=22238, label_shift="next")


def median_us(function: Any, arguments: list[Any]) -> float:
    """Median microseconds of a call of `function`, over the arguments."""
    times = []
    for argument in arguments:
        begin = time.perf_counter_ns()
        function(argument)
        times.append(time.perf_counter_ns() - begin)
    return statistics.median(times) / 1000


def main() -> None:
    """The command."""
    manifest = k2_manifest()
    tracemalloc.start()
    begin = time.perf_counter()
    order = Order(manifest)
    build_ms = 1000 * (time.perf_counter() - begin)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    draw = random.Random(0)
    steps = [draw.randint(1, 338_760) for _ in range(300)]
    positions = [draw.randrange(order.num_positions) for _ in range(20_000)]
    row = order.row(positions[0])
    result = {
        "row_us": median_us(order.row, positions),
        "batch_2040_ms": median_us(lambda step: order.rows(order.positions(step)), steps) / 1000,
        "find_us": median_us(lambda _: order.find(row.stage, row.subset, row.window), steps),
        "build_ms": build_ms,
        "build_peak_mb": peak / 1e6,
        "held_mb": held / 1e6,
        "positions": order.num_positions,
        "steps": order.num_steps,
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    run_main(main)
