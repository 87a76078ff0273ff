"""README.md of a release, a model card, from the run's own record.

Names, texts and paths in it are whatever a run says: each goes through for_markdown or as_code, the metadata through
YAML, so that none becomes markup.
"""

import math
from typing import Any

import yaml

from k2jax import config as configuration
from k2jax.data.manifest import manifest_digest
from k2jax.hf.families import kind_of
from k2jax.model.decoder import num_params
from k2jax.release.outcome import cost_table, prediction
from k2jax.release.record import Record
from k2jax.release.scratch import Scratch
from k2jax.text import as_code, for_markdown, printable

FOLDERS = (
    ("files.json", "bytes and SHA-256 of every file; the SHA-256 of this one is the release's digest"),
    ("model.sig", "signature over all files (OpenSSF model signing)"),
    ("release.json", "what the release holds, for programs"),
    ("SPECIFICATION.md", "formats and digests, enough to write a verifier anew"),
    ("checkpoints.csv", "every checkpoint of the run: stage, step, tokens, loss, digest"),
    ("DATA.md", "the data's card"),
    ("LICENSES.md", "licences by subset, as recorded"),
    ("RETROSPECTIVE.md", "what happened, from the journal; the rest is for people to fill in"),
    ("report.html", "the run at a glance, offline"),
    ("run/", "the run directory, less what was left out: every k2jax command takes --workdir=run"),
    ("run/branches/", "what roll-backs left behind, with their checkpoints"),
    ("data/", "what every step read, or its digests"),
    ("exports/", "checkpoints in Hugging Face's format, each with its certificate, parity.json"),
    ("source/", "the code and its exact versions"),
    ("croissant.json", "the data for tools (MLCommons Croissant 1.0)"),
    ("bom.cdx.json", "bill of materials (CycloneDX 1.6)"),
    ("openness.json", "OSAID 1.0 checklist, MOF class, and what is missing for the next"),
)
EXAMPLE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")
```"""


def model_card(
    record: Record, facts: dict[str, Any], scratch: Scratch, results: list[dict[str, Any]], source: str, mof: str
) -> str:
    """The text. `results` are evaluations of the last checkpoint; `source` says what source/ holds."""
    config = configuration.from_dict(record.config)
    name = for_markdown(record.name)
    lines = [f"# {name}: the whole run", ""]
    lines += [
        "Every file here is from the run's own record, made by k2jax. Checkpoints, what every step read, the ledger of "
        "digests, metrics, evaluations and what went wrong: for anyone to use, and to check.",
        "",
    ]
    lines += [*table(_facts(record, facts, config, mof)), ""]
    lines += ["## Check it", ""]
    lines += [
        "`python verify_release.py DIR` (from k2jax's tools) needs Python, numpy and "
        "pyarrow. It says what is proven and what is not. The digest of the release is the SHA-256 of `files.json`: "
        "compare it with the one that was published elsewhere.",
        "",
    ]
    lines += ["## Use it", "", *_use(facts), ""]
    lines += ["## What is here", "", "| | |", "|---|---|"]
    later = {"files.json", "README.md", "openness.json"}
    lines += [f"| `{path}` | {says} |" for path, says in FOLDERS if path in later or scratch.names(path)]
    lines += ["", *_left_out(record, facts), "", *_checkpoints(record), "", *_stages(config), ""]
    lines += ["## Prediction and outcome", "", *prediction(record), "", "## Costs", "", *cost_table(record), ""]
    lines += [*_evaluations(record, results, bool(scratch.names("run/evals/"))), *_environment(record, source)]
    lines += ["## Licence", "", "See LICENSES.md.", ""]
    return front_matter(record, config, results) + "\n".join(lines)


def front_matter(record: Record, config: Any, results: list[dict[str, Any]]) -> str:
    """Hugging Face's metadata."""
    kind = kind_of(config.model, record.imported_kind) or "decoder"
    values: dict[str, Any] = {
        "license": "other",
        "license_name": "see-licenses",
        "license_link": "LICENSES.md",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["k2jax", "360-release", kind],
    }
    index = [entry for result in results if (entry := _model_index(result))]
    if index:
        values["model-index"] = [{"name": one_line(record.name), "results": index}]
    return as_yaml(values)


def as_yaml(values: dict[str, Any]) -> str:
    """A card's metadata; no line of it but the first and last is ---."""
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1 << 20)}---\n\n"


def one_line(text: Any) -> str:
    return " ".join(printable(str(text)).split())


def _model_index(result: dict[str, Any]) -> dict[str, Any] | None:
    metrics = numbers(result["metrics"])
    if not metrics:
        return None
    task = one_line(result["task"])
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": task, "name": task},
        "metrics": [{"type": one_line(name), "name": one_line(name), "value": value} for name, value in metrics],
    }


def numbers(metrics: Any) -> list[tuple[str, float]]:
    found = metrics.items() if isinstance(metrics, dict) else ()
    return sorted((str(k), v) for k, v in found if type(v) in (int, float) and math.isfinite(v))


def table(rows: dict[str, Any]) -> list[str]:
    """Values that begin with a backtick were made by as_code."""
    shown = {key: str(value) for key, value in rows.items() if value is not None}
    cells = {key: value if value.startswith("`") else for_markdown(value) for key, value in shown.items()}
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells.items())]


