"""Whether a resumed run is the one that was saved: which keys may change, and which differ.

A key that would change what the run computes is drift, and is refused unless the user allows it by name.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from k2jax.config import FREE_KEYS, base, flatten, stage, to_dict


def config_digest(config: ConfigDict | dict[str, Any]) -> str:
    """SHA-256 of what the run computes: the free keys do not enter. A `to_dict` stands for its configuration."""
    fixed = {key: value for key, value in flatten(to_dict(config)).items() if not _matches(key, FREE_KEYS)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys that differ between two `to_dict` configurations and are not free: {key: (old, new)}.

    A key that k2jax did not have yet when the old one was saved is there by its default: what was done before it came.
    A type that was left open (of a prediction, or before runs recorded it) is not contradicted by the one it became.
    """
    old_flat, new_flat = flatten(old), flatten(new)
    old_flat = {key: value for key, value in _defaults(old_flat).items() if key in new_flat} | old_flat
    if old_flat.get("precision.compute") == "auto":
        old_flat["precision.compute"] = new_flat.get("precision.compute")
    return {
        key: (old_flat.get(key), new_flat.get(key))
        for key in sorted(old_flat.keys() | new_flat.keys())
        if old_flat.get(key) != new_flat.get(key) and not _matches(key, FREE_KEYS)
    }


def _defaults(keys: Iterable[str]) -> dict[str, Any]:
    """Of every key; of the stages that `keys` name."""
    stages = {key.split(".")[1] for key in keys if key.startswith("stages.")}
    rows = {f"stages.{i}.{key}": value for i in stages for key, value in flatten(to_dict(stage())).items()}
    return flatten(to_dict(base())) | rows


def not_allowed(found: dict[str, tuple[Any, Any]], allowed: Iterable[str]) -> list[str]:
    """The keys of `differences` that no entry of `allow_drift` names (an entry names a key or all keys below it)."""
    return [key for key in found if not _matches(key, tuple(allowed))]


def _matches(key: str, patterns: Iterable[str]) -> bool:
    def match(pattern: str) -> bool:
        parts, wanted = key.split("."), pattern.split(".")
        return len(parts) >= len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=False))

    return any(match(pattern) for pattern in patterns)
