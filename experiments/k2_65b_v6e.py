"""K2-65B on 256 TPU v6e chips: experiments/k2_65b_v5p.py with the settings that tools/plan.py found for v6e:16x16.

Purpose: to reproduce K2-65B on the largest v6e slice.
Data: as experiments/k2_65b.py.
Command: python -m k2jax.train --config=experiments/k2_65b_v6e.py --workdir=DIR
Hardware: v6e:16x16, 256 chips, each with a third of a v5p's memory and twice its arithmetic.
Tokens: as experiments/k2_65b_v5p.py.
Expected time, by tools/plan.py (libtpu 0.0.42), not measured: stage one 15.0 s a step, 1,089 tokens a second and chip,
  MFU 47.2% causal, 31.0 of 31.2 GiB and 20 of the host's for each chip: as tight as that. Where it does not fit, take
  model.remat="q@host+k@host+v@host+attention@host+middle@host", 16.6 s and 29.9 GiB. Stage two 16.6 s,
  45.5%. The elementwise takes 3.1 s of a step: a v6e has less bandwidth for its arithmetic.
"""

from ml_collections import ConfigDict

from k2jax import config, k2


def get_config() -> ConfigDict:
    c = config.base()  # the model section and the optimizer of base() are K2-65B's
    c.name = "k2_65b_v6e"
    c.mesh.fsdp = 256
    c.model.rings = (16, 16)
    # Device memory holds the layers' inputs alone; what goes to the host's and back is cheapest to send for what it
    # saves. Forward has 14 ms a layer, in which the link takes 0.5 GB: with more of them it would wait.
    c.model.remat = "q@host+middle@host"
    c.checkpoint.every_steps = 50  # 13 min at 15 s a step (14 in stage two); chunks are 3.9 hours
    c.checkpoint.moments_every = 10  # all of the 380 would be 298 TB; with every tenth 120 TB, every weight in it
    c.data.label_shift = "inside"  # K2 lost one target a row; "next" does not
    c.data.threads, c.data.prefetch = 4, 8
    c.stages = k2.stages_65b(rows=(2048, 512), microbatches=(2, 2))
    return c
