"""Makes the report of a run: one HTML file that needs no network, with all that the run directory tells.

    tools/report.py --workdir runs/k2
    tools/report.py --workdir runs/k2 --watch 60
    tools/report.py --workdir runs/k2 --compare runs/k2-small runs/k2-other --out compared.html

The run is only read, and may be at work.
"""

import argparse
import json
import sys
import time
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.run import branches  # noqa: E402


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    branches.add_options(parser)
    paths.add(parser, "--out", buckets=True, metavar="FILE", help="what to write (default: report.html in the workdir)")
    parser.add_argument("--watch", type=_seconds, nargs="?", const=30.0, metavar="SECONDS",
                        help="write it anew every so often (default: 30), up to the run's end")  # fmt: skip
    paths.add(parser, "--compare", buckets=True, nargs="+", default=[], metavar="DIR", help="runs to set beside it")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the file, its bytes, the seconds")
    args = parser.parse_args()
    args.workdir = branches.chosen(args)

    from k2jax.report.build import NAME, Report  # after the arguments: --help needs none of it

    started = time.monotonic()
    out = args.out or args.workdir / NAME
    report = Report(args.workdir, args.compare)
    if args.watch:
        report.watch(out, args.watch, lambda line: print(line, flush=True))
        return
    size = report.write(out)
    seconds = round(time.monotonic() - started, 1)
    for line in report.subject.notes.lines:
        print(f"not read: {line}", file=sys.stderr)
    if args.json:
        print(json.dumps({"out": str(out), "bytes": size, "seconds": seconds, "step": report.subject.last_step}))
    else:
        print(f"the report: {out} ({size / 1e6:.1f} MB, {seconds} s)")


def _seconds(text: str) -> float:
    value = float(text)
    if not 1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to 86400 seconds")
    return value


if __name__ == "__main__":
    run_main(main)
