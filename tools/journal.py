"""Lists a run's journal, or skips or defers a range of its data.

    tools/journal.py --workdir runs/k2 --list
    tools/journal.py --workdir runs/k2 --defer 150561:151501 --steps --at-step 150560 --why "loss spike"

The run must stand still, and go on from the checkpoint of --at-step.
"""

import argparse
import getpass
import sys
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths  # noqa: E402
from k2jax.data.epochs import check_journal, decide, order_of, read_epochs  # noqa: E402
from k2jax.data.journal import append_entry, ranges_of, read_journal  # noqa: E402
from k2jax.data.order import Order  # noqa: E402
from k2jax.errors import ConfigError, run_main  # noqa: E402


def parse_range(text: str) -> tuple[int, int]:
    """"A:B" as two whole numbers."""
    first, _, last = text.partition(":")
    return int(first), int(last)


def positions_of_steps(order: Order, first: int, last: int) -> tuple[int, int]:
    """The positions [a, b) that steps first..last read; ConfigError if they are not one range of a stage."""
    stage = order.stage_of_step(first)
    a, b = int(order.positions(first)[0]), int(order.positions(last)[-1]) + 1
    if stage != order.stage_of_step(last) or b - a != (last - first + 1) * stage.rows_per_step:
        raise ConfigError(f"steps {first}:{last} do not read one range of positions of one stage: split them")
    return a, b


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    paths.add(parser, "--workdir", buckets=True, required=True, help="the run directory")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="print the entries")
    for kind, meaning in (("skip", "never read them"), ("defer", "read them at the end of their stage")):
        what = f"positions A to B - 1: {meaning}"
        action.add_argument(f"--{kind}", metavar="A:B", type=parse_range, help=what)
    parser.add_argument("--steps", action="store_true", help="A:B are steps, B too, of the order as it is")
    parser.add_argument("--at-step", type=int, help="the checkpoint that the run goes on from")
    parser.add_argument("--why", default="", help="the reason, for those who read the run later")
    parser.add_argument("--by", default=None, help="who decides (default: the user's name)")
    args = parser.parse_args()

    epochs = read_epochs(args.workdir)
    path = args.workdir / "journal.jsonl"
    journal = read_journal(path)
    order = order_of(epochs, journal)
    check_journal(epochs, journal)
    if args.list:
        for entry in journal:
            what = ", ".join(f"{a}:{b}" for a, b in ranges_of(entry))
            when = f"{entry['time']} step {entry['at_step']}"
            print(f"{when} {entry['kind']} {what} by {entry['by']}: {entry['why']}")
        print(f"{len(journal)} entries, {order.num_steps} steps, order {order.digest()[:12]}")
        return
    if args.at_step is None:
        parser.error("--at-step is needed to skip or defer")
    kind, (a, b) = ("skip", args.skip) if args.skip else ("defer", args.defer)
    if args.steps:
        a, b = positions_of_steps(order, a, b)
    by = args.by or getpass.getuser()
    entry = decide(epochs, journal, kind=kind, ranges=[(a, b)], at_step=args.at_step, by=by, why=args.why)
    append_entry(path, entry)
    order = order_of(epochs, [*journal, entry])
    print(f"{kind} of positions {a}:{b} written: {order.num_steps} steps, order {order.digest()[:12]}")


if __name__ == "__main__":
    run_main(main)
