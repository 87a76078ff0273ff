"""Prints where the wall time of a run went, across its restarts, also while it runs.

    python -m k2jax.goodput --workdir=runs/k2

Only steps that count are goodput: not those that made no update, that a resume ran again or a roll-back left behind.
"""

import argparse
import json
import time

from k2jax import paths
from k2jax.errors import run_main
from k2jax.run.goodput import read_goodput, table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.goodput", description="Prints where the wall time of a run went, across its restarts."
    )
    paths.add(parser, "--workdir", buckets=True, required=True, metavar="DIR", help="run directory; it is only read")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead: seconds by cause")
    args = parser.parse_args()
    found = read_goodput(args.workdir)
    print(json.dumps(found._asdict()) if args.json else table(found, time.time()))


if __name__ == "__main__":
    run_main(main, prints=True)
