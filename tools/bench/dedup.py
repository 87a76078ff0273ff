"""Deduplication beside datatrove's, as JSON lines: what it finds, what it costs. Makes its own data.

    python tools/bench/dedup.py                        planted duplicates, then this machine's own text files, 170 MB
    python tools/bench/dedup.py --shipped DIRECTORY... the files of those; datatrove's spaCy and SHA-1 as well
    python tools/bench/dedup.py --smoke                a few MB

"planted": for each kind of copy, how many were found and what 1 - (1 - J^r)^b says of their true Jaccard similarities J
(mean and standard deviation), and how many removed documents were copies of their survivor.
"corpus": each engine in one process of its own, all stages from reading to writing what is kept; CPU seconds with
imports and children; near-duplicates only, but for "k2jax exact+near". `same_clusters`: the partition is that of
datatrove with the same parameters; which document of a cluster it keeps depends on the order of its pairs.
"clusters": peak memory and CPU seconds of finding what edges connect; datatrove's holds all documents that have a
duplicate, ours a part of them.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dedup_texts import default_directories, pairs, similarity, text_files  # noqa: E402

from k2jax import paths  # noqa: E402
from k2jax.errors import ConfigError, run_main  # noqa: E402
from k2jax.prepare import recipe  # noqa: E402
from k2jax.prepare.dedup import components, duplicates  # noqa: E402
from k2jax.prepare.dedup.minhash import MinHash  # noqa: E402
from k2jax.prepare.documents import document, read_documents, write_documents  # noqa: E402
from k2jax.prepare.engine.engine import Stage  # noqa: E402
from k2jax.prepare.shuffle import Shuffle, partitions_for  # noqa: E402

PAIR = np.dtype([("task", "<u4"), ("index", "<u4"), ("other_task", "<u4"), ("other_index", "<u4")])  # datatrove's
SETS = {"fineweb": MinHash("words", 5, 14, 8, 1), "txt360": MinHash("characters", 13, 9, 13, 1)}
TASKS = 8
SURVIVOR = ("survivor_rank", "survivor_index")


def recipe_of(name: str, exact: bool) -> recipe.ConfigDict:
    """One subset of TASKS tasks, deduplicated with a set of parameters."""
    config = recipe.base()
    config.dedup.update({"exact": exact, **SETS[name]._asdict()})
    config.subsets.files = recipe.subset("text:*", tasks=TASKS)
    return config.lock()


def write_clean(folder: Path, tasks: list[list[tuple[str, str]]]) -> None:
    """(name, text) of each task as clean documents, and as JSON lines for datatrove."""
    (folder / "clean" / "index").mkdir(parents=True)
    (folder / "jsonl").mkdir()
    for rank, rows in enumerate(tasks):
        made = [document(text, subset="files", source=name, dump=None) for name, text in rows]
        write_documents(folder / "clean" / "documents" / f"{rank:05d}.jsonl.zst", made)
        columns = {
            "id": pa.array([bytes.fromhex(one.id) for one in made], pa.binary(32)),
            "source": pa.array([name for name, _ in rows]),
            "dump": pa.array([None] * len(rows), pa.string()),
            "num_bytes": pa.array([len(text.encode()) for _, text in rows], pa.int64()),
        }
        pq.write_table(pa.table(columns), folder / "clean" / "index" / f"{rank:05d}.parquet")
        with open(folder / "jsonl" / f"{rank:05d}.jsonl", "w") as file:
            for one in made:
                file.write(json.dumps({"id": one.id, "text": one.text}, ensure_ascii=False) + "\n")


# --- Engines, each run as `--engine=NAME --parameters=SET --folder=FOLDER` in a process of its own --------------------


def run_stages(stages: Iterable[Stage]) -> None:
    """All tasks of all stages, one after the other."""
    for stage in stages:
        for rank in range(stage.tasks):
            stage.function(rank)


def run_k2jax(name: str, folder: Path, exact: bool) -> None:
    """Our stages, and what they keep."""
    out = folder / "k2jax"
    run_stages(duplicates.stages(recipe_of(name, exact), folder / "clean", out))
    for rank in range(TASKS):
        rows = pq.read_table(out / f"{rank:05d}.parquet", columns=["index", "reason"], partitioning=None).to_pydict()
        gone = {index for index, reason in zip(rows["index"], rows["reason"], strict=True) if reason}
        documents = enumerate(read_documents(folder / "clean" / "documents" / f"{rank:05d}.jsonl.zst"))
        kept = (one for index, one in documents if index not in gone)
        write_documents(out / "kept" / f"{rank:05d}.jsonl.zst", kept)


def run_datatrove(name: str, folder: Path, shipped: bool) -> None:
    """datatrove's four stages; words by `str.split` and XXH64, or as shipped by spaCy and SHA-1."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    out, config = folder / "datatrove", datatrove_config(name, "sha1" if shipped else "xxhash")

    def read() -> JsonlReader:
        return JsonlReader(str(folder / "jsonl"), glob_pattern="*.jsonl")

    def run(step: str, tasks: int, *pipeline: object) -> None:
        LocalPipelineExecutor(list(pipeline), tasks=tasks, workers=1, logging_dir=str(out / "logs" / step)).run()

    run("1", TASKS, read(), signature_stage(name, str(out / "signatures"), config, shipped))
    buckets = minhash.MinhashDedupBuckets(str(out / "signatures"), str(out / "near"), config=config)
    run("2", config.num_buckets, buckets)
    run("3", 1, minhash.MinhashDedupCluster(str(out / "near"), str(out / "removed"), config, save_cluster_id=True))
    writer = JsonlWriter(str(out / "kept"), compression=None)
    run("4", TASKS, read(), minhash.MinhashDedupFilter(str(out / "removed")), writer)