def _facts(record: Record, facts: dict[str, Any], config: Any, mof: str) -> dict[str, Any]:
    m, last = config.model, facts["checkpoints"][-1]
    return {
        "Parameters": f"{num_params(m):,}",
        "Architecture": f"{m.num_layers} layers, width {m.dim}, {m.num_heads} query and {m.num_kv_heads} key-value "
        f"heads of {m.head_dim}, SwiGLU of {m.ffn_dim}, vocabulary {m.vocab_size:,}",
        "Trained": f"{record.step:,} of {record.order.num_steps:,} steps, {record.tokens:,} tokens",
        "Run": as_code(record.run),
        "Last checkpoint": as_code(f"step {last['step']}, {last['digest']}"),
        "Ledger's last record": as_code(record.head),
        "Data": as_code(manifest_digest(record.manifest)),
        "Roll-backs": f"{len(record.branches)}, see RETROSPECTIVE.md" if record.branches else "none",
        "Openness": f"{mof} (openness.json)",
        "Made": facts["made"],
    }


def _use(facts: dict[str, Any]) -> list[str]:
    if not facts["exports"]:
        return ["No checkpoint is here in Hugging Face's format; `tools/convert_to_hf.py --workdir=run` makes one."]
    lines = [EXAMPLE.format(path=facts["exports"][-1]["path"]), ""]
    if len(facts["exports"]) > 1:
        lines += ["Others: " + ", ".join(f"`{export['revision']}`" for export in facts["exports"][:-1]) + ".", ""]
    last = facts["exports"][-1]["revision"]
    said = f'Where this is on a hub, each is a branch, too: `revision="{last}"`. No token goes before a text (no BOS).'
    return [*lines, said]


def _left_out(record: Record, facts: dict[str, Any]) -> list[str]:
    missing = [c["step"] for c in facts["checkpoints"] if c["path"] is None]
    lines = ["**Left out.** "]
    if missing:
        of_all = f"{len(missing)} of {len(facts['checkpoints'])} checkpoints"
        lines[0] += f"{of_all} (their digests are in checkpoints.csv). "
    if not facts["options"]["optimizer_state"]:
        lines[0] += "Optimizer state: training cannot go on from these checkpoints. "
    if facts["data"] == "digests":
        lines[0] += "The tokens: data/ has what each batch hashes to. "
    lines[0] += "Compiled programs, TensorBoard's files, what was abandoned as damaged."
    lines += [
        "",
        "**As they were.** `run/epochs/` and `run/environment.json` are chained by digests, so they are here byte for "
        "byte: they name hosts, folders and command lines of the machines that trained. Credentials in URLs were taken "
        "out when they were written.",
    ]
    return lines


def _checkpoints(record: Record) -> list[str]:
    lines = ["## Checkpoints", "", "From steps to tokens, by stage:", "", "| stage | tokens a step |", "|---|---|"]
    for stage in record.manifest["stages"]:
        lines.append(f"| {for_markdown(stage['name'])} | {stage['rows_per_step'] * stage['sequence_length']:,} |")
    return lines


def _stages(config: Any) -> list[str]:
    columns = "| stage | context | rows a step | steps planned | RoPE base | learning rate |"
    lines = ["## Training", "", columns, "|" + "---|" * 6]
    for row in config.stages:
        lines.append(
            f"| {for_markdown(row.name)} | {row.sequence_length:,} | {row.rows_per_step:,} "
            f"| {row.steps_per_chunk * row.chunks:,} | {row.rope_base:g} | {configuration.described_rate(row)} |"
        )
    return [*lines, "", "The whole configuration, with each change of it, is in `run/epochs/`."]


def _evaluations(record: Record, results: list[dict[str, Any]], there: bool) -> list[str]:
    if not results:
        return []
    lines = [f"## Evaluations of step {record.step:,}", "", "| task | metric | value |", "|---|---|---|"]
    for result in results:
        for name, value in numbers(result["metrics"]):
            lines.append(f"| {for_markdown(result['task'])} | {for_markdown(name)} | {value:.6g} |")
    more = ["", "Those of other checkpoints, and every sample, are in `run/evals/`."] if there else []
    return [*lines, *more, ""]


def _environment(record: Record, source: str) -> list[str]:
    lines = ["## Environment", "", "| launch | devices | jax | commit |", "|---|---|---|---|"]
    for launch in record.launches:
        devices, versions = launch.get("devices") or {}, launch.get("versions") or {}
        commit = as_code(str(launch.get("commit"))[:13]) if launch.get("commit") else "not recorded"
        kind = for_markdown(f"{devices.get('count', '?')} x {devices.get('kind', '?')}")
        when, jax = for_markdown(launch["time"]), for_markdown(versions.get("jax", "?"))
        lines.append(f"| {when} | {kind} | {jax} | {commit} |")
    return [*lines, "", f"`source/` is {for_markdown(source)}.", ""]
