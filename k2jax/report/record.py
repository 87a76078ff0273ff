"""Sections on the run itself: what it is, its checkpoints, launches, journal, prediction and costs."""

import math
from typing import Any

import numpy as np

from k2jax.config import described_rate, flatten, from_dict
from k2jax.model.decoder import num_params
from k2jax.report.parts import Details, Facts, Section, Table, Text
from k2jax.report.subject import Subject
from k2jax.run import costs as run_costs
from k2jax.run import drift, ledger
from k2jax.run import prediction as foretold
from k2jax.run.costs import Cost
from k2jax.run.goodput import duration
from k2jax.run.saved import steps_so_far
from k2jax.text import redacted

MOST_LAUNCHES, MOST_ENTRIES, MOST_RECORDS = 200, 1_000, 2_000
HIDDEN_KEYS = ("stages",)  # which have a table of their own


def overview(subject: Subject) -> Section:
    """What the run is, in tiles, and its stages and configuration."""
    series = subject.rows.series
    loss = _newest(subject, "loss")
    spent = subject.goodput
    steps = f"{subject.last_step:,}" + (f" of {subject.num_steps:,}" if subject.num_steps else "")
    tiles = [
        ("step", steps),
        ("tokens", short_count(subject.tokens_at(subject.last_step)) if series.buckets else "0"),
        ("parameters", short_count(_params(subject))),
        ("training loss", f"{loss:.4f}" if loss is not None else "-"),
        ("wall time", duration(spent.wall_s) if spent else "-"),
        ("goodput", f"{spent.seconds['step'] / spent.wall_s:.1%}" if spent and spent.wall_s else "-"),
    ]
    parts: list[Any] = [Facts(tiles, big=True), Facts(_identity(subject)), _stages(subject)]
    settings = flatten({k: v for k, v in redacted(subject.settings).items() if k not in HIDDEN_KEYS})
    rows = [[key, _shown(value)] for key, value in settings.items()]
    parts.append(Details("Configuration, every key", [Table(("key", "value"), rows)]))
    if len(subject.epochs) > 1:
        changes = [
            [e.number, e.after_step, e.time, "; ".join(f"{k}: {a!r} to {b!r}" for k, (a, b) in e.changes.items())]
            for e in subject.epochs[1:]
        ]
        parts.append(Table(("epoch", "after step", "when", "what changed, by leave"), changes, wide=True))
    return Section("overview", "What the run is", parts)


def _newest(subject: Subject, name: str) -> float | None:
    """Mean of the last bucket that has one."""
    series = subject.rows.series
    found = [v for v in (series.mean(name) if series.count(name) else []) if math.isfinite(v)]
    return float(found[-1]) if found else None


def _params(subject: Subject) -> float | None:
    return subject.notes.trying("model", lambda: num_params(from_dict(subject.settings).model), None)


def _identity(subject: Subject) -> list[tuple[str, Any]]:
    first, last = subject.epochs[0], subject.epochs[-1]
    model = subject.settings.get("model", {})
    shape = [f"{model.get(key)} {said}" for key, said in (
        ("num_layers", "layers"), ("dim", "wide"), ("num_heads", "heads"), ("num_kv_heads", "key-value heads"),
        ("ffn_dim", "in the ffn"), ("vocab_size", "tokens in the vocabulary"))]  # fmt: skip
    flops = subject.flops(max(subject.last_step, 1))
    found = [
        ("run", f"{first.run[:16]} ({subject.name})"),
        ("begun", first.time),
        ("state of the data", f"epoch {last.number}, digest {last.digest[:16]}"),
        ("model", ", ".join(shape)),
        ("folder", str(subject.workdir)),
    ]
    if flops:
        found.insert(4, ("FLOPs a token", f"{flops.causal:.4g} causal, {flops.noncausal:.4g} non-causal attention"))
    if last.origin:
        origin = {key: value for key, value in last.origin.items() if key != "side_files"}  # whole files
        found.append(("comes from", _shown(origin)))
    return found


def _stages(subject: Subject) -> Table:
    rows = []
    for stage in subject.settings.get("stages", ()):
        tokens = stage["rows_per_step"] * stage["sequence_length"]
        steps = stage["steps_per_chunk"] * stage["chunks"]
        rows.append(
            [
                stage["name"],
                f"{steps:,}",
                f"{stage['chunks']:,}",
                f"{stage['sequence_length']:,}",
                f"{tokens:,}",
                short_count(tokens * steps),
                described_rate(stage),
                f"{stage['rope_base']:g}",
            ]
        )
    head = ("stage", "steps", "chunks", "length", "tokens a step", "tokens", "learning rate", "RoPE base")
    return Table(head, rows)


