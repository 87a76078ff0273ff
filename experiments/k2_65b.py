"""K2-65B: LLM360's model, both stages, as published; what was not published is marked "our choice".

Purpose: to reproduce K2-65B (65,286,184,960 parameters).
Data: a store for each subset of k2jax/k2.py under data/k2, tokenized with LLaMA's 32,000 tokens and K2's 18 more.
Command: python -m k2jax.train --config=experiments/k2_65b.py --workdir=DIR
Hardware: 480 devices with 80 GB, as K2 had (A100; 15 x 4 data parallel, 8 tensor parallel). On TPUs, whose numbers do
  not divide K2's batch of 2040 rows: experiments/k2_65b_v5p.py, k2_65b_v6e.py.
Tokens: stage one 360 chunks x 941 steps x 2040 rows x 2048 = 1.4153T; stage two 20 chunks, 69.4B.
Memory, by tools/plan.py: 34.4 of 74.5 GiB on a100:480, 10.7 of them parameters and moments (of 15 replicas, which
  divide no dimension, 3 copies of 5 split the moments).
Expected time: not measured. By the plan 60 s a step there, MFU 18.5%, 28 s of it waiting for fsdp's gathers and
  scatters between hosts. At 39% MFU on 512 H100 about 33 days (a target). Expected loss: not published.
"""

from ml_collections import ConfigDict

from k2jax import config, k2


def get_config() -> ConfigDict:
    c = config.base()  # the model section and the optimizer of base() are K2-65B's
    c.name = "k2_65b"
    c.model.remat = "full"
    c.mesh.replica, c.mesh.fsdp, c.mesh.tensor = 15, 4, 8
    c.checkpoint.every_steps = 100  # 14 min at 8.5 s a step, which 39% MFU on 480 H100 is; chunks are 2.2 hours
    c.checkpoint.moments_every = 10  # all of the 380 would be 298 TB; with every tenth 120 TB, every weight in it
    c.data.label_shift = "inside"  # K2 lost one target a row; "next" does not
    c.data.threads, c.data.prefetch = 4, 8
    c.stages = k2.stages_65b(rows=(2040, 480), microbatches=(17, 8))  # stage two's 480: our choice, 3.9M tokens
    return c
