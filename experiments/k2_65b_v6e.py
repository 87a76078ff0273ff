"""K2-65B on 256 TPU v6e chips: experiments/k2_65b_v5p.py with the settings that tools/plan.py found for v6e:16x16.

Purpose: to reproduce K2-65B on the largest v6e slice.
Data: as experiments/k2_65b.py.
Command: python -m k2jax.train --config=experiments/k2_65b_v6e.py --workdir=DIR
Hardware: v6e:16x16, 256 chips, each with a third of a v5p's memory and twice its arithmetic.
Tokens: as experiments/k2_65b_v5p.py.
Expected time, by tools/plan.py (libtpu 0.0.42), not measured: stage one 16.1 s a step, 1,015 tokens a second and chip,
  MFU 44.0% causal, 28.5 of 31.2 GiB and 50 of the host's for each chip; stage two 17.2 s, 43.8%, the same memory; 67
  days in all. The elementwise takes 4.7 s of a step: a v6e has less bandwidth for its arithmetic.
"""

from ml_collections import ConfigDict

from k2jax import config, k2


def get_config() -> ConfigDict:
    c = config.base()  # the model section and the optimizer of base() are K2-65B's
    c.name = "k2_65b_v6e"
    c.mesh.fsdp = 256
    c.model.rings = (16, 16)
    # Device memory holds the layers' inputs alone; what goes to the host's and back (1.3 GB a layer and step) is
    # cheapest to send for what it saves: with gate or up, forward would wait for the link.
    c.model.remat = "q@host+k@host+v@host+attention@host+middle@host"
    c.checkpoint.every_steps = 50  # 13 min at 16.1 s a step (14 in stage two); chunks are 4.2 hours
    c.checkpoint.moments_every = 10  # all of the 380 would be 298 TB; with every tenth 120 TB, every weight in it
    c.data.label_shift = "inside"  # K2 lost one target a row; "next" does not
    c.data.threads, c.data.prefetch = 4, 8
    c.stages = k2.stages_65b(rows=(2048, 512), microbatches=(2, 2))
    return c
