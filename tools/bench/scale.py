"""What a preparation needs at the size that it is named for, shown on one machine in three ways.

    python tools/bench/scale.py counts [--tasks=100448] [--documents=4.2e10] [--text_bytes=2.2e13]
    python tools/bench/scale.py counts --subset5tb
    python tools/bench/scale.py partitions
    python tools/bench/scale.py run --gigabytes=20 --html_gigabytes=2 --out=DIR

counts      the real number of tasks, partitions, buckets and files, each document of which stands for many: two in a
            task. All stages run, by the command's own code, in this process. One JSON line a stage: tasks, files opened
            in all and by the task that opened most, most of them open at once, CPU-seconds, and the driver's share.
            The numbers of a quarter and a sixteenth of the tasks come first: what grows faster than n log n shows.
partitions  the memory and CPU of one task of each kind that holds a partition, when that is full (shuffle.py).
run         text made here, with duplicates, and pages of such text in web archives, from files to stores; CPU-hours
            and peak memory of each stage, and what that makes for a TB of text, and of HTML that text is taken from.

Defaults of `counts` are TxT360's: 4.2e10 documents in 100,448 tasks, and 5e12 tokens of text that stay; --subset5tb is
5 TB of text in 8,000 tasks. Writing to the disk is not waited for in `counts`.
"""

import argparse
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import prepare  # noqa: E402
import scale_partitions  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from k2jax.data.tokenizer import train_bpe  # noqa: E402
from k2jax.files import whole_file, write_text  # noqa: E402
from k2jax.prepare import build, recipe, shuffle  # noqa: E402
from k2jax.prepare.engine import engine  # noqa: E402

SHARE_OF_WEB = 0.95  # of the tasks; the others are of CURATED
CURATED = tuple(f"curated-{i:02d}" for i in range(14))
SUBSET_5TB = {"tasks": 8_000, "documents": 2e9, "text_bytes": 5e12}
DOCUMENTS, STAY = 2, 0.55  # simulated, in a task; of them stay
TEXT_TASKS, PAGE_TASKS = 64, 16  # of a run
OPEN_FILES = 1000  # the bar; the usual limit is 1,024
WORKER_BYTES = 4 << 30  # the bar


# ---- counts ----------------------------------------------------------------------------------------------------------


class Watch:
    """Counts what stages open, as Python sees it: pyarrow opens its files by itself, one at a time."""

    def __init__(self) -> None:
        self.opened = self.most_open = 0
        self._look_again = 0
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if event == "open":
            self.opened += 1
            if self.opened >= self._look_again:  # listing what is open is dear
                num_open = len(os.listdir("/proc/self/fd"))
                self.most_open = max(self.most_open, num_open)
                self._look_again = self.opened + max(1, abs(self.most_open - num_open))


