"""Which checkpoints, exports and data a release holds: the options, and what of the run they mean."""

import re
from typing import NamedTuple

from k2jax.data.chunks import checkpoint_steps
from k2jax.errors import ConfigError
from k2jax.release.record import Record

DATA = ("tokens", "digests")


class Options(NamedTuple):
    """As they are on the command line, and in release.json."""

    checkpoints: str = "all"  # last, all, every:N, none
    optimizer_state: bool = False
    exports: str = "last"
    data: str = "tokens"


def steps(record: Record, text: str, option: str) -> list[int]:
    """The steps, of those whose checkpoints are there, that last, all, every:N or none names.

    every:N counts the chunks' checkpoints from the run's beginning, as K2 did, and has the last one, too.
    Raises ConfigError for anything else, and where the run has none of these.
    """
    there = [checkpoint.step for checkpoint in record.checkpoints if checkpoint.there]
    every = re.fullmatch(r"every:([1-9]\d{0,8})", text)
    if text == "none":
        return []
    if text == "all":
        found = there
    elif text == "last":
        found = [step for step in there if step == record.step]
    elif every:
        number = int(every[1])
        counted = checkpoint_steps(record.order)[number - 1 :: number]
        found = [step for step in there if step in counted or step == record.step]
    else:
        raise ConfigError(f"{option}={text}: expected last, all, every:N or none")
    if not found:
        raise ConfigError(
            f"{option}={text}: none of those is on the storage: {record.workdir} has checkpoints of steps "
            f"{', '.join(map(str, there[-8:])) or '(none)'}: bring them back, or use {option}=none"
        )
    return found
