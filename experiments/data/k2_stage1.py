"""K2-65B's first stage: its fourteen subsets, from the sets that LLM360 started from, by a recipe that can be repeated.

    python tools/prepare_data.py --config=experiments/data/k2_stage1.py --out=data/k2

What differs from K2's own preparation (k2-data-prep), on purpose: FIM is drawn from each document's id, not the clock,
and turns whole documents, not rows of 2048; no text is cut before it is tokenized; nothing is dropped at a file's end;
the order comes from the trainer. As there, nothing is deduplicated: the sets were, by their makers.
Sources: put the sets under data/raw as the files and text keys named here (JSON lines plain, .gz or .zst; unpack .xz).
Tokenizer: LLaMA's, and K2's 18 tokens behind it.
Repeats are those of k2jax/k2.py; the training experiments have them too.
"""

from ml_collections import ConfigDict

from k2jax import k2
from k2jax.prepare.recipe import base, subset

RAW = "data/raw"
REDPAJAMA = ("wikipedia", "book", "stackexchange", "arxiv")


def get_config() -> ConfigDict:
    c = base()
    c.tokenizer, c.add_k2_tokens = "data/llama/tokenizer.model", True
    c.dedup.exact = c.dedup.near = False
    sources = {
        "refinedweb": (f"parquet:{RAW}/refinedweb/**/*.parquet", {"text_key": "content", "tasks": 256}),
        "s2orc": (f"jsonl:{RAW}/s2orc/**/*.gz", {"tasks": 64}),
        "pile-of-law": (f"jsonl:{RAW}/pile-of-law/**/*.jsonl*", {"licence": "CC-BY-NC-SA-4.0", "tasks": 32}),
        "pubmed-central": (f"jsonl:{RAW}/pubmed-central/**/*.jsonl*", {"tasks": 16}),
        "pubmed-abstracts": (f"jsonl:{RAW}/pubmed-abstracts/**/*.jsonl*", {"tasks": 4}),
        "uspto": (f"jsonl:{RAW}/uspto/**/*.jsonl*", {"tasks": 4}),
        "dm-math": (f"jsonl:{RAW}/dm-math/**/*.jsonl*", {"tasks": 4}),
    }
    for name in REDPAJAMA:
        sources[f"redpajama-{name}"] = (f"jsonl:{RAW}/redpajama/{name}/**/*.jsonl*", {"tasks": 32})
    for name, (source, options) in sources.items():
        c.subsets[name] = subset(source, repeats=k2.STAGE1_MIX[name], **options)
    # Half of the documents as they are, a quarter each as PSM and SPM: the stores starcoder, -fim and -spm.
    c.subsets.starcoder = subset(
        f"parquet:{RAW}/starcoder/**/*.parquet",
        text_key="content",
        tasks=128,
        fim_rate=0.5,
        fim_stores=True,
        repeats=k2.STAGE1_MIX["starcoder"],
    )
    return c
