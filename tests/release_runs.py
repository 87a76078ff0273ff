"""What tests of releases share: a run that may be changed, one that went back, and a release that kills itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

from k2jax.data.epochs import decide, order_of, read_epochs
from k2jax.data.journal import append_entry
from k2jax.run import branches, lineage, storage
from k2jax.run.ledger import Ledger, StepLog, belonging
from k2jax.run.saved import saved_steps
from k2jax.stability.ladder import ranges_of_steps

MADE = "1795900000"  # SOURCE_DATE_EPOCH: the same bytes each time

# Ends itself by SIGKILL at a point named on its command line, the rest of which is tools/release.py's.
KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import k2jax.files as files
from k2jax.release import scratch

def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

point = sys.argv.pop(1)
if "/" in point:  # a file is finished, and noted
    note = scratch.Scratch._note
    def noted(self, name, *args, **options):
        note(self, name, *args, **options)
        name.startswith(point) and killed()
    scratch.Scratch._note = noted
elif point == "half":  # in the middle of a file
    from contextlib import contextmanager
    whole = files.whole_file
    @contextmanager
    def half(path, *args):
        with whole(path, *args) as file:
            yield file
            if "/checkpoints/" in str(path) and "/d/" in str(path):
                file.truncate(file.tell() // 2)
                file.flush()
                killed()
    files.whole_file = half
elif point == "listed":  # files.json is there, and OUT not yet
    scratch.Scratch.become = killed
elif point == "renamed":  # OUT is there, and OUT.partial still
    move = files.move
    files.move = lambda *places: (move(*places), killed())
sys.argv[0] = {root!r} + "/tools/release.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed_release(point: str, *arguments: object) -> int:
    """The exit code of tools/release.py, which kills itself at a point."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": MADE, "PYTHONPATH": str(REPOSITORY)}
    script = KILLED.format(root=str(REPOSITORY))
    command = [sys.executable, "-c", script, point, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300).returncode


def copy_of(run: Path, to: Path) -> Path:
    """A run that the test may change."""
    return shutil.copytree(run, to)


def rolled_back(run: Path, to: Path) -> Path:
    """A copy that went back to its first checkpoint, as a spike has it do, and stands there: one branch is left."""
    workdir = copy_of(run, to)
    epochs = read_epochs(workdir)
    order = order_of(epochs)
    first, *_ = saved_steps(workdir)
    entry = decide(
        epochs, [], kind="rollback", ranges=ranges_of_steps(order, first + 1, first + 2), at_step=first,
        by="k2jax.train", why="loss above its limit <b>", how="defer", branch=1, attempt=1, crossing=first + 2,
        seen_at=first + 3, until=first + 9, spike="loss",
    )  # fmt: skip
    append_entry(workdir / "journal.jsonl", entry)

    def put_away(step: int, target: Path) -> None:
        lineage._move(workdir / "checkpoints" / str(step), target)

    branches.complete(workdir, workdir, saved_steps(workdir), put_away)
    meta = storage.read_meta(workdir / "checkpoints" / str(first))
    Ledger(workdir / "ledger", None).resume(first, belonging(meta))
    for name in ("metrics", "held_out"):
        StepLog(workdir / name, None).truncate(first)
    return workdir
