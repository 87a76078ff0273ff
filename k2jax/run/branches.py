"""Branches: what a roll-back left behind, whole and readable, while the run goes on from an earlier checkpoint.

The journal's entry is the roll-back; all else follows from it and is completed by the next start where a kill came
between. branches/NN/ is laid out as a run directory, with epochs, journal and records as they were, the rows that came
after the step gone back to (in whole chunks), and the checkpoints. Those before it are the run's, or lie in branches
that later roll-backs left: `line` says where.
"""

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k2jax import files, paths
from k2jax.bucket import BucketPath
from k2jax.data.journal import Entry, read_journal
from k2jax.errors import ConfigError

COPIED = ("epochs", "tokenizer.json", "environment.json", "compiled", "reference")
ROWS = ("ledger", "metrics", "held_out")
DONE = "branch.json"  # written last
TAIL_BYTES = 1 << 16  # more than a row has


class Piece(NamedTuple):
    """Of a line of steps, the part that lies in one folder."""

    folder: Path | BucketPath
    first: int
    last: int | None  # None: what there is


def rollbacks(journal: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in journal if entry["kind"] == "rollback"]


def branch_folder(workdir: Path | BucketPath, number: int) -> Path | BucketPath:
    return workdir / "branches" / f"{number:02d}"


def complete(
    workdir: Path, place: Path | BucketPath, steps: Sequence[int], put_away: Callable[[int, Path], None]
) -> None:
    """Does what is left to do of the newest roll-back: rows copied, checkpoints after its step moved; nothing twice.

    Args:
        workdir: where the run's small files are written.
        place: where the run is.
        steps: of the checkpoints that there are.
        put_away: moves the checkpoint of a step to a folder.
    """
    journal = read_journal(workdir / "journal.jsonl")
    if not (done := rollbacks(journal)):
        return
    entry = done[-1]
    folder = branch_folder(workdir, entry["branch"])
    if (folder / DONE).exists():
        return
    files.remove_leftovers(folder.parent, alone=True)
    if not folder.exists():
        with files.whole_folder(folder) as new:
            _copy(workdir, new, entry["at_step"], journal[: journal.index(entry)])
    for step in steps:
        if step > entry["at_step"]:
            put_away(step, branch_folder(place, entry["branch"]) / "checkpoints" / str(step))
    files.write_json(folder / DONE, entry, sort_keys=True)


def _copy(workdir: Path, new: Path, at_step: int, journal: Sequence[Entry]) -> None:
    (new / "checkpoints").mkdir()
    for name in COPIED:
        if (workdir / name).is_dir():
            shutil.copytree(workdir / name, new / name)
        elif (workdir / name).exists():
            shutil.copyfile(workdir / name, new / name)
    lines = (workdir / "journal.jsonl").read_bytes().splitlines(keepends=True)
    files.write_bytes(new / "journal.jsonl", b"".join(lines[: len(journal)]))
    for name in ROWS:
        if (workdir / name).is_dir():
            (new / name).mkdir()
        for path in sorted((workdir / name).glob("*.jsonl")):
            if path.name == "records.jsonl" or _last_step(path) > at_step:
                shutil.copyfile(path, new / name / path.name)


def _last_step(path: Path) -> int:
    """Of the last whole row; 0 where there is none."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return files.parse_json(lines[-1], str(path))["step"] if lines else 0


def line(workdir: Path | BucketPath) -> list[Piece]:
    """Where the steps of a run, or of a branch of one, lie: the newest first."""
    number = workdir.name
    if workdir.parent.name != "branches" or not number.isdigit():
        return [Piece(workdir, 1, None)]
    run = workdir.parent.parent
    pieces, last = [], None
    for entry in rollbacks(read_journal(run / "journal.jsonl")):
        if entry["branch"] >= int(number) and (last is None or entry["at_step"] < last):
            pieces.append(Piece(branch_folder(run, entry["branch"]), entry["at_step"] + 1, last))
            last = entry["at_step"]
    return [*pieces, Piece(run, 1, last)]


# ---- for commands that read a run ------------------------------------------------------------------------------------


def add_options(parser: ArgumentParser, what: str = "the run directory") -> None:
    """--workdir, and --branch for what a roll-back left of it."""
    paths.add(parser, "--workdir", buckets=True, required=True, metavar="DIR", help=what)
    parser.add_argument("--branch", type=int, metavar="N", help="of the run, what its N-th roll-back left behind")


def add_weights(parser: ArgumentParser) -> None:
    """--weights."""
    what = "params, as trained (default), or ema, their moving average (optimizer.ema_decay)"
    parser.add_argument("--weights", choices=("params", "ema"), default="params", help=what)


def chosen(args: Namespace) -> Any:
    """The folder that the options name. ConfigError where the run has no such branch."""
    if args.branch is None:
        return args.workdir
    known = [entry["branch"] for entry in rollbacks(read_journal(args.workdir / "journal.jsonl"))]
    folder = branch_folder(args.workdir, args.branch)
    if args.branch not in known:
        there = f"it has {', '.join(map(str, known))}" if known else "it was never rolled back"
        raise ConfigError(f"--branch={args.branch}: {args.workdir} has no such branch: {there}")
    if not (folder / DONE).exists():
        raise ConfigError(
            f"--branch={args.branch}: the journal of {args.workdir} names it, and {folder} is not there or not "
            f"complete: start the run again, which completes it, or restore the folder from a copy"
        )
    return folder
