"""Which commit of its repository this code is, as far as git can say."""

import os
import subprocess
from functools import cache
from pathlib import Path

LIMIT_S = 10  # for a git that hangs, on a file system that does


@cache
def git_commit() -> str | None:
    """Of the checkout that this code runs from, "+" after it where files have changed, "?" where that cannot be told.

    None outside of one: also for a package that was installed into another project's repository, without git, and where
    git gives nothing.
    """
    package = Path(__file__).resolve().parents[1]
    try:
        if Path(_git(package, "rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(package, "rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    try:
        return head + ("+" if _git(package, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return f"{head}?"


def _git(folder: Path, *command: str) -> str:
    """What git says of this folder's repository, whoever owns it; no variable of the environment names another.

    It writes nothing, and runs no program that the repository's configuration names.
    """
    options = ("safe.directory=*", "core.fsmonitor=false")
    given = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    found = subprocess.run(
        ["git", *(part for option in options for part in ("-c", option)), "-C", str(folder), *command],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=True,
        timeout=LIMIT_S,
        stdin=subprocess.DEVNULL,
        env={**given, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
    )
    return found.stdout.strip()
