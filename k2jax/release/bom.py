"""bom.cdx.json: the release as a machine-learning bill of materials, CycloneDX 1.6: model, data, code, libraries."""

import uuid
from typing import Any

from k2jax import __version__
from k2jax import config as configuration
from k2jax.hf.families import title_of
from k2jax.release.cards import numbers
from k2jax.release.record import Record
from k2jax.release.scratch import Scratch

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:k2jax:release")  # of serial numbers


def bom(record: Record, facts: dict[str, Any], scratch: Scratch, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The document; `results` are evaluations of the last checkpoint."""
    stores = record.manifest["stores"]
    data = [_data(name, stores[name]) for name in sorted(stores)]
    libraries = [_library(name, version) for name, version in sorted(_versions(record).items())]
    model = _model(record, facts, results)
    source = {
        "type": "application",
        "bom-ref": "source",
        "name": "k2jax",
        "version": __version__,
        "hashes": [_hash(scratch.digest("source/k2jax.tar.gz"))],
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "externalReferences": [{"type": "source-distribution", "url": "source/k2jax.tar.gz"}],
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, record.run + record.head + facts['made'])}",
        "version": 1,
        "metadata": {
            "timestamp": facts["made"],
            "tools": {"components": [{"type": "application", "name": "k2jax", "version": __version__}]},
            "component": model,
        },
        "components": [*data, source, *libraries],
        "dependencies": [
            {"ref": "model", "dependsOn": [item["bom-ref"] for item in [*data, source]]},
            {"ref": "source", "dependsOn": [item["bom-ref"] for item in libraries]},
        ],
    }


def _model(record: Record, facts: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    m, last = configuration.from_dict(record.config).model, facts["checkpoints"][-1]
    metrics = [
        {"type": f"{result['task']} {name}", "value": repr(value)}
        for result in results
        for name, value in numbers(result["metrics"])
    ]
    references = [{"type": "model-card", "url": "README.md"}, {"type": "log", "url": "run/metrics/"}]
    references += [{"type": "distribution", "url": f"{export['path']}/"} for export in facts["exports"]]
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": record.name,
        "version": f"step {record.step}",
        "description": f"Run {record.run}: {record.tokens:,} tokens in {record.step:,} steps.",
        "externalReferences": references,
        "properties": [
            {"name": "k2jax:run", "value": record.run},
            {"name": "k2jax:checkpoint-digest", "value": last["digest"]},
            {"name": "k2jax:ledger-record", "value": record.head},
        ],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "self-supervised"},
                "task": "text-generation",
                "architectureFamily": "transformer decoder",
                "modelArchitecture": title_of(m, record.imported_kind),
                "datasets": [{"ref": f"data:{name}"} for name in sorted(record.manifest["stores"])],
                "inputs": [{"format": "token ids"}],
                "outputs": [{"format": "logits"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": metrics},
        },
    }


def _data(name: str, store: dict[str, Any]) -> dict[str, Any]:
    counts = f"{store['num_documents']:,} documents, {store['num_tokens']:,} tokens"
    return {
        "type": "data",
        "bom-ref": f"data:{name}",
        "name": name,
        "version": store["root_digest"],
        "description": f"A store of {counts}; its root digest is its version.",
        "hashes": [_hash(store["root_digest"])],
        "data": [{"type": "dataset", "name": name, "description": counts, "contents": {"url": "DATA.md"}}],
    }


def _library(name: str, version: str) -> dict[str, Any]:
    found = {"type": "library", "bom-ref": f"library:{name}", "name": name, "version": version}
    return found if name == "python" else {**found, "purl": f"pkg:pypi/{name}@{version}"}


def _versions(record: Record) -> dict[str, str]:
    """Of the last launch, as it recorded them."""
    launches = [launch for launch in record.launches if isinstance(launch.get("versions"), dict)]
    found = launches[-1]["versions"] if launches else {}
    return {str(name): str(version) for name, version in found.items() if name != "k2jax"}


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}
