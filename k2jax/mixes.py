"""The mix of a prepared folder, as its data.json says it: for an experiment's stage, through config.mix_of."""

import math
from pathlib import Path
from typing import Any

from k2jax import paths
from k2jax.errors import ConfigError
from k2jax.files import parse_json, read_bytes
from k2jax.keys import KINDS

MOST_BYTES = 1 << 28  # of a data.json


def mix_of(folder: str, kind: str = "") -> dict[str, float]:
    """{store: repeats} of a folder that tools/prepare_data.py made, or of a copy of it at a gs:// or s3:// URL.

    A plain dict, to be changed as one likes: `mix["code"] *= 2`, `del mix["web"]`. `kind` is that of a stage: only the
    stores that one of that kind can read, where a folder holds several ("pretrain": text, "sft": conversations, "dpo":
    pairs); "" is all. What a run records is the dict as it is now: a later change of data.json is drift, by name.
    Raises ConfigError for a folder that is not prepared, or whose data.json is damaged; StorageError for a bucket that
    does not answer.
    """
    if kind not in ("", *KINDS):
        raise ConfigError(f"config.mix_of({folder!r}, {kind!r}): kind must be one of {', '.join(KINDS)}, or left out")
    place = paths.in_bucket(str(folder), "config.mix_of")
    data = _data_json(place)
    try:
        mix = {name: (data["mix"][name], _kind_of(data, name)) for name in data["mix"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{place}/data.json says no mix of stores that can be read ({type(error).__name__}: {error}): restore it "
            "from a copy, or prepare the folder again"
        ) from error
    for name, (repeats, _) in mix.items():
        if type(repeats) not in (int, float) or not 0 < repeats < math.inf:
            raise ConfigError(
                f"{place}/data.json: repeats of {name!r} is {repeats!r}, expected a number above 0: restore it from a "
                "copy"
            )
    found = {name: float(repeats) for name, (repeats, of) in mix.items() if kind in ("", of)}
    if not found:
        kinds = ", ".join(f"{name} ({of})" for name, (_, of) in sorted(mix.items()))
        raise ConfigError(f"{place} has no store for a stage of kind {kind!r}: it has {kinds or 'none at all'}")
    return found


def _kind_of(data: dict[str, Any], name: str) -> str:
    """Of the stages that can read a store."""
    row = data["stores"][name]
    of_subset = data["config"]["subsets"][row["subset"]].get("conversations") or {}
    if "supervised_tokens" not in row:
        return "pretrain"
    return "dpo" if of_subset.get("pairs") else "sft"


def _data_json(place: Any) -> Any:
    """What a prepared folder says of itself."""
    try:
        return parse_json(read_bytes(place / "data.json", MOST_BYTES), f"{place}/data.json")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        prepare = f"python tools/prepare_data.py --config=RECIPE --out={place}"
        if not isinstance(place, Path):
            what = f"there is no {place}/data.json: copy the whole prepared folder there, data.json with it"
        elif not place.is_dir():
            what = f"{place.absolute()} is no folder: prepare it ({prepare}), or name the one that is"
        elif (place / "stages").is_dir():
            what = f"the preparation of {place} has not finished: run the same command again ({prepare})"
        else:
            what = f"{place} holds no data.json: it is no folder that was prepared, or not all of it was copied"
        raise ConfigError(f"config.mix_of({str(place)!r}): {what}") from error
