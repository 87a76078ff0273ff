"""K2-V2's shape: LLM360's 70B of 2025 with grouped queries (GQA 8), pre-training and the first stage of mid-training.

Purpose: K2-65B's successor in k2jax. Published (LLM360/k2v2_train's scripts) are shape, initialisation, rows, steps,
  learning rates, decay and parallelism; what was not is marked "our choice". Its norms are written 1 + w there, which
  differs only where norms are decayed, and they are not.
Data: TxT360 as one store and TxT360-Midas' first part as another (our choice: the weights of pre-training's subsets are
  not in the scripts), under data/k2_v2, with its tokenizer of 250k tokens.
Command: python -m k2jax.train --config=experiments/k2_v2_70b.py --workdir=DIR
Hardware: 3,200 GPUs with 80 GB, as K2-V2 had (400 data parallel x 8 tensor parallel).
Tokens: 1.25M steps x 1200 rows x 8192 = 12.29T, then 135,000 x 1600 x 8192 = 1.77T. The three stages of mid-training at
  64k, 128k and 512k are not here.
Expected time and loss: not planned, not measured, not published.
"""

from ml_collections import ConfigDict

from k2jax import config


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "k2_v2_70b"
    c.seed = 42
    c.model.vocab_size = 250_112  # our choice: 250k tokens are published, these are a multiple of 256
    c.model.num_kv_heads = 8
    c.model.ffn_dim = 28_672
    c.model.init_std = 0.01
    c.model.remat = "full"
    c.optimizer.weight_decay = 0.05
    c.mesh.replica, c.mesh.fsdp, c.mesh.tensor = 50, 8, 8  # 400 x 8; how the 400 are cut is our choice
    c.data.root, c.data.tokenizer = "data/k2_v2", "data/k2_v2/tokenizer.json"
    c.data.threads, c.data.prefetch = 4, 8
    c.checkpoint.every_steps = 500
    c.checkpoint.moments_every = 10  # our choice, as the chunks: 277 checkpoints kept for ever, 80 TB of weights
    c.stages = (
        config.stage(
            name="pretrain",
            sequence_length=8192,
            rope_base=500_000.0,
            rows_per_step=1200,
            microbatches=3,
            steps_per_chunk=5000,
            chunks=250,
            lr_final=0.0,
            warmup_steps=2000,  # our choice, K2-65B's: the script has 50, "test run"
            mix={"txt360": 1},
        ),
        config.stage(
            name="midtrain1",
            sequence_length=8192,
            rope_base=500_000.0,
            rows_per_step=1600,
            microbatches=4,
            steps_per_chunk=5000,
            chunks=27,
            lr_peak=1.5e-5,
            lr_final=6e-6,
            warmup_steps=500,
            mix={"txt360-midas-1": 1},
        ),
    )
    return c
