"""The section on the data: what mix was asked for, what was read, and how often."""

from typing import Any

from k2jax.data.manifest import sha256_json
from k2jax.report.parts import Chart, Section, Table, Text
from k2jax.report.subject import Subject


def data(subject: Subject) -> Section:
    """Of each stage of the manifest in force."""
    manifest = subject.epochs[-1].manifest
    if manifest is None:
        return Section("data", "Data", [Text(["Imported weights: nothing has been trained on them."], "note")])
    read = subject.rows.read
    parts: list[Any] = [_stage(stage, read.get(stage["name"], {}), manifest) for stage in manifest["stages"]]
    parts.append(_stores(manifest, read))
    before = {sha256_json(epoch.manifest) for epoch in subject.epochs if epoch.manifest is not None}
    if len(before) > 1:
        said = f"The data changed {len(before) - 1} time(s): what is asked is that of now, what was read that of all."
        parts.append(Text([said], "note"))
    series = subject.rows.series
    names = [name for name in series.names if name.startswith("targets/") and series.count(name)]
    if names:
        traces = [{"run": 0, "series": name, "label": name.removeprefix("targets/")} for name in names]
        spec = {"kind": "lines", "traces": traces, "unit": "tokens a step", "smooth": True, "marks": True}
        parts.append(Chart("Tokens of each subset as read", spec, "", "wide"))
    return Section("data", "Data", parts)


def _stage(stage: dict[str, Any], read: dict[str, float], manifest: dict[str, Any]) -> Table:
    rows_asked, all_read = sum(s["rows"] for s in stage["subsets"]) or 1, sum(read.values())
    rows = []
    for subset in stage["subsets"]:
        name = subset["name"]
        targets = read.get(name, 0.0)
        windows = subset["windows"] or 1
        rows.append(
            [
                name,
                f"{subset['rows'] * stage['sequence_length']:,}",
                f"{subset['rows'] / rows_asked:.2%}",
                f"{targets / all_read:.2%}" if all_read else "-",
                f"{subset['repeats']:g}",
                f"{subset['rows'] / windows:.3g}",
                f"{targets / stage['sequence_length'] / windows:.3g}",
            ]
        )
    head = ("subset", "tokens asked", "share asked", "share read", "weight", "epochs asked", "epochs read")
    steps = stage["chunks"] * stage["steps_per_chunk"]
    note = (
        f"Stage {stage['name']}: {steps:,} steps of {stage['rows_per_step']:,} rows of "
        f"{stage['sequence_length']:,} tokens in {stage['chunks']:,} chunks. {all_read:,.0f} tokens read so far."
    )
    return Table(head, rows, note)


def _stores(manifest: dict[str, Any], read: dict[str, dict[str, float]]) -> Table:
    rows = []
    for name, store in sorted(manifest["stores"].items()):
        total = sum(of.get(name, 0.0) for of in read.values())
        train = store["num_train_tokens"] or 1
        documents = f"{store['num_documents']:,}"
        rows.append([name, f"{store['num_tokens']:,}", documents, f"{total / train:.3g}", store["root_digest"][:16]])
    note = f"Stores, over all stages. Seed {manifest['seed']}; tokenizer {manifest['tokenizer_sha256'][:16]}."
    return Table(("store", "tokens", "documents", "epochs read", "root digest"), rows, note)
