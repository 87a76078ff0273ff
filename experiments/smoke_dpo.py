"""Smoke DPO: the smoke model learns to answer in a template's form, and then which of two answers is preferred.

Purpose: to see a stage of kind "dpo" from pairs to rewards, in four minutes.
Data: tools/prepare_data.py --config=experiments/data/smoke_chat.py, after experiments/data/smoke.py.
Command: python -m k2jax.train --config=experiments/smoke_dpo.py --workdir=runs/smoke_dpo
Hardware: two CPU cores; four minutes. Tokens: 0.3M.
Expect: the second stage begins at loss 0.693, the logarithm of 2, with no pair told apart, and ends lower, with
  nine of ten told apart; runs/smoke_dpo/reference/prefer.npy is what the first stage's model says of them.
"""

from ml_collections import ConfigDict

from k2jax import config


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "smoke_dpo"
    c.model.vocab_size = 4096
    c.model.dim = 224
    c.model.num_layers = 6
    c.model.num_heads = 7
    c.model.num_kv_heads = 7
    c.model.head_dim = 32
    c.model.ffn_dim = 592
    c.data.root = "data/smoke_chat"
    c.data.tokenizer = "data/smoke_chat/tokenizer.json"
    c.data.verify = "sha256"
    c.eval.prompts = ("[INST] After 8? [/INST]", "[INST] Opposite of hot? [/INST]")
    c.eval.new_tokens = 12
    c.log.every_steps = 10
    c.stages = (
        config.stage(
            name="chat",
            kind="sft",
            sequence_length=256,
            rows_per_step=4,
            steps_per_chunk=100,
            chunks=2,
            reset_positions=True,
            rope_base=500_000.0,  # that of the smoke run's last stage
            lr_peak=2e-3,
            lr_final=1e-4,
            warmup_steps=10,
            mix={"numbers": 1, "opposites": 1},
        ),
        config.stage(
            name="prefer",
            kind="dpo",
            sequence_length=256,
            rows_per_step=4,
            steps_per_chunk=25,
            chunks=2,
            reset_positions=True,
            rope_base=500_000.0,
            lr_peak=2e-4,
            lr_final=2e-5,
            warmup_steps=5,
            mix={"preferred": 1},
        ),
    )
    return c
