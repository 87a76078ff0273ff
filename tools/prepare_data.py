"""Documents to stores: python tools/prepare_data.py --config=experiments/data/NAME.py --out=DIR

A finished DIR is left as it is; an unfinished one is made again from the start.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax.errors import run_main  # noqa: E402


def main() -> None:
    """Parses the command line, prepares, and says what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="the data experiment: a Python file with get_config(), see experiments/data",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for tokenizer.json, a store for each subset, and data.json (summary)",
    )
    args = parser.parse_args()

    from k2jax.data import prepare  # after the arguments: --help needs none of it

    data, was_there = prepare.prepare(prepare.load_config(args.config), args.out)
    print(
        f"{args.out}: {'finished earlier, left as it is' if was_there else 'finished'}; "
        f"tokenizer of {data['vocab_size']:,} ids, SHA-256 {data['tokenizer_sha256'][:16]}"
    )
    print(prepare.describe(data), flush=True)


if __name__ == "__main__":
    run_main(main)
