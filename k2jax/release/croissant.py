"""croissant.json: the data of a release as MLCommons' Croissant 1.0 describes data sets, for tools that load them.

What training read (data/, in whichever form) and what it recorded (metrics/): each file with its digest, each column
with its type. One record set reads all chunks.
"""

from typing import Any

from k2jax.release.record import Record
from k2jax.release.scratch import Scratch

# The vocabulary of Croissant 1.0, as its specification's example has it.
CR = "http://mlcommons.org/croissant/"
TERMS = (
    "citeAs column conformsTo equivalentProperty examples extract field fileProperty fileObject fileSet format "
    "includes isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate "
    "separator source subField transform"
)
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": CR,
    "rai": f"{CR}RAI/",
    "dct": "http://purl.org/dc/terms/",
    **{term: f"cr:{term}" for term in TERMS.split()},
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
}
COLUMNS = (  # of a chunk: name, type, meaning
    ("step", "cr:Int64", "the optimizer's step, from 1"),
    ("row", "cr:Int32", "which row of the step's batch, from 0"),
    ("position", "cr:Int64", "the row's place in the order planned before anything was skipped or deferred"),
    ("subset", "sc:Text", "where the row was taken from"),
    ("epoch", "cr:Int32", "how often the subset had been read before, from 0"),
    ("window", "cr:Int64", "which window of the subset's tokens"),
    ("token_ids", "sc:Integer", "what the step read"),
)
DIGESTS = (
    ("step", "cr:Int64", "the optimizer's step, from 1"),
    ("batch", "sc:Text", "digest of the batch that it read (SPECIFICATION.md)"),
)


def croissant(record: Record, facts: dict[str, Any], scratch: Scratch) -> dict[str, Any]:
    """The document."""
    manifest = record.manifest
    names = sorted(manifest["stores"])
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"{record.name}-data",
        "description": (
            f"What the training run {record.name} ({record.run}) read, step by step in the order of training: "
            f"{record.tokens:,} tokens in steps 1 to {record.step:,} of {record.order.num_steps:,}, from the subsets "
            f"{', '.join(names)}."
        ),
        "url": ".",
        "license": "LICENSES.md",
        "version": "1.0.0",
        "datePublished": facts["made"],
        "citeAs": f"{record.name}, run {record.run}",
        "keywords": ["language modelling", "pretraining", "training order", "k2jax"],
        "isLiveDataset": False,
        "rai:dataCollection": "DATA.md: subsets, their stores' digests, what was read of each, and how often.",
        "rai:dataCollectionType": "Others",
        "rai:dataPreprocessingProtocol": [
            f"Token ids of the tokenizer whose tokenizer.json has SHA-256 {manifest['tokenizer_sha256']}; documents "
            f"end with id {manifest['eos_id']}; rows are packed."
        ],
        "rai:dataLimitations": "Licences are LICENSES.md's, as the sources name them; nobody has checked them.",
        **(_tokens(scratch) if facts["data"] == "tokens" else _digests(scratch)),
    }


def _object(scratch: Scratch, name: str, kind: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{scratch.size(name)} B",
        "encodingFormat": kind,
        "sha256": scratch.digest(name),
    }


def _fields(columns: tuple, of: dict[str, Any], records: str) -> list[dict[str, Any]]:
    return [
        {
            "@type": "cr:Field",
            "@id": f"{records}/{name}",
            "name": name,
            "description": meaning,
            "dataType": kind,
            "source": {**of, "extract": {"column": name}},
            **({"repeated": True} if name == "token_ids" else {}),
        }
        for name, kind, meaning in columns
    ]


def _tokens(scratch: Scratch) -> dict[str, Any]:
    chunks = [name for name in scratch.names("data/chunk_") if name.endswith(".parquet")]
    objects = [_object(scratch, name, "application/x-parquet") for name in chunks]
    together = {
        "@type": "cr:FileSet",
        "@id": "chunks",
        "name": "chunks",
        "description": "One file a chunk of steps, in the order of training; data/README.md says how to read it.",
        "encodingFormat": "application/x-parquet",
        "includes": "data/chunk_*.parquet",
    }
    rows = {
        "@type": "cr:RecordSet",
        "@id": "rows",
        "name": "rows",
        "description": "A row of a step's batch.",
        "key": [{"@id": "rows/step"}, {"@id": "rows/row"}],
        "field": _fields(COLUMNS, {"fileSet": {"@id": "chunks"}}, "rows"),
    }
    return {"distribution": [*objects, together], "recordSet": [rows]}


def _digests(scratch: Scratch) -> dict[str, Any]:
    name = "data/digests.jsonl"
    steps = {
        "@type": "cr:RecordSet",
        "@id": "steps",
        "name": "steps",
        "description": "What each step read, by its digest; the tokens are not in this release.",
        "key": {"@id": "steps/step"},
        "field": _fields(DIGESTS, {"fileObject": {"@id": name}}, "steps"),
    }
    return {"distribution": [_object(scratch, name, "application/jsonlines")], "recordSet": [steps]}
