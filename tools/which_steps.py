"""Prints every step of a run that reads any token of a document.

    tools/which_steps.py --workdir runs/k2 --doc 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08

A document is named by the SHA-256 of its text, as which_docs.py prints it. Needs the run directory and the
stores that its manifest names. Token ranges are [first, stop).
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths  # noqa: E402
from k2jax.data.provenance import DocumentReads, open_run, which_steps  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.run import branches  # noqa: E402


def as_dict(document: DocumentReads) -> dict:
    """For JSON: names instead of places."""
    return {**document._asdict(), "reads": [read._asdict() for read in document.reads]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    branches.add_options(parser)
    parser.add_argument("--doc", required=True, metavar="ID", help="SHA-256 (hex) of the document's text")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each place it stands")
    paths.add(parser, "--stores", urls=True, metavar="DIR", help="where the stores are, by name, if they moved")
    args = parser.parse_args()
    args.workdir = branches.chosen(args)

    run = open_run(args.workdir, args.stores)
    for document in which_steps(run, args.doc):
        if args.json:
            print(json.dumps(as_dict(document)))
            continue
        # A source is anybody's file name: repr keeps control characters off the terminal.
        where = f"{document.subset}, document {document.index}, {document.source!r}"
        print(f"{where}: {document.num_tokens} tokens")
        if not document.reads:
            print("  held out for validation" if document.held_out else "  in no row of this run")
        for read in document.reads:
            step = f"step {read.step}, row {read.row}" if read.step else "skipped by the journal"
            tokens, in_row = ("{}:{}".format(*span) for span in (read.in_document, read.in_row))
            place = f"stage {read.stage}, epoch {read.epoch}, position {read.position}"
            print(f"  {step}: {place}, tokens {tokens} at {in_row} of the row")


if __name__ == "__main__":
    run_main(main, prints=True)
