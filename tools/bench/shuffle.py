"""Exact duplicates among many records by our shuffle, DuckDB, polars, Ray Data and Spark: same answer, what each takes.

    pip install duckdb polars 'ray[data]' pyspark       (those that are there are run; Spark needs Java)
    python tools/bench/shuffle.py [--millions=20] [--files=200] [--workers=2]

The records are those of stage `ids`: 128 bits of a text's SHA-256, the order of survival, task and index; most
texts come twice or more. Each engine reads the files, and gives for every record that goes the one that stays.
Each runs in a process of its own; CPU-seconds are those of it and all that it started. One JSON line each, with the
digest of the answer.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("order", "<u4"), ("task", "<u4"), ("index", "<u4")])
COLUMNS = ["task", "index", "other_task", "other_index"]
SURVIVOR = """
    SELECT task, index, other_task, other_index FROM (
        SELECT task, index, row_number() OVER same AS place,
            first_value(task) OVER same AS other_task, first_value(index) OVER same AS other_index
        FROM records WINDOW same AS (PARTITION BY high, low ORDER BY "order", task, index))
    WHERE place > 1
"""


def write_records(folder: Path, number: int, num_files: int) -> None:
    """Signed numbers, for engines that have no others."""
    draw = np.random.default_rng(0)
    each = number // num_files
    for task in range(num_files):
        text = draw.integers(0, number * 3 // 4, each).astype(np.uint64)
        high = text * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(1)
        columns = {
            "high": high.astype(np.int64),
            "low": (high * np.uint64(0xD6E8FEB86659FD93) >> np.uint64(1)).astype(np.int64),
            "order": draw.integers(0, 100, each).astype(np.int64),
            "task": np.full(each, task, np.int64),
            "index": np.arange(each, dtype=np.int64),
        }
        pq.write_table(pa.table(columns), folder / f"{task:05d}.parquet")


def digest(rows: np.ndarray) -> str:
    """Of (n, 4) in the order of COLUMNS, whatever their order is."""
    return hashlib.sha256(rows[np.lexsort(rows.T[::-1])].astype("<i8").tobytes()).hexdigest()[:16]


# ---- engines ---------------------------------------------------------------------------------------------------------


def ours(files: list[Path], folder: Path, workers: int) -> np.ndarray:
    """Two stages, as deduplication has them."""
    from k2jax.prepare.shuffle import Shuffle, partitions_for

    number = sum(pq.read_metadata(path).num_rows for path in files)
    shuffle = Shuffle(folder / "ids", len(files), partitions_for(number * RECORD.itemsize))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(_deal, files=files, shuffle=shuffle), range(len(files))))
        for stage in shuffle.stages("ids"):
            list(pool.map(stage.function, range(stage.tasks)))
        return np.concatenate(list(pool.map(partial(_find, shuffle=shuffle), range(shuffle.partitions))))


def _deal(rank: int, files: list[Path], shuffle) -> None:
    table = pq.read_table(files[rank])
    records = np.empty(len(table), RECORD)
    for name in RECORD.names:
        records[name] = table[name].to_numpy()
    with shuffle.writer(rank) as out:
        out.add_records((records["high"] >> np.uint64(31)) * np.uint64(shuffle.partitions) >> np.uint64(32), records)


def _find(partition: int, shuffle) -> np.ndarray:
    found = shuffle.read_records(partition, RECORD)
    found = found[np.lexsort([found[name] for name in ("index", "task", "order", "low", "high")])]
    same = (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])
    removed = np.r_[False, same]
    survivor = np.maximum.accumulate(np.where(removed, 0, np.arange(len(found))))
    pairs = (found["task"], found["index"], found["task"][survivor], found["index"][survivor])
    return np.stack([one[removed].astype(np.int64) for one in pairs], axis=1)


def duckdb(files: list[Path], folder: Path, workers: int) -> np.ndarray:
    """One query, out of core."""
    import duckdb

    with duckdb.connect(config={"threads": workers, "temp_directory": str(folder), "memory_limit": "4GB"}) as db:
        db.execute(f"CREATE VIEW records AS SELECT * FROM read_parquet('{files[0].parent}/*.parquet')")
        return _rows(db.execute(SURVIVOR).to_arrow_table())


def polars(files: list[Path], folder: Path, workers: int) -> np.ndarray:
    """A lazy frame, by its streaming engine."""
    import polars as pl

    key, order = ["high", "low"], ["order", "task", "index"]
    frame = pl.scan_parquet(f"{files[0].parent}/*.parquet")
    least = [pl.col(name).sort_by(order).first().alias(f"other_{name}") for name in ("task", "index")]
    first = frame.group_by(key).agg(*least, pl.len().alias("copies")).filter(pl.col("copies") > 1)
    same = (pl.col("task") == pl.col("other_task")) & (pl.col("index") == pl.col("other_index"))
    return _rows(frame.join(first, on=key).filter(~same).select(COLUMNS).collect(engine="streaming").to_arrow())


def ray(files: list[Path], folder: Path, workers: int) -> np.ndarray:
    """Ray Data: a shuffle by a range of the key, each range sorted as by ours."""
    import ray

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, object_store_memory=2 << 30)
    ray.data.DataContext.get_current().enable_progress_bars = False
    parts = 64

    def find(table: pa.Table) -> pa.Table:
        found = np.empty(len(table), RECORD)
        for name in RECORD.names:
            found[name] = table[name].to_numpy()
        found = found[np.lexsort([found[name] for name in ("index", "task", "order", "low", "high")])]
        removed = np.r_[False, (found["high"][1:] == found["high"][:-1]) & (found["low"][1:] == found["low"][:-1])]
        survivor = np.maximum.accumulate(np.where(removed, 0, np.arange(len(found))))
        pairs = (found["task"], found["index"], found["task"][survivor], found["index"][survivor])
        return pa.table({name: one[removed].astype(np.int64) for name, one in zip(COLUMNS, pairs, strict=True)})

    def part(table: pa.Table) -> pa.Table:
        return table.append_column("part", pa.array(table["high"].to_numpy() % parts))

    data = ray.data.read_parquet([str(path) for path in files]).map_batches(part, batch_format="pyarrow")
    found = data.groupby("part", num_partitions=parts).map_groups(find, batch_format="pyarrow")
    rows = [_rows(one) for one in found.iter_batches(batch_format="pyarrow", batch_size=None)]
    ray.shutdown()
    return np.concatenate(rows)


def spark(files: list[Path], folder: Path, workers: int) -> np.ndarray:
    """Spark SQL, the query of DuckDB's."""
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.master(f"local[{workers}]")
        .config("spark.driver.memory", "4g")
        .config("spark.sql.shuffle.partitions", "64")
        .config("spark.local.dir", str(folder))
        .getOrCreate()
    )
    session.read.parquet(str(files[0].parent)).createOrReplaceTempView("records")
    query = SURVIVOR.replace('"order"', "`order`")
    session.sql(query).write.parquet(str(folder / "found"))
    session.stop()
    return _rows(pq.read_table(folder / "found"))


