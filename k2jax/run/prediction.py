"""prediction.json: what was expected of a run before its first step, and how it came out.

Its digest is in the journal, so that nobody can have written it afterwards without it being seen.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.data.epochs import has_epochs, read_epochs
from k2jax.data.journal import read_journal
from k2jax.data.manifest import sha256_json
from k2jax.errors import ConfigError
from k2jax.run import drift, goodput
from k2jax.run.ledger import Ledger, bits_float

NAME = "prediction.json"


def write_prediction(workdir: Path | BucketPath, prediction: dict[str, Any]) -> str:
    """Keeps it in a run directory that has made no step, and its digest, which it returns, in the journal.

    ConfigError where the run has begun, or holds a prediction already.
    """
    if has_epochs(workdir) or (workdir / "journal.jsonl").exists() and not (workdir / NAME).exists():
        raise ConfigError(f"--workdir={workdir}: the run has begun: a prediction is made before its first step")
    if (workdir / NAME).exists():
        raise ConfigError(f"--workdir={workdir}: holds a prediction: to make another remove it and journal.jsonl")
    files.make_folder(workdir)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    prediction = {"format": 1, "made": now, "before_step": 0, **prediction}
    files.write_json(workdir / NAME, prediction, sort_keys=True)
    digest = sha256_json(prediction)
    entry = {"time": now, "by": "tools/predict.py", "why": "made before step 1"}
    entry |= {"kind": "predict", "at_step": 0, "digest": digest}
    files.write_bytes(workdir / "journal.jsonl", json.dumps(entry, sort_keys=True).encode() + b"\n")
    return digest


def read_prediction(workdir: Path | BucketPath) -> dict[str, Any] | None:
    """None where none was made. ConfigError where it is not the one whose digest the journal has."""
    if not (workdir / NAME).exists():
        return None
    found = files.read_json(workdir / NAME)
    known = [entry["digest"] for entry in read_journal(workdir / "journal.jsonl") if entry["kind"] == "predict"]
    if not isinstance(found, dict) or sha256_json(found) not in known:
        raise ConfigError(f"{workdir / NAME}: its digest is not in the journal: it was changed, or made afterwards")
    return found


def final_steps(steps: int) -> int:
    """Of how many last steps the mean loss is a run's final one: the loss of one step is that of its few rows."""
    return min(steps, max(20, round(0.02 * steps)))


def outcome(workdir: Path | BucketPath) -> dict[str, Any] | None:
    """Prediction beside outcome, {what: {"predicted", "actual"}}; None where none was made.

    "loss" at the last step made so far, "wall_s" of a finished run; "differs" names the keys in which the run is not
    the experiment that the prediction was made for.
    """
    prediction = read_prediction(workdir)
    if prediction is None:
        return None
    rows = [row for row in Ledger(workdir / "ledger", None).steps.rows() if row["applied"]]
    found: dict[str, Any] = {
        "differs": sorted(drift.differences(prediction["config"], read_epochs(workdir)[0].config)),
        "steps": rows[-1]["step"] if rows else 0,
    }
    if rows and prediction.get("loss"):
        steps, losses = zip(*prediction["loss"]["curve"], strict=True)
        last = rows[-final_steps(len(rows)) :]
        actual = float(np.mean([bits_float(row["loss"]) for row in last]))
        found["loss"] = {"predicted": float(np.interp(rows[-1]["step"], steps, losses)), "actual": actual}
    if prediction.get("wall_s"):
        spent = goodput.read_goodput(workdir)
        if spent.ended == "done":
            found["wall_s"] = {"predicted": prediction["wall_s"], "actual": spent.wall_s}
    return found


