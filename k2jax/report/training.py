"""Sections on how training went: loss, stability, learning, speed."""

from typing import Any

import numpy as np

from k2jax import files
from k2jax.data.journal import ranges_of
from k2jax.report import changes
from k2jax.report.parts import Chart, Facts, Html, Section, Shares, Table, Text
from k2jax.report.subject import Subject
from k2jax.report.thin import short
from k2jax.run import goodput
from k2jax.run.branches import rollbacks
from k2jax.stability import telling

MOST_SPIKES, MOST_SPIKE_BYTES = 40, 1 << 20
MOST_MARKS = 2_000
OUTLIERS = "Where a few values are far from all others, the axis begins without them: a double click shows all."
MAP_COLUMNS = 240
GROUPS = ("embed", "q", "k", "v", "o", "gate", "up", "down", "norms", "head")  # as a token meets them
DONE = {"defer": "deferred", "skip": "skipped"}
NORMS = {
    "grad_norm": "gradient norm, before clipping",
    "update_norm": "norm of the update",
    "update_ratio": "update, as a share of the weights",
    "param_norm": "norm of the weights",
}


def marks(subject: Subject) -> list[dict[str, Any]]:
    """What is marked on every chart of the run: {"kind", "step", "text"}."""
    found = [
        {"kind": "stage", "step": first, "text": f"stage {name} begins"} for first, name, _ in subject.rows.stages[1:]
    ]
    for entry in subject.journal:
        kind, step = entry["kind"], entry.get("at_step")
        if kind == "rollback":
            text = f"branch {entry['branch']}: {entry.get('why', '')}"
            if type(entry.get("crossing")) is int:
                found.append({"kind": "spike", "step": entry["crossing"], "text": text})
            found.append({"kind": "roll-back", "step": step, "text": f"gone back to step {step}; {text}"})
        elif kind not in ("helped", "predict") and type(step) is int:
            found.append({"kind": "decision", "step": step, "text": f"{kind}: {entry.get('why', '')}"})
    for epoch in subject.epochs[1:]:
        text = f"epoch {epoch.number}: {', '.join(epoch.changes) or 'goes on as another run'}"
        found.append({"kind": "change", "step": epoch.after_step, "text": text})
    return [mark for mark in found if type(mark["step"]) is int][:MOST_MARKS]


def _subsets(subject: Subject, prefix: str = "loss/") -> list[str]:
    return [name for name in subject.rows.series.names if name.startswith(prefix)]


def _line(series: str, label: str, **more: Any) -> dict[str, Any]:
    return {"run": 0, "series": series, "label": label, **more}


def _lines(traces: list[dict[str, Any]], unit: str, **more: Any) -> dict[str, Any]:
    return {"kind": "lines", "traces": traces, "unit": unit, "marks": True, **more}


def _known(subject: Subject, pairs: dict[str, str]) -> list[dict[str, Any]]:
    """Lines of those of the series that have a value."""
    series = subject.rows.series
    return [_line(name, label) for name, label in pairs.items() if series.count(name)]


# ---- loss ------------------------------------------------------------------------------------------------------------


def loss(subject: Subject, predicted: dict[str, Any]) -> Section:
    """Training and held-out loss, with where they change their course."""
    parts: list[Any] = []
    if subject.rows.series.count("loss"):
        traces = [_line("loss", "loss", main=True)]
        traces += [
            {"run": f"branch {number}", "series": "loss", "label": f"branch {number}, left behind", "dash": "dot"}
            for number, rows in subject.branches.items()
            if rows.series.count("loss")
        ]
        if subject.rows.no_update:
            traces.append({"run": 0, "label": "no update was made", "at": subject.rows.no_update, "of": "loss"})
        traces += _prediction(predicted)
        parts.append(Chart("Training loss", _lines(traces, "nats a token", smooth=True), OUTLIERS, "wide"))
    if names := _subsets(subject):
        traces = [_line(name, name.removeprefix("loss/")) for name in names if subject.rows.series.count(name)]
        note = "Each subset of the data, over the tokens of it that a step read. With smoothing 0: every extreme."
        parts.append(Chart("Training loss by subset", _lines(traces, "nats a token", smooth=True), note, "wide"))
    if held := _held_out(subject):
        note = "Text that no step reads, at checkpoints."
        parts.append(Chart("Held-out loss by subset", _lines(held, "nats a token"), note, "wide"))
    if not parts:
        parts = [Text(["No step has been recorded yet."], "note")]
    else:
        parts.append(changes.table(_curves(subject, held)))
    return Section("loss", "Loss", parts)


