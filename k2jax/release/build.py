"""Makes a release: what the folder holds, in the order in which it is made.

Large parts come first, each as soon as it is read; what tells of them comes after, made anew at each call from the
record and what is there; files.json last.
"""

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from k2jax import __version__, errors
from k2jax.bucket import BucketPath, at
from k2jax.data.export_chunks import WORK, export_chunks
from k2jax.data.manifest import canonical_json
from k2jax.errors import ConfigError, StorageError
from k2jax.release import choice, sources
from k2jax.release.choice import Options
from k2jax.release.record import Checkpoint, Record, read_record
from k2jax.release.scratch import Scratch, opened
from k2jax.run import branches, storage
from k2jax.run.ledger import Ledger
from k2jax.run.saved import open_step, saved_steps

FORMAT = 1
EXPORT_DTYPE, SHARD_BYTES = "bfloat16", 5 * 10**9
Say = Callable[[str], None]


class Released(NamedTuple):
    """What `release` did."""

    digest: str  # SHA-256 of files.json: what one publishes elsewhere
    bytes: int
    files: int


def release(
    workdir: str | os.PathLike | BucketPath,
    out: Path,
    options: Options,
    *,
    stores: str | os.PathLike | None = None,
    sign_key: Path | None = None,
    say: Say = lambda line: None,
) -> Released:
    """Writes the folder `out`, whole or not at all; what an earlier call of the same left of it is gone on with.

    Raises ConfigError where the run or the folder is not what it should be, StorageError where something cannot be read
    or written: what is finished stays in OUT.partial for the next call.
    """
    errors.keep_files_ours()
    workdir = at(workdir)
    workdir = workdir if isinstance(workdir, BucketPath) else workdir.resolve()
    record = read_record(workdir)
    chosen = {name: choice.steps(record, getattr(options, name), f"--{name}") for name in ("checkpoints", "exports")}
    plan = run_plan(record, options, chosen["checkpoints"])
    identity = {"run": record.run, "record": record.head, "k2jax": __version__, **options._asdict()}
    with _writing(out), opened(out, identity, _now()) as scratch:
        for source in plan.files:
            scratch.copy(source)
        for name, text in plan.thinned.items():
            scratch.write(name, _thinned(scratch.made, text))
        say(f"run: {len(plan.files):,} files, {scratch.size('run/') / 1e6:,.1f} MB")
        _data(scratch, record, options, stores, say)
        exports = [_export(scratch, record, step, say) for step in chosen["exports"]]
        facts = _facts(scratch, record, options, chosen["checkpoints"], exports)
        scratch.write("checkpoints.csv", _csv(scratch, record, facts))
        scratch.write("release.json", json.dumps(facts, indent=1) + "\n")
        digest = scratch.close_with_list()
        done = Released(digest, scratch.size(""), len(scratch.names()) + 1)
        scratch.become(out)
    return done


# ---- the run ---------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What is copied, and what says of checkpoints that their moments are not there."""

    files: list[sources.Source]
    thinned: dict[str, str]  # {name of the file: why}


def run_plan(record: Record, options: Options, steps: list[int]) -> Plan:
    """Of run/: all the small files, the checkpoints of `steps`, and those that roll-backs left in branches."""
    plan = Plan(sources.run_files(record), {})
    places = [(record.workdir, step, None) for step in steps]
    for number in record.branches:
        folder = branches.branch_folder(record.workdir, number)
        places += [(folder, step, number) for step in saved_steps(folder)]
    for workdir, step, branch in places:
        folder, name = workdir / "checkpoints" / str(step), sources.checkpoint_name(step, branch)
        found = sources.checkpoint_files(folder, name, options.optimizer_state)
        plan.files.extend(found)
        if sources.loses_moments(found, name, options.optimizer_state, storage.read_meta(folder)):
            plan.thinned[f"{name}/{storage.THINNED}"] = "released without optimizer state"
    return plan


def _thinned(made: str, why: str) -> str:
    return json.dumps({"time": made, "by": "k2jax.release", "why": why}, indent=1) + "\n"


# ---- data and exports ------------------------------------------------------------------------------------------------


