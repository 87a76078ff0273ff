"""Prints the documents that a step of a run was trained on, row by row.

    tools/which_docs.py --workdir runs/k2 --step 1000
    tools/which_docs.py --workdir runs/k2 --step 1000 --row 7 --text

Needs the run directory and the stores that its manifest names. Token ranges are [first, stop).
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths  # noqa: E402
from k2jax.data.provenance import RowOrigin, open_run, which_docs  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.run import branches  # noqa: E402


def as_dict(origin: RowOrigin) -> dict:
    """For JSON: names instead of places."""
    return {**origin._asdict(), "documents": [part._asdict() for part in origin.documents]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    branches.add_options(parser)
    parser.add_argument("--step", required=True, type=int, help="from 1")
    parser.add_argument("--row", type=int, help="one row of the step, from 0 (default: all)")
    parser.add_argument("--text", action="store_true", help="print the text, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    paths.add(parser, "--stores", urls=True, metavar="DIR", help="where the stores are, by name, if they moved")
    args = parser.parse_args()
    args.workdir = branches.chosen(args)

    run = open_run(args.workdir, args.stores)
    for origin in which_docs(run, args.step, args.row, text=args.text):
        if args.json:
            print(json.dumps(as_dict(origin)))
            continue
        place = f"epoch {origin.epoch}, window {origin.window}, position {origin.position}"
        print(f"row {origin.row}: {origin.subset}, {place}")
        for part in origin.documents:
            tokens, in_row = ("{}:{}".format(*span) for span in (part.in_document, part.in_row))
            # A source is anybody's file name: repr keeps control characters off the terminal.
            print(f"  {part.id} {part.source!r} tokens {tokens} at {in_row} of the row")
            if part.text is not None:
                print(f"    {part.text!r}")


if __name__ == "__main__":
    run_main(main, prints=True)
