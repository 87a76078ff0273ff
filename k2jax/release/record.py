"""What a run says of itself, read once for everything that a release tells: never an experiment file.

Reading it checks it: epochs, journal and ledger must hold, and branches be complete, or there is no release.
"""

from pathlib import Path
from typing import Any, NamedTuple

from k2jax.bucket import BucketPath
from k2jax.data.chunks import checkpoint_steps, tokens_before
from k2jax.data.epochs import Epoch, check_journal, imported, order_of, read_epochs
from k2jax.data.journal import Entry, read_journal
from k2jax.data.launches import Launch, read_launches
from k2jax.data.order import Order
from k2jax.errors import ConfigError, StorageError
from k2jax.run import branches, storage
from k2jax.run.ledger import Ledger, bits_float, read_records
from k2jax.run.saved import saved_steps

AnyPath = Path | BucketPath


class Checkpoint(NamedTuple):
    """One that the ledger closes over, or that is there all the same (of imported weights: step 0)."""

    step: int
    tokens: int
    stage: str | None
    digest: str
    loss: float | None
    there: bool  # on the storage
    moments: bool  # the optimizer's state, too


class Record(NamedTuple):
    """The run up to its last checkpoint."""

    workdir: AnyPath
    epochs: list[Epoch]
    journal: list[Entry]
    launches: list[Launch]
    order: Order
    checkpoints: list[Checkpoint]
    branches: list[int]
    head: str  # the digest of the ledger's last record: with it all of the past
    tokens: int

    @property
    def name(self) -> str:
        return self.epochs[-1].config["name"]

    @property
    def run(self) -> str:
        return self.epochs[-1].run

    @property
    def config(self) -> dict[str, Any]:
        return self.epochs[-1].config

    @property
    def manifest(self) -> dict[str, Any]:
        return self.order.manifest

    @property
    def step(self) -> int:
        return self.checkpoints[-1].step

    @property
    def imported_kind(self) -> str | None:
        """The model_type of the folder that the run began with."""
        begun = imported(self.epochs)
        return begun["config"].get("model_type") if begun else None

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First and last step of each chunk that training has come into."""
        ends = checkpoint_steps(self.order)
        steps = list(zip([1, *(end + 1 for end in ends)], ends, strict=False))
        return [chunk for chunk in steps if chunk[0] <= self.step]


def read_record(workdir: AnyPath) -> Record:
    """Raises ConfigError or StorageError, one clear line, where the run is not whole."""
    epochs, journal = read_epochs(workdir), read_journal(workdir / "journal.jsonl")
    check_journal(epochs, journal)
    order = order_of(epochs, journal)
    found = [_branch(workdir, entry["branch"]) for entry in branches.rollbacks(journal)]
    Ledger(workdir / "ledger", None).verify()
    records = read_records(workdir / "ledger" / "records.jsonl")
    if not records:
        raise ConfigError(f"--workdir={workdir}: nothing was saved yet: there is nothing to release")
    checkpoints = _checkpoints(workdir, order, {record["last_step"]: record["checkpoint"] for record in records})
    tokens = tokens_before(order, records[-1]["last_step"] + 1)
    if not (launches := read_launches(workdir)):
        raise ConfigError(f"--workdir={workdir}: no environment.json says on what it ran: restore it from a copy")
    return Record(workdir, epochs, journal, launches, order, checkpoints, found, records[-1]["record"], tokens)


def _branch(workdir: AnyPath, number: int) -> int:
    """That it is there, whole."""
    folder = branches.branch_folder(workdir, number)
    if not (folder / branches.DONE).exists():
        raise ConfigError(
            f"--workdir={workdir}: its journal names branch {number}, and {folder} is not there or not complete: "
            f"start the run again, which completes it, or restore the folder from a copy"
        )
    return number


def _checkpoints(workdir: AnyPath, order: Order, recorded: dict[int, str]) -> list[Checkpoint]:
    losses = {
        row["step"]: bits_float(row["loss"])
        for row in Ledger(workdir / "ledger", None).steps.rows(last_step=max(recorded))
        if row["step"] in recorded
    }
    there, found = set(saved_steps(workdir)), []
    for step in sorted({*recorded, *there}):
        digest, moments = recorded.get(step), False
        if step in there:
            folder = workdir / "checkpoints" / str(step)
            meta = storage.read_meta(folder)
            if digest not in (None, meta["digest"]) or meta["step"] != step:
                raise StorageError(
                    f"checkpoint {step} of {workdir} is not the one that the ledger records ({meta['digest'][:12]}, "
                    f"recorded {str(digest)[:12]}): put the run's own back"
                )
            digest = meta["digest"]
            moments = storage.has_moments(meta) and not storage.is_thinned(folder)
        stage = order.of_step(step).stage_of_step(step).name if step else None
        tokens = tokens_before(order, step + 1)
        found.append(Checkpoint(step, tokens, stage, digest, losses.get(step), step in there, moments))
    return found
