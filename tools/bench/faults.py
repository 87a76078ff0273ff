"""What a run makes of faults, many times over: kills, flipped bits, full disks, a dead process. Makes its own data.

    python tools/bench/faults.py [--seed=1] [--only=kill,flip,disk,two] [--kills=24] > results.jsonl
    python tools/bench/faults.py --markdown results.jsonl

A tiny run of 24 steps on two virtual devices by the real trainer is the reference. Then, each case by a seed of its own
(`--case=kill:7` runs that one again, with the same draws; what the clock does is its own):

kill  SIGKILL at a random moment of a random part of the run; every listed checkpoint verified; the same command again:
      ledger and last checkpoint must be the reference's, bit for bit.
flip  a bit flipped in each kind of file of a run and of a store; all that readers ask must be refused by one line that
      names the file or the checkpoint, or be answered as before. metrics/ has no digests: what counts is in the ledger.
disk  files limited in size from a random moment on, as a full disk limits them: 74 and one line, or nothing lacked;
      then as after a kill.
two   two processes, one killed at a random moment: the other ends with 70; then as after a kill.

One JSON line a case; exit code 65 if any went wrong.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # of the trainers, too
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import faults_runs as of  # noqa: E402
from faults_runs import LAST, Trainer  # noqa: E402

from k2jax.data.epochs import decide, order_of, read_epochs  # noqa: E402
from k2jax.data.journal import append_entry, read_journal  # noqa: E402
from k2jax.data.launches import read_launches  # noqa: E402
from k2jax.data.provenance import open_run, which_docs  # noqa: E402
from k2jax.data.store import Store  # noqa: E402
from k2jax.errors import NumericsError, RunError, run_main  # noqa: E402
from k2jax.run import reading  # noqa: E402
from k2jax.run.saved import check_tokenizer, open_step  # noqa: E402

KEYS = {"checkpoint.every_steps": 3}
SECTIONS = {
    "kill": "SIGKILL at a random moment", "flip": "a bit flipped:", "disk": "disk full from a random moment on",
    "two": "one of two processes killed",
}  # fmt: skip
KINDS = {
    "arrays": "checkpoints/16/*/**/d/*", "index": "checkpoints/16/*/manifest.ocdbt",
    "meta": "checkpoints/16/meta/meta.json",
    "data part": "checkpoints/16/data/metadata",
    "ledger rows": "ledger/chunk-*.jsonl", "ledger records": "ledger/records.jsonl",
    "epochs": "epochs/*.json", "journal": "journal.jsonl",
    "environment": "environment.json", "tokenizer": "tokenizer.json",
    "store shards": "tokens/c/*", "store.json": "store.json",
    "documents.parquet": "documents.parquet",
    "document_start": "document_start/**/c/*",
}  # fmt: skip
OF_STORE = ("store shards", "store.json", "documents.parquet", "document_start")


class Bench:
    """The reference run, and cases on copies of it. Each gives (outcome, what was said)."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.count = folder, seed, 0
        self.data, self.straight = of.make_data(folder / "data"), folder / "straight"
        trainer = Trainer(self.data, self.straight, KEYS)
        if code := trainer.end():
            raise RunError(f"the reference run ended with {code}: {trainer.error() or trainer.told()[-500:]}")

    def place(self) -> Path:
        """A new folder."""
        self.count += 1
        return self.folder / f"case{self.count}"

    def begun(self, draw: random.Random) -> tuple[Path, str]:
        """A copy of the reference up to a random chunk, or none of it; and a line that a launch on it will say."""
        last = draw.choice([0, 0, 8, 16])
        later = draw.randint(last + 1, LAST)
        save = last + 3 - last % 3
        line = draw.choice(["starting" if not last else "resuming", "compiling", f"step {later} ", f"saving {save}"])
        return of.copy_run(self.straight, self.place(), last), line

    def as_it_was(self, workdir: Path) -> str:
        """Verifies what is listed, runs to the end, compares: what is wrong, or ""."""
        of.verified(self.data, workdir)
        trainer = Trainer(self.data, workdir, KEYS)
        if code := trainer.end():
            return f"started again it ended with {code}: {trainer.error()}"
        return of.differs(self.data, workdir, self.straight)

    def kill(self, draw: random.Random) -> tuple[str, str]:
        """See above."""
        workdir, line = self.begun(draw)
        trainer = Trainer(self.data, workdir, KEYS)
        trainer.wait_for(line)
        time.sleep(draw.uniform(0, 0.4))
        trainer.process.kill()
        code = trainer.end()
        wrong = self.as_it_was(workdir)
        return ("wrong" if wrong else "same bits"), wrong or ("" if code else "it had ended before")

    def two(self, draw: random.Random) -> tuple[str, str]:
        """See above."""
        workdir, line = self.begun(draw)
        trainers, victim = of.pair(self.data, workdir, KEYS), draw.randrange(2)
        trainers[0].wait_for(line)
        time.sleep(draw.uniform(0, 0.4))
        trainers[victim].process.kill()
        killed, other = trainers[victim].end(), trainers[1 - victim].end()
        if killed == -signal.SIGKILL and other not in (70, 0):
            return "wrong", f"the other ended with {other}: {trainers[1 - victim].error()}"
        wrong = self.as_it_was(workdir)
        return ("wrong" if wrong else "same bits"), wrong or f"process {victim} killed, the other ended with {other}"

    def disk(self, draw: random.Random) -> tuple[str, str]:
        """See above."""
        workdir, line = self.begun(draw)
        trainer = Trainer(self.data, workdir, KEYS, code=of.IMPATIENT)
        limit = int(1000 * 200 ** draw.random())
        if trainer.wait_for(line):
            resource.prlimit(trainer.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        code, error = trainer.end(), trainer.error()
        if not error and len(trainer.told().encode()) >= limit:  # what it said is in a file, too
            error = "File too large"
        if code not in (0, 74) or (code and "File too large" not in error):
            return "wrong", f"files of {limit} bytes at most: ended with {code}: {error or trainer.told()[-300:]}"
        wrong = self.as_it_was(workdir)
        return ("wrong" if wrong else "74 by name" if code else "not met"), wrong or error

    # ---- flipped bits ----------------------------------------------------------------------------------------------

    def journalled(self) -> Path:
        """A copy of the reference up to step 16 with a decision in its journal."""
        workdir = of.copy_run(self.straight, self.place(), 16)
        epochs, path = read_epochs(workdir), workdir / "journal.jsonl"
        first, *_, last = order_of(epochs, []).positions(20).tolist()
        what = {"kind": "defer", "ranges": [(first, last + 1)], "at_step": 16, "by": "faults", "why": "a test"}
        append_entry(path, decide(epochs, [], **what))
        return workdir

    def questions_of_run(self, workdir: Path) -> list[Callable[[], Any]]:
        """What the trainer and readers ask of a run."""

        def order() -> list:
            found = order_of(read_epochs(workdir), read_journal(workdir / "journal.jsonl"))
            return [found.digest(), found.num_steps, *(found.positions(step).tolist() for step in (13, 20, 24))]

        def chain() -> list:
            ledger = of.ledger_of(workdir)
            ledger.verify()
            return [list(ledger.steps.rows(1, 16)), [record["record"] for record in ledger.records()][:2]]

        def checkpoint() -> list:
            saved = open_step(workdir, 16)
            return [saved.digest, saved.meta["config"], of.restored(self.data, workdir, 16)]

        def environment() -> list:
            return [(launch["stores"], launch.get("newest_step")) for launch in read_launches(workdir)]

        def documents() -> Any:
            return which_docs(open_run(workdir), 13)

        def tokens() -> list[int]:
            return check_tokenizer(open_step(workdir, 16)).encode("abc def")

        return [order, chain, checkpoint, environment, documents, tokens]

    def questions_of_store(self, path: Path) -> list[Callable[[], Any]]:
        """What is read of a store by default, without the SHA-256 of each file."""

        def tokens() -> list:
            opened = Store.open(path)
            return opened.read(range(0, opened.num_tokens - 32, 32), 32).tolist()

        def documents() -> list:
            opened = Store.open(path)
            found = [opened.document(number) for number in range(opened.num_documents)]
            return [found, [opened.find_documents(one["id"]) for one in found[::20]], opened.documents_in(3, 900)]

        return [tokens, documents]

    def flips(self, kind: str, draws: list[random.Random]) -> Iterator[tuple[str, str]]:
        """Of each draw a bit of one file of the kind, on one copy."""
        if kind in OF_STORE:
            place = shutil.copytree(self.data / "code", self.place())
            questions = self.questions_of_store(place)
        else:
            place = self.journalled()
            questions = self.questions_of_run(place)
        good = of.answers(questions)
        bad = [str(answer) for answer in good if isinstance(answer, Exception)]
        if bad:
            raise RunError(f"{kind}: before any flip: {bad[0]}")
        for draw in draws:
            path = draw.choice(sorted(path for path in place.glob(KINDS[kind]) if path.stat().st_size))
            bit = draw.randrange(path.stat().st_size * 8)
            flip(path, bit)
            yield judge(of.answers(questions), good, path, bit)
            flip(path, bit)


def flip(path: Path, bit: int) -> None:
    """In place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def judge(found: list, good: list, path: Path, bit: int) -> tuple[str, str]:
    """(outcome, what was said) of a flip: each answer is as it was, or one line of ours."""
    errors = [answer for answer in found if isinstance(answer, Exception)]
    where = f"bit {bit} of {path.name}"
    for answer, expected in zip(found, good, strict=True):
        if not isinstance(answer, Exception) and answer != expected:
            return "wrong", f"{where}: another answer"
    for error in errors:
        if not isinstance(error, RunError) or "\n" in str(error):
            return "wrong", f"{where}: {type(error).__name__}: {error}"
    return ("named" if errors else "same answers"), f"{where}: {errors[0] if errors else ''}"


def run(bench: Bench, sections: dict[str, int], only_case: tuple[str, int] | None) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    for section, count in sections.items():
        cases = [i for i in range(count) if only_case in (None, (section, i))]
        for kind in KINDS if section == "flip" else [""]:
            draws = [random.Random(f"{bench.seed} {section} {kind} {i}") for i in cases]
            outcomes = bench.flips(kind, draws) if kind else map(getattr(bench, section), draws)
            for i in cases:
                begin = time.monotonic()
                try:
                    outcome, said = next(outcomes)
                except RunError as error:  # of what is verified after a fault
                    outcome, said = "wrong", str(error)
                row = {"fault": section, "in": kind, "case": i, "seed": bench.seed, "outcome": outcome}
                said = said.replace(f"{bench.folder}/", "")
                yield {**row, "seconds": round(time.monotonic() - begin, 1), "said": said}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The README's table."""
    counted: dict[str, Counter] = {}
    for row in rows:
        counted.setdefault(f"{SECTIONS[row['fault']]} {row['in']}".strip(), Counter())[row["outcome"]] += 1
    lines = ["| fault | cases | what came of it |", "|---|---|---|"]
    for fault, outcomes in counted.items():
        each = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
        lines.append(f"| {fault} | {outcomes.total()} | {each} |")
    return "\n".join(lines)


@contextmanager
def closing_trainers() -> Iterator[None]:
    """None outlives the block."""
    try:
        yield
    finally:
        Trainer.end_all()


def parse_case(text: str) -> tuple[str, int]:
    """SECTION:NUMBER."""
    section, _, number = text.partition(":")
    return section, int(number)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--case", type=parse_case, help="SECTION:NUMBER of one case to run again")
    for name, default in (("kill", 24), ("flip", 12), ("disk", 12), ("two", 8)):
        parser.add_argument(f"--{name}s", type=int, default=default, help=f"cases of {name} (of each kind of file)")
    parser.add_argument("--markdown", metavar="FILE", help="print the table of the results in a file, and run nothing")
    args = parser.parse_args()
    if args.markdown:
        print(markdown([json.loads(line) for line in Path(args.markdown).read_text().splitlines()]))
        return
    wanted = [args.case[0]] if args.case else args.only.split(",")
    sections = {name: getattr(args, f"{name}s") for name in SECTIONS if name in wanted}
    reading.RETRY_WAITS_S = (0.01,)  # of this process, which reads what it has damaged
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, closing_trainers():
        for row in run(Bench(Path(folder), args.seed), sections, args.case):
            wrong += row["outcome"] == "wrong"
            print(json.dumps(row), flush=True)
    if wrong:
        raise NumericsError(f"{wrong} case(s) went wrong: see their lines")


if __name__ == "__main__":
    run_main(main)
