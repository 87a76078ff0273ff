"""K2-65B's data mixes as LLM360 published them ("-" for the "." in their names); the family's experiments share them.

Stage one: the repeats are those of the released preparation code (k2-data-prep, gather.py), which spread them over 360
chunks. Stage two: only shares of 69.3B tokens were published, so each subset's weight is left to its store: one pass
over what the store holds, which reproduces the shares when the stores hold the published amounts.
"""

from ml_collections import ConfigDict

from k2jax import config

STAGE1_MIX = {
    "refinedweb": 1,
    "redpajama-wikipedia": 6,
    "s2orc": 1,
    "redpajama-book": 3,
    "pile-of-law": 1,
    "starcoder": 0.5,
    "redpajama-stackexchange": 3,
    "starcoder-fim": 0.5,
    "starcoder-spm": 0.5,
    "redpajama-arxiv": 1,
    "pubmed-central": 1,
    "pubmed-abstracts": 3,
    "uspto": 3,
    "dm-math": 3,
}

STAGE2_MIX = {
    "stage2-python": 1,
    "stage2-open-web-math": 1,
    "stage2-algebraic-stack": 1,
    "stage2-books": 1,
    "stage2-simple-wiki": 1,
    "stage2-pes2o": 1,
    "stage2-arxiv": 1,
    "stage2-book": 1,
    "stage2-wikipedia": 1,
    "stage2-pile-of-law": 1,
    "stage2-pubmed-central": 1,
    "stage2-s2orc": 1,
}


def stages_65b(rows: tuple[int, int], microbatches: tuple[int, int]) -> tuple[ConfigDict, ConfigDict]:
    """Both stages of K2-65B: published numbers are config.stage()'s and those here, what was not is "our choice"."""
    return (
        config.stage(name="stage1", rows_per_step=rows[0], microbatches=microbatches[0], mix=STAGE1_MIX),
        config.stage(
            name="stage2",
            sequence_length=8192,
            rope_base=500_000.0,
            rows_per_step=rows[1],  # our choice: near stage one's 4.2M tokens; chunks of 3.47B tokens are K2's
            microbatches=microbatches[1],
            steps_per_chunk=882,
            chunks=20,
            lr_peak=1.5e-5,  # our choice, all three: go on from where stage one ended, down to a tenth
            lr_start=1.5e-5,
            lr_final=1.5e-6,
            warmup_steps=0,
            mix=STAGE2_MIX,
        ),
    )

CHAT_TOKENS = {  # of K2-Chat's mix, as its card has them
    "chat-flan-3m": 2_346_961_387,
    "chat-openhermes-2": 404_820_694,
    "chat-safety": 99_976_621,
    "chat-mathinstruct": 66_639_699,
    "chat-tinystories": 1_448_898,
    "chat-stanford-philosophy": 786_928,
}


def stage_chat(rows: int, microbatches: int, epochs: int = 2, chunks: int = 10) -> ConfigDict:
    """K2-Chat's stage: mix and length are published, what else it did is not. Each store is read `epochs` times.

    Learning rate, warm-up and epochs are K2-V2's, which are published (k2v2_train, sft/); batch and chunks our choice.
    """
    length = 8192
    steps = epochs * sum(CHAT_TOKENS.values()) // (rows * length * chunks) * chunks
    return config.stage(
        name="chat",
        kind="sft",
        sequence_length=length,
        too_long="cut",  # our choice, as the next
        reset_positions=True,
        rope_base=500_000.0,
        rows_per_step=rows,
        microbatches=microbatches,
        steps_per_chunk=steps // chunks,
        chunks=chunks,
        lr_peak=2e-5,
        lr_final=0.0,
        warmup_steps=steps // 20,
        mix=dict.fromkeys(CHAT_TOKENS, 1),
    )
