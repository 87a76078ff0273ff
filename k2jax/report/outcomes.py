"""Sections on what came of it: evaluations by checkpoint, memorization, the gallery, samples to browse."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2jax import files
from k2jax.bucket import BucketPath
from k2jax.data.manifest import sha256_json
from k2jax.evals.results import read_result
from k2jax.evals.suites import SUITE
from k2jax.report import changes
from k2jax.report.parts import Browser, Chart, Section, Table, Text
from k2jax.report.samples import Samples
from k2jax.report.subject import Subject

MOST_OTHERS = 120  # curves of harness tasks outside K2's suite
MOST_RESULTS = 20_000


class Evaluations:
    """What lies in evals/: results by task and setting, each a list by step."""

    def __init__(self, subject: Subject):
        self.curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for path in _results(subject.workdir)[:MOST_RESULTS]:
            result = subject.notes.trying(f"{path}", lambda p=path: read_result(p), None)
            if result and type(result.get("step")) is int and isinstance(result.get("metrics"), dict):
                settings = sha256_json([result["version"], result["settings"], result["seed"]])[:8]
                kept = {key: result[key] for key in ("step", "checkpoint", "metrics")}  # the rest may be much
                self.curves.setdefault((str(result["task"]), settings), []).append({**kept, "path": path})
        for results in self.curves.values():
            results.sort(key=lambda result: result["step"])

    def of(self, task: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(setting, results by step) of a task."""
        for (name, settings), results in self.curves.items():
            if name == task:
                yield settings, results

    @property
    def tasks(self) -> list[str]:
        return sorted({task for task, _ in self.curves})


def _results(workdir: Path | BucketPath) -> list[Path | BucketPath]:
    paths = [path for path in (workdir / "evals").glob("*/*.json") if path.parent.name.isdigit()]
    return sorted(paths, key=lambda path: (int(path.parent.name), path.name))


def _points(label: str, results: list[dict[str, Any]], value: Any, **more: Any) -> dict[str, Any] | None:
    """A line of what `value` finds in each result's metrics, with checkpoints to hover."""
    pairs = []
    for result in results:
        try:
            found = value(result["metrics"])
        except (KeyError, TypeError, AttributeError):
            continue
        if type(found) in (int, float):
            pairs.append((result["step"], found, str(result["checkpoint"])[:12]))
    if not pairs:
        return None
    x, y, names = (list(column) for column in zip(*pairs, strict=True))
    return {"run": 0, "label": label, "x": x, "y": y, "names": names, "points": True, **more}


def _chart(title: str, traces: list, unit: str, note: str = "", size: str = "", **more: Any) -> list[Chart]:
    traces = [trace for trace in traces if trace]
    spec = {"kind": "lines", "traces": traces, "unit": unit, **more}
    return [Chart(title, spec, note, size)] if traces else []


def evaluations(subject: Subject, found: Evaluations) -> Section:
    """Validation, K2's suite as small multiples, other tasks, memorization."""
    if not found.curves:
        said = f"No checkpoint has been evaluated: python -m k2jax.evaluate --workdir={subject.workdir} --steps=all"
        return Section("evaluations", "Evaluations", [Text([said], "note")])
    parts = [*_validation(found), *_suite(found), *_others(found), *_memorization(found)]
    curves = {
        f"{part.title}, {trace['label']}": (trace["x"], trace["y"])
        for part in parts
        if isinstance(part, Chart) and part.spec["kind"] == "lines"
        for trace in part.spec["traces"]
        if "x" in trace
    }
    return Section("evaluations", "Evaluations", [*parts, changes.table(curves)])


def _validation(found: Evaluations) -> list[Any]:
    parts: list[Any] = []
    for settings, results in found.of("validation"):
        names = dict.fromkeys(name for result in results for name in result["metrics"].get("subsets") or {})
        traces = [_points("all", results, lambda m: m["total"]["loss"], main=True)]
        traces += [_points(name, results, lambda m, n=name: m["subsets"][n]["loss"]) for name in names]
        note = "On all held-out windows that were asked for; the checkpoint's digest is in the labels."
        title = "Validation loss" + _setting(found, "validation", settings)
        parts += _chart(title, traces, "nats a token", note, "wide", marks=True)
        bits = [_points(name, results, lambda m, n=name: m["subsets"][n]["bits_per_byte"]) for name in names]
        parts += _chart(title.replace("loss", "bits a byte"), bits, "bits a byte")
    return parts


def _setting(found: Evaluations, task: str, settings: str) -> str:
    """What tells apart several settings of one task."""
    return f" ({settings})" if len(list(found.of(task))) > 1 else ""


def _suite(found: Evaluations) -> list[Any]:
    """K2's 22 metrics; each beside what K2 had at its end and after stage one."""
    parts: list[Any] = []
    last: list[list[Any]] = []
    for metric in SUITE:
        traces = []
        for settings, results in found.of(metric.task):
            trace = _points(f"here ({settings})", results, lambda m, k=metric.key: 100 * m[k])
            traces += [trace] if trace else []  # one task may stand there with one answer and with several
        levels = [
            {"label": "K2", "y": metric.k2, "dash": "dash"},
            {"label": "stage 1", "y": metric.k2_stage1, "dash": "dot"},
        ]
        chart = _chart(metric.name, traces, "%", "", "small", levels=levels)
        parts += chart
        if chart:
            y = chart[0].spec["traces"][0]["y"]
            last.append([metric.name, y[-1], metric.k2, metric.k2_stage1, _shots(metric), metric.fewshot_source])
    if not parts:
        return []
    missing = [metric.name for metric in SUITE if metric.name not in {row[0] for row in last}]
    head = ("percent", "newest here", "K2", "K2, stage 1", "few-shot examples", "which are")
    note = "K2's values are those that LLM360 published; beside ours they are not the same measurement, see the README."
    note += f" Not measured here: {', '.join(missing)}." if missing else ""
    said = "K2's suite of 22 metrics, by checkpoint. Dashed: K2-65B at its end; dotted: after its stage 1."
    return [Text([said]), *parts, Table(head, last, note)]


