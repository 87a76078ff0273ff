"""README.md of an export: what the files are, how to read them, how to check them, for a reader without this code."""

from typing import Any

from k2jax.text import as_code


def readme(summary: dict[str, Any]) -> str:
    """The text; `summary` is what chunks.json holds."""
    extra = ", the last of them only a target" if summary["label_shift"] == "next" else ""
    stages = []
    for stage in summary["stages"]:
        length = stage["sequence_length"] + (summary["label_shift"] == "next")
        stages.append(
            f"- stage {as_code(stage['name'])}: {stage['rows_per_step']:,} rows a step, {length:,} token ids a row"
            f"{extra}"
        )
    return TEXT.format(
        finished=len(summary["chunks"]),
        stages="\n".join(stages),
        subsets="\n".join(
            f"- {as_code(name)}, root digest {as_code(digest)}" for name, digest in summary["subsets"].items()
        ),
        **{
            key: summary[key]
            for key in ("num_chunks", "num_steps", "tokenizer_sha256", "vocab_size", "eos_id", "data")
        },
    )


TEXT = """# Training data, in the order of training

{finished} of {num_chunks} chunks of a run of {num_steps} steps. `chunk_00000.parquet` holds the rows of the first steps
in their order, and so on; `chunks.json` has for each file its SHA-256, its steps and its counts. Chunk `i` is number
`i + 1` of the run's ledger and checkpoints, which count from 1.

{stages}

## Read one

```python
import numpy, pandas

chunk = pandas.read_parquet("chunk_00000.parquet")
step = chunk[chunk.step == chunk.step.min()]
batch = numpy.stack(step.token_ids)
print(batch.shape, step.subset.value_counts(), step.documents.iloc[0])
```

A chunk may be larger than memory: `pyarrow.parquet.ParquetFile(...).iter_batches()` reads it in parts.

## Columns

| column | type | meaning |
|---|---|---|
| step | int64 | the optimizer's step, from 1 |
| row | int32 | which row of the step's batch, from 0 |
| position | int64 | the row's place in the order that was planned before anything was skipped or deferred |
| subset | string | where the row was taken from |
| epoch | int32 | how often the subset had been read before, from 0 |
| window | int64 | which window of the subset's tokens |
| token_ids | list of uint16 (uint32 above 65,536 ids) | what the step read |
| documents | list of struct | the parts of documents that the row is made of, in order: |
| .id | string | SHA-256 (hex) of the document's text |
| .source | string | its file or URL, as its publisher wrote it: not to be trusted |
| .start_in_document | int64 | tokens of the document before this part |
| .start, .stop | int32 | the part is `token_ids[start:stop]`, its end-of-text token included |

Token ids are those of the tokenizer whose `tokenizer.json` has SHA-256 `{tokenizer_sha256}`: {vocab_size:,} ids,
{eos_id} ends a document. Documents may go over from row to row; attention was not necessarily masked between them.

## Check a step

The run's ledger has a digest of what every step read. It can be computed from the rows:

```python
import hashlib, numpy, pandas

chunk = pandas.read_parquet("chunk_00000.parquet")
for number, step in chunk.groupby("step"):
    rows = zip(step.row, step.token_ids)
    hashes = [hashlib.sha256(numpy.uint64(r).tobytes() + ids.astype("<u4").tobytes()).digest() for r, ids in rows]
    lanes = numpy.frombuffer(b"".join(hashes), "<u4").reshape(-1, 8)
    print(number, lanes.sum(axis=0, dtype="<u4").tobytes().hex())
```

## Where it comes from

Data `{data}` (the digest of the run's manifest), from the stores

{subsets}

The licences of the documents are those of their sources.
"""