def _rows(table: pa.Table) -> np.ndarray:
    return np.stack([table[name].to_numpy().astype(np.int64) for name in COLUMNS], axis=1)


ENGINES: dict[str, Callable] = {"ours": ours, "duckdb": duckdb, "polars": polars, "ray": ray, "spark": spark}
PACKAGES = {"ours": "zstandard", "duckdb": "duckdb", "polars": "polars", "ray": "ray.data", "spark": "pyspark"}


# ---- measuring -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(found: dict):
    """Notes CPU-seconds and the peak of memory of all processes below this one, those that ended included."""
    over, cpu, peak = threading.Event(), {}, 0

    def look() -> None:
        nonlocal peak
        while not over.wait(0.2):
            total = 0
            for one in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    times, memory = one.cpu_times(), one.memory_info()
                    cpu[one.pid] = times.user + times.system
                    total += memory.rss - getattr(memory, "shared", 0)
            peak = max(peak, total)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    start = time.monotonic()
    yield
    found["seconds"] = time.monotonic() - start
    over.set()
    thread.join()
    found |= {"cpu_seconds": sum(cpu.values()), "peak_mib": peak / 2**20}


def measure(name: str, folder: Path, workers: int) -> dict:
    """One engine, in this process."""
    files = sorted((folder / "records").glob("*.parquet"))
    found: dict = {"engine": name}
    with tempfile.TemporaryDirectory(dir=folder) as own, watched(found):
        rows = ENGINES[name](files, Path(own), workers)
    return found | {"pairs": len(rows), "digest": digest(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--millions", type=float, default=20)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, Path(args.folder), args.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "records").mkdir()
        write_records(Path(folder) / "records", int(args.millions * 1e6), args.files)
        for name in args.engines:
            print(json.dumps(in_a_process(name, folder, args.workers) if there(name) else {"absent": name}), flush=True)


def there(name: str) -> bool:
    """Whether the engine is installed."""
    try:
        return importlib.util.find_spec(PACKAGES[name]) is not None
    except ModuleNotFoundError:
        return False


def in_a_process(name: str, folder: str, workers: int) -> dict:
    """What `measure` gives, or why it does not."""
    command = [sys.executable, __file__, f"--one={name}", f"--folder={folder}", f"--workers={workers}"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return {"failed": name, "why": lines[-1:]} if done.returncode else json.loads(lines[-1])


if __name__ == "__main__":
    main()
