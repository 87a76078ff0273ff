"""What the trainer does about a spike: the decision written down, after which it begins again from the checkpoint."""

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from k2jax.data.epochs import Epoch
from k2jax.data.journal import Entry, append_entry
from k2jax.parallel import cluster
from k2jax.run.checkpoint import Checkpoints
from k2jax.run.storage import is_thinned
from k2jax.stability import ladder
from k2jax.stability.detect import Spike
from k2jax.training.guard import Guard


def roll_back(
    spike: Spike,
    config: ConfigDict,
    workdir: Path,
    epochs: list[Epoch],
    journal: list[Entry],
    checkpoints: Checkpoints,
    say: Callable[[str], None],
) -> None:
    """Decides, and writes the journal's entry: from here on the run stands at an earlier step, whatever happens.

    Raises NumericsError on every process where nothing is left to try.
    """
    steps = checkpoints.steps()

    def decided() -> Entry:
        usable = [step for step in steps if not is_thinned(checkpoints.lineage.folder(step))]
        entry = ladder.answer(spike, epochs, journal, usable, config.stability.rollback)
        append_entry(workdir / "journal.jsonl", entry)
        return entry

    say(describe(cluster.decide("rolls the run back", decided)))


def describe(entry: Entry) -> str:
    """One line."""
    done = {"defer": "deferred to the stage's end", "skip": "skipped"}[entry["how"]]
    rows = sum(b - a for a, b in entry["ranges"])
    return (
        f"spike: {entry['why']}; back to step {entry['at_step']}, {rows} rows around it {done}; what came after that "
        f"step is in branches/{entry['branch']:02d}"
    )


def keep_watch(guard: Guard, workdir: Path, journal: list[Entry], checkpoints: Checkpoints) -> None:
    """Pins what a roll-back may need, and notes steps without an update and a roll-back that has helped."""
    checkpoints.pin(ladder.to_pin(journal, guard.suspects, checkpoints.known_steps()))
    for note in ladder.without_update(journal, guard.rows) if guard.suspects else ():
        journal.append(_noted("notes a step without an update", workdir, note))
    entry = ladder.helped(journal, guard.rows, guard.config.stability.window)
    if entry:
        journal.append(_noted("notes a roll-back that helped", workdir, ladder.note_helped(entry, guard.rows)))


def _noted(what: str, workdir: Path, entry: Entry) -> Entry:
    """The entry as process 0 wrote it down."""

    def write() -> Entry:
        append_entry(workdir / "journal.jsonl", entry)
        return entry

    return cluster.decide(what, write)