def datatrove_config(name: str, hash_fc: str) -> object:
    """datatrove's configuration of a set."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    _, n_grams, bands, hashes, seed = SETS[name]
    return MinhashConfig(n_grams, bands, hashes, seed, hash_config=HashConfig(precision=64, hash_fc=hash_fc))


def signature_stage(name: str, folder: str, config: object, shipped: bool) -> object:
    """datatrove's first stage; of characters as SlimPajama's get_features makes them."""
    import string

    import xxhash
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Split(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        sent_tokenize = span_tokenize = word_tokenize

    class Characters(MinhashDedupSignature):
        def get_shingles(self, text: str) -> np.ndarray:
            text = text.lower().translate(str.maketrans("", "", string.punctuation))
            text = re.sub(r"\s+", " ", text.strip())
            grams = (text[at : at + config.n_grams] for at in range(len(text) - config.n_grams + 1))
            return np.fromiter((xxhash.xxh64_intdigest(gram) for gram in grams), np.uint64).reshape(-1, 1)

    stage = MinhashDedupSignature if SETS[name].unit == "words" else Characters
    return stage(folder, config) if shipped else stage(folder, config, language=Split())


def run_clusters(engine: str, folder: Path) -> None:
    """What is connected by pairs in datatrove's files, of which ours makes edges first."""
    if engine == "datatrove":
        from datatrove.pipeline.dedup.minhash import MinhashDedupCluster

        MinhashDedupCluster(str(folder), str(folder / "out"), datatrove_config("fineweb", "xxhash")).run()
        return
    files = sorted(folder.glob("*.dups"))
    pairs = files[0].stat().st_size // PAIR.itemsize  # about as many as documents
    edges = Shuffle(folder / "edges", len(files), partitions_for(pairs * 2 * components.EDGE.itemsize))
    for rank, path in enumerate(files):
        pairs = np.fromfile(path, PAIR)
        ends = (pairs[f"{end}task"].astype(np.uint64) << 32 | pairs[f"{end}index"] for end in ("", "other_"))
        with edges.writer(rank) as out:
            components.add_edges(out, edges, *ends)
    run_stages(components.rounds(edges, folder / "rounds"))


ENGINES = {
    "k2jax": lambda name, folder: run_k2jax(name, folder, exact=False),
    "k2jax exact+near": lambda name, folder: run_k2jax(name, folder, exact=True),
    "datatrove": lambda name, folder: run_datatrove(name, folder, shipped=False),
    "datatrove as shipped": lambda name, folder: run_datatrove(name, folder, shipped=True),
    "clusters of k2jax": lambda name, folder: run_clusters("k2jax", folder),
    "clusters of datatrove": lambda name, folder: run_clusters("datatrove", folder),
}


