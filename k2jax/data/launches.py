"""environment.json: on what the run was launched, an entry each time; and where its stores were then."""

from pathlib import Path
from typing import Any

from k2jax import files
from k2jax.data.manifest import sha256_json
from k2jax.errors import ConfigError

Launch = dict[str, Any]


def read_launches(workdir: Path) -> list[Launch]:
    """All so far, [] where there is none. ConfigError when the file is damaged."""
    path = workdir / "environment.json"
    if not path.exists():
        return []
    values = files.read_json(path)
    launches = values.get("launches") if isinstance(values, dict) else None
    if not isinstance(launches, list) or not all(map(_is_one, launches)):
        raise ConfigError(f"{path} is damaged: it holds no list of launches: restore it from a copy")
    if values.get("sha256", sha256_json(launches)) != sha256_json(launches):  # older files have none
        raise ConfigError(f"{path} is damaged: its launches are not those of its digest: restore it from a copy")
    return launches


def _is_one(launch: Any) -> bool:
    if not isinstance(launch, dict) or not isinstance(launch.get("time"), str):
        return False
    stores, step = launch.get("stores", {}), launch.get("newest_step")
    return isinstance(stores, dict) and set(map(type, stores.values())) <= {str} and type(step) in (int, type(None))


def write_launches(workdir: Path, launches: list[Launch]) -> None:
    found = {"launches": launches, "sha256": sha256_json(launches)}
    files.write_json(workdir / "environment.json", found, sort_keys=True, end="")