def short_count(value: float | None) -> str:
    """1.42T, 65.3B, 614k."""
    if value is None:
        return "-"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return str(value)


# ---- the record ------------------------------------------------------------------------------------------------------


def record(subject: Subject) -> Section:
    """Journal, checkpoints, launches."""
    parts = [_journal(subject), _checkpoints(subject), *_launches(subject)]
    return Section("record", "The record", parts)


def in_words(entry: dict[str, Any]) -> str:
    """What an entry of the journal decided."""
    step, kind = entry.get("at_step"), entry["kind"]
    rows = sum(b - a for a, b in entry.get("ranges", []))
    if kind == "rollback":
        done = {"defer": "deferred to the stage's end", "skip": "skipped"}[entry["how"]]
        what = f"the run went back to step {step}, and {rows:,} rows were {done}; branch {entry['branch']} has the rest"
    elif kind in ("skip", "defer"):
        a, b = entry["positions"]
        done = "will never be read" if kind == "skip" else "will be read at their stage's end"
        what = f"rows {a:,} to {b - 1:,} {done}, from step {step} on"
    elif kind == "helped":
        what = f"roll-back {entry.get('branch')} has helped, by step {step}"
    elif kind == "no_update":
        what = f"step {step} made no update"
    elif kind == "abandon":
        what = f"checkpoint {step} was moved out of the way"
    elif kind == "predict":
        what = f"a prediction was made before step 1, digest {str(entry.get('digest'))[:16]}"
    else:
        what = kind if step is None else f"{kind}, at step {step}"
    return f"{what}: {entry['why']}" if entry.get("why") else what


def _journal(subject: Subject) -> Any:
    if not subject.journal:
        return Text(["The journal is empty: nothing was decided after the run began."], "note")
    rows = [[e.get("time", ""), e.get("by", ""), in_words(e)] for e in subject.journal[:MOST_ENTRIES]]
    left = len(subject.journal) - len(rows)
    note = f"{left:,} more entries are in journal.jsonl." if left else ""
    return Table(("when", "by", "what was decided, and why"), rows, note, wide=True)


def _checkpoints(subject: Subject) -> Any:
    path = subject.workdir / "ledger" / "records.jsonl"
    records = subject.notes.trying("ledger", lambda: ledger.read_records(path), [])
    there = set(subject.notes.trying("checkpoints", lambda: steps_so_far(subject.workdir), []))
    rows = [
        [
            r["last_step"],
            subject.stage_at(r["last_step"]),
            short_count(subject.tokens_at(r["last_step"])),
            "yes" if r["last_step"] in there else "no",
            str(r.get("checkpoint"))[:16],
            str(r.get("record"))[:16],
        ]
        for r in records[-MOST_RECORDS:]
        if type(r.get("last_step")) is int
    ]
    head = ("step", "stage", "tokens", "here", "digest of the checkpoint", "record in the ledger's chain")
    note = "The last record names all before it: whoever has its digest can check the rest."
    return Details(f"Checkpoints: {len(rows):,} in the ledger, {len(there):,} here", [Table(head, rows, note)])


def _launches(subject: Subject) -> list[Any]:
    rows, before = [], {}
    for launch in subject.launches[-MOST_LAUNCHES:]:
        devices, versions = launch.get("devices") or {}, launch.get("versions") or {}
        first = launch.get("first_step") or {}
        changed = [f"{name} {v}" for name, v in versions.items() if before.get(name) != v]
        rows.append(
            [
                launch["time"],
                launch.get("host", ""),
                f"{devices.get('count')} {devices.get('kind')} in {devices.get('processes')} process(es)",
                ", ".join(f"{axis} {n}" for axis, n in (devices.get("mesh") or {}).items() if n != 1) or "one device",
                str(launch.get("commit"))[:12],
                ", ".join(changed) if before else ", ".join(f"{name} {v}" for name, v in versions.items()),
                f"{first['seconds']:g} s" if isinstance(first.get("seconds"), (int, float)) else "-",
                "end of the run" if launch.get("done") else "",
            ]
        )
        before = versions
    if not rows:
        return [Text(["No launch is recorded."], "note")]
    head = ("launch", "host", "devices", "mesh", "commit", "versions (then what changed)", "to the first step", "")
    details = [
        Details(f"Launch of {launch['time']}: all that is recorded", [Table(("what", "value"), _flat(launch))])
        for launch in subject.launches[-20:]
    ]
    return [Table(head, rows, wide=True), *details]


