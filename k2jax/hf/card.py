"""What stands beside the weights: the tokenizer's files, generation settings, and a model card made from the run."""

import json
from typing import Any

from k2jax import __version__
from k2jax.config import described_rate
from k2jax.data.epochs import read_epochs
from k2jax.data.tokenizer import UNK, Tokenizer, load_tokenizer
from k2jax.hf import side_files
from k2jax.hf.families import kind_of, title_of
from k2jax.model.decoder import num_params
from k2jax.run.saved import SavedStep
from k2jax.text import as_code, for_markdown


def special_tokens(tokenizer: Tokenizer, eos_id: int) -> dict[str, str]:
    """By the role that transformers gives them. k2jax puts no token before a text, so that there is no `bos_token`."""
    eos = tokenizer.id_to_token(eos_id)
    # Never made from a text (it is written as bytes), so that padding with it hides no token that counts.
    unknown = {"unk_token": UNK, "pad_token": UNK} if tokenizer.token_to_id(UNK) is not None else {"pad_token": eos}
    return {"eos_token": eos, **unknown}


def tokenizer_config(tokens: dict[str, str], context: int) -> dict[str, Any]:
    """tokenizer_config.json; tokenizer.json itself is the run's, byte for byte."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }


def generation_config(tokenizer: Tokenizer, tokens: dict[str, str], eos_id: int) -> dict[str, Any]:
    """generation_config.json: where a text ends; how to sample is left to who generates."""
    return {"eos_token_id": eos_id, "pad_token_id": tokenizer.token_to_id(tokens["pad_token"])}


def model_card(saved: SavedStep, dtype: str, parity: dict[str, Any]) -> str:
    """README.md of the export."""
    m, stage, logits = saved.config.model, saved.stage, parity["logits"]
    imported = saved.imported
    family = m, imported and imported["config"].get("model_type")
    name = for_markdown(saved.config.name)
    facts = {
        "Parameters": f"{num_params(m):,}",
        "Architecture": f"{title_of(*family)}: {m.num_layers} layers, width {m.dim}, {m.num_heads} query and "
        f"{m.num_kv_heads} key-value heads of {m.head_dim}, SwiGLU of {m.ffn_dim}, vocabulary {m.vocab_size:,}",
        "Context": f"{saved.context:,} tokens, RoPE base {stage.rope_base:g}",
        "Step": f"{saved.step:,} (stage {stage.name})",
        "Tokens seen": f"{saved.meta['tokens_seen']:,}" if "tokens_seen" in saved.meta else None,
        "Weights": dtype if saved.weights == "params" else f"{dtype}, the moving average over steps ({saved.weights})",
    }
    tags = f"tags: [k2jax, {kind_of(*family)}]"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", tags, "---", ""]
    lines += [f"# {name}, step {saved.step:,}", "", *_table(facts), ""]
    lines += ["## Use", "", "```python", _EXAMPLE, "```", ""]
    lines += [_before_a_text(saved), "", *_data(saved), *_stages(saved)]
    lines += ["## Where it comes from", "", *_table(_origin(saved)), ""]
    lines += [
        "## Certificate",
        "",
        "`parity.json` holds, per tensor, the SHA-256, norm and number of non-finite values, and for "
        f"{len(logits['tokens'])} fixed rows of {len(logits['tokens'][0])} tokens what logits to expect. k2jax's, "
        "from the checkpoint, and those of an independent implementation over these files differ by at most "
        f"{logits['largest_difference']:.2g} (largest logit {logits['largest_logit']:.3g}; rounding explains "
        f"{logits['tolerance']:.2g}). `tools/convert_to_hf.py --verify` checks them again.",
        "",
        "## Licence",
        "",
        _licence(side_files.licences(side_files.of_run(saved))),
    ]
    return "\n".join(lines) + "\n"


_EXAMPLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", dtype="auto")
inputs = tokenizer("The order of the data is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"""


