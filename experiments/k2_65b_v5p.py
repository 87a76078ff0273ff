"""K2-65B on 512 TPU v5p chips: experiments/k2_65b.py with batches of a power of two, and the settings that
tools/plan.py found for v5p:8x8x8.

Purpose: to reproduce K2-65B on a TPU pod.
Data: as experiments/k2_65b.py.
Command: python -m k2jax.train --config=experiments/k2_65b_v5p.py --workdir=DIR
Hardware: v5p:8x8x8, 512 chips.
Tokens: stage one 360 chunks x 941 steps x 2048 rows x 2048 = 1.4208T; stage two 20 chunks, 74.0B.
Expected time, by tools/plan.py (libtpu 0.0.42), not measured: stage one 10.1 s a step, 809 tokens a second and chip,
  MFU 70.2% causal, 79.4 of 95.7 GiB; stage two 10.7 s, 70.7%, 79.4 GiB; 42
  days in all. Of a step of stage one, products take 7.8 s (7.0 s of it due), the elementwise 1.3 s, attention 0.3 s,
  collectives that nothing hides 0.7 s.
"""

from ml_collections import ConfigDict

from k2jax import config, k2


def get_config() -> ConfigDict:
    c = config.base()  # the model section and the optimizer of base() are K2-65B's
    c.name = "k2_65b_v5p"
    c.mesh.fsdp = 512
    c.model.rings = (8, 8, 8)  # the torus: most of a gather goes over its first axis, 8 chips
    # As much as fits in 90% of the memory. What is computed again is cheapest for its bytes: attention, wo, up.
    c.model.remat = "q+k+v+gate"
    c.checkpoint.every_steps = 85  # 14 min at 10.1 s a step (16 in stage two); chunks are 2.7 hours
    c.checkpoint.moments_every = 10  # all of the 380 would be 298 TB; with every tenth 120 TB, every weight in it
    c.data.label_shift = "inside"  # K2 lost one target a row; "next" does not
    c.data.threads, c.data.prefetch = 4, 8
    c.stages = k2.stages_65b(rows=(2048, 512), microbatches=(1, 1))
    return c
