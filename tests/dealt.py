"""What comes before the stages that read, for tests of those: sources listed, and dealt out to tasks."""

import shutil
from pathlib import Path

from ml_collections import ConfigDict

from k2jax.prepare import dealing
from k2jax.prepare.engine.engine import Engine


def deal(config: ConfigDict, out: Path) -> ConfigDict:
    """The recipe with its numbers of tasks; what they read lies below OUT/stages/files."""
    shutil.rmtree(out / "stages" / "files", ignore_errors=True)
    listing = dealing.listed(config)
    config = dealing.settled(config, listing)
    dealing.deal(config, out, Engine(out / "marks", "local", 1, {}), listing)
    shutil.rmtree(out / "marks", ignore_errors=True)
    return config
