"""K2-65B's second stage: its twelve subsets, for rows of 8,192 tokens.

    python tools/prepare_data.py --config=experiments/data/k2_stage2.py --out=data/k2-stage2

How LLM360 prepared it is not in their code; amounts are (k2-facts 4.2). `max_bytes` takes about as much text as gives
the published tokens, at four bytes a token; the stores are read once. Otherwise as experiments/data/k2_stage1.py, with
the same tokenizer, so that one run trains on both: link or copy its stores into one folder.
"""

from ml_collections import ConfigDict

from k2jax import k2
from k2jax.prepare.recipe import base, subset

RAW = "data/raw"
BYTES_PER_TOKEN = 4  # of English in LLaMA's tokenizer, about
TOKENS = {  # in billions, published
    "stage2-python": 20.5,
    "stage2-open-web-math": 14.6,
    "stage2-algebraic-stack": 10.9,
    "stage2-books": 5.8,
    "stage2-simple-wiki": 4.3,
    "stage2-pes2o": 1.2,
    "stage2-arxiv": 2,
    "stage2-book": 2,
    "stage2-wikipedia": 2,
    "stage2-pile-of-law": 2,
    "stage2-pubmed-central": 2,
    "stage2-s2orc": 2,
}


def get_config() -> ConfigDict:
    c = base()
    c.tokenizer, c.add_k2_tokens = "data/llama/tokenizer.model", True
    c.dedup.exact = c.dedup.near = False
    for name, billions in TOKENS.items():
        c.subsets[name] = subset(
            f"jsonl:{RAW}/{name.removeprefix('stage2-')}/**/*.jsonl*",
            tasks=16,
            max_bytes=int(billions * 1e9) * BYTES_PER_TOKEN,
            repeats=k2.STAGE2_MIX[name],
        )
    c.subsets["stage2-python"].fim_rate = 0.5  # our choice: as stage one's code, in one store
    return c
