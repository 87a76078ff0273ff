"""Runs for the tests of the report: a finished one with all that a report can show, and a long one's rows."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from k2jax import files
from k2jax.data.epochs import decide, read_epochs
from k2jax.data.journal import append_entry
from k2jax.doctor import diagnose
from k2jax.evals.results import Identity, Outcome, Results
from k2jax.evals.suites import SUITE
from k2jax.run.ledger import read_records
from k2jax.stability import telling

# Text that would be markup, a script, an attribute's end or plotly's own markup, were it not escaped everywhere.
HOSTILE = (
    "</script><script>window.hit=1</script><img src=http://evil.test/x onerror=window.hit=2> \"' onload=window.hit=3 "
    "<a href=\"http://evil.test\">b</a> %{x} \u2028\u2029 \u202e\x1b[31m <!-- & &lt; {{7*7}} https://u:geheim@h.test/?token=s3cret"
)


def full(run: Path, to: Path, hostile: str = "") -> Path:
    """A copy of a run, with evaluations, gallery, a roll-back, a prediction and a plan; `hostile` is in every text."""
    shutil.copytree(run, to)
    records = read_records(to / "ledger" / "records.jsonl")
    checkpoints = [(record["last_step"], record["checkpoint"]) for record in records]
    _evaluations(to, checkpoints, hostile)
    _gallery(to, checkpoints, hostile)
    _roll_back(to, checkpoints[0][0], hostile)
    last = checkpoints[-1][0]
    curve = [[step, 2.0 + 4.5 * step**-0.3] for step in range(1, last + 1, max(1, last // 40))]
    loss = {"method": f"a ladder {hostile}", "curve": curve, "final": curve[-1][1], "band": [3.0, 4.5]}
    more = {"step_time_s": 1.0, "wall_s": 400.0, "energy_kwh": 0.02, "chip_hours": 0.1, "cost_usd": None, "plan": None}
    made = {"format": 1, "made": "2026-11-28", "config_digest": "0" * 64, "before_step": 0}
    files.write_json(to / "prediction.json", {**made, "loss": loss, **more})
    crossing = checkpoints[0][0] + 3
    found = telling.as_json(diagnose(to, crossing, again=False))
    files.write_text(to / "spikes" / f"{crossing}-{crossing + 3}.json", found.replace("a limit", f"a limit {hostile}"))
    files.write_json(to / "plan.json", {"stages": {"stage1": {"mfu_causal": 0.4}}})
    return to


def _evaluations(to: Path, checkpoints: list[tuple[int, str]], hostile: str) -> None:
    results = Results(to)

    def add(step: int, digest: str, task: str, settings: dict, metrics: dict, samples: list[dict]) -> None:
        identity = Identity(task, 1, settings, 1234, digest)
        results.add(step, identity, Outcome("", metrics, samples, {}), {"time": "2026-11-28T00:00:00+00:00"})

    for i, (step, digest) in enumerate(checkpoints):
        share = (i + 1) / len(checkpoints)
        for metric in SUITE:
            value = metric.k2 / 100 * (0.4 + 0.6 * share)
            samples = [
                {
                    "task": metric.task, "doc_id": n, "doc": {"question": f"{metric.name} {n}? {hostile}"},
                    "target": "A", "resps": [[f"at step {step}: B {hostile}"]], "acc": float(n % 2), "metrics": ["acc"],
                }
                for n in range(8)
            ]  # fmt: skip
            settings = {"pass_at": metric.pass_at, "num_fewshot": metric.num_fewshot}
            add(step, digest, metric.task, settings, {metric.key: value, "alias": metric.name}, samples)
        add(step, digest, "own_task", {}, {"acc,none": share, "acc_stderr,none": 0.1}, [{"hello": hostile, "x": 1.5}])
        part = {"loss": 6 - 2 * share, "bits_per_byte": 1.9 - share / 2}
        subsets = {"code": part, f"web{hostile}": part}
        window = {"subset": "code", "start": 64, "loss": 5.0, "tokens": 64, "bytes": 200}
        add(step, digest, "validation", {}, {"total": part, "subsets": subsets}, [window])
        chunks = {str(c + 1): {"score": 0.02 * (c + 1)} for c in range(i + 1)}
        groups = {"read": {"score": 0.03 * share}, "later": None, "held_out": {"score": 0.02}, "chunks": chunks}
        row = {"step": 1, "chunk": 1, "row": 0, "subset": "code", "start": 0, "tokens": [5, 6, 7], "recited": [5, 6]}
        add(step, digest, "memorization", {}, groups, [{**row, "score": 0.5}])


def _gallery(to: Path, checkpoints: list[tuple[int, str]], hostile: str) -> None:
    for step, digest in checkpoints:
        entries = [
            {
                "prompt": f"Once {n} {hostile}",
                "suffix": hostile if n else None,
                "settings": {},
                "text": f"at {step} {hostile}",
            }
            for n in range(2)
        ]
        path = to / "gallery" / f"{step}.json"
        files.write_json(path, {"format": 1, "step": step, "checkpoints": {digest: entries}})


def _roll_back(to: Path, at_step: int, hostile: str) -> None:
    """As the trainer does: an entry of the journal, and what was left in branches/01."""
    epochs = read_epochs(to)
    rows = epochs[-1].manifest["stages"][0]["rows_per_step"]
    more = {"branch": 1, "attempt": 1, "crossing": at_step + 3, "seen_at": at_step + 6, "until": at_step + 30}
    said = {"by": "k2jax.train", "why": f"drift {hostile}", "how": "skip", "spike": "drift"}
    ranges = [(at_step * rows, (at_step + 2) * rows)]
    entry = decide(epochs, [], kind="rollback", ranges=ranges, at_step=at_step, **said, **more)
    append_entry(to / "journal.jsonl", entry)
    helped = {"time": "2026-11-28T00:00:00+00:00", "by": "k2jax.train", "kind": "helped", "at_step": at_step + 9}
    append_entry(to / "journal.jsonl", {**helped, "branch": 1, "why": "no spike since"})
    folder = to / "branches" / "01" / "metrics"
    folder.mkdir(parents=True)
    for path in sorted((to / "metrics").glob("*.jsonl")):
        lines = []
        for row in map(json.loads, path.read_text().splitlines()):
            if at_step - 2 < row["step"] <= at_step + 8:
                lines.append(json.dumps({**row, "loss": row["loss"] + max(0, row["step"] - at_step - 2)}) + "\n")
        if lines:
            (folder / path.name).write_text("".join(lines))
    files.write_json(to / "branches" / "01" / "branch.json", entry)


def long_metrics(folder: Path, template: dict[str, Any], steps: int, spike: int, chunk: int = 941) -> None:
    """metrics/ of a run of many steps like `template`'s, with one loss of 99.5 at step `spike`."""
    folder.mkdir(parents=True)
    names = [name for name, value in template.items() if isinstance(value, float)]
    values = np.array([template[name] for name in names])
    draw = np.random.default_rng(0)
    for first in range(1, steps + 1, chunk):
        lines = []
        for step in range(first, min(first + chunk, steps + 1)):
            noise = 1 + 0.1 * draw.standard_normal(len(names))
            row = {**template, **dict(zip(names, (values * noise).tolist(), strict=True))}
            row |= {"step": step, "stage": "stage1", "tokens_seen": step * 4_177_920, "step_s": 10.0}
            row["loss"] = 99.5 if step == spike else 2 + 8 * math.pow(step, -0.3) + 0.05 * draw.standard_normal()
            lines.append(json.dumps(row) + "\n")
        (folder / f"chunk-{first // chunk + 1:05d}.jsonl").write_text("".join(lines))