def _before_a_text(saved: SavedStep) -> str:
    tokenizer = load_tokenizer(saved.tokenizer)
    put = ", ".join(as_code(tokenizer.id_to_token(id) or str(id)) for id in tokenizer.begin_ids)
    if not put:
        return "No token goes before a text (tokenizer.json puts none there)."
    return f"Before a text, tokenizer.json puts {put}" + (
        "." if saved.imported else "; the documents that it was trained on had none there."
    )


def _licence(names: list[str]) -> str:
    if not names:
        return "Not recorded by the run: whoever publishes these weights states it here."
    files = ", ".join(map(as_code, names))
    return f"The weights that it began with came with {files}, which is here too: whoever publishes these keeps to it."


def _table(facts: dict[str, Any]) -> list[str]:
    """Values that begin with a backtick were made by `as_code`."""
    shown = {key: str(value) for key, value in facts.items() if value is not None}
    cells = {key: value if value.startswith("`") else for_markdown(value) for key, value in shown.items()}
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells.items())]


def _data(saved: SavedStep) -> list[str]:
    """The mix of each stage up to the one of this checkpoint; nothing for a run that has not trained."""
    manifest = read_epochs(saved.workdir)[saved.meta["epoch"]["number"] - 1].manifest
    if manifest is None:
        return []
    lines = ["## Data", "", "| stage | subset | share of the stage's tokens | epochs |", "|---|---|---|---|"]
    for stage in manifest["stages"][: saved.meta["stage"] + 1]:
        rows = sum(subset["rows"] for subset in stage["subsets"])
        for subset in sorted(stage["subsets"], key=lambda s: (-s["rows"], s["name"])):
            epochs = subset["rows"] / subset["windows"]
            share = f"{100 * subset['rows'] / rows:.2f}%"
            lines.append(f"| {for_markdown(stage['name'])} | {for_markdown(subset['name'])} | {share} | {epochs:.3g} |")
    return [*lines, ""]


def _stages(saved: SavedStep) -> list[str]:
    if "tokens_seen" not in saved.meta:
        return []
    columns = "| stage | context | rows a step | steps | RoPE base | learning rate |"
    lines = ["## Training", "", columns, "|" + "---|" * 6]
    for row in saved.config.stages[: saved.meta["stage"] + 1]:
        lines.append(
            f"| {for_markdown(row.name)} | {row.sequence_length:,} | {row.rows_per_step:,} "
            f"| {row.steps_per_chunk * row.chunks:,} | {row.rope_base:g} | {described_rate(row)} |"
        )
    masked = "masked at the ends of documents" if saved.config.model.mask_documents else "not masked at documents' ends"
    return [*lines, "", f"Steps are the stage's as planned. Rows are packed, attention is {masked}.", ""]


def _origin(saved: SavedStep) -> dict[str, Any]:
    meta, imported = saved.meta, saved.imported or {}
    parent, devices = meta.get("parent"), meta.get("devices")
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    hardware = f"{devices['count']} x {devices['kind']}, mesh {json.dumps(devices['mesh'])}" if devices else None
    return {
        "Imported from": imported.get("source"),
        "Keys of its config.json that were left out": as_code(json.dumps(ignored))
        if (ignored := imported.get("ignored"))
        else None,
        "Checkpoint digest": as_code(saved.digest),
        "Checkpoint before it": as_code(f"step {parent['step']}, {parent['digest']}") if parent else None,
        "Configuration digest": as_code(meta["config_digest"]) if "config_digest" in meta else None,
        "Data digest": as_code(meta["manifest_digest"]) if meta.get("manifest_digest") else None,
        "Tokenizer SHA-256": as_code(meta["tokenizer_sha256"]),
        "Commit": meta.get("commit"),
        "Trained with": versions,
        "Trained on": hardware,
        "Exported with": f"k2jax {__version__}",
    }