def _prediction(predicted: dict[str, Any]) -> list[dict[str, Any]]:
    """Its curve; at the curve's end the band."""
    if not predicted or not (curve := predicted["loss"]["curve"]):
        return []
    x, y = (list(column) for column in zip(*curve, strict=True))
    traces = [{"run": 0, "label": "predicted before step 1", "x": x, "y": y, "dash": "dash"}]
    if band := predicted["loss"]["band"]:
        low, high = band[0] - y[-1], band[1] - y[-1]
        bars = {"x": x[-1:], "y": y[-1:], "up": [high], "down": [-low], "points": True}
        traces.append({"run": 0, "label": "predicted band of the end", **bars})
    return traces


def _held_out(subject: Subject) -> list[dict[str, Any]]:
    series, found = subject.held_out.series, []
    for name in series.names:
        if name.startswith("loss/") and series.count(name):
            mean = series.mean(name)
            there = np.isfinite(mean)
            x, y = series.last_steps[there].tolist(), short(mean[there])
            found.append({"run": 0, "label": name.removeprefix("loss/"), "x": x, "y": y, "points": True})
    return found


def _curves(subject: Subject, held: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    series = subject.rows.series
    mean, steps = series.mean("loss"), series.last_steps
    every = max(1, len(mean) // 300)
    there = np.isfinite(mean)
    curves = {"training loss": (steps[there][::every].tolist(), mean[there][::every].tolist())}
    return curves | {f"held-out loss, {trace['label']}": (trace["x"], trace["y"]) for trace in held}


# ---- stability -------------------------------------------------------------------------------------------------------


def stability(subject: Subject) -> Section:
    """Outliers, spikes, roll-backs and the series that tell them."""
    rows = subject.rows
    done = rollbacks(subject.journal)
    parts: list[Any] = [
        Facts(
            [
                ("steps without an update", f"{rows.num_no_update:,}"),
                ("steps above a limit", f"{rows.num_outliers:,}"),
                ("clipped steps", f"{int(rows.series.total('clipped')):,}"),
                ("roll-backs", f"{len(done)}"),
                ("transient errors of devices", f"{int(rows.series.total('transient_errors')):,}"),
            ],
            big=True,
        )
    ]
    charts = (
        ("Gradient norm", {"grad_norm": "gradient norm", "grad_norm_limit": "limit of a step"}, "", True),
        ("Logits", {"attention_logit": "largest attention logit", "logit": "largest of the head"}, "", False),
        ("Log Z", {"log_z": "mean log Z of the head"}, "nats", False),
    )
    for title, names, unit, log in charts:
        if traces := _known(subject, names):
            parts.append(Chart(title, _lines(traces, unit, log=log, smooth=True)))
    if done:
        parts.append(_branches(subject, done))
    parts += _spikes(subject)
    return Section("stability", "Stability", parts)


def _branches(subject: Subject, done: list[dict[str, Any]]) -> Table:
    rows = []
    for entry in done:
        left = subject.branches.get(entry["branch"])
        helped = [e for e in subject.journal if e["kind"] == "helped" and e.get("branch") == entry["branch"]]
        rows.append(
            [
                entry["branch"],
                entry.get("why", ""),
                entry["at_step"],
                left.series.last - entry["at_step"] if left and left.num_rows else "?",
                f"{sum(b - a for a, b in ranges_of(entry)):,} rows {DONE[entry['how']]}",
                helped[0].get("why", "yes") if helped else "not known yet",
            ]
        )
    head = ("branch", "why", "back to step", "steps left behind", "data", "did it help")
    return Table(head, rows, "What each roll-back left is whole in branches/.", wide=True)


def _spikes(subject: Subject) -> list[Html]:
    """What the doctor said of each when it came."""
    paths = sorted((subject.workdir / "spikes").glob("*.json"))[:MOST_SPIKES]
    found = []
    for path in paths:
        read = subject.notes.trying(f"{path}", lambda p=path: files.read_json(p, MOST_SPIKE_BYTES), None)
        found.append(subject.notes.trying(f"{path}", lambda r=read: telling.html(r), "") if read is not None else "")
    return [Html(text) for text in found if text]


# ---- learning --------------------------------------------------------------------------------------------------------


def learning(subject: Subject) -> Section:
    """Learning rate and norms."""
    parts: list[Any] = []
    if traces := _known(subject, {"lr": "learning rate"}):
        parts.append(Chart("Learning rate", _lines(traces, "")))
    for name, title in NORMS.items():
        if traces := _known(subject, {name: title}):
            parts.append(Chart(title.capitalize(), _lines(traces, "", log=True, smooth=name != "param_norm")))
    parts += _group_maps(subject) + _layer_maps(subject)
    return Section("learning", "Learning rate and norms", parts or [Text(["Not recorded."], "note")])


def _group_maps(subject: Subject) -> list[Chart]:
    series, choices = subject.rows.series, []
    every = max(1, -(-series.buckets // MAP_COLUMNS))
    for prefix, title in NORMS.items():
        names = [name for name in series.names if name.startswith(f"{prefix}/") and series.count(name)]
        names.sort(key=lambda name: GROUPS.index(name.partition("/")[2]) if name.partition("/")[2] in GROUPS else 99)
        if names:
            values = [_columns(series.high(name), every) for name in names]
            choices.append((title, [name.partition("/")[2] for name in names], values))
    return _map("Norms by layer group", series.first_steps[::every], choices, first=True)


def _layer_maps(subject: Subject) -> list[Chart]:
    series, choices = subject.rows.layers, []
    groups: dict[str, list[str]] = {}
    for name in series.names:
        groups.setdefault(name.rpartition("\0")[0], []).append(name)
    for group, names in groups.items():
        label, _, what = group.partition("/")
        said = {**NORMS, "attention_logit": "largest attention logit"}.get(label, label)
        values = [series.high(name) for name in names]
        choices.append((f"{said}: {what}" if what else said, list(range(len(names))), values))
    return _map("By layer", series.first_steps, choices)


def _map(title: str, steps: np.ndarray, choices: list[tuple[str, list, list[np.ndarray]]], **more: Any) -> list[Chart]:
    """Of (label, names of rows, a row of values each); columns in which no row has a value are left out."""
    found = []
    for label, y, values in choices:
        matrix = np.stack(values)
        there = np.isfinite(matrix).any(axis=0)
        if there.any():
            z = [short(row, 3) for row in matrix[:, there]]
            found.append({"label": label, "x": steps[there].tolist(), "y": y, "z": z})
    if not found:
        return []
    note = "The greatest value of each column's steps; colours by its logarithm."
    return [Chart(title, {"kind": "heat", "choices": found, "log": True, "axis": "step", **more}, note, "wide")]


def _columns(values: np.ndarray, every: int) -> np.ndarray:
    """The greatest of each `every` values."""
    padded = np.concatenate([values, np.full(-len(values) % every, np.nan)])
    return np.fmax.reduce(padded.reshape(-1, every), axis=1)


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(subject: Subject) -> Section:
    """Throughput beside the plan, where the time went, memory."""
    parts: list[Any] = [_goodput(subject)]
    charts = (
        ("Seconds a step", {"step_s": "measured", "planned_step_s": "planned", "data_wait_s": "waiting for data"}, "s"),
        ("Tokens a second", {"tokens_per_s": "all devices"}, "tokens/s"),
        ("MFU", {"mfu_causal": "causal", "mfu_noncausal": "non-causal"}, "share of the devices' peak"),
    )
    for title, names, unit in charts:
        if traces := _known(subject, names):
            planned = _planned_mfu(subject) if title == "MFU" else []
            parts.append(Chart(title, _lines(traces, unit, smooth=True, levels=planned)))
    memory = {
        "device_memory_bytes": "device, in use",
        "device_memory_peak_bytes": "device, peak",
        "host_memory_peak_bytes": "process, peak",
    }
    if traces := _known(subject, memory):
        parts.append(Chart("Memory", _lines(traces, "GiB", scale=2**-30)))
    series = subject.rows.processes
    if series.buckets:
        values = [series.high(name) for name in series.names]
        choices = [("seconds of its own in a step", series.names, values)]
        parts += _map("By process", series.first_steps, choices, first=True)
    return Section("speed", "Speed and time", parts)


def _planned_mfu(subject: Subject) -> list[dict[str, Any]]:
    path = subject.workdir / "plan.json"
    plan = subject.notes.trying("plan.json", lambda: files.read_json(path), {}) if path.exists() else {}
    stages = plan.get("stages", {}) if isinstance(plan, dict) else {}
    found = {name: planned.get("mfu_causal") for name, planned in stages.items() if isinstance(planned, dict)}
    return [{"label": f"planned, {name}", "y": y} for name, y in found.items() if isinstance(y, float)]


def _goodput(subject: Subject) -> Any:
    found = subject.goodput
    if found is None:
        return Text(["Where the time went is not recorded."], "note")
    parts = [(cause, value, goodput.CAUSES[cause]) for cause, value in found.seconds.items() if value > 0]
    return Shares(parts, goodput.duration)
