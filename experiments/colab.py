"""Colab: a 30M model on the smoke corpus, for one free Colab GPU (T4, 16 GB) or TPU (8 cores, or v5e with one chip).

Purpose: the whole of k2jax in a notebook within half an hour.
Data: !python tools/prepare_data.py --config=experiments/data/smoke.py --out=data/smoke
Command: !python -m k2jax.train --config=experiments/colab.py --workdir=runs/colab
Hardware: one accelerator with 8 GB or more, or 8 TPU cores. Tokens: 16.4M + 3.3M.
Expected time: not measured. Expected loss: below the smoke experiment's.
"""

from ml_collections import ConfigDict

from k2jax import config


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "colab"
    c.model.vocab_size = 4096
    c.model.dim = 512
    c.model.num_layers = 8
    c.model.num_heads = 8
    c.model.num_kv_heads = 8
    c.model.head_dim = 64
    c.model.ffn_dim = 1376
    c.data.root = "data/smoke"
    c.data.tokenizer = "data/smoke/tokenizer.json"
    c.data.verify = "sha256"
    c.checkpoint.every_steps = 100  # Colab takes its machines back without a warning
    c.eval.prompts = ("def read_file(path", "This module provides")
    mix = {"code": 1, "docstrings": 1, "documentation": 1}
    c.stages = (
        config.stage(
            name="stage1",
            sequence_length=512,
            rows_per_step=32,
            steps_per_chunk=250,
            chunks=4,
            lr_peak=1e-3,
            lr_final=1e-4,
            warmup_steps=100,
            mix=mix,
        ),
        config.stage(
            name="stage2",
            sequence_length=2048,
            rope_base=500_000.0,
            rows_per_step=8,
            steps_per_chunk=100,
            chunks=2,
            lr_peak=1e-4,
            lr_start=1e-4,
            lr_final=1e-5,
            warmup_steps=0,
            mix=mix,
        ),
    )
    return c
