"""openness.json: what of the open-source AI definition and the model openness framework a release meets, and lacks.

OSAID 1.0 (Open Source Initiative, 2024) asks for information on the data, for the code and for the parameters, all
under terms that let anyone use, study, modify and share them. The Model Openness Framework (arXiv 2403.13784) has three
classes of components. Whether a licence is open is for its holder to say: what nobody recorded counts as missing.
"""

from typing import Any, NamedTuple

from k2jax.release.licences import Found
from k2jax.release.record import Record
from k2jax.release.scratch import Scratch

OSAID = "https://opensource.org/ai/open-source-ai-definition"
MOF = "https://arxiv.org/abs/2403.13784"
CODE_LICENCE = "Apache-2.0"


class Component(NamedTuple):
    """Of MOF: in which class it is needed, where it is, what is said of it."""

    mof: str  # III open model, II open tooling, I open science
    name: str
    paths: tuple[str, ...]  # of which any one counts; a folder ends in "/"
    licence: str | None  # None: not recorded by the run
    why: str = ""


COMPONENTS = (
    Component("III", "model architecture", ("source/k2jax.tar.gz",), CODE_LICENCE),
    Component("III", "model parameters (final)", ("exports/", "run/checkpoints/"), None),
    Component("III", "technical report", ("RETROSPECTIVE.md",), None, "a skeleton until people have filled it in"),
    Component("III", "evaluation results", ("run/evals/", "run/validation.json"), CODE_LICENCE),
    Component("III", "model card", ("README.md",), CODE_LICENCE),
    Component("III", "data card", ("DATA.md",), CODE_LICENCE),
    Component("II", "training code", ("source/k2jax.tar.gz",), CODE_LICENCE),
    Component("II", "inference code", ("source/k2jax.tar.gz",), CODE_LICENCE),
    Component("II", "evaluation code", ("source/k2jax.tar.gz",), CODE_LICENCE),
    Component("II", "evaluation data", ("run/evals/",), None, "samples of each evaluation"),
    Component("II", "supporting libraries and tools", ("source/requirements.lock",), CODE_LICENCE),
    Component("I", "datasets", ("data/chunks.json",), None, "the tokens as trained on; the tokenizer gives the text"),
    Component("I", "data preprocessing code", ("source/k2jax.tar.gz",), CODE_LICENCE),
    Component("I", "intermediate model parameters", ("run/checkpoints/",), None),
    Component("I", "model metadata", ("release.json", "bom.cdx.json", "run/ledger/records.jsonl"), CODE_LICENCE),
    Component("I", "research paper", (), None),
)
CLASSES = {"III": "open model", "II": "open tooling", "I": "open science"}


def openness(record: Record, facts: dict[str, Any], scratch: Scratch, licences: Found | None) -> dict[str, Any]:
    """The document. `licences` are those of licences.py; None where the stores were not at hand."""
    checklist = _osaid(scratch, licences, facts)
    found = [_judged(component, scratch, licences, facts) for component in COMPONENTS]
    met = None
    for name in CLASSES:  # from the widest on; each needs the ones before it
        if not all(entry["met"] for entry in found if entry["class"] == name):
            break
        met = name
    following = next((name for name in CLASSES if list(CLASSES).index(name) > _rank(met)), None)
    missing = [
        {"component": entry["component"], "missing": entry["missing"]}
        for entry in found
        if entry["class"] == following and not entry["met"]
    ]
    return {
        "format": 1,
        "run": record.run,
        "osaid": {
            "version": "1.0",
            "definition": OSAID,
            "met": all(entry["met"] for entry in checklist),
            "checklist": checklist,
        },
        "mof": {
            "framework": MOF,
            "class": met,
            "means": CLASSES[met] if met else "below class III",
            "next": following,
            "missing_for_next": missing,
            "components": found,
        },
        "beyond": [name for name in ("run/ledger/records.jsonl", "files.json", "checkpoints.csv", "run/journal.jsonl")
                   if name == "files.json" or scratch.names(name)],
    }  # fmt: skip


def _rank(met: str | None) -> int:
    return -1 if met is None else list(CLASSES).index(met)


def _judged(component: Component, scratch: Scratch, licences: Found | None, facts: dict[str, Any]) -> dict[str, Any]:
    where = [path for path in component.paths if scratch.names(path)]
    missing = [] if where else ["not in this release"]
    if component.name == "intermediate model parameters":
        there = [c["path"] for c in facts["checkpoints"][:-1] if c["path"]]
        where, missing = (where, []) if there else ([], ["checkpoints before the last: --checkpoints=all"])
    if component.name == "research paper":
        missing = ["a paper: none can follow from the record of a run"]
    licence = component.licence
    if component.name == "datasets" and where and _all_named(licences):
        licence = "by subset: LICENSES.md"
    if where and licence is None:
        missing.append("a licence: the run records none; who publishes states it in LICENSES.md")
    if component.why and "skeleton" in component.why:
        missing.append("what only people know: RETROSPECTIVE.md marks it")
    fields = {"class": component.mof, "component": component.name, "met": not missing, "where": where}
    return {**fields, "licence": licence, "note": component.why, "missing": missing}


def _osaid(scratch: Scratch, licences: Found | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    def entry(asks: str, where: list[str], missing: list[str]) -> dict[str, Any]:
        return {"asks": asks, "met": not missing, "where": where, "missing": missing}

    data = ["DATA.md", "run/epochs/", "run/ledger/", "croissant.json"]
    named = [] if _all_named(licences) else ["where each subset can be had, and its licence: the stores record none"]
    parameters = ["run/checkpoints/", "exports/"]
    there = [path for path in parameters if scratch.names(path)]
    return [
        entry("data information: enough for a skilled person to build a substantially equivalent system", data, named),
        entry(
            "code: data processing, training, validation, inference, tokenizer, settings",
            ["source/k2jax.tar.gz", "source/requirements.lock", "run/tokenizer.json", "run/epochs/"],
            [],
        ),
        entry(
            "parameters: weights, and other settings of the model",
            there,
            ["a licence of the weights: who publishes states it"] if there else ["weights: --checkpoints or --exports"],
        ),
    ]


def _all_named(licences: Found | None) -> bool:
    return licences is not None and all(found and None not in found for found in licences.values())