def measure(engine: str, name: str, folder: Path) -> dict[str, float]:
    """Runs an engine; its CPU seconds and peak memory."""
    command = [sys.executable, __file__, f"--engine={engine}", f"--parameters={name}", f"--folder={folder}"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{engine} failed:\n" + (folder / "log").read_text()[-3000:])
    peak = int((folder / "log").read_text().split()[-1])  # not ru_maxrss, which starts with what its parent has
    return {"cpu_s": round(usage.ru_utime + usage.ru_stime, 2), "peak_mb": round(peak * 1024 / 1e6)}


# --- A real corpus ----------------------------------------------------------------------------------------------------


def ends(folder: Path) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Each document that is in a cluster of ours, with the one that stays."""
    for rank in range(TASKS):
        rows = pq.read_table(folder / "k2jax" / f"{rank:05d}.parquet", partitioning=None).to_pydict()
        for index, *survivor in zip(*(rows[name] for name in ("index", *SURVIVOR)), strict=True):
            yield (rank, index), tuple(survivor)


def partition(engine: str, folder: Path) -> set[frozenset[tuple[int, int]]]:
    """The clusters that an engine left."""
    found: dict[object, set[tuple[int, int]]] = {}
    if engine == "k2jax":
        for node, survivor in ends(folder):
            found.setdefault(survivor, set()).add(node)
    for path in (folder / "datatrove" / "removed").glob("*.clusters") if engine == "datatrove" else ():
        for index, cluster in np.fromfile(path, "<u4").reshape(-1, 2).tolist():
            found.setdefault(cluster, set()).add((int(path.stem), index))
    return {frozenset(cluster) for cluster in found.values()}


def kept(engine: str, folder: Path) -> set[tuple[int, int]]:
    """Of each cluster what an engine keeps: datatrove what its pairs happen to make the root, k2jax the first."""
    if engine == "k2jax":
        return {node for node, survivor in ends(folder) if node == survivor}
    files = removed_files(folder / "datatrove" / "removed")
    rows = {int(Path(name).stem): np.frombuffer(data, "<u4").tolist() for name, data in files.items()}
    gone = {(rank, index) for rank, indices in rows.items() for index in indices}
    return {node for cluster in partition("datatrove", folder) for node in cluster} - gone


def removed_files(folder: Path) -> dict[str, bytes]:
    """What datatrove's third stage removes."""
    return {path.name: path.read_bytes() for path in folder.glob("*.remove")}


def corpus(directories: list[Path], megabytes: float, shipped: bool) -> None:
    """Prints a line for each engine and set of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        tasks: list[list[tuple[str, str]]] = [[] for _ in range(TASKS)]
        size = number = 0
        for number, (path, text) in enumerate(text_files(directories)):
            tasks[number % TASKS].append((path, text))
            if (size := size + len(text.encode())) >= megabytes * 1e6:
                break
        else:
            print(f"only {size / 1e6:.0f} MB of text found: name more directories", file=sys.stderr)
        write_clean(Path(folder), tasks)
        del tasks
        for name in SETS:
            engines = ["datatrove", "k2jax", "k2jax exact+near"]
            if shipped and SETS[name].unit == "words":
                engines.append("datatrove as shipped")  # last: it writes over datatrove's files
            for engine in engines:
                corpus_line(engine, name, Path(folder), size, number + 1)


def corpus_line(engine: str, name: str, folder: Path, size: int, documents: int) -> None:
    """Runs an engine over what is in `folder` and prints its line."""
    shutil.rmtree(folder / engine.split()[0], ignore_errors=True)
    line = {"benchmark": "corpus", "engine": engine, "parameters": name, "mb": round(size / 1e6, 1)}
    line |= {"documents": documents, **measure(engine, name, folder)}
    line["mb_per_s_per_core"] = round(size / 1e6 / line["cpu_s"], 2)
    if engine.startswith("k2jax"):
        removed = json.loads((folder / "k2jax" / "summary.json").read_text())["removed"]["files"]
        line["removed"] = sum(removed.values())
    else:
        line["removed"] = sum(map(len, removed_files(folder / "datatrove" / "removed").values())) // 4
    if engine == "k2jax":
        clusters, ours, theirs = partition("k2jax", folder), kept("k2jax", folder), kept("datatrove", folder)
        line["same_clusters"] = clusters == partition("datatrove", folder)
        line["one_kept_of_each"] = all(len(one & ours) == len(one & theirs) == 1 for one in clusters)
        line["same_kept"] = len(ours & theirs) / max(1, len(clusters))
    print(json.dumps(line), flush=True)


def cluster_memory(nodes: int) -> None:
    """Prints both engines' peak memory for random clusters of two to six, every pair in 14 bands."""
    order = np.random.default_rng(0).permutation(nodes).astype(np.uint32)
    pairs = np.empty(nodes - 1, PAIR)
    pairs["task"], pairs["index"] = order[:-1] % TASKS, order[:-1] // TASKS
    pairs["other_task"], pairs["other_index"] = order[1:] % TASKS, order[1:] // TASKS
    pairs = pairs[np.arange(nodes - 1) % 4 != 3]
    for engine in ("datatrove", "k2jax"):
        with tempfile.TemporaryDirectory() as folder:
            for band in range(14):
                pairs.tofile(Path(folder) / f"{band:05d}_00.dups")
            line = {"benchmark": "clusters", "engine": engine, "nodes": nodes}
            print(json.dumps(line | measure(f"clusters of {engine}", "fineweb", Path(folder))), flush=True)


# --- Planted duplicates -----------------------------------------------------------------------------------------------


def planted_lines(name: str, each: int) -> None:
    """Prints a line for each kind of copy: found, and expected of their similarities."""
    config, made = SETS[name], list(pairs(SETS[name], each))
    texts = [text for pair in made for text in (pair.text, pair.copy)]
    place = [(number % TASKS, number // TASKS) for number in random.Random(2).sample(range(len(texts)), len(texts))]
    tasks = [[("", "")] * (len(texts) // TASKS + 1) for _ in range(TASKS)]
    for number, (task, index) in enumerate(place):
        tasks[task][index] = (str(number), texts[number])
    with tempfile.TemporaryDirectory() as folder:
        write_clean(Path(folder), tasks)
        run_stages(duplicates.stages(recipe_of(name, exact=True), Path(folder) / "clean", Path(folder) / "k2jax"))
        cluster = {member: number for number, group in enumerate(partition("k2jax", Path(folder))) for member in group}
        numbers = {node: number for number, node in enumerate(place)}
        found = [(node, survivor) for node, survivor in ends(Path(folder)) if node != survivor]
        removed = [(numbers.get(node, -1), numbers.get(survivor, -2)) for node, survivor in found]
    removed = [pair for pair in removed if min(pair) >= 0]  # but for the empty texts that fill up the tasks
    right = sum(one // 2 == two // 2 and made[one // 2].kind != "unrelated" for one, two in removed)
    for kind in dict.fromkeys(pair.kind for pair in made):
        ours = [number for number, pair in enumerate(made) if pair.kind == kind]
        true = np.array([similarity(made[number].text, made[number].copy, config) for number in ours])
        chance = 1 - (1 - true**config.hashes_per_band) ** config.bands
        nodes = [(place[2 * number], place[2 * number + 1]) for number in ours]
        found = sum(one in cluster and cluster[one] == cluster.get(two) for one, two in nodes)
        line = {"benchmark": "planted", "parameters": name, "kind": kind, "pairs": len(ours), "found": found}
        line |= {"expected": round(chance.sum(), 1), "deviation": round(float((chance * (1 - chance)).sum() ** 0.5), 1)}
        print(json.dumps(line | {"similarity": round(true.mean(), 3)}), flush=True)
    line = {"benchmark": "planted", "parameters": name, "kind": "all", "removed": len(removed)}
    print(json.dumps({**line, "precision": round(right / max(1, len(removed)), 4)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths.add(parser, "directories", nargs="*", help="of text files; by default, this machine's")
    parser.add_argument("--megabytes", type=float, default=170)
    parser.add_argument("--shipped", action="store_true", help="datatrove with spaCy too, which must be installed")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--parameters", choices=SETS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        ENGINES[args.engine](args.parameters, args.folder)
        print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1), file=sys.stderr)
        return
    if missing := [str(path) for path in args.directories if not path.is_dir()]:
        raise ConfigError(f"{', '.join(missing)}: no such directory")
    for name in SETS:
        planted_lines(name, each=4 if args.smoke else 300)
    directories = args.directories or ([ROOT / "k2jax", ROOT / "tests"] if args.smoke else default_directories())
    corpus(directories, args.megabytes, args.shipped)
    cluster_memory(10_000 if args.smoke else 1_000_000)


if __name__ == "__main__":
    run_main(main)
