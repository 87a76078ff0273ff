"""K2-7B: the K2-65B recipe on a 7B model, 21 tokens a parameter as K2-65B had.

Purpose: to check the recipe, data and machinery on a model that fits a small pod.
Data: as experiments/k2_65b.py (a tenth of it is read).
Command: python -m k2jax.train --config=experiments/k2_7b.py --workdir=DIR
Hardware: 64 TPU v5p chips or 64 H100s and up; any number of devices that divides the batches below. 64 TPU v6e chips,
  of a third of a v5p's memory, with --config.model.remat=full.
Tokens: stage one 360 chunks x 186 steps x 1024 rows x 2048 = 140.4B; stage two 20 chunks, 6.9B.
Expected time, by tools/plan.py (libtpu 0.0.42), not measured: on v5p:4x4x4 stage one 4.3 s a step, MFU 68.1% causal,
  66.9 of 95.7 GiB, 3.3 days; on v6e:8x8 stage one 3.6 s, 41.4%, 20.0 of 31.2 GiB, stage two 4.1 s, 39.8%, 20.8 GiB,
  2.9 days in all. There remat=q@host+k@host+v@host takes 1% off stage one, for 24 GiB of the host's memory a chip, and
  two microbatches with q+k+v 7% more. H100s were not planned. Expected loss: not known.
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
    # A chunk is 13 minutes: what it saves is enough, and checkpoint.every_steps stays 0.
    c.model.remat = "q+k+v+gate"  # all of "dots" takes 97 GiB on v5p:4x4x4
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