def _flat(launch: dict[str, Any]) -> list[list[str]]:
    return [[key, _shown(value)] for key, value in flatten(redacted(launch)).items()]


# ---- prediction and costs --------------------------------------------------------------------------------------------


def read_prediction(subject: Subject) -> dict[str, Any]:
    """prediction.json; {} where there is none, or none that was made before the run."""
    found = subject.notes.trying("prediction", lambda: foretold.read_prediction(subject.workdir), None)
    return subject.notes.trying("prediction", lambda: _checked(found), {}) if found else {}


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    loss = found.get("loss") or {}
    curve = [[int(step), float(value)] for step, value in loss.get("curve") or []]
    band = [float(value) for value in loss.get("band") or []]
    return {**found, "loss": {**loss, "curve": curve, "band": band if len(band) == 2 else []}}


def prediction(subject: Subject, predicted: dict[str, Any], spent: dict[str, float | None]) -> Section:
    """What was expected before step 1, beside what came. `spent`: costs by name."""
    if not predicted:
        return Section("prediction", "Prediction", [Text(["None was made before the run."], "note")])
    loss, series = predicted["loss"], subject.rows.series
    curve, band, actual = loss["curve"], loss["band"], _final_loss(subject)
    steps, losses = zip(*curve, strict=True) if curve else ((), ())
    here = float(np.interp(subject.last_step, steps, losses)) if curve else None
    took = series.total("step_s") / series.count("step_s") if series.count("step_s") else None
    inside = "" if not band or actual is None else ("inside" if band[0] <= actual <= band[1] else "outside")
    rows = [
        [f"training loss at step {subject.last_step:,}", _number(here), _number(actual)],
        ["training loss at the end", _number(loss.get("final")), "see above"],
        ["its band", f"{band[0]:.5g} to {band[1]:.5g}" if band else "-", inside or "-"],
        ["seconds a step", _number(predicted.get("step_time_s")), _number(took)],
        ["wall time", _time(predicted.get("wall_s")), _time(subject.goodput.wall_s if subject.goodput else None)],
        ["device-hours", _number(predicted.get("chip_hours")), _number(spent.get("device-hours"))],
        ["energy, kWh", _number(predicted.get("energy_kwh")), _number(spent.get("energy"))],
        ["money, US$", _number(predicted.get("cost_usd")), _number(spent.get("money"))],
    ]
    note = f"Made {predicted.get('made', '?')}, its digest is in the journal. Method: {loss.get('method', 'not said')}."
    note += f" Outcome of the loss: mean of the last {foretold.final_steps(max(subject.rows.num_rows, 1)):,} steps."
    if not subject.num_steps or subject.last_step < subject.num_steps:
        note += " The run has not ended."
    parts: list[Any] = [Table(("", "predicted", "outcome"), rows, note)]
    if differs := _differs(subject, predicted):
        parts.append(Text([f"The run is not the experiment that was predicted: {', '.join(differs)}"], "warning"))
    return Section("prediction", "Prediction", parts)


def _final_loss(subject: Subject) -> float | None:
    """As predictions mean it; from the last buckets of a run that is longer than a page has points."""
    series = subject.rows.series
    if not series.count("loss"):
        return None
    mean = series.mean("loss")
    last = mean[-max(1, round(foretold.final_steps(subject.rows.num_rows) / series.width)) :]
    return float(np.nanmean(last)) if np.isfinite(last).any() else None


def _differs(subject: Subject, predicted: dict[str, Any]) -> list[str]:
    first, was = subject.epochs[0].config, predicted.get("config")
    read = subject.notes.trying
    return read("prediction", lambda: sorted(drift.differences(was, first)), []) if isinstance(was, dict) else []


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def _time(value: Any) -> str:
    return duration(value) if isinstance(value, (int, float)) and math.isfinite(value) else "-"


def read_costs(subject: Subject) -> list[Cost]:
    """[] of a run that has kept no time."""
    if subject.goodput is None:
        return []
    return subject.notes.trying("costs", lambda: list(run_costs.costs(subject.workdir)), [])


def costs(found: list[Cost]) -> Section:
    """Each number with its formula."""
    rows = []
    for cost in found:
        known = cost.value is not None
        value = f"{cost.value:,.6g}" if known and abs(cost.value) < 1e9 else _number(cost.value)
        rows.append([cost.name, value, cost.unit, "estimate" if cost.estimate and known else "", cost.formula])
    head = ("what", "value", "unit", "", "formula")
    return Section("costs", "Costs", [Table(head, rows, wide=True)] if rows else [Text(["Not known."], "note")])
