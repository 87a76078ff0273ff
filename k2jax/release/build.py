"""Makes a release: what the folder holds, in the order in which it is made.

Large parts come first, each as soon as it is read; what tells of them comes after, made anew at each call from the
record and what is there; files.json last.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from k2jax import __version__, errors, files
from k2jax.bucket import BucketPath, at
from k2jax.data.export_chunks import WORK, export_chunks
from k2jax.data.manifest import canonical_json
from k2jax.errors import ConfigError, StorageError
from k2jax.release import checks, choice, sources
from k2jax.release.arrays import check_arrays
from k2jax.release.bom import bom
from k2jax.release.cards import model_card
from k2jax.release.choice import Options
from k2jax.release.croissant import croissant
from k2jax.release.datacard import data_card
from k2jax.release.facts import checkpoints_csv, facts, last_results, revision, sizes
from k2jax.release.licences import Found, licences_text, read_licences
from k2jax.release.openness import openness
from k2jax.release.record import Record, read_record
from k2jax.release.retrospective import retrospective
from k2jax.release.scratch import FILES, SIGNATURE, Scratch, check_free, clear_renamed, opened, place_of
from k2jax.release.signing import sign, signer
from k2jax.release.source import ARCHIVE, LOCK, read_source
from k2jax.report import page
from k2jax.report.build import Report
from k2jax.run import branches, storage
from k2jax.run.ledger import Ledger
from k2jax.run.saved import open_step, saved_steps

EXPORT_DTYPE, SHARD_BYTES = "bfloat16", 5 * 10**9
SPECIFICATION = Path(__file__).with_name("SPECIFICATION.md")
Say = Callable[[str], None]
Progress = Callable[[int], object]


class Released(NamedTuple):
    """What `release` did."""

    digest: str  # SHA-256 of files.json: what one publishes elsewhere
    bytes: int
    files: int


class Plan(NamedTuple):
    """What a release of a run is going to hold."""

    record: Record
    options: Options
    steps: list[int]  # with their checkpoints
    exports: list[int]
    files: list[sources.Source]  # copied as they are
    cut: list[sources.Source]  # rows, up to the last checkpoint
    checkpoints: list[str]  # all folders of steps, those of branches included
    thinned: list[str]  # what says of checkpoints that their moments are not there
    sizes: dict[str, int]  # by part, in bytes


def plan(workdir: str | os.PathLike | BucketPath, options: Options) -> Plan:
    """Reads the run, and writes nothing. ConfigError or StorageError where it is not whole."""
    workdir = at(workdir)
    workdir = workdir if isinstance(workdir, BucketPath) else workdir.resolve()
    sources.check_plain(workdir)
    record = read_record(workdir)
    checks.check_rows(record)
    checks.check_secrets(record)
    checks.check_told(record)
    steps, exports = (choice.steps(record, getattr(options, n), f"--{n}") for n in ("checkpoints", "exports"))
    copied, cut = sources.run_files(record)
    thinned, checkpoints = [], []
    places = [(record.workdir, step, None) for step in steps]
    for number in record.branches:
        folder = branches.branch_folder(record.workdir, number)
        places += [(folder, step, number) for step in saved_steps(folder)]
    for folder, step, branch in places:
        folder, name = folder / "checkpoints" / str(step), sources.checkpoint_name(step, branch)
        found = sources.checkpoint_files(folder, name, options.optimizer_state)
        copied += found
        checkpoints.append(name)
        if sources.loses_moments(found, name, options.optimizer_state, storage.read_meta(folder)):
            thinned.append(f"{name}/{storage.THINNED}")
    weights = sizes(record, options, [*copied, *cut], exports)
    return Plan(record, options, steps, exports, copied, cut, checkpoints, thinned, weights)


def release(
    workdir: str | os.PathLike | BucketPath,
    out: Path,
    options: Options,
    *,
    stores: str | os.PathLike | None = None,
    sign_key: Path | None = None,
    say: Say = lambda line: None,
    progress: Progress = lambda size: None,
) -> Released:
    """Writes the folder `out`, whole or not at all; what an earlier call of the same left of it is gone on with.

    Args:
        workdir: the run directory.
        out: a new folder, or an empty one.
        options: what is in it.
        stores: where the stores are, by name, if they have moved.
        sign_key: a file with a private key, where there is to be a model.sig.
        say: is told of each part that is done.
        progress: is told of the bytes of checkpoints and exports, as they come.

    Raises ConfigError where the run or the folder is not what it should be, StorageError where something cannot be read
    or written: what is finished stays in OUT.partial for the next call.
    """
    errors.keep_files_ours()
    out = Path(os.path.abspath(out))
    signing = signer(sign_key) if sign_key else None
    page.plotly()  # if it is missing, that is said before anything is written
    checks.check_places(at(workdir), out)
    clear_renamed(out)
    check_free(out)
    with checks.still(at(workdir)):
        planned = plan(workdir, options)
        record = planned.record
        identity = {"run": record.run, "record": record.head, "k2jax": __version__, **options._asdict()}
        checks.check_room(out, sum(planned.sizes.values()), _there(place_of(out)))
        with _writing(out), opened(out, identity, _now()) as scratch:
            _copy(scratch, planned, progress)
            say(f"run: {len(scratch.names('run/')):,} files, {scratch.size_below('run/') / 1e6:,.1f} MB")
            _data(scratch, record, options, stores, say)
            for step in planned.exports:
                _export(scratch, record, step, say, progress)
            _tell(scratch, planned, stores, say)
            _check_same(planned, plan(workdir, options))
            digest = scratch.close_with_list()
            count, size = len(scratch.names()) + 1, scratch.size_below("") + (scratch.root / FILES).stat().st_size
            if signing:
                sign(signing, scratch.root, scratch.root / SIGNATURE)
                say("signed: model.sig")
            scratch.become(out)
    return Released(digest, size, count)


def _copy(scratch: Scratch, planned: Plan, progress: Progress) -> None:
    for source in planned.files:
        scratch.copy(source, progress)
    for source in planned.cut:
        scratch.stream(source.name, sources.rows_up_to(source, planned.record.step))
    for name in planned.thinned:
        said = {"time": scratch.made, "by": "k2jax.release", "why": "released without optimizer state"}
        scratch.write(name, _json(said))
    for name in planned.checkpoints:
        scratch.check(name, check_arrays)


def _data(scratch: Scratch, record: Record, options: Options, stores: Any, say: Say) -> None:
    if options.data == "digests":
        rows = Ledger(record.workdir / "ledger", None).steps.rows(last_step=record.step)
        lines = (canonical_json({key: row[key] for key in ("step", "batch")}) + b"\n" for row in rows)
        scratch.stream("data/digests.jsonl", lines)
        scratch.write("data/stores.json", _json(_stores(record)))
        return

    def told(entry: dict[str, Any], was_there: bool) -> None:
        say(f"data: {entry['file']}, {entry['rows']:,} rows, {entry['bytes'] / 1e6:,.1f} MB")

    chunks = (None, len(record.chunks))
    make = partial(export_chunks, record.workdir, chunks=chunks, stores=stores, report=told)
    scratch.make("data", make, whole=False, but=WORK)


def _stores(record: Record) -> dict[str, Any]:
    """What data/stores.json holds: what a run with these digests read from, and how much of each."""
    keys = ("root_digest", "num_tokens", "num_train_tokens", "num_documents")
    parts, order = [], record.order
    while order is not None:
        stores = {name: {key: store[key] for key in keys} for name, store in order.manifest["stores"].items()}
        parts.insert(0, {"after_step": order.after_step, "stores": stores, "stages": order.manifest["stages"]})
        order = order.past
    return {"format": 1, "parts": parts}


def _export(scratch: Scratch, record: Record, step: int, say: Say, progress: Progress) -> None:
    from k2jax.hf.export import export

    name = f"exports/{revision(record, step)}"
    saved = open_step(record.workdir, step)
    make = partial(export, saved, dtype=EXPORT_DTYPE, shard_bytes=SHARD_BYTES, progress=progress)
    scratch.make(name, make, whole=True)
    say(f"export: {name}, {scratch.size_below(f'{name}/') / 1e6:,.1f} MB")


def _tell(scratch: Scratch, planned: Plan, stores: Any, say: Say) -> None:
    """Everything that is made from the record, and what is there by now."""
    record = planned.record
    told = facts(record, planned.options, planned.steps, planned.exports, scratch.made)
    scratch.write("release.json", _json(told))
    scratch.write("checkpoints.csv", checkpoints_csv(scratch, record, told))
    source = read_source(record)
    scratch.write(ARCHIVE, source.archive)
    scratch.write(LOCK, source.lock)
    scratch.write(SPECIFICATION.name, SPECIFICATION.read_bytes())
    scratch.write("report.html", _report(scratch, say))
    licences = _licences(record, planned.options, stores)
    results = last_results(record)
    scratch.write("LICENSES.md", licences_text(record.name, licences))
    scratch.write("RETROSPECTIVE.md", retrospective(record))
    scratch.write("DATA.md", data_card(record, told, _rows(scratch, record, planned.options)))
    scratch.write("croissant.json", _json(croissant(record, told, scratch)))
    scratch.write("bom.cdx.json", _json(bom(record, told, scratch, results)))
    scratch.write("README.md", b"")  # which openness.json counts, and which tells of openness.json
    open_to = openness(record, told, scratch, licences)
    scratch.write("openness.json", _json(open_to))
    scratch.write("README.md", model_card(record, told, scratch, results, source.said, open_to["mof"]["means"]))


def _report(scratch: Scratch, say: Say) -> bytes:
    """Of what others get. The folder is not this machine's any more: the same release gives the same page."""
    folder = scratch.root / "run"
    report = Report(folder)
    text = report.html(said=f"Made {scratch.made} for this release.")
    for form in (page.as_json(str(folder))[1:-1], page.escaped(folder), str(folder)):
        text = text.replace(form, "run")
    for line in report.subject.notes.lines:
        say(f"report: not read: {line}")
    return text.encode("utf-8", "backslashreplace")


def _licences(record: Record, options: Options, stores: Any) -> Found | None:
    """None where the stores are not there, which a release of digests does not need."""
    try:
        return read_licences(record, stores)
    except (ConfigError, StorageError):
        if options.data == "tokens":
            raise
        return None


def _rows(scratch: Scratch, record: Record, options: Options) -> int:
    if options.data == "digests":
        return record.step
    return sum(chunk["rows"] for chunk in files.read_json(scratch.root / "data" / "chunks.json")["chunks"])


def _check_same(before: Plan, now: Plan) -> None:
    """StorageError where the run has changed under the release."""
    was, found = ({*p.files, *p.cut} for p in (before, now))
    if changed := sorted(source.name for source in was ^ found):
        raise StorageError(
            f"--workdir={before.record.workdir} has changed while it was released ({changed[0]}"
            f"{', ...' if changed[1:] else ''}): end what writes it, and run the same command again"
        )


def _there(folder: Path) -> int:
    """Bytes that an earlier call left."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


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
            f"--out={out}: {error.filename or 'a file'}: {error.strerror or error}; nothing looks finished: make room "
            f"or access, then run the same command, which goes on"
        ) from error
