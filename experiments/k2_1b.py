"""K2-1B: the K2-65B recipe on a 1.35B model, 21 tokens a parameter as K2-65B had.

Purpose: a day on one machine with eight accelerators; the model that speed is measured on.
Data: as experiments/k2_65b.py (a fiftieth of it is read).
Command: python -m k2jax.train --config=experiments/k2_1b.py --workdir=DIR
Hardware: 8 H100s; one H100 with --config.stages.0.microbatches=32 --config.stages.1.microbatches=32. 16 TPU v5e chips
  with --config.stages.0.microbatches=8 --config.stages.1.microbatches=8 --config.model.remat=q+k+v+gate: by
  tools/plan.py 48% MFU in stage one, 5.8 s a step, 10.2 of 15.8 GiB (not measured).
Tokens: stage one 360 chunks x 74 steps x 512 rows x 2048 = 27.9B; stage two 20 chunks, 1.4B.
Expected time: on 8 H100s 15 hours by tools/plan.py, 57% MFU causal (not measured). Expected loss: not known.
"""

from ml_collections import ConfigDict

from k2jax import config, k2


def get_config() -> ConfigDict:
    c = config.base()
    c.name = "k2_1b"
    c.model.dim = 2048
    c.model.num_layers = 24
    c.model.num_heads = 16
    c.model.num_kv_heads = 16
    c.model.ffn_dim = 5504
    # A chunk is 4 minutes: what it saves is enough, and checkpoint.every_steps stays 0.
    c.model.remat = "dots"
    c.stages = (
        config.stage(
            name="stage1",
            rows_per_step=512,
            microbatches=4,
            steps_per_chunk=74,
            lr_peak=4e-4,
            lr_final=4e-5,
            mix=k2.STAGE1_MIX,
        ),
        config.stage(
            name="stage2",
            sequence_length=8192,
            rope_base=500_000.0,
            rows_per_step=128,
            microbatches=4,
            steps_per_chunk=66,
            chunks=20,
            lr_peak=4e-5,
            lr_start=4e-5,
            lr_final=4e-6,
            warmup_steps=0,
            mix=k2.STAGE2_MIX,
        ),
    )
    return c
