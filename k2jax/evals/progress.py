"""The progress bar of an evaluation: on stderr, only where that is a terminal."""

import sys

from tqdm import tqdm


def bar(what: str, total: int | None, unit: str) -> tqdm:
    return tqdm(desc=what, total=total, unit=unit, leave=False, disable=not sys.stderr.isatty())
