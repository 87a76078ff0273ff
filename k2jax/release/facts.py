"""release.json and checkpoints.csv: what a release holds, for programs. And what it is going to weigh."""

import csv
import io
from collections import Counter
from typing import Any

from k2jax import __version__
from k2jax import config as configuration
from k2jax.data.loader import row_length
from k2jax.evals.results import Results
from k2jax.files import read_json
from k2jax.model.decoder import num_params
from k2jax.release import sources
from k2jax.release.choice import Options
from k2jax.release.record import Checkpoint, Record
from k2jax.release.scratch import Scratch

FORMAT = 1
COLUMNS = ("stage", "step", "tokens", "loss", "digest", "bytes", "optimizer_state")
# Sizes before they are known, in bytes: a token in Parquet, a step's digest, the rest of an export, of a release.
TOKEN, DIGEST, OF_AN_EXPORT, REST = 1.2, 100, 1_000_000, 8_000_000


def revision(record: Record, step: int) -> str:
    """The name of an export, as a branch on a hub."""
    [tokens] = [checkpoint.tokens for checkpoint in record.checkpoints if checkpoint.step == step]
    return f"step{step}-tokens{tokens}"


def facts(record: Record, options: Options, steps: list[int], exports: list[int], made: str) -> dict[str, Any]:
    """What release.json holds: with the checkpoints of `steps`, and exports of those of `exports`."""

    def entry(checkpoint: Checkpoint) -> dict[str, Any]:
        path = sources.checkpoint_name(checkpoint.step) if checkpoint.step in steps else None
        moments = path is not None and checkpoint.moments and options.optimizer_state
        fields = {key: getattr(checkpoint, key) for key in ("step", "tokens", "stage", "digest")}
        return {**fields, "optimizer_state": moments, "path": path}

    names = {step: revision(record, step) for step in exports}
    return {
        "format": FORMAT,
        "name": record.name,
        "run": record.run,
        "made": made,
        "k2jax": __version__,
        "commit": next((launch["commit"] for launch in reversed(record.launches) if launch.get("commit")), None),
        "options": options._asdict(),
        "step": record.step,
        "num_steps": record.order.num_steps,
        "tokens": record.tokens,
        "chunks": len(record.chunks),
        "checkpoints": [entry(checkpoint) for checkpoint in record.checkpoints],
        "exports": [{"step": step, "revision": name, "path": f"exports/{name}"} for step, name in names.items()],
        "branches": record.branches,
        "data": options.data,
    }


def checkpoints_csv(scratch: Scratch, record: Record, released: dict[str, Any]) -> str:
    """Every checkpoint of the run; those that are not in the release have no bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    sizes: Counter[str] = Counter()
    for name in scratch.names("run/checkpoints/"):
        sizes["/".join(name.split("/")[:3])] += scratch.size(name)
    for checkpoint, entry in zip(record.checkpoints, released["checkpoints"], strict=True):
        size = sizes[entry["path"]] if entry["path"] else ""
        loss = "" if checkpoint.loss is None else repr(checkpoint.loss)
        state = "true" if entry["optimizer_state"] else "false"
        writer.writerow([entry["stage"] or "", entry["step"], entry["tokens"], loss, entry["digest"], size, state])
    return text.getvalue()


def last_results(record: Record) -> list[dict[str, Any]]:
    """[{"task", "metrics"}] of the last checkpoint: its evaluations, and the held-out losses at the run's end."""
    found = [
        {"task": result["task"], "metrics": result["metrics"]}
        for result in Results(record.workdir).all()
        if result["checkpoint"] == record.checkpoints[-1].digest
        and "weights" not in result["settings"]  # of an average, which is not what is released
    ]
    path = record.workdir / "validation.json"
    held_out = read_json(path) if path.is_file() else {}
    if held_out.get("step") == record.step:
        for subset, values in sorted(held_out.get("subsets", {}).items()):
            found.append({"task": f"held-out windows of {subset}", "metrics": {"loss": values["loss"]}})
    return found


def sizes(record: Record, options: Options, files: list[sources.Source], exports: list[int]) -> dict[str, int]:
    """Bytes by part; copies to the byte, what is made anew about."""
    checkpoints = sum(source.bytes for source in files if "/checkpoints/" in source.name)
    found = {"checkpoints": checkpoints, "run": sum(source.bytes for source in files) - checkpoints}
    if options.data == "tokens":
        found["data"] = int(TOKEN * sum(_ids(record, first, last) for first, last in record.chunks))
    else:
        found["data"] = DIGEST * record.step
    one = 2 * num_params(configuration.from_dict(record.config).model) + OF_AN_EXPORT
    return {**found, "exports": one * len(exports), "source, report and cards": REST}


def _ids(record: Record, first: int, last: int) -> int:
    order = record.order.of_step(first)
    stage = order.stage_of_step(first)
    return (last - first + 1) * stage.rows_per_step * row_length(stage.sequence_length, order.manifest["label_shift"])
