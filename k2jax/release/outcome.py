"""What was predicted, what came, and what it has cost: for the cards."""

from typing import Any

from k2jax import files
from k2jax.errors import ConfigError
from k2jax.release.record import Record
from k2jax.run.costs import costs
from k2jax.text import for_markdown


def prediction(record: Record) -> list[str]:
    """Lines of Markdown."""
    path = record.workdir / "prediction.json"
    if not path.is_file():
        return ["None was made before the run."]
    found = files.read_json(path)
    loss = found.get("loss") if isinstance(found, dict) else None
    loss = loss if isinstance(loss, dict) else {}
    final, band, came = loss.get("final"), loss.get("band"), record.checkpoints[-1].loss
    lines = ["| | predicted | came |", "|---|---|---|"]
    lines.append(f"| loss of step {record.step:,} of {record.order.num_steps:,} | {_number(final)} | {_number(came)} |")
    if isinstance(band, list) and len(band) == 2 and all(map(_is_number, band)) and came is not None:
        inside = "inside" if band[0] <= came <= band[1] else "outside"
        lines.append(f"| band of it | {_number(band[0])} to {_number(band[1])} | {inside} |")
    made, method = for_markdown(found.get("made", "?")), for_markdown(str(loss.get("method", "not said"))[:500])
    noted = any(entry["kind"] == "predict" for entry in record.journal)
    where = "its digest is in the journal" if noted else "the journal does not name it: it may have been made later"
    return [*lines, "", f"Made {made}; {where}. Method: {method}. All of it: `run/prediction.json`, report.html."]


def cost_table(record: Record) -> list[str]:
    """Lines of Markdown."""
    try:
        rows = costs(record.workdir)
    except ConfigError as error:
        return [f"Not known: {for_markdown(error)}"]
    lines = ["| | | | formula |", "|---|---|---|---|"]
    for row in rows:
        value = "unknown" if row.value is None else f"{row.value:,.6g}"
        sure = "estimate" if row.estimate and row.value is not None else ""
        name, unit, formula = map(for_markdown, (row.name, row.unit, row.formula))
        lines.append(f"| {name} | {value} {unit} | {sure} | {formula} |")
    return lines


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _number(value: Any) -> str:
    return f"{value:.5g}" if _is_number(value) else "not said"
