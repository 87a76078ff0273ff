"""RETROSPECTIVE.md: what happened, as journal, launches and diagnoses have it; and what only people can add."""

import json
from typing import Any

from k2jax import files
from k2jax.data.journal import Entry
from k2jax.errors import RunError
from k2jax.release.outcome import prediction
from k2jax.release.record import Record
from k2jax.text import for_markdown

TO_FILL = "> **To be written:** "
MOST = 2000  # of a reason, in characters
MOST_LAUNCHES = 200


def retrospective(record: Record) -> str:
    """The text. Every line that people must fill in begins with TO_FILL."""
    lines = [f"# {for_markdown(record.name)}: looking back", ""]
    lines += [
        f"Facts below are from the record of run {record.run}. Lines with **To be written** are for the people who ran "
        "it: what they thought then, and what they would do otherwise.",
        "",
        f"{TO_FILL}in a paragraph: what this run was for, and whether it got there.",
        "",
        "## What was planned",
        "",
        f"{record.order.num_steps:,} steps in {len(record.manifest['stages'])} stages; {record.step:,} were made.",
        "",
        f"{TO_FILL}why this model, these data, these settings.",
        "",
        "## What was expected, and what came",
        "",
        *prediction(record),
        "",
        "## What happened",
        "",
        *_timeline(record),
        "",
        "## Spikes",
        "",
        *_spikes(record),
        "",
        "## What was learnt",
        "",
        f"{TO_FILL}what went well; what went wrong and was not seen; what to do otherwise; negative results.",
    ]
    return "\n".join(lines) + "\n"


def _timeline(record: Record) -> list[str]:
    """Launches, changes of configuration and decisions, in the order of time."""
    events = [(launch["time"], _launch(launch)) for launch in record.launches[:MOST_LAUNCHES]]
    events += [(epoch.time, _epoch(epoch)) for epoch in record.epochs]
    decisions = [entry for entry in record.journal if entry["kind"] != "no_update"]
    events += [(str(entry.get("time", "")), _decision(entry)) for entry in decisions]
    lines = [f"- {for_markdown(time)}: {text}" for time, text in sorted(events, key=lambda event: event[0])]
    if skipped := len(record.journal) - len(decisions):
        lines.append(f"- {skipped:,} single steps made no update, each named with its reason in run/journal.jsonl")
    if record.launches[MOST_LAUNCHES:]:
        lines.append(f"- ... and {len(record.launches) - MOST_LAUNCHES:,} more launches: run/environment.json")
    return lines


def _launch(launch: dict[str, Any]) -> str:
    step, devices = launch.get("newest_step"), launch.get("devices") or {}
    where = f"on {for_markdown(devices.get('count', '?'))} x {for_markdown(devices.get('kind', '?'))}"
    went = ", which came to the end of the run" if launch.get("done") else ""
    return f"launched {where}, {'from the beginning' if step is None else f'after step {step:,}'}{went}"


def _epoch(epoch: Any) -> str:
    if epoch.number == 1:
        return f"the run begins (epoch 1{', of ' + for_markdown(epoch.origin['kind']) if epoch.origin else ''})"
    changes = "; ".join(
        f"{for_markdown(key)}: {for_markdown(json.dumps(was)[:200])} to {for_markdown(json.dumps(now)[:200])}"
        for key, (was, now) in sorted(epoch.changes.items())
    )
    text = f"after step {epoch.after_step:,} the configuration changes (epoch {epoch.number}): {changes or 'nothing'}"
    return f"{text}\n\n  {TO_FILL}why.\n"


def _decision(entry: Entry) -> str:
    by, why = for_markdown(entry.get("by", "?")), for_markdown(str(entry.get("why", "no reason given"))[:MOST])
    step = entry.get("at_step")
    where = f" at step {step:,}" if isinstance(step, int) else ""
    text = f"{for_markdown(entry['kind'])}{where}, by {by}: {why}"
    if entry["kind"] == "rollback":
        text += f" (what was left behind: run/branches/{entry['branch']:02d}/)"
    return f"{text}\n\n  {TO_FILL}was it right?\n" if entry["kind"] in ("rollback", "skip", "defer") else text


def _spikes(record: Record) -> list[str]:
    """The verdicts that the doctor kept."""
    folder, lines = record.workdir / "spikes", []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            found = files.read_json(path)
            first = found["verdicts"][0]
            verdict = f"{first['cause']} ({first['confidence']}): {'; '.join(map(str, first['reasons']))}"
            lines.append(f"- step {found['step']:,}: {for_markdown(verdict[:MOST])}")
        except (RunError, KeyError, IndexError, TypeError, ValueError) as error:
            lines.append(f"- {for_markdown(path.name)} cannot be read: {for_markdown(error)}")
    return lines or ["None was diagnosed."]
