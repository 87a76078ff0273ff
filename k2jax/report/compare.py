"""Other runs beside the one that is reported: curves over one another, and what differs between them."""

from typing import Any

from k2jax.config import flatten
from k2jax.report.outcomes import Evaluations
from k2jax.report.parts import Chart, Section, Table
from k2jax.report.record import short_count
from k2jax.report.subject import Subject
from k2jax.text import redacted

CURVES = (
    ("loss", "Training loss", "nats a token", False),
    ("grad_norm", "Gradient norm", "", True),
    ("lr", "Learning rate", "", False),
    ("tokens_per_s", "Tokens a second", "tokens/s", False),
    ("mfu_causal", "MFU, causal", "share of the peak", False),
)
MOST_KEYS = 300


def labels(subjects: list[Subject]) -> list[str]:
    """A name each, none twice."""
    names = [subject.name for subject in subjects]
    paths = [f"{subject.name} ({subject.workdir.parent.name}/{subject.workdir.name})" for subject in subjects]
    return names if len(set(names)) == len(names) else [f"{i + 1}: {path}" for i, path in enumerate(paths)]


def comparison(subjects: list[Subject]) -> Section:
    """The first one is the page's own."""
    names = labels(subjects)
    parts: list[Any] = [_numbers(subjects, names)]
    for series, title, unit, log in CURVES:
        traces = [
            {"run": i, "series": series, "label": name}
            for i, (subject, name) in enumerate(zip(subjects, names, strict=True))
            if subject.rows.series.count(series)
        ]
        if traces:
            spec = {"kind": "lines", "traces": traces, "unit": unit, "log": log, "smooth": series != "lr"}
            parts.append(Chart(title, spec, "", "wide" if series == "loss" else ""))
    if traces := _validation(subjects, names):
        parts.append(Chart("Validation loss", {"kind": "lines", "traces": traces, "unit": "nats a token"}))
    return Section("compare", "Beside other runs", [*parts, _keys(subjects, names)])


def _validation(subjects: list[Subject], names: list[str]) -> list[dict[str, Any]]:
    traces = []
    for i, (subject, name) in enumerate(zip(subjects, names, strict=True)):
        for settings, results in Evaluations(subject).of("validation"):
            pairs = [(r["step"], r["metrics"].get("total", {}).get("loss")) for r in results]
            pairs = [(x, y) for x, y in pairs if isinstance(y, float)]
            if pairs:
                x, y = zip(*pairs, strict=True)
                traces.append({"run": i, "label": f"{name} ({settings})", "x": x, "y": y, "points": True})
    return traces


def _numbers(subjects: list[Subject], names: list[str]) -> Table:
    rows = []
    for subject, name in zip(subjects, names, strict=True):
        series = subject.rows.series
        mean = series.mean("loss") if series.count("loss") else []
        tokens = subject.tokens_at(subject.last_step) if series.buckets else 0
        loss = f"{mean[-1]:.4f}" if len(mean) else "-"
        rows.append([name, f"{subject.last_step:,}", short_count(tokens), loss, str(subject.workdir)])
    return Table(("run", "step", "tokens", "training loss", "folder"), rows, wide=True)


def _keys(subjects: list[Subject], names: list[str]) -> Table:
    configs = [flatten(redacted(subject.settings)) for subject in subjects]
    keys = dict.fromkeys(key for config in configs for key in config)
    found = [[key, *(str(config[key]) if key in config else "-" for config in configs)] for key in keys]
    rows = [row for row in found if len(set(row[1:])) > 1][:MOST_KEYS]
    return Table(("key that differs", *names), rows or [["none", *("" for _ in names)]], wide=True)
