"""Writes the training sequence of a run as run: a Parquet file a chunk that anyone can read, in the order of training.

    tools/export_chunks.py --workdir runs/k2 --out k2-chunks --workers 8
    tools/export_chunks.py --workdir runs/k2 --out k2-chunks --chunks 0:10

Needs the run directory and the stores that its manifest names; the run may be at work. README.md in the output says
what the columns are. Run again after a stop: finished chunks are checked and left. Machines that share the output
folder may each take a range of chunks. Throughput is in the lines that it prints.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.run import branches  # noqa: E402


def chunk_range(text: str) -> tuple[int | None, int | None]:
    """(2, 5) of "2:5"; None for an end that is left out."""
    first, colon, stop = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:STOP, such as 0:10 or 350:")
    return int(first) if first else None, int(stop) if stop else None


def positive(text: str) -> int:
    """A number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    branches.add_options(parser)
    paths.add(parser, "--out", buckets=True, required=True, help="a new folder, or one to go on with")
    parser.add_argument(
        "--chunks",
        type=chunk_range,
        default=(None, None),
        metavar="A:B",
        help="from 0, B not included (default: all)",
    )
    paths.add(parser, "--stores", urls=True, metavar="DIR", help="where the stores are, by name, if they moved")
    parser.add_argument(
        "--workers", type=positive, default=1, help="processes, each at one chunk (default: 1)"
    )
    args = parser.parse_args()
    args.workdir = branches.chosen(args)

    from k2jax.data.export_chunks import export_chunks  # after the arguments: --help needs none of it

    started, rows = time.monotonic(), 0

    def report(entry: dict[str, Any], was_there: bool) -> None:
        nonlocal rows
        rows += 0 if was_there else entry["rows"]
        done = "left as it is" if was_there else f"{rows / (time.monotonic() - started):,.0f} rows/s"
        size = entry["bytes"] / entry["token_ids"]
        steps = f"steps {entry['first_step']:,} to {entry['last_step']:,} ({entry['steps_in_ledger']:,} in the ledger)"
        print(
            f"{entry['file']}: {steps}, {entry['rows']:,} rows, {size:.2f} bytes a token; {done}", flush=True
        )

    summary = export_chunks(
        args.workdir, args.out, chunks=args.chunks, stores=args.stores, workers=args.workers, report=report
    )
    print(f"{args.out}: {len(summary['chunks'])} of {summary['num_chunks']} chunks, see its README.md")


if __name__ == "__main__":
    run_main(main)
