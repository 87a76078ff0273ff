"""Hands a run over whole: a folder with everything of it, which a stranger can check without this code.

    tools/release.py --workdir runs/smoke --out releases/smoke --checkpoints last --exports last
    tools/release.py --workdir runs/k2 --out /mnt/k2-360 --optimizer-state --dry-run

Checkpoints, Hugging Face exports with their certificates, the data sequence or its digests, journal, ledger, metrics,
evaluations, cards. It is made in OUT.partial and renamed when it is whole; after a stop or a full disk the same command
goes on. The last line has the digest of the release: publish it elsewhere, too.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # it is reading and writing; accelerators are left to who needs them
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"  # a product that waits would hold its weights

import argparse
import json
import sys
import time
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths
from k2jax.errors import run_main
from k2jax.parallel.host_memory import keep_freed_memory

WHICH = "last, all, every:N (of the chunks', and the last) or none"


def table(sizes: dict[str, int]) -> str:
    """Megabytes by part, the largest first, and in all."""
    rows = [*sorted(sizes.items(), key=lambda part: -part[1]), ("in all, about", sum(sizes.values()))]
    return "\n".join(f"{name:<26}{size / 1e6:>16,.1f} MB" for name, size in rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    paths.add(parser, "--workdir", buckets=True, required=True, metavar="DIR", help="the run; it is only read")
    paths.add(parser, "--out", required=True, metavar="DIR", help="the release; new, or empty")
    add("--checkpoints", default="all", metavar="WHICH", help=f"{WHICH} (default: all)")
    add("--optimizer-state", action="store_true", help="with the moments, so that training can go on from them")
    add("--exports", default="last", metavar="WHICH", help=f"in Hugging Face's format: {WHICH} (default: last)")
    add("--data", choices=("tokens", "digests"), default="tokens", help="what every step read, or what it hashes to")
    paths.add(parser, "--stores", urls=True, metavar="DIR", help="where the stores are, by name, if they moved")
    paths.add(parser, "--sign-key", metavar="FILE", help="private EC key (PEM) to sign with: model.sig")
    add("--dry-run", action="store_true", help="say how large it will be, by part, and write nothing")
    add("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    keep_freed_memory()  # before the imports below, some of which start threads
    started = time.perf_counter()

    from tqdm import tqdm

    from k2jax.release.build import Options, plan, release

    def say(line: str) -> None:
        tqdm.write(line, file=sys.stderr if args.json else sys.stdout)
        sys.stdout.flush()

    options = Options(args.checkpoints, args.optimizer_state, args.exports, args.data)
    if args.dry_run:
        sizes = plan(args.workdir, options).sizes
        print(json.dumps({"dry_run": True, "bytes": sizes, "all": sum(sizes.values())}) if args.json else table(sizes))
        return
    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        more = {"stores": args.stores, "sign_key": args.sign_key, "say": say, "progress": bar.update}
        done = release(args.workdir, args.out, options, **more)
    if args.json:
        result = {"out": str(args.out), **done._asdict(), "seconds": round(time.perf_counter() - started, 3)}
        print(json.dumps(result))
        return
    print(f"released to {args.out}: {done.files:,} files, {done.bytes / 1e6:,.1f} MB, digest {done.digest}")


if __name__ == "__main__":
    run_main(main)
