"""Smoke: a small K2 on real text, in two stages, on any machine. `make train` runs it.

Purpose: to see everything work from raw text to sampled text, in minutes.
Data: tools/prepare_data.py --config=experiments/data/smoke.py (this Python's own sources and documentation).
Command: python -m k2jax.train --config=experiments/smoke.py --workdir=runs/smoke
Hardware: two CPU cores; about 3 minutes. Tokens: 0.6M.
Expect: validation loss well below the unigram distribution's (both are printed at the end).
"""

from ml_collections import ConfigDict

from k2jax import config


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "smoke"
    c.model.vocab_size = 4096
    c.model.dim = 224
    c.model.num_layers = 6
    c.model.num_heads = 7
    c.model.num_kv_heads = 7
    c.model.head_dim = 32
    c.model.ffn_dim = 592
    c.data.root = "data/smoke"
    c.data.tokenizer = "data/smoke/tokenizer.json"
    c.data.verify = "sha256"
    c.eval.prompts = ("def read_file(path", "This module provides")
    c.log.every_steps = 10
    # As in K2, the second stage has longer rows, a higher rope base and more code and mathematics (here: code).
    c.stages = (
        config.stage(
            name="stage1",
            sequence_length=128,
            rows_per_step=16,
            steps_per_chunk=60,
            chunks=4,
            rope_base=10_000.0,
            lr_peak=3e-3,
            lr_final=6e-4,
            warmup_steps=20,
            mix={"code": 1, "docstrings": 3, "documentation": 1},
        ),
        config.stage(
            name="stage2",
            sequence_length=512,
            rows_per_step=4,
            steps_per_chunk=30,
            chunks=2,
            rope_base=500_000.0,
            lr_peak=6e-4,
            lr_final=6e-5,
            warmup_steps=0,
            mix={"code": 3, "docstrings": 1, "documentation": 1},
        ),
    )
    return c
