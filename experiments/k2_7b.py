"""K2-7B: the K2-65B recipe on a 7B model, 21 tokens a parameter as K2-65B had.

Purpose: to check the recipe, data and machinery on a model that fits a small pod.
Data: as experiments/k2_65b.py (a tenth of it is read).
Command: python -m k2jax.train --config=experiments/k2_7b.py --workdir=DIR
Hardware: 64 TPU v5p chips or 64 H100s and up; any number of devices that divides the batches below.
Tokens: stage one 360 chunks x 186 steps x 1024 rows x 2048 = 140.4B; stage two 20 chunks, 6.9B.
Expected time: at 50% MFU on 64 v5p about 5 days (a target, not measured). Expected loss: not known.
"""

from ml_collections import ConfigDict

from k2jax import config, k2


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "k2_7b"
    c.model.dim = 4096
    c.model.num_layers = 32
    c.model.num_heads = 32
    c.model.num_kv_heads = 32
    c.model.ffn_dim = 11008
    c.model.remat = "dots"
    c.compiler.tpu = k2.TPU_OPTIONS
    c.stages = (
        config.stage(
            name="stage1",
            rows_per_step=1024,
            steps_per_chunk=186,
            lr_peak=3e-4,  # LLM360's Amber-7B
            lr_final=3e-5,
            mix=k2.STAGE1_MIX,
        ),
        config.stage(
            name="stage2",
            sequence_length=8192,
            rope_base=500_000.0,
            rows_per_step=256,
            steps_per_chunk=165,
            chunks=20,
            lr_peak=3e-5,
            lr_start=3e-5,
            lr_final=3e-6,
            warmup_steps=0,
            mix=k2.STAGE2_MIX,
        ),
    )
    return c
