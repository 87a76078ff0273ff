"""What keeps a run from being released, told in a line before anything is written."""

import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from k2jax.bucket import BucketPath
from k2jax.errors import ConfigError, StorageError
from k2jax.evals.results import Results
from k2jax.release.record import AnyPath, Record
from k2jax.run.prediction import read_prediction
from k2jax.text import redacted


def check_places(workdir: AnyPath, out: Path) -> None:
    """Neither of the two folders lies in the other."""
    if isinstance(workdir, BucketPath):
        return
    run, target = workdir.resolve(), out.resolve()
    if target == run or run in target.parents:
        raise ConfigError(f"--out={out} lies in --workdir={workdir}: a release of it would hold itself: name another")
    if target in run.parents:
        raise ConfigError(f"--out={out} holds --workdir={workdir}: name a new folder")


@contextmanager
def still(workdir: AnyPath) -> Iterator[None]:
    """No training changes the run as long as this lasts, where the file system has locks; else ConfigError."""
    path = workdir / "lock"
    if isinstance(path, BucketPath) or not path.is_file():
        yield
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two releases of a run do not disturb each other
        except BlockingIOError:
            holder = file.read(200).decode(errors="replace").strip()
            raise ConfigError(
                f"--workdir={workdir} is at work ({holder}): a release is of a run that stands still: wait for its "
                f"end, or stop it by SIGTERM, which saves it"
            ) from None
        except OSError:
            pass  # no locks there: what changes meanwhile is found by comparing
        yield


def check_rows(record: Record) -> None:
    """Metrics are there of every chunk that the ledger has."""
    names = [re.compile(r"chunk-\d{5,}\.jsonl"), record.workdir / "ledger", record.workdir / "metrics"]
    ledger, metrics = ({p.name for p in folder.glob("*.jsonl") if names[0].fullmatch(p.name)} for folder in names[1:])
    if missing := sorted(ledger - metrics):
        raise ConfigError(
            f"--workdir={record.workdir}: metrics/ lacks {', '.join(missing[:3])}{', ...' if missing[3:] else ''}, of "
            f"which the ledger has the steps: restore it from a copy"
        )


def check_told(record: Record) -> None:
    """What the cards tell of holds: the prediction by its digest in the journal, evaluations by their names."""
    read_prediction(record.workdir)
    Results(record.workdir).all()


def check_secrets(record: Record) -> None:
    """What is copied byte for byte holds no credentials that we know by their form."""
    said: list[tuple[str, Any]] = [("environment.json", record.launches), ("journal.jsonl", record.journal)]
    said += [(f"epochs/{epoch.number:04d}.json", epoch._asdict()) for epoch in record.epochs]
    for name, values in said:
        if redacted(values) != _lists(values):
            raise ConfigError(
                f"--workdir={record.workdir}: {name} holds credentials in a URL, and a release is for all to read: "
                f"make them worthless where they are good for something, and take them out by a fork of the run"
            )


def _lists(values: Any) -> Any:
    """As `redacted` gives them: it makes lists of tuples."""
    if isinstance(values, dict):
        return {key: _lists(value) for key, value in values.items()}
    return [_lists(value) for value in values] if isinstance(values, (list, tuple)) else values


def check_room(out: Path, need: int, there: int) -> None:
    """StorageError where the disk has no room for what is still to be written; `there`: what an earlier call left."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < need - there:
        raise StorageError(
            f"--out={out}: the release needs {need / 1e6:,.1f} MB, {(need - there) / 1e6:,.1f} of them still to be "
            f"written, and there are {free / 1e6:,.1f} free: make room, or leave more out (see --dry-run)"
        )