def simulated(folder: Path, num_tasks: int) -> ConfigDict:
    """A file for each task: a text of its own, and one that ten tasks share."""
    c = recipe.base()
    c.tokenizer, c.validation_fraction = str(_tokenizer(folder)), 0.0
    names = ["web", *CURATED]
    numbers = dict.fromkeys(names, max(1, int(num_tasks * (1 - SHARE_OF_WEB)) // len(CURATED)))
    numbers["web"] = num_tasks - sum(numbers[name] for name in CURATED)
    first = 0
    for name in names:
        (folder / name).mkdir()
        for i in range(numbers[name]):
            number = first + i
            words = " ".join(f"word{number * 31 + j}" for j in range(8))
            shared = " ".join(f"shared{number // 10 * 31 + j}" for j in range(8))
            rows = [json.dumps({"text": text}) for text in (words, shared)]
            write_text(folder / name / f"{i:06d}.jsonl", "\n".join(rows) + "\n")
        first += numbers[name]
        c.subsets[name] = recipe.subset(f"jsonl:{folder}/{name}/*.jsonl", tasks=numbers[name])
    recipe.validate(c)
    return c.lock()


def _tokenizer(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    write_text(path, train_bpe(["a few words to learn from"] * 10, 300).to_str())
    return path


def count(num_tasks: int, documents: float, text_bytes: float) -> Iterator[dict[str, Any]]:
    """One line a stage, of a preparation whose every document stands for many."""
    watch, lines = Watch(), []
    stands_for = documents / (num_tasks * DOCUMENTS)
    with tempfile.TemporaryDirectory() as folder, _smaller(stands_for), _measured(watch, lines):
        config = simulated(Path(folder), num_tasks).unlock()
        text = num_tasks * DOCUMENTS * 70 * STAY
        config.bucket_bytes = max(1, int(config.bucket_bytes * text / text_bytes))
        start, cpu = time.monotonic(), time.process_time()
        build.build(config.lock(), Path(folder) / "out", workers=1, keep_stages=True)
        whole = {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - cpu}
        inside = sum(line["cpu_seconds_in_tasks"] for line in lines)
        yield from lines
        yield {
            "tasks": num_tasks,
            "stages": len(lines),
            "tasks_of_all_stages": sum(line["of"] for line in lines),
            "opened": sum(line["opened"] for line in lines),
            "most_open": max(line["most_open"] for line in lines),
            **whole,
            "driver_cpu_seconds": whole["cpu_seconds"] - inside,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


@contextmanager
def _smaller(stands_for: float) -> Iterator[None]:
    """Partitions hold as many records as they would of the real documents; nothing waits for the disk."""
    partition_bytes, fsync = shuffle.PARTITION_BYTES, os.fsync
    shuffle.PARTITION_BYTES, os.fsync = max(1, int(partition_bytes / stands_for)), lambda fd: None
    try:
        yield
    finally:
        shuffle.PARTITION_BYTES, os.fsync = partition_bytes, fsync


@contextmanager
def _measured(watch: Watch, lines: list[dict[str, Any]]) -> Iterator[None]:
    """Notes a line for each stage that an engine runs."""
    run = engine.Engine.run

    def measured(self: engine.Engine, stage: engine.Stage) -> None:
        by_task: Counter[int] = Counter()
        inside = 0.0
        started = watch.opened
        watch.most_open = 0

        def function(rank: int) -> None:
            nonlocal inside
            before, cpu = watch.opened, time.process_time()
            stage.function(rank)
            by_task[rank], inside = watch.opened - before, inside + time.process_time() - cpu

        run(self, stage._replace(function=function))
        most = max(by_task.values(), default=0)
        lines.append(
            {
                "stage": stage.name,
                "of": stage.tasks,
                "opened": watch.opened - started,
                "opened_by_a_task": most,
                "most_open": watch.most_open,
                "cpu_seconds_in_tasks": inside,
            }
        )

    engine.Engine.run = measured
    try:
        yield
    finally:
        engine.Engine.run = run


def growth(few: dict[str, Any], many: dict[str, Any], key: str) -> float:
    """How much faster than n log n something grew: 1 is as fast."""
    n, m = few["tasks"], many["tasks"]
    return many[key] / few[key] / (m * math.log(m) / (n * math.log(n)))


def counts(args: argparse.Namespace) -> None:
    """Each number of tasks in a process of its own, lest the memory of one is that of another."""
    wholes = []
    for divisor in (16, 4, 1):
        command = [sys.executable, __file__, "counts-once", f"--tasks={args.tasks // divisor}"]
        command += [f"--documents={args.documents / divisor}", f"--text_bytes={args.text_bytes / divisor}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout, end="", flush=True)
        wholes.append(json.loads(done.stdout.splitlines()[-1]))
    keys = ("opened", "cpu_seconds", "driver_cpu_seconds")
    print(json.dumps({"growth_to_n_log_n": {key: growth(wholes[0], wholes[-1], key) for key in keys}}))
    last = wholes[-1]
    bars = {"most_open": last["most_open"] < OPEN_FILES, "memory": last["peak_mib"] * 2**20 < WORKER_BYTES}
    print(json.dumps({"bars": bars | {"driver_under_an_hour": last["driver_cpu_seconds"] < 3600}}))


# ---- partitions ------------------------------------------------------------------------------------------------------


def partitions() -> None:
    """Each made in one process and run in another."""
    script = str(Path(__file__).with_name("scale_partitions.py"))
    for kind in scale_partitions.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, script, "make", kind, folder], check=True)
            subprocess.run([sys.executable, script, "run", kind, folder], check=True)


# ---- run -------------------------------------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """Without end: of words as frequent as a language's, of which a tenth are exact copies and a tenth nearly so."""
    draw = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8)
    spelled = np.zeros((60_000, 11), np.uint8)  # each with a space after it, then zeros
    for n, word in enumerate(spelled):
        word[: 2 + n % 9] = draw.choice(letters, 2 + n % 9)
        word[2 + n % 9] = ord(" ")
    shares = np.cumsum(1 / np.arange(1, len(spelled) + 1))
    by_share = np.searchsorted(shares, (np.arange(2**22) + 0.5) / 2**22 * shares[-1])
    found: list[str] = []
    while True:
        counts = draw.integers(50, 900, 1000)  # words of each text
        used = spelled[by_share[draw.integers(len(by_share), size=counts.sum())]]
        ends = np.cumsum((used > 0).sum(axis=1))[np.cumsum(counts) - 1]
        together = used[used > 0].tobytes().decode()
        for start, end in itertools.pairwise((0, *ends)):
            text = together[start : end - 1]
            if draw.random() < 0.2 and found:
                text = found[draw.integers(len(found))]
                half = len(text) // 2
                yield text if draw.random() < 0.5 else f"{text[:half]} other {text[half:]}"
                continue
            if len(found) < 100_000:
                found.append(text)
            yield text


def write_corpus(folder: Path, num_bytes: int, source: Iterator[str]) -> None:
    """JSON lines, 40,000 documents a file."""
    folder.mkdir(parents=True)
    size = 0
    for number in itertools.count():
        with whole_file(folder / f"{number:05d}.jsonl", "w") as file:
            for text in itertools.islice(source, 40_000):
                size += len(text)
                file.write(json.dumps({"text": text}) + "\n")
        if size >= num_bytes:
            return


def write_pages(folder: Path, num_bytes: int, source: Iterator[str]) -> None:
    """Web archives of a task each."""
    folder.mkdir()
    for number in range(PAGE_TASKS):
        prepare.write_archive(folder / f"{number:05d}.warc.gz", num_bytes // PAGE_TASKS, source)


def run(args: argparse.Namespace) -> None:
    """Makes text and pages in a folder that is not there yet, prepares them, and prints what each stage took."""
    folder, source = Path(args.out), texts()
    if not (folder / "made").exists():
        write_corpus(folder / "corpus", int(args.gigabytes * 1e9), source)
        write_pages(folder / "pages", int(args.html_gigabytes * 1e9), source)
        write_text(folder / "made", "whole")
    c = recipe.base()
    c.vocab_size, c.tokenizer_bytes = 32_018, 20_000_000
    c.subsets.corpus = recipe.subset(f"jsonl:{folder}/corpus/*.jsonl", tasks=TEXT_TASKS)
    c.subsets.pages = recipe.subset(f"warc:{folder}/pages/*.warc.gz", tasks=PAGE_TASKS, extract=True)
    recipe.validate(c)
    start = time.monotonic()
    data, _ = build.build(c.lock(), folder / "out", keep_stages=True)
    seconds = time.monotonic() - start
    cleaned = {name: counts["clean"] for name, counts in data["subsets"].items()}
    text_bytes, html_bytes = (cleaned[name]["steps"]["read"]["bytes"] for name in ("corpus", "pages"))
    done = folder / "out" / "stages" / "done"
    hours, extraction = 0.0, _cpu_hours(done / "clean", range(TEXT_TASKS, TEXT_TASKS + PAGE_TASKS))
    for stage, cost in engine.usage(done).items():
        of_text = cost["cpu_seconds"] / 3600 - (extraction if stage == "clean" else 0)
        hours += of_text
        print(json.dumps({"stage": stage, "cpu_hours": of_text, "peak_mib": cost["peak_bytes"] / 2**20}))
    print(json.dumps({"stage": "clean, of pages", "cpu_hours": extraction}))
    taken = cleaned["pages"]["kept"]
    print(json.dumps({"text_gb": text_bytes / 1e9, "html_gb": html_bytes / 1e9, "taken_from_pages": taken}))
    text_bytes += taken["bytes"]
    print(json.dumps({"seconds": seconds, "cpu_hours_per_tb_of_text": hours / text_bytes * 1e12}))
    print(json.dumps({"cpu_hours_per_tb_of_html_before": extraction / html_bytes * 1e12}))
    print(json.dumps({"tokens": {name: store["tokens"] for name, store in data["stores"].items()}}))


def _cpu_hours(done: Path, ranks: range) -> float:
    """Those of some of a stage's tasks, by their marks."""
    marks = [(done / "completions" / f"{rank:05d}").read_bytes() for rank in ranks]
    return sum(json.loads(mark)["cpu_seconds"] for mark in marks) / 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("counts", "counts-once"):
        add = commands.add_parser(name).add_argument
        add("--tasks", type=int, default=100_448)
        add("--documents", type=float, default=4.2e10)
        add("--text_bytes", type=float, default=2.2e13)
        add("--subset5tb", action="store_true")
    commands.add_parser("partitions")
    add = commands.add_parser("run").add_argument
    add("--gigabytes", type=float, default=20.0)
    add("--html_gigabytes", type=float, default=2.0)
    add("--out", required=True)
    args = parser.parse_args()
    if getattr(args, "subset5tb", False):
        vars(args).update(SUBSET_5TB)
    if args.command == "counts":
        counts(args)
    elif args.command == "counts-once":
        for line in count(args.tasks, args.documents, args.text_bytes):
            print(json.dumps(line), flush=True)
    elif args.command == "partitions":
        partitions()
    elif args.command == "run":
        run(args)


if __name__ == "__main__":
    main()
