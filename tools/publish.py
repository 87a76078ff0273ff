"""Puts a release on a Hugging Face hub: all of it as main, each export as a branch named by its revision.

    HF_TOKEN=... tools/publish.py --release releases/smoke --repo me/smoke-360
    tools/publish.py --release releases/smoke --repo me/smoke-360 --dry-run

The release is checked first, file by file, and what the hub has in the end as well. After a stop the same command goes
on: what is there is not sent again. The token comes from HF_TOKEN in the environment, and from nowhere else.
"""

import argparse
import json
import os
import sys
from pathlib import Path

if not __package__:  # a file of a checkout; installed, it is k2jax.tools.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from k2jax import paths  # noqa: E402
from k2jax.errors import run_main  # noqa: E402
from k2jax.release import publish as publishing  # noqa: E402


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths.add(parser, "--release", required=True, metavar="DIR", help="as tools/release.py made it; it is only read")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made where it is not there")
    parser.add_argument("--endpoint", default=publishing.HUB, metavar="URL", help="of another hub")
    parser.add_argument("--private", action="store_true", help="for a repository that is made now")
    parser.add_argument("--dry-run", action="store_true", help="check the release, say what would be sent")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    args = parser.parse_args()
    endpoint = args.endpoint.rstrip("/")
    publishing.check_repo(args.repo)
    publishing.check_endpoint(endpoint)
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the library is imported

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    package = publishing.open_package(args.release)
    said = publishing.describe(package, args.repo, endpoint)
    if not args.dry_run:
        said["url"] = publishing.publish(package, args.repo, endpoint, private=args.private, say=say)
    print(json.dumps(said) if args.json else publishing.as_text(said))
    if not args.json:
        print(f"digest {package.digest}: say it where people find it, elsewhere than there")


if __name__ == "__main__":
    run_main(main)
