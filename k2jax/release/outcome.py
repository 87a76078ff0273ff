"""What was predicted, what came, and what it has cost: for the cards."""

from k2jax.errors import ConfigError
from k2jax.release.record import Record
from k2jax.run.costs import costs
from k2jax.run.prediction import outcome, read_prediction
from k2jax.text import for_markdown


def prediction(record: Record) -> list[str]:
    """Lines of Markdown. ConfigError where the prediction is not the one whose digest the journal has."""
    made, came = read_prediction(record.workdir), outcome(record.workdir)
    if made is None or came is None:
        return ["None was made before the run."]
    lines = [f"After {came['steps']:,} of {record.order.num_steps:,} steps:", ""]
    lines += ["| | predicted | came |", "|---|---|---|"]
    for name, what in (("loss", "training loss"), ("wall_s", "wall time, s")):
        if name in came:
            lines.append(f"| {what} | {came[name]['predicted']:.5g} | {came[name]['actual']:.5g} |")
    loss = made.get("loss") or {}
    if isinstance(band := loss.get("band"), list) and len(band) == 2:
        lines.append(f"| band of the final loss | {band[0]:.5g} to {band[1]:.5g} | |")
    method = for_markdown(str(loss.get("method", "not said"))[:500])
    when = f"Made {for_markdown(made.get('made', '?'))}, before step 1: its digest is in the journal."
    differs = ", ".join(for_markdown(key) for key in came["differs"][:20])
    if differs:
        when += f" The run is another experiment than the predicted one in: {differs}."
    return [*lines, "", f"{when} Method: {method}. All of it: `run/prediction.json`, report.html."]


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
