"""Prints what a run has cost so far: tokens, FLOPs, device-hours, energy, money, each with its formula.

python -m k2jax.costs --workdir=runs/k2 [--watts=500] [--price=2.10] [--json]
"""

import argparse
import json

from k2jax import paths
from k2jax.errors import run_main
from k2jax.run.costs import Cost, as_json, costs

__all__ = ["Cost", "costs", "main"]


def table(rows: list[Cost]) -> str:
    """A line a number."""
    lines = []
    for row in rows:
        value = (
            "unknown"
            if row.value is None
            else f"{row.value:,.0f}"
            if row.value == int(row.value)
            else f"{row.value:.4g}"
        )
        mark = " (estimate)" if row.estimate and row.value is not None else ""
        lines.append(f"{row.name:32}{value:>22} {row.unit:5} {row.formula}{mark}")
    return "\n".join(lines)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m k2jax.costs",
        description="Prints what a run has cost so far, each number with its formula.",
    )
    paths.add(parser, "--workdir", buckets=True, required=True, metavar="DIR", help="run directory; it is only read")
    parser.add_argument("--watts", type=positive, help="power of one device, for its energy (default: counted by NVML, "
                        "else as its maker states)")  # fmt: skip
    parser.add_argument("--price", type=positive, metavar="USD", help="of one device for an hour")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead")
    args = parser.parse_args()
    rows = costs(args.workdir, watts=args.watts, price=args.price)
    print(json.dumps(as_json(rows)) if args.json else table(rows))


if __name__ == "__main__":
    run_main(main, prints=True)
