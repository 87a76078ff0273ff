"""What the trainer says of a spike by itself, and keeps in spikes/: the doctor's diagnosis (doctor.py)."""

from collections.abc import Callable
from typing import Any

from k2jax import files
from k2jax.data.journal import read_journal
from k2jax.doctor import diagnose, is_of_all
from k2jax.errors import RunError
from k2jax.parallel import cluster
from k2jax.run import branches
from k2jax.run.directory import RunDirectory
from k2jax.stability import telling
from k2jax.stability.detect import Spike


def examine(run: RunDirectory, spike: Spike, say: Callable[[str], None]) -> None:
    """What a spike was, as far as the records say: told, and kept in spikes/. `python -m k2jax.doctor` says more."""

    def look() -> list[str]:
        found = diagnose(run.path, spike.crossing, again=False)
        _keep(run, spike.crossing, spike.step, found)
        return telling.text(found)

    for line in _spared(lambda: cluster.decide("examines a spike", look), say):
        say(line)


def run_again(run: RunDirectory, most_steps: int, say: Callable[[str], None]) -> None:
    """The whole diagnosis of the spike that the run was rolled back for, while the devices are free."""
    entry = branches.rollbacks(read_journal(run.path / "journal.jsonl"))[-1]

    def look() -> list[str]:
        found = diagnose(branches.branch_folder(run.place, entry["branch"]), entry["crossing"], say=say)
        cluster.decide("keeps a diagnosis", lambda: _keep(run, entry["crossing"], entry["seen_at"], found))
        return telling.text(found)

    if entry["crossing"] - entry["at_step"] <= most_steps:
        for line in _spared(look, say):
            say(line)


def _spared(look: Callable[[], list[str]], say: Callable[[str], None]) -> list[str]:
    """A spike that cannot be explained is answered all the same: why it cannot be is said."""
    try:
        return look()
    except (RunError, OSError) as error:
        if not is_of_all(error):
            raise
        say(f"the spike cannot be explained: {error}")
        return []


def _keep(run: RunDirectory, crossing: int, seen_at: int, found: dict[str, Any]) -> None:
    files.make_folder(run.path / "spikes")
    files.write_text(run.path / "spikes" / f"{crossing}-{seen_at}.json", telling.as_json(found) + "\n")
