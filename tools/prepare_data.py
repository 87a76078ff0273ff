"""Documents to stores.

    python tools/prepare_data.py --config=experiments/data/NAME.py --out=DIR [--executor=local|ray|slurm] [--workers=N]
    python tools/prepare_data.py --seqio_mixture=NAME --module=MODULE --out=DIR

DIR gets tokenizer.json, a store for each subset, card/ (what came in, what was left out and why, as data.md, data.json
and index.html) and data.json. Stopped at any time, the same command goes on where it was; after a change of the recipe
it does again what that changes, having said so, where DIR is not finished or has kept its stages; a finished DIR of
the same recipe is left as it is. Of conversations DIR also gets chat_template.jinja, and one is shown with what is
learned of it. What comes out does not depend on the executor or the workers.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths  # noqa: E402
from k2jax.errors import ConfigError, run_main  # noqa: E402


def main() -> None:
    """Parses the command line, prepares, and says what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    paths.add(what, "--config", metavar="FILE", help="the data experiment, a Python file; see experiments/data")
    what.add_argument("--seqio_mixture", metavar="NAME", help="a seqio Task or Mixture (pip install 'k2jax[seqio]')")
    add("--module", help="of --seqio_mixture: the module that registers it when it is imported")
    paths.add(parser, "--out", required=True, metavar="DIR", help="what comes out; all workers must see it")
    add("--executor", choices=("local", "ray", "slurm"), default="local", help="where tasks run (default: local)")
    add("--workers", type=int, default=0, metavar="N", help="tasks at once (default: the cores it may use)")
    add("--keep_stages", action="store_true", help="keep what lies between documents and stores, in DIR/stages")
    add("--other_code", action="store_true", help="go on with what another version of k2jax began; it is recorded")
    help_redo = "do a stage again, and what follows it; clean/SUBSET is one subset's part. May be given more than once"
    add("--redo", action="append", default=[], metavar="STAGE", help=help_redo)
    add("--dry_run", "--dry-run", action="store_true", help="say what is done, what would be, and why; write nothing")
    args = parser.parse_args()
    if args.seqio_mixture and not args.module:
        parser.error("--seqio_mixture needs --module, the module that registers it")
    try:
        from k2jax.prepare import build, dry_run, recipe  # after the arguments: --help needs none of it
        from k2jax.prepare.chat import show
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'k2jax[data]'") from error

    if args.config:
        config = recipe.load_config(args.config)
    else:
        sys.path.append(os.getcwd())  # where the user's module may be; workers get it, too
        try:
            from k2jax.prepare.tokens import seqio_bridge
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed: pip install 'k2jax[data,seqio]'") from error

        config = seqio_bridge.recipe_of_mixture(args.seqio_mixture, args.module)
    if args.dry_run:
        print("\n".join(dry_run.look(config, args.out, other_code=args.other_code, redo=args.redo)))
        return
    data, was_there = build.build(
        config, args.out, executor=args.executor, workers=args.workers, keep_stages=args.keep_stages,
        other_code=args.other_code, redo=args.redo,
    )  # fmt: skip
    print(
        f"{args.out}: {'finished earlier, left as it is' if was_there else 'finished'}; "
        f"tokenizer of {data['vocab_size']:,} ids, SHA-256 {data['tokenizer_sha256'][:16]}"
    )
    print(build.describe(data), flush=True)
    if picture := show.examples(Path(args.out), data, colours=show.wants_colours(sys.stderr)):
        print(picture, file=sys.stderr, flush=True)  # which passes colours on


if __name__ == "__main__":
    run_main(main)
