"""What is done about a spike: back to the checkpoint before it, and on without the data around it.

The decision is a function of the journal, the order, the checkpoints and the spike, made by one process for all; its
journal entry is the roll-back (run/branches.py completes it). A restart alone would repeat the spike bit for bit: so
what it changes is named. K2 deferred whole chunks of 941 steps; PaLM went back 100 steps and skipped 200 to 500.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import numpy as np
from ml_collections import ConfigDict

from k2jax.data.epochs import Epoch, decide, order_of
from k2jax.data.journal import Entry
from k2jax.data.order import Order
from k2jax.errors import NumericsError
from k2jax.stability.detect import Row, Spike


def answer(
    spike: Spike, epochs: Sequence[Epoch], journal: list[Entry], checkpoints: Iterable[int], rules: ConfigDict
) -> Entry:
    """The journal's entry for a spike.

    A spike within `watch` steps of the last one's place is the same again: the roll-back did not help. Each further try
    takes twice as many steps out on both sides, and goes back before them.

    Args:
        checkpoints: steps that training can go on from.
        rules: `config.stability.rollback`.

    Raises NumericsError where nothing is left to try.
    """
    order = order_of(epochs, journal)
    before = [entry for entry in journal if entry["kind"] == "rollback"]
    again = bool(before) and spike.crossing <= before[-1]["until"]
    attempt = before[-1]["attempt"] + 1 if again else 1
    what = f"{spike.kind} from step {spike.crossing} on, seen at step {spike.step}: {spike.why}"
    if attempt > rules.most:
        tried = f"{attempt - 1} roll-back(s) did not help" if again else "stability.rollback.most=0"
        raise NumericsError(f"{what}; {tried}: {ADVICE}")
    width = 2 ** (attempt - 1)
    stage = order.stage_of_step(spike.crossing)
    first = max(spike.crossing - rules.before * width, stage.first_step)
    last = min(spike.crossing + rules.after * width, stage.last_step)
    # Never before the last change of configuration or data, whose epoch would not have begun.
    usable = [step for step in checkpoints if epochs[-1].after_step <= step < spike.crossing]
    if not usable:
        raise NumericsError(f"{what}; there is no checkpoint before it to go back to: {ADVICE}")
    at_step = max((step for step in usable if attempt == 1 or step < first), default=min(usable))
    ranges = ranges_of_steps(order, max(first, at_step + 1), last)
    more = {
        "branch": len(before) + 1,
        "attempt": attempt,
        "crossing": spike.crossing,
        "seen_at": spike.step,
        "until": last + rules.watch,
        "spike": spike.kind,
    }

    def entry(how: str) -> Entry:
        said = {"by": "k2jax.train", "why": what, "how": how}
        return decide(epochs, journal, kind="rollback", ranges=ranges, at_step=at_step, **said, **more)

    chosen = entry(rules.how)
    if chosen["order_before"] == chosen["order_after"]:  # they are the stage's last already
        chosen = entry("skip")
    return chosen


ADVICE = "python -m k2jax.doctor says what it was; the same command goes on from the newest checkpoint"


def ranges_of_steps(order: Order, first: int, last: int) -> list[tuple[int, int]]:
    """The positions [a, b) that steps `first` to `last` read, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for step in range(first, last + 1):
        positions = order.positions(step)
        a, b = int(positions[0]), int(positions[-1]) + 1
        if ranges and ranges[-1][1] == a:
            ranges[-1] = ranges[-1][0], b
        else:
            ranges.append((a, b))
    return ranges


def to_pin(journal: Sequence[Entry], suspects: Iterable[int], checkpoints: Sequence[int]) -> set[int]:
    """Checkpoints that must stay: those gone back to, and the newest before each step that may begin a spike."""
    before = [max((step for step in checkpoints if step < suspect), default=None) for suspect in suspects]
    back = [entry["at_step"] for entry in journal if entry["kind"] == "rollback"]
    return {step for step in (*before, *back) if step is not None}


def without_update(journal: Sequence[Entry], rows: Sequence[Row]) -> list[Entry]:
    """Entries for the steps that made no update, of which the journal does not say it; a roll-back takes back what it
    said of later steps."""
    known: set[int] = set()
    for entry in journal:
        if entry["kind"] == "rollback":
            known = {step for step in known if step <= entry["at_step"]}
        elif entry["kind"] == "no_update":
            known.add(entry["at_step"])
    return [
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": "k2jax.train",
            "kind": "no_update",
            "at_step": row.step,
            "why": f"loss {row.loss:.6g}, gradient norm {row.grad_norm:.6g}: "
            f"{'above a limit' if row.outlier else 'not finite'}",
        }
        for row in rows
        if not row.applied and row.step not in known
    ]


def helped(journal: Sequence[Entry], rows: Sequence[Row], window: int) -> Entry | None:
    """The roll-back whose watch is over with the newest row, and that nothing says of yet; None where there is none.

    An outlier in that time may still become the same spike, until it has left the window.
    """
    entry = next((entry for entry in reversed(journal) if entry["kind"] in ("rollback", "helped")), None)
    if not rows or entry is None or entry["kind"] == "helped":
        return None
    suspects = [row.step for row in rows if (row.outlier or not row.applied) and row.step > entry["at_step"]]
    over = max([entry["until"], *(step + window for step in suspects if step <= entry["until"])])
    return entry if rows[-1].step >= over else None


def note_helped(entry: Entry, rows: Sequence[Row]) -> Entry:
    """The journal's entry that a roll-back has helped, with what the steps since then were like."""
    since = [row for row in rows if row.step >= entry["crossing"]]
    losses = [row.loss for row in since if row.applied]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": "k2jax.train",
        "kind": "helped",
        "at_step": rows[-1].step,
        "branch": entry["branch"],
        "why": f"no spike up to step {rows[-1].step}; median loss since {float(np.median(losses)):.4f}",
    }