def _shots(metric: Any) -> Any:
    return "the task's own" if metric.num_fewshot is None else metric.num_fewshot


def _others(found: Evaluations) -> list[Any]:
    """Of each other task its metrics that are numbers."""
    known = {"validation", "memorization", *(metric.task for metric in SUITE)}
    parts: list[Any] = []
    for task in found.tasks:
        if task in known or len(parts) >= MOST_OTHERS:
            continue
        for settings, results in found.of(task):
            metrics = dict.fromkeys(k for result in results for k, v in _flat(result["metrics"]).items())
            keys = [key for key in metrics if "_stderr" not in key and "," in key][:12]
            traces = [_points(key.removesuffix(",none"), results, lambda m, k=key: _flat(m)[k]) for key in keys]
            parts += _chart(f"{task}{_setting(found, task, settings)}", traces, "")
    return parts


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers, of a tag's tasks by "task metric"."""
    found = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            found |= {f"{key} {name}": v for name, v in value.items() if type(v) in (int, float)}
        elif type(value) in (int, float):
            found[key] = value
    return found


def _memorization(found: Evaluations) -> list[Any]:
    parts: list[Any] = []
    for settings, results in found.of("memorization"):
        title = "Memorization" + _setting(found, "memorization", settings)
        groups = {"read": "read before", "later": "not read yet", "held_out": "held out"}
        traces = [_points(said, results, lambda m, g=group: m[g]["score"]) for group, said in groups.items()]
        note = "Share of the 32 tokens after 32 of a row that greedy decoding recites."
        parts += _chart(title, traces, "share of tokens", note)
        chunks = sorted({int(c) for r in results for c in r["metrics"].get("chunks") or {} if str(c).isdigit()})
        if chunks:
            z = [[_score(result, chunk) for result in results] for chunk in chunks]
            choices = [{"label": "share of tokens recited", "x": [r["step"] for r in results], "y": chunks, "z": z}]
            spec = {"kind": "heat", "choices": choices, "log": False, "even": True}
            spec |= {"xtitle": "checkpoint", "ytitle": "chunk of the data"}
            parts.append(Chart(f"{title} by chunk and checkpoint", spec))
    return parts


def _score(result: dict[str, Any], chunk: int) -> float | None:
    try:
        score = result["metrics"]["chunks"][str(chunk)]["score"]
    except (KeyError, TypeError):
        return None
    return float(score) if type(score) in (int, float) else None


def samples(subject: Subject, found: Evaluations) -> tuple[Section, list[dict[str, Any]]]:
    """(section, what its script shows)."""
    chosen = Samples(subject)
    for (task, settings), results in found.curves.items():
        chosen.add(task + _setting(found, task, settings), results)
    if not chosen.tasks:
        return Section("samples", "Samples of evaluations", [Text(["None are stored."], "note")]), []
    return Section("samples", "Samples of evaluations", [Text([chosen.said]), Browser("samples")]), chosen.tasks


# ---- the gallery -----------------------------------------------------------------------------------------------------

MOST_TEXT, MOST_GALLERY = 2_000, 1_000_000  # characters of an entry, and of all


def gallery(subject: Subject) -> tuple[Section, list[dict[str, Any]]]:
    """(section, entries by prompt and step) of gallery/, which `python -m k2jax.gallery` writes."""
    prompts: dict[str, dict[str, Any]] = {}
    size = 0
    paths = [path for path in (subject.workdir / "gallery").glob("*.json") if path.stem.isdigit()]
    for path in sorted(paths, key=lambda path: int(path.stem)):
        found = subject.notes.trying(f"{path}", lambda p=path: _entries(files.read_json(p)), [])
        for digest, entry in found:
            key = json.dumps([entry["prompt"], entry["suffix"], entry["settings"]], sort_keys=True)
            said = {"step": int(path.stem), "checkpoint": digest[:12], "text": entry["text"][:MOST_TEXT]}
            size += len(said["text"]) + 60
            if size < MOST_GALLERY:
                one = {"prompt": entry["prompt"][:MOST_TEXT], "suffix": entry["suffix"], "outputs": []}
                prompts.setdefault(key, one)["outputs"].append(said)
    if size >= MOST_GALLERY:
        subject.notes.add(f"gallery: more than {MOST_GALLERY:,} characters: the rest is left out")
    if not prompts:
        said = f"No prompts have been kept: python -m k2jax.gallery --workdir={subject.workdir}"
        return Section("gallery", "Prompt gallery", [Text([said], "note")]), []
    text = "The same prompts at every checkpoint. A dash: nothing came but the document's end."
    return Section("gallery", "Prompt gallery", [Text([text]), Browser("gallery")]), list(prompts.values())


def _entries(values: Any) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for digest, entries in values["checkpoints"].items():
        for entry in entries:
            fine = isinstance(entry["prompt"], str) and isinstance(entry["text"], str)
            if not fine or not isinstance(entry["suffix"], str | None):
                raise ValueError("an entry has no prompt or text")
            found.append((digest, {**entry, "settings": entry["settings"]}))
    return found