def _data(scratch: Scratch, record: Record, options: Options, stores: Any, say: Say) -> None:
    if options.data == "digests":
        rows = Ledger(record.workdir / "ledger", None).steps.rows(last_step=record.step)
        scratch.stream(
            "data/digests.jsonl", (canonical_json({k: r[k] for k in ("step", "batch")}) + b"\n" for r in rows)
        )
        scratch.write("data/stores.json", json.dumps(_stores(record), indent=1) + "\n")
        return

    def told(entry: dict[str, Any], was_there: bool) -> None:
        say(f"data: {entry['file']}, {entry['rows']:,} rows, {entry['bytes'] / 1e6:,.1f} MB")

    chunks = (None, len(record.chunks))
    make = partial(export_chunks, record.workdir, chunks=chunks, stores=stores, report=told)
    scratch.make("data", make, whole=False, but=WORK)


def _stores(record: Record) -> dict[str, Any]:
    keys = ("root_digest", "num_tokens", "num_train_tokens", "num_documents")
    parts, order = [], record.order
    while order is not None:
        stores = {name: {key: store[key] for key in keys} for name, store in order.manifest["stores"].items()}
        parts.insert(0, {"after_step": order.after_step, "stores": stores, "stages": order.manifest["stages"]})
        order = order.past
    return {"format": FORMAT, "parts": parts}


def _export(scratch: Scratch, record: Record, step: int, say: Say) -> dict[str, Any]:
    from k2jax.hf.export import export

    [tokens] = [checkpoint.tokens for checkpoint in record.checkpoints if checkpoint.step == step]
    revision = f"step{step}-tokens{tokens}"
    saved = open_step(record.workdir, step)
    make = partial(export, saved, dtype=EXPORT_DTYPE, shard_bytes=SHARD_BYTES, progress=lambda size: None)
    scratch.make(f"exports/{revision}", make, whole=True)
    say(f"export: {revision}, {scratch.size(f'exports/{revision}/') / 1e6:,.1f} MB")
    return {"step": step, "revision": revision, "path": f"exports/{revision}"}


# ---- what tells of it ------------------------------------------------------------------------------------------------


def _facts(
    scratch: Scratch, record: Record, options: Options, steps: list[int], exports: list[dict[str, Any]]
) -> dict[str, Any]:
    """What release.json holds."""

    def entry(checkpoint: Checkpoint) -> dict[str, Any]:
        path = sources.checkpoint_name(checkpoint.step) if checkpoint.step in steps else None
        moments = path is not None and checkpoint.moments and options.optimizer_state
        fields = {key: getattr(checkpoint, key) for key in ("step", "tokens", "stage", "digest")}
        return {**fields, "optimizer_state": moments, "path": path}

    return {
        "format": FORMAT,
        "name": record.name,
        "run": record.run,
        "made": scratch.made,
        "k2jax": __version__,
        "commit": next((launch["commit"] for launch in reversed(record.launches) if launch.get("commit")), None),
        "options": options._asdict(),
        "step": record.step,
        "num_steps": record.order.num_steps,
        "tokens": record.tokens,
        "chunks": len(record.chunks),
        "checkpoints": [entry(checkpoint) for checkpoint in record.checkpoints],
        "exports": exports,
        "branches": record.branches,
        "data": options.data,
    }


COLUMNS = ("stage", "step", "tokens", "loss", "digest", "bytes", "optimizer_state")


def _csv(scratch: Scratch, record: Record, facts: dict[str, Any]) -> str:
    """checkpoints.csv: every checkpoint of the run; those that are not in the release have no bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for checkpoint, entry in zip(record.checkpoints, facts["checkpoints"], strict=True):
        size = scratch.size(f"{entry['path']}/") if entry["path"] else ""
        loss = "" if checkpoint.loss is None else repr(checkpoint.loss)
        state = "true" if entry["optimizer_state"] else "false"
        writer.writerow([entry["stage"] or "", entry["step"], entry["tokens"], loss, entry["digest"], size, state])
    return text.getvalue()


def _now() -> str:
    """In seconds, UTC; SOURCE_DATE_EPOCH, where it is set, so that the same run gives the same bytes."""
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    if given and not given.isdigit():
        raise ConfigError(f"SOURCE_DATE_EPOCH={given}: expected seconds since 1970")
    return datetime.fromtimestamp(int(given or time.time()), UTC).isoformat(timespec="seconds")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"--out={out}: {error.strerror or error} ({error.filename or 'no file named'}): nothing looks finished; "
            f"make room or access, then run the same command, which goes on"
        ) from error
